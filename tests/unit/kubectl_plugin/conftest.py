from __future__ import annotations

from pathlib import Path

import pytest

from support.stand_in_kubectl import StandInKubectl


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInKubectl:
    """The only program in PATH."""
    return StandInKubectl(tmp_path, monkeypatch)
