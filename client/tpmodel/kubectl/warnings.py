"""Why pods do not start, as far as only Events tell: a Secret that cannot be mounted, a pod that is not admitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from tpmodel.kubectl.kubectl import Kubectl
from tpmodel.kubectl.view import GangView, ModelView

Json = Mapping[str, Any]


def with_warnings(kubectl: Kubectl, model: ModelView) -> ModelView:
    """The model with the newest Warning of each pod that has not started, and of each gang without pods."""
    if all(gang.pods and all(pod.started for pod in gang.pods) for gang in model.gangs):
        return model
    warnings = newest(kubectl.items("events", "--field-selector=type=Warning"))
    return dataclasses.replace(model, gangs=tuple(_warned(gang, warnings) for gang in model.gangs))


def newest(events: Iterable[Json]) -> dict[str, str]:
    """Reason and message of the last event about each object, by the object's UID."""
    found = {}
    for event in sorted(events, key=_when):
        message = " ".join((event.get("message") or "").split())
        found[event["involvedObject"].get("uid", "")] = f"{event.get('reason', '')}: {message}"
    return found


def _warned(gang: GangView, warnings: Mapping[str, str]) -> GangView:
    pods = tuple(
        pod if pod.started else dataclasses.replace(pod, warning=warnings.get(pod.uid, "")) for pod in gang.pods
    )
    return dataclasses.replace(gang, pods=pods, warning="" if gang.pods else warnings.get(gang.uid, ""))


def _when(event: Json) -> str:
    """Times of one form sort as text."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((time for time in times if time), event["metadata"].get("creationTimestamp", ""))
