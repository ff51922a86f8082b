"""The one path of a request through this process, shared by gRPC and HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator

import grpc

from tpmodel.v1 import inference_pb2, pod_pb2
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.api.engine_link import EngineLink, OutputQueue
from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.metrics import ApiMetrics, TokenTimes
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.requests import GenerationRequest, check_weight_version
from tpmodel_worker.api.sample_stream import Emission, SampleStream
from tpmodel_worker.api.stop_strings import StopMatcher, StopStrings

logger = logging.getLogger(__name__)


class Generation:
    """A request in flight. Read events() to its end; then, or whenever the client is gone, call close()."""

    def __init__(
        self, request: GenerationRequest, *, model: ServedModel, link: EngineLink, metrics: ApiMetrics
    ) -> None:
        """Does nothing yet; events() submits the request."""
        self.request = request
        self._model = model
        self._link = link
        self._times = TokenTimes(metrics)
        self._samples = self._make_samples()
        # Samples that the engine still works on.
        self._running = {index for index, sample in self._samples.items() if sample.finish_reason is None}
        self._submitted: pod_pb2.SubmitRequest | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._cached_tokens = 0
        self._weight_versions: list[int] = []
        self._ticket = secrets.token_urlsafe(24) if request.keep_kv is not None else ""

    async def events(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """What the client gets: `started`, chunks of whole tokens, then one completion.

        Tokens that arrive while an event is being written join the sample's next chunk.

        Raises:
            ApiError: what the request failed with.
        """
        state = self._link.check_accepting()
        check_weight_version(self.request.weight_version, state.weight_version)
        if not self._running:
            # A resumed stream that had broken between its last token and its completion.
            self._weight_versions.append(state.weight_version)
            yield self._started()
        else:
            queue = await self._submit()
            while not self._finished:
                for output in await queue.take():
                    if output.HasField("admitted") and self._admit(output.admitted):
                        yield self._started()
                    emission = self._absorb(output)
                    if emission is not None:
                        yield self._chunk(output.sample_index, emission)
        logger.info("done: %d output tokens", self.completion_tokens, extra={"request_id": self.request.request_id})
        yield self._completion()

    def close(self) -> None:
        """Frees what the request holds here and, unless it has ended, in the engine. Idempotent."""
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if self._submitted is None:
            return
        if self._link.release(self._submitted.handle, cancel=bool(self._running)) and not self._finished:
            text = "ended early: %d output tokens"
            logger.info(text, self.completion_tokens, extra={"request_id": self.request.request_id})

    @property
    def completion_tokens(self) -> int:
        """Output ids of all samples so far, resumed ones included."""
        return sum(sample.token_count for sample in self._samples.values())

    @property
    def _finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self._samples.values())

    def _make_samples(self) -> dict[int, SampleStream]:
        sampling, slot = self.request.sampling, self.request.sampling.slot
        stops = StopStrings(sampling.stop) if sampling.stop else None
        stop_token_ids = frozenset(slot.stop_token_ids)
        needs_text = self.request.detokenize or stops is not None
        samples: dict[int, SampleStream] = {}
        for index in range(slot.sample_index, slot.sample_index + sampling.n):
            detokenizer = None
            if needs_text and self._model.tokenizer is not None:
                detokenizer = self._model.tokenizer.detokenizer(skip_special_tokens=sampling.skip_special_tokens)
            samples[index] = SampleStream(
                detokenizer=detokenizer,
                matcher=None if stops is None else StopMatcher(stops),
                stop_token_ids=stop_token_ids,
                min_tokens=slot.min_tokens,
                max_tokens=slot.max_tokens,
                include_stop=sampling.include_stop,
            )
            if self.request.resume_token_ids:
                samples[index].prime(self.request.resume_token_ids)
        return samples

    async def _submit(self) -> OutputQueue:
        request = self.request
        self._submitted = pod_pb2.SubmitRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            resume_token_ids=request.resume_token_ids,
            sampling=request.sampling.slot,
            n=request.sampling.n,
            priority=request.priority,
            deadline=request.deadline or 0,
            weight_version=request.weight_version,
            keep_kv=request.keep_kv,
            kept_ticket=self._ticket,
            kv_source=request.kv_source,
        )
        queue = await self._link.submit(self._submitted, self._times.observe)
        if request.deadline is not None:
            error = ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline has passed")
            delay = request.deadline - time.time()
            self._deadline_timer = asyncio.get_running_loop().call_later(delay, queue.fail, error)
        return queue

    def _admit(self, admitted: pod_pb2.Admitted) -> bool:
        """Takes note; True the first time."""
        first = not self._weight_versions
        if first:
            self._cached_tokens = admitted.cached_tokens
        if admitted.weight_version not in self._weight_versions[-1:]:
            self._weight_versions.append(admitted.weight_version)
        return first

    def _absorb(self, output: pod_pb2.Output) -> Emission | None:
        index = output.sample_index
        sample = self._samples.get(index)
        if sample is None or sample.finish_reason is not None:
            # What the engine had under way when a stop string ended the sample.
            return None
        if output.finish_reason:
            self._running.discard(index)
            sample.finish(output.token_ids, output.logprobs, output.finish_reason)
        else:
            sample.push(output.token_ids, output.logprobs)
            if sample.finish_reason is not None and len(self._running) > 1 and self._submitted is not None:
                self._running.discard(index)
                self._link.cancel_sample(self._submitted.handle, index)
        return sample.take()

    def _started(self) -> inference_pb2.GenerateResponse:
        slot = self.request.sampling.slot
        started = inference_pb2.GenerateStarted(
            request_id=self.request.request_id,
            seed=slot.seed,
            weight_version=self._weight_versions[-1],
            prompt_tokens=len(self.request.prompt_token_ids),
        )
        chunk = inference_pb2.GenerateChunk(sample_index=slot.sample_index, started=started)
        return inference_pb2.GenerateResponse(chunk=chunk)

    def _chunk(self, sample_index: int, emission: Emission) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()
        chunk = response.chunk
        chunk.SetInParent()
        chunk.sample_index = sample_index
        chunk.token_ids.extend(emission.token_ids)
        if self.request.detokenize:
            chunk.text = emission.text
        for token_id, logprobs in zip(emission.token_ids, emission.logprobs, strict=False):
            entry = chunk.logprobs.add(logprob=logprobs.logprob, text=self._token_text(token_id))
            for top_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
                entry.top.add(token_id=top_id, logprob=logprob, text=self._token_text(top_id))
        return response

    def _token_text(self, token_id: int) -> str:
        if self._model.tokenizer is None or not self.request.detokenize:
            return ""
        return self._model.tokenizer.token_text(token_id)

    def _completion(self) -> inference_pb2.GenerateResponse:
        completion = inference_pb2.GenerateCompletion(
            usage=inference_pb2.Usage(
                prompt_tokens=len(self.request.prompt_token_ids),
                completion_tokens=self.completion_tokens,
                cached_tokens=self._cached_tokens,
            ),
            weight_versions=self._weight_versions,
        )
        for index, sample in self._samples.items():
            completion.samples.add(
                sample_index=index,
                finish_reason=sample.finish_reason,
                stop=sample.stop,
                completion_tokens=sample.token_count,
            )
            if sample.finish_reason == inference_pb2.FINISH_REASON_KEPT:
                settings = self._model.settings
                completion.kept_kv.target = join_host_port(settings.address, settings.control_port)
                completion.kept_kv.ticket = self._ticket
        return inference_pb2.GenerateResponse(completion=completion)
