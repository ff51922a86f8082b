"""Files that hold one token each: a Secret that is mounted, or one that a user has written."""

from __future__ import annotations

from pathlib import Path


class TokenFileError(Exception):
    """No token can be had from the file; the message names file and remedy."""


def read_token(path: str | Path) -> str:
    """The file's content without the white space around it.

    Raises:
        TokenFileError: it cannot be read, or holds what no call could present.
    """
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"{path}: {error}") from error
    if not token:
        raise TokenFileError(f"{path}: the file is empty")
    try:
        return check_token(token)
    except ValueError as error:
        raise TokenFileError(f"{path}: {error}") from error


def check_token(token: str) -> str:
    """The token, where calls can present it. Raises ValueError."""
    if not token:
        raise ValueError("the token is missing")
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ValueError("a token is one line of printable ASCII characters, without the line's end")
    return token
