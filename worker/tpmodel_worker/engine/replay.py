"""How far the requests that a lost world interrupted have come in the next one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from tpmodel_worker.engine.requests import SequenceOutput


class Replay:
    """Requests that are computed again, until each has brought a new token or has ended."""

    def __init__(self, keys: Iterable[Hashable], *, on_first: Callable[[], None], on_done: Callable[[], None]) -> None:
        """on_first: called with the new world's first token. on_done: called once nobody is left to wait for."""
        self._waiting = set(keys)
        self._on_first = on_first
        self._on_done = on_done
        self._begun = False

    def observe(self, outputs: Sequence[SequenceOutput]) -> bool:
        """Takes the outputs of one step; True once the replay is over, and nothing needs to be observed any more."""
        for output in outputs:
            if output.token_ids and not self._begun:
                self._begun = True
                self._on_first()
            if output.token_ids or output.finish_reason is not None or output.error is not None:
                self._waiting.discard(output.key)
        if self._waiting:
            return False
        self._on_done()
        return True

    def forget(self, key: Hashable) -> None:
        """A request was cancelled: no output of it will come."""
        self._waiting.discard(key)
