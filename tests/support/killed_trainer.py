"""A trainer that sends half a set, says so, and waits to be killed: run as a process of its own.

Arguments: checkpoint, control port, token, mode, deadline in seconds, and where it stops: between two calls of Update,
or within one, with its ranks waiting for the next chunk.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tpmodel.trainer import connect

VERSION = 1 << 40


def stop() -> None:
    """Does not return."""
    print("half", flush=True)
    threading.Event().wait()


def main(checkpoint: str, target: str, token: str, mode: str, deadline: str, where: str) -> None:
    """Does not return."""
    weights = load_file(Path(checkpoint) / "model.safetensors")
    names = list(weights)

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names[: len(names) // 2]:
            yield name, weights[name]
        stop()

    def progress(sent: int, total: int) -> None:
        if 2 * sent > total:
            stop()

    options = {"group_bytes": 1, "buffer_size": 20_000, "mode": mode, "deadline_seconds": float(deadline)}
    with connect(target, token=token, options=options) as trainer:
        if where == "between":
            trainer.send_weights(half(), version=VERSION)
        else:
            trainer.send_weights(weights, version=VERSION, progress=progress)


if __name__ == "__main__":
    main(*sys.argv[1:])
