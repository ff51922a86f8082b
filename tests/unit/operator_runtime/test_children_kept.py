"""Attempts, tokens and the children that are kept as wanted: what is read, written, and left alone."""

import pytest

from support.fake_kube import FakeKube
from support.runtime_parts import Parts, create_model, run_pods, stored
from tpmodel_operator.actions import DeleteGang, DeletePod, EnsureGang, WriteAttempt
from tpmodel_operator.kube import CONFIG_MAPS, MODELS, SECRETS, ApiError
from tpmodel_operator.observed import Observed, Orders


async def started(**spec: object) -> tuple[FakeKube, Parts, str]:
    fake = FakeKube()
    create_model(fake, **spec)
    parts = Parts(fake)
    await parts.run_pass()
    run_pods(fake)
    parts.watch()
    return fake, parts, next(iter(stored(fake, "statefulsets")))


async def observed(parts: Parts) -> Observed:
    parts.watch()
    return await parts.observer.observe(parts.model())


def attempt(fake: FakeKube, gang: str) -> str:
    return fake.objects["configmaps", "default", f"{gang}-attempt"]["data"]["attempt"]


async def test_an_attempt_rises_and_is_never_lowered():
    fake, parts, gang = await started()
    seen = await observed(parts)
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=3)])
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=2)])
    assert attempt(fake, gang) == "3"


async def test_an_attempt_that_another_process_raised_is_not_lowered():
    fake, parts, gang = await started()
    seen = await observed(parts)
    item = stored(fake, "configmaps")[f"{gang}-attempt"]
    fake.put(CONFIG_MAPS, item | {"data": {"attempt": "7"}})
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=2)])
    assert attempt(fake, gang) == "7"
    assert await parts.attempts.read("default", gang) == Orders(attempt=7)


async def test_a_commit_is_written_beside_the_attempt_and_stays_when_that_rises():
    fake, parts, gang = await started()
    seen = await observed(parts)
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=1, model_revision="c" * 40)])
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=2)])
    data = stored(fake, "configmaps")[f"{gang}-attempt"]["data"]
    assert data == {"attempt": "2", "model-revision": "c" * 40}
    assert await Parts(fake).attempts.read("default", gang) == Orders(attempt=2, model_revision="c" * 40)


async def test_attempts_are_read_once():
    fake, _, gang = await started()
    fresh = Parts(fake)
    fake.calls.clear()
    assert await fresh.attempts.read("default", gang) == Orders(attempt=1)
    assert await fresh.attempts.read("default", gang) == Orders(attempt=1)
    assert len(fake.calls) == 1
    fresh.clock.now += 601
    await fresh.attempts.read("default", gang)
    assert len(fake.calls) == 2


async def test_an_attempt_of_an_earlier_gang_of_the_name_is_adopted_and_kept():
    fake, _, gang = await started()
    item = stored(fake, "configmaps")[f"{gang}-attempt"]
    owner = item["metadata"]["ownerReferences"][0] | {"uid": "an-earlier-one"}
    old = item | {"data": {"attempt": "4"}, "metadata": item["metadata"] | {"ownerReferences": [owner]}}
    fake.put(CONFIG_MAPS, old)
    fresh = Parts(fake)
    await fresh.applier.apply(await observed(fresh), [WriteAttempt(gang=gang, attempt=1)])
    assert attempt(fake, gang) == "4"
    now = stored(fake, "configmaps")[f"{gang}-attempt"]
    assert now["metadata"]["ownerReferences"][0]["uid"] == stored(fake, "statefulsets")[gang]["metadata"]["uid"]


async def test_a_config_map_that_somebody_deleted_is_made_again_with_the_attempt_of_the_status():
    fake, _, gang = await started()
    fake.remove(CONFIG_MAPS, "default", f"{gang}-attempt")
    fresh = Parts(fake)
    await fresh.run_pass()
    assert attempt(fake, gang) == "1"


async def test_tokens_are_never_read_and_never_changed():
    fake, parts, gang = await started()
    before = dict(stored(fake, "secrets")[f"{gang}-token"])
    parts.clock.now += 10_000
    await parts.run_pass()
    assert stored(fake, "secrets")[f"{gang}-token"] == before
    assert {verb for verb, plural, _ in fake.calls if plural == "secrets"} == {"create", "dry-run"}


async def test_the_tokens_of_two_gangs_differ():
    fake, _, _ = await started(replicas=2, rollout={"maxUnavailable": 2})
    tokens = [item["stringData"]["token"] for item in stored(fake, "secrets").values()]
    assert len(set(tokens)) == len(tokens) == 2
    assert all(len(token) >= 32 for token in tokens)


async def test_a_token_is_asked_for_more_often_while_a_pod_waits():
    fake, parts, gang = await started()
    await parts.run_pass()
    fake.calls.clear()
    parts.clock.now += 31
    await parts.run_pass()
    assert fake.made("dry-run", "secrets") == []
    run_pod = fake.objects["pods", "default", f"{gang}-1"]
    run_pod["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "ContainerCreating"}}
    await parts.run_pass()
    assert fake.made("dry-run", "secrets") == [f"{gang}-token"]


async def test_a_left_over_token_of_an_earlier_gang_is_waited_out():
    fake, parts, gang = await started()
    seen = await observed(parts)
    action = EnsureGang(name="m-9-zzzzz", index=9, revision="zzzzz", image="worker:1", attempt=1)
    left_over = stored(fake, "secrets")[f"{gang}-token"]
    fake.put(SECRETS, left_over | {"metadata": left_over["metadata"] | {"name": "m-9-zzzzz-token", "uid": "old"}})
    tries = 0

    def collected_at_the_second_try(call: tuple[str, str, str]) -> None:
        nonlocal tries
        if call == ("create", "secrets", "m-9-zzzzz-token"):
            tries += 1
            if tries == 2:
                fake.remove(SECRETS, "default", "m-9-zzzzz-token")

    fake.fail = collected_at_the_second_try
    await parts.applier.apply(seen, [action])
    assert tries == 2
    assert stored(fake, "secrets")["m-9-zzzzz-token"]["metadata"]["uid"] != "old"


async def test_making_a_gang_that_exists_changes_nothing_of_its_stateful_set():
    fake, parts, gang = await started()
    before = dict(stored(fake, "statefulsets")[gang])
    action = EnsureGang(name=gang, index=0, revision=gang[-5:], image="another:2", attempt=1)
    await parts.applier.apply(await observed(parts), [action])
    assert stored(fake, "statefulsets")[gang] == before


async def test_deletes_of_pods_are_sent_side_by_side_and_gone_ones_do_not_count():
    fake, parts, gang = await started()
    pods = stored(fake, "pods")
    doomed = [DeletePod(name=name, uid=pods[name]["metadata"]["uid"], grace_seconds=5) for name in sorted(pods)]
    other = DeletePod(name=f"{gang}-0", uid="of another pod of that name", grace_seconds=5)
    gone = DeletePod(name="unknown", uid="u", grace_seconds=5)
    assert await parts.applier.apply(await observed(parts), [other, gone]) == 0
    assert await parts.applier.apply(await observed(parts), doomed) == 2
    assert stored(fake, "pods") == {}


async def test_a_delete_that_fails_keeps_none_of_the_others_from_being_sent():
    fake, parts, gang = await started()
    pods = stored(fake, "pods")
    doomed = [DeletePod(name=name, uid=pods[name]["metadata"]["uid"], grace_seconds=5) for name in sorted(pods)]
    fake.fail = lambda call: ApiError(500, "InternalError", "") if call == ("delete", "pods", f"{gang}-0") else None
    seen = await observed(parts)
    with pytest.raises(ApiError, match="500"):
        await parts.applier.apply(seen, doomed)
    assert set(stored(fake, "pods")) == {f"{gang}-0"}


async def test_deleting_a_gang_spares_another_one_of_its_name():
    fake, parts, gang = await started()
    await parts.applier.apply(await observed(parts), [DeleteGang(name=gang, uid="another")])
    assert gang in stored(fake, "statefulsets")
    uid = stored(fake, "statefulsets")[gang]["metadata"]["uid"]
    await parts.applier.apply(await observed(parts), [DeleteGang(name=gang, uid=uid)])
    assert stored(fake, "statefulsets") == {}


async def test_shared_children_are_sent_again_when_they_are_old_and_at_once_when_the_spec_changes():
    fake, parts, _ = await started()
    await parts.run_pass()
    fake.calls.clear()
    await parts.run_pass()
    assert fake.made("apply", "services") == []
    parts.clock.now += 1801
    await parts.run_pass()
    assert set(fake.made("apply", "services")) == {"m", "m-pods", "m-leaders"}
    fake.calls.clear()
    item = stored(fake, "tpmodels")["m"]
    fake.put(MODELS, item | {"spec": item["spec"] | {"service": {"type": "NodePort"}}})
    await parts.run_pass()
    assert fake.made("apply", "services") == ["m"]


def _with_trainers(fake: FakeKube, *, wanted: bool) -> None:
    item = stored(fake, "tpmodels")["m"]
    auth = {"trainerToken": {"name": "t", "key": "k"}} if wanted else {}
    fake.put(MODELS, item | {"spec": item["spec"] | {"auth": auth}})


async def test_the_service_of_trainers_comes_and_goes_with_their_token():
    fake, parts, _ = await started()
    _with_trainers(fake, wanted=True)
    await parts.run_pass()
    assert "m-trainers" in stored(fake, "services")
    _with_trainers(fake, wanted=False)
    fresh = Parts(fake)
    await fresh.run_pass()
    assert "m-trainers" not in stored(fake, "services")
    fake.calls.clear()
    await fresh.run_pass()
    assert fake.made("get", "services") == []


async def test_a_model_without_trainers_costs_no_call_for_their_service():
    fake, _, _ = await started()
    fake.calls.clear()
    await Parts(fake).run_pass()
    assert "m-trainers" not in [name for _, _, name in fake.calls]


async def test_a_version_of_the_weights_is_written_beside_the_attempt_and_never_lowered():
    fake, parts, gang = await started()
    seen = await observed(parts)
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=1, weights_version=4)])
    await parts.applier.apply(seen, [WriteAttempt(gang=gang, attempt=2, weights_version=3)])
    assert stored(fake, "configmaps")[f"{gang}-attempt"]["data"] == {"attempt": "2", "weights-version": "4"}
    assert await Parts(fake).attempts.read("default", gang) == Orders(attempt=2, weights_version=4)


async def test_what_was_remembered_of_gone_objects_is_forgotten():
    fake, parts, gang = await started()
    parts.attempts.keep(set())
    parts.tokens.keep(set())
    parts.lasting.keep(set())
    fake.calls.clear()
    await parts.run_pass()
    assert fake.made("get", "configmaps") == [f"{gang}-attempt"]
    assert fake.made("dry-run", "secrets") == [f"{gang}-token"]
    assert "m" in fake.made("apply", "services")
