"""For a ring whose tests must run: one that was skipped fails the run.

A skip is how a missing dependency hides; the run would show nothing, and pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter


def skipped(config: pytest.Config, folder: Path) -> list[str]:
    """Tests and whole modules of a folder that were skipped; a failure that was expected has run."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    assert isinstance(reporter, TerminalReporter)
    reports = reporter.stats.get("skipped", [])
    return [report.nodeid for report in reports if (config.rootpath / report.fspath).is_relative_to(folder)]


def fail_if_skipped(session: pytest.Session, folder: Path) -> None:
    """For pytest_sessionfinish: sets the exit status of a run that would pass, and says why."""
    found = skipped(session.config, folder)
    if found and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        reporter.write_line(f"\nnone of these tests may be skipped: {', '.join(found)}", red=True)
