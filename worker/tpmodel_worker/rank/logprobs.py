"""Log-probabilities of sampled and of the most likely tokens, over vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.rank.token_keys import key_ids, key_values, merge_top_keys, row_blocks, top_keys

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows of a batch that ask for log-probabilities; N of them."""

    rows: torch.Tensor
    """(N,) int64, rows of the batch, ascending."""
    batch_rows: tuple[int, ...]
    """The same on the host."""
    counts: tuple[int, ...]
    """Log-probabilities that each row wants beside the chosen token's."""


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Log-probabilities of N rows of a batch; tensors on the device, the same on every rank.

    K is the most that any of the rows wants: row i's are the first counts[i].
    """

    rows: tuple[int, ...]
    """Which rows of the batch, ascending."""
    counts: tuple[int, ...]
    """Log-probabilities that each row wants beside the chosen token's."""
    chosen: torch.Tensor
    """(N,) float32, of the sampled token."""
    top_values: torch.Tensor
    """(N, K) float32, best first; equal ones by ascending id."""
    top_ids: torch.Tensor
    """(N, K) int64."""


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, wanted: LogprobRows, first_id: int, communicator: Communicator
) -> SampledLogprobs:
    """Computes what the rows want.

    Args:
        logits: (R, vocab_shard) float32 as the model gave them.
        token_ids: (R,) int64, sampled.
        wanted: the rows that ask.
        first_id: the vocabulary id of column 0.
        communicator: called once.
    """
    rows, columns = len(wanted.batch_rows), logits.shape[1]
    count = max(wanted.counts)
    logits = logits.index_select(0, wanted.rows)
    norms = torch.empty(rows, 1, dtype=torch.float64, device=logits.device)
    for block in row_blocks(rows, columns, logits.device):
        norms[block] = logits[block].to(torch.float64).logsumexp(dim=-1, keepdim=True)
    chosen_columns = token_ids.index_select(0, wanted.rows).unsqueeze(1) - first_id
    elsewhere = (chosen_columns < 0) | (chosen_columns >= columns)
    chosen = logits.gather(1, chosen_columns.clamp(0, columns - 1)).masked_fill(elsewhere, -torch.inf)

    # One gather moves all parts: floating-point numbers travel as the integers of their bits.
    bits = torch.cat([norms, chosen.to(torch.float64)], dim=1).view(torch.int64)
    gathered = communicator.all_gather(torch.cat([bits, top_keys(logits, first_id, count)], dim=1))
    norms, chosen = gathered[:, :, :2].contiguous().view(torch.float64).unbind(dim=2)
    norm = norms.logsumexp(dim=0)
    best = merge_top_keys(gathered[:, :, 2:], count)
    return SampledLogprobs(
        rows=wanted.batch_rows,
        counts=wanted.counts,
        chosen=(chosen.amax(dim=0) - norm).to(torch.float32),
        top_values=(key_values(best).to(torch.float64) - norm.unsqueeze(1)).to(torch.float32),
        top_ids=key_ids(best),
    )
