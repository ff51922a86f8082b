"""Whole passes over a fake API: what is written in which order, and that a crash anywhere is finished afterwards."""

import pytest

from support.fake_kube import Call, FakeKube
from support.runtime_parts import KEY, Parts, create_model, end_container, run_pods, stored
from tpmodel_operator.kube import MODELS, ApiError
from tpmodel_operator.queue import Turn

WRITES = ("create", "apply", "apply status", "replace", "merge", "delete")


async def serving(**spec: object) -> tuple[FakeKube, Parts]:
    fake = FakeKube()
    create_model(fake, **spec)
    parts = Parts(fake)
    await parts.run_pass()
    run_pods(fake)
    await parts.run_pass()
    return fake, parts


def gang_of(fake: FakeKube) -> str:
    (name,) = stored(fake, "statefulsets")
    return name


async def test_a_new_model_gets_all_its_children():
    fake, parts = await serving()
    gang = gang_of(fake)
    assert set(stored(fake, "services")) == {"m", "m-pods", "m-leaders"}
    assert set(stored(fake, "networkpolicies")) == {"m", gang}
    assert set(stored(fake, "serviceaccounts")) == {"m"}
    assert set(stored(fake, "secrets")) == {f"{gang}-token"}
    assert stored(fake, "configmaps")[f"{gang}-attempt"]["data"] == {"attempt": "1"}
    assert parts.model().status.ready == "1/1"


async def test_children_of_a_gang_belong_to_its_stateful_set_and_all_others_to_the_model():
    fake, parts = await serving(replicas=2)
    sets = {item["metadata"]["uid"]: name for name, item in stored(fake, "statefulsets").items()}
    model = parts.model().uid
    for (plural, _, name), item in fake.objects.items():
        if plural in (MODELS.plural, "pods", "events"):
            continue
        (owner,) = item["metadata"]["ownerReferences"]
        of_gang = plural in ("secrets", "configmaps") or (plural == "networkpolicies" and name != "m")
        assert (owner["uid"] in sets) == of_gang, (plural, name)
        assert of_gang or owner["uid"] == model
        assert "finalizers" not in item["metadata"]


async def test_a_pass_that_finds_everything_in_place_writes_nothing():
    fake, parts = await serving()
    fake.calls.clear()
    await parts.run_pass()
    assert [call for call in fake.calls if call[0] in WRITES] == []


async def test_status_is_written_before_anything_is_done():
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75, "NCCL timeout")
    fake.calls.clear()
    await parts.run_pass()
    writes = [(verb, plural) for verb, plural, _ in fake.calls if verb in WRITES and plural != "events"]
    assert writes == [
        ("apply status", "tpmodels"),
        ("apply", "configmaps"),
        ("delete", "pods"),
        ("delete", "pods"),
    ]


async def test_a_status_that_cannot_be_written_lets_nothing_happen():
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75)
    fake.fail = lambda call: ApiError(500, "InternalError", "") if call[0] == "apply status" else None
    with pytest.raises(ApiError):
        await parts.run_pass()
    assert len(stored(fake, "pods")) == 2


async def test_a_decision_from_an_old_tpmodel_is_dropped_and_made_again_at_once():
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75)
    parts.watch()
    item = stored(fake, "tpmodels")["m"]
    fake.put(MODELS, item | {"metadata": item["metadata"] | {"annotations": {"a": "b"}}})
    assert await parts.reconciler.run_pass(Turn(key=KEY, queued=0.0)) == 0.0
    assert len(stored(fake, "pods")) == 2
    await parts.reconciler.run_pass(Turn(key=KEY, queued=0.0))
    assert stored(fake, "pods") == {}
    assert parts.model().status.gangs[0].attempt == 2


async def test_a_process_that_no_longer_leads_writes_nothing():
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75)
    parts.permitted = False
    fake.calls.clear()
    with pytest.raises(PermissionError):
        await parts.run_pass()
    assert [call for call in fake.calls if call[0] in WRITES] == []


async def test_a_model_that_is_deleted_meanwhile_is_no_error():
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75)
    parts.watch()
    fake.remove(MODELS, "default", "m")
    await parts.reconciler.run_pass(Turn(key=KEY, queued=0.0))
    assert len(stored(fake, "pods")) == 2


async def test_a_model_that_is_unknown_or_going_is_left_alone():
    fake = FakeKube()
    parts = Parts(fake)
    assert await parts.reconciler.run_pass(Turn(key=KEY, queued=0.0)) is None
    create_model(fake)
    item = stored(fake, "tpmodels")["m"]
    fake.put(MODELS, item | {"metadata": item["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
    assert await parts.run_pass() is None
    assert stored(fake, "statefulsets") == {}


async def test_a_namespace_that_ends_is_waited_for():
    fake = FakeKube()
    create_model(fake)
    parts = Parts(fake)
    refusal = ApiError(403, "Forbidden", "unable to create new content in namespace x because it is being terminated")
    fake.fail = lambda call: refusal if call[0] in ("create", "apply") else None
    assert await parts.run_pass() == 10.0


async def test_a_spec_of_a_newer_api_is_refused_and_its_gangs_are_left_alone():
    fake, parts = await serving()
    item = stored(fake, "tpmodels")["m"]
    fake.put(MODELS, item | {"spec": item["spec"] | {"speculation": {}}})
    await parts.run_pass()
    accepted = next(c for c in parts.fake.objects["tpmodels", "default", "m"]["status"]["conditions"])
    assert (accepted["type"], accepted["status"], accepted["reason"]) == ("Accepted", "False", "SpecNotUnderstood")
    assert "spec.speculation" in accepted["message"]
    assert len(stored(fake, "pods")) == 2
    assert any(event["reason"] == "SpecNotUnderstood" for event in stored(fake, "events").values())
    fake.calls.clear()
    await parts.run_pass()
    assert [call for call in fake.calls if call[0] in WRITES] == []


class CrashError(Exception):
    """The process ends here."""


async def restart_with_crash(number: int, *, before: bool) -> tuple[FakeKube, Parts, bool]:
    """A restart in which the process dies at its write of that number; whether it came to that."""
    fake, parts = await serving()
    end_container(fake, f"{gang_of(fake)}-1", 75, "NCCL timeout")
    made = 0

    def crash(call: Call) -> None:
        nonlocal made
        if call[0] in WRITES:
            made += 1
            if made == number + (0 if before else 1):
                raise CrashError

    fake.fail = crash
    crashed = False
    try:
        await parts.run_pass()
    except CrashError:
        crashed = True
    fake.fail = lambda call: None
    after = Parts(fake)
    for _ in range(4):
        await after.run_pass()
        run_pods(fake)
    return fake, after, crashed


@pytest.mark.parametrize("number", range(1, 6))
async def test_a_restart_is_finished_after_a_crash_at_any_write_with_one_attempt(number: int):
    fake, parts, crashed = await restart_with_crash(number, before=True)
    assert crashed
    (gang,) = parts.model().status.gangs
    assert (gang.attempt, gang.restarts_total, gang.restart, gang.ready) == (2, 1, None, True)
    assert stored(fake, "configmaps")[f"{gang.name}-attempt"]["data"] == {"attempt": "2"}
    assert gang.last_restart is not None
    assert gang.last_restart.exit_code == 75


async def come_up(fake: FakeKube) -> Parts:
    """A process of the operator, for as long as a model takes to serve."""
    parts = Parts(fake)
    for _ in range(3):
        await parts.run_pass()
        run_pods(fake)
    return parts


@pytest.mark.parametrize("number", range(1, 16))
async def test_a_new_model_is_completed_after_a_crash_at_any_write(number: int):
    fake = FakeKube()
    create_model(fake)
    made = 0

    def crash(call: Call) -> None:
        nonlocal made
        made += call[0] in WRITES
        if made == number:
            raise CrashError

    fake.fail = crash
    with pytest.raises(CrashError):
        await come_up(fake)
    fake.fail = lambda call: None
    after = await come_up(fake)
    gang = gang_of(fake)
    assert set(stored(fake, "networkpolicies")) == {"m", gang}
    assert (set(stored(fake, "secrets")), set(stored(fake, "configmaps"))) == ({f"{gang}-token"}, {f"{gang}-attempt"})
    assert after.model().status.ready == "1/1"
    assert after.model().status.gangs[0].attempt == 1


async def test_a_lost_token_is_made_again_with_one_restart():
    fake, parts = await serving()
    gang = gang_of(fake)
    del fake.objects["secrets", "default", f"{gang}-token"]
    parts.clock.now += 601
    await parts.run_pass()
    assert set(stored(fake, "secrets")) == {f"{gang}-token"}
    assert stored(fake, "pods") == {}
    run_pods(fake)
    await parts.run_pass()
    (status,) = parts.model().status.gangs
    assert (status.attempt, status.restarts_total) == (2, 1)
    assert status.last_restart is not None
    assert status.last_restart.cause == "TokenLost"


async def test_a_token_that_nobody_has_read_is_made_again_without_a_restart():
    fake = FakeKube()
    create_model(fake)
    parts = Parts(fake)
    await parts.run_pass()
    gang = gang_of(fake)
    del fake.objects["secrets", "default", f"{gang}-token"]
    await Parts(fake).run_pass()
    assert set(stored(fake, "secrets")) == {f"{gang}-token"}
    assert parts.model().status.gangs[0].attempt == 1


async def test_metrics_count_restarts_by_cause_and_measure_how_long_they_take():
    fake, parts = await serving()
    assert parts.metrics.registry.get_sample_value("tpmodel_operator_gang_ready_seconds_count") == 1
    end_container(fake, f"{gang_of(fake)}-1", 75)
    parts.watch()
    await parts.reconciler.run_pass(Turn(key=KEY, queued=0.0, event=0.0))
    run_pods(fake)
    for _ in range(2):
        await parts.run_pass()
    cause = {"cause": "RestartRequested"}
    sample = parts.metrics.registry.get_sample_value
    assert sample("tpmodel_operator_gang_restarts_total", cause) == 1
    assert sample("tpmodel_operator_restart_reaction_seconds_count") == 1
    assert sample("tpmodel_operator_restart_seconds_count") == 1
