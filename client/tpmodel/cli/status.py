"""`tpmodel status`: what a gang's leader says of itself."""

from __future__ import annotations

import json
import time

import click
import grpc
from google.protobuf.json_format import MessageToDict

from tpmodel.cli.common import readable_errors
from tpmodel.cli.tables import table
from tpmodel.errors import error_from
from tpmodel.v1 import worker_pb2, worker_pb2_grpc


@click.command()
@click.option("--target", default="127.0.0.1:9002", show_default=True, help="The health port, HOST:PORT.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def status(target: str, as_json: bool) -> None:
    """Show the gang's phase, its ranks and its processes."""
    with readable_errors(target), grpc.insecure_channel(target) as channel:
        stub = worker_pb2_grpc.StatusServiceStub(channel)
        try:
            reply = stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10)
        except grpc.RpcError as error:
            raise error_from(error) from error
    if as_json:
        click.echo(
            json.dumps(
                MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            )
        )
        return
    for line in _lines(reply):
        click.echo(line)


def _lines(reply: worker_pb2.GangStatusResponse) -> list[str]:
    engine = reply.engine
    phase = worker_pb2.Phase.Name(engine.phase).removeprefix("PHASE_").lower()
    ready = f"{engine.ready_ranks} of {engine.world_size} ranks ready"
    version = engine.weights_condition or f"weight version {engine.weight_version}"
    numbers = f"epoch {engine.epoch}, attempt {reply.attempt}, {version}"
    lines = [f"{engine.model_id or 'no model'}: {phase}, {ready}, {numbers}"]
    if engine.weights_condition:
        lines.append(f"{engine.weights_condition}: {engine.weights_message}")
    if engine.cause:
        lines.append(f"cause: {engine.cause}")
    if engine.kv_blocks_total:
        lines.append(
            f"requests: {engine.running} running, {engine.waiting} waiting; "
            f"KV cache: {engine.kv_blocks_used} of {engine.kv_blocks_total} blocks of {engine.block_size} tokens; "
            f"context {engine.max_model_len}"
        )
    lines += table(
        ["RANK", "STATE", "LOADED", "PID", "DEVICE", "COMMUNICATOR"],
        [
            [str(r.rank), r.state, f"{r.load_percent:.0f}%", str(r.pid), r.device or "-", r.communicator or "-"]
            for r in engine.ranks
        ],
    )
    lines += table(
        ["PROCESS", "STATE", "PID", "PORT", "RESTARTS"],
        [[p.name, p.state, str(p.pid), str(p.port or "-"), str(p.restarts)] for p in reply.processes],
    )
    lines += [
        f"{process.name} (pid {process.pid}): holds {process.device_bytes / 2**20:.0f} MiB of device memory"
        for process in reply.processes
        if process.device_bytes
    ]
    if engine.rebuilds:
        lines.append(f"rebuilds: {engine.rebuilds}, {engine.rebuilds_left} more before the gang restarts")
    lines += [_fault_line(fault) for fault in engine.last_faults]
    lines += [_rebuild_line(rebuild) for rebuild in engine.last_rebuilds]
    return lines


def _fault_line(fault: worker_pb2.Fault) -> str:
    detected = f", detected after {fault.detection_seconds:.2f} s" if fault.detection_seconds else ""
    return f"fault at {_when(fault.unix_seconds)}, epoch {fault.epoch}{detected}: {fault.kind}: {fault.message}"


def _rebuild_line(rebuild: worker_pb2.Rebuild) -> str:
    spent = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in rebuild.phases)
    return (
        f"rebuilt at {_when(rebuild.unix_seconds + rebuild.seconds)}, epoch {rebuild.epoch}, after {rebuild.kind}, in "
        f"{rebuild.seconds:.2f} s ({spent}), {rebuild.replayed_requests} requests went on"
    )


def _when(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
