"""Stands in for the engine on the front socket: answers every request with ids that the test chose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from tpmodel.v1 import inference_pb2, pod_pb2, worker_pb2
from tpmodel_worker.framing import frame, read_message

WAIT_SECONDS = 10.0

Script = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One submitted request, from the engine's side."""

    def __init__(self, submit: pod_pb2.SubmitRequest, engine: ScriptedEngine) -> None:
        self.submit = submit
        self._engine = engine

    async def admit(self, *, cached_tokens: int = 0) -> None:
        admitted = pod_pb2.Admitted(cached_tokens=cached_tokens, weight_version=self._engine.state.weight_version)
        await self.send(pod_pb2.Output(sample_index=self.submit.sampling.sample_index, admitted=admitted))

    async def tokens(
        self,
        token_ids: Iterable[int],
        *,
        sample_index: int = 0,
        finish: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED,
        logprobs: Sequence[worker_pb2.TokenLogprobs] = (),
    ) -> None:
        await self.send(
            pod_pb2.Output(sample_index=sample_index, token_ids=token_ids, finish_reason=finish, logprobs=logprobs)
        )

    async def fail(self, code: int, message: str, *, retry_after_ms: int = 0) -> None:
        error = pod_pb2.RequestError(code=code, message=message, retry_after_ms=retry_after_ms)
        await self.send(pod_pb2.Output(error=error))

    async def send(self, *outputs: pod_pb2.Output) -> None:
        for output in outputs:
            output.handle = self.submit.handle
        await self._engine.send(pod_pb2.FrontResponse(outputs=pod_pb2.OutputBatch(outputs=outputs)))


def replies(
    token_ids: Sequence[int],
    *,
    batch: int = 1,
    finish: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_LENGTH,
) -> Script:
    """Every sample gets these ids (behind those it resumes from), `batch` at a time."""

    async def script(exchange: Exchange) -> None:
        submit = exchange.submit
        await exchange.admit(cached_tokens=2)
        rest = token_ids[len(submit.resume_token_ids) :]
        for start in range(0, len(rest), batch):
            last = start + batch >= len(rest)
            for index in range(submit.sampling.sample_index, submit.sampling.sample_index + submit.n):
                part = rest[start : start + batch]
                logprobs = []
                if submit.sampling.logprobs >= 0:
                    top = range(submit.sampling.logprobs)
                    logprobs = [
                        worker_pb2.TokenLogprobs(
                            logprob=-0.5, top_token_ids=top, top_logprobs=[-0.5 - rank for rank in top]
                        )
                        for _ in part
                    ]
                reason = finish if last else inference_pb2.FINISH_REASON_UNSPECIFIED
                await exchange.tokens(part, sample_index=index, finish=reason, logprobs=logprobs)
            await asyncio.sleep(0)

    return script


class ScriptedEngine:
    """Listens on a front socket; `script` answers each request; submits and cancels are recorded."""

    def __init__(self, path: Path, script: Script) -> None:
        self.script = script
        self.submits: list[pod_pb2.SubmitRequest] = []
        self._cancels: list[pod_pb2.CancelRequest] = []
        self._cancelled = asyncio.Condition()
        self.state = worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING, weight_version=3, running=1, waiting=2)
        self._path = path
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> ScriptedEngine:
        self._server = await asyncio.start_unix_server(self._serve, path=str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self.drop_connections()
        for task in self._tasks:
            task.cancel()
        self._path.unlink(missing_ok=True)

    @property
    def connections(self) -> int:
        return len(self._writers)

    def drop_connections(self) -> None:
        for writer in self._writers:
            writer.close()

    def cancels_of(self, handle: int) -> list[pod_pb2.CancelRequest]:
        """The cancels of a request so far."""
        return [cancel for cancel in self._cancels if cancel.handle == handle]

    async def wait_for_cancel(self, handle: int) -> pod_pb2.CancelRequest:
        """The first cancel of a request."""
        async with asyncio.timeout(WAIT_SECONDS), self._cancelled:
            await self._cancelled.wait_for(lambda: self.cancels_of(handle))
        return self.cancels_of(handle)[0]

    async def set_phase(self, phase: worker_pb2.Phase.ValueType) -> None:
        self.state.phase = phase
        await self.send(pod_pb2.FrontResponse(state=self.state))

    async def send(self, response: pod_pb2.FrontResponse) -> None:
        for writer in list(self._writers):
            writer.write(frame(response))
            await writer.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.write(frame(pod_pb2.FrontResponse(state=self.state)))
        try:
            while (message := await read_message(reader, pod_pb2.FrontRequest)) is not None:
                if message.HasField("cancel"):
                    async with self._cancelled:
                        self._cancels.append(message.cancel)
                        self._cancelled.notify_all()
                else:
                    self.submits.append(message.submit)
                    task = asyncio.ensure_future(self._run(Exchange(message.submit, self)))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _run(self, exchange: Exchange) -> None:
        await self.script(exchange)
