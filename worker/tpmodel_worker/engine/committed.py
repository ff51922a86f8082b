"""The version of the weights that the gang committed last, kept where the loss of its memory does not take it along."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tpmodel_worker.gang_files import read_weights_version, read_whole_number


class CommittedVersion:
    """Ranks that come up with less than this have lost weights, and the checkpoint must not be served for them."""

    def __init__(self, gang_dir: str, files: Sequence[Path]) -> None:
        """gang_dir: where the operator says it ("": there is none); files: where this engine notes it itself."""
        self._gang_dir = gang_dir
        self._files = files

    def read(self) -> int:
        """The highest that any of them says; 0: the checkpoint."""
        noted = (read_whole_number(file) or 0 for file in self._files)
        return max(read_weights_version(self._gang_dir), *noted, 0)

    def note(self, version: int) -> None:
        """Writes it down. Raises OSError; the other files are written all the same."""
        failure: OSError | None = None
        for file in self._files:
            try:
                _replace(file, f"{version}\n")
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure


def _replace(file: Path, text: str) -> None:
    """One reads the old text or the new one, also after a power cut."""
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
