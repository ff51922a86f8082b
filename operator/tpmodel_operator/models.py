"""The TPModels that the operator knows, each as new as anything that was read or written of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

from tpmodel_operator import records
from tpmodel_operator.api import TPModel
from tpmodel_operator.kube import Json
from tpmodel_operator.queue import Key
from tpmodel_operator.records import UnreadableModelError

Model = TPModel | UnreadableModelError


@dataclass(frozen=True, slots=True)
class Change:
    """A TPModel that needs a pass."""

    key: Key
    spec: bool
    """Whether its user changed it, rather than its status or metadata."""


class ModelStore:
    """The watch may bring an older state than our own last write answered with: the newest version counts."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._by_key: defaultdict[Key, set[str]] = defaultdict(set)
        self._delivered: dict[str, int] = {}

    def deliver(self, item: Json, *, deleted: bool = False) -> Change | None:
        """Takes in what the watch brought; returns the TPModel if it needs a pass for it."""
        metadata = item["metadata"]
        uid = metadata["uid"]
        if deleted:
            self._delivered.pop(uid, None)
            key = self._forget(uid)
            return Change(key, spec=True) if key is not None else None
        self._delivered[uid] = max(records.version(item), self._delivered.get(uid, 0))
        before = self._models.get(uid)
        key = self._keep(item)
        if key is None:
            return None
        return Change(key, spec=before is None or identity(before).generation != metadata.get("generation", 0))

    def wrote(self, item: Json) -> None:
        """Takes in the answer to a write."""
        self._keep(item)

    def get(self, key: Key) -> Model | None:
        """The TPModel of that name; the newest, while the watch has yet to tell that an older one went."""
        uids = self._by_key.get(key, ())
        return max((self._models[uid] for uid in uids), key=_version, default=None)

    def uids(self) -> Set[str]:
        """Of all TPModels."""
        return self._models.keys()

    def readable(self) -> list[TPModel]:
        """All TPModels whose spec can be read."""
        return [model for model in self._models.values() if isinstance(model, TPModel)]

    def versions(self) -> Mapping[str, int]:
        """The resource version that the watch last brought, by UID: what the watch is judged by."""
        return dict(self._delivered)

    def __len__(self) -> int:
        return len(self._models)

    def _keep(self, item: Json) -> Key | None:
        uid = item["metadata"]["uid"]
        before = self._models.get(uid)
        if before is not None and _version(before) >= records.version(item):
            return None
        try:
            model: Model = records.tpmodel(item)
        except UnreadableModelError as unreadable:
            model = unreadable
        self._models[uid] = model
        key = _key(model)
        self._by_key[key].add(uid)
        return key

    def _forget(self, uid: str) -> Key | None:
        model = self._models.pop(uid, None)
        if model is None:
            return None
        key = _key(model)
        self._by_key[key].discard(uid)
        if not self._by_key[key]:
            del self._by_key[key]
        return key


def identity(model: Model) -> TPModel:
    """Name, UID and status, which can be read even where the spec cannot."""
    return model.model if isinstance(model, UnreadableModelError) else model


def _version(model: Model) -> int:
    return int(identity(model).resource_version or 0)


def _key(model: Model) -> Key:
    known = identity(model)
    return Key(known.namespace, known.name)
