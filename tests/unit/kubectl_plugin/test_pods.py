"""A pod in a few words."""

from __future__ import annotations

from typing import Any

import pytest

from support import api_objects
from support.api_objects import worker
from tpmodel.kubectl.pods import pod_view
from tpmodel_operator import names as operator_names

ENDED = {"exitCode": 75, "reason": "Error", "message": "rank 1 was killed\nby SIGKILL"}
RUNNING = {"startedAt": api_objects.at(1)}


def state(**status: Any) -> str:
    return pod_view(api_objects.pod(**status)).state


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"containerStatuses": worker(running=RUNNING)}, "running"),
        (
            {"containerStatuses": worker(restarts=1, running=RUNNING, last={"terminated": ENDED})},
            "running; before that it ended with 75: rank 1 was killed by SIGKILL",
        ),
        ({"containerStatuses": worker(terminated=ENDED)}, "ended with 75: rank 1 was killed by SIGKILL"),
        (
            {"containerStatuses": worker(terminated={"exitCode": 137, "reason": "OOMKilled"})},
            "ended with 137: OOMKilled",
        ),
        ({"containerStatuses": worker(terminated={"exitCode": 0, "reason": "Completed"})}, "ended with 0"),
        (
            {"containerStatuses": worker(waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling"})},
            "waits: ImagePullBackOff: Back-off pulling",
        ),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
                ]
            },
            "not scheduled: 0/3 nodes: Insufficient nvidia.com/gpu",
        ),
        (
            {
                "phase": "Failed",
                "reason": "Evicted",
                "message": "low on disk",
                "containerStatuses": worker(terminated=ENDED),
            },
            "failed: Evicted: low on disk",
        ),
        ({}, "pending"),
    ],
)
def test_what_its_container_does(status: dict[str, Any], expected: str) -> None:
    assert state(**status) == expected


def test_a_pod_that_is_ending_says_so() -> None:
    pod = api_objects.pod(containerStatuses=worker(running=RUNNING))
    pod["metadata"]["deletionTimestamp"] = api_objects.at(5)
    shown = pod_view(pod)
    assert (shown.state, shown.deleting) == ("terminating", True)


def test_restarts_are_the_workers_not_a_sidecars() -> None:
    assert pod_view(api_objects.pod(containerStatuses=worker(restarts=2, running=RUNNING))).restarts == 2


@pytest.mark.parametrize(
    ("containers", "started"),
    [
        ([], False),
        (worker(waiting={"reason": "ContainerCreating"}), False),
        (worker(running=RUNNING), True),
        (worker(restarts=1, waiting={"reason": "CrashLoopBackOff"}), True),
    ],
)
def test_a_container_that_has_run_has_a_log(containers: list[dict[str, Any]], started: bool) -> None:
    assert pod_view(api_objects.pod(containerStatuses=containers)).started == started


def test_gang_and_index_are_the_labels() -> None:
    pod = api_objects.pod("m-0-abcde-3")
    assert pod["metadata"]["labels"][operator_names.POD_INDEX] == "3"
    shown = pod_view(pod)
    assert (shown.gang, shown.index) == ("m-0-abcde", 3)
