"""From the API's JSON to records."""

import itertools

import pytest

from support.api_objects import START, at, condition, pod, stateful_set, tpmodel, worker
from tpmodel_operator import records
from tpmodel_operator.records import UnreadableModelError


def read(item):
    record = records.pod(item)
    assert record is not None
    return record


def seconds(moment):
    return (moment - START).total_seconds()


def test_a_new_pod():
    record = read(pod("m-0-abcde-3"))
    assert (record.model, record.gang, record.index, record.node) == ("m", "m-0-abcde", 3, "node-1")
    assert (record.phase, record.running, record.ready, record.ended) == ("Pending", False, False, None)
    assert seconds(record.changed) == 0


def test_a_running_ready_pod():
    statuses = worker(running={"startedAt": at(30)})
    record = read(
        pod(
            phase="Running",
            podIP="10.0.0.1",
            conditions=[condition("PodScheduled", "True", 5), condition("Ready", "True", 40)],
            containerStatuses=statuses,
        )
    )
    assert (record.running, record.ready, record.ip) == (True, True, "10.0.0.1")
    assert record.ready_changed is not None
    assert seconds(record.ready_changed) == 40
    assert seconds(record.changed) == 40


def test_a_sidecar_is_not_the_worker():
    record = read(pod(containerStatuses=worker(waiting={"reason": "ImagePullBackOff"})))
    assert (record.running, record.restart_count, record.waiting_reason) == (False, 0, "ImagePullBackOff")
    assert seconds(record.changed) == 0


@pytest.mark.parametrize("place", ["state", "lastState"])
def test_the_newest_end_of_the_container(place: str):
    end = {"exitCode": 75, "message": "NCCL timeout\n", "finishedAt": at(50)}
    older = {"exitCode": 1, "finishedAt": at(10)}
    if place == "state":
        statuses = worker(terminated=end, last={"terminated": older})
    else:
        statuses = worker(running={"startedAt": at(60)}, restarts=2, last={"terminated": end})
    record = read(pod(containerStatuses=statuses))
    assert record.ended is not None
    assert (record.ended.exit_code, record.ended.message) == (75, "NCCL timeout")
    assert record.ended.time is not None
    assert seconds(record.ended.time) == 50
    assert record.restart_count == (0 if place == "state" else 2)


def test_a_container_that_waits_for_another_reason_has_not_changed():
    before = read(pod(containerStatuses=worker(waiting={"reason": "ErrImagePull"})))
    after = read(pod(containerStatuses=worker(waiting={"reason": "ImagePullBackOff"})))
    assert before.changed == after.changed


def test_a_deletion_began_a_grace_period_before_the_time_that_the_api_writes():
    item = pod()
    item["metadata"] |= {"deletionTimestamp": at(135), "deletionGracePeriodSeconds": 135}
    record = read(item)
    assert record.deleting_since == START
    assert record.grace_seconds == 135


def test_the_index_comes_from_the_name_where_the_label_is_missing():
    item = pod("m-0-abcde-1")
    del item["metadata"]["labels"]["apps.kubernetes.io/pod-index"]
    assert read(item).index == 1


@pytest.mark.parametrize("label", ["tpmodel.dev/model", "tpmodel.dev/gang"])
def test_a_pod_without_our_labels_is_nobodys(label: str):
    item = pod()
    del item["metadata"]["labels"][label]
    assert records.pod(item) is None


def test_a_stateful_set_remembers_the_image_that_it_was_made_with():
    record = records.stateful_set(stateful_set("m-2-abcde"))
    assert record is not None
    assert (record.name, record.model, record.revision, record.pods) == ("m-2-abcde", "m", "abcde", 2)
    assert record.image == "worker:1"


def test_a_stateful_set_without_our_labels_is_nobodys():
    item = stateful_set()
    del item["metadata"]["labels"]["tpmodel.dev/revision"]
    assert records.stateful_set(item) is None


def test_a_node():
    item = {"metadata": {"name": "n"}, "status": {"conditions": [condition("Ready", "Unknown", 7)]}}
    record = records.node(item)
    assert not record.ready
    assert record.ready_changed is not None
    assert seconds(record.ready_changed) == 7


def test_a_tpmodel():
    model = records.tpmodel(tpmodel(version=12, status={"replicas": 1, "writtenByANewerOperator": 1}, replicas=3))
    assert (model.name, model.resource_version, model.spec.replicas) == ("m", "12", 3)
    assert model.status.replicas == 1
    assert not model.deleting


def test_a_tpmodel_that_is_going():
    item = tpmodel()
    item["metadata"]["deletionTimestamp"] = at(1)
    assert records.tpmodel(item).deleting


def test_a_spec_of_a_newer_api_is_named_and_its_status_kept():
    with pytest.raises(UnreadableModelError, match=r"spec\.speculation") as caught:
        records.tpmodel(tpmodel(speculation={"draft": "x"}, status={"replicas": 2}))
    assert caught.value.model.uid == "uid-of-m"
    assert caught.value.model.status.replicas == 2


def running(**status):
    return read(pod(phase="Running", containerStatuses=worker(running={"startedAt": at(5)}), **status))


def test_a_pod_that_comes_up_alarms_nobody():
    ready = running(conditions=[condition("Ready", "True", 9)])
    steps = [None, read(pod()), read(pod(podIP="10.0.0.1")), running(), ready]
    assert not any(records.pod_alarms(before, after) for before, after in itertools.pairwise(steps))


def test_what_may_be_a_fault_alarms():
    before = running(conditions=[condition("Ready", "True", 9)])
    ending = pod(phase="Running", containerStatuses=worker(running={"startedAt": at(5)}))
    ending["metadata"] |= {"deletionTimestamp": at(30), "deletionGracePeriodSeconds": 30}
    ended = worker(running={"startedAt": at(9)}, restarts=1, last={"terminated": {"exitCode": 75}})
    faults = [
        None,
        running(conditions=[condition("Ready", "False", 9)]),
        read(ending),
        read(pod(phase="Running", containerStatuses=ended)),
        read(pod(phase="Failed", containerStatuses=worker(running={"startedAt": at(5)}))),
    ]
    assert all(records.pod_alarms(before, after) for after in faults)
