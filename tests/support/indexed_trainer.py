"""A trainer that knows torch.distributed and the indexed way, and nothing of this project.

Arguments: folder of the bridge configuration, port of the store, members of the groups. Takes orders on standard
input, one a line, and answers each with "done": set SEED, some SEED COUNT, index NUMBER, die.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

HOST = "127.0.0.1"


def make_group(backend: str, name: str, port: int, size: int) -> Any:
    """A named group beside the default one, as trainers make it that talk to an inference server."""
    timeout = timedelta(seconds=60)
    store, rank, size = next(iter(rendezvous(f"tcp://{HOST}:{port}", 0, size, timeout=timeout)))
    store.set_timeout(timeout)
    prefixed = c10d.PrefixStore(name, store)
    helper: Any = c10d._new_process_group_helper
    group, _ = helper(size, rank, [], c10d.Backend(backend), prefixed, group_name=name, timeout=timeout)
    c10d._world.pg_group_ranks[group] = {member: member for member in range(size)}
    return group


def trained(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """What stands for training: whoever knows a parameter's name can make the same."""
    generator = torch.Generator().manual_seed(seed + sum(name.encode()))
    return float(len(shape) == 1) + 0.05 * torch.randn(shape, generator=generator)


class ForeignTrainer:
    """Rank 0 of both groups."""

    def __init__(self, config: Path, port: int, size: int) -> None:
        self.parameters = json.loads(config.read_text())["param_mappings"]
        control = make_group("gloo", "gloo_group", port, size)
        self.data = make_group("gloo", "weight_update_group", port, size)
        dist.barrier(group=control)

    def say(self, number: int) -> None:
        dist.broadcast(torch.tensor([number], dtype=torch.long), src=0, group=self.data)

    def send(self, seed: int, count: int) -> None:
        """The first so many tensors."""
        for index, name in enumerate(sorted(self.parameters)[:count]):
            self.say(index)
            dist.broadcast(trained(name, self.parameters[name]["local_shape"], seed), src=0, group=self.data)

    def obey(self, order: str, *numbers: int) -> None:
        match order:
            case "set":
                self.send(numbers[0], len(self.parameters))
            case "some":
                self.send(*numbers)
            case "index":
                self.say(numbers[0])
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                raise ValueError(order)


def main(folder: str, port: str, size: str) -> None:
    torch.set_num_threads(1)
    trainer = ForeignTrainer(Path(folder) / "vllm_bridge_config.json", int(port), int(size))
    print("joined", flush=True)
    for line in sys.stdin:
        order, *numbers = line.split()
        trainer.obey(order, *map(int, numbers))
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
