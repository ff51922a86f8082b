"""End-to-end tests are not skipped: a run with a skip fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
CONFTEST = """
from pathlib import Path
from support.no_skips import fail_if_skipped

def pytest_sessionfinish(session):
    fail_if_skipped(session, Path(__file__).parent)
"""
PASSES = "def test_it(): pass\n"
CASES = {
    "passes": (PASSES, 0),
    "skips a test": ("import pytest\ndef test_it(): pytest.skip('no cluster')\n", 1),
    "marks a test": ("import pytest\n@pytest.mark.skipif(True, reason='no')\ndef test_it(): pass\n", 1),
    "skips a module": ("import pytest\npytest.importorskip('there_is_no_such_module')\n" + PASSES, 1),
    "fails as expected": ("import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n", 0),
}


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini=addopts="]
    command += [f"--override-ini=pythonpath={TESTS}", f"--rootdir={folder}", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("what", CASES)
def test_a_run_with_a_skip_fails_and_names_it(tmp_path: Path, what: str) -> None:
    content, status = CASES[what]
    ring = tmp_path / "ring"
    ring.mkdir()
    (ring / "conftest.py").write_text(CONFTEST)
    (ring / "test_first.py").write_text(PASSES)
    (ring / "test_second.py").write_text(content)
    result = run(tmp_path)
    assert result.returncode == status, result.stdout + result.stderr
    assert ("none of these tests may be skipped: ring/test_second.py" in result.stdout) == bool(status)


def test_a_skip_in_another_ring_does_not_count(tmp_path: Path) -> None:
    for ring, content in (("ring", PASSES), ("other", CASES["skips a test"][0])):
        (tmp_path / ring).mkdir()
        (tmp_path / ring / f"test_{ring}.py").write_text(content)
    (tmp_path / "ring" / "conftest.py").write_text(CONFTEST)
    assert run(tmp_path).returncode == 0
