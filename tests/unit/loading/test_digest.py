"""The digest of a tensor's bits."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpmodel_worker.loading import digest
from tpmodel_worker.loading.digest import digest_bytes, unsigned


def digest_of(data: bytes) -> int:
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return unsigned(int(digest_bytes(tensor)))


def by_formula(data: bytes) -> int:
    padded = data + bytes(-len(data) % 4)
    words = struct.unpack(f"<{len(padded) // 4}i", padded)
    return sum((2 * index + 1) * word for index, word in enumerate(words)) % 2**64


@given(st.binary(max_size=200))
def test_the_sum_is_the_documented_one(data):
    assert digest_of(data) == by_formula(data)


@pytest.mark.parametrize("words", [7, 8, 9, 17])
def test_chunks_do_not_change_the_sum(monkeypatch, words):
    monkeypatch.setattr(digest, "HOST_CHUNK_WORDS", 4)
    data = torch.randint(0, 256, (words * 4 + 2,), generator=torch.Generator().manual_seed(words), dtype=torch.uint8)
    assert digest_of(bytes(data.tolist())) == by_formula(bytes(data.tolist()))


@given(st.lists(st.binary(min_size=4, max_size=4), min_size=2, max_size=50), st.data())
def test_exchanging_two_unlike_words_changes_it(words, data):
    places = st.integers(0, len(words) - 1)
    first, second = data.draw(places), data.draw(places)
    exchanged = list(words)
    exchanged[first], exchanged[second] = words[second], words[first]
    same = words[first] == words[second]
    assert (digest_of(b"".join(words)) == digest_of(b"".join(exchanged))) == same


@given(st.binary(min_size=1, max_size=100), st.data())
def test_changing_one_bit_changes_it(original, data):
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest_of(bytes(changed)) != digest_of(original)


@pytest.mark.gpu
def test_cuda_gives_the_same_digest():
    data = torch.randint(0, 256, (10_000_003,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert int(digest_bytes(data.cuda())) == int(digest_bytes(data))
