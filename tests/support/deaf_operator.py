"""The operator with a TPModel watch that looks alive and brings nothing, as a zombie of kopf's would."""

from __future__ import annotations

from typing import Any

from tpmodel_operator.handlers import ModelWatch
from tpmodel_operator.main import main


def make_deaf() -> None:
    """kopf's events are dropped from now on."""
    registry = ModelWatch._registry

    def deaf(watch: ModelWatch) -> Any:
        watch.deliver = lambda item, deleted: None
        return registry(watch)

    ModelWatch._registry = deaf  # type: ignore[method-assign]


if __name__ == "__main__":
    make_deaf()
    main()
