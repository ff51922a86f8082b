"""Where every live sequence is: in the queue, or in a slot with blocks."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

from tpmodel_worker.engine.blocks import BlockPool
from tpmodel_worker.engine.kept import Kept, KeptRequests
from tpmodel_worker.engine.prefix_hash import extend_chain, root_hash
from tpmodel_worker.engine.requests import SchedulerConfig
from tpmodel_worker.engine.sequence import Sequence, SequenceStatus
from tpmodel_worker.engine.snapshots import StateSnapshots
from tpmodel_worker.engine.suspects import is_suspect, on_trial


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a sequence that need not be computed."""

    blocks: list[int]
    known_blocks: int = 0
    """Leading blocks that were found; `blocks` are the first of them, up to the last one with a snapshot behind it."""


class Placement:
    """Slots, blocks and the queue of one world, and every move of a sequence between them.

    Blocks and slots that a sequence leaves are free at once, though plans that were sent may still use
    them: what takes them over goes into a later plan, and plans run in order. The ranks hear of the
    slots left with the next plan's releases, which apply before its admissions.
    """

    def __init__(self, config: SchedulerConfig, *, weight_version: int) -> None:
        self.config = config
        places = config.state_snapshots if config.prefix_cache and not config.share_blocks else 0
        self.snapshots = StateSnapshots(
            places, block_size=config.block_size, interval_blocks=config.snapshot_interval_blocks
        )
        self.pool = BlockPool(config.num_blocks, forgotten=self.snapshots.forget)
        self.slots: list[Sequence | None] = [None] * config.max_num_seqs
        self.waiting: list[Sequence] = []
        """In the order in which they are admitted."""
        self.last_arrival: int | None = None
        """Requests that came later are not admitted; None: all are."""
        self.trials = False
        """Whether there may be suspects, which are admitted first and one at a time."""
        self.running_requests = 0
        self.slots_used = 0
        self.kept = KeptRequests()
        """What ended here and is to go on at another gang: it holds blocks."""
        self.receiving: set[Sequence] = set()
        """Those whose KV comes from another gang: each holds a slot and blocks, which no plan may touch."""
        self._arrived: list[Sequence] = []
        self._free_slots = list(range(config.max_num_seqs))  # a heap: the lowest is taken first
        self._releases: list[int] = []
        self._root_hash = root_hash(weight_version)

    @property
    def slot_is_free(self) -> bool:
        """Whether a sequence can be placed, as far as slots go."""
        return bool(self._free_slots)

    @property
    def releases_pending(self) -> bool:
        """Whether the ranks have yet to hear of slots that were left."""
        return bool(self._releases)

    def running(self) -> list[Sequence]:
        """Sequences that hold a slot, slots ascending."""
        return [sequence for sequence in self.slots if sequence is not None]

    def candidates(self) -> list[Sequence]:
        """Those of the queue that may be placed, in order. A copy."""
        waiting = self.waiting
        if self.last_arrival is not None:
            waiting = [sequence for sequence in waiting if sequence.state.arrival <= self.last_arrival]
        if self.trials:
            suspect = on_trial(self.running(), waiting)
            if suspect is not None:
                return [sequence for sequence in waiting if sequence.state is suspect]
            self.trials = any(is_suspect(sequence.state) for sequence in self.waiting)
        return waiting.copy()

    def enqueue(self, sequence: Sequence) -> None:
        """Puts a sequence that holds nothing into the queue."""
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=_order)

    def place(self, sequence: Sequence, *, shared: list[int], computed_length: int) -> None:
        """Moves a waiting sequence into a slot, with blocks for all its known tokens.

        Its table begins with the shared blocks; the caller has looked that slot and blocks are there.
        """
        self._take_blocks(sequence, shared=shared, computed_length=computed_length)
        self._run(sequence)

    def _take_blocks(self, sequence: Sequence, *, shared: list[int], computed_length: int) -> None:
        """Takes a sequence out of the queue; it gets blocks and a slot's number."""
        config = self.config
        known_length = len(sequence.token_ids)
        self._dequeue(sequence)
        self.pool.share(shared)
        sequence.blocks = [*shared, *self.pool.allocate(config.blocks_for(known_length) - len(shared))]
        sequence.capacity = len(sequence.blocks) * config.block_size
        sequence.known_length = known_length
        sequence.computed_length = computed_length
        sequence.left = sequence.length_limit - known_length
        sequence.registered_blocks = len(shared)
        sequence.snapshot_length = 0
        sequence.parting_length = 0
        sequence.slot = heapq.heappop(self._free_slots)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        self.slots[sequence.slot] = sequence
        self.slots_used += 1
        state = sequence.state
        state.samples_in_slots += 1
        if state.samples_in_slots == 1:
            self.running_requests += 1

    def receive(self, sequence: Sequence) -> None:
        """Gives a waiting sequence blocks and a slot, into which another gang sends all but its last token's KV.

        The caller has looked that both are there. Until received or stop_receiving no plan knows of either.
        """
        self._take_blocks(sequence, shared=[], computed_length=len(sequence.token_ids) - 1)
        sequence.status = SequenceStatus.RECEIVING
        self.receiving.add(sequence)

    def received(self, sequence: Sequence) -> None:
        """The KV is there: the next plan admits it to its slot."""
        self.receiving.remove(sequence)
        self._run(sequence)
        self._arrived.append(sequence)

    def stop_receiving(self, sequence: Sequence) -> None:
        """Nothing comes into its blocks any more: they and the slot are free, as if it had never had them."""
        self.receiving.remove(sequence)
        self.pool.release(sequence.blocks)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.blocks, sequence.slot, sequence.capacity = [], -1, 0

    def take_arrivals(self) -> list[Sequence]:
        """Sequences that were received since the last plan: the ranks have yet to hear of them."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def keep(self, sequence: Sequence, *, ticket: str, expires: float) -> None:
        """Ends a running sequence, whose blocks stay held; its slot too, where that has a part of what is kept."""
        blocks, slot = sequence.blocks, sequence.slot
        sequence.blocks = []
        self._leave_slot(sequence, reuse=self.config.share_blocks)
        sequence.status = SequenceStatus.ENDED
        sequence.state.live_samples -= 1
        kept_slot = -1 if self.config.share_blocks else slot
        tokens = sequence.computed_length
        self.kept.add(Kept(ticket, sequence.token_ids, tokens, blocks, kept_slot, expires))

    def drop(self, kept: Kept) -> None:
        """Gives back what was kept."""
        self.kept.remove(kept)
        self.pool.release(kept.blocks)
        if kept.slot >= 0:
            self._give_slot_back(kept.slot)

    def grow(self, sequence: Sequence) -> list[int]:
        """Adds blocks to a running sequence until its computed tokens fit; returns the new ones."""
        blocks = self.pool.allocate(self.config.blocks_for(sequence.computed_length) - len(sequence.blocks))
        sequence.blocks += blocks
        sequence.capacity = len(sequence.blocks) * self.config.block_size
        return blocks

    def preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the queue, to recompute what it has when its turn comes."""
        self._leave_slot(sequence)
        self.enqueue(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes a live sequence out of wherever it is, for good."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_slot(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._dequeue(sequence)
        # What a receiving one holds stays held until stop_receiving.
        sequence.status = SequenceStatus.ENDED
        sequence.state.live_samples -= 1

    def take_releases(self) -> list[int]:
        """Slots that were left since the last plan, ascending; they go into the plan that is being made."""
        releases = sorted(self._releases)
        self._releases.clear()
        return releases

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """What is cached of the beginning of a waiting sequence's tokens; at least one token is left to compute."""
        config = self.config
        if not config.prefix_cache:
            return Prefix([])
        most = (len(sequence.token_ids) - 1) // config.block_size
        extend_chain(sequence.block_hashes, self._root_hash, sequence.token_ids, config.block_size, most)
        blocks = self.pool.match(sequence.block_hashes[:most])
        usable = len(blocks) if config.share_blocks else self.snapshots.newest(sequence.block_hashes[: len(blocks)])
        return Prefix(blocks[:usable], len(blocks))

    def restore_state(self, sequence: Sequence, prefix: Prefix) -> int | None:
        """The snapshot that a sequence placed behind a prefix begins with; None: it begins with an empty state."""
        if self.config.share_blocks:
            return None
        block_size = self.config.block_size
        sequence.snapshot_length = len(prefix.blocks) * block_size
        sequence.parting_length = prefix.known_blocks * block_size
        return self.snapshots.use(sequence.block_hashes[len(prefix.blocks) - 1]) if prefix.blocks else None

    def save_state(self, sequence: Sequence) -> int | None:
        """Where to copy the state that the sequence is left in by what is planned now; None: nowhere.

        Its full blocks must be in the prefix cache.
        """
        if not self.snapshots.is_due(sequence):
            return None
        block_hash = sequence.block_hashes[sequence.computed_length // self.config.block_size - 1]
        if not self.pool.is_known(block_hash):
            return None
        sequence.snapshot_length = sequence.computed_length
        return self.snapshots.add(block_hash)

    def cache_prefix(self, sequence: Sequence, length: int) -> None:
        """Makes a running sequence's full blocks below `length` findable.

        The tokens below `length` must be committed, and their KV certain to be written by plans made.
        """
        block_size = self.config.block_size
        full = length // block_size
        if not self.config.prefix_cache or full <= sequence.registered_blocks:
            return
        extend_chain(sequence.block_hashes, self._root_hash, sequence.token_ids, block_size, full)
        for index in range(sequence.registered_blocks, full):
            self.pool.register(sequence.blocks[index], sequence.block_hashes[index])
        sequence.registered_blocks = full

    def _dequeue(self, sequence: Sequence) -> None:
        index = bisect_left(self.waiting, sequence.order, key=_order)
        assert self.waiting[index] is sequence
        del self.waiting[index]

    def _leave_slot(self, sequence: Sequence, *, reuse: bool = True) -> None:
        """reuse: the slot is free for others."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.capacity = 0
        self.slots[sequence.slot] = None
        if sequence in self._arrived:
            # The ranks have not heard of it yet, so they need not hear that it left.
            self._arrived.remove(sequence)
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.source = None
        elif reuse:
            self._give_slot_back(sequence.slot)
        self.slots_used -= 1
        sequence.slot = -1
        sequence.state.samples_in_slots -= 1
        if sequence.state.samples_in_slots == 0:
            self.running_requests -= 1

    def _give_slot_back(self, slot: int) -> None:
        heapq.heappush(self._free_slots, slot)
        self._releases.append(slot)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
