"""What a rank or rendezvous process does first, however it came about."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from tpmodel.v1 import pod_pb2
from tpmodel_worker import logs
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.linux import set_process_name


def run_entry(entry: str, request: pod_pb2.ForkRequest) -> int:
    """Runs `module:function` with the request's settings, and rank if it has one; the exit code."""
    try:
        name = f"rank {request.rank}" if request.role == "rank" else request.role
        set_process_name(f"tpmodel-{name.replace(' ', '')}")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(request.environment)
        settings = ServeSettings.from_json(request.settings_json)
        logs.configure(name, settings.log_format)
        module, _, function = entry.partition(":")
        main: Callable[..., int | None] = getattr(importlib.import_module(module), function)
        return (main(settings, request.rank) if request.role == "rank" else main(settings)) or 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of a process whose interpreter never exits normally
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
