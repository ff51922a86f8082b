"""Objects of other people under the names of a TPModel's children: seen, told, and left exactly as they are."""

import pytest

from support.api_objects import metadata
from support.fake_kube import FakeKube
from support.runtime_parts import Parts, create_model, run_pods, stored
from tpmodel_operator.api import Condition
from tpmodel_operator.kube import (
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    MODELS,
    NETWORK_POLICIES,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
    Resource,
)

OTHERS = {"app.kubernetes.io/managed-by": "Helm"}


def put_foreign(fake: FakeKube, resource: Resource, name: str, **more: object) -> dict[str, object]:
    body = metadata(name, labels=OTHERS)
    del body["uid"]
    return fake.put(resource, {"kind": resource.kind, "metadata": body, "spec": {"theirs": True}} | more)


def accepted(parts: Parts) -> Condition:
    return next(condition for condition in parts.model().status.conditions if condition.type == "Accepted")


@pytest.mark.parametrize(
    ("resource", "name"),
    [
        (SERVICES, "m"),
        (SERVICES, "m-pods"),
        (SERVICES, "m-leaders"),
        (SERVICE_ACCOUNTS, "m"),
        (NETWORK_POLICIES, "m"),
        (DISRUPTION_BUDGETS, "m"),
    ],
)
async def test_an_object_of_a_childs_name_is_left_alone_and_shown_with_the_remedy(resource: Resource, name: str):
    fake = FakeKube()
    create_model(fake, replicas=2)
    theirs = put_foreign(fake, resource, name)
    parts = Parts(fake)
    await parts.run_pass()
    await parts.run_pass()
    assert fake.objects[resource.plural, "default", name] == theirs
    assert stored(fake, "statefulsets") == {}
    shown = accepted(parts)
    assert (shown.status, shown.reason) == ("False", "NameTaken")
    assert f"{resource.kind} {name}" in shown.message
    assert "delete it, or give the TPModel another name" in shown.message


async def test_once_the_object_is_gone_the_model_is_served():
    fake = FakeKube()
    create_model(fake)
    put_foreign(fake, SERVICES, "m")
    parts = Parts(fake)
    assert await parts.run_pass() == 30.0
    fake.remove(SERVICES, "default", "m")
    await parts.run_pass()
    assert accepted(parts).status == "True"
    assert len(stored(fake, "statefulsets")) == 1


async def test_an_operator_that_starts_anew_sees_it_before_it_writes_anything():
    fake = FakeKube()
    create_model(fake)
    put_foreign(fake, SERVICES, "m")
    await Parts(fake).run_pass()
    before = fake.objects[MODELS.plural, "default", "m"]["status"]
    await Parts(fake).run_pass()
    assert fake.objects[MODELS.plural, "default", "m"]["status"] == before


async def test_what_serves_goes_on_when_a_child_is_replaced_by_somebody_elses():
    fake = FakeKube()
    create_model(fake)
    parts = Parts(fake)
    await parts.run_pass()
    run_pods(fake)
    await parts.run_pass()
    fake.remove(SERVICES, "default", "m")
    theirs = put_foreign(fake, SERVICES, "m")
    parts.clock.now += 1801
    await parts.run_pass()
    assert fake.objects["services", "default", "m"] == theirs
    assert accepted(parts).reason == "NameTaken"
    assert len(stored(fake, "statefulsets")) == 1
    assert parts.model().status.ready == "1/1"


async def test_a_disruption_budget_of_somebody_else_is_not_deleted_with_the_last_but_one_gang():
    fake = FakeKube()
    create_model(fake)
    theirs = put_foreign(fake, DISRUPTION_BUDGETS, "m")
    parts = Parts(fake)
    await parts.run_pass()
    parts.clock.now += 1801
    await parts.run_pass()
    assert fake.objects[DISRUPTION_BUDGETS.plural, "default", "m"] == theirs
    assert accepted(parts).status == "True"


async def test_an_own_disruption_budget_goes_with_the_last_but_one_gang():
    fake = FakeKube()
    create_model(fake, replicas=2)
    parts = Parts(fake)
    await parts.run_pass()
    assert "m" in stored(fake, DISRUPTION_BUDGETS.plural)
    item = stored(fake, MODELS.plural)["m"]
    fake.put(MODELS, item | {"spec": item["spec"] | {"replicas": 1}})
    await parts.run_pass()
    assert stored(fake, DISRUPTION_BUDGETS.plural) == {}


async def test_children_of_an_earlier_model_of_the_name_are_taken_up():
    fake = FakeKube()
    create_model(fake)
    await Parts(fake).run_pass()
    old = stored(fake, "services")["m"]
    owner = old["metadata"]["ownerReferences"][0] | {"uid": "of the earlier one"}
    fake.put(SERVICES, old | {"metadata": old["metadata"] | {"ownerReferences": [owner]}})
    parts = Parts(fake)
    await parts.run_pass()
    assert accepted(parts).status == "True"
    assert stored(fake, "services")["m"]["metadata"]["ownerReferences"][0]["uid"] == parts.model().uid


@pytest.mark.parametrize("resource", [STATEFUL_SETS, CONFIG_MAPS])
async def test_a_gangs_object_that_is_somebody_elses_is_found_when_it_is_in_the_way(resource: Resource):
    fake = FakeKube()
    create_model(fake)
    await Parts(fake).run_pass()
    gang = next(iter(stored(fake, "statefulsets")))
    again = FakeKube()
    create_model(again)
    name = gang if resource is STATEFUL_SETS else f"{gang}-attempt"
    theirs = put_foreign(again, resource, name, data={"attempt": "7"})
    parts = Parts(again)
    assert await parts.run_pass() == 0.0
    await parts.run_pass()
    assert again.objects[resource.plural, "default", name] == theirs
    assert f"{resource.kind} {name}" in accepted(parts).message


async def test_children_are_looked_at_once_while_nothing_is_due():
    fake = FakeKube()
    create_model(fake)
    parts = Parts(fake)
    await parts.run_pass()
    fake.calls.clear()
    await parts.run_pass()
    assert fake.made("get", "services") == []
