"""A rank or rendezvous process in an interpreter of its own, as `python -m tpmodel_worker.supervisor.cold_start`."""

from __future__ import annotations

import argparse
import os
import sys

from tpmodel.v1 import pod_pb2
from tpmodel_worker.supervisor.entry import run_entry
from tpmodel_worker.supervisor.linux import ParentGoneError, die_with_parent


def main() -> int:
    """Binds its life to the supervisor's, then runs the entry; the exit code."""
    parser = argparse.ArgumentParser(prog="cold_start")
    parser.add_argument("--supervisor", type=int, required=True, help="pid of the process that started this one")
    parser.add_argument("--request-fd", type=int, required=True, help="a file that holds a ForkRequest")
    parser.add_argument("--entry", required=True, help="MODULE:FUNCTION")
    arguments = parser.parse_args()
    try:
        die_with_parent(arguments.supervisor)
    except ParentGoneError as error:
        sys.stderr.write(f"cold start: {error}\n")
        return 1
    with os.fdopen(arguments.request_fd, "rb") as file:
        file.seek(0)
        request = pod_pb2.ForkRequest.FromString(file.read())
    return run_entry(arguments.entry, request)


if __name__ == "__main__":
    # As forked processes end: no finalizers, which could wait for threads that are stuck in a collective.
    os._exit(main())
