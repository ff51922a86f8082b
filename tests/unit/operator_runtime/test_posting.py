"""Events: posted once, counted afterwards, and never in a pass's way."""

import asyncio

from support.api_objects import START, tpmodel
from support.fake_kube import FakeKube
from support.runtime_parts import Parts, stored
from tpmodel_operator import records
from tpmodel_operator.actions import Event
from tpmodel_operator.kube import EVENTS, ApiError
from tpmodel_operator.posting import event_body

MODEL = records.tpmodel(tpmodel())
RESTART = Event(type="Warning", reason="GangRestart", message="gang m-0-abcde restarts")
READY = Event(type="Normal", reason="Ready", message="1 of 1 gangs are ready")


async def post(parts: Parts, *events: Event) -> None:
    parts.events.post(MODEL, events)
    posting = asyncio.create_task(parts.events.run())
    await asyncio.wait_for(parts.events.flush(), 1)
    posting.cancel()


async def test_an_event_is_about_its_tpmodel():
    fake = FakeKube()
    await post(Parts(fake), RESTART)
    (event,) = stored(fake, "events").values()
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "GangRestart", 1)
    assert event["involvedObject"]["uid"] == MODEL.uid


async def test_the_same_event_again_is_counted():
    fake = FakeKube()
    parts = Parts(fake)
    for _ in range(3):
        await post(parts, RESTART)
    (event,) = stored(fake, "events").values()
    assert event["count"] == 3


async def test_other_events_are_events_of_their_own():
    fake = FakeKube()
    await post(Parts(fake), RESTART, READY)
    assert len(stored(fake, "events")) == 2


async def test_the_next_process_counts_on():
    fake = FakeKube()
    await post(Parts(fake), RESTART)
    await post(Parts(fake), RESTART)
    (event,) = stored(fake, "events").values()
    assert event["count"] == 2


async def test_an_event_that_the_server_has_dropped_is_posted_anew():
    fake = FakeKube()
    parts = Parts(fake)
    await post(parts, RESTART)
    (name,) = stored(fake, "events")
    fake.remove(EVENTS, "default", name)
    await post(parts, RESTART)
    assert stored(fake, "events")[name]["count"] == 1


async def test_an_event_that_cannot_be_posted_is_only_logged(caplog):
    fake = FakeKube()
    fake.fail = lambda call: ApiError(500, "InternalError", "no room")
    await post(Parts(fake), RESTART)
    assert "no room" in caplog.text


def test_a_message_is_cut_to_what_the_server_takes():
    body = event_body(MODEL, Event(type="Normal", reason="R", message="x" * 5000), now=START, instance="i")
    assert len(body["message"]) == 1024
