"""Which requests the scheduler takes, and which of them are answered before they begin."""

from __future__ import annotations

from tpmodel.v1 import inference_pb2
from tpmodel_worker.engine.requests import (
    InvalidRequestError,
    NeverFitsError,
    Request,
    RequestTooLongError,
    SchedulerConfig,
)
from tpmodel_worker.engine.sequence import RequestState


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Returns if the request can be computed within these limits, however long it waits.

    Raises RefusedError: RequestTooLongError, NeverFitsError, InvalidRequestError.
    """
    prompt_length = len(request.prompt_token_ids)
    known_length = prompt_length + len(request.resume_token_ids)
    if prompt_length == 0:
        raise InvalidRequestError("the prompt has no tokens")
    if request.n < 1:
        raise InvalidRequestError(f"n must be at least 1, not {request.n}")
    if prompt_length >= config.max_model_len:
        raise RequestTooLongError(
            f"the prompt has {prompt_length} tokens, but the context is {config.max_model_len} tokens, "
            "of which at least one must be left for output"
        )
    if config.blocks_for(known_length) > config.num_blocks:
        raise NeverFitsError(
            f"{known_length} tokens need {config.blocks_for(known_length)} blocks of {config.block_size} tokens, "
            f"but the KV cache has {config.num_blocks}"
        )
    if request.n > 1 and (request.keep_kv or request.kv_source):
        raise InvalidRequestError(f"n is {request.n}: what is handed over has one sample")
    if request.kv_source is not None and not request.resume_token_ids:
        raise InvalidRequestError("kv_source without resume_token_ids: the tokens that the other gang has sent")


def reason_to_end(state: RequestState) -> inference_pb2.FinishReason.ValueType | None:
    """Why there is nothing to generate: the resumed outputs are a whole answer already."""
    resumed = state.request.resume_token_ids
    sampling = state.samples[0].sampling
    if resumed and resumed[-1] in sampling.stop_token_ids and len(resumed) >= sampling.min_tokens:
        return inference_pb2.FINISH_REASON_STOP
    if len(resumed) >= sampling.max_tokens:
        return inference_pb2.FINISH_REASON_LENGTH
    return None
