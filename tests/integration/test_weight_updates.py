"""Live weight updates into a whole server: a model that is trained, the oracle after each update, and failures."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch

from support.scale import WEIGHT_UPDATES
from support.trainer import TOKEN, chooses
from support.updated_server import PROMPTS, TOKENS, Served, Stream, raw_stream, serve
from support.waiting import until
from tpmodel.channel import metadata
from tpmodel.trainer import Trainer, UpdateOptions, UpdateOrderError, WeightUpdateError, connect
from tpmodel.v1 import weights_pb2 as pb

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"buffer_size": 50_000},
    "unpacked": {"packed": False},
    "indexed": {"transport": "indexed"},
    "indexed shadow": {"transport": "indexed", "mode": "shadow"},
    "shadow": {"mode": "shadow", "buffer_size": 50_000, "buffer_count": 3},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("two"), 2) as served:
        yield served


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("one"), 1) as served:
        yield served


@pytest.fixture(params=["one_rank", "two_ranks"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_after_each_update_greedy_output_is_that_of_transformers_with_the_trainers_weights(
    served: Served, layout: str
) -> None:
    """E39, E40, E44, U35."""
    sent: list[tuple[int, int]] = []
    with served.connect(**LAYOUTS[layout]) as trainer:
        for _ in range(2):
            served.update(trainer, progress=lambda *bytes_sent: sent.append(bytes_sent))
            served.check()
            assert trainer.versions() == [served.version]
    total = sum(tensor.nbytes for tensor in served.trained.weights.values())
    assert total <= sent[-1][0] == sent[-1][1] < total + 10_000
    assert served.state().weight_version == served.version


def test_tensors_may_be_made_as_they_are_asked_for(two_ranks: Served) -> None:
    """E39: with little held beside them."""
    with two_ranks.connect(group_bytes=60_000, buffer_size=20_000) as trainer:
        two_ranks.trained.train()
        weights = two_ranks.trained.weights
        tensors = ((name, weights[name].clone()) for name in reversed(weights))
        trainer.send_weights(tensors, version=two_ranks.next_version())
    two_ranks.check()


class TestRunningRequests:
    """What becomes of requests that run when an update begins."""

    PROMPT = PROMPTS[0]
    COUNT = 900

    def begin(self, served: Served) -> Stream:
        return Stream(served.server.target, self.PROMPT, self.COUNT).begun()

    @pytest.mark.parametrize("mode", ["in_place", "shadow"])
    def test_kept_ones_go_on_with_the_new_weights_behind_the_tokens_that_they_have(
        self, served: Served, mode: str
    ) -> None:
        """E46: no token is made with half an update, none is lost or changed."""
        before, old = served.version, copy.deepcopy(served.trained.model)
        with served.connect(mode=mode) as trainer:
            served.trained.train()
            stream = self.begin(served)
            had = list(stream.tokens)
            served.send(trainer, running="keep")
        result = stream.end().result
        assert result is not None, stream.error
        assert result.completion.weight_versions == (before, served.version)
        ids = list(result.token_ids[0])
        assert len(ids) == self.COUNT
        assert ids[: len(had)] == had
        assert chooses(old, self.PROMPT, had)
        # The last ones were made with the new weights, behind all that there was.
        assert served.trained.chooses([*self.PROMPT, *ids[:-20]], ids[-20:])

    def test_finished_ones_end_with_the_old_weights_while_new_ones_wait(self, two_ranks: Served) -> None:
        before, old = two_ranks.version, copy.deepcopy(two_ranks.trained.model)
        with two_ranks.connect() as trainer:
            two_ranks.trained.train()
            stream = self.begin(two_ranks)
            updating = threading.Thread(target=two_ranks.send, args=(trainer,), kwargs={"running": "finish"})
            updating.start()
            until(lambda: self.waits(two_ranks), "the update has begun to wait")
            late = Stream(two_ranks.server.target, PROMPTS[1], TOKENS)
            updating.join(60)
            assert not updating.is_alive()
        result, late_result = stream.end().result, late.end().result
        assert result is not None
        assert result.completion.weight_versions == (before,)
        assert chooses(old, self.PROMPT, list(result.token_ids[0]))
        assert late_result is not None
        # It may have come before the update began to wait, where the machine is slow: then it counts as running.
        model = old if late_result.completion.weight_versions == (before,) else two_ranks.trained.model
        assert late_result.completion.weight_versions in ((before,), (two_ranks.version,))
        assert chooses(model, PROMPTS[1], list(late_result.token_ids[0]))

    def waits(self, served: Served) -> bool:
        """Whether a call of the trainer is under way."""
        with served.stub() as stub:
            try:
                stub.GetParameterInfo(pb.GetParameterInfoRequest(), metadata=metadata(TOKEN), timeout=1)
            except grpc.RpcError:
                return True
            return False

    def test_aborted_ones_fail_at_once_and_say_why(self, two_ranks: Served) -> None:
        with two_ranks.connect() as trainer:
            two_ranks.trained.train()
            stream = self.begin(two_ranks)
            two_ranks.send(trainer, running="abort")
        error = stream.end().error
        assert error is not None
        assert error.code == "ABORTED"
        assert "a weight update began" in error.message
        two_ranks.check()


class TestOrder:
    """E38, E45."""

    def code(self, call: Callable[..., Any], request: Any) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            # Refusals of a stream come with its first message.
            next(iter(call(request, metadata=metadata(TOKEN), timeout=20)))
        error = caught.value
        assert isinstance(error, grpc.Call)
        return error.code().name, error.details() or ""

    def test_calls_that_are_not_due_are_refused_and_the_server_serves_on(self, two_ranks: Served) -> None:
        with two_ranks.stub() as stub:
            start = pb.StartUpdateRequest(running=pb.RUNNING_REQUESTS_KEEP)
            for call, request in (
                (stub.StartUpdate, start),
                (stub.Update, pb.UpdateRequest()),
                (stub.FinishUpdate, pb.FinishUpdateRequest(version=1000)),
            ):
                code, details = self.code(call, request)
                assert code == "FAILED_PRECONDITION"
                assert "the update is idle" in details
            with two_ranks.connect() as trainer:
                with trainer.update(two_ranks.next_version()) as update:
                    code, details = self.code(stub.StartUpdate, start)
                    assert (code, "session is empty" in details) == ("INVALID_ARGUMENT", True)
                    init = pb.InitUpdateRequest(master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=3)
                    assert self.code(stub.InitUpdate, init)[0] == "FAILED_PRECONDITION"
                    update.send(two_ranks.trained.weights)
        two_ranks.check()

    def test_a_trainer_from_which_another_took_the_gang_over_disturbs_nothing(self, two_ranks: Served) -> None:
        """Its calls are refused, also when it leaves; joining takes the gang back."""
        with two_ranks.connect(mode="shadow") as first, two_ranks.connect() as second:
            with second.update(two_ranks.next_version()) as update:
                with pytest.raises(WeightUpdateError, match="another trainer has taken this gang over"):
                    first.send_weights(two_ranks.trained.weights, version=two_ranks.version + 1)
                update.send(two_ranks.trained.weights)
            two_ranks.check()
            first.join()
            two_ranks.update(first)
        two_ranks.check()

    def test_a_version_that_does_not_follow_and_ranks_that_cannot_be_are_refused(self, two_ranks: Served) -> None:
        """E37."""
        with two_ranks.stub() as stub:
            init = pb.InitUpdateRequest(
                master_address="127.0.0.1", master_port=1, rank_offset=1, world_size=2, mode=pb.UPDATE_MODE_IN_PLACE
            )
            code, details = self.code(stub.InitUpdate, init)
            assert (code, "gang 0 needs ranks 1 to 2" in details) == ("INVALID_ARGUMENT", True)
            init.world_size = 3
            code, details = self.code(stub.InitUpdate, init)
            assert (code, "127.0.0.1:1 can't be reached" in details) == ("UNAVAILABLE", True)
        with two_ranks.connect(mode="shadow") as trainer:
            with pytest.raises(WeightUpdateError, match="version 0 does not follow"):
                trainer.send_weights(two_ranks.trained.weights, version=0)
        two_ranks.check()

    def test_a_trainer_with_another_token_is_refused(self, two_ranks: Served) -> None:
        with pytest.raises(WeightUpdateError, match="takes the trainer's token"):
            connect(two_ranks.server.control_target, token="another")

    def test_a_new_trainers_token_needs_no_restart(self, two_ranks: Served) -> None:
        """The ranks are told what to prove for each group."""
        two_ranks.token_file.write_text("a new one")
        try:
            with pytest.raises(WeightUpdateError, match="UNAUTHENTICATED"):
                two_ranks.connect()
            with connect(two_ranks.server.control_target, token="a new one") as trainer:
                two_ranks.update(trainer)
        finally:
            two_ranks.token_file.write_text(TOKEN)
        two_ranks.check()

    def test_a_trainer_may_be_closed_twice_and_cannot_update_then(self, two_ranks: Served) -> None:
        """E46: the group is aborted, the gang serves on."""
        with two_ranks.connect() as trainer:
            two_ranks.update(trainer)
            trainer.close()
            trainer.close()
            with pytest.raises(UpdateOrderError, match=r"join\(\) first"):
                trainer.send_weights(two_ranks.trained.weights, version=two_ranks.version + 1)
        two_ranks.check()

    def test_options_are_a_dict_or_the_dataclass(self, two_ranks: Served) -> None:
        """E44."""
        options = UpdateOptions(deadline_seconds=20, buffer_size=1)
        with connect(two_ranks.server.control_target, token=TOKEN, options=options) as trainer:
            two_ranks.update(trainer)
        two_ranks.check()


class TestChecks:
    """E36, E41: before a byte moves; the version before is served on."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model.norm.weight": torch.zeros(65)}, r"model.norm.weight has shape \(65,\)"),
            ({"model.norm.weights": torch.zeros(64)}, "has no tensor model.norm.weights"),
            ({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}, "model.norm.weight is int32"),
            ({"model.norm.weight": None}, "1 tensors of a full set are missing, the first is model.norm.weight"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_the_sender(
        self, two_ranks: Served, change: dict[str, torch.Tensor | None], message: str
    ) -> None:
        weights = {name: tensor for name, tensor in (two_ranks.trained.weights | change).items() if tensor is not None}
        with two_ranks.connect() as trainer:
            with pytest.raises(ValueError, match=message):
                trainer.send_weights(weights, version=two_ranks.version + 1)
        two_ranks.check()


class TestFailures:
    """E46."""

    def test_in_place_serves_nothing_until_a_full_set_heals_it(self, served: Served) -> None:
        with served.connect() as trainer:
            stream = raw_stream(served.server.target)
            with pytest.raises(RuntimeError, match="the trainer fails"):
                self.break_off(served, trainer)
            assert trainer.versions() == [None]
            assert stream.result(30) == grpc.StatusCode.UNAVAILABLE
            self.check_incomplete(served)
            trainer.join()
            with pytest.raises(WeightUpdateError, match=r"tensors of the set have not come"):
                # Half a set does not heal it either.
                self.break_off(served, trainer, fails=False)
            self.check_incomplete(served)
            trainer.join()
            served.update(trainer)
        served.check()
        assert served.state().weights_condition == ""
        until(served.ready, "the server is ready again")

    def break_off(self, served: Served, trainer: Trainer, *, fails: bool = True) -> None:
        """An update that ends with a few of its tensors sent."""
        with trainer.update(served.version + 1) as update:
            update.send({name: tensor + 1 for name, tensor in list(served.trained.weights.items())[:3]})
            if trainer.options.mode == "in_place":
                assert not served.served().HasField("version")
            else:
                served.check()
            if fails:
                raise RuntimeError("the trainer fails")

    def check_incomplete(self, served: Served) -> None:
        version = served.served()
        assert not version.HasField("version")
        assert version.reason == "WeightsIncomplete"
        assert served.state().weights_condition == "WeightsIncomplete"
        until(lambda: not served.ready(), "the server is not ready")
        assert raw_stream(served.server.target, begun=False).result(10) == grpc.StatusCode.UNAVAILABLE

    def test_shadow_serves_the_old_version_on(self, two_ranks: Served) -> None:
        with two_ranks.connect(mode="shadow") as trainer:
            with pytest.raises(RuntimeError, match="the trainer fails"):
                self.break_off(two_ranks, trainer)
            two_ranks.check()

    def test_an_update_that_ends_before_a_byte_has_moved_changes_nothing(self, two_ranks: Served) -> None:
        with two_ranks.connect() as trainer:
            with pytest.raises(RuntimeError, match="the trainer fails"):
                with trainer.update(two_ranks.version + 1):
                    raise RuntimeError("the trainer fails")
        two_ranks.check()

    def test_a_trainer_that_says_nothing_more_does_not_keep_the_gang_paused(self, two_ranks: Served) -> None:
        with two_ranks.connect(deadline_seconds=1.0) as trainer:
            with pytest.raises(WeightUpdateError, match="FAILED_PRECONDITION"):
                with trainer.update(two_ranks.version + 1):
                    two_ranks.check()  # it waits until the pause is over
        assert two_ranks.served().version == two_ranks.version


def test_many_updates_leave_nothing_behind(two_ranks: Served) -> None:
    """Memory, threads and descriptors of every process of the server."""

    def family() -> list[psutil.Process]:
        root = psutil.Process(two_ranks.server.process.pid)
        return [root, *root.children(recursive=True)]

    def usage() -> dict[str, tuple[int, int]]:
        return {str(process.pid): (process.num_threads(), process.num_fds()) for process in family()}

    def memory() -> tuple[int, int]:
        """Bytes that the processes have for themselves, and arenas that the supervisor holds."""
        private = sum(process.memory_info().rss - process.memory_info().shared for process in family())
        held = Path(f"/proc/{two_ranks.server.process.pid}/fd").iterdir()
        return private, sum("memfd:" in str(entry.readlink()) for entry in held)

    with two_ranks.connect() as trainer:
        for _ in range(3):
            two_ranks.update(trainer)
        before, (private, arenas) = usage(), memory()
        started = time.monotonic()
        for _ in range(WEIGHT_UPDATES):
            two_ranks.trained.train(1)
            trainer.send_weights(two_ranks.trained.weights, version=two_ranks.next_version())
        print(f"{WEIGHT_UPDATES} updates in {time.monotonic() - started:.1f} s")
        after, (private_after, arenas_after) = usage(), memory()
    assert after.keys() == before.keys()
    assert arenas_after == arenas
    # A set is 0.9 MB: one that stays each time would show.
    assert private_after - private < 32 << 20
    for pid, (threads, descriptors) in after.items():
        assert threads <= before[pid][0] + 2, pid
        assert descriptors <= before[pid][1] + 2, pid
    two_ranks.check()
