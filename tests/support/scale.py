"""How much of each long test runs: CI takes a slice that fits its hour, TPMODEL_TEST_SCALE=full everything."""

from __future__ import annotations

import os

FULL = os.environ.get("TPMODEL_TEST_SCALE") == "full"

SOAK_REQUESTS = 2000 if FULL else 300
WEIGHT_UPDATES = 100 if FULL else 20
ORACLE_PROMPTS = 16 if FULL else 8
ORACLE_TOKENS = 64 if FULL else 40
ORACLE_CACHE_TOKENS = 640 if FULL else 384
"""Room for less than half of all prompts and answers."""
ORACLE_WORLDS: dict[str, tuple[int, ...]] = {
    "untied": (1, 2),
    "tied": (2,),
    "kv_heads_fewer_than_ranks": (4,),
    "odd_vocabulary": (2,),
    "yarn_rope": (1,),
    "wide_heads": (2,),
    "qwen3_moe": (2,),
    "whole_experts": (2,),
    "qwen3_next": (4,),
    "qwen3_5": (2,),
    "qwen3_5_moe": (1,),
}
"""Worlds of each model through the whole server in CI; everything runs at 1, 2 and 4 ranks."""
UPDATED_ARCHITECTURES = ("qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe") if FULL else ("qwen3_next", "qwen3_5_moe")
"""Into which a trainer sends weights: CI takes both layouts of linear attention, and experts."""
COMMIT_DEATHS_WORLDS = (1, 2) if FULL else (2,)
"""Worlds whose ranks and engine die within a commit."""
SCHEDULER_SEEDS = 3000 if FULL else 120
SCHEDULER_EVENTS = 600 if FULL else 250
SCHEDULER_MACHINES = 1500 if FULL else 60
OPERATOR_MACHINES = 1500 if FULL else 40
OPERATOR_SINGLE_FAULTS = 3000 if FULL else 100
OPERATOR_ROLLOUTS = 1000 if FULL else 40
OPERATOR_SCALE_MODELS = 1000 if FULL else 50
OPERATOR_SCALE_FOREIGN_PODS = 10_000 if FULL else 500
CHAOS_RUNS = [(respawn, tp) for respawn in ("fork", "spare") for tp in (2, 4)] if FULL else [("fork", 2), ("spare", 4)]
"""How ranks are replaced, and how many there are."""
CHAOS_FAULTS = 50 if FULL else 20
"""For each run."""
CHAOS_GANGS = 5 if FULL else 1
"""Of two pods, whose link is cut."""
CHAOS_CUTS = 2 if FULL else 1
"""For each gang: what its budget of rebuilds allows, with those that fail while the link is cut."""
E2E_REQUESTS = 200
E2E_STREAM_SECONDS = 30.0
