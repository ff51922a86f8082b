"""What a person, or a program, reads of a supervisor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.supervised import READY_LINE, stand_in_settings
from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.events import Ended, EngineStateChanged, Output, Ready
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.terminal import Terminal


def test_the_ready_line_alone_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = stand_in_settings(tmp_path, port=9000, http_port=8000)
    terminal = Terminal("text")
    terminal.on_event(Output("rank 0", "hello"))
    terminal.on_event(Ready(settings, 3.14159))

    captured = capsys.readouterr()
    expected = "tpmodel: ready: grpc 127.0.0.1:9000 http http://127.0.0.1:8000 model stand-in tp 2 (3.1 s)\n"
    assert captured.out == expected
    assert READY_LINE.match(expected)
    assert captured.err == "[rank 0] hello\n"


def test_the_cause_of_the_end_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal("text").on_event(Ended(Ending(ExitCode.RESTART_GANG, "rank 1 died")))
    assert capsys.readouterr().err == "tpmodel: ended: rank 1 died\n"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal("json").on_event(Ended(Ending(ExitCode.RESTART_GANG, "rank 1 died")))
    assert json.loads(capsys.readouterr().err) == {"process": "supervisor", "message": "tpmodel: ended: rank 1 died"}


def test_off_a_terminal_load_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal("text")
    for done in (0, 50, 100):
        state = worker_pb2.EngineState(phase=worker_pb2.PHASE_LOADING, load_done_bytes=done, load_total_bytes=100)
        terminal.on_event(EngineStateChanged(state))
    assert capsys.readouterr().err == "tpmodel: loading: 0 of 100 bytes (0%)\n"
