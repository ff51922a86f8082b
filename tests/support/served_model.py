"""A ServedModel for tests that start no process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.text_checkpoint import write_text_checkpoint
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.settings import ServeSettings


def make_served_model(
    folder: Path, *, generation_config: dict[str, Any] | None = None, with_tokenizer: bool = True, **config: Any
) -> ServedModel:
    """Writes a checkpoint without weights and loads it; keywords replace entries of config.json."""
    write_text_checkpoint(folder, **config)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    if not with_tokenizer:
        (folder / "tokenizer.json").unlink()
    return ServedModel.load(ServeSettings(model_path=str(folder), model_id="test/model", served_name="test-model"))
