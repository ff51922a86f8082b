"""A checkpoint whose answers may be long: the default model with room for hours of tokens.

The small default model ends its answers at 1,024 tokens, a few seconds' worth; tests want streams that last.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from tests.cluster import checkpoints
from tests.cluster.target import Target
from tests.e2e.support.manifests import CLAIM

NAME = "long_answers"
URI = f"pvc://{CLAIM}/{NAME}"
POSITIONS = 65_536


def place(target: Target) -> None:
    """Puts the checkpoint on every node; nodes that are not the local cluster's must have it."""
    if target.local is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / NAME
        shutil.copytree(checkpoints.DEFAULT_MODEL, made)
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
        for node in target.local.nodes:
            checkpoints.place(node, made)
