"""How clients reach a server: channel options, metadata and the retry schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Servers close connections every half minute so that clients find new gangs: look names up often enough.
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
    # A server whose process was killed is back within a second or two; by default gRPC waits longer after a refusal.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # It is this one that ends the connection when a ping stays unanswered; its default is a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
]

WEIGHT_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A gang whose machine is gone is noticed while its answer is waited for.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]
"""Of those who call a gang's WeightService, whose messages name every tensor."""


def options(server_name: str) -> list[tuple[str, int | str]]:
    """Channel options. server_name: what the server's certificate must be for, where that is not the target's host."""
    return [*OPTIONS, ("grpc.ssl_target_name_override", server_name)] if server_name else OPTIONS


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata that presents the API key."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long, in seconds, a call goes on trying while no server is available."""

    window: float = 60.0
    first_delay: float = 0.1
    longest_delay: float = 2.0

    def delays(self) -> Iterator[float]:
        """Waits before each further try: doubling, with jitter, until the window is used up."""
        total, delay = 0.0, self.first_delay
        while total < self.window:
            wait = min(delay * random.uniform(0.75, 1.25), self.window - total)  # noqa: S311
            total += wait
            yield wait
            delay = min(2 * delay, self.longest_delay)
