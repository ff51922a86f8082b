"""For a ring whose tests must run: one that was skipped fails the run.

A skip is how a missing dependency hides; the run would show nothing, and pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter


def fail_if_skipped(session: pytest.Session, folder: Path) -> None:
    """For pytest_sessionfinish: a run that would pass fails, and names tests and modules of the folder it skipped.

    A failure that was expected has run.
    """
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    assert isinstance(reporter, TerminalReporter)
    skips = reporter.stats.get("skipped", [])
    names = [skip.nodeid for skip in skips if (session.config.rootpath / skip.fspath).is_relative_to(folder)]
    if names and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"\nnone of these tests may be skipped: {', '.join(names)}", red=True)
