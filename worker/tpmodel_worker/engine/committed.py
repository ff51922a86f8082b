"""The version of the weights that the gang committed last, kept where the loss of its memory does not take it along."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from tpmodel_worker.gang_files import read_weights_version, read_whole_number


class CommittedVersion:
    """Ranks that come up with less than this have lost weights, and the checkpoint must not be served for them."""

    def __init__(self, gang_dir: str, files: Sequence[Path]) -> None:
        """gang_dir: where the operator says it ("": there is none); files: where this engine notes it itself."""
        self._gang_dir = gang_dir
        self._files = files
        self._shared: Path | None = None

    def share(self, file: Path) -> None:
        """One more place to note it, which other gangs of the model may use as well."""
        self._shared = file

    def read(self, *, shared: bool = False) -> int:
        """The highest that any of them says; 0: the checkpoint.

        shared: what other gangs of the model have committed counts too: for a gang that had nothing in memory.
        """
        files = [*self._files, self._shared] if shared and self._shared is not None else self._files
        noted = (read_whole_number(file) or 0 for file in files)
        return max(read_weights_version(self._gang_dir), *noted, 0)

    def note(self, version: int) -> None:
        """Writes it down. Raises OSError; the other files are written all the same."""
        failure: OSError | None = None
        for file in [*self._files, *([self._shared] if self._shared is not None else [])]:
            try:
                _replace(file, f"{version}\n")
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure


def _replace(file: Path, text: str) -> None:
    """One reads the old text or the new one, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
