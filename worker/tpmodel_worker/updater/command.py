"""The command line of `tpmodel-weight-updater`.

What cannot work ends it with 64 and one line on standard error; an exchange that failed with 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from tpmodel.token_files import TokenFileError, read_token
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker import logs
from tpmodel_worker.updater.bridge import MAX_ERRORS, Bridge, BridgeOptions, GangError, StoppedError
from tpmodel_worker.updater.bridge_config import write_bridge_config
from tpmodel_worker.updater.layout import (
    DEFAULT_RANKS_PER_NODE,
    Layout,
    LayoutError,
    first_node,
    many_nodes,
    one_node,
    serving_nodes,
    this_node,
)

DEFAULT_PORT = 26756
_CONFIGURATION = 64
_PORT = click.IntRange(1, 65535)
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)
_MODES = {"in_place": pb.UPDATE_MODE_IN_PLACE, "shadow": pb.UPDATE_MODE_SHADOW}
_RUNNING = {
    "keep": pb.RUNNING_REQUESTS_KEEP,
    "finish": pb.RUNNING_REQUESTS_FINISH,
    "abort": pb.RUNNING_REQUESTS_ABORT,
}


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--gang", metavar="HOST:PORT", default="127.0.0.1:9001", help="Control port of the gang's leader.")
@click.option("--trainer-token-file", type=click.Path(path_type=Path), required=True,
              help="Holds the token that the gang takes from trainers.")  # fmt: skip
@click.option("--master-address", envvar="MASTER_ADDR", show_envvar=True, default="", show_default=False,
              help="Where the trainer keeps its store; with Slurm the first node.")  # fmt: skip
@click.option("--master-port", envvar="MASTER_PORT", show_envvar=True, type=_PORT, default=DEFAULT_PORT)
@click.option("--trainer-ranks", type=_COUNT, default=1, help="Members that the trainer has; its rank 0 sends.")
@click.option("--inference-nodes", envvar="NUM_INFERENCE_NODES", show_envvar=True, type=click.IntRange(min=0),
              default=0, help="0: one node. Otherwise the last so many of --nodes serve.")  # fmt: skip
@click.option("--nodes", envvar="SLURM_JOB_NODELIST", show_envvar=True, default="", show_default=False,
              help="All nodes, the trainer's first, as Slurm writes them.")  # fmt: skip
@click.option("--node", default="", show_default=False, help="The gang's first node; default: this host.")
@click.option("--ranks-per-node", type=_COUNT, default=DEFAULT_RANKS_PER_NODE, help="Many nodes: on every one.")
@click.option("--first-on-node", type=click.IntRange(min=0), default=0, help="Many nodes: the gang's rank 0 there.")
@click.option("--gang-index", type=click.IntRange(min=0), default=0, help="One node: which gang this is.")
@click.option("--gangs", type=_COUNT, default=1, help="One node: how many gangs the trainer updates.")
@click.option("--backend", type=click.Choice(["auto", "nccl", "gloo"]), default="auto",
              help="Of the trainer's data group; auto: nccl on GPUs.")  # fmt: skip
@click.option("--mode", type=click.Choice(list(_MODES)), default="in_place")
@click.option("--running", type=click.Choice(list(_RUNNING)), default="keep", help="What becomes of requests.")
@click.option("--join-timeout", type=_SECONDS, default=300.0, help="Seconds for the trainer to come.")
@click.option("--timeout", type=_SECONDS, default=600.0,
              help="Seconds that the trainer may send nothing; its signs of life have to come more often.")  # fmt: skip
@click.option("--max-errors", type=_COUNT, default=MAX_ERRORS, help="So many in a row end the updater.")
@click.option("--bridge-config-dir", envvar="LOGDIR", show_envvar=True, type=click.Path(path_type=Path), default=None,
              help="Folder for vllm_bridge_config.json, out of which the trainer reads names and shapes.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["auto", "json", "text"]), default="auto")
def _command(**options: Any) -> int:
    """Let a trainer that broadcasts parameter indices update the weights of a gang, until it stops."""
    logs.configure("updater", options["log_format"])
    token = _read_token(options["trainer_token_file"])
    layout = _layout(options)
    folder: Path | None = options["bridge_config_dir"]
    bridge = Bridge(
        options["gang"],
        token,
        BridgeOptions(
            master_address=_master(options),
            master_port=options["master_port"],
            backend="" if options["backend"] == "auto" else options["backend"],
            mode=_MODES[options["mode"]],
            running=_RUNNING[options["running"]],
            join_seconds=options["join_timeout"],
            deadline_seconds=options["timeout"],
            max_errors=options["max_errors"],
        ),
        layout=layout,
        publish=lambda described: _publish(folder, described),
    )
    signal.signal(signal.SIGTERM, lambda *_: bridge.end())
    signal.signal(signal.SIGINT, lambda *_: bridge.end())
    try:
        bridge.run()
    except (StoppedError, GangError) as error:
        click.echo(f"tpmodel-weight-updater: {error}", err=True)
        return 1
    finally:
        bridge.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    try:
        code = _command.main(arguments, prog_name="tpmodel-weight-updater", standalone_mode=False)
    except (click.ClickException, LayoutError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"tpmodel-weight-updater: {' '.join(message.split())}", err=True)
        code = _CONFIGURATION
    except click.exceptions.Abort:
        code = _CONFIGURATION
    sys.exit(code)


def _master(options: dict[str, Any]) -> str:
    if options["master_address"]:
        return options["master_address"]
    if options["inference_nodes"] and options["nodes"]:
        return first_node(options["nodes"])
    raise click.UsageError("the trainer's address is missing: give --master-address or MASTER_ADDR")


def _layout(options: dict[str, Any]) -> Callable[[int], Layout]:
    """How the gang's ranks are numbered; what can be wrong before the gang is asked is found here."""
    count: int = options["inference_nodes"]
    if not count:
        index, gangs, trainers = options["gang_index"], options["gangs"], options["trainer_ranks"]
        one_node(trainer_ranks=trainers, world_size=1, gang_index=index, gangs=gangs)
        return lambda size: one_node(trainer_ranks=trainers, world_size=size, gang_index=index, gangs=gangs)
    if not options["nodes"]:
        raise click.UsageError("the nodes are missing: give --nodes or SLURM_JOB_NODELIST")
    nodes = serving_nodes(options["nodes"], count)
    node = options["node"] or this_node(nodes)

    def layout(size: int) -> Layout:
        return many_nodes(
            trainer_ranks=options["trainer_ranks"],
            world_size=size,
            nodes=nodes,
            node=node,
            ranks_per_node=options["ranks_per_node"],
            first_on_node=options["first_on_node"],
        )

    layout(1)
    return layout


def _publish(folder: Path | None, described: pb.GetParameterInfoResponse) -> None:
    if folder is None:
        return
    try:
        write_bridge_config(folder, described)
    except OSError as error:
        raise click.UsageError(f"--bridge-config-dir {folder}: {error}") from error


def _read_token(file: Path) -> str:
    try:
        return read_token(file)
    except TokenFileError as error:
        raise click.UsageError(f"--trainer-token-file {error}") from error
