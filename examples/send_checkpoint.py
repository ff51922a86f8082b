r"""Sends the weights of a checkpoint into all gangs of a model that serve, as one live update.

    python examples/send_checkpoint.py --target dns:///demo-trainers:9001 --token-file TOKEN \
        --checkpoint FOLDER --version 1

A training loop does the same with the weights that it has in memory, see docs/weights.md. Where an update of several
gangs fails on the way, the same command again goes on with those that do not have the version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from safetensors import safe_open

from tpmodel.trainer import WeightUpdateError, connect


def tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder's safetensors files, one at a time."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)


@click.command()
@click.option("--target", required=True, help="host:port of a control port, or dns:///host:port for all gangs.")
@click.option("--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--version", type=click.IntRange(min=1), required=True, help="Above every one before.")
@click.option("--gangs", type=click.Choice(["all_at_once", "one_by_one"]), default="one_by_one", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda:N; the gangs' kind of device.")
def main(target: str, token_file: Path, checkpoint: Path, version: int, gangs: str, device: str) -> None:
    """Send CHECKPOINT's weights, and say what each gang serves then."""
    if not list(checkpoint.glob("*.safetensors")):
        raise click.BadParameter(f"{checkpoint} has no safetensors files", param_hint="--checkpoint")
    try:
        with connect(target, token=token_file.read_text().strip(), options={"device": device}) as trainer:
            trainer.send_weights(lambda: tensors(checkpoint), version=version, gangs=gangs)  # type: ignore[arg-type]
            for gang, served in zip(trainer.targets, trainer.versions(), strict=True):
                click.echo(f"{gang} serves version {served}")
    except WeightUpdateError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
