"""Where the version that a gang committed last is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpmodel_worker.engine.committed import CommittedVersion


def test_what_was_noted_is_read_by_the_next_engine(tmp_path: Path) -> None:
    """E46."""
    files = [tmp_path / "one", tmp_path / "two"]
    assert CommittedVersion("", files).read() == 0
    CommittedVersion("", files).note(7)
    assert CommittedVersion("", files[1:]).read() == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(("said", "noted", "version"), [("5", 3, 5), ("5\n", 7, 7), ("five", 3, 3), ("-1", 0, 0)])
def test_the_highest_counts(tmp_path: Path, said: str, noted: int, version: int) -> None:
    """The operator's file may be older than the engine's own, and the other way round."""
    (tmp_path / "weights-version").write_text(said)
    committed = CommittedVersion(str(tmp_path), [tmp_path / "own"])
    if noted:
        committed.note(noted)
    assert committed.read() == version


def test_what_another_gang_has_committed_counts_only_for_one_without_memory(tmp_path: Path) -> None:
    """A folder for updates may be shared: a gang that serves an older version goes on doing so."""
    shared = tmp_path / "shared" / "committed"
    one, other = CommittedVersion("", [tmp_path / "one"]), CommittedVersion("", [tmp_path / "other"])
    for committed, version in ((one, 1), (other, 2)):
        committed.share(shared)
        committed.note(version)
    assert (one.read(), one.read(shared=True)) == (1, 2)


def test_one_file_that_cannot_be_written_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    committed = CommittedVersion("", [tmp_path / "file" / "inside", tmp_path / "own"])
    with pytest.raises(OSError, match="file"):
        committed.note(2)
    assert committed.read() == 2
