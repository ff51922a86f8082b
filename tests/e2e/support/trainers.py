"""What a user has who updates weights: tuned checkpoints, and the Job of examples/kubernetes that sends one."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from support.trainer import chooses
from tests.cluster import checkpoints
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.target import Target
from tests.e2e.support import long_answers
from tests.e2e.support.manifests import CLAIM
from tests.e2e.support.models import DeployedModel
from tpmodel import Client
from tpmodel_operator import names

EXAMPLES = Path(__file__).parents[3] / "examples"
MANIFEST = EXAMPLES / "kubernetes" / "send-checkpoint.yaml"
PROGRAM = EXAMPLES / "send_checkpoint.py"
SECRET, KEY = "trainer", "token"
TOKEN = "what trainer and gangs know"
JOB_SECONDS = 180.0
"""For a pod that imports torch on two busy cores, and an update."""
PROMPT = [5, 17, 256, 1024]
TOKENS = 12


@dataclass(frozen=True)
class Tuned:
    """A checkpoint whose weights are others than those of the model that is served."""

    name: str
    """Of its folder in the claim."""
    reference: Qwen3ForCausalLM
    weights: dict[str, torch.Tensor]

    def made(self, token_ids: list[int]) -> bool:
        """Whether these are the greedy tokens of these weights."""
        return chooses(self.reference, PROMPT, token_ids)


def tuned(target: Target, number: int) -> Tuned:
    """One of several, placed on every node of the local cluster; as a training run leaves them behind."""
    name = f"tuned_{number}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        shutil.copytree(checkpoints.DEFAULT_MODEL, made)
        weights = load_file(made / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for tensor in weights.values():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std().nan_to_num() * 0.5
            tensor += noise.to(tensor.dtype)
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        reference = Qwen3ForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
        if target.local is not None:
            for node in target.local.nodes:
                checkpoints.place(node, made)
    return Tuned(name, reference, weights)


def prepare(kubectl: Kubectl) -> None:
    """The Secret that trainers and gangs share, and the Job's program."""
    kubectl.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": {KEY: TOKEN}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "send-checkpoint"},
            "data": {PROGRAM.name: PROGRAM.read_text()},
        },
    )


def send(model: DeployedModel, target: Target, checkpoint: Tuned, version: int, *, gangs: str) -> str:
    """Runs the example's Job to its end; returns what it said."""
    kubectl = model.kubectl
    job = _job(model, target, checkpoint, version, gangs)
    name = job["metadata"]["name"]
    kubectl.apply(job)
    try:
        kubectl.wait("job", name, "condition=Complete", seconds=JOB_SECONDS)
    finally:
        said = kubectl.run("logs", f"job/{name}", "--all-containers", "--tail=50")
    kubectl.delete("job", name)
    return said


def _job(model: DeployedModel, target: Target, checkpoint: Tuned, version: int, gangs: str) -> Object:
    """The manifest as a user would fill it in."""
    job: Any = yaml.safe_load(MANIFEST.read_text())
    job["metadata"]["name"] = f"send-{model.name}-{version}"
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = target.worker_image
    given = {"target": f"dns:///{names.trainers_service(model.name)}:{names.CONTROL_PORT}"}
    given |= {"checkpoint": f"/model/{checkpoint.name}", "version": str(version), "gangs": gangs}
    written = dict(argument.removeprefix("--").split("=", 1) for argument in container["command"][2:])
    container["command"][2:] = [f"--{option}={value}" for option, value in (written | given).items()]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["token"]["secret"]["secretName"] = SECRET
    volumes["model"]["persistentVolumeClaim"]["claimName"] = CLAIM
    return job


def spec() -> Object:
    """Of a model that trainers may update; streams may be long."""
    return {"model": {"uri": long_answers.URI}, "auth": {"trainerToken": {"name": SECRET, "key": KEY}}}


def answer_of(leader: Object) -> list[int]:
    """Greedy tokens of one gang, asked at its leader pod."""
    with Client(f"{leader['status']['podIP']}:{names.INFERENCE_PORT}") as client:
        result = client.complete(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return list(result.token_ids[0])


def published(model: DeployedModel, service: str) -> set[str]:
    """Addresses that a headless Service has now."""
    slices = model.kubectl.list("endpointslices", selector=f"kubernetes.io/service-name={service}")
    endpoints = [endpoint for item in slices for endpoint in item.get("endpoints") or []]
    return {
        address for endpoint in endpoints if endpoint["conditions"].get("ready") for address in endpoint["addresses"]
    }
