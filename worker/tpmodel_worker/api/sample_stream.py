"""One sample of a request on its way to the client: ids in, whole tokens with their text out.

What is emitted, exactly:

- An id is emitted once its text is certain, together with that text. Held back are ids that end inside a
  character, and ids whose text may be the beginning of a stop string. Nothing is held back at the end: half a
  character that will never be completed comes out as the tokenizer decodes it, as U+FFFD.
- When a stop string is found, every id up to and including the one that completed it is emitted and counted;
  later ones are dropped. The text ends before the stop string, or behind it with include_stop.
- An id that ends the sample (end of sequence, or one of stop_token_ids) is emitted and counted as well. Its
  text is left out, or kept with include_stop (a special one's only where special tokens are not skipped).
- So without stops the texts of a sample's chunks are together the decoding of its ids.
- Stop strings are looked for in the text of the ids after the first min_tokens.
- A resumed sample takes the ids that the client has as sent, with all of their text that was certain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.api.detokenizer import Detokenizer
from tpmodel_worker.api.stop_strings import StopMatcher


@dataclass(slots=True)
class Emission:
    """What a sample has to send: parallel ids and log-probabilities (empty unless asked for), and text."""

    token_ids: list[int]
    text: str
    logprobs: list[worker_pb2.TokenLogprobs]


class SampleStream:
    """Order of use: prime() at most once, push() as ids arrive, finish() once; take() at any time."""

    def __init__(
        self,
        *,
        detokenizer: Detokenizer | None,
        matcher: StopMatcher | None = None,
        stop_token_ids: Collection[int] = (),
        min_tokens: int = 0,
        max_tokens: int | None = None,
        include_stop: bool = False,
    ) -> None:
        """Starts empty.

        Args:
            detokenizer: None: ids only, which no stop string can end.
            matcher: None: no stop strings.
            stop_token_ids: ids that end the sample; the engine decides when they do.
            min_tokens: no stop string is looked for in the first ones.
            max_tokens: how prime() tells that a resumed sample had ended; None: it had not.
            include_stop: keep the stop string, or the text of the id that ended the sample.
        """
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._include_stop = include_stop
        self.token_count = 0
        """Output ids so far, resumed ones included, dropped ones not."""
        self.finish_reason: inference_pb2.FinishReason.ValueType | None = None
        self.stop = ""
        """The stop string that ended the sample."""
        # Not yet taken, oldest first; the first _certain of them may go.
        self._token_ids: list[int] = []
        self._logprobs: list[worker_pb2.TokenLogprobs] = []
        self._certain = 0
        self._text: list[str] = []
        # The last ids, held by the detokenizer.
        self._undecoded = 0
        # Before those, (ids, their text) held for the matcher.
        self._suspects: deque[tuple[int, str]] = deque()
        self._suspect_characters = 0

    def prime(self, token_ids: Sequence[int]) -> None:
        """Takes ids that the client has already; may find that the sample had ended with them."""
        self.push(token_ids)
        if self.finish_reason is None and token_ids and token_ids[-1] in self._stop_token_ids:
            self.finish_reason = inference_pb2.FINISH_REASON_STOP
        elif self.finish_reason is None and self.token_count == self._max_tokens:
            self.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        self._token_ids.clear()
        self._text.clear()
        self._suspects.clear()
        self._certain = self._undecoded = self._suspect_characters = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[worker_pb2.TokenLogprobs] = ()) -> None:
        """Takes the sample's next ids. Those behind a stop string are dropped."""
        for index, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                return
            self._append(token_id, logprobs[index] if logprobs else None)
            if self._detokenizer is None:
                self._certain += 1
            elif (text := self._detokenizer.push(token_id)) is not None:
                self._decoded(text)

    def finish(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[worker_pb2.TokenLogprobs],
        reason: inference_pb2.FinishReason.ValueType,
    ) -> None:
        """Takes the last ids; nothing stays held back."""
        silent_end = (
            reason == inference_pb2.FINISH_REASON_STOP
            and not self._include_stop
            and bool(token_ids)
            and token_ids[-1] in self._stop_token_ids
        )
        if reason == inference_pb2.FINISH_REASON_KEPT:
            self.push(token_ids, logprobs)
            self._hand_over()
        elif not silent_end:
            self.push(token_ids, logprobs)
            self._flush()
        else:
            self.push(token_ids[:-1], logprobs[:-1])
            self._flush()
            if self.finish_reason is None:
                self._append(token_ids[-1], logprobs[-1] if logprobs else None)
                self._certain += 1
        if self.finish_reason is None:
            self.finish_reason = reason

    def take(self) -> Emission | None:
        """What may be sent now and was not taken before; None: nothing."""
        if not self._certain and not self._text:
            return None
        count = self._certain
        emission = Emission(self._token_ids[:count], "".join(self._text), self._logprobs[:count])
        del self._token_ids[:count], self._logprobs[:count]
        self._text.clear()
        self._certain = 0
        return emission

    def _append(self, token_id: int, logprobs: worker_pb2.TokenLogprobs | None) -> None:
        self.token_count += 1
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._undecoded += self._detokenizer is not None

    def _decoded(self, text: str) -> None:
        count, self._undecoded = self._undecoded, 0
        if self._matcher is None or self.token_count <= self._min_tokens:
            self._release(count, text)
            return
        hit = self._matcher.feed(text)
        self._suspects.append((count, text))
        self._suspect_characters += len(text)
        if hit is not None:
            self._cut(hit.stop, self._suspect_characters - len(text) + hit.end)
            return
        pending = self._matcher.pending
        while self._suspects and self._suspect_characters - len(self._suspects[0][1]) >= pending:
            self._release_suspect()

    def _flush(self) -> None:
        if self._detokenizer is None or self.finish_reason is not None:
            return
        text = self._detokenizer.flush()
        if self._undecoded or text:
            self._decoded(text)
        while self._suspects:
            self._release_suspect()

    def _hand_over(self) -> None:
        """All ids go out. The text of the last ones, where it is not certain, comes with whoever continues."""
        while self._suspects:
            self._release_suspect()
        self._release(self._undecoded, "")
        self._undecoded = 0

    def _cut(self, stop: str, end: int) -> None:
        """Emits the suspects' ids, and their text up to the stop string that ends at character `end` of it."""
        # A resumed stream has sent what came before the suspects, possibly the stop string's beginning.
        kept = end if self._include_stop else max(0, end - len(stop))
        count = sum(ids for ids, _ in self._suspects)
        text = "".join(text for _, text in self._suspects)
        self._suspects.clear()
        self._suspect_characters = 0
        self._release(count, text[:kept])
        self.finish_reason, self.stop = inference_pb2.FINISH_REASON_STOP, stop

    def _release_suspect(self) -> None:
        count, text = self._suspects.popleft()
        self._suspect_characters -= len(text)
        self._release(count, text)

    def _release(self, count: int, text: str) -> None:
        self._certain += count
        if text:
            self._text.append(text)
