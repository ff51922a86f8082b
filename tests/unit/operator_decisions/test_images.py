"""Which image gangs use, and that a newer operator moves nothing by itself."""

from support.operator_cluster import IMAGE, Cluster, serving
from tpmodel_operator import names
from tpmodel_operator.api import ImageSpec
from tpmodel_operator.settings import OperatorSettings

NEWER = "registry.example/worker:2"


def upgraded(cluster: Cluster) -> Cluster:
    """The same cluster under an operator with another default image."""
    cluster.settings = OperatorSettings(default_image=NEWER)
    return cluster


def images(cluster: Cluster) -> set[str]:
    return {statefulset.image for statefulset in cluster.statefulsets.values()}


def test_an_image_that_is_named_is_used():
    cluster = serving(image={"reference": "my/worker:7"})
    assert images(cluster) == {"my/worker:7"}
    assert cluster.condition("UpgradeAvailable")[0] == "False"


def test_an_image_that_is_not_named_is_the_operators_default():
    assert images(serving()) == {IMAGE}


def test_a_newer_default_moves_no_pod_and_is_shown():
    cluster = upgraded(serving(replicas=2))
    kept = set(cluster.pods)
    cluster.settle()
    assert set(cluster.pods) == kept
    assert cluster.status.image == IMAGE
    assert cluster.condition("UpgradeAvailable") == ("True", "NewerDefaultImage")
    assert "UpgradeAvailable" in cluster.reasons()


def test_gangs_added_later_are_of_the_pinned_image():
    cluster = upgraded(serving())
    cluster.edit(replicas=3)
    cluster.settle()
    assert images(cluster) == {IMAGE}


def test_the_message_says_which_annotation_takes_it_and_that_annotation_does():
    cluster = upgraded(serving())
    cluster.reconcile()
    message = next(c.message for c in cluster.status.conditions if c.type == "UpgradeAvailable")
    key, _, value = message.rpartition(" ")[2].partition("=")
    cluster.annotations[key] = value
    cluster.settle()
    assert images(cluster) == {NEWER}
    assert cluster.condition("UpgradeAvailable")[0] == "False"


def test_an_annotation_with_a_former_default_takes_nothing():
    cluster = upgraded(serving())
    cluster.annotations[names.TAKE_IMAGE_ANNOTATION] = "registry.example/worker:1.5"
    cluster.settle()
    assert images(cluster) == {IMAGE}


def test_what_was_taken_stays_when_the_default_moves_on():
    cluster = upgraded(serving())
    cluster.annotations[names.TAKE_IMAGE_ANNOTATION] = NEWER
    cluster.settle()
    cluster.settings = OperatorSettings(default_image="registry.example/worker:3")
    cluster.settle()
    assert images(cluster) == {NEWER}


def test_a_new_rollout_takes_the_newest_default():
    cluster = upgraded(serving())
    cluster.edit(drain_timeout=60)
    cluster.settle()
    assert images(cluster) == {NEWER}


def test_a_rollout_keeps_its_image_if_the_default_changes_midway():
    cluster = serving(replicas=3)
    cluster.edit(drain_timeout=60)
    cluster.reconcile()
    upgraded(cluster)
    cluster.settle(40)
    assert images(cluster) == {IMAGE}


def test_going_back_finds_the_gangs_that_are_left_though_the_default_has_changed():
    cluster = upgraded(serving(replicas=3))
    before = cluster.spec
    cluster.edit(drain_timeout=60)
    cluster.reconcile()
    kept = {pod.uid for pod in cluster.pods.values() if pod.deleting_since is None}
    cluster.spec, cluster.generation = before, cluster.generation + 1
    cluster.settle(40)
    assert images(cluster) == {IMAGE}
    assert kept <= set(cluster.pods)


def test_a_status_that_was_lost_does_not_move_gangs_to_a_newer_default():
    cluster = upgraded(serving())
    cluster.status = type(cluster.status)()
    kept = set(cluster.pods)
    cluster.settle()
    assert set(cluster.pods) == kept
    assert cluster.status.image == IMAGE


def test_naming_the_image_in_use_moves_nothing():
    cluster = serving()
    kept = set(cluster.pods)
    cluster.edit(image=ImageSpec(reference=IMAGE))
    cluster.settle()
    assert set(cluster.pods) == kept


def test_without_any_image_the_spec_is_not_accepted():
    cluster = Cluster(settings=OperatorSettings(default_image=""))
    cluster.reconcile()
    assert cluster.condition("Accepted") == ("False", "NoImage")
    assert cluster.statefulsets == {}
