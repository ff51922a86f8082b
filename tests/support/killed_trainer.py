"""A trainer that sends half a set, says so, and waits to be killed: run as a process of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tpmodel.trainer import connect


def main(checkpoint: str, target: str, token: str) -> None:
    """Does not return."""
    weights = load_file(Path(checkpoint) / "model.safetensors")
    names = list(weights)

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names[: len(names) // 2]:
            yield name, weights[name]
        print("half", flush=True)
        threading.Event().wait(600)

    with connect(target, token=token, options={"group_bytes": 1, "deadline_seconds": 600}) as trainer:
        trainer.send_weights(half(), version=1 << 40)


if __name__ == "__main__":
    main(*sys.argv[1:])
