"""Where no node could hold a pod: a condition with the value to write, which changes nothing else."""

from typing import Any

import pytest

from support.operator_cluster import Cluster, spec_with
from tpmodel_operator import advice


def on_gpus(size: int, **more: Any) -> Any:
    return spec_with(device="cuda", tensorParallelSize=size, ranksPerPod=None, **more)


def message(cluster: Cluster) -> str:
    return next((c.message for c in cluster.status.conditions if c.type == "Advice"), "")


def test_no_node_large_enough_says_what_to_write_and_makes_the_gang_all_the_same():
    cluster = Cluster(spec=on_gpus(8), largest_node=4)
    cluster.reconcile()
    assert cluster.condition("Advice") == ("True", "NodesTooSmall")
    assert "a pod needs 8 nvidia.com/gpu, but no node offers more than 4: write ranksPerPod: 4" in message(cluster)
    assert len(cluster.statefulsets) == 1
    assert cluster.condition("Accepted")[0] == "True"


@pytest.mark.parametrize(("size", "largest", "fitting"), [(8, 7, 4), (6, 4, 3), (16, 2, 2), (5, 4, 1), (8, 1, 1)])
def test_the_value_divides_tensor_parallel_size_and_fits_the_largest_node(size: int, largest: int, fitting: int):
    assert f"write ranksPerPod: {fitting}," in advice.about_nodes(on_gpus(size), largest)


@pytest.mark.parametrize("largest", [8, 16, 0, None])
def test_nothing_is_said_where_a_pod_fits_or_no_node_is_known(largest: int | None):
    cluster = Cluster(spec=on_gpus(8), largest_node=largest)
    cluster.reconcile()
    assert message(cluster) == ""


def test_the_node_selector_is_named():
    spec = on_gpus(8, scheduling={"nodeSelector": {"pool": "small"}})
    assert "no node that scheduling.nodeSelector chooses offers more than 2" in advice.about_nodes(spec, 2)


def test_it_is_told_once_and_goes_when_larger_nodes_come():
    cluster = Cluster(spec=on_gpus(8), largest_node=4)
    cluster.reconcile()
    cluster.reconcile()
    assert cluster.reasons().count("NodesTooSmall") == 1
    cluster.largest_node = 8
    cluster.reconcile()
    assert message(cluster) == ""
