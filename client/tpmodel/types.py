"""Plain values that calls take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "kept"]
"""kept: another server continues the answer, see Kept."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token, and the most likely ones (id, log-probability, text), best first."""

    token_id: int
    logprob: float
    text: str
    top: tuple[tuple[int, float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some whole tokens of one sample, and exactly their text."""

    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """How one sample ended."""

    sample_index: int
    finish_reason: FinishReason
    stop: str
    """The stop string that ended it, or empty."""
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What the server that continues an answer is given: where the first one keeps its KV cache."""

    target: str
    """Control port of the server that keeps it."""
    ticket: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a stream."""

    samples: tuple[Sample, ...]
    usage: Usage
    weight_versions: tuple[int, ...]
    kept: Kept | None = None
    """With finish reason kept."""


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. texts and token_ids are by sample."""

    request_id: str
    seed: int
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...]
    completion: Completion

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the server serves."""

    model_id: str
    served_name: str
    model_type: str
    max_model_len: int
    vocab_size: int
    world_size: int
    dtype: str
    weight_version: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the server is."""

    running: int
    waiting: int
    queue_limit: int
    kv_blocks_total: int
    kv_blocks_used: int
