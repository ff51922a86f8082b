"""The control connection of a pipe: who is let in, and what a receiver does with what it is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.control import ControlConnection, ControlListener, connect
from tpmodel_worker.kv.errors import KvHeaderError, KvPipeClosedError, KvPipeError, KvPipeTimeoutError
from tpmodel_worker.kv.header import HEADER_BYTES, REPLY_BYTES, ReplyKind, decode_reply
from tpmodel_worker.kv.link import Link
from tpmodel_worker.kv.receiver import Receiver

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


class Peer:
    """A receiver, and the raw other end of its control connection."""

    def __init__(self) -> None:
        with socket.create_server((HOST, 0)) as server:
            raw = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        self.raw = ControlConnection(raw)
        config = KvPipeConfig(rank=0, address=HOST, master_address=HOST, base_port=1, token="t", deadline_seconds=5)
        self.receiver = Receiver(Link(ControlConnection(accepted), SingleCommunicator(torch.device("cpu"))), config)

    def close(self) -> None:
        self.receiver.close()
        self.raw.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_a_malformed_header_is_refused_and_raised_and_breaks_the_direction(peer: Peer) -> None:
    """K53."""
    peer.raw.write(b"\x80\x04" * (HEADER_BYTES // 2), 1)
    reply = decode_reply(peer.raw.read(REPLY_BYTES, 5), sequence=0)
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
