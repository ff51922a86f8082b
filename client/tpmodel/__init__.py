"""Client of a tpmodel server.

from tpmodel import Client

with Client("localhost:9000") as client:
    for chunk in client.generate("Once upon a time", max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from tpmodel.async_client import AsyncClient, AsyncGenerateStream
from tpmodel.client import Client, GenerateStream
from tpmodel.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    TpmodelError,
    UnavailableError,
    WeightVersionError,
)
from tpmodel.types import (
    ChatMessage,
    Chunk,
    Completion,
    FinishReason,
    Load,
    ModelInfo,
    Result,
    Sample,
    TokenLogprob,
    Usage,
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
    "Load",
    "ModelInfo",
    "OverloadedError",
    "Result",
    "Sample",
    "TokenLogprob",
    "TpmodelError",
    "UnavailableError",
    "Usage",
    "WeightVersionError",
]
