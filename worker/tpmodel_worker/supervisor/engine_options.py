"""--engine-option KEY=VALUE: settings of the engine that need no flag of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tpmodel_worker.supervisor.configuration import ConfigurationError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class _Option:
    setting: str
    """The field of ServeSettings."""
    read: Callable[[str], Any]
    """Raises ValueError."""
    help: str


def _count(lowest: int, highest: int = 2**31 - 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not lowest <= value <= highest:
            raise ValueError(text)
        return value

    return read


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _choice(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    return read


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError(text)
    return value


_COMMUNICATORS = ("auto", "shared_memory", "gloo", "nccl")
_OPTIONS: Mapping[str, _Option] = MappingProxyType(
    {
        "max_num_seqs": _Option("max_num_seqs", _count(1), "a whole number of at least 1"),
        "max_num_batched_tokens": _Option("max_num_batched_tokens", _count(16), "a whole number of at least 16"),
        "block_size": _Option("block_size", _count(1, 256), "a whole number from 1 to 256"),
        "kv_cache_memory": _Option("kv_cache_bytes", _size, "a size such as 500M or 2Gi"),
        "prefix_cache": _Option("prefix_cache", _flag, "true or false"),
        "state_snapshots": _Option("state_snapshots", _count(0), "a whole number of at least 0"),
        "queue_limit": _Option("queue_limit", _count(1), "a whole number of at least 1"),
        "api_processes": _Option("api_processes", _count(1, 64), "a whole number from 1 to 64"),
        "communicator": _Option("communicator", _choice(*_COMMUNICATORS), "auto, shared_memory, gloo or nccl"),
        "step_deadline": _Option("step_deadline", _seconds, "seconds, such as 30"),
        "respawn": _Option("respawn", _choice("cold", "fork", "spare"), "cold, fork or spare"),
        "rebuild_limit": _Option("rebuild_limit", _count(0), "a whole number of at least 0"),
        "rebuild_wait": _Option("rebuild_wait", _seconds, "seconds, such as 60"),
        "rebuild_stability_window": _Option("rebuild_stability_window", _seconds, "seconds, such as 300"),
        "expert_parallel": _Option("expert_parallel", _flag, "true or false"),
        "dummy_seed": _Option("dummy_seed", _count(0, 2**63 - 1), "a whole number"),
    }
)


def read_engine_options(given: Sequence[str]) -> dict[str, Any]:
    """Fields of ServeSettings with their values; of an option that is given twice the last counts.

    Raises:
        ConfigurationError: naming the option and what would be right.
    """
    values: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigurationError(f"--engine-option {text}: write KEY=VALUE")
        option = _OPTIONS.get(key)
        if option is None:
            raise ConfigurationError(f"--engine-option {key}: there is none of that name, only {', '.join(_OPTIONS)}")
        try:
            values[option.setting] = option.read(value)
        except (ValueError, KeyError) as error:
            raise ConfigurationError(f"--engine-option {key}={value}: write {option.help}") from error
    return values
