"""Becomes another program that dies with the supervisor.

`python -m tpmodel_worker.supervisor.exec_child PARENT_PID COMMAND...`: asks the kernel to SIGKILL this process when
its parent ends, then replaces itself by the command, which keeps that request. A program of its own, since the
alternative, code between fork and exec in the supervisor, is unsafe there: gRPC has threads.
"""

from __future__ import annotations

import os
import sys

from tpmodel_worker.supervisor.linux import ParentGoneError, die_with_parent


def main(arguments: list[str]) -> None:
    """Replaces this process by the command; returns only by raising."""
    parent, *command = arguments
    try:
        die_with_parent(int(parent))
    except ParentGoneError as error:
        sys.exit(str(error))
    os.execvp(command[0], command)  # noqa: S606 - the command is the supervisor's own


if __name__ == "__main__":
    main(sys.argv[1:])
