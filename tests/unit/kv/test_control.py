"""The control connection of a pipe: who is let in, and what a receiver does with what it is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from support.waiting import until
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.control import ControlConnection, ControlListener, connect
from tpmodel_worker.kv.errors import KvHeaderError, KvPipeClosedError, KvPipeError, KvPipeTimeoutError
from tpmodel_worker.kv.header import (
    HEADER_BYTES,
    REPLY_BYTES,
    Header,
    ItemKind,
    Reply,
    ReplyKind,
    decode_header,
    decode_reply,
    encode_header,
    encode_reply,
    tensor_header,
)
from tpmodel_worker.kv.link import Link
from tpmodel_worker.kv.receiver import Receiver
from tpmodel_worker.kv.sender import Sender

HOST = "127.0.0.1"


def within(seconds: float) -> Callable[[], float]:
    deadline = time.monotonic() + seconds

    def remaining() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise KvPipeError("too late")
        return left

    return remaining


@pytest.fixture
def listener() -> Iterator[ControlListener]:
    listener = ControlListener(HOST)
    yield listener
    listener.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def connect_here(listener: ControlListener, token: str, purpose: str = "p") -> ControlConnection:
    return connect(HOST, listener.port, own_address=HOST, token=token, purpose=purpose, seconds=5)


def test_both_sides_with_the_token_get_a_connection(listener: ControlListener, threads: ThreadPoolExecutor) -> None:
    """K55."""
    accepted = threads.submit(listener.accept, "secret", "p", within(10))
    ours, theirs = connect_here(listener, "secret"), accepted.result()
    ours.write(b"hello", 1)
    assert theirs.read(5, 1) == b"hello"
    ours.close()
    with pytest.raises(KvPipeClosedError):
        theirs.read(1, 1)
    theirs.close()


@pytest.mark.parametrize(("token", "purpose"), [("wrong", "p"), ("secret", "another pipe")])
def test_a_wrong_token_or_pipe_is_not_let_in_and_the_right_one_still_is(
    listener: ControlListener, threads: ThreadPoolExecutor, token: str, purpose: str
) -> None:
    """K55."""
    accepted = threads.submit(listener.accept, "secret", "p", within(20))
    with pytest.raises(KvPipeError, match="the token was not accepted"):
        connect_here(listener, token, purpose)
    connect_here(listener, "secret").close()
    accepted.result().close()


def test_a_stranger_who_says_nothing_or_rubbish_does_not_hold_the_listener(
    listener: ControlListener, threads: ThreadPoolExecutor
) -> None:
    """K55."""
    accepted = threads.submit(listener.accept, "secret", "p", within(20))
    with socket.create_connection((HOST, listener.port)), socket.create_connection((HOST, listener.port)) as second:
        second.sendall(b"GET / HTTP/1.0\r\n" * 100)
        # More than one stranger's time.
        connect(HOST, listener.port, own_address=HOST, token="secret", purpose="p", seconds=15).close()
    accepted.result().close()


def test_a_server_without_the_token_is_not_believed(threads: ThreadPoolExecutor) -> None:
    """K55: the proof is mutual."""
    with socket.create_server((HOST, 0)) as server:

        def pretend() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"n" * 32)
                connection.recv(64)
                connection.sendall(b"p" * 32)

        threads.submit(pretend)
        with pytest.raises(KvPipeError, match="the peer has another token"):
            connect(HOST, server.getsockname()[1], own_address=HOST, token="secret", purpose="p", seconds=5)


def test_waiting_for_nobody_ends_at_the_deadline(listener: ControlListener) -> None:
    with pytest.raises(KvPipeError, match="too late"):
        listener.accept("secret", "p", within(0.1))


class Pair:
    """One end of a direction, and the raw other end of its control connection. Tensors go nowhere."""

    def __init__(self) -> None:
        with socket.create_server((HOST, 0)) as server:
            raw = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        self.raw = ControlConnection(raw)
        self.link = Link(ControlConnection(accepted), SingleCommunicator(torch.device("cpu")))

    def config(self, **changes: Any) -> KvPipeConfig:
        return KvPipeConfig(
            rank=0, address=HOST, master_address=HOST, base_port=1, token="t", deadline_seconds=5, **changes
        )


class Peer(Pair):
    """Of a receiver."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.receiver = Receiver(self.link, self.config(**changes))
        self._announced = 0

    def announce(self, tensor: torch.Tensor | None) -> None:
        number = self._announced
        header = Header(ItemKind.NONE, number) if tensor is None else tensor_header(tensor, number)
        self.raw.write(encode_header(header), 1)
        self._announced += 1

    def reply(self, seconds: float = 5) -> tuple[str, int]:
        reply = decode_reply(self.raw.read(REPLY_BYTES, seconds))
        return reply.kind.name, reply.sequence

    def close(self) -> None:
        self.receiver.close()
        self.raw.close()


class PeerOfSender(Pair):
    """Of a sender."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.sender = Sender(self.link, self.config(**changes))
        self._heard = 0

    def header(self) -> Header:
        """The next one, for which nothing was answered yet."""
        data = self.raw.read(HEADER_BYTES, 5)
        self._heard += 1
        return decode_header(data, sequence=self._heard - 1, max_payload_bytes=1 << 20)

    def reply(self, kind: ReplyKind, sequence: int) -> None:
        self.raw.write(encode_reply(Reply(kind, sequence)), 1)

    def close(self) -> None:
        self.raw.close()
        self.sender.close(5)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def sending() -> Iterator[PeerOfSender]:
    sending = PeerOfSender()
    yield sending
    sending.close()


def bytes_of(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


class TestSeveralUnderWay:
    def test_items_are_announced_before_those_ahead_of_them_are_answered(self, sending: PeerOfSender) -> None:
        """K50."""
        for tensor in (bytes_of(8), None, bytes_of(16)):
            sending.sender.send(tensor, 5)
        assert [sending.header().payload_bytes for _ in range(3)] == [8, 0, 16]
        assert sending.sender.queued_bytes == 24
        for kind, number in ((ReplyKind.GO, 0), (ReplyKind.GO, 2), (ReplyKind.DONE, 0), (ReplyKind.DONE, 1)):
            sending.reply(kind, number)
        until(lambda: sending.sender.queued_bytes == 16, "the first one has arrived")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (Reply(ReplyKind.GO, 1), "asked for item 1, which is not the next one"),
            (Reply(ReplyKind.DONE, 0), "says that it has item 0, which can't be"),
            (Reply(ReplyKind.REFUSED, 0, "no memory"), "refused item 0: no memory"),
        ],
    )
    def test_an_answer_that_can_not_be_breaks_the_direction_and_gives_all_bytes_back(
        self, sending: PeerOfSender, answer: Reply, message: str
    ) -> None:
        """K52."""
        for _ in range(2):
            sending.sender.send(bytes_of(8), 5)
            sending.header()
        sending.raw.write(encode_reply(answer), 1)
        until(lambda: sending.sender.queued_bytes == 0, "all bytes back")
        with pytest.raises(KvPipeError, match=message):
            sending.sender.send(None, 5)
        assert message in str(sending.sender.loss)

    def test_several_are_asked_for_as_far_as_there_is_room(self) -> None:
        """K51: at the limit one more passes; what is on its way counts, and what was not taken."""
        peer = Peer(receive_limit_bytes=8)
        for _ in range(3):
            peer.announce(bytes_of(8))
        answers = [peer.reply() for _ in range(4)]
        assert [answer for answer in answers if answer[0] == "GO"] == [("GO", 0), ("GO", 1)]
        assert [answer for answer in answers if answer[0] == "DONE"] == [("DONE", 0), ("DONE", 1)]
        with pytest.raises(KvPipeTimeoutError):
            peer.reply(0.1)
        assert peer.receiver.ready_bytes == 16
        peer.receiver.receive(5)
        assert [peer.reply() for _ in range(2)] == [("GO", 2), ("DONE", 2)]
        peer.close()

    def test_a_peer_that_goes_while_nothing_is_under_way_has_lost_nothing(self, sending: PeerOfSender) -> None:
        """K52: later sends say so, close has nothing to say."""
        sending.raw.close()

        def refused() -> bool:
            try:
                sending.sender.send(None, 5)
            except KvPipeError:
                return True
            return False

        until(refused, "a send is refused")
        sending.sender.close(5)


class TestMemoryThatIsUsedAgain:
    def test_a_block_that_raises_sends_nothing(self, sending: PeerOfSender) -> None:
        with pytest.raises(ZeroDivisionError), sending.sender.sending((8,), torch.uint8, 5):
            raise ZeroDivisionError
        sending.sender.send(None, 5)
        assert sending.header().kind is ItemKind.NONE

    def test_what_has_arrived_leaves_its_memory_to_later_items(self, sending: PeerOfSender) -> None:
        """Not before: it would change what arrives."""
        places: list[int] = []
        for number in range(2):
            with sending.sender.sending((8,), torch.uint8, 5) as tensor:
                places.append(tensor.data_ptr())
            sending.header()
            sending.reply(ReplyKind.GO, number)
        for number in range(2):
            sending.reply(ReplyKind.DONE, number)
        until(lambda: sending.sender.queued_bytes == 0, "all bytes back")
        assert places[0] != places[1]

        def used_again() -> bool:
            with sending.sender.sending((8,), torch.uint8, 5) as tensor:
                return tensor.data_ptr() in places

        until(used_again, "memory is used again")

    def test_received_tensors_are_the_callers_but_for_those_of_a_block(self, peer: Peer) -> None:
        for _ in range(2):
            peer.announce(bytes_of(8))
        kept = peer.receiver.receive(5)
        with peer.receiver.receiving(5) as lent:
            assert lent is not None
            place = lent.data_ptr()
        peer.announce(bytes_of(8))
        later = peer.receiver.receive(5)
        assert kept is not None
        assert later is not None
        assert later.data_ptr() == place != kept.data_ptr()


def test_a_malformed_header_is_refused_and_raised_and_breaks_the_direction(peer: Peer) -> None:
    """K53."""
    peer.raw.write(b"\x80\x04" * (HEADER_BYTES // 2), 1)
    reply = decode_reply(peer.raw.read(REPLY_BYTES, 5))
    assert reply.kind is ReplyKind.REFUSED
    assert "not a header" in reply.text
    for _ in range(2):
        with pytest.raises(KvHeaderError, match="not a header"):
            peer.receiver.receive(5)
    assert peer.receiver.ready_bytes == 0


def test_half_a_header_is_an_error_when_the_peer_goes(peer: Peer) -> None:
    """K53."""
    peer.raw.write(b"TPKV", 1)
    peer.raw.close()
    with pytest.raises(KvPipeClosedError, match="the peer closed the connection"):
        peer.receiver.receive(5)


def test_receive_gives_up_at_its_deadline(peer: Peer) -> None:
    """K53."""
    with pytest.raises(KvPipeTimeoutError, match=r"within 0\.05 s"):
        peer.receiver.receive(0.05)


def test_close_releases_a_receive_that_waits(peer: Peer, threads: ThreadPoolExecutor) -> None:
    """K57."""
    waiting: Future[object] = threads.submit(peer.receiver.receive, 60)
    begun = threading.Event()
    begun.wait(0.1)
    peer.receiver.close()
    with pytest.raises(KvPipeClosedError, match="the pipe was closed"):
        waiting.result(5)
