"""torch's flight recorder: notes every collective of the process, with a traceback, for a dump after a hang.

It is not safe where several threads have groups of their own (as of torch 2.11): a group's first collective is put
into a map without the recorder's lock, and two at the same time end the process by a segmentation fault. Gangs tell
their hangs in other ways, so it stays off.
"""

from __future__ import annotations

import os
import threading

_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")

RECORDING = threading.Lock()
"""Held while a collective begins that may be recorded: somebody may have turned the recorder on, or have used it before
it could be turned off. Not where beginning one waits for peers."""


def keep_off() -> None:
    """To be called before a group is made. Who has set the recorder's size wants it."""
    if not any(name in os.environ for name in _SIZES):
        os.environ[_SIZES[0]] = "0"
