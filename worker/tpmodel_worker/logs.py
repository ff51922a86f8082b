"""Logging of every process: JSON lines for machines, short lines for a terminal, on standard error.

Fields beside the message go through `extra={"request_id": ..., "epoch": ..., "seq": ...}`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Literal

FIELDS = ("request_id", "epoch", "seq", "rank", "pid", "pod", "kind", "cause")


def text_label(process: str) -> str:
    """How a line of text starts that a process of the pod printed."""
    return f"[{process}] "


def message_of(line: str) -> str:
    """The message of a line that one of this module's formatters made; any other line as it is."""
    if line.startswith("{"):
        try:
            return str(json.loads(line)["message"])
        except (ValueError, KeyError):
            return line
    return re.sub(r"^\[[^]]*\] [a-z]+: ", "", line)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, process, logger, message and the known extra fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Process in brackets, level and message, with the known extra fields behind."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._start = text_label(process)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line (and its traceback, when it has one)."""
        message = record.getMessage()
        fields = {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        # Mostly the message says it already: a program wants it apart, a person does not.
        if str(fields.get("cause", "")) in message:
            fields.pop("cause", None)
        extras = " ".join(f"{field}={value}" for field, value in fields.items())
        line = f"{self._start}{record.levelname.lower()}: {message}"
        line = f"{line} [{extras}]" if extras else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(process: str, log_format: Literal["auto", "json", "text"] = "auto", level: int = logging.INFO) -> None:
    """Sets the root logger up; auto means text on a terminal and JSON elsewhere."""
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(process) if text else JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
