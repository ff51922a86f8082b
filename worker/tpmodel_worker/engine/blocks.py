"""Who holds which KV block, and which blocks can be found again by what is in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Reference counts, the free list and the prefix cache of one world's KV blocks.

    A block is held (by one sequence, or by several that share it), free, or cached: free, but still
    found by its hash until it is given away. Cached blocks are given away last, the least recently
    used first. Blocks are numbers below num_blocks, the same on every rank.
    """

    def __init__(self, num_blocks: int, *, forgotten: Callable[[bytes], None] | None = None) -> None:
        """forgotten: called with a hash by which no block is found any more."""
        self.num_blocks = num_blocks
        self._forgotten = forgotten
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        # A stack: low numbers first, and what was used last is used next.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_of: dict[bytes, int] = {}
        # Blocks with a hash that nobody holds, the next to be given away first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that are held."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody holds but that can be found by their hash."""
        return len(self._cached)

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which the block is found; None: it is not in the prefix cache."""
        return self._hashes[block]

    def allocate(self, count: int) -> list[int]:
        """Blocks for one new holder. Raises ValueError when fewer are available: the caller has to look first."""
        if count > self.available:
            raise ValueError(f"{count} blocks asked for, {self.available} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._block_of[block_hash]
        self._hashes[block] = None
        if self._forgotten is not None:
            self._forgotten(block_hash)
        return block

    def unheld(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: sharing them makes so many fewer available."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 0)

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for each block, which must be held or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence's table, given in the table's order.

        Goes from the end, so that of a cached prefix the tail is given away before the head, without
        which it could not be found.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} is not held")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a held block findable. The first block of a content keeps the name; another stays without."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is not held")
        if block_hash not in self._block_of and self._hashes[block] is None:
            self._block_of[block_hash] = block
            self._hashes[block] = block_hash

    def is_known(self, block_hash: bytes) -> bool:
        """Whether a block is found by this hash."""
        return block_hash in self._block_of

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of the chain. They are the caller's only after `share`."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks
