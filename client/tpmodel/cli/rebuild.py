"""`tpmodel rebuild`: asks a gang for a new world, with the same processes and weights."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import grpc

from tpmodel.cli.common import read_token_option, readable_errors
from tpmodel.errors import error_from
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

_SOURCE = "user"


@click.command()
@click.option("--target", default="127.0.0.1:9001", show_default=True, help="The control port, HOST:PORT.")
@click.option("--token-file", type=click.Path(path_type=Path), default=None,
              help="The gang's own token; default: that of the server on this machine.")  # fmt: skip
@click.option("--runtime-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("/tmp"),  # noqa: S108
              show_default=True, help="Where a server on this machine has its folder.")  # fmt: skip
@click.option("--wait", type=click.FloatRange(min=0), default=60.0, show_default=True,
              help="Seconds to wait for the new world; 0: not at all.")  # fmt: skip
def rebuild(target: str, token_file: Path | None, runtime_dir: Path, wait: float) -> None:
    """Rebuild the world of a gang: every rank joins a new epoch, streams go on.

    Ranks keep their processes and weights; the KV cache is emptied.
    """
    token = read_token_option("--token-file", token_file) if token_file else _local_token(target, runtime_dir)
    metadata = (("authorization", f"Bearer {token}"),)
    with readable_errors(target), grpc.insecure_channel(target) as channel:
        stub = worker_pb2_grpc.GangServiceStub(channel)
        started = time.monotonic()
        try:
            asked = stub.Rebuild(worker_pb2.RebuildRequest(source=_SOURCE), timeout=10, metadata=metadata)
            if not wait:
                click.echo(f"asked for a world after epoch {asked.epoch}")
                return
            for state in stub.Follow(worker_pb2.FollowRequest(), timeout=wait, metadata=metadata):
                if state.epoch > asked.epoch and state.phase == worker_pb2.PHASE_SERVING:
                    click.echo(f"serving at epoch {state.epoch} after {time.monotonic() - started:.2f} s")
                    return
                if state.phase == worker_pb2.PHASE_FAILED:
                    raise click.ClickException(f"the gang has failed: {state.cause}")
        except grpc.RpcError as error:
            raise error_from(error) from error
    raise click.ClickException("the engine went away before the new world served")


def _local_token(target: str, runtime_dir: Path) -> str:
    """Of a server that this user runs here; a click error where there is none at that port."""
    port = target.rpartition(":")[2]
    for path in runtime_dir.glob("tpmodel-*/settings.json"):
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if path.stat().st_uid == os.getuid() and str(settings.get("control_port")) == port:
            return str(settings["token"])
    raise click.UsageError(f"no server of yours with control port {port} has its folder in {runtime_dir}: --token-file")
