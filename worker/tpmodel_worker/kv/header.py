"""What goes over a pipe's control connection: fixed-size binary frames, checked before anything is believed.

A header announces one item: a tensor's dtype and shape, "no tensor", or the end. 88 bytes, little-endian:

    magic "TPKV", version u8, kind u8, dtype u8, dimensions u8, sequence u64, payload bytes u64, 8 sizes u64

Headers may be written before those ahead of them are answered. A tensor with bytes is answered twice, anything else
once: go on, in the order of the headers; then done, in that order too. Or refused, with a reason. 256 bytes:

    magic "TPKR", version u8, kind u8, length of the text u16, sequence u64, text in UTF-8, zeros
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from tpmodel_worker.kv.errors import KvHeaderError

MAX_DIMENSIONS = 8
_VERSION = 2
_HEADER = struct.Struct(f"<4sBBBBQQ{MAX_DIMENSIONS}Q")
_REPLY = struct.Struct("<4sBBHQ240s")
HEADER_BYTES = _HEADER.size
REPLY_BYTES = _REPLY.size
_HEADER_MAGIC, _REPLY_MAGIC = b"TPKV", b"TPKR"
_MAX_TEXT = 240

# The numbers are the format's: never reuse one.
_DTYPES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        1: torch.float32,
        2: torch.float64,
        3: torch.float16,
        4: torch.bfloat16,
        5: torch.uint8,
        6: torch.int8,
        7: torch.int16,
        8: torch.int32,
        9: torch.int64,
        10: torch.bool,
        11: torch.float8_e4m3fn,
        12: torch.float8_e5m2,
    }
)
_CODES: Mapping[torch.dtype, int] = MappingProxyType({dtype: code for code, dtype in _DTYPES.items()})


class ItemKind(enum.IntEnum):
    """What a header announces."""

    TENSOR = 1
    NONE = 2
    END = 3


class ReplyKind(enum.IntEnum):
    """What the receiver says to a header."""

    GO = 1
    DONE = 2
    REFUSED = 3


_ITEM_KINDS = frozenset(int(kind) for kind in ItemKind)
_REPLY_KINDS = frozenset(int(kind) for kind in ReplyKind)


@dataclass(frozen=True, slots=True)
class Header:
    """One item, announced. dtype and shape belong to tensors."""

    kind: ItemKind
    sequence: int
    """Items of this direction before it."""
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow on the data connection."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Reply:
    """The receiver's answer to the header of that sequence."""

    kind: ReplyKind
    sequence: int
    text: str = ""


def tensor_header(tensor: torch.Tensor, sequence: int) -> Header:
    """Announces a tensor.

    Raises:
        ValueError: its dtype or number of dimensions can't be said.
    """
    if tensor.dtype not in _CODES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CODES)
        raise ValueError(f"tensors of {tensor.dtype} can't be sent: expected one of {known}")
    if tensor.dim() > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {tensor.dim()} dimensions can't be sent: at most {MAX_DIMENSIONS}")
    return Header(ItemKind.TENSOR, sequence, tensor.dtype, tuple(tensor.shape))


def encode_header(header: Header) -> bytes:
    """HEADER_BYTES bytes."""
    code = 0 if header.dtype is None else _CODES[header.dtype]
    sizes = header.shape + (0,) * (MAX_DIMENSIONS - len(header.shape))
    fields = (_VERSION, header.kind, code, len(header.shape), header.sequence, header.payload_bytes)
    return _HEADER.pack(_HEADER_MAGIC, *fields, *sizes)


def decode_header(data: bytes, *, sequence: int, max_payload_bytes: int) -> Header:
    """Reads what encode_header wrote; computes with the numbers, allocates nothing.

    Args:
        data: as received.
        sequence: that the next header has to have.
        max_payload_bytes: larger tensors are refused.

    Raises:
        KvHeaderError: any field is not what it can be, or they contradict each other.
    """
    if len(data) != HEADER_BYTES:
        raise KvHeaderError(f"a header has {HEADER_BYTES} bytes, got {len(data)}")
    magic, version, kind, code, dimensions, number, payload, *sizes = _HEADER.unpack(data)
    if magic != _HEADER_MAGIC or version != _VERSION:
        raise KvHeaderError(f"not a header of version {_VERSION}: it begins with {data[:5].hex()}")
    if kind not in _ITEM_KINDS:
        raise KvHeaderError(f"unknown kind of item {kind}")
    if number != sequence:
        raise KvHeaderError(f"item {number} came in the place of item {sequence}")
    if dimensions > MAX_DIMENSIONS:
        raise KvHeaderError(f"{dimensions} dimensions: at most {MAX_DIMENSIONS}")
    if any(sizes[dimensions:]):
        raise KvHeaderError(f"sizes beyond the {dimensions} dimensions are not 0: {sizes}")
    if kind != ItemKind.TENSOR:
        if code or dimensions or payload:
            raise KvHeaderError(f"{ItemKind(kind).name} with dtype {code}, {dimensions} dimensions, {payload} bytes")
        return Header(ItemKind(kind), number)
    if code not in _DTYPES:
        raise KvHeaderError(f"unknown dtype {code}")
    shape = tuple(sizes[:dimensions])
    header = Header(ItemKind.TENSOR, number, _DTYPES[code], shape)
    if header.payload_bytes != payload:
        raise KvHeaderError(f"{header.dtype} of shape {shape} has {header.payload_bytes} bytes, not {payload}")
    # An empty tensor's other sizes are bounded as well: its strides are their products.
    if math.prod(max(size, 1) for size in shape) * _DTYPES[code].itemsize > max_payload_bytes:
        raise KvHeaderError(f"a tensor of shape {shape} and {payload} bytes: at most {max_payload_bytes} are taken")
    return header


def encode_reply(reply: Reply) -> bytes:
    """REPLY_BYTES bytes; a long text is cut."""
    text = reply.text.encode()[:_MAX_TEXT]
    return _REPLY.pack(_REPLY_MAGIC, _VERSION, reply.kind, len(text), reply.sequence, text)


def decode_reply(data: bytes) -> Reply:
    """Reads what encode_reply wrote. Raises KvHeaderError when it is no reply."""
    if len(data) != REPLY_BYTES:
        raise KvHeaderError(f"a reply has {REPLY_BYTES} bytes, got {len(data)}")
    magic, version, kind, length, number, text = _REPLY.unpack(data)
    if magic != _REPLY_MAGIC or version != _VERSION:
        raise KvHeaderError(f"not a reply of version {_VERSION}: it begins with {data[:5].hex()}")
    if kind not in _REPLY_KINDS or length > _MAX_TEXT:
        raise KvHeaderError(f"unknown kind of reply {kind} with a text of {length} bytes")
    return Reply(ReplyKind(kind), number, text[:length].decode(errors="replace"))
