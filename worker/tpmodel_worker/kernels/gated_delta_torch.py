"""The gated delta rule in plain torch: token by token for decodes, in pieces of PIECE tokens for prefill chunks.

All sequences of a batch are computed together, never one after the other. Within a piece the corrections of its tokens
depend on each other through a unit triangular system, which is solved for all pieces of all sequences at once; what is
left to be done in order is one matrix product for each piece of the longest chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.gated_delta import DeltaGates, GatedDelta
from tpmodel_worker.models.batch import ForwardBatch, LayerState

PIECE = 64
"""Tokens of a chunk that are computed at once."""
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Pieces:
    """The prefill chunks of a batch cut into pieces: N of them, L rows each.

    First the first piece of every chunk, then the second of those that have one, and so on; chunks with more pieces
    come first, so that every round is a range of pieces and continues a range of chunks.
    """

    slots: torch.Tensor
    """(chunks,) int64, in the order of the rounds."""
    rows: torch.Tensor
    """(N, L) int64, rows of T; beyond a piece's end any row."""
    real: torch.Tensor
    """(N, L) bool, False beyond a piece's end."""
    places: torch.Tensor
    """(tokens of the chunks,) int64: where in N * L each row of the chunks is."""
    rounds: tuple[int, ...]
    """How many chunks each round continues."""


@dataclass(frozen=True, slots=True)
class RuleInputs:
    """GatedDelta.attend's, in float32, queries and keys of their length."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor

    @property
    def sharers(self) -> int:
        """Value heads of one key head."""
        return self.value.shape[1] // self.key.shape[1]

    def first(self, rows: int) -> RuleInputs:
        """Those of the first tokens."""
        return RuleInputs(self.query[:rows], self.key[:rows], self.value[:rows], self.decay[:rows], self.beta[:rows])


class TorchGatedDelta(GatedDelta):
    """Index tensors of one batch; on CUDA only small ones are copied from the host."""

    def __init__(self, batch: ForwardBatch, taps: int) -> None:
        self._decodes = batch.decodes
        self._slots = batch.slots
        self._taps = taps
        lengths = batch.query_starts.diff().long()
        sequences, tokens = len(batch.query_lengths), len(batch.token_ids)
        device = batch.token_ids.device
        index = torch.arange(sequences, device=device)
        owner = index.repeat_interleave(lengths, output_size=tokens)
        place = torch.arange(tokens, device=device) - batch.query_starts[owner]
        before = sequences * taps

        def sources(sequence: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
            """Rows of [all sequences' kept tokens, all tokens] with `count` tokens of each sequence from `first`."""
            wanted = first.unsqueeze(1) + torch.arange(count, device=device)
            kept = sequence.unsqueeze(1) * taps + wanted
            new = before + batch.query_starts[sequence].unsqueeze(1) + wanted - taps
            return torch.where(wanted < taps, kept, new)

        self._convolved = sources(owner, place, taps + 1)
        self._kept = sources(index, lengths, taps).flatten()
        self._pieces = cut_chunks(batch) if batch.decodes < sequences else None

    def convolve(self, features: torch.Tensor, weight: torch.Tensor, state: LayerState) -> torch.Tensor:
        """See GatedDelta.convolve."""
        kept = state.convolution.index_select(0, self._slots)
        rows = torch.cat((kept.flatten(0, 1), features))
        taps = weight.squeeze(1).t().float()
        total = rows.index_select(0, self._convolved[:, 0]).float() * taps[0]
        for tap in range(1, self._taps + 1):
            total.addcmul_(rows.index_select(0, self._convolved[:, tap]).float(), taps[tap])
        newest = rows.index_select(0, self._kept).view(kept.shape)
        state.convolution.index_copy_(0, self._slots, newest)
        return F.silu(total).to(features.dtype)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: DeltaGates, state: LayerState
    ) -> torch.Tensor:
        """See GatedDelta.attend."""
        inputs = rule_inputs(query, key, value, gates)
        outputs: list[torch.Tensor] = []
        if self._decodes:
            outputs.append(_decode(inputs.first(self._decodes), state.recurrent, self._slots[: self._decodes]))
        if self._pieces is not None:
            outputs.append(prefill_pieces(self._pieces, inputs, state.recurrent))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.to(value.dtype)


def rule_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: DeltaGates) -> RuleInputs:
    """From GatedDelta.attend's arguments."""
    query = _unit(query) * query.shape[-1] ** -0.5
    return RuleInputs(query, _unit(key), value.float(), gates.decay(), gates.beta())


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.float()
    return vectors * (vectors.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()


def _decode(inputs: RuleInputs, recurrent: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """One token of each sequence: (D, value_heads, value_dim)."""
    key = inputs.key.repeat_interleave(inputs.sharers, dim=1)
    query = inputs.query.repeat_interleave(inputs.sharers, dim=1)
    memory = recurrent.index_select(0, slots).mul_(inputs.decay.exp()[..., None, None])
    known = (key.unsqueeze(2) @ memory).squeeze(2)
    correction = (inputs.value - known) * inputs.beta.unsqueeze(-1)
    memory.addcmul_(key.unsqueeze(3), correction.unsqueeze(2))
    recurrent.index_copy_(0, slots, memory)
    return (query.unsqueeze(2) @ memory).squeeze(2)


def prefill_pieces(pieces: Pieces, inputs: RuleInputs, recurrent: torch.Tensor) -> torch.Tensor:
    """All prefill chunks: (their tokens, value_heads, value_dim)."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        """(T, heads, ...) -> (N, heads, L, ...)."""
        return tensor.index_select(0, pieces.rows.flatten()).unflatten(0, pieces.rows.shape).transpose(1, 2)

    sharers = inputs.sharers
    beyond = ~pieces.real.unsqueeze(1)
    query, key, value = cut(inputs.query), cut(inputs.key), cut(inputs.value)
    # Rows beyond a piece's end neither decay nor correct anything.
    decays = cut(inputs.decay).masked_fill(beyond, 0).cumsum(-1)
    beta = cut(inputs.beta).masked_fill(beyond, 0).unsqueeze(-1)
    length = decays.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu_(1)
    between = (decays.unsqueeze(-1) - decays.unsqueeze(-2)).masked_fill_(later, float("-inf")).exp_()
    seen = (query @ key.mT).repeat_interleave(sharers, dim=1) * between
    system = (key @ key.mT).repeat_interleave(sharers, dim=1) * between * beta
    query, key = (tensor.repeat_interleave(sharers, dim=1) for tensor in (query, key))
    since_start = decays.exp().unsqueeze(-1)
    # What the tokens would write into an empty memory, and what they take back for each key that it knows.
    right = torch.cat((value * beta, key * (beta * since_start)), dim=-1)
    written, erased = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (value.shape[-1], key.shape[-1]), dim=-1
    )
    query = query * since_start
    key = key * (decays[..., -1:] - decays).exp().unsqueeze(-1)
    whole = decays[..., -1].exp()[..., None, None]

    memory = recurrent.index_select(0, pieces.slots)
    output = torch.empty_like(written)
    start = 0
    for count in pieces.rounds:
        part, known = slice(start, start + count), memory[:count]
        correction = written[part] - erased[part] @ known
        output[part] = query[part] @ known + seen[part] @ correction
        memory[:count] = known * whole[part] + key[part].mT @ correction
        start += count
    recurrent.index_copy_(0, pieces.slots, memory)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, pieces.places)


def cut_chunks(batch: ForwardBatch) -> Pieces:
    """The prefill chunks of a batch."""
    lengths = np.array(batch.query_lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    chunks = np.arange(batch.decodes, len(lengths))
    order = chunks[np.argsort(-lengths[chunks], kind="stable")]
    length = min(PIECE, int(lengths[order].max()))
    counts = -(-lengths[order] // length)
    rounds = [int((counts > number).sum()) for number in range(int(counts[0]))]
    first = np.concatenate([starts[order[:count]] + number * length for number, count in enumerate(rounds)])
    end = np.concatenate([(starts + lengths)[order[:count]] for count in rounds])
    rows = first[:, None] + np.arange(length)
    real = rows < end[:, None]
    places = np.empty(int(lengths[chunks].sum()), dtype=np.int64)
    places[rows[real] - batch.decodes] = np.flatnonzero(real)
    rows = np.minimum(rows, len(batch.token_ids) - 1)
    return Pieces(batch.slots[_on(order, batch)], _on(rows, batch), _on(real, batch), _on(places, batch), tuple(rounds))


def _on(array: np.ndarray | Sequence[int], batch: ForwardBatch) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(batch.token_ids.device, non_blocking=True)
