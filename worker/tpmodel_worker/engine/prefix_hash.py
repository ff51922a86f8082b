"""Names of full KV blocks: a chained hash, so that equal names mean equal tokens from the first on."""

from __future__ import annotations

from array import array
from hashlib import blake2b

DIGEST_BYTES = 32
"""Wide enough that nobody finds two prefixes with one name, not even on purpose."""


def root_hash(weight_version: int) -> bytes:
    """The chain's start: KV of other weights never matches."""
    return blake2b(weight_version.to_bytes(8, "little"), digest_size=DIGEST_BYTES, person=b"kv-block").digest()


def extend_chain(chain: list[bytes], root: bytes, token_ids: list[int], block_size: int, blocks: int) -> None:
    """Appends the names of the sequence's next blocks until the chain names `blocks` of them.

    token_ids must hold at least blocks * block_size ids, each below 2**32.
    """
    parent = chain[-1] if chain else root
    for index in range(len(chain), blocks):
        ids = array("I", token_ids[index * block_size : (index + 1) * block_size])
        parent = blake2b(parent + ids.tobytes(), digest_size=DIGEST_BYTES).digest()
        chain.append(parent)
