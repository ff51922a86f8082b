"""A model hub as far as it is needed here: which files a revision has, and their bytes from any offset."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx

from tpmodel_worker.supervisor.configuration import ConfigurationError

CONFIG = "config.json"
SCHEME = "hf://"
DEFAULT_ENDPOINT = "https://huggingface.co"
_DEFAULT_REVISION = "main"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_URI = re.compile(rf"{SCHEME}({_NAME})/({_NAME})(?:@(.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_NO_RETRY_HELPS = frozenset({400, 401, 403, 404, 410, 451})


class HubUnavailableError(Exception):
    """The hub did not answer as it should, this time."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on a hub."""

    organisation: str
    name: str
    revision: str

    @classmethod
    def parse(cls, uri: str, revision: str = "") -> Self:
        """Reads hf://organisation/name[@revision].

        Raises:
            ConfigurationError: it is none, or names two revisions.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise ConfigurationError(f"--model-uri {uri}: write hf://organisation/name, such as hf://Qwen/Qwen3-8B")
        organisation, name, within = match.groups()
        if within and revision and within != revision:
            raise ConfigurationError(f"--model-uri {uri} and --model-revision {revision} differ: give one of them")
        return cls(organisation, name, within or revision or _DEFAULT_REVISION)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}@{self.revision}"

    @property
    def repository(self) -> str:
        """organisation/name"""
        return f"{self.organisation}/{self.name}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never mean something else."""
        return _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit, with what its content must add up to."""

    name: str
    size: int
    sha256: str
    """Of large files; empty for the others."""
    git_sha1: str
    """Git's name of the content, for files that have no sha256."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A revision resolved to its commit."""

    commit: str
    files: Mapping[str, HubFile]
    """By name; files in folders are left out, a checkpoint has none."""


class Hub:
    """Blocking client of one hub; any thread may call it."""

    def __init__(self, endpoint: str, token: str) -> None:
        """token: "" for what everybody may read."""
        self._endpoint = endpoint.rstrip("/")
        # Answers are wanted as they are stored: sizes and offsets count stored bytes.
        headers = {"Accept-Encoding": "identity", "User-Agent": "tpmodel"}
        if token:
            # Never sent on to another host: httpx drops it where a redirect leads away.
            headers["Authorization"] = f"Bearer {token}"
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True)

    def close(self) -> None:
        """Ends every connection; calls under way fail."""
        self._client.close()

    def snapshot(self, source: ModelSource) -> Snapshot:
        """Resolves a revision.

        Raises:
            ConfigurationError: there is no such model or revision, or the token does not reach it.
            HubUnavailableError: ask again later.
        """
        url = f"{self._endpoint}/api/models/{source.repository}/revision/{quote(source.revision, safe='')}"
        try:
            response = self._client.get(url, params={"blobs": "true"})
        except httpx.HTTPError as error:
            raise HubUnavailableError(f"{self._endpoint}: {_text(error)}") from error
        self._check(response, str(source))
        try:
            answer = response.json()
            files = [_read_file(entry) for entry in answer["siblings"] if "/" not in entry["rfilename"]]
            return Snapshot(answer["sha"], {file.name: file for file in files})
        except (ValueError, KeyError, TypeError) as error:
            raise HubUnavailableError(f"{url}: this is not what a hub answers ({error!r})") from error

    @contextlib.contextmanager
    def read(self, source: ModelSource, commit: str, file: HubFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The file's bytes from an offset on, while the connection lasts.

        Raises:
            ConfigurationError: the file is not there, or not for this token.
            HubUnavailableError: ask again later, from where the bytes ended.
        """
        url = f"{self._endpoint}/{source.repository}/resolve/{commit}/{quote(file.name)}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                self._check(response, f"{source}: {file.name}")
                if offset and response.status_code != httpx.codes.PARTIAL_CONTENT:
                    yield _skip(response.iter_raw(), offset)
                else:
                    yield response.iter_raw()
        except httpx.HTTPError as error:
            raise HubUnavailableError(f"{url}: {_text(error)}") from error

    def _check(self, response: httpx.Response, what: str) -> None:
        code = response.status_code
        if response.is_success:
            return
        said = response.headers.get("X-Error-Message", "")
        answer = f"{self._endpoint} answers {code}{f' ({said})' if said else ''}"
        if code not in _NO_RETRY_HELPS:
            raise HubUnavailableError(f"{what}: {answer}")
        remedy = "check name and revision"
        if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            remedy = "check its name, and that HF_TOKEN holds a token that may read it"
        raise ConfigurationError(f"{what}: {answer}: {remedy}")


def _read_file(entry: Mapping[str, Any]) -> HubFile:
    large = entry.get("lfs") or {}
    return HubFile(entry["rfilename"], int(entry["size"]), large.get("sha256", ""), entry.get("blobId") or "")


def _skip(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """What follows the first `count` bytes: a server that knows no ranges sends them again."""
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count = max(0, count - len(chunk))


def _text(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
