"""From token ids to text, one id at a time, without ever showing half a character.

Both classes keep one promise: the texts returned for a sequence of ids, followed by flush(), are together
exactly the tokenizer's decoding of all those ids. An id is held back (push returns None) only while the text
of the ids so far could still change.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# More tokens than this in the window, and it moves on.
_WINDOW_TOKENS = 16


class Detokenizer(Protocol):
    """Turns one sample's ids into text as they come."""

    def push(self, token_id: int) -> str | None:
        """Takes the next id.

        Returns:
            The text of this id and of all held back before it, or None when this one is held back too.
        """
        ...

    def flush(self) -> str:
        """Ends the sequence: the text of the ids held back, as the tokenizer decodes it."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE, where every id stands for bytes: an id is certain once they end a character."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """bytes_of: an id's bytes, empty for an id that adds no text."""
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""

    def push(self, token_id: int) -> str | None:
        """See Detokenizer."""
        # An id can end one character (or show that it was none) and begin the next.
        self._text += self._decoder.decode(self._bytes_of(token_id))
        if self._decoder.getstate()[0]:
            return None
        text, self._text = self._text, ""
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        text, self._text = self._text + self._decoder.decode(b"", final=True), ""
        return text


class WindowDetokenizer:
    """For every other tokenizer: decodes a window of the last ids and returns what the newest one added.

    The window's first ids are there as context only: a decoder that strips the space before the first word
    of what it is given strips it there, and not in the middle of a sentence.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, silent: Callable[[int], bool], byte_ids: Container[int]
    ) -> None:
        """Takes the tokenizer's functions.

        Args:
            decode: text of ids, special ones included.
            silent: whether an id adds no text (a special one that is to be skipped, or an unknown one).
            byte_ids: ids that stand for one byte of a character. A run of them is decoded as a whole, and a
                single wrong byte changes the text of all of it, so it is held back until it ends.
        """
        self._decode = decode
        self._silent = silent
        self._byte_ids = byte_ids
        self._window: list[int] = []
        self._window_text = ""
        # Where in the window the ids of the last release begin: a border between characters.
        self._last_release = 0
        self._released = 0

    def push(self, token_id: int) -> str | None:
        """See Detokenizer."""
        if self._silent(token_id):
            return "" if self._released == len(self._window) else None
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return None
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return None
        return self._release(text)

    def flush(self) -> str:
        """See Detokenizer."""
        if self._released == len(self._window):
            return ""
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        new = text[len(self._window_text) :]
        self._window_text = text
        self._last_release, self._released = self._released, len(self._window)
        if len(self._window) > _WINDOW_TOKENS:
            self._slide()
        return new

    def _slide(self) -> None:
        # What the last release added stays as context.
        self._window = self._window[self._last_release :]
        self._window_text = self._decode(self._window)
        self._last_release, self._released = 0, len(self._window)
