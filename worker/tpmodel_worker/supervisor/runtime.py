"""The pod's short-lived folder: Unix sockets, metrics files and the settings with the token."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tpmodel_worker.settings import ServeSettings

_PREFIX = "tpmodel-"
_TOKEN_BYTES = 32
# A new folder is locked by far within this time.
_UNLOCKED_SECONDS = 60.0
_SETTINGS_FILE = "settings.json"
_MARK = "supervisor"
"""An empty file in every such folder: a user's own may have a name that begins the same."""
# sun_path of a Unix socket, with its final zero.
_LONGEST_SOCKET_PATH = 107


class RuntimeFolderError(Exception):
    """No folder for the pod's sockets could be made."""


@contextlib.contextmanager
def runtime_folder(settings: ServeSettings) -> Iterator[ServeSettings]:
    """Makes the folder (mode 0700), yields the settings with it and with a token, and removes it again.

    Also removes what supervisors that were killed have left beside it.

    settings.runtime_dir, where given, is the folder to make it in.

    Raises:
        RuntimeFolderError: it cannot be made, or its path is too long for Unix sockets.
    """
    parent = settings.runtime_dir or "/tmp"  # noqa: S108 - mkdtemp. Not TMPDIR, which may be long.
    _remove_abandoned(Path(parent))
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise RuntimeFolderError(f"no folder for sockets can be made: {error}") from error
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / _MARK).touch()
        resolved = dataclasses.replace(
            settings,
            runtime_dir=str(folder),
            # What has to be known after a restart of the container; a pod's folder is the pod's alone.
            state_dir=settings.runtime_dir if settings.pod_uid != "local" else "",
            token=settings.token or secrets.token_urlsafe(_TOKEN_BYTES),
        )
        for path in (resolved.front_socket, resolved.report_socket, resolved.rank_socket):
            if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
                raise RuntimeFolderError(f"{path} is too long for a Unix socket, at most {_LONGEST_SOCKET_PATH} bytes")
        resolved.metrics_dir.mkdir()
        yield resolved
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Removes this user's folders of supervisors that were killed: nobody holds their lock any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _UNLOCKED_SECONDS:
                continue
            if not (folder / _MARK).is_file():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def write_settings_file(settings: ServeSettings) -> Path:
    """Writes the settings, token included, where only this user reads them."""
    path = Path(settings.runtime_dir) / _SETTINGS_FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(settings.to_json())
    return path
