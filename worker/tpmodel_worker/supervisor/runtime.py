"""The pod's short-lived folder: Unix sockets, metrics files and the settings with the token."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tpmodel_worker.settings import ServeSettings

_TOKEN_BYTES = 32
_SETTINGS_FILE = "settings.json"
# sun_path of a Unix socket, with its final zero.
_LONGEST_SOCKET_PATH = 107


class RuntimeFolderError(Exception):
    """No folder for the pod's sockets could be made."""


@contextlib.contextmanager
def runtime_folder(settings: ServeSettings) -> Iterator[ServeSettings]:
    """Makes the folder (mode 0700), yields the settings with it and with a token, and removes it again.

    settings.runtime_dir, where given, is the folder to make it in.

    Raises:
        RuntimeFolderError: it cannot be made, or its path is too long for Unix sockets.
    """
    try:
        # Not TMPDIR, which may be long.
        folder = Path(tempfile.mkdtemp(prefix="tpmodel-", dir=settings.runtime_dir or "/tmp"))  # noqa: S108 - mkdtemp
    except OSError as error:
        raise RuntimeFolderError(f"no folder for sockets can be made: {error}") from error
    try:
        resolved = dataclasses.replace(
            settings, runtime_dir=str(folder), token=settings.token or secrets.token_urlsafe(_TOKEN_BYTES)
        )
        for path in (resolved.front_socket, resolved.report_socket, resolved.rank_socket):
            if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
                raise RuntimeFolderError(f"{path} is too long for a Unix socket, at most {_LONGEST_SOCKET_PATH} bytes")
        resolved.metrics_dir.mkdir()
        yield resolved
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_settings_file(settings: ServeSettings) -> Path:
    """Writes the settings, token included, where only this user reads them."""
    path = Path(settings.runtime_dir) / _SETTINGS_FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(settings.to_json())
    return path
