"""Reads a JSON object key by key and refuses what nobody read, so that no setting is ever ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tpmodel_worker.models.config_types import ConfigError


class ConfigReader:
    """Typed access to one JSON object. A null counts as absent.

    Every method raises ConfigError naming the key and the value that does not fit.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._where = where
        self._unread = set(self._values)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value. Does not count as reading it."""
        return key in self._values

    def raw(self, key: str) -> Any:
        """The value as JSON gave it, None where absent."""
        self._unread.discard(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._value_or(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, value, f"expected a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, whole or not."""
        value = self._value_or(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "expected a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if not 0 < value < float("inf"):
            raise self.error(key, value, "expected a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value_or(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "expected true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value_or(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "expected a string")
        return value

    def section(self, key: str) -> ConfigReader:
        """The object under a key, to be read and finished like this one; its errors name both."""
        value = self.raw(key)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "expected an object")
        return ConfigReader(value, f"{self._where}: {key}")

    def require(self, key: str, only: object, *, because: str) -> None:
        """Accepts a key that this code honours for one value only."""
        value = self.raw(key)
        if value is not None and (value != only or isinstance(value, bool) != isinstance(only, bool)):
            raise self.error(key, value, f"only {only!r} is supported: {because}")

    def without_effect(self, keys: Iterable[str]) -> None:
        """Passes over keys that change nothing about inference."""
        self._unread.difference_update(keys)

    def finish(self) -> None:
        """Raises ConfigError for a key that nothing above has read."""
        for key in sorted(self._unread):
            raise self.error(key, self._values[key], "this key is not supported and would change the results")

    def error(self, key: str, value: object, what: str) -> ConfigError:
        """An error about a key, ready to be raised."""
        return ConfigError(f"{self._where}: {key} = {value!r}: {what}")

    def _value_or(self, key: str, default: object) -> Any:
        value = self.raw(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self._where}: {key} is missing")
        return default
