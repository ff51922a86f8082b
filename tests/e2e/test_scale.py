"""A slice of `make scale`: the same operator, control plane and simulated nodes, with fewer models."""

from __future__ import annotations

import pytest

from benchmarks.scale import Load, measure, percentile, table
from support.scale import FULL, OPERATOR_SCALE_FOREIGN_PODS, OPERATOR_SCALE_MODELS

MOST_FAULTS = 0.99 if FULL else 0.5
"""The share of faults that is answered in time: a slice has too few for a p99, and a machine with other work."""
SLACK_SECONDS = 2.0
"""What does not grow with the number of models, such as the first connections."""


@pytest.mark.timeout(1800)
def test_many_models():
    models = OPERATOR_SCALE_MODELS
    load = Load(models=models, pods=4, faults=models // 3, at_once=models // 10, foreign=OPERATOR_SCALE_FOREIGN_PODS)
    outcome = measure(load)
    print(table(load, outcome))
    assert outcome.creation < min(1.5 * outcome.floor + SLACK_SECONDS, 240)
    assert percentile(outcome.faults, MOST_FAULTS) < 1
    assert outcome.many < 10
    assert max(outcome.rss, outcome.rss_in_churn) < 300
