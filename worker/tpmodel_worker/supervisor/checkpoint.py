"""How a pod comes by its checkpoint, before any of its processes starts: a mounted folder, or a download."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from pathlib import Path

from tpmodel.v1 import worker_pb2
from tpmodel_worker.gang_files import read_model_revision
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.download import Download
from tpmodel_worker.supervisor.download_state import CancelledError, DownloadFailedError
from tpmodel_worker.supervisor.events import Downloading, EventListener
from tpmodel_worker.supervisor.hub import CONFIG, DEFAULT_ENDPOINT, SCHEME, Hub, ModelSource
from tpmodel_worker.supervisor.progress import Stopwatch
from tpmodel_worker.supervisor.status import HealthPort

_TICK_SECONDS = 0.5
_CANCEL_SECONDS = 3.0


async def obtain_checkpoint(settings: ServeSettings, health: HealthPort, on_event: EventListener) -> ServeSettings:
    """The settings with the folder that holds the checkpoint.

    Args:
        settings: model_uri says where the model is; empty: model_path is the folder.
        health: shows a download meanwhile.
        on_event: told of its progress.

    Raises:
        ConfigurationError: no retry helps.
        DownloadFailedError: another try may.
    """
    if settings.model_uri.startswith(SCHEME):
        folder, commit = await _download(settings, health, on_event)
        return dataclasses.replace(settings, model_path=str(folder), model_revision=commit)
    if settings.model_uri:
        _check_mounted(settings)
    return settings


def _check_mounted(settings: ServeSettings) -> None:
    folder = Path(settings.model_path)
    if (folder / CONFIG).is_file():
        return
    try:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    except OSError as error:
        there = error.strerror or "nothing that can be read"
    raise ConfigurationError(
        f"--model-path {folder} has no {CONFIG} (there is: {there}): give a --model-uri whose folder is a checkpoint; "
        f"this one is {settings.model_uri}"
    )


async def _download(settings: ServeSettings, health: HealthPort, on_event: EventListener) -> tuple[Path, str]:
    """The checkpoint's folder, and the commit that it is of."""
    if not settings.cache_dir:
        raise ConfigurationError(f"--model-uri {settings.model_uri} needs --cache-dir, a folder to download into")
    source = ModelSource.parse(settings.model_uri, settings.model_revision)
    if commit := read_model_revision(settings.gang_dir):
        # Another pod of the rollout has resolved the revision: what its branch is by now does not matter.
        source = dataclasses.replace(source, revision=commit)
    hub = Hub(os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, os.environ.get("HF_TOKEN", ""))
    with_weights = settings.load_format != "dummy"
    download = Download(
        source,
        Path(settings.cache_dir),
        hub,
        owner=settings.pod_uid,
        # No other gang's leader pod has this name.
        gang=settings.leader_host,
        attempt=settings.attempt,
        with_weights=with_weights,
    )
    health.show(lambda: _status(settings, download))
    try:
        return await _watch(download, settings.progress_deadline, on_event), download.commit
    finally:
        hub.close()


async def _watch(download: Download, deadline: float, on_event: EventListener) -> Path:
    """Runs the download in a thread, and ends it when nothing comes any more."""
    running = _in_thread(download)
    stopwatch = Stopwatch()
    progress = download.progress
    try:
        while True:
            await asyncio.wait({running}, timeout=_TICK_SECONDS)
            if running.done():
                return running.result()
            on_event(Downloading(_describe(download)))
            seen = (progress.done_bytes, progress.checked_bytes)
            if stopwatch.observe(seen, time.monotonic()) >= deadline:
                raise _no_progress(download, deadline)
    finally:
        if not running.done():
            download.cancel()
            await asyncio.wait({running}, timeout=_CANCEL_SECONDS)
            download.release()


def _no_progress(download: Download, deadline: float) -> Exception:
    progress = download.progress
    waits = f", waiting for {progress.waiting_for}" if progress.waiting_for else ""
    message = f"{progress.source}: no progress of the download for {deadline:.0f} s{waits}"
    if progress.room_missing:
        # A restart would find the same disk; whoever reads this has had the deadline's time to make room.
        return ConfigurationError(f"{message}: give the cache a larger volume, or delete something there")
    return DownloadFailedError(f"{message} ({progress.done_bytes} of {progress.total_bytes} bytes are here)")


def _in_thread(download: Download) -> asyncio.Future[Path]:
    """run() in a thread that nobody waits for at the process's end: it may be waiting for the hub."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Path] = loop.create_future()

    def settle(folder: Path | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        elif folder is not None:
            result.set_result(folder)

    def run() -> None:
        folder, error = None, None
        try:
            folder = download.run()
        except BaseException as raised:  # noqa: BLE001 - raised again by whoever waits for the result
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, folder, error)

    threading.Thread(target=run, name="download", daemon=True).start()
    # Nobody asks for the result of a download that was cancelled.
    result.add_done_callback(lambda done: isinstance(done.exception(), CancelledError))
    return result


def _describe(download: Download) -> worker_pb2.Download:
    progress = download.progress
    return worker_pb2.Download(
        source=progress.source,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        waiting_for=progress.waiting_for,
    )


def _status(settings: ServeSettings, download: Download) -> worker_pb2.GangStatusResponse:
    """As of a gang whose world is loading: to whoever only knows phases, that is what a download is."""
    described = _describe(download)
    percent = 100.0 * described.done_bytes / max(described.total_bytes, 1)
    engine = worker_pb2.EngineState(
        phase=worker_pb2.PHASE_LOADING,
        world_size=settings.world_size,
        model_id=settings.model_id,
        load_done_bytes=described.done_bytes,
        load_total_bytes=described.total_bytes,
        load_percent=min(percent, 100.0),
        cause=f"waiting for {described.waiting_for}" if described.waiting_for else "",
    )
    return worker_pb2.GangStatusResponse(
        engine=engine,
        pod=settings.pod_uid,
        attempt=settings.attempt,
        download=described,
        model_revision=download.commit,
    )
