"""What goes into the scheduler and what comes out of it: configuration, requests, outputs, refusals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tpmodel.v1 import inference_pb2, worker_pb2

# google.rpc.Code numbers, named here since nothing else of gRPC is needed for them.
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
RESOURCE_EXHAUSTED = 8
INTERNAL = 13
UNAVAILABLE = 14
"""Another gang, or this one later, may serve the request."""

MAX_STEPS = 8
"""Most decode steps that any plan may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one world; a rebuilt world may bring others."""

    num_blocks: int
    """KV blocks on every rank, the scratch block not counted."""
    block_size: int
    """Tokens in a block."""
    max_num_seqs: int
    """Slots: sequences that run at the same time."""
    max_num_batched_tokens: int
    """Most tokens that one step computes, over all sequences."""
    max_model_len: int
    """Most tokens of a sequence, prompt and output together."""
    queue_limit: int
    """Requests that may wait for their first slot."""
    prefix_cache: bool
    share_blocks: bool = True
    """Whether a sequence can go on from blocks that another one filled. Without, it needs a snapshot of the state
    beside them, and the samples of a request share nothing."""
    state_snapshots: int = 0
    """Snapshots of recurrent state that the ranks can hold; 0 without share_blocks: there is no prefix cache."""
    snapshot_interval_blocks: int = 16
    """Blocks between two snapshots of one sequence, at least."""
    max_steps: int = MAX_STEPS
    """Most decode steps in a plan; ranks refuse more than MAX_STEPS."""
    multi_step_budget_seconds: float = 0.005
    """A plan of several steps is expected to last no longer than this."""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_steps",
            "snapshot_interval_blocks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prefix_cache and not self.share_blocks and self.state_snapshots < 1:
            raise ValueError("prefix_cache needs share_blocks or state_snapshots")
        if self.state_snapshots < 0:
            raise ValueError(f"state_snapshots must not be negative: {self.state_snapshots}")
        if self.max_steps > MAX_STEPS:
            raise ValueError(f"max_steps must be at most {MAX_STEPS}, not {self.max_steps}")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, not {self.max_model_len}")
        if self.queue_limit < 0:
            raise ValueError(f"queue_limit must not be negative: {self.queue_limit}")

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of so many tokens."""
        return -(-tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class KeepKv:
    """A request ends behind its first new token, and its KV cache is kept for another gang."""

    ticket: str
    """Under which it can be fetched; unique."""
    seconds: float
    """How long it is kept when nobody comes."""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where another gang keeps a request's KV cache."""

    target: str
    """host:port of its control port."""
    ticket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A validated request: tokens and resolved parameters."""

    key: Hashable
    """Names the request in every output and cancel; unique among the live ones."""
    request_id: str
    prompt_token_ids: Sequence[int]
    resume_token_ids: Sequence[int] = ()
    """Outputs known already (a continued stream); they count as output of every sample."""
    sampling: worker_pb2.SlotSampling
    """Of every sample; sample_index is the first one's. max_tokens 0 means up to the context's end."""
    n: int = 1
    priority: int = 0
    """Lower runs first."""
    deadline: float | None = None
    """Unix seconds."""
    keep_kv: KeepKv | None = None
    """Needs n = 1."""
    kv_source: KvSource | None = None
    """Needs n = 1 and resume_token_ids."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request got its first slot."""

    cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache."""
    weight_version: int


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """A request whose KV is to come from another gang into blocks that it holds."""

    key: Hashable
    request_id: str
    source: KvSource
    token_ids: Sequence[int]
    """Prompt and outputs."""
    blocks: Sequence[int]
    slot: int
    weight_version: int

    @property
    def tokens(self) -> int:
        """How many of them come with KV: the last one's is computed here."""
        return len(self.token_ids) - 1


@dataclass(slots=True)
class SequenceOutput:
    """News of one sample, or (error) the end of a whole request."""

    key: Hashable
    sample_index: int
    """Absolute: the request's sampling.sample_index + 0 .. n - 1."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[worker_pb2.TokenLogprobs] = field(default_factory=list)
    """Parallel to token_ids where the request asked for them, else empty."""
    finish_reason: inference_pb2.FinishReason.ValueType | None = None
    """Set in the sample's last output; None: it goes on."""
    admitted: Admitted | None = None
    """Set once for a request, before any of its tokens."""
    error: tuple[int, str] | None = None
    """google.rpc.Code and message: the whole request failed, nothing follows for the key."""
    retry_after: float = 0.0
    """With an error: seconds after which another try is worth it; 0: nothing is known of that."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the loss of a world means for the requests that were in it."""

    replayed: list[Hashable]
    """Keys of those that go on in the next one."""
    blamed: list[str]
    """Ids of those that were failed, since they may be what worlds are lost of."""


class RefusedError(Exception):
    """A request that the scheduler does not take; `code` is its google.rpc.Code."""

    code: ClassVar[int] = INVALID_ARGUMENT


class QueueFullError(RefusedError):
    """As many requests wait as may."""

    code: ClassVar[int] = RESOURCE_EXHAUSTED


class RequestTooLongError(RefusedError):
    """The prompt leaves no room for a single token of output in the context."""


class NeverFitsError(RefusedError):
    """The known tokens need more KV blocks than there are."""


class InvalidRequestError(RefusedError):
    """No prompt, no samples, or a key that is in use."""


class ProtocolError(Exception):
    """Rank 0's reply does not follow from the plans sent: a fault of the world."""
