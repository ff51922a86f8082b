"""Pods that fetch their model before they start anything: with others, after a SIGKILL, onto a full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gang_pods import MODEL, TESTS, Gang, GangPod, running_gang
from support.hub_server import COMMIT, HubServer
from support.waiting import until
from tpmodel import Client
from tpmodel.v1 import worker_pb2
from tpmodel_worker.supervisor.download import Download
from tpmodel_worker.supervisor.hub import Hub, ModelSource

WEIGHTS = "model.safetensors"
STALE_SECONDS = 2.0


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer.of_folder("org/model", MODEL) as hub:
        yield hub


def new_gang(folder: Path, hub: HubServer, cache: Path, *options: str, ranks: int = 2) -> Gang:
    folder.mkdir(exist_ok=True)
    return Gang(
        folder,
        ranks=ranks,
        model=["--model-uri=hf://org/model", f"--cache-dir={cache}"],
        options=options,
        environment={"HF_ENDPOINT": hub.endpoint},
    )


@contextlib.contextmanager
def one_pod_gang(tmp_path: Path, hub: HubServer, *options: str) -> Iterator[Gang]:
    gang = new_gang(tmp_path / "gang", hub, tmp_path / "cache", *options, ranks=1)
    try:
        yield gang
    finally:
        gang.close()


@pytest.fixture
def gang(tmp_path: Path, hub: HubServer) -> Iterator[Gang]:
    """Of one pod."""
    with one_pod_gang(tmp_path, hub) as gang:
        yield gang


def downloading(pod: GangPod, at_least: int = 1) -> worker_pb2.GangStatusResponse:
    """Waits until so many bytes are there."""

    pod.eventually(lambda: pod.gang_status().download.done_bytes >= at_least, "the download runs")
    return pod.gang_status()


def full_disk(cache: Path, *, size: int, filler: int = 0) -> list[str]:
    """A command that gives another one a disk of its own, partly full, in the place of the cache."""
    cache.mkdir()
    script = f'mount -t tmpfs -o size={size} tmpfs {cache} && head -c {filler} /dev/zero > {cache}/filler && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


@pytest.mark.in_cluster_too
def test_two_gangs_of_two_pods_with_one_cache_fetch_each_byte_once_and_serve(tmp_path: Path, hub: HubServer) -> None:
    hub.pause_per_chunk = 0.05
    gangs = [new_gang(tmp_path / name, hub, tmp_path / "cache") for name in ("first", "second")]
    try:
        for gang in gangs:
            gang.start(0)
            gang.start(1)
        for gang in gangs:
            gang.pods[0].wait_ready()
            with Client(gang.pods[0].target) as client:
                assert client.complete("Tell me", max_tokens=4, temperature=0, ignore_eos=True).token_ids
    finally:
        for gang in gangs:
            gang.close()
    assert hub.sent == {path.name: path.stat().st_size for path in MODEL.iterdir()}


@pytest.mark.in_cluster_too
def test_a_container_killed_in_mid_download_goes_on_where_it_was(gang: Gang, hub: HubServer) -> None:
    hub.pause_per_chunk = 0.5
    first = gang.start(0)
    downloading(first, 1_000_000)
    first.kill()
    hub.pause_per_chunk = 0
    sent = hub.sent[WEIGHTS]
    assert sent < len(hub.files[WEIGHTS])

    again = gang.start(0, uid=first.uid)

    again.wait_ready()
    # What was on its way when the process died is lost: buffers of both ends.
    assert hub.sent[WEIGHTS] - len(hub.files[WEIGHTS]) < 4 * 64 * 1024 + 256 * 1024
    assert all(hub.sent[name] <= len(content) * 2 for name, content in hub.files.items())


def test_a_dead_pods_download_is_taken_over_by_another(tmp_path: Path, hub: HubServer) -> None:
    hub.pause_per_chunk = 0.3
    script = (
        "import sys; from pathlib import Path\n"
        "from tpmodel_worker.supervisor.download import Download\n"
        "from tpmodel_worker.supervisor.hub import Hub, ModelSource\n"
        "Download(ModelSource('org', 'model', 'main'), Path(sys.argv[2]), Hub(sys.argv[1], ''), owner='dead',\n"
        f"         stale_seconds={STALE_SECONDS}).run()\n"
    )
    command = [sys.executable, "-c", script, hub.endpoint, str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(TESTS)}) as dead:
        until(lambda: hub.sent[WEIGHTS] > 1_000_000, "mid-download", 120)
        other = Download(
            ModelSource("org", "model", "main"), tmp_path, Hub(hub.endpoint, ""), owner="other",
            stale_seconds=STALE_SECONDS,
        )  # fmt: skip
        taking_over = threading.Thread(target=other.run)
        taking_over.start()
        until(lambda: "dead" in other.progress.waiting_for, "the other one waits", 120)
        killed = time.monotonic()
        dead.kill()
    hub.pause_per_chunk = 0
    taking_over.join(60)
    assert time.monotonic() - killed > STALE_SECONDS / 2
    folder = tmp_path / "models" / "org--model" / COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.files
    assert hub.sent[WEIGHTS] - len(hub.files[WEIGHTS]) < 4 * 64 * 1024 + 256 * 1024


def test_a_download_is_alive_not_ready_and_seen_and_sigterm_ends_it_at_once(gang: Gang, hub: HubServer) -> None:
    hub.pause_per_chunk = 0.3
    pod = gang.start(0)
    status = downloading(pod)
    pod.eventually(lambda: "tpmodel: downloading: " in pod.output, "the pod's log shows the download")
    assert pod.health("")
    assert not pod.health()
    assert status.download.source == f"hf://org/model@{COMMIT}"
    assert status.download.total_bytes == sum(map(len, hub.files.values()))
    assert status.engine.phase == worker_pb2.PHASE_LOADING
    assert status.engine.load_total_bytes == status.download.total_bytes

    begun = time.monotonic()
    pod.process.send_signal(signal.SIGTERM)

    assert pod.wait_exit() == 0
    assert time.monotonic() - begun < 8
    assert list((gang.folder.parent / "cache").glob("**/*.lock")) == []


def test_the_commit_that_the_operator_left_word_of_is_used_whatever_the_branch_is_by_now(
    gang: Gang, hub: HubServer
) -> None:
    hub.branch = "gone"
    gang.word["model_revision"] = COMMIT
    pod = gang.start(0)
    pod.wait_ready()
    assert pod.gang_status().model_revision == COMMIT
    assert [path for path in hub.requests if "/revision/" in path] == [
        f"/api/models/org/model/revision/{COMMIT}?blobs=true"
    ]


def test_a_pod_says_its_commit_and_ends_with_75_when_the_rollout_uses_another(gang: Gang, hub: HubServer) -> None:
    """Two gangs' first pods found their branch at different commits: the one that the operator recorded stays."""
    other = COMMIT[::-1]
    hub.pause_per_chunk = 0.1
    pod = gang.start(0)
    assert downloading(pod).model_revision == COMMIT
    hub.pause_per_chunk = 0.0
    pod.wait_ready()
    assert pod.gang_status().model_revision == COMMIT
    pod.leave_word(model_revision=COMMIT)
    time.sleep(6)
    assert pod.health()
    pod.leave_word(model_revision=other)
    assert pod.wait_exit() == 75
    assert pod.termination_message == f"the rollout uses commit {other} of hf://org/model, this pod has {COMMIT}"


def test_a_download_without_progress_ends_the_pod_with_75(tmp_path: Path, hub: HubServer) -> None:
    released = threading.Event()
    hub.before_file = lambda _name: released.wait(60)
    with one_pod_gang(tmp_path, hub, "--progress-deadline=2") as gang:
        pod = gang.start(0)
        assert pod.wait_exit() == 75
    released.set()
    total = sum(map(len, hub.files.values()))
    message = f"hf://org/model@{COMMIT}: no progress of the download for 2 s (0 of {total} bytes are here)"
    assert pod.termination_message == message


def test_a_model_that_is_not_there_ends_the_pod_with_64(gang: Gang, hub: HubServer) -> None:
    hub.refuse = 404
    pod = gang.start(0)
    assert pod.wait_exit() == 64
    assert pod.termination_message == (
        f"hf://org/model@main: {hub.endpoint} answers 404: check name and revision"
    )  # fmt: skip


def test_a_cache_that_can_never_hold_the_model_ends_the_pod_with_64(gang: Gang, hub: HubServer) -> None:
    prefix = full_disk(gang.folder.parent / "cache", size=1 << 20)
    pod = gang.start(0, prefix=prefix)
    assert pod.wait_exit() == 64
    needed = sum(map(len, hub.files.values()))
    assert f"no room: {needed} bytes are needed, " in pod.termination_message
    assert "are free of 1048576 in all: give the cache a larger volume" in pod.termination_message


def test_a_full_cache_is_said_and_waited_for_and_the_pod_goes_on_when_there_is_room(gang: Gang, hub: HubServer) -> None:
    cache = gang.folder.parent / "cache"
    pod = gang.start(0, prefix=full_disk(cache, size=8 << 20, filler=6 << 20))
    pod.eventually(lambda: "room in " in pod.gang_status().download.waiting_for, "it waits for room")
    assert "room in " in pod.gang_status().engine.cause
    assert hub.sent[WEIGHTS] == 0

    Path(f"/proc/{pod.process.pid}/root{cache}/filler").unlink()

    pod.wait_ready()


def test_a_disk_that_fills_up_in_mid_download_and_stays_full_ends_the_pod_with_64(
    tmp_path: Path, hub: HubServer
) -> None:
    hub.pause_per_chunk = 0.5
    cache = tmp_path / "cache"
    with one_pod_gang(tmp_path, hub, "--progress-deadline=8") as gang:
        pod = gang.start(0, prefix=full_disk(cache, size=8 << 20))
        downloading(pod, 500_000)
        # The kernel gives what there is.
        with Path(f"/proc/{pod.process.pid}/root{cache}/filler").open("wb", buffering=0) as filler:
            filler.write(bytes(8 << 20))
        assert pod.wait_exit() == 64
    assert "no progress of the download for 8 s, waiting for room in " in pod.termination_message
    assert pod.termination_message.endswith("give the cache a larger volume, or delete something there")


def test_a_mounted_folder_that_is_no_checkpoint_ends_the_pod_with_64(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").touch()
    with running_gang(tmp_path, ranks=1, model=["--model-uri=pvc://models/small", f"--model-path={folder}"]) as gang:
        pod = gang.start(0)
        assert pod.wait_exit() == 64
    assert pod.termination_message == (
        f"--model-path {folder} has no config.json (there is: README.md): give a --model-uri whose folder is a "
        "checkpoint; this one is pvc://models/small"
    )
