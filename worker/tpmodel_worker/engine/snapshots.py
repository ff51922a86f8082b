"""Snapshots of recurrent state at block borders: which prefixes have one, and where the next ones are made.

A model that keeps such a state can't go on from blocks of KV alone: it also needs the state behind the last of them.
The ranks keep some of these, in numbered places; which place has which is decided here, and said in the plans.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as List

from tpmodel_worker.engine.sequence import Sequence


class StateSnapshots:
    """The snapshots of one world, by the hash of the block that they were made behind.

    One goes when nobody finds its block any more, or when its place is needed and it was used least recently.
    """

    def __init__(self, places: int, *, block_size: int, interval_blocks: int) -> None:
        """places: 0: there are none. interval_blocks: between two snapshots of a sequence, at least."""
        self.places = places
        self._block_size = block_size
        self._interval = interval_blocks * block_size
        self._free = list(range(places - 1, -1, -1))
        self._place_of: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._place_of)

    def newest(self, hashes: List[bytes]) -> int:
        """How many of these leading blocks a sequence can begin behind: those up to the last one with a snapshot."""
        return next((count for count in range(len(hashes), 0, -1) if hashes[count - 1] in self._place_of), 0)

    def use(self, block_hash: bytes) -> int:
        """The place of the snapshot behind a block, which there must be."""
        self._place_of.move_to_end(block_hash)
        return self._place_of[block_hash]

    def add(self, block_hash: bytes) -> int | None:
        """A place for a snapshot behind a block; None: there is one already."""
        if block_hash in self._place_of:
            self._place_of.move_to_end(block_hash)
            return None
        place = self._free.pop() if self._free else self._place_of.popitem(last=False)[1]
        self._place_of[block_hash] = place
        return place

    def forget(self, block_hash: bytes) -> None:
        """Nobody finds this block any more."""
        place = self._place_of.pop(block_hash, None)
        if place is not None:
            self._free.append(place)

    # ------------------------------------------------------------------------- where to make one

    def chunk_end(self, sequence: Sequence, budget: int) -> int:
        """Where a chunk of at most `budget` tokens of a prefilling sequence ends, so that snapshots can be made.

        At the last block border that a repetition of these tokens could begin behind; where other sequences were seen
        to part from them; and, of what goes in several chunks anyway, at a border near each chunk's end.
        """
        begin, known = sequence.computed_length, sequence.known_length
        end = min(begin + budget, known)
        if not self.places:
            return end
        stops = (sequence.parting_length, self._border(known - 1))
        due = sequence.snapshot_length + self._interval
        stop = min((stop for stop in stops if begin < stop <= end and stop >= due), default=0)
        if stop:
            return stop
        border = self._border(end)
        return border if end < known and border > begin and border >= due else end

    def is_due(self, sequence: Sequence) -> bool:
        """Whether to make one of the state that the sequence is left in by what is planned now."""
        length = sequence.computed_length
        due = sequence.snapshot_length + self._interval
        return self.places > 0 and length % self._block_size == 0 and length >= due

    def _border(self, length: int) -> int:
        return length - length % self._block_size
