"""What a fork server must not have when it forks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tpmodel_worker.supervisor.entries import EntryPoints


def start(*preload: str, supervisor: int | None = None) -> subprocess.CompletedProcess[str]:
    """Starts a fork server whose other end is closed, so that it ends where it would serve."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)
        command = [sys.executable, "-m", "tpmodel_worker.supervisor.fork_server", f"--socket-fd={theirs.fileno()}"]
        command += [f"--supervisor={supervisor or os.getpid()}", "--preload", *preload]
        return subprocess.run(
            command,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )


def test_it_refuses_to_fork_with_grpc() -> None:
    done = start("grpc")
    assert done.returncode == 1
    assert "the fork server has imported grpc, which must come after the fork" in done.stderr


def test_it_names_a_module_that_is_missing() -> None:
    done = start("no_such_module")
    assert done.returncode == 1
    assert "No module named 'no_such_module'" in done.stderr


def test_a_module_that_may_be_absent_is_passed_over() -> None:
    assert start("no_such_module?").returncode == 0


def test_torch_and_the_ranks_modules_bring_no_thread_no_grpc_and_no_context() -> None:
    done = start(*EntryPoints().preload)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_does_not_start_without_its_supervisor() -> None:
    """P3: one whose supervisor ended meanwhile would belong to nobody."""
    done = start(supervisor=1)
    assert done.returncode == 1
    assert "process 1 is not the parent" in done.stderr
