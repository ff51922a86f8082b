"""Rules of the repository that no linter knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_operator_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["tpmodel", "tpmodel.cli", "tpmodel.cli.serve", "tpmodel.kubectl"])
def test_the_base_install_needs_only_grpc_protobuf_and_click(module: str) -> None:
    heavy = "torch, numpy, pydantic, starlette, tokenizers, tpmodel_worker, tpmodel_operator"
    code = f"import sys, {module}; print([m for m in {heavy.split(', ')} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
