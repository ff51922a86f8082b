"""`tpmodel serve`: one gang on this machine."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from tpmodel.cli.common import read_token_option

_UNITS = "kmgt"
SIZE_UNITS = {"": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate(_UNITS, start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}


class ByteSize(click.ParamType):
    """A number of bytes, such as 500M or 4Gi."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, or a usage error."""
        match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([{_UNITS}]i?)?b?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is not a size like 500M or 4Gi", param, ctx)
        return int(float(match[1]) * SIZE_UNITS[match[2] or ""])


@click.command()
@click.argument("model")
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks: one process per GPU.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="auto: what the checkpoint says.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that clients reach.")
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="gRPC; 0: any free.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="OpenAI HTTP.")
@click.option("--control-port", type=click.IntRange(0, 65535), default=9001, show_default=True)
@click.option("--health-port", type=click.IntRange(0, 65535), default=9002, show_default=True)
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=9003, show_default=True)
@click.option("--served-name", default=None,
              help="Name in the APIs; default: the folder's name, or the hub name.")  # fmt: skip
@click.option("--max-model-len", type=click.IntRange(min=0), default=0, help="Tokens of prompt and output together.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=64, show_default=True, help="Running at once.")
@click.option("--max-num-batched-tokens", type=click.IntRange(min=16), default=2048, show_default=True,
              help="Most tokens of one step; longer prompts go in chunks.")  # fmt: skip
@click.option("--block-size", type=click.IntRange(min=1, max=256), default=16, show_default=True,
              help="Tokens in a block of the KV cache.")  # fmt: skip
@click.option("--kv-cache-memory", type=ByteSize(), default=0, help="KV cache of each rank, such as 2Gi.")
@click.option("--load-format", type=click.Choice(["safetensors", "dummy"]), default="safetensors", show_default=True)
@click.option("--dummy-seed", type=int, default=0, help="Seed of --load-format dummy.")
@click.option("--expert-parallel", is_flag=True,
              help="Mixture of experts: every rank holds some experts whole, instead of a part of each.")  # fmt: skip
@click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt from its start.")
@click.option("--state-snapshots", type=click.IntRange(0, 999_999), default=None,
              help="Models that keep recurrent state: snapshots of it for the prefix cache, which is off with 0; "
              "default: a tenth of the KV cache's memory.")  # fmt: skip
@click.option("--queue-limit", type=click.IntRange(min=1), default=1024, show_default=True, help="Waiting requests.")
@click.option("--communicator", type=click.Choice(["auto", "shared_memory", "gloo", "nccl"]), default="auto")
@click.option("--share-devices", is_flag=True,
              help="More ranks than GPUs: let them share. For development: slow, all tensors that ranks exchange go "
              "through host memory.")  # fmt: skip
@click.option("--api-processes", type=click.IntRange(min=1, max=64), default=1, show_default=True)
@click.option("--api-key", default=None, help="Clients must send it; default: $TPMODEL_API_KEY.")
@click.option("--respawn", type=click.Choice(["cold", "fork", "spare"]), default="fork", show_default=True,
              help="A rank's new process: a new interpreter, a fork, or a process that waits for it.")  # fmt: skip
@click.option("--recovery", type=click.Choice(["in-place", "restart"]), default="in-place", show_default=True,
              help="A rank that dies: rebuild around it and go on with all streams, or end with 75.")  # fmt: skip
@click.option("--rebuild-wait", type=click.FloatRange(min=0), default=60.0, show_default=True,
              help="Seconds that a request without a deadline waits for a rebuild.")  # fmt: skip
@click.option("--rebuild-limit", type=click.IntRange(min=0), default=10, show_default=True,
              help="Rebuilds without that much serving between them; one more ends the server.")  # fmt: skip
@click.option("--rebuild-stability-window", type=click.FloatRange(min=0), default=300.0, show_default=True,
              help="Seconds of serving that give the whole rebuild limit back.")  # fmt: skip
@click.option("--step-deadline", type=click.FloatRange(min=0), default=0.0,
              help="Least seconds before a step counts as hung; default: 5, on CPU 30.")  # fmt: skip
@click.option("--token-file", type=click.Path(), default=None,
              help="Holds the gang's own token; needed for --kv-from; default: a random one.")  # fmt: skip
@click.option("--trainer-token-file", type=click.Path(), default=None,
              help="Holds the token of trainers; default: there are no weight updates.")  # fmt: skip
@click.option("--kv-from", multiple=True, metavar="HOST:PORT",
              help="Control port of a gang, with the same token, whose requests may go on here.")  # fmt: skip
@click.option("--kv-transfer-deadline", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
              help="Seconds that one piece of a request's KV cache may take from gang to gang.")  # fmt: skip
@click.option("--persist-updates", type=click.Path(file_okay=False), default=None,
              help="Folder in which weights that a trainer has sent are kept for the next start.")  # fmt: skip
@click.option("--weights-from", multiple=True, metavar="HOST:PORT",
              help="Control port of a gang, with the same trainer's token, that may have newer weights.")  # fmt: skip
@click.option("--drain-timeout", type=float, default=120.0, show_default=True, help="Seconds for streams to finish.")
@click.option("--log-format", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True)
@click.option("--runtime-dir", type=click.Path(exists=True, file_okay=False), default=None,
              help="Where the server makes its short-lived folder of Unix sockets; default: /tmp.")  # fmt: skip
def serve(model: str, **options: Any) -> None:
    """Serve MODEL, a checkpoint folder or a hub name, until interrupted.

    SIGTERM or Ctrl-C drains: running streams finish, within --drain-timeout; a second Ctrl-C ends at once.
    """
    if options["tp"] < 1:
        raise click.BadParameter(f"{options['tp']} ranks cannot serve: give 1 or more", param_hint="--tp")
    if options["max_model_len"] == 1:
        raise click.BadParameter("a prompt and an answer need at least 2 tokens", param_hint="--max-model-len")
    worker = _import_worker()
    sys.exit(int(worker.serve(_settings(model, options))))


def _import_worker() -> Any:
    try:
        return importlib.import_module("tpmodel_worker.supervisor.main")
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"serving needs more than the client: {error.name} is missing; pip install 'tpmodel[worker]'"
        ) from error


def _settings(model: str, options: dict[str, Any]) -> Any:
    from tpmodel_worker.settings import ServeSettings

    device = options["device"]
    if device == "auto":
        device = "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"
    folder = _checkpoint_folder(model, options["load_format"])
    # A folder's path is of this machine only. Its name is the one given, not that of a link's target.
    model_id = os.path.basename(os.path.abspath(model)) if Path(model).is_dir() else model  # noqa: PTH100, PTH119
    return ServeSettings(
        model_path=str(folder),
        model_id=model_id,
        served_name=options["served_name"] or model_id,
        dtype="" if options["dtype"] == "auto" else options["dtype"],
        load_format=options["load_format"],
        dummy_seed=options["dummy_seed"],
        max_model_len=options["max_model_len"],
        world_size=options["tp"],
        device=device,
        communicator=options["communicator"],
        share_devices=options["share_devices"],
        expert_parallel=options["expert_parallel"],
        recovery_mode="InPlace" if options["recovery"] == "in-place" else "Restart",
        rebuild_wait=options["rebuild_wait"],
        rebuild_limit=options["rebuild_limit"],
        rebuild_stability_window=options["rebuild_stability_window"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        block_size=options["block_size"],
        kv_cache_bytes=options["kv_cache_memory"],
        prefix_cache=not options["no_prefix_cache"],
        state_snapshots=options["state_snapshots"],
        queue_limit=options["queue_limit"],
        host=options["host"],
        port=options["port"],
        http_port=options["http_port"],
        control_port=options["control_port"],
        health_port=options["health_port"],
        metrics_port=options["metrics_port"],
        api_processes=options["api_processes"],
        respawn=options["respawn"],
        api_key=options["api_key"] or os.environ.get("TPMODEL_API_KEY", ""),
        step_deadline=options["step_deadline"],
        kv_sources=options["kv_from"],
        kv_transfer_deadline=options["kv_transfer_deadline"],
        token=read_token_option("--token-file", options["token_file"]) if options["token_file"] is not None else "",
        trainer_token_file=os.path.abspath(options["trainer_token_file"]) if options["trainer_token_file"] else "",  # noqa: PTH100
        persist_updates=os.path.abspath(options["persist_updates"]) if options["persist_updates"] else "",  # noqa: PTH100
        weights_from=options["weights_from"],
        drain_timeout=options["drain_timeout"],
        log_format=options["log_format"],
        runtime_dir=os.path.abspath(options["runtime_dir"]) if options["runtime_dir"] else "",  # noqa: PTH100
    )


def _checkpoint_folder(model: str, load_format: str) -> Path:
    """The folder itself, or a hub name's snapshot."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise click.BadParameter(f"{model} has no config.json: is it a checkpoint folder?", param_hint="MODEL")
        return folder.resolve()
    if folder.exists() or model.startswith((".", "/")) or model.count("/") != 1:
        raise click.BadParameter(f"{model} is neither a folder nor a hub name like Qwen/Qwen3-8B", param_hint="MODEL")
    return _download(model, load_format)


def _download(model: str, load_format: str) -> Path:
    """A hub name's snapshot; a click error, one line, where it can't be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt"] + ([] if load_format == "dummy" else ["*.safetensors"])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise click.ClickException(
            f"there is no folder {model}, and it could not be downloaded from the hub; give a folder that holds the "
            f"checkpoint, or make the hub reachable (HF_TOKEN for gated models): {reason}"
        ) from error
