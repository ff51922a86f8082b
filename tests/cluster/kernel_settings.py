"""Kernel settings that kubelet changes for the whole machine: remembered at the start and put back at the end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

SYSTEM = Path("/proc/sys")
CHANGED = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


def remember(record: Path) -> None:
    """Writes their values to the file, unless an earlier start already has."""
    if record.exists():
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    values = {name: (SYSTEM / name).read_text() for name in CHANGED if (SYSTEM / name).exists()}
    record.write_text(json.dumps(values))


def put_back(record: Path) -> None:
    """Sets what differs from the file and removes it."""
    if not record.exists():
        return
    for name, value in json.loads(record.read_text()).items():
        file = SYSTEM / name
        # Some machines show a setting that even root may not change; then kubelet could not either.
        with contextlib.suppress(OSError):
            if file.read_text() != value:
                file.write_text(value)
    record.unlink()
