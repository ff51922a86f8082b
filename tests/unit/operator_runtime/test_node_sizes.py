"""GPUs of the largest nodes, out of lists that are few and of which little is kept."""

from typing import Any

from support.fake_kube import FakeKube
from support.operator_cluster import spec_with
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.kube import NODES, ApiError
from tpmodel_operator.node_sizes import NodeSizes
from tpmodel_operator.queue import Key


def gpus(**more: Any) -> TPModelSpec:
    return spec_with(device="cuda", tensorParallelSize=8, ranksPerPod=None, **more)


def node(fake: FakeKube, name: str, labels: dict[str, str] | None = None, **offered: str) -> None:
    allocatable = {f"nvidia.com/{resource}": count for resource, count in offered.items()}
    metadata = {"name": name, "namespace": "", "labels": labels or {}}
    fake.put(NODES, {"metadata": metadata, "status": {"allocatable": allocatable}})


class Watched:
    """Node sizes for models that a test sets."""

    def __init__(self, *specs: TPModelSpec) -> None:
        self.fake = FakeKube()
        self.specs = list(specs)
        self.changed: list[Key] = []
        self.sizes = NodeSizes(
            self.fake,  # type: ignore[arg-type]
            models=self._models,
            changed=self.changed.append,
            period=600,
        )

    def _models(self) -> list[TPModel]:
        return [
            TPModel(name=f"m{index}", namespace="space", uid=f"u{index}", generation=1, spec=spec)
            for index, spec in enumerate(self.specs)
        ]


async def test_the_largest_of_all_nodes_counts():
    watched = Watched(gpus())
    for index, count in enumerate(("1", "4", "2", "0")):
        node(watched.fake, f"n{index}", gpu=count)
    assert watched.sizes.largest(gpus()) is None
    await watched.sizes.look()
    assert watched.sizes.largest(gpus()) == 4
    assert watched.changed == [Key("space", "m0")]


async def test_only_nodes_that_the_node_selector_chooses_count():
    small = gpus(scheduling={"nodeSelector": {"pool": "small"}})
    watched = Watched(gpus(), small)
    node(watched.fake, "a", {"pool": "large", "zone": "z"}, gpu="8")
    node(watched.fake, "b", {"pool": "small", "zone": "z"}, gpu="2")
    await watched.sizes.look()
    assert watched.sizes.largest(gpus()) == 8
    assert watched.sizes.largest(small) == 2
    assert watched.sizes.largest(gpus(scheduling={"nodeSelector": {"zone": "z"}})) is None


async def test_other_resources_are_told_apart():
    other = gpus(gpuResourceName="nvidia.com/mig")
    watched = Watched(gpus(), other)
    node(watched.fake, "a", gpu="1", mig="7")
    await watched.sizes.look()
    assert (watched.sizes.largest(gpus()), watched.sizes.largest(other)) == (1, 7)


async def test_nodes_are_not_listed_for_models_without_gpus():
    watched = Watched(spec_with())
    await watched.sizes.look()
    assert watched.fake.calls == []
    assert watched.sizes.largest(spec_with()) is None


async def test_where_nodes_may_not_be_read_nothing_is_known_and_nothing_fails():
    watched = Watched(gpus())
    watched.fake.fail = lambda call: ApiError(403, "Forbidden", "nodes is forbidden")
    await watched.sizes.look()
    assert watched.sizes.largest(gpus()) is None
    assert watched.changed == []


async def test_a_list_that_says_nothing_new_calls_for_no_pass():
    watched = Watched(gpus())
    node(watched.fake, "a", gpu="4")
    await watched.sizes.look()
    watched.changed.clear()
    await watched.sizes.look()
    assert watched.changed == []
    node(watched.fake, "b", gpu="8")
    await watched.sizes.look()
    assert watched.changed == [Key("space", "m0")]
