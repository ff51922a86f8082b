"""A gang of two pods whose link fails under load. Each pod has a network namespace of its own, so this needs root."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos_load import Load, make_requests
from support.gang_pods import Gang, GangPod, running_gang
from support.pod_links import PodLinks
from support.scale import CHAOS_GANGS
from tpmodel.v1 import worker_pb2

FIXED_SEED = 20261130
STEP_DEADLINE = 4.0
OPTIONS = [
    "--recovery-mode=InPlace",
    f"--engine-option=step_deadline={STEP_DEADLINE}",
]
# Beyond the step deadline, so that the world is lost, and below what gives up the pods.
CUT_SECONDS = (6.0, 9.0)
# Below it: a pause between two steps.
DELAY_SECONDS = (0.05, 0.6)
RECOVERY_SECONDS = 60.0
# The step deadline grows with how long steps take, which is long on a busy machine; then keepalive is faster.
DETECTION_SECONDS = 40.0
# What a gang's budget of rebuilds allows, with those that fail while the link is cut.
CUTS = 2


@pytest.fixture
def links() -> Iterator[PodLinks]:
    assert os.geteuid() == 0, "network namespaces are made by root: run this test as root"
    links = PodLinks(2)
    yield links
    links.close()


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    with running_gang(tmp_path, options=OPTIONS) as gang:
        yield gang


def epoch_of(pod: GangPod) -> int:
    return pod.gang_status().engine.epoch


def wait_serving(pod: GangPod, *, after: int = 0) -> None:
    def serves() -> bool:
        engine = pod.gang_status().engine
        return engine.phase == worker_pb2.PHASE_SERVING and engine.epoch > after

    pod.eventually(serves, f"serving above epoch {after}", RECOVERY_SECONDS)


def flow(pod: GangPod, load: Load) -> None:
    since = time.monotonic()
    pod.eventually(lambda: load.flows(since), "tokens in every lane", RECOVERY_SECONDS)
    load.check()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number_of_gang", range(CHAOS_GANGS))
def test_streams_go_on_when_the_link_between_pods_was_cut_or_slow(
    gang: Gang, links: PodLinks, number_of_gang: int
) -> None:
    """W19, W26, P17: the tokens are those of an undisturbed run, epochs rise, and the rank on this side of the cut
    keeps its process."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(f"{FIXED_SEED} {seed}")
    print(f"\nlinks: seed {seed}", flush=True)
    leader, worker = (gang.start(index, ip=links.address(index), prefix=links.prefix(index)) for index in range(2))
    leader.wait_ready()
    worker.wait_ready()
    load = Load(leader.target, make_requests(seed, 3, vocabulary=256, tokens=24), lanes=2, seed=seed)
    try:
        # Few and short: a collective between pods takes milliseconds on CPU ranks, much more on a busy machine.
        load.learn()
        load.start()
        flow(leader, load)
        survivor = leader.pid_of("rank 0")
        for number in range(CUTS):
            epoch = epoch_of(leader)
            with links.interrupted(1, rng.uniform(*DELAY_SECONDS)):
                pass
            flow(leader, load)
            assert epoch_of(leader) >= epoch
            epoch = epoch_of(leader)
            with links.interrupted(1, rng.uniform(*CUT_SECONDS)):
                leader.eventually(
                    lambda: leader.gang_status().engine.phase == worker_pb2.PHASE_REBUILDING,
                    "the cut is found",
                    DETECTION_SECONDS,
                )
            mended = time.monotonic()
            wait_serving(leader, after=epoch)
            flow(leader, load)
            print(f"cut {number}: streams go on {time.monotonic() - mended:.1f} s after the link", flush=True)
        load.pause()
        load.check()
        assert leader.pid_of("rank 0") == survivor
        assert not worker.ended
    finally:
        load.stop()
