"""Which image a rollout uses. A newer operator, with a newer default, moves nothing by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tpmodel_operator import names, weights
from tpmodel_operator.api import TPModel
from tpmodel_operator.gangs import Existence, Gang
from tpmodel_operator.revision import revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What all gangs should be made from."""

    image: str
    revision: str
    newer_image: str = ""
    """The operator's default, where it is another than the one in use."""


def resolve(model: TPModel, gangs: Iterable[Gang], default_image: str) -> Target:
    """The image as the spec names it, else the one of the rollout under way, else the default."""
    spec = model.spec
    if spec.image.reference:
        image = spec.image.reference
        return Target(image=image, revision=revision(spec, image, weights.reset(model)))
    image = _unnamed(model, gangs, default_image)
    return Target(
        image=image,
        revision=revision(spec, image, weights.reset(model)),
        newer_image=default_image if image != default_image else "",
    )


def _unnamed(model: TPModel, gangs: Iterable[Gang], default_image: str) -> str:
    if default_image and model.annotations.get(names.TAKE_IMAGE_ANNOTATION) == default_image:
        return default_image
    pinned = model.status.image
    if pinned and revision(model.spec, pinned, weights.reset(model)) == model.status.revision:
        return pinned
    return _of_rollback(model, gangs) or default_image


def _of_rollback(model: TPModel, gangs: Iterable[Gang]) -> str:
    """A spec set back finds the gangs that still serve it, with the image that they were made with."""
    found = Counter(
        gang.statefulset.image
        for gang in gangs
        if gang.existence is Existence.LIVE
        and gang.statefulset is not None
        and gang.status.revision == revision(model.spec, gang.statefulset.image, weights.reset(model))
    )
    return max(found, key=lambda image: (found[image], image), default="")
