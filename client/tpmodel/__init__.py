"""Client of a tpmodel server.

from tpmodel import Client

with Client("localhost:9000") as client:
    for chunk in client.generate("Once upon a time", max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpmodel.async_client import AsyncClient, AsyncGenerateStream
    from tpmodel.client import Client, GenerateStream
    from tpmodel.errors import (
        AuthenticationError,
        DeadlineExceededError,
        InvalidRequestError,
        OverloadedError,
        TpmodelError,
        UnavailableError,
        UnsupportedError,
        WeightVersionError,
    )
    from tpmodel.types import (
        ChatMessage,
        Chunk,
        Completion,
        FinishReason,
        Kept,
        Load,
        ModelInfo,
        Result,
        Sample,
        TokenLogprob,
        Usage,
    )

# Imported at first use: `tpmodel.v1` is also read by processes that must not have imported gRPC before they fork.
_MODULES = MappingProxyType(
    {
        "AsyncClient": "tpmodel.async_client",
        "AsyncGenerateStream": "tpmodel.async_client",
        "AuthenticationError": "tpmodel.errors",
        "ChatMessage": "tpmodel.types",
        "Chunk": "tpmodel.types",
        "Client": "tpmodel.client",
        "Completion": "tpmodel.types",
        "DeadlineExceededError": "tpmodel.errors",
        "FinishReason": "tpmodel.types",
        "GenerateStream": "tpmodel.client",
        "InvalidRequestError": "tpmodel.errors",
        "Kept": "tpmodel.types",
        "Load": "tpmodel.types",
        "ModelInfo": "tpmodel.types",
        "OverloadedError": "tpmodel.errors",
        "Result": "tpmodel.types",
        "Sample": "tpmodel.types",
        "TokenLogprob": "tpmodel.types",
        "TpmodelError": "tpmodel.errors",
        "UnavailableError": "tpmodel.errors",
        "UnsupportedError": "tpmodel.errors",
        "Usage": "tpmodel.types",
        "WeightVersionError": "tpmodel.errors",
    }
)

__all__ = [
    "AsyncClient",
    "AsyncGenerateStream",
    "AuthenticationError",
    "ChatMessage",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "FinishReason",
    "GenerateStream",
    "InvalidRequestError",
    "Kept",
    "Load",
    "ModelInfo",
    "OverloadedError",
    "Result",
    "Sample",
    "TokenLogprob",
    "TpmodelError",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "WeightVersionError",
]


def __getattr__(name: str) -> Any:
    """Imports a public name's module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
