"""A pipe direction's control connection: whole frames with deadlines, between two who know the token."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable

from tpmodel_worker.comm.proof import NONCE_BYTES, PROOF_BYTES, make_proof
from tpmodel_worker.kv.errors import KvPipeClosedError, KvPipeError, KvPipeTimeoutError

_HANDSHAKE_SECONDS = 2.0
"""How long a stranger may keep the listener busy."""
_RETRY_SECONDS = 0.02
_ACCEPT_SECONDS = 0.1
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class ControlConnection:
    """One TCP connection. read by one thread, written and shut down by any."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the socket over."""
        self._socket = connection
        self._writing = threading.Lock()
        # A timeout would belong to the socket, not to the call: a read and a write at a time would share it.
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host is gone is noticed while nothing is said.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def read(self, size: int, seconds: float, *, idle: bool = False) -> bytes:
        """Exactly size bytes. idle: the first one may take as long as it likes.

        Raises:
            KvPipeTimeoutError: they did not come within seconds.
            KvPipeClosedError: the connection has ended.
        """
        data = bytearray()
        deadline = None if idle else time.monotonic() + seconds
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except BlockingIOError:
                if not self._wait_for(select.POLLIN, deadline):
                    raise KvPipeTimeoutError(f"the peer said nothing for {seconds:g} s") from None
                continue
            except OSError as error:
                raise KvPipeClosedError(f"the connection has ended: {error}") from error
            if not part:
                raise KvPipeClosedError("the peer closed the connection")
            if deadline is None:
                deadline = time.monotonic() + seconds
            data += part
        return bytes(data)

    def write(self, data: bytes, seconds: float) -> None:
        """Sends everything, whole also beside other threads' writes. Raises as read."""
        deadline = time.monotonic() + seconds
        late = f"the peer took nothing for {seconds:g} s"
        if not self._writing.acquire(timeout=seconds):
            raise KvPipeTimeoutError(late)
        try:
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    if not self._wait_for(select.POLLOUT, deadline):
                        raise KvPipeTimeoutError(late) from None
        except OSError as error:
            raise KvPipeClosedError(f"the connection has ended: {error}") from error
        finally:
            self._writing.release()

    def _wait_for(self, event: int, deadline: float | None) -> bool:
        """Whether it, or the end of the connection, came before the deadline (None: there is none)."""
        poll = select.poll()
        poll.register(self._socket, event)
        # At least a millisecond, poll's unit: a shorter rest would make it spin.
        timeout = None if deadline is None else max((deadline - time.monotonic()) * 1000, 1)
        return bool(poll.poll(timeout)) or (deadline is not None and time.monotonic() < deadline)

    def shut_down(self) -> None:
        """Ends the connection, and every read and write on it. From any thread; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back, once nobody reads or writes. Idempotent."""
        self.shut_down()
        self._socket.close()


class ControlListener:
    """Where a receiver waits for its sender, on one address alone."""

    def __init__(self, address: str) -> None:
        """Raises KvPipeError when the address can't be listened on."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind((address, 0))
            self._socket.listen(8)
        except OSError as error:
            self._socket.close()
            raise KvPipeError(f"{address} can't be listened on: {error}") from error
        self.port: int = self._socket.getsockname()[1]

    def accept(self, token: str, purpose: str, remaining: Callable[[], float]) -> ControlConnection:
        """The first connection whose other side knows the token; all others are closed.

        remaining: seconds until the deadline; raises once it is over.
        """
        while True:
            # No longer than a poll, so that whoever cancels is heard.
            self._socket.settimeout(min(remaining(), _ACCEPT_SECONDS))
            try:
                raw, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:
                raise KvPipeError(f"the listener was closed: {error}") from error
            connection = ControlConnection(raw)
            try:
                _prove_as_server(connection, token, purpose)
            except KvPipeError:
                connection.close()
                continue
            return connection

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(host: str, port: int, *, own_address: str, token: str, purpose: str, seconds: float) -> ControlConnection:
    """Connects from own_address and proves both sides to each other.

    Raises:
        KvPipeError: nobody listens, or who does has another token.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            raw = socket.create_connection((host, port), max(deadline - time.monotonic(), 0.001), (own_address, 0))
            break
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise KvPipeError(f"no connection to {host} port {port}: {error}") from error
            time.sleep(_RETRY_SECONDS)
    connection = ControlConnection(raw)
    try:
        _prove_as_client(connection, token, purpose, max(deadline - time.monotonic(), 0.001))
    except KvPipeError as error:
        connection.close()
        raise KvPipeError(f"{host} port {port}: the token was not accepted, or it is not a pipe: {error}") from error
    return connection


def _check_proof(given: bytes, expected: bytes) -> None:
    """Raises KvPipeError unless they are equal; compares in constant time."""
    if not hmac.compare_digest(given, expected):
        raise KvPipeError("the peer has another token")


def _prove_as_server(connection: ControlConnection, token: str, purpose: str) -> None:
    own = secrets.token_bytes(NONCE_BYTES)
    connection.write(own, _HANDSHAKE_SECONDS)
    answer = connection.read(NONCE_BYTES + PROOF_BYTES, _HANDSHAKE_SECONDS)
    others = answer[:NONCE_BYTES]
    _check_proof(answer[NONCE_BYTES:], make_proof(token, "sender", purpose, own, others))
    connection.write(make_proof(token, "receiver", purpose, own, others), _HANDSHAKE_SECONDS)


def _prove_as_client(connection: ControlConnection, token: str, purpose: str, seconds: float) -> None:
    others = connection.read(NONCE_BYTES, seconds)
    own = secrets.token_bytes(NONCE_BYTES)
    connection.write(own + make_proof(token, "sender", purpose, others, own), seconds)
    _check_proof(connection.read(PROOF_BYTES, seconds), make_proof(token, "receiver", purpose, others, own))
