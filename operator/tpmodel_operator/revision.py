"""The hash in a gang's name: which spec, and which image, its pods were made from.

It covers what pods depend on, never what an operator renders from it: a newer operator moves no gang. Fields at
their default are left out, so that a field added later, with a default, moves nothing either.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tpmodel_operator import defaults
from tpmodel_operator.api import TPModelSpec

LENGTH = 5
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""No vowels, so no words; nothing that looks like something else."""

_NOT_OF_PODS: dict[str, Any] = {
    "replicas": True,
    "rollout": True,
    "disruption_budget": True,
    "service": True,
    "weight_updates": {"from_"},
    "image": {"reference"},
    "ranks_per_pod": True,
    "recovery": {
        "mode",
        "deadline",
        "max_restarts",
        "backoff_base",
        "backoff_limit",
        "stability_window",
        "formation_deadline",
    },
}
"""What the operator alone reads, and what goes in by its resolved value."""


def revision(spec: TPModelSpec, image: str, weights_reset: str = "") -> str:
    """Five characters; the same for specs that give the same pods.

    Args:
        spec: of the TPModel.
        image: the resolved one.
        weights_reset: what its user last wrote to go back to the checkpoint.
    """
    content = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_NOT_OF_PODS)
    content = {name: value for name, value in content.items() if value != {}}
    content["image"] = content.get("image", {}) | {"resolved": image}
    if spec.recovery.mode != "Restart":
        # Whatever the default: objects hold the one of the time when they were made.
        content["recovery"] = content.get("recovery", {}) | {"mode": spec.recovery.mode}
    ranks = defaults.ranks_per_pod(spec)
    if ranks != defaults.ranks_per_pod(spec.model_copy(update={"ranks_per_pod": None})):
        content["ranksPerPod"] = ranks
    if weights_reset:
        content["weightsReset"] = weights_reset
    return short_hash(content)


def short_hash(content: dict[str, Any]) -> str:
    """Five characters out of anything that JSON can say."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    number = int.from_bytes(hashlib.sha256(canonical.encode()).digest())
    letters = []
    for _ in range(LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)
