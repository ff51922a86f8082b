"""Which of these tests run by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

ALONE = (
    "test_chaos",
    "test_chaos_links",
    "test_comm_worlds",
    "test_engine_gang",
    "test_engine_pool_control",
    "test_engine_pool_plans",
    "test_engine_rebuild",
    "test_engine_world",
    "test_gang_drain",
    "test_kv_handover_faults",
    "test_kv_pipe",
    "test_operator_election",
    "test_operator_process",
    "test_rank_keepalive",
    "test_rank_load_memory",
    "test_rank_protocol",
    "test_serving_faults",
    "test_serving_rebuild",
    "test_soak",
    "test_supervisor_end",
    "test_supervisor_faults",
    "test_supervisor_real_ranks",
    "test_supervisor_respawn",
    "test_weight_updates",
)
"""Modules that hold the project to times of a few seconds, or to what a process needs: two processors are few enough
for one test. Most others wait most of the time, and two of their modules run side by side."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them."""
    missing = [name for name in ALONE if not (Path(__file__).parent / f"{name}.py").exists()]
    assert not missing, f"no such modules: {missing}"
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem in ALONE:
            item.add_marker("alone")
