"""Headers and replies of the pipe: what is written is read, and nothing else is believed."""

from __future__ import annotations

import math
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpmodel_worker.kv.errors import KvHeaderError
from tpmodel_worker.kv.header import (
    HEADER_BYTES,
    REPLY_BYTES,
    Header,
    ItemKind,
    Reply,
    ReplyKind,
    decode_header,
    decode_reply,
    encode_header,
    encode_reply,
    tensor_header,
)

LIMIT = 1 << 40
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
headers = st.one_of(
    st.builds(Header, st.sampled_from([ItemKind.NONE, ItemKind.END]), st.integers(0, 1 << 60)),
    st.builds(
        Header,
        st.just(ItemKind.TENSOR),
        st.integers(0, 1 << 60),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 16), max_size=8).map(tuple),
    ),
)


def pack(**changes: int | list[int] | bytes) -> bytes:
    """A float32 (2, 3) header with fields replaced."""
    fields = {"magic": b"TPKV", "version": 2, "kind": 1, "dtype": 1, "dimensions": 2, "sequence": 0, "payload": 24}
    fields |= {"sizes": [2, 3, 0, 0, 0, 0, 0, 0]} | changes
    sizes = fields.pop("sizes")
    assert isinstance(sizes, list)
    return struct.pack("<4sBBBBQQ8Q", *fields.values(), *sizes)


@given(headers)
def test_every_header_comes_back_as_it_was(header: Header) -> None:
    """K49: dtype and shape go before the data."""
    data = encode_header(header)
    assert len(data) == HEADER_BYTES
    assert decode_header(data, sequence=header.sequence, max_payload_bytes=LIMIT) == header


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_announced_with_its_dtype_shape_and_bytes(dtype: torch.dtype) -> None:
    """K49."""
    tensor = torch.zeros(3, 5, dtype=dtype)
    header = tensor_header(tensor, 4)
    assert (header.kind, header.sequence, header.dtype, header.shape) == (ItemKind.TENSOR, 4, dtype, (3, 5))
    assert header.payload_bytes == 15 * dtype.itemsize


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_random_bytes_are_an_error_and_nothing_else(data: bytes) -> None:
    """K55: no byte that a stranger sends is executed, or believed without a check."""
    with pytest.raises(KvHeaderError):
        decode_header(data, sequence=0, max_payload_bytes=LIMIT)


@given(headers, st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_headers_are_refused_or_describe_a_tensor_within_the_limit(
    header: Header, changes: list[tuple[int, int]]
) -> None:
    """Whatever passes the check can be allocated: its bytes follow from its shape and are within the limit."""
    data = bytearray(encode_header(header))
    for place, value in changes:
        data[place] = value
    try:
        decoded = decode_header(bytes(data), sequence=header.sequence, max_payload_bytes=1 << 20)
    except KvHeaderError:
        return
    assert decoded.payload_bytes <= 1 << 20
    assert decoded.sequence == header.sequence
    if decoded.kind is ItemKind.TENSOR:
        assert decoded.dtype is not None
        assert torch.empty(decoded.shape, dtype=decoded.dtype).nbytes == decoded.payload_bytes


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8), st.integers(1, 12))
def test_any_sizes_are_bounded_before_memory_is_taken(sizes: list[int], dtype: int) -> None:
    padded = sizes + [0] * (8 - len(sizes))
    product = math.prod(sizes)
    for payload in (product % (1 << 64), 0, 24):
        data = pack(dtype=dtype, dimensions=len(sizes), sizes=padded, payload=payload)
        try:
            header = decode_header(data, sequence=0, max_payload_bytes=1 << 16)
        except KvHeaderError:
            continue
        assert header.dtype is not None
        assert torch.empty(header.shape, dtype=header.dtype).nbytes == header.payload_bytes <= 1 << 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"XXXX"}, "not a header"),
        ({"version": 1}, "not a header of version 2"),
        ({"kind": 0}, "unknown kind of item 0"),
        ({"kind": 4}, "unknown kind of item 4"),
        ({"dtype": 0}, "unknown dtype 0"),
        ({"dtype": 99}, "unknown dtype 99"),
        ({"dimensions": 9}, "9 dimensions: at most 8"),
        ({"dimensions": 1}, "sizes beyond the 1 dimensions are not 0"),
        ({"sequence": 1}, "item 1 came in the place of item 0"),
        ({"payload": 25}, "has 24 bytes, not 25"),
        ({"payload": 4 << 40, "sizes": [1 << 20, 1 << 20, 0, 0, 0, 0, 0, 0]}, "at most 1099511627776 are taken"),
        ({"payload": 0, "sizes": [(1 << 64) - 1, 0, 0, 0, 0, 0, 0, 0]}, "at most"),
        ({"kind": 2}, "NONE with dtype 1, 2 dimensions, 24 bytes"),
        ({"kind": 3}, "END with dtype 1"),
    ],
)
def test_a_field_that_cannot_be_is_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(KvHeaderError, match=message):
        decode_header(pack(**changes), sequence=0, max_payload_bytes=LIMIT)


def test_a_pickle_is_no_header() -> None:
    """K55."""
    with pytest.raises(KvHeaderError):
        decode_header(pickle.dumps({"dtype": torch.float32}).ljust(HEADER_BYTES, b"."), sequence=0, max_payload_bytes=1)


def test_what_cannot_be_said_in_a_header_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="complex64 can't be sent"):
        tensor_header(torch.zeros(1, dtype=torch.complex64), 0)
    with pytest.raises(ValueError, match="9 dimensions"):
        tensor_header(torch.zeros([1] * 9), 0)


@given(st.sampled_from(list(ReplyKind)), st.integers(0, 1 << 60), st.text(max_size=300))
def test_every_reply_comes_back_but_for_the_end_of_a_long_text(kind: ReplyKind, sequence: int, text: str) -> None:
    data = encode_reply(Reply(kind, sequence, text))
    assert len(data) == REPLY_BYTES
    decoded = decode_reply(data)
    assert (decoded.kind, decoded.sequence) == (kind, sequence)
    expected = text.encode()[:240].decode(errors="replace")
    assert decoded.text == expected


@given(st.binary(max_size=2 * REPLY_BYTES))
def test_random_bytes_are_no_reply(data: bytes) -> None:
    with pytest.raises(KvHeaderError):
        decode_reply(data)
