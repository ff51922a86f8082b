"""The audit: a watch that is late, hangs or is dead is told from one that is merely busy."""

import pytest

from support.api_objects import pod
from support.fake_kube import FakeKube
from tpmodel_operator.audit import GONE, Audit, Audited, missed, overdue
from tpmodel_operator.kube import PODS, ApiError
from tpmodel_operator.metrics import Metrics


def test_a_current_watch_has_missed_nothing():
    assert missed({"a": 1, "b": 2}, 5, {"a": 1, "b": 2}) == {}


def test_a_watch_that_is_newer_than_the_list_has_missed_nothing():
    assert missed({"a": 1}, 5, {"a": 3, "made-since": 6}) == {}


def test_what_a_watch_has_missed():
    assert missed({"changed": 4, "new": 5}, 5, {"changed": 3, "gone": 2}) == {"changed": 4, "new": 5, "gone": GONE}


@pytest.mark.parametrize(
    ("before", "now", "held", "is_overdue"),
    [
        ({"a": 4}, {"a": 4}, {"a": 3}, True),
        ({"a": 4}, {"a": 4}, {}, True),
        ({"a": GONE}, {"a": GONE}, {"a": 2}, True),
        ({"a": 4}, {}, {"a": 4}, False),
        ({"a": 4}, {"a": 9}, {"a": 8}, False),  # it changes all the time, and the watch keeps up
        ({"a": 4}, {}, {}, False),  # gone meanwhile, and the watch knows
        ({}, {"b": 4}, {}, False),  # new: it has its minute
        ({"a": GONE}, {}, {}, False),
    ],
)
def test_only_what_two_audits_in_a_row_have_found_counts(before, now, held, is_overdue):
    assert overdue(before, now, held) == (["a"] if is_overdue else [])


class Pods:
    def __init__(self) -> None:
        self.kube = FakeKube()
        self.held: dict[str, int] = {}
        audited = Audited(resource=PODS, namespaces=[None], selector="", held=lambda: self.held)
        self.audit = Audit(self.kube, [audited], period=600, metrics=Metrics())

    def add(self, name: str, *, told: bool) -> str:
        item = self.kube.put(PODS, pod(name))
        if told:
            self.held[item["metadata"]["uid"]] = int(item["metadata"]["resourceVersion"])
        return item["metadata"]["uid"]


async def test_a_quiet_cluster_is_healthy():
    pods = Pods()
    await pods.audit.audit()
    pods.add("m-0-abcde-0", told=True)
    await pods.audit.audit()
    await pods.audit.audit()
    assert pods.audit.failures == []


async def test_a_dead_watch_is_found_by_the_second_audit_and_a_healed_one_forgiven():
    pods = Pods()
    uid = pods.add("m-0-abcde-0", told=False)
    await pods.audit.audit()
    assert pods.audit.failures == []
    await pods.audit.audit()
    assert pods.audit.failures == ["1 pods are not as the watch says"]
    pods.held[uid] = 99
    await pods.audit.audit()
    assert pods.audit.failures == []


async def test_a_watch_that_missed_a_deletion_is_found():
    pods = Pods()
    pods.add("m-0-abcde-0", told=True)
    pods.kube.remove(PODS, "default", "m-0-abcde-0")
    await pods.audit.audit()
    await pods.audit.audit()
    assert len(pods.audit.failures) == 1


async def test_a_list_that_fails_proves_nothing():
    pods = Pods()
    pods.add("m-0-abcde-0", told=True)
    pods.kube.fail = lambda call: ApiError(503, "ServiceUnavailable", "")
    await pods.audit.audit()
    await pods.audit.audit()
    assert pods.audit.failures == []
