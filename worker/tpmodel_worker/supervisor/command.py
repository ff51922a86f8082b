"""`tpmodel-worker`: the main process of a gang's pod. Its flags are what the operator writes into a StatefulSet.

A value that cannot work ends it with 64, one line on standard error and the same line as the pod's termination
message. Imports little: a pod that is asked to end while it starts shall do so soon.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tpmodel_worker.settings import ServeSettings

_CONFIGURATION = 64
_RUNTIME_FOLDER = Path("/run/tpmodel")
_TERMINATION_LOG = Path("/dev/termination-log")
_PROPAGATION_SECONDS = 5.0
_PORT = click.IntRange(1, 65535)
_SECONDS = click.FloatRange(min=0)
# What check_options and check_model call the settings.
_FLAGS = {
    "world_size": "--tensor-parallel-size",
    "ranks_per_pod": "--ranks-per-pod",
    "api_processes": "--engine-option api_processes",
    "communicator": "--engine-option communicator",
    "drain_timeout": "--drain-timeout",
    "device": "--device",
    "max_model_len": "--max-model-len",
}


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--model-uri", required=True, help="hf://org/name[@revision], or how users name the mounted folder.")
@click.option("--model-path", default="", show_default=False, help="Folder of a mounted checkpoint; not for hf://.")
@click.option("--model-revision", default="", show_default=False, help="Branch, tag or commit of an hf:// model.")
@click.option(
    "--served-name", default="", show_default=False, help="Name in the APIs; default: what the URI ends with."
)
@click.option("--tensor-parallel-size", type=click.IntRange(min=1), default=1, help="Ranks of the gang.")
@click.option("--ranks-per-pod", type=click.IntRange(min=1), default=None, help="Default: all.")
@click.option("--leader-host", default="", show_default=False, help="DNS name of the leader pod; for the other pods.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--quantization", type=click.Choice(["none"]), default="none")
@click.option("--max-model-len", type=click.IntRange(min=0), default=0, help="0: what the checkpoint allows.")
@click.option("--load-format", type=click.Choice(["safetensors", "dummy"]), default="safetensors")
@click.option("--engine-option", "engine_options", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--recovery-mode", type=click.Choice(["Restart", "InPlace"]), default="Restart",
              help="Whether a lost rank restarts the gang, or the world is rebuilt around it.")  # fmt: skip
@click.option("--drain-timeout", type=_SECONDS, default=120.0, help="Seconds for streams to finish.")
@click.option("--progress-deadline", type=_SECONDS, default=600.0, help="Seconds that nothing may go on.")
@click.option("--init-timeout", type=_SECONDS, default=60.0, help="Seconds for the ranks to join.")
@click.option("--cache-dir", default="", show_default=False, help="Folder to download into; other pods may share it.")
@click.option("--persist-updates", default="", show_default=False,
              help="Folder that outlives the pods, for weights that a trainer has sent.")  # fmt: skip
@click.option("--weights-from", multiple=True, metavar="HOST:PORT",
              help="Control ports of the model's other gangs, which have weights that this one lost.")  # fmt: skip
@click.option("--weights-source", default="", show_default=False,
              help="Name of the checkpoint that versions of the weights count from.")  # fmt: skip
@click.option("--attempt-file", type=click.Path(), default=None, help="Holds the gang's attempt.")
@click.option("--token-file", type=click.Path(), default=None, help="Holds the gang's own secret token.")
@click.option("--trainer-token-file", type=click.Path(), default="", show_default=False,
              help="Holds the token of trainers, and may change; default: there are no weight updates.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(), default=None, help="Holds the key that clients must send.")
@click.option("--tls-dir", type=click.Path(), default=None, help="Holds tls.crt and tls.key, for the clients' ports.")
@click.option("--pod-name", envvar="TPMODEL_POD_NAME", show_envvar=True, default="", show_default=False)
@click.option("--pod-uid", envvar="TPMODEL_POD_UID", show_envvar=True, required=True)
@click.option("--pod-ip", envvar="TPMODEL_POD_IP", show_envvar=True, required=True)
@click.option("--pod-index", envvar="TPMODEL_POD_INDEX", show_envvar=True, type=click.IntRange(min=0), required=True)
@click.option(
    "--host", default="", show_default=False, help="Where the ports for clients and probes listen; default: everywhere."
)
@click.option("--port", type=_PORT, default=9000, help="gRPC.")
@click.option("--http-port", type=_PORT, default=8000)
@click.option("--control-port", type=_PORT, default=9001, help="The same in all pods of a gang.")
@click.option("--health-port", type=_PORT, default=9002)
@click.option("--metrics-port", type=_PORT, default=9003)
@click.option("--endpoint-propagation", type=_SECONDS, default=_PROPAGATION_SECONDS,
              help="Seconds that a draining leader still takes requests.")  # fmt: skip
@click.option("--runtime-dir", type=click.Path(), default=None, help=f"Default: {_RUNTIME_FOLDER} if there, or /tmp.")
@click.option("--log-format", type=click.Choice(["auto", "json", "text"]), default="auto")
def _command(**options: Any) -> int:
    """Run one pod of a gang, until it is told to end or has to."""
    import asyncio

    from tpmodel_worker import logs
    from tpmodel_worker.supervisor.configuration import ConfigurationError
    from tpmodel_worker.supervisor.main import run_supervisor
    from tpmodel_worker.supervisor.terminal import Terminal

    try:
        settings = read_settings(options)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    logs.configure("supervisor", settings.log_format)
    on_event = Terminal(settings.log_format).on_event
    running = run_supervisor(settings, on_event=on_event, flags=_FLAGS, termination_log=termination_log())
    return int(asyncio.run(running))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    # Nothing runs yet that would have to be ended in order.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Images start this blocked, so that one which comes before this line waits for it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        code = _command.main(arguments, prog_name="tpmodel-worker", standalone_mode=False)
    except click.ClickException as error:
        code = _refuse(error.format_message())
    except click.exceptions.Abort:
        code = _refuse("interrupted")
    sys.exit(code)


def termination_log() -> Path:
    """Where Kubernetes reads the cause of the end."""
    return Path(os.environ.get("TPMODEL_TERMINATION_LOG", _TERMINATION_LOG))


def _refuse(message: str) -> int:
    from tpmodel_worker.supervisor.main import write_termination_message

    line = " ".join(message.split())
    click.echo(f"tpmodel-worker: {line}", err=True)
    write_termination_message(termination_log(), line)
    return _CONFIGURATION


def read_settings(options: dict[str, Any]) -> ServeSettings:
    """The flags' values, and the contents of the files that they name, as settings.

    Raises:
        ConfigurationError: naming a flag and what would be right.
    """
    from tpmodel_worker.settings import ServeSettings
    from tpmodel_worker.supervisor.configuration import ConfigurationError
    from tpmodel_worker.supervisor.engine_options import read_engine_options

    _check_together(options, ConfigurationError)
    uri: str = options["model_uri"]
    model_id = uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else _last_part(uri)
    address: str = options["pod_ip"]
    return ServeSettings(
        model_uri=uri,
        model_path=options["model_path"],
        model_revision=options["model_revision"],
        model_id=model_id,
        served_name=options["served_name"] or model_id,
        dtype="" if options["dtype"] == "auto" else options["dtype"],
        load_format=options["load_format"],
        max_model_len=options["max_model_len"],
        cache_dir=options["cache_dir"],
        persist_updates=options["persist_updates"],
        weights_from=options["weights_from"],
        weights_source=options["weights_source"],
        world_size=options["tensor_parallel_size"],
        ranks_per_pod=options["ranks_per_pod"] or options["tensor_parallel_size"],
        pod_index=options["pod_index"],
        device=options["device"],
        recovery_mode=options["recovery_mode"],
        attempt=_read_attempt(options["attempt_file"]),
        gang_dir=str(Path(options["attempt_file"]).parent) if options["attempt_file"] else "",
        pod_uid=options["pod_uid"],
        pod_name=options["pod_name"] or options["pod_uid"],
        address=address,
        leader_host=options["leader_host"],
        token=_read_token("--token-file", options["token_file"]),
        trainer_token_file=options["trainer_token_file"],
        # Everywhere, since `kubectl port-forward` comes in over the pod's loopback interface.
        host=options["host"] or ("::" if ":" in address else "0.0.0.0"),
        port=options["port"],
        http_port=options["http_port"],
        control_port=options["control_port"],
        health_port=options["health_port"],
        metrics_port=options["metrics_port"],
        api_key=_read_token("--api-key-file", options["api_key_file"]),
        tls_dir=options["tls_dir"] or "",
        drain_timeout=options["drain_timeout"],
        endpoint_propagation=options["endpoint_propagation"],
        init_timeout=options["init_timeout"],
        progress_deadline=options["progress_deadline"],
        runtime_dir=options["runtime_dir"] or (str(_RUNTIME_FOLDER) if _RUNTIME_FOLDER.is_dir() else ""),
        log_format=options["log_format"],
        **read_engine_options(options["engine_options"]),
    )


def _check_together(options: dict[str, Any], refusal: type[Exception]) -> None:
    """Flags that do not fit each other."""
    import ipaddress

    ranks, per_pod = options["tensor_parallel_size"], options["ranks_per_pod"] or options["tensor_parallel_size"]
    index, address = options["pod_index"], options["pod_ip"]
    pods = ranks // per_pod
    if ranks % per_pod:
        raise refusal(f"--ranks-per-pod {per_pod}: give a divisor of --tensor-parallel-size {ranks}")
    if index >= pods:
        raise refusal(f"--pod-index {index}: {ranks} ranks, {per_pod} in each pod, are pods 0 to {pods - 1}")
    if pods > 1 and not options["token_file"]:
        raise refusal("--token-file is needed: the pods of a gang know each other by its token")
    if index > 0 and not options["leader_host"]:
        raise refusal(f"--leader-host is needed in pod {index}: the DNS name of pod 0")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise refusal(f"--pod-ip {address}: give an IP address, not a name") from None
    if options["model_uri"].startswith("hf://"):
        if not options["cache_dir"]:
            raise refusal(f"--cache-dir is needed to download {options['model_uri']}")
    elif not options["model_path"]:
        raise refusal(f"--model-path is needed: the folder where {options['model_uri']} is mounted")


def _read_attempt(path: str | None) -> int:
    from tpmodel_worker.attempts import read_attempt
    from tpmodel_worker.supervisor.configuration import ConfigurationError

    if path is None:
        return 1
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--attempt-file {path}: {error}") from error
    attempt = read_attempt(text)
    if not attempt:
        raise ConfigurationError(f"--attempt-file {path}: {text[:40]!r} is no attempt: 1 or a higher whole number")
    return attempt


def _read_token(flag: str, path: str | None) -> str:
    """Its content without what surrounds it; "" where no file is named."""
    from tpmodel.token_files import TokenFileError, read_token
    from tpmodel_worker.supervisor.configuration import ConfigurationError

    if not path:
        return ""
    try:
        return read_token(path)
    except TokenFileError as error:
        raise ConfigurationError(f"{flag} {error}") from error


def _last_part(uri: str) -> str:
    """pvc://claim/path/to/model -> model; oci://host/name:tag -> name."""
    last = uri.rstrip("/").rpartition("/")[2]
    return last.partition(":")[0] or last
