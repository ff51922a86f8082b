"""The generator against known answers and against plain Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel_worker.kernels.gumbel_noise import philox_4x32

WORD = 0xFFFFFFFF
words = st.integers(0, WORD)


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & WORD, (low >> 32) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def torch_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    return tuple(int(word) for word in philox_4x32((c0, c1, c2, c3), (k0, k1)))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits_of_pi"],
)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]):
    assert torch_philox(counter, key) == answer


@settings(max_examples=200, deadline=None)
@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_equals_python_integers(counter: tuple[int, ...], key: tuple[int, ...]):
    assert torch_philox(counter, key) == python_philox(counter, key)


def test_words_broadcast_over_rows_and_columns():
    columns = torch.arange(5).unsqueeze(0)
    rows = torch.tensor([[3], [WORD]])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    result = philox_4x32((columns, rows, zero, zero), (rows, zero))
    assert [int(word[1, 4]) for word in result] == list(python_philox((4, WORD, 0, 0), (WORD, 0)))
