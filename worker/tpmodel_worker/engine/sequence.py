"""A request while it lives, and its samples: what is known of each, and what is planned."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.requests import KvSource, Request


class SequenceStatus(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RECEIVING = enum.auto()
    """It holds a slot and blocks, into which its KV comes from another gang."""
    RUNNING = enum.auto()
    """It holds a slot and blocks."""
    ENDED = enum.auto()
    """Finished, cancelled or failed: what still arrives for it is dropped."""


@dataclass(slots=True, eq=False)
class RequestState:
    """A live request."""

    request: Request
    arrival: int
    """Counts submissions: among equal priorities the lower runs first."""
    base_length: int
    """Tokens that all its samples have in common: prompt and resumed outputs."""
    samples: list[Sequence] = field(default_factory=list)
    live_samples: int = 0
    """Samples that have not ended."""
    samples_in_slots: int = 0
    admitted: bool = False
    """Whether a sample ever held a slot."""
    fruitless_worlds: int = 0
    """Worlds in a row that were lost around it before it proved itself in them (suspects.py)."""
    held_until: float | None = None
    """While there is no world: unix seconds at which a request without a deadline gives up waiting for one."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request.

    Lengths count tokens. While the sequence runs, the tokens planned are known_length, then one for each
    decode step; token_ids has the committed ones, which are known_length at admission and grow as
    replies come.
    """

    state: RequestState
    sample_index: int
    order: tuple[int, int, int]
    """(priority, arrival, sample): lower comes first."""
    sampling: worker_pb2.SlotSampling
    """With this sample's index and max_tokens resolved."""
    token_ids: list[int]
    """Prompt, then committed outputs."""
    prompt_length: int
    length_limit: int
    """prompt_length + max_tokens: the sequence ends when it has so many tokens."""
    status: SequenceStatus = SequenceStatus.WAITING
    finished: bool = False
    """A reply said so: no further token may arrive."""
    keeps: bool = False
    """Its max_tokens are those of this gang's part: at that end its blocks are kept for another gang."""
    source: KvSource | None = None
    """Where its KV is to be fetched from; None: it is computed."""

    tokens_in_world: int = 0
    """Committed since the world began."""

    # While it runs.
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0
    """Tokens that fit in blocks."""
    known_length: int = 0
    """Tokens at admission: these are prefilled."""
    computed_length: int = 0
    """Tokens whose KV is there once all plans made so far have run."""
    left: int = 0
    """Outputs that no plan asks for yet."""

    snapshot_length: int = 0
    """Tokens behind which its recurrent state was last restored or copied; 0: neither."""
    parting_length: int = 0
    """Tokens in blocks that were found when it was placed, whether or not a snapshot lay behind them."""

    last_plan: int = 0
    """Number of the last plan that computes it."""

    # The prefix cache's view.
    block_hashes: list[bytes] = field(default_factory=list)
    registered_blocks: int = 0
    """Leading blocks that were offered to the prefix cache since admission."""

    def forget_world(self) -> None:
        """The world in which it ran, if it did, is gone."""
        self.slot = -1
        self.blocks = []
        self.block_hashes = []
        self.tokens_in_world = 0
        if self.status is not SequenceStatus.WAITING:
            # It is computed like any other now.
            self.source = None

    @property
    def prefilling(self) -> bool:
        """Whether known tokens are still to be planned."""
        return self.computed_length < self.known_length


def make_samples(request: Request, *, arrival: int, max_model_len: int) -> RequestState:
    """The request's state with its n samples, whose max_tokens end at the context's end at the latest."""
    prompt_length = len(request.prompt_token_ids)
    base = [*request.prompt_token_ids, *request.resume_token_ids]
    state = RequestState(request=request, arrival=arrival, base_length=len(base), live_samples=request.n)
    max_tokens = max_model_len - prompt_length
    if request.sampling.max_tokens:
        max_tokens = min(max_tokens, request.sampling.max_tokens)
    first = len(request.resume_token_ids) + 1
    keeps = request.keep_kv is not None and max_tokens > first
    if keeps:
        max_tokens = first
    for index in range(request.n):
        sampling = worker_pb2.SlotSampling()
        sampling.CopyFrom(request.sampling)
        sampling.sample_index += index
        sampling.max_tokens = max_tokens
        state.samples.append(
            Sequence(
                state=state,
                sample_index=sampling.sample_index,
                order=(request.priority, arrival, index),
                sampling=sampling,
                token_ids=base.copy(),
                prompt_length=prompt_length,
                length_limit=prompt_length + max_tokens,
                keeps=keeps,
                source=request.kv_source,
            )
        )
    return state
