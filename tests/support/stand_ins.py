"""Stand-ins for engine, api, rank and rendezvous processes, so that a supervisor can be tried alone.

All are steered by files in $STAND_INS: `phase` (the phase that the engine reports once its ranks are registered),
`failure` (JSON {exit_code, cause}: the engine reports that it failed), `instance`, `drain_seconds`, `engine_exit_code`,
`crashes_of_rank_N` (how many more of rank N's processes end by SIGSEGV at their start), `exit_code_of_rank_N`,
`script_of_rank_N` (JSON list of steps), `crashes_of_spare`, `spare_bytes`, `api_exit_code`. What they see goes to
`events`, one JSON object per line.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK, ArenaId
from tpmodel_worker.framing import frame, read_message
from tpmodel_worker.settings import ServeSettings

if TYPE_CHECKING:
    from tpmodel_worker.arenas.memory import Arena

FOLDER = "STAND_INS"
_POLL_SECONDS = 0.01


def _read(name: str, default: str = "") -> str:
    try:
        return (Path(os.environ[FOLDER]) / name).read_text()
    except FileNotFoundError:
        return default


def _write(name: str, text: str) -> None:
    (Path(os.environ[FOLDER]) / name).write_text(text)


def note(**event: Any) -> None:
    """Appends an event; one write, so that processes do not mix."""
    line = json.dumps(event | {"pid": os.getpid(), "time": time.time()}) + "\n"
    with (Path(os.environ[FOLDER]) / "events").open("a") as file:
        file.write(line)


# ------------------------------------------------------------------------------------------------ forked


def run_rendezvous(settings: ServeSettings) -> None:
    """Says hello and stays."""
    with ArenaClient(settings.rank_socket) as supervisor:
        supervisor.hello(RENDEZVOUS_RANK, os.getpid(), 4000)
        supervisor.wait_until_closed()


def run_spare(settings: ServeSettings) -> int:
    """Says that it is ready, holding `spare_bytes` of device memory, and becomes the rank that it is told to be."""
    crashes = int(_read("crashes_of_spare", "0"))
    if crashes:
        _write("crashes_of_spare", str(crashes - 1))
        os.kill(os.getpid(), signal.SIGSEGV)
    note(what="spare", parent=os.getppid(), grpc="grpc" in sys.modules)
    sys.stderr.write("a spare speaks on stderr\n")
    sys.stderr.flush()
    with ArenaClient(settings.rank_socket) as supervisor:
        rank = supervisor.await_promotion(int(_read("spare_bytes", "0")))
    return 0 if rank is None else run_rank(settings, rank)


def run_rank(settings: ServeSettings, rank: int) -> int:
    """Says hello, runs its script and stays."""
    note(what="rank", rank=rank, parent=os.getppid(), grpc="grpc" in sys.modules, threads=os.environ["OMP_NUM_THREADS"])
    sys.stderr.write(f"rank {rank} speaks on stderr\n")
    sys.stderr.flush()
    crashes = int(_read(f"crashes_of_rank_{rank}", "0"))
    if crashes:
        _write(f"crashes_of_rank_{rank}", str(crashes - 1))
        os.kill(os.getpid(), signal.SIGSEGV)
    code = int(_read(f"exit_code_of_rank_{rank}", "0"))
    if code:
        return code
    with ArenaClient(settings.rank_socket) as supervisor:
        supervisor.hello(rank, os.getpid(), 5000 + rank)
        for step, *arguments in json.loads(_read(f"script_of_rank_{rank}", "[]")):
            _STEPS[step](supervisor, rank, *arguments)
        supervisor.wait_until_closed()
    return 0


def _remember(supervisor: ArenaClient, rank: int, text: str) -> None:
    """Finds the text in the arena that an earlier process left, or leaves it there."""
    held = supervisor.fetch(ArenaId(rank, "weights"))
    if held is not None:
        descriptor, manifest = held
        with mmap.mmap(descriptor, manifest.bytes) as memory:
            note(what="found", rank=rank, text=memory[: len(text)].decode(), model=manifest.model_id)
        return
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, 4096)
    os.pwrite(descriptor, text.encode(), 0)
    # An arena proper would need torch.
    arena = SimpleNamespace(id=ArenaId(rank, "weights"), size=4096, device="cpu", descriptor=descriptor)
    manifest = worker_pb2.ArenaManifest(state=worker_pb2.ARENA_STATE_COMPLETE, model_id="a model")
    supervisor.store(cast("Arena", arena), manifest)
    os.close(descriptor)
    note(what="stored", rank=rank)


def _leave_orphan(_link: ArenaClient, rank: int) -> None:
    """A grandchild whose parent has ended."""
    script = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=-3, stderr=-3).pid)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    note(what="orphan", rank=rank, orphan=int(done.stdout))


_STEPS = {
    "leave_orphan": _leave_orphan,
    "remember": _remember,
    "abort_started": lambda link, _rank, epoch, seconds: link.abort_started(epoch, seconds),
    "abort_done": lambda link, _rank, epoch: link.abort_done(epoch),
    "instance": lambda link, rank: note(what="instance", rank=rank, instance=_wait_for_instance(link)),
    "ignore_sigterm": lambda _link, _rank: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}


def _wait_for_instance(link: ArenaClient) -> str:
    deadline = time.monotonic() + 10
    while not (instance := link.instance_id()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return instance


# ------------------------------------------------------------------------------------------------- exec'd


async def engine(settings: ServeSettings) -> int:
    """Takes registrations and reports whatever phase the files ask for."""
    from support.stand_in_gang import serve_gang

    instance = _read("instance", f"engine of {os.getpid()}")
    registered: list[worker_pb2.RegisterRequest] = []
    server = await serve_gang(settings, instance, registered)
    reader, writer = await asyncio.open_unix_connection(str(settings.report_socket))
    state = worker_pb2.EngineState(instance_id=instance, phase=worker_pb2.PHASE_FORMING)
    state.world_size = settings.world_size
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    drain = asyncio.create_task(read_message(reader, pod_pb2.EngineCommand))
    writer.write(frame(pod_pb2.ProcessReport(name="engine", engine_state=state)))
    drained_at = 0.0
    last = b""
    while not terminated.is_set():
        if code := int(_read("engine_exit_code", "0")):
            _write("engine_exit_code", "0")
            return code
        if failure := _read("failure"):
            wanted = json.loads(failure)
            state.phase = worker_pb2.PHASE_FAILED
            state.exit_code, state.cause = wanted["exit_code"], wanted["cause"]
        elif drained_at:
            over = time.monotonic() >= drained_at
            state.phase = worker_pb2.PHASE_DRAINED if over else worker_pb2.PHASE_DRAINING
        elif registered and len(registered[-1].ranks) == settings.world_size:
            state.phase = worker_pb2.Phase.Value(f"PHASE_{_read('phase', 'SERVING')}")
            state.ready_ranks = settings.world_size
        if drain.done() and not drained_at:
            command = drain.result()
            note(what="drain", seconds=command.drain.timeout_seconds if command else 0)
            drained_at = time.monotonic() + float(_read("drain_seconds", "0"))
        if (encoded := state.SerializeToString(deterministic=True)) != last:
            last = encoded
            writer.write(frame(pod_pb2.ProcessReport(name="engine", engine_state=state)))
            await writer.drain()
        await asyncio.sleep(_POLL_SECONDS)
    note(what="engine ends")
    drain.cancel()
    writer.close()
    await server.stop(0)
    return 0


async def api(settings: ServeSettings, index: int) -> int:
    """Says that it listens and waits for SIGTERM."""
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    if code := int(_read("api_exit_code", "0")):
        return code
    from prometheus_client import Counter

    Counter("stand_in_api_starts", "Starts of the stand-in.").inc()
    # Before the pod is ready: a test may kill it from then on.
    note(what="api", index=index)
    _, writer = await asyncio.open_unix_connection(str(settings.report_socket))
    writer.write(frame(pod_pb2.ProcessReport(name=f"api {index}", listening=True)))
    await writer.drain()
    await terminated.wait()
    note(what="api ends", index=index)
    writer.close()
    return 0


def main() -> None:
    """`python -m support.stand_ins engine|api --settings-file F [--index I]`."""
    role, _, settings_file, *rest = sys.argv[1:]
    settings = ServeSettings.from_json(Path(settings_file).read_text())
    sys.stdout.write(f"{role} speaks on stdout\n")
    sys.stdout.flush()
    sys.exit(asyncio.run(engine(settings) if role == "engine" else api(settings, int(rest[-1]))))


if __name__ == "__main__":
    main()
