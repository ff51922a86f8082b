"""The plugin, which comes without the operator's packages, calls things as the operator does."""

from __future__ import annotations

from support import operator_cluster
from support.plugin_objects import view
from tpmodel.kubectl import names
from tpmodel.kubectl.view import pod_selector
from tpmodel_operator import api
from tpmodel_operator import names as operator_names
from tpmodel_operator.api_kubernetes import RESERVED_VOLUMES
from tpmodel_operator.observed import GangReport


def test_labels_container_ports_and_resource() -> None:
    assert f"{api.PLURAL}.{api.GROUP}" == names.MODELS
    assert names.MODEL_LABEL == operator_names.MODEL_LABEL
    assert names.GANG_LABEL == operator_names.GANG_LABEL
    assert names.POD_INDEX_LABEL == operator_names.POD_INDEX
    assert names.CONTAINER == operator_names.CONTAINER
    assert names.TLS_VOLUME in RESERVED_VOLUMES
    assert (names.INFERENCE_PORT, names.HTTP_PORT) == (operator_names.INFERENCE_PORT, operator_names.HTTP_PORT)


def test_the_selector_finds_the_operators_pods() -> None:
    labels = operator_names.gang_labels("m", "m-0-abcde", 0, "abcde")
    for selector in (pod_selector("m"), pod_selector("m", "m-0-abcde")):
        assert dict(part.split("=") for part in selector.split(",")).items() <= labels.items()


def test_every_field_of_status_that_it_reads_is_one_that_the_operator_writes() -> None:
    """Written by the operator's classes, read back by the plugin: nothing is lost by another name."""
    auth = {"apiKey": {"name": "keys", "key": "token"}, "trainerToken": {"name": "trainer", "key": "token"}}
    cluster = operator_cluster.serving(replicas=2, auth=auth)
    first, second = (gang.name for gang in cluster.status.gangs)
    for gang, condition in ((first, ""), (second, "WeightsLost")):
        cluster.reports[gang] = GangReport(
            gang=gang,
            phase="Serving",
            epoch=7,
            ready_ranks=2,
            load_percent=100,
            time=cluster.now,
            weights_version=3,
            weights_condition=condition,
            weights_message=condition and "send a full set",
            weights_kept=2,
            weights_keeping_error="the disk is full",
        )
    cluster.reconcile()
    assert [gang.weights_version for gang in view(cluster).gangs] == [3, None]
    assert view(cluster).gangs[1].weights_condition == "WeightsLost"
    assert view(cluster).trainers_url == cluster.status.trainers_url
    cluster.end_container(cluster.pod(1, 1), 75, "words")
    cluster.reconcile()
    model = view(cluster)
    status = cluster.status
    assert (model.state, model.ready, model.url, model.image) == (status.state, status.ready, status.url, status.image)
    assert (model.restarts, model.observed_generation) == (1, 1)
    assert [condition.type for condition in model.conditions] == [each.type for each in status.conditions]
    assert model.api_key == "key token of Secret keys"
    assert model.max_restarts == cluster.spec.recovery.max_restarts
    for gang, written in zip(model.gangs, status.gangs, strict=True):
        same = ("name", "uid", "index", "revision", "attempt", "epoch", "phase", "ready", "ready_ranks", "load_percent")
        same += ("weights_version", "weights_condition", "weights_message", "weights_kept", "weights_keeping_error")
        assert [getattr(gang, field) for field in same] == [getattr(written, field) for field in same]
        assert (gang.restarts, gang.restarts_counted) == (written.restarts_total, written.restarts)
    restart, written = model.gangs[1].last_restart, status.gangs[1].last_restart
    assert restart is not None
    assert written is not None
    same = ("cause", "message", "exit_code", "time", "attempt")
    assert [getattr(restart, field) for field in same] == [getattr(written, field) for field in same]
