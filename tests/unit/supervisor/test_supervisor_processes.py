"""The process table, over real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from tpmodel_worker.supervisor.processes import Process, ProcessTable

IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print('armed', flush=True); time.sleep(60)"


@pytest.fixture
async def table() -> AsyncIterator[ProcessTable]:
    table = ProcessTable(lambda _name, _line: None)
    yield table
    await table.kill(table.processes)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def printed(table_factory: Callable[..., ProcessTable], code: str) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    table = table_factory(lambda name, line: lines.append((name, line)))
    process = await table.execute("api 0", python(code))
    await asyncio.wait_for(process.ended(), 20)
    return lines


async def test_an_exit_code_and_the_last_stderr_lines_are_kept(table: ProcessTable) -> None:
    code = "import sys; print('out'); sys.stderr.write('first\\nlast\\n'); sys.exit(3)"
    process = await table.execute("engine", python(code))

    ended = await asyncio.wait_for(process.ended(), 20)

    assert (ended.code, ended.signal) == (3, None)
    assert ended.last_stderr_lines == ("first", "last")
    assert not process.alive


async def test_a_signal_is_told_from_a_code(table: ProcessTable) -> None:
    process = await table.execute("engine", python("import time; time.sleep(60)"))
    process.send_signal(signal.SIGKILL)
    ended = await asyncio.wait_for(process.ended(), 20)
    assert (ended.code, ended.signal) == (None, signal.SIGKILL)


async def test_both_streams_are_read() -> None:
    lines = await printed(ProcessTable, "import sys; print('out', flush=True); sys.stderr.write('err')")
    assert sorted(lines) == [("api 0", "err"), ("api 0", "out")]


async def test_variables_are_added_and_standard_input_is_empty() -> None:
    lines: list[str] = []
    table = ProcessTable(lambda _name, line: lines.append(line))
    code = "import os, sys; print(os.environ['ADDED'], bool(os.environ.get('PATH')), repr(sys.stdin.read()))"
    process = await table.execute("engine", python(code), environment={"ADDED": "yes"})
    await asyncio.wait_for(process.ended(), 20)
    assert lines == ["yes True ''"]


async def test_ending_asks_first_and_then_makes() -> None:
    """P16: bounded wait, then kill."""
    armed = asyncio.Event()
    table = ProcessTable(lambda _name, _line: armed.set())
    stubborn = await table.execute("stubborn", python(IGNORES_SIGTERM))
    willing = await table.execute("willing", python("import time; time.sleep(60)"))
    await asyncio.wait_for(armed.wait(), 20)

    await table.end([stubborn, willing], 0.5)

    assert stubborn.exited.result().signal == signal.SIGKILL
    assert willing.exited.result().signal == signal.SIGTERM
    await table.end([stubborn, willing], 0.5)


async def test_waiting_for_an_end_can_be_given_up(table: ProcessTable) -> None:
    process = await table.execute("engine", python("import time; time.sleep(60)"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.ended(), 0.05)
    process.send_signal(signal.SIGKILL)
    assert (await asyncio.wait_for(process.ended(), 20)).signal == signal.SIGKILL


async def test_listeners_hear_of_start_service_and_end(table: ProcessTable) -> None:
    states: list[str] = []

    def note(process: Process) -> None:
        states.append(process.state)

    stop = table.listen(note)
    process = await table.execute("engine", python("import time; time.sleep(60)"))
    table.mark_running(process, 9001)
    table.mark_running(process, 9001)
    await table.kill([process])
    await asyncio.sleep(0)
    stop()
    await table.execute("engine", python(""))

    assert states == ["starting", "running", "exited"]
    assert process.port == 9001


async def test_restarts_are_counted_by_name(table: ProcessTable) -> None:
    for _ in range(3):
        process = await table.execute("api 0", python(""))
        await asyncio.wait_for(process.ended(), 20)
    assert [(process.name, process.restarts) for process in table.processes] == [("api 0", 2)]


async def test_an_output_that_stays_open_does_not_hide_the_end(table: ProcessTable) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '5'])"
    process = await table.execute("api 0", python(code))
    ended = await asyncio.wait_for(process.ended(), 4)
    assert ended.code == 0


async def test_a_program_dies_with_the_process_that_started_it() -> None:
    """P3: the exec'd ones too."""
    child_code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"""
import asyncio
from tpmodel_worker.supervisor.processes import ProcessTable
async def main():
    table = ProcessTable(lambda name, line: print(line, flush=True))
    await table.execute("engine", [{sys.executable!r}, "-c", {child_code!r}])
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(await asyncio.wait_for(parent.stdout.readline(), 20)))

    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()

    await asyncio.to_thread(child.wait, 2)


async def test_a_program_whose_parent_is_gone_does_not_start() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tpmodel_worker.supervisor.exec_child", "1", sys.executable, "-c", "print('started')"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 20)
    assert (output, process.returncode) == (b"", 1)
    assert b"process 1 is not the parent" in errors
