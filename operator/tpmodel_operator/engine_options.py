"""The worker's engine options that a TPModel may set, and what their values look like.

Values are strings in YAML and on the worker's command line (`--engine-option KEY=VALUE`); a typo is refused when the
TPModel is applied, not minutes later by a pod.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpmodel_operator.api_types import must


@dataclass(frozen=True, slots=True)
class OptionShape:
    """What a value must match, and how to say so."""

    pattern: str
    help: str


_COUNT = OptionShape(r"^[1-9][0-9]{0,8}$", "a whole number of at least 1")
_COUNT_OR_NONE = OptionShape("^(0|[1-9][0-9]{0,5})$", "a whole number of at least 0")
_SIZE = OptionShape(r"^[0-9]{1,15}([.][0-9]{1,3})?([KMGT]i?)?$", "a size such as 500M or 2Gi")
_FLAG = OptionShape("^(true|false)$", "'true' or 'false', in quotes")
_SECONDS = OptionShape(r"^[1-9][0-9]{0,5}([.][0-9]{1,3})?$", "seconds of at least 1, such as 30")

ENGINE_OPTIONS: dict[str, OptionShape] = {
    "max_num_seqs": _COUNT,
    "max_num_batched_tokens": OptionShape("^(1[6-9]|[2-9][0-9]|[1-9][0-9]{2,8})$", "a whole number of at least 16"),
    "block_size": OptionShape("^([1-9][0-9]?|1[0-9][0-9]|2[0-4][0-9]|25[0-6])$", "a whole number from 1 to 256"),
    "kv_cache_memory": _SIZE,
    "prefix_cache": _FLAG,
    "state_snapshots": _COUNT_OR_NONE,
    "queue_limit": _COUNT,
    "api_processes": OptionShape("^([1-9]|[1-5][0-9]|6[0-4])$", "a whole number from 1 to 64"),
    "communicator": OptionShape("^(auto|shared_memory|gloo|nccl)$", "auto, shared_memory, gloo or nccl"),
    "step_deadline": _SECONDS,
    "respawn": OptionShape("^(cold|fork|spare)$", "cold, fork or spare"),
    "rebuild_limit": _COUNT_OR_NONE,
    "rebuild_wait": _SECONDS,
    "rebuild_stability_window": _SECONDS,
    "expert_parallel": _FLAG,
    "dummy_seed": OptionShape("^[0-9]{1,18}$", "a whole number"),
}

OPTION_RULES = (
    must(
        "self.all(key, key in [" + ", ".join(f"'{name}'" for name in ENGINE_OPTIONS) + "])",
        "engine options are " + ", ".join(ENGINE_OPTIONS),
    ),
    *(
        must(f"!('{name}' in self) || self['{name}'].matches('{shape.pattern}')", f"{name}: write {shape.help}")
        for name, shape in ENGINE_OPTIONS.items()
    ),
)
"""CEL rules of the map engineOptions."""
