"""What memory a load takes at its peak, in a process of its own."""

import json
import subprocess
import sys

import pytest

from support.checkpoints import make_checkpoint

# Loads a checkpoint while a thread reads /proc/self/status every 10 ms; prints bytes over the idle process.
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from support.rank_link import open_rank_link
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files
from tpmodel_worker.loading.load import load_model
from tpmodel_worker.models.config import read_model_config

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))

checkpoint, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)
torch.ones(512, 512) @ torch.ones(512, 512)
with open_rank_link() as holder:
    with ArenaClient(holder.path) as arenas:
        samples, stopped = [resident()], threading.Event()
        def poll():
            while not stopped.wait(0.01):
                samples.append(resident())
        poller = threading.Thread(target=poll)
        poller.start()
        loaded = load_model(
            read_model_config(checkpoint, world_size=1), rank=0, world_size=1,
            communicator=SingleCommunicator(torch.device("cpu")), device=torch.device("cpu"), dtype=dtype,
            load_format="safetensors", paths=list_checkpoint_files(checkpoint), dummy_seed=0, arenas=arenas,
            model_id="m", progress=lambda what, done, total: None,
        )
        stopped.set()
        poller.join()
        samples = [sample - samples[0] for sample in samples]
        print(json.dumps({"shard": loaded.bytes, "peak": max(samples), "samples": samples}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """About 200 MB in float32."""
    return make_checkpoint(
        tmp_path_factory.mktemp("large"),
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_is_within_the_shard_and_ten_percent_and_96_mebibytes(checkpoint, dtype):
    """The bound of a rank is the shard + 10% + 200 MiB over an idle one; loading itself keeps well below."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), dtype],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            "PYTHONPATH": ":".join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
    )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    assert len(measured["samples"]) > 3
    assert measured["peak"] >= measured["shard"], "the arena itself is counted"
    assert measured["peak"] <= 1.1 * measured["shard"] + (96 << 20), measured
