"""A gang of two pods whose link fails or is slow, under load. Pods have network namespaces, so this needs root."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos_load import Load, make_requests
from support.gang_pods import Gang, GangPod, running_gang
from support.pod_links import PodLinks
from support.scale import CHAOS_CUTS, CHAOS_GANGS
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
# One way. Several collectives make a step: with the first it stays well below the step deadline, with the second a
# single one does not.
SLOW_SECONDS = 0.005
HANGING_SECONDS = 8.0


@pytest.fixture
def links() -> Iterator[PodLinks]:
    assert os.geteuid() == 0, "network namespaces are made by root: run this test as root"
    links = PodLinks(2, slow=[1])
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
        for number in range(CHAOS_CUTS):
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


def connecting_takes(pod: GangPod) -> float:
    """Seconds from here to the pod and back."""
    begun = time.monotonic()
    with socket.create_connection((pod.ip, 9002), timeout=30):
        return time.monotonic() - begun


@pytest.mark.timeout(600)
def test_a_slow_link_only_costs_time_until_steps_take_longer_than_they_may(gang: Gang, links: PodLinks) -> None:
    """W19, W26, P17: a delay is no fault; one that no step survives is a hang, and is handled as one."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"\nslow link: seed {seed}", flush=True)
    leader, worker = (gang.start(index, ip=links.address(index), prefix=links.prefix(index)) for index in range(2))
    leader.wait_ready()
    worker.wait_ready()
    load = Load(leader.target, make_requests(seed, 3, vocabulary=256, tokens=24), lanes=2, seed=seed)
    try:
        load.learn()
        load.start()
        flow(leader, load)
        epoch, survivor = epoch_of(leader), leader.pid_of("rank 0")
        with links.delayed(1, HANGING_SECONDS):
            leader.eventually(
                lambda: leader.gang_status().engine.phase == worker_pb2.PHASE_REBUILDING,
                "the hang is found",
                DETECTION_SECONDS,
            )
        wait_serving(leader, after=epoch)
        flow(leader, load)
        assert leader.pid_of("rank 0") == survivor
        load.pause()
        load.check()

        epoch = epoch_of(leader)
        with links.delayed(1, SLOW_SECONDS):
            assert connecting_takes(worker) >= 2 * SLOW_SECONDS
            load.start()
            flow(leader, load)
            load.pause()
        load.check()
        assert epoch_of(leader) == epoch
        assert not worker.ended
    finally:
        load.stop()
