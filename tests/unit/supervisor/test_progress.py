"""When too little goes on, and when a pod only waits for others that have not come yet."""

from __future__ import annotations

from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.progress import PodWatch, RebuildPatience, WorldWatch

GONE = Ending(ExitCode.RESTART_GANG, "no progress for 10 s: the leader of attempt 3 at gang-0.pods is gone")


def world_watch() -> WorldWatch:
    """Of a leader pod with ranks 0 and 1."""
    return WorldWatch(10, range(2))


def forming(*present: int, of: int = 4) -> worker_pb2.EngineState:
    states = ["connected" if rank in present else "missing" for rank in range(of)]
    ranks = [worker_pb2.RankState(rank=rank, state=state) for rank, state in enumerate(states)]
    return worker_pb2.EngineState(phase=worker_pb2.PHASE_FORMING, world_size=of, ranks=ranks)


def pod_watch() -> PodWatch:
    return PodWatch(10, "gang-0.pods", 3)


def test_a_load_is_stalled_after_the_deadline_without_a_byte() -> None:
    watch = world_watch()
    state = worker_pb2.EngineState(phase=worker_pb2.PHASE_LOADING, load_total_bytes=100, ready_ranks=2)
    assert watch.observe(state, 0) is None
    state.load_done_bytes = 50
    assert watch.observe(state, 9) is None
    assert watch.observe(state, 18.9) is None
    assert watch.observe(state, 19) == Ending(
        ExitCode.RESTART_GANG, "no progress for 10 s: 50 of 100 bytes loaded, 2 ranks ready"
    )


def test_an_engine_that_never_reports_is_stalled_too() -> None:
    watch = world_watch()
    assert watch.observe(None, 5) is None
    assert watch.observe(None, 15) is not None


def test_a_serving_world_needs_no_progress() -> None:
    watch = world_watch()
    serving = worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING)
    assert watch.observe(serving, 0) is None
    assert watch.observe(serving, 1000) is None


def test_the_clock_starts_again_when_a_world_forms_again() -> None:
    watch = world_watch()
    state = forming(0, 1, of=2)
    watch.observe(state, 0)
    watch.observe(worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING), 5)
    assert watch.observe(state, 20) is None
    assert watch.observe(state, 30) is not None


def test_a_leader_waits_without_end_for_a_pod_that_was_never_there() -> None:
    """Its container may not run yet: no node, no image. Restarting the gang would help nobody."""
    watch = world_watch()
    for now in (0, 1000, 100_000):
        assert watch.observe(forming(0, 1), now) is None


def test_a_leader_whose_own_ranks_do_not_come_gives_up() -> None:
    watch = world_watch()
    watch.observe(forming(0), 0)
    assert watch.observe(forming(0), 10) is not None


def test_a_leader_gives_up_on_a_pod_that_was_there_once() -> None:
    watch = world_watch()
    watch.observe(forming(0, 1, 2, 3), 0)
    watch.observe(forming(0, 1), 1)
    assert watch.observe(forming(0, 1), 10) is not None


def test_a_worker_pod_waits_without_end_for_its_first_leader() -> None:
    watch = pod_watch()
    for now in (0, 1000, 100_000):
        assert watch.observe(2, 2, False, now) is None


def test_a_worker_pod_gives_up_on_a_leader_that_is_gone() -> None:
    watch = pod_watch()
    watch.observe(2, 2, True, 0)
    assert watch.observe(2, 2, False, 100) is None
    assert watch.observe(2, 2, False, 109) is None
    assert watch.observe(2, 2, False, 110) == GONE


def test_a_leader_that_comes_back_in_time_is_as_good_as_new() -> None:
    watch = pod_watch()
    watch.observe(2, 2, True, 0)
    watch.observe(2, 2, False, 1)
    watch.observe(2, 2, True, 10)
    assert watch.observe(2, 2, False, 15) is None
    assert watch.observe(2, 2, False, 24) is None
    assert watch.observe(2, 2, False, 25) == GONE


def test_a_worker_pod_whose_ranks_do_not_come_up_gives_up() -> None:
    watch = pod_watch()
    watch.observe(0, 2, False, 0)
    watch.observe(1, 2, False, 9)
    assert watch.observe(1, 2, False, 18) is None
    assert watch.observe(1, 2, False, 19) == Ending(
        ExitCode.RESTART_GANG, "no progress for 10 s: only 1 of this pod's 2 ranks have come up"
    )


def test_a_leader_that_rebuilds_counts_as_serving_for_ten_seconds() -> None:
    """DESIGN section 4."""
    patience = RebuildPatience()
    serving = worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING)
    rebuilding = worker_pb2.EngineState(phase=worker_pb2.PHASE_REBUILDING)
    assert patience.observe(serving, 0.0)
    assert patience.left(0.0) is None
    assert patience.observe(rebuilding, 1.0)
    assert patience.left(4.0) == 7.0
    assert patience.observe(rebuilding, 10.9)
    assert not patience.observe(rebuilding, 11.0)
    assert patience.left(11.0) is None
    assert patience.observe(serving, 12.0)
    assert patience.observe(rebuilding, 13.0)
    assert not patience.observe(None, 13.1)
    assert not patience.observe(worker_pb2.EngineState(phase=worker_pb2.PHASE_FORMING), 13.2)
