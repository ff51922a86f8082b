"""Commands that go on until Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C is the way to end it, and no failure."""
    with contextlib.suppress(KeyboardInterrupt):
        yield
