"""Ranks whose steps take a given time and nothing else: what the engine looks like from a fast device.

A plan that arrives after the device has finished everything before it has left the device idle for so long.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import grpc

from tpmodel.v1 import worker_pb2 as pb
from tpmodel.v1 import worker_pb2_grpc

ACK_PLANS = 16
KV_BLOCKS = 1 << 20


@dataclass(slots=True)
class DeviceTimes:
    """What rank 0's device has done since it was last asked."""

    steps: int = 0
    plans: int = 0
    busy_seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Seconds without work before a plan, of every plan that came too late."""


class Device:
    """Executes plans in order, in a thread of its own; every step takes the same time."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self._plans: queue.SimpleQueue[tuple[float, pb.SessionRequest, Any]] = queue.SimpleQueue()
        self._free_at = 0.0
        self._lock = threading.Lock()
        self._times = DeviceTimes()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, request: pb.SessionRequest, done: Any) -> None:
        """Queues a plan; done(step) is called in the device's thread after each of its steps."""
        self._plans.put((time.perf_counter(), request, done))

    def take_times(self) -> DeviceTimes:
        """The times since the last call."""
        with self._lock:
            times, self._times = self._times, DeviceTimes()
        return times

    def _run(self) -> None:
        while True:
            arrived, request, done = self._plans.get()
            steps = request.generate_step.steps
            gap, start = arrived - self._free_at, max(arrived, self._free_at)
            for step in range(max(steps, 1)):
                end = start + (step + 1) * self.step_seconds * bool(steps)
                time.sleep(max(0.0, end - time.perf_counter()))
                done(step)
            self._free_at = start + steps * self.step_seconds
            with self._lock:
                self._times.plans += 1
                self._times.steps += steps
                self._times.busy_seconds += steps * self.step_seconds
                if gap > 0:
                    self._times.gaps.append(gap)


class TimedRank(worker_pb2_grpc.WorkerServiceServicer):
    """Answers every request as a rank does that loads nothing and computes nothing."""

    def __init__(self, rank: int, world_size: int, device: Device | None) -> None:
        """device: of rank 0; the others are done at once."""
        self._rank = rank
        self._world_size = world_size
        self._device = device

    # A coroutine that writes, as in the real rank.
    async def Session(  # noqa: N802 # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One epoch."""
        outgoing: asyncio.Queue[pb.SessionResponse] = asyncio.Queue()
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read(request_iterator, outgoing))
        try:
            while True:
                response = await outgoing.get()
                await context.write(response)
                if response.HasField("bye"):
                    return
        finally:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[pb.SessionRequest], outgoing: asyncio.Queue[pb.SessionResponse]
    ) -> None:
        loop, unacknowledged = asyncio.get_running_loop(), 0

        def respond(request: pb.SessionRequest, **response: Any) -> None:
            answer = pb.SessionResponse(epoch=request.epoch, seq=request.seq, **response)
            loop.call_soon_threadsafe(outgoing.put_nowait, answer)

        async for request in requests:
            if not request.HasField("generate_step"):
                respond(request, **self._control(request))
            elif self._device is not None:
                self._launch(self._device, request, respond)
            else:
                unacknowledged += 1
                if request.generate_step.ack_now or unacknowledged >= ACK_PLANS:
                    unacknowledged = 0
                    last = max(request.generate_step.steps, 1) - 1
                    respond(request, generate_step_ok=pb.GenerateStepOk(step=last))

    def _launch(self, device: Device, request: pb.SessionRequest, respond: Any) -> None:
        plan = request.generate_step
        # Prompts are shorter than a chunk, so that every chunk samples; nothing ever finishes.
        prefilled = [chunk.slot for chunk in plan.prefill_chunks]

        def done(step: int) -> None:
            slots = sorted([*plan.decode_slots, *(prefilled if step == 0 else ())])
            finished = [pb.FINISHED_UNSPECIFIED] * len(slots)
            reply = pb.GenerateStepOk(step=step, slots=slots, token_ids=slots, finished=finished)
            reply.seconds = device.step_seconds
            respond(request, generate_step_ok=reply)

        device.launch(request, done)

    def _control(self, request: pb.SessionRequest) -> dict[str, Any]:
        match request.WhichOneof("request"):
            case "init":
                return {"init_ok": pb.InitOk(communicator="none")}
            case "nccl_sanity_check":
                return {"nccl_sanity_result": pb.NcclSanityResult(observed_sum=self._world_size)}
            case "load_dense_shard":
                loaded = pb.LoadDenseShardOk(kv_blocks_available=KV_BLOCKS, kv_block_bytes=1, weight_version=0)
                return {"load_dense_shard_ok": loaded}
            case "clear_kv_cache":
                return {"kv_cache_cleared": pb.KvCacheCleared(num_blocks=request.clear_kv_cache.num_blocks)}
            case "shutdown":
                return {"bye": pb.Bye()}
            case other:
                return {"error": pb.Error(kind=pb.ERROR_KIND_UNKNOWN_OP, message=f"no {other} here")}

    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingResponse:  # noqa: N802
        """A sign of life."""
        return pb.PingResponse(rank=self._rank)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        """Next to nothing."""
        return pb.GetStatusResponse(rank=self._rank, device="timed", state="idle")

    async def AwaitKvTransfer(  # noqa: N802
        self, request: pb.AwaitKvTransferRequest, context: Any
    ) -> pb.AwaitKvTransferResponse:
        """Nothing is handed over here."""
        return pb.AwaitKvTransferResponse(error="nothing is handed over here")

    async def CancelKvTransfer(  # noqa: N802
        self, request: pb.CancelKvTransferRequest, context: Any
    ) -> pb.CancelKvTransferResponse:
        """As AwaitKvTransfer."""
        return pb.CancelKvTransferResponse()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        """Nothing to leave."""
        return pb.AbortResponse(epoch=request.epoch)


def run_ranks(connection: Connection, ranks: list[int], world_size: int, step_seconds: float) -> None:
    """A process's program: sends the ranks' ports, then rank 0's DeviceTimes whenever it receives something."""
    asyncio.run(_run_ranks(connection, ranks, world_size, step_seconds))


async def _run_ranks(connection: Connection, ranks: list[int], world_size: int, step_seconds: float) -> None:
    device = Device(step_seconds) if 0 in ranks else None
    servers, ports = [], []
    for rank in ranks:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        servicer = TimedRank(rank, world_size, device if rank == 0 else None)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    connection.send(ports)
    try:
        while True:
            await asyncio.to_thread(connection.recv)
            connection.send(device.take_times() if device is not None else None)
    except EOFError:
        for server in servers:
            await server.stop(None)
