"""From `kubectl apply` of a TPModel to tokens, and what `kubectl` shows of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kubectl import Kubectl
from tests.e2e.support import reference
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel, deployed

MODEL = "first"


@pytest.fixture(scope="module")
def first(models: Kubectl) -> Iterator[DeployedModel]:
    with deployed(models, MODEL) as model:
        yield model


def test_a_gang_of_two_pods_answers_through_its_service_with_the_tokens_of_tpmodel_serve(
    first: DeployedModel, client: Client
) -> None:
    prompts = reference.prompts(4)
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    expected = reference.local_answers(prompts, **options)
    assert len(first.pods()) == 2
    assert client.complete(first.url, prompts, **options) == expected
    # The other Service, for clients that do not balance.
    assert client.complete(f"{MODEL}.models.svc:9000", prompts, **options) == expected
