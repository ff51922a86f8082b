"""Where weights come from makes no difference to what is served: one file, many, or none at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from support.checkpoints import BASE, make_checkpoint, random_prompts
from support.oracle import Reference, TieLedger
from tpmodel import Client
from tpmodel.local import LocalServer
from tpmodel_worker.loading.dummy import dummy_tensor

OPTIONS = ["--dtype", "float32", "--kv-cache-memory", "4M"]
TOKENS = 32
SEED = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tie_word_embeddings=True, num_key_value_heads=2)


def check_served(folder: Path, reference: Reference, *, tp: int, options: list[str]) -> None:
    ledger = TieLedger()
    prompts = random_prompts(4, shortest=3, longest=60, vocabulary=BASE["vocab_size"], seed=tp)
    with LocalServer(folder, tp=tp, device="cpu", options=[*OPTIONS, *options]) as server:
        with Client(server.target) as client:
            for index, prompt in enumerate(prompts):
                result = client.complete(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
                reference.check_greedy(prompt, result.token_ids[0], ledger, what=f"tp {tp}, prompt {index}")


@pytest.mark.parametrize("with_index", [True, False])
def test_a_checkpoint_in_several_files_is_served(checkpoint: Path, tmp_path: Path, with_index: bool) -> None:
    tensors = sorted(load_file(checkpoint / "model.safetensors").items())
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weight_map = {}
    for part in range(3):
        file = f"part-{part}.safetensors"
        save_file(dict(tensors[part::3]), tmp_path / file)
        weight_map |= {name: file for name, _ in tensors[part::3]}
    if with_index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        save_file({"unexpected": torch.zeros(1)}, tmp_path / "not-in-the-index.safetensors")
    check_served(tmp_path, Reference(checkpoint), tp=2, options=[])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_dummy_weights_are_the_documented_function_at_any_size(checkpoint: Path, tmp_path: Path, tp: int) -> None:
    """transformers, filled with the same function by the checkpoint's tensor names, makes the same tokens."""
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    check_served(
        tmp_path, dummy_reference(tmp_path), tp=tp, options=["--load-format", "dummy", "--dummy-seed", str(SEED)]
    )


def dummy_reference(folder: Path) -> Reference:
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dummy_tensor(SEED, name, parameter.shape))
    model.tie_weights()
    reference = Reference.__new__(Reference)
    reference.model = model.float().eval()
    return reference
