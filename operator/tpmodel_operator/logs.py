"""Logging of the operator: JSON lines for machines, short lines for a terminal, on standard error.

Fields beside the message go through `extra={"model": "namespace/name", ...}`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

FIELDS = ("model", "gang", "attempt", "cause", "seconds", "status")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message and the known extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _fields(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Time, level and message, with the known extra fields behind."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line (and its traceback, when it has one)."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{clock} {record.levelname.lower()}: {record.getMessage()}" + (f" [{extras}]" if extras else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(log_format: Literal["auto", "json", "text"] = "auto", level: int = logging.INFO) -> None:
    """Sets the root logger up; auto means text on a terminal and JSON elsewhere."""
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
