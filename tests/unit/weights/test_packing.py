"""What is said about an update before a byte moves, and which tensors share a broadcast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpmodel.trainer import UpdateOptions
from tpmodel.v1 import weights_pb2
from tpmodel_worker.weights.packing import ALIGNMENT, TensorInfo, describe, plan_chunks, read_update, write_update
from tpmodel_worker.weights.ranks import update_rank


def info(name: str, size: int) -> TensorInfo:
    return TensorInfo(name, "float32", (size // 4,))


def names_of(sizes: list[int], buffer_size: int) -> list[list[str]]:
    tensors = [info(str(index), size) for index, size in enumerate(sizes)]
    return [[tensor.name for tensor, _ in chunk.places] for chunk in plan_chunks(tensors, buffer_size)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([96], [["0"]]),
        ([96, 4, 96], [["0", "1"], ["2"]]),
        # Exactly the buffer's size does not close it, and the tensor that crosses belongs to the chunk.
        ([96, 80, 16], [["0", "1"], ["2"]]),
        ([400, 4, 4], [["0"], ["1", "2"]]),
    ],
)
def test_a_chunk_closes_with_the_tensor_that_takes_it_over_the_buffers_size(
    sizes: list[int], expected: list[list[str]]
) -> None:
    """E40: the last partial chunk is sent, an empty list sends nothing."""
    assert names_of(sizes, 96) == expected


def test_unpacked_is_one_tensor_in_each_broadcast_in_the_declared_order() -> None:
    """E39."""
    assert names_of([4, 400, 8], 0) == [["0"], ["1"], ["2"]]


@given(st.lists(st.integers(0, 300).map(lambda count: 4 * count), max_size=30), st.integers(1, 2000))
def test_chunks_hold_every_tensor_once_in_order_without_overlap(sizes: list[int], buffer_size: int) -> None:
    """E40."""
    tensors = [info(str(index), size) for index, size in enumerate(sizes)]
    chunks = plan_chunks(tensors, buffer_size)
    assert [tensor for chunk in chunks for tensor, _ in chunk.places] == tensors
    for chunk in chunks:
        end = 0
        for tensor, offset in chunk.places:
            assert offset % ALIGNMENT == 0
            assert offset >= end
            end = offset + tensor.bytes
        assert end == chunk.bytes
    assert all(chunk.bytes > buffer_size for chunk in chunks[:-1])


def request(**changes: object) -> weights_pb2.UpdateRequest:
    fields: dict[str, object] = {
        "names": ["a", "b"],
        "dtypes": ["float32", "bfloat16"],
        "shapes": [weights_pb2.Shape(dimensions=[2, 3]), weights_pb2.Shape(dimensions=[4])],
        "packed": True,
        "buffer_size": 1024,
        "buffer_count": 2,
    }
    return weights_pb2.UpdateRequest(**(fields | changes))  # type: ignore[arg-type]


def test_what_is_written_is_read() -> None:
    tensors = [TensorInfo("a", "float32", (2, 3)), TensorInfo("b", "bfloat16", (4,))]
    assert read_update(request()) == tensors
    assert write_update(tensors, packed=True, buffer_size=1024, buffer_count=2) == request()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ["float32"]}, "2 names, 1 dtypes and 2 shapes"),
        ({"shapes": []}, "2 names, 2 dtypes and 0 shapes"),
        ({"names": ["a", "a"]}, "a is named twice"),
        ({"dtypes": ["float32", "int4"]}, "b: unknown dtype 'int4'"),
        ({"buffer_size": 0}, "buffer_size is 0"),
        ({"buffer_count": 0}, "buffer_count is 0: 1 to 16"),
        ({"buffer_count": 17}, "buffer_count is 17"),
    ],
)
def test_an_update_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    """E36, E41."""
    with pytest.raises(ValueError, match=message):
        read_update(request(**changes))


def test_a_tensor_of_a_dtype_that_weights_cannot_have_is_refused_by_its_sender() -> None:
    """E41."""
    assert describe("w", torch.zeros(2, 3, dtype=torch.bfloat16)) == TensorInfo("w", "bfloat16", (2, 3))
    with pytest.raises(ValueError, match="w is int64"):
        describe("w", torch.zeros(2, dtype=torch.int64))


def test_a_ranks_place_in_the_group_follows_from_gang_and_offset() -> None:
    """E37: unique for any number of gangs, the trainer is 0."""
    places = [update_rank(gang_index=gang, world_size=4, rank=rank, offset=1) for gang in range(3) for rank in range(4)]
    assert places == list(range(1, 13))


class TestOptions:
    def test_a_dict_or_the_dataclass(self) -> None:
        """E44."""
        options = UpdateOptions(mode="shadow", buffer_size=7)
        assert UpdateOptions.of({"mode": "shadow", "buffer_size": 7}) == UpdateOptions.of(options) == options
        assert UpdateOptions.of(None) == UpdateOptions()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mod": "shadow"}, "unknown option 'mod'"),
            ({"mode": "beside"}, "mode is 'beside': in_place or shadow"),
            ({"buffer_count": 0}, "buffer_count is 0"),
            ({"buffer_size": 0}, "buffer_size 0"),
            ({"deadline_seconds": 0}, "deadline_seconds 0"),
        ],
    )
    def test_what_cannot_be_is_named(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            UpdateOptions.of(options)
