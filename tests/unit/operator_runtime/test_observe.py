"""The few things that a pass asks the API for."""

from support.api_objects import condition
from support.fake_kube import FakeKube
from support.runtime_parts import Parts, create_model, run_pods, stored
from tpmodel_operator.kube import CLAIMS, NODES, PODS
from tpmodel_operator.observed import Orders


def claim(fake: FakeKube, name: str, *modes: str) -> None:
    fake.put(CLAIMS, {"metadata": {"name": name, "namespace": "default"}, "spec": {"accessModes": list(modes)}})


async def observe(parts: Parts):
    parts.watch()
    return await parts.observer.observe(parts.model())


async def serving(**spec: object) -> tuple[FakeKube, Parts]:
    fake = FakeKube()
    create_model(fake, **spec)
    parts = Parts(fake)
    await parts.run_pass()
    run_pods(fake)
    return fake, parts


async def test_claims_that_the_spec_names_are_read_and_missing_ones_absent():
    fake, parts = await serving(model={"uri": "pvc://weights/here"}, cache={"type": "pvc", "claimName": "cache"})
    assert (await observe(parts)).volumes == {}
    claim(fake, "weights", "ReadOnlyMany")
    assert (await observe(parts)).volumes == {"weights": ("ReadOnlyMany",)}
    claim(fake, "cache", "ReadWriteMany")
    assert set((await observe(parts)).volumes) == {"weights", "cache"}
    fake.calls.clear()
    await observe(parts)
    assert fake.made("get", "persistentvolumeclaims") == []


async def test_nodes_are_read_only_while_a_pod_of_theirs_ends():
    fake, parts = await serving()
    seen = await observe(parts)
    assert seen.nodes == {}
    assert fake.made("get", "nodes") == []
    name = next(iter(stored(fake, "pods")))
    item = stored(fake, "pods")[name]
    ending = {"deletionTimestamp": "2026-01-01T00:02:00Z", "deletionGracePeriodSeconds": 30}
    fake.put(PODS, item | {"metadata": item["metadata"] | ending})
    assert (await observe(parts)).nodes == {}
    node = {"metadata": {"name": "node", "namespace": ""}, "status": {"conditions": [condition("Ready", "False", 5)]}}
    fake.put(NODES, node)
    assert not (await observe(parts)).nodes["node"].ready


async def test_attempts_of_all_gangs_are_there():
    fake, parts = await serving(replicas=2, rollout={"maxUnavailable": 2})
    assert (await observe(parts)).orders == dict.fromkeys(stored(fake, "statefulsets"), Orders(attempt=1))
