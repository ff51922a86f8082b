"""Engine, api and supervisor start fast and hold no CUDA context: they never import torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

MODULES = ["tpmodel_worker.engine.main", "tpmodel_worker.api.main", "tpmodel_worker.supervisor.main"]


@pytest.mark.parametrize("module", MODULES)
def test_process_imports_no_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module} yet")
    script = (
        f"import sys, {module}\n"
        "heavy = sorted(name for name in ('torch', 'triton', 'transformers') if name in sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
