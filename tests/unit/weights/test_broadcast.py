"""The tensors' way, between a sender and receivers in threads of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.thread_world import ThreadWorld
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.packing import describe

TENSORS = {
    "first": torch.arange(40, dtype=torch.float32).view(8, 5),
    "second": torch.full((3,), 2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "third": torch.arange(1000, dtype=torch.float64),
}


def exchange(buffer_size: int, buffer_count: int) -> tuple[list[list[str]], list[dict[str, torch.Tensor]], list[int]]:
    """Names in the order of arrival, kept copies, and the sender's progress."""
    infos = [describe(name, tensor) for name, tensor in TENSORS.items()]
    sent: list[int] = []

    def broadcaster(communicator: object) -> Broadcaster:
        return Broadcaster(communicator, infos, buffer_size=buffer_size, buffer_count=buffer_count)  # type: ignore[arg-type]

    def receive(communicator: object) -> dict[str, torch.Tensor]:
        arrived: dict[str, torch.Tensor] = {}

        def load(name: str, tensor: torch.Tensor) -> None:
            arrived[name] = tensor.clone()

        broadcaster(communicator).receive(load, lambda _done: None, 10)
        return arrived

    with ThreadWorld(3) as world, ThreadPoolExecutor(3) as threads:
        receivers = [threads.submit(receive, communicator) for communicator in world.communicators[1:]]
        broadcaster(world.communicators[0]).send(TENSORS.__getitem__, sent.append, 10)
        arrived = [receiver.result() for receiver in receivers]
    return [list(each) for each in arrived], arrived, sent


@pytest.mark.parametrize(("buffer_size", "buffer_count"), [(0, 1), (1, 2), (170, 2), (170, 3), (1 << 20, 2)])
def test_every_tensor_arrives_whole_and_in_order(buffer_size: int, buffer_count: int) -> None:
    """E39, E40, E43: when receive returns everything has been loaded."""
    names, arrived, sent = exchange(buffer_size, buffer_count)
    for each in arrived:
        for name, tensor in TENSORS.items():
            assert torch.equal(each[name], tensor)
            assert each[name].dtype == tensor.dtype
    assert names == [list(TENSORS)] * 2
    assert sent == sorted(sent)
    # Chunks are aligned, so a little more than the tensors may be sent.
    assert 0 <= sent[-1] - sum(tensor.nbytes for tensor in TENSORS.values()) < 64


def test_what_is_loaded_is_a_view_of_a_buffer_that_is_used_again() -> None:
    """E42: whoever keeps a tensor clones it."""
    tensors = {"a": torch.ones(10), "b": torch.full((10,), 2.0)}
    infos = [describe(name, tensor) for name, tensor in tensors.items()]
    with ThreadWorld(2) as world, ThreadPoolExecutor(1) as threads:
        views: dict[str, torch.Tensor] = {}
        receiver = Broadcaster(world.communicators[1], infos, buffer_size=1, buffer_count=1)
        receiving = threads.submit(receiver.receive, views.__setitem__, lambda _done: None, 10)
        Broadcaster(world.communicators[0], infos, buffer_size=1, buffer_count=1).send(
            tensors.__getitem__, lambda _done: None, 10
        )
        receiving.result()
    assert views["a"].data_ptr() == views["b"].data_ptr()
    assert torch.equal(views["a"], tensors["b"])


def test_memory_beside_the_weights_is_the_buffers_alone() -> None:
    """E40: the trainer says how large and how many."""
    infos = [describe(str(index), torch.zeros(1000)) for index in range(50)]
    with ThreadWorld(2) as world:
        broadcaster = Broadcaster(world.communicators[0], infos, buffer_size=10_000, buffer_count=2)
        assert [buffer.numel() for buffer in broadcaster._buffers] == [12_000, 12_000]
        assert broadcaster.total_bytes == 200_000
