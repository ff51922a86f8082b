"""`kubectl tpmodel` with real pods: logs, generate and port-forward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kubectl_plugin import Plugin
from tests.cluster.kubectl import Kubectl
from tests.cluster.target import Target
from tests.e2e.support.clients import Client as ClientPod
from tests.e2e.support.models import DeployedModel, deployed
from tpmodel import Client

MODEL = "plugged"
PROMPT = [5, 17, 256, 1024]
OPTIONS = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(models: Kubectl) -> Iterator[DeployedModel]:
    with deployed(models, MODEL) as model:
        yield model


@pytest.fixture
def plugin(target: Target, tmp_path: Path) -> Plugin:
    return Plugin.install(tmp_path, target.kubectl.kubeconfig)


def within(model: DeployedModel) -> str:
    return f"--namespace={model.kubectl.namespace}"


def test_status_shows_every_pod_with_its_node(model: DeployedModel, plugin: Plugin) -> None:
    # A gang is Ready when its leader pod is: the other's probe may come a little later.
    model.kubectl.run("wait", "pod", f"--selector=tpmodel.dev/model={MODEL}", "--for=condition=Ready", "--timeout=60s")
    lines = plugin.run("status", MODEL, within(model)).stdout.splitlines()
    assert lines[0] == f"TPModel {model.kubectl.namespace}/{MODEL}: Ready, 1/1 gangs ready"
    for pod in model.pods():
        (line,) = (line for line in lines if line.split()[:1] == [pod["metadata"]["name"]])
        assert line.split()[1:] == [pod["spec"]["nodeName"], "yes", "0", "running"]


def test_generate_gives_what_a_client_in_the_cluster_gets(
    model: DeployedModel, plugin: Plugin, client: ClientPod
) -> None:
    ids = ",".join(str(token) for token in PROMPT)
    options = ["--max-tokens=16", "--temperature=0", "--ignore-eos", "--json"]
    result = plugin.run("generate", MODEL, f"--token-ids={ids}", *options, within(model))
    assert result.returncode == 0, result.stderr
    chunks = [json.loads(line) for line in result.stdout.splitlines()]
    answer = [token for chunk in chunks[:-1] for token in chunk["token_ids"]]
    assert [answer] == client.complete(model.url, [PROMPT], **OPTIONS)


def test_generate_streams_text(model: DeployedModel, plugin: Plugin) -> None:
    result = plugin.run("generate", MODEL, "Tell me a story", "--max-tokens=8", "--temperature=0", within(model))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_logs_of_a_gang_are_those_of_all_its_pods(model: DeployedModel, plugin: Plugin) -> None:
    result = plugin.run("logs", MODEL, "--gang=0", within(model))
    assert result.returncode == 0, result.stderr
    labels = [re.match(r"\[([^\]]+)\] ", line) for line in result.stdout.splitlines()]
    assert {label[1] for label in labels if label} == {pod["metadata"]["name"] for pod in model.pods()}
    assert all(labels)


def test_a_port_forward_survives_its_gangs_restart(model: DeployedModel, plugin: Plugin) -> None:
    with plugin.running("port-forward", MODEL, "--port=0", "--http-port=0", within(model)) as process:
        assert process.stdout is not None
        found = re.match(r"(127\.0\.0\.1:\d+) \(gRPC\)", process.stdout.readline())
        assert found is not None
        with Client(found[1]) as near:
            before = near.complete(PROMPT, **OPTIONS).token_ids
        (leader,) = model.leaders()
        attempt = model.gang()["attempt"]
        model.kubectl.delete("pod", leader["metadata"]["name"], wait=False)
        model.until(lambda: model.gang()["attempt"] > attempt, what="a restart")
        model.wait_ready()
        again = process.stdout.readline()
        assert again.startswith(found[1])
        with Client(found[1]) as near:
            assert near.complete(PROMPT, **OPTIONS).token_ids == before


def test_a_model_that_does_not_serve_says_why(models: Kubectl, plugin: Plugin) -> None:
    missing = {"model": {"uri": "pvc://models/nothing-here"}}
    with deployed(models, "mute", ready=False, **missing) as model:
        model.until(lambda: model.condition("Stalled").get("status") == "True", what="Stalled")
        result = plugin.run("generate", "mute", "Hi", within(model))
    assert result.returncode == 1
    assert "mute has no gang that takes requests: ConfigurationRefused" in result.stderr
    assert "nothing-here has no config.json" in result.stderr
