"""The checkpoint's tokenizer (tokenizer.json), with the special tokens that tokenizer_config.json names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tpmodel_worker.api.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from tpmodel_worker.models.config import ConfigError

_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or the next free one above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back. Its methods may be called from several threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        """tokenizer: will be changed; config: tokenizer_config.json."""
        self._tokenizer = tokenizer
        self.special_tokens = _special_tokens(config)
        """Named special tokens ("eos_token" and so on) as chat templates want them."""
        _mark_special(tokenizer, config, self.special_tokens)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        decoders = _decoder_types(json.loads(tokenizer.to_str())["decoder"])
        self._byte_level = decoders == ["ByteLevel"]
        self._byte_ids = _byte_fallback_ids(tokenizer) if "ByteFallback" in decoders else frozenset[int]()
        self._alphabet = _byte_alphabet()
        # Filled as ids come by: vocabularies are large, and most of one is never seen.
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer | None:
        """Reads a checkpoint folder's tokenizer; None where it has none.

        Raises:
            ConfigError: a file is there and cannot be read.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        return cls(read_tokenizer(path), read_tokenizer_config(folder))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text; add_special_tokens puts those before and behind it that the checkpoint wants there."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ids; unknown ids have none."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one id alone, special or not; U+FFFD where it is a part of a character."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; those of its text where the tokenizer knows no bytes."""
        if not self._byte_level:
            return self.token_text(token_id).encode()
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh detokenizer for one sample."""
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        if self._byte_level:
            token_bytes = self.token_bytes
            return ByteLevelDetokenizer(lambda token_id: b"" if token_id in skipped else token_bytes(token_id))
        return WindowDetokenizer(
            lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False),
            silent=lambda token_id: token_id in skipped or self._tokenizer.id_to_token(token_id) is None,
            byte_ids=self._byte_ids,
        )

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(map(self._alphabet.__getitem__, token))
        except KeyError:
            # An added token is written as its text.
            return token.encode()


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json; ConfigError naming the file when it cannot be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise for a bad file
        raise ConfigError(f"{path}: {error}") from error


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """tokenizer_config.json of a checkpoint folder; empty where there is none. Raises ConfigError."""
    path = Path(folder) / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    named: dict[str, str | list[str]] = {}
    for name in _NAMED_SPECIAL_TOKENS:
        if content := _content(config.get(name)):
            named[name] = content
    additional = [content for token in config.get("additional_special_tokens") or [] if (content := _content(token))]
    if additional:
        named["additional_special_tokens"] = additional
    return named


def _content(token: Any) -> str:
    """A token's text: configurations write it plainly, or as an object with flags."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _mark_special(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str | list[str]]
) -> None:
    """Marks as special what only tokenizer_config.json calls so. Tokens outside the vocabulary stay outside."""
    texts = [text for value in named.values() for text in ([value] if isinstance(value, str) else value)]
    texts += [
        _content(token)
        for token in (config.get("added_tokens_decoder") or {}).values()
        if isinstance(token, Mapping) and token.get("special")
    ]
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in dict.fromkeys(texts) if text and text not in special]
    tokenizer.add_special_tokens([text for text in missing if tokenizer.token_to_id(text) is not None])


def _decoder_types(decoder: Mapping[str, Any] | None) -> list[str]:
    """The kinds of decoder in tokenizer.json, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _decoder_types(part)]
    return [decoder["type"]]


def _byte_fallback_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)
