"""Models from a hub: pods that share a cache fetch each byte once, and a killed download goes on where it was."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from support.hub_server import HubServer
from tests.cluster import addresses, checkpoints
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.e2e.support import caches, pod_processes
from tests.e2e.support.clients import Client
from tests.e2e.support.models import deployed
from tests.e2e.support.timings import Stopwatch, Timings
from tpmodel_operator import names

REPOSITORY = "organisation/default-model"
WEIGHTS = "model.safetensors"
NODE = "node2"
SHORT_PAUSE, LONG_PAUSE = 0.05, 0.2
"""Seconds after each 64 KiB: the weights then take 2.5 s and 10 s."""
DOWNLOAD_SECONDS = 90.0
"""For a pod to be started and to have fetched a good part, on a busy machine."""
LOST_BYTES = 1024 * 1024
"""What may be on its way when a process dies: the buffers of both ends."""


@pytest.fixture
def hub(cluster: LocalCluster) -> Iterator[HubServer]:
    """A hub on this machine, at the address that pods reach."""
    with HubServer.of_folder(REPOSITORY, checkpoints.DEFAULT_MODEL, host=addresses.HOST) as hub:
        yield hub


@pytest.fixture
def cache(models: Kubectl, cluster: LocalCluster) -> Iterator[str]:
    """An empty claim that pods may write."""
    claim = caches.create(models, cluster.node(NODE), f"cache-{uuid.uuid4().hex[:8]}")
    yield claim
    models.delete("pvc", claim, wait=False)


def from_hub(hub: HubServer, claim: str) -> Object:
    """The spec of a model from the hub, with that cache."""
    return {
        "model": {"uri": f"hf://{REPOSITORY}"},
        "env": [{"name": "HF_ENDPOINT", "value": hub.endpoint}, {"name": "OMP_NUM_THREADS", "value": "1"}],
        "cache": {"type": "pvc", "claimName": claim},
    }


def test_two_gangs_of_two_pods_with_one_cache_fetch_each_byte_once(
    models: Kubectl, client: Client, hub: HubServer, cache: str
) -> None:
    hub.pause_per_chunk = SHORT_PAUSE
    with deployed(models, "downloaded", replicas=2, **from_hub(hub, cache)) as model:
        assert len(model.pods()) == 4
        assert hub.sent == {name: len(content) for name, content in hub.files.items()}
        assert len(client.complete(model.url, [[1, 2, 3]], max_tokens=4, ignore_eos=True)[0]) == 4


def test_a_download_that_is_killed_goes_on_where_it_was(
    models: Kubectl, hub: HubServer, cache: str, timings: Timings
) -> None:
    hub.pause_per_chunk = LONG_PAUSE
    size = len(hub.files[WEIGHTS])
    with deployed(models, "resumed", ready=False, tensorParallelSize=1, **from_hub(hub, cache)) as model:
        model.until(lambda: hub.sent[WEIGHTS] > size // 4, what="mid-download", seconds=DOWNLOAD_SECONDS, interval=0.1)
        clock = Stopwatch()
        pod_processes.kill(pod_processes.first_of(model.pods()[0], names.CONTAINER))
        assert hub.sent[WEIGHTS] < size, "the download was over already"

        hub.pause_per_chunk = SHORT_PAUSE
        model.wait_ready()

        timings.note("SIGKILL in mid-download", "Ready", clock.seconds)
        assert hub.sent[WEIGHTS] - size < LOST_BYTES
        gang = model.gang()
        assert (gang["attempt"], gang["lastRestart"]["cause"]) == (2, "ContainerEnded")
