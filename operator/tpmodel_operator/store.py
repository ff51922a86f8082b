"""What the watches hold: records by UID, and by the TPModel that they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tpmodel_operator.queue import Key


class Record(Protocol):
    """What PodRecord and StatefulSetRecord have in common."""

    @property
    def namespace(self) -> str:
        """Namespace of the object and its TPModel."""
        ...

    @property
    def model(self) -> str:
        """Name of the TPModel."""
        ...


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Entry(Generic[R]):
    """An object as a watch last saw it; record is None where its labels say of no gang."""

    version: int
    namespace: str
    record: R | None


class Store(Generic[R]):
    """Objects of one kind. Two of the same name but another UID are two objects: a pod that was made again must
    not hide the end of the one before."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[R]] = {}
        self._by_model: defaultdict[Key, dict[str, R]] = defaultdict(dict)

    def put(self, uid: str, entry: Entry[R]) -> Key | None:
        """Takes the object in; returns the TPModel if that changed anything for it."""
        before = self._entries.get(uid)
        if before is not None and before.version > entry.version:
            return None
        self._entries[uid] = entry
        if before is not None and before.record == entry.record:
            return None
        left = self._unlink(uid, before)
        if entry.record is None:
            return left
        key = Key(entry.record.namespace, entry.record.model)
        self._by_model[key][uid] = entry.record
        return key

    def remove(self, uid: str) -> Key | None:
        """Lets the object go; returns the TPModel that it belonged to."""
        return self._unlink(uid, self._entries.pop(uid, None))

    def get(self, uid: str) -> R | None:
        """The record of one object."""
        entry = self._entries.get(uid)
        return entry.record if entry is not None else None

    def of(self, key: Key) -> tuple[R, ...]:
        """The records of one TPModel."""
        return tuple(self._by_model[key].values()) if key in self._by_model else ()

    def all(self) -> Iterable[R]:
        """Every record."""
        return (entry.record for entry in self._entries.values() if entry.record is not None)

    def uids(self, namespace: str | None) -> set[str]:
        """Of all objects, or of one namespace's."""
        return {uid for uid, entry in self._entries.items() if namespace in (None, entry.namespace)}

    def versions(self) -> Mapping[str, int]:
        """The resource version held of each object."""
        return {uid: entry.version for uid, entry in self._entries.items()}

    def _unlink(self, uid: str, entry: Entry[R] | None) -> Key | None:
        if entry is None or entry.record is None:
            return None
        key = Key(entry.record.namespace, entry.record.model)
        self._by_model[key].pop(uid, None)
        if not self._by_model[key]:
            del self._by_model[key]
        return key
