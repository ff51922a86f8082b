"""A SIGTERM that comes before Python is up: images start the command with the signal blocked, so that it waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ASKED_BEFORE_IT_WAS_UP = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
from tpmodel_worker.supervisor.command import main
main(["--help"])
"""


def test_a_pod_asked_to_end_before_its_command_runs_ends_at_once_with_0() -> None:
    ran = subprocess.run([sys.executable, "-c", ASKED_BEFORE_IT_WAS_UP], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_image_starts_the_command_with_the_signal_blocked() -> None:
    line = "sed -i '1s|^#!|#!/usr/bin/env -S --block-signal=TERM |' /opt/tpmodel/bin/tpmodel-worker"
    assert line in (ROOT / "Dockerfile.worker").read_text()
