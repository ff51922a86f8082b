"""What holds for all unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("tpmodel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpmodel")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Ranks are threads in such a test: torch's own would compete with them."""
    # Most tests need no torch, which takes seconds to import.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
