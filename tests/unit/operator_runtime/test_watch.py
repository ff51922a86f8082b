"""The watches: what they hold is what the API server has, whatever happens on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from support.api_objects import pod, worker
from support.fake_kube import FakeKube
from tpmodel_operator import records
from tpmodel_operator.kube import PODS, ApiError
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.observed import PodRecord
from tpmodel_operator.queue import Key
from tpmodel_operator.store import Entry, Store
from tpmodel_operator.watch import Watch

M, N = Key("default", "m"), Key("default", "n")


class Watched:
    """A watch of pods, and what it told."""

    def __init__(self, kube: FakeKube, namespace: str | None = None) -> None:
        self.store: Store[PodRecord] = Store()
        self.told: list[Key] = []
        self.watch = Watch(
            kube,
            PODS,
            namespace,
            parse=records.pod,
            store=self.store,
            changed=lambda key, _: self.told.append(key),
            metrics=Metrics(),
        )

    def names(self, key: Key = M) -> list[str]:
        return sorted(record.name for record in self.store.of(key))


@asynccontextmanager
async def running(kube: FakeKube, namespace: str | None = None) -> AsyncIterator[Watched]:
    watched = Watched(kube, namespace)
    task = asyncio.create_task(watched.watch.run())
    try:
        await asyncio.wait_for(watched.watch.synced.wait(), 1)
        await settled()
        yield watched
        assert not task.done()
    finally:
        task.cancel()


async def settled() -> None:
    await asyncio.sleep(0.02)


def fresh(name: str, **more: object):
    item = pod(name, **more)  # type: ignore[arg-type]
    del item["metadata"]["uid"]
    return item


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tpmodel_operator.watch.FIRST_BACKOFF_SECONDS", 0.01)


async def test_pods_of_every_page_of_the_list_are_held():
    kube = FakeKube()
    for index in range(5):
        kube.put(PODS, fresh(f"m-0-abcde-{index}"))
    async with running(kube) as watched:
        assert len(watched.names()) == 5


async def test_changes_are_followed_and_told():
    kube = FakeKube()
    async with running(kube) as watched:
        kube.put(PODS, fresh("m-0-abcde-0"))
        await settled()
        kube.put(PODS, fresh("m-0-abcde-0", containerStatuses=worker(running={})))
        await settled()
        assert [record.running for record in watched.store.of(M)] == [True]
        kube.remove(PODS, "default", "m-0-abcde-0")
        await settled()
        assert watched.names() == []
        assert watched.told == [M, M, M]


async def test_a_change_that_decisions_do_not_see_is_not_told():
    kube = FakeKube()
    async with running(kube) as watched:
        item = kube.put(PODS, fresh("m-0-abcde-0"))
        await settled()
        item["metadata"]["annotations"] = {"somebody": "else"}
        version = int(kube.put(PODS, item)["metadata"]["resourceVersion"])
        await settled()
        assert watched.told == [M]
        assert list(watched.store.versions().values()) == [version]


async def test_a_version_that_is_gone_is_followed_by_a_fresh_list():
    kube = FakeKube()
    kube.put(PODS, fresh("m-0-abcde-0"))
    async with running(kube) as watched:
        kube.oldest_watch = 100
        for _ in range(100):
            kube.put(PODS, fresh("m-0-abcde-1"))
        kube.remove(PODS, "default", "m-0-abcde-0")
        kube.cut_watches()
        for _ in range(500):
            await settled()
            if len(kube.made("list", "pods")) >= 2:
                break
        await settled()
        assert watched.names() == ["m-0-abcde-1"]
        assert len(kube.made("list", "pods")) >= 2


async def test_what_went_while_nobody_watched_is_told_after_the_next_list():
    kube = FakeKube()
    kube.put(PODS, fresh("m-0-abcde-0"))
    kube.put(PODS, fresh("n-0-abcde-0", model="n"))
    async with running(kube) as watched:
        watched.told.clear()
        kube.fail = lambda call: ApiError(503, "ServiceUnavailable", "")
        kube.cut_watches()
        await settled()
        kube.remove(PODS, "default", "n-0-abcde-0")
        kube.fail = lambda call: None
        await asyncio.sleep(0.1)
        assert watched.names(N) == []
        assert watched.told == [N]


async def test_errors_are_outlived_however_many():
    kube = FakeKube()
    failures = iter([ApiError(500, "a", ""), ApiError(0, "b", ""), ApiError(429, "c", ""), ApiError(403, "d", "")])
    kube.fail = lambda call: next(failures, None)
    async with running(kube):
        pass


async def test_a_pod_made_again_under_its_name_is_another_pod():
    kube = FakeKube()
    kube.put(PODS, fresh("m-0-abcde-0"))
    async with running(kube) as watched:
        (before,) = watched.store.of(M)
        kube.remove(PODS, "default", "m-0-abcde-0")
        kube.put(PODS, fresh("m-0-abcde-0"))
        await settled()
        (after,) = watched.store.of(M)
        assert before.uid != after.uid
        assert watched.told == [M, M, M]


async def test_the_list_of_one_namespace_leaves_the_others_alone():
    kube = FakeKube()
    kube.put(PODS, fresh("m-0-abcde-0"))
    watched = Watched(kube, "default")
    watched.store.put("elsewhere", Entry(1, "other", records.pod(pod("n-0-abcde-0", model="n"))))
    task = asyncio.create_task(watched.watch.run())
    await watched.watch.synced.wait()
    task.cancel()
    assert watched.store.uids("other") == {"elsewhere"}
    assert watched.names() == ["m-0-abcde-0"]


def test_an_older_version_never_takes_the_place_of_a_newer():
    store: Store[PodRecord] = Store()
    store.put("u", Entry(5, "default", records.pod(pod(uid="u", containerStatuses=worker(running={})))))
    assert store.put("u", Entry(4, "default", records.pod(pod(uid="u")))) is None
    assert [record.running for record in store.of(M)] == [True]


def test_a_pod_that_loses_its_labels_leaves_its_model():
    store: Store[PodRecord] = Store()
    store.put("u", Entry(1, "default", records.pod(pod(uid="u"))))
    assert store.put("u", Entry(2, "default", None)) == M
    assert store.of(M) == ()
    assert store.versions() == {"u": 2}


async def test_alarming_changes_are_told_with_the_time_of_their_arrival():
    kube = FakeKube()
    told: list[float | None] = []
    watch = Watch(
        kube,
        PODS,
        None,
        parse=records.pod,
        store=Store(),
        changed=lambda _, at: told.append(at),
        metrics=Metrics(),
        alarming=records.pod_alarms,
    )
    task = asyncio.create_task(watch.run())
    await watch.synced.wait()
    kube.put(PODS, fresh("m-0-abcde-0"))
    await settled()
    kube.remove(PODS, "default", "m-0-abcde-0")
    await settled()
    task.cancel()
    assert told[0] is None
    assert told[1] is not None
