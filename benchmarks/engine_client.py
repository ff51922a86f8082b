"""Requests straight into the engine's front socket, as an api process sends them: ids in, ids out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.framing import frame, read_message


class EngineClient:
    """One connection to the engine; knows how many tokens each of its requests has got."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.tokens: dict[int, int] = {}
        """Tokens so far, by handle, of the requests that run."""
        self.finished = 0
        self.outputs = 0
        """Messages' parts that brought tokens."""

    def submit(self, handle: int, prompt: Sequence[int], max_tokens: int) -> None:
        """Sends a greedy request that nothing but its length ends."""
        self.tokens[handle] = 0
        sampling = worker_pb2.SlotSampling(top_p=1, repetition_penalty=1, max_tokens=max_tokens, logprobs=-1)
        request = pod_pb2.SubmitRequest(
            handle=handle, request_id=str(handle), prompt_token_ids=prompt, sampling=sampling, n=1
        )
        self._writer.write(frame(pod_pb2.FrontRequest(submit=request)))

    def cancel_all(self) -> None:
        """Ends what runs."""
        for handle in self.tokens:
            self._writer.write(frame(pod_pb2.FrontRequest(cancel=pod_pb2.CancelRequest(handle=handle))))
        self.tokens.clear()

    async def read(self) -> int:
        """Waits for the next message; how many tokens it brought.

        Raises:
            RuntimeError: a request failed, or the engine went away.
        """
        message = await read_message(self._reader, pod_pb2.FrontResponse)
        if message is None:
            raise RuntimeError("the engine closed the connection")
        count = 0
        for output in message.outputs.outputs:
            if output.HasField("error"):
                raise RuntimeError(output.error.message)
            if output.handle not in self.tokens:
                continue  # cancelled meanwhile
            self.tokens[output.handle] += len(output.token_ids)
            count += len(output.token_ids)
            self.outputs += bool(output.token_ids)
            if output.finish_reason:
                del self.tokens[output.handle]
                self.finished += 1
        return count


@contextlib.asynccontextmanager
async def engine_client(front_socket: Path) -> AsyncIterator[EngineClient]:
    """Connects to the engine of a running server."""
    reader, writer = await asyncio.open_unix_connection(str(front_socket))
    try:
        yield EngineClient(reader, writer)
    finally:
        writer.close()
