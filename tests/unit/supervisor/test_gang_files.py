"""What the operator leaves word of, beside the attempt."""

from pathlib import Path

import pytest

from tpmodel_worker.gang_files import read_model_revision, read_rebuild, read_weights_version

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "rebuild").write_text("3\n")
    (tmp_path / "model-revision").write_text(COMMIT)
    (tmp_path / "weights-version").write_text("12\n")
    assert read_rebuild(str(tmp_path)) == 3
    assert read_weights_version(str(tmp_path)) == 12
    assert read_model_revision(str(tmp_path)) == COMMIT


@pytest.mark.parametrize("text", ["", "\n", "-1", "1.5", "main", "\u0663", COMMIT[:39] + "G"])
def test_anything_else_says_nothing(tmp_path: Path, text: str) -> None:
    for name in ("rebuild", "model-revision", "weights-version"):
        (tmp_path / name).write_text(text)
    assert read_rebuild(str(tmp_path)) is None
    assert read_weights_version(str(tmp_path)) == 0
    assert read_model_revision(str(tmp_path)) == ""


def test_files_and_folders_that_are_not_there_say_nothing(tmp_path: Path) -> None:
    for folder in ("", str(tmp_path), str(tmp_path / "none")):
        assert read_rebuild(folder) is None
        assert read_weights_version(folder) == 0
        assert read_model_revision(folder) == ""


def test_a_new_version_is_seen_though_it_comes_by_a_link_that_turns(tmp_path: Path) -> None:
    """As the kubelet does it with a ConfigMap."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "rebuild").write_text(version)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "rebuild").symlink_to("..data/rebuild")
    assert read_rebuild(str(tmp_path)) == 1
    (tmp_path / "..new").symlink_to("2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert read_rebuild(str(tmp_path)) == 2
