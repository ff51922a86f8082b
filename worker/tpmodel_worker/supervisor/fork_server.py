"""Forks rank and rendezvous processes from an interpreter that has imported what they need.

`python -m tpmodel_worker.supervisor.fork_server --socket-fd N ...`, exec'd by the supervisor with one end of a socket
pair. It imports torch once, holds no CUDA context, no thread and no gRPC (none survives a fork), and answers one
ForkRequest after the other; each brings two descriptors, the child's standard output and error. The child is forked
twice, so that it becomes the supervisor's (which is a subreaper): the supervisor waits for it, and the fork server's
own death touches no rank.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tpmodel.v1 import pod_pb2
from tpmodel_worker.framing import receive_message, send_message
from tpmodel_worker.supervisor.entry import run_entry
from tpmodel_worker.supervisor.linux import ParentGoneError, die_with_parent, set_process_name, thread_count

_PID = struct.Struct("<i")
_FIRST_INHERITED_DESCRIPTOR = 3
_ADOPTION_SECONDS = 10.0
# Modules whose threads or handles would not survive the fork.
_FORBIDDEN = ("grpc",)


class NotForkableError(Exception):
    """This process has something that a forked child could not use."""


def preload(modules: Sequence[str]) -> None:
    """Imports the modules; a name ending in "?" may be absent (triton, in builds of torch for the CPU)."""
    for module in modules:
        name = module.removesuffix("?")
        if name == module or importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def check_forkable() -> None:
    """Raises NotForkableError unless a child forked now starts clean."""
    loaded = [name for name in _FORBIDDEN if name in sys.modules]
    if loaded:
        raise NotForkableError(f"the fork server has imported {', '.join(loaded)}, which must come after the fork")
    if threading.active_count() != 1 or thread_count() != 1:
        raise NotForkableError(
            f"the fork server has {thread_count()} threads ({threading.active_count()} of Python); only one may fork"
        )
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise NotForkableError("the fork server has a CUDA context, which no child could use")


def fork_orphan(run: Callable[[], int]) -> int:
    """Runs a function in a grandchild whose parent has ended, and returns its pid."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            grandchild = os.fork()
            if grandchild == 0:
                os.close(read_end)
                os.close(write_end)
                os._exit(run())
            os.write(write_end, _PID.pack(grandchild))
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if len(answer) != _PID.size:
        raise OSError("the second fork failed: out of processes or memory")
    return int(_PID.unpack(answer)[0])


def run_child(entry: str, request: pod_pb2.ForkRequest, supervisor: int, output: Sequence[int]) -> int:
    """The life of a forked child: binds it to the supervisor, then runs `module:function`; its exit code."""
    # First, so that whatever follows is labelled and seen.
    os.dup2(output[0], sys.stdout.fileno())
    os.dup2(output[1], sys.stderr.fileno())
    os.closerange(_FIRST_INHERITED_DESCRIPTOR, os.sysconf("SC_OPEN_MAX"))
    try:
        die_with_parent(supervisor, wait_seconds=_ADOPTION_SECONDS)
    except ParentGoneError:
        return 1
    return run_entry(entry, request)


def serve(connection: socket.socket, entries: dict[str, str], supervisor: int) -> None:
    """Answers requests until the supervisor closes the connection."""
    while (received := receive_message(connection, pod_pb2.ForkRequest)) is not None:
        request, output = received
        response = pod_pb2.ForkResponse(id=request.id)
        try:
            check_forkable()
            response.pid = fork_orphan(lambda: run_child(entries[request.role], request, supervisor, output))  # noqa: B023
        except (NotForkableError, OSError) as error:
            response.error = str(error)
        for descriptor in output:
            os.close(descriptor)
        send_message(connection, response)


def main() -> None:
    """Prepares, reports ready (a ForkResponse with id 0), and serves."""
    parser = argparse.ArgumentParser(prog="fork_server")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--supervisor", type=int, required=True, help="pid that forked processes belong to")
    parser.add_argument("--entry", action="append", default=[], help="ROLE=MODULE:FUNCTION")
    parser.add_argument("--preload", nargs="*", default=[])
    arguments = parser.parse_args()
    set_process_name("tpmodel-fork")
    with socket.socket(fileno=arguments.socket_fd) as connection:
        try:
            die_with_parent(arguments.supervisor)
            preload(arguments.preload)
            check_forkable()
        except (ImportError, NotForkableError, ParentGoneError) as error:
            sys.exit(f"fork server: {error}")
        # What is imported now stays shared with every child: the collector would write to its pages.
        gc.collect()
        gc.freeze()
        send_message(connection, pod_pb2.ForkResponse(pid=os.getpid()))
        serve(connection, dict(entry.split("=", 1) for entry in arguments.entry), arguments.supervisor)


if __name__ == "__main__":
    main()
