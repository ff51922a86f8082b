"""Connections that somebody else opened: found, and cut for both sides."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tpmodel_worker.comm.sockets import Connections


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_what_was_opened_meanwhile_is_cut_and_nothing_else(listener: socket.socket) -> None:
    address = listener.getsockname()
    before = socket.create_connection(address)
    before_peer, _ = listener.accept()
    connections = Connections("127.0.0.1")
    with connections.opening({address[1]}):
        ours = socket.create_connection(address)
        second_listener = socket.create_server(("127.0.0.1", 0))
        unix = socket.socketpair()
    peer, _ = listener.accept()
    assert len(connections) == 1

    connections.cut()
    connections.cut()

    peer.settimeout(5)
    assert peer.recv(1) == b""
    before.sendall(b"x")
    assert before_peer.recv(1) == b"x"
    unix[0].sendall(b"y")
    assert unix[1].recv(1) == b"y"
    for end in (before, before_peer, ours, peer, second_listener, *unix):
        end.close()


def test_a_number_that_is_another_sockets_by_now_is_left_alone(listener: socket.socket) -> None:
    connections = Connections("127.0.0.1")
    with connections.opening({listener.getsockname()[1]}):
        ours = socket.create_connection(listener.getsockname())
    number = ours.fileno()
    listener.accept()[0].close()
    ours.close()
    other = socket.create_connection(listener.getsockname())
    other_peer, _ = listener.accept()
    assert other.fileno() == number, "the kernel gives the lowest free number"

    connections.cut()

    other.sendall(b"z")
    assert other_peer.recv(1) == b"z"
    other.close()
    other_peer.close()


def test_connections_of_other_addresses_do_not_count(listener: socket.socket) -> None:
    connections = Connections("127.0.0.2")
    with connections.opening({listener.getsockname()[1]}):
        theirs = socket.create_connection(listener.getsockname())
    assert len(connections) == 0
    theirs.close()


def test_connections_that_other_threads_open_meanwhile_do_not_count(listener: socket.socket) -> None:
    """Of those opened at the same time, only ones from or to a listener of the library's are cut."""
    connections = Connections("127.0.0.1")
    own_listener = connections.listen(lambda: socket.create_server(("127.0.0.1", 0)))
    with connections.opening(set()):
        theirs = socket.create_connection(listener.getsockname())
        ours = socket.create_connection(own_listener.getsockname())
        accepted, _ = own_listener.accept()
    their_peer, _ = listener.accept()
    assert connections.ports == {own_listener.getsockname()[1]}

    connections.cut()

    ours.settimeout(5)
    assert ours.recv(1) == b""
    theirs.sendall(b"x")
    assert their_peer.recv(1) == b"x"
    for end in (theirs, their_peer, ours, accepted, own_listener):
        end.close()


def test_where_another_thread_begins_to_listen_meanwhile_is_none_of_the_librarys_ports() -> None:
    connections = Connections("127.0.0.1")
    begun: list[socket.socket] = []

    def begin() -> socket.socket:
        if not begun:
            begun.append(socket.create_server(("127.0.0.1", 0)))  # as another thread may in this very moment
        begun.append(socket.create_server(("127.0.0.1", 0)))
        return begun[-1]

    own_listener = connections.listen(begin)
    assert connections.ports == {own_listener.getsockname()[1]}
    with connections.opening(set()):
        theirs = socket.create_connection(begun[0].getsockname())
        their_peer, _ = begun[0].accept()

    connections.cut()

    theirs.sendall(b"x")
    assert their_peer.recv(1) == b"x"
    for end in (theirs, their_peer, *begun):
        end.close()


def test_a_library_beside_which_others_always_begin_to_listen_is_refused() -> None:
    """Rather than that others' connections are cut."""
    begun: list[socket.socket] = []

    def begin() -> None:
        begun.extend(socket.create_server(("127.0.0.1", 0)) for _ in range(2))

    with pytest.raises(OSError, match="other threads began to listen"):
        Connections("127.0.0.1").listen(begin)
    for end in begun:
        end.close()
