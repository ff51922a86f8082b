"""Fixtures of the sampling tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread_per_operation(one_thread: None) -> None:
    """All of them."""
