"""Checkpoints without weights, which the ranks draw: a configuration beside the default model's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_MODEL = Path(__file__).parent.parent / "examples" / "default_model"


def default_config() -> dict[str, Any]:
    """The default model's config.json."""
    return json.loads((DEFAULT_MODEL / "config.json").read_text(encoding="utf-8"))


def write_dummy_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """Fills a folder that is served with --load-format dummy."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, folder / name)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
