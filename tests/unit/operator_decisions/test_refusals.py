"""A spec that is not accepted: what runs is left as it is, and the user is told."""

from dataclasses import replace

from support.operator_cluster import Cluster, serving, spec_with
from tpmodel_operator import gang
from tpmodel_operator.actions import DeletePod, WriteAttempt

NODE_FOLDER = {"uri": "file:///models/chat"}


def refused_edit(**more: object) -> Cluster:
    """A model that served, and then got a hostPath that is not allowed."""
    cluster = serving(replicas=2)
    cluster.spec = spec_with(model=NODE_FOLDER, **more)
    cluster.generation += 1
    return cluster


def test_nothing_is_made_of_a_new_spec_that_is_not_accepted():
    cluster = Cluster(spec=spec_with(model=NODE_FOLDER))
    decision = cluster.reconcile()
    assert decision.actions == ()
    assert cluster.condition("Accepted") == ("False", "HostPathNotAllowed")
    assert cluster.condition("Stalled") == ("True", "NotAccepted")
    assert cluster.condition("Ready") == ("False", "NoGangReady")
    assert cluster.status.state == "Refused"
    assert "NotAccepted" in cluster.reasons()


def test_what_runs_is_not_touched_by_an_edit_that_is_not_accepted():
    cluster = refused_edit(replicas=5)
    decision = cluster.reconcile()
    assert decision.actions == ()
    assert cluster.status.ready == "2/5"
    assert cluster.status.observed_generation == cluster.generation


def test_a_fault_meanwhile_is_still_answered():
    cluster = refused_edit()
    cluster.end_container(cluster.pod(0), 75)
    decision = cluster.reconcile()
    assert {type(action) for action in decision.actions} == {WriteAttempt, DeletePod}


def test_a_spec_put_right_is_taken_up():
    cluster = refused_edit()
    cluster.reconcile()
    cluster.spec, cluster.generation = spec_with(replicas=3), cluster.generation + 1
    cluster.settle()
    assert cluster.condition("Accepted")[0] == "True"
    assert cluster.status.ready == "3/3"


def test_a_missing_claim_is_looked_for_again_and_does_not_make_helm_give_up():
    cluster = Cluster(spec=spec_with(model={"uri": "pvc://weights/chat"}))
    decision = cluster.reconcile()
    assert cluster.condition("Accepted") == ("False", "ClaimNotFound")
    assert cluster.condition("Stalled")[0] == "False"
    assert decision.requeue_after == gang.LOOK_AGAIN_AT_REFUSAL
    cluster.volumes = {"weights": ("ReadWriteMany",)}
    cluster.settle()
    assert cluster.status.state == "Ready"


def test_an_object_of_somebody_else_is_not_taken_over():
    cluster = Cluster()
    observed = replace(cluster.observed(), conflicts=("Service m",))
    decision = gang.decide(observed, cluster.settings)
    accepted = next(c for c in decision.status.conditions if c.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", "NameTaken")
    assert "Service m" in accepted.message
    assert decision.actions == ()
