"""What the engine itself costs: its CPU time for each step and plan, and the plans' bytes.

    python -m benchmarks.engine_steps [--tp 1 2 4 8] [--batch 1 16 64] [--seconds 2] [--rounds 3]

A tiny model with random weights, CPU ranks, requests that decode steadily. The engine is read from outside:
CPU time of its process, and its own /metrics. How long a step takes says nothing here, where many ranks share
few cores; the engine's CPU time does not depend on that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_client import EngineClient, engine_client
from benchmarks.measured_server import MeasuredServer, measured_server

PROMPT_TOKENS = 16
MAX_MODEL_LEN = 32768
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SERVE_OPTIONS = [
    *("--load-format", "dummy", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64"),
    *("--kv-cache-memory", "512Mi", "--drain-timeout", "5"),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """One batch size of one server."""

    steps_per_second: float
    steps_per_plan: float
    engine_us_per_step: float
    engine_us_per_plan: float
    plan_us: float
    """Of that, making the plan, as tpmodel_plan_seconds counts it."""
    plan_bytes: float
    stepping_share: float
    """Rank 0's step times over the wall clock: what is missing from 1 is time without a step."""


async def measure(server: MeasuredServer, batch: int, seconds: float) -> Figures:
    """Lets a batch decode for so long, once all of it has prefilled."""
    async with engine_client(server.settings.front_socket) as client:
        for handle in range(batch):
            client.submit(handle, [2 + handle] * PROMPT_TOKENS, MAX_MODEL_LEN - PROMPT_TOKENS)
        while min(client.tokens.values()) < PROMPT_TOKENS:
            await client.read()
        figures = await _observe(server, client, seconds)
        client.cancel_all()
    return figures


async def _observe(server: MeasuredServer, client: EngineClient, seconds: float) -> Figures:
    metrics, times, begun = server.metrics(), server.cpu_times(), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        await client.read()
    after, spent, wall = server.metrics(), server.cpu_times().since(times), time.perf_counter() - begun
    change = {name: value - metrics.get(name, 0.0) for name, value in after.items()}
    steps, plans = change["tpmodel_step_seconds_count"], change["tpmodel_plan_seconds_count"]
    return Figures(
        steps_per_second=steps / wall,
        steps_per_plan=steps / plans,
        engine_us_per_step=1e6 * spent.engine / steps,
        engine_us_per_plan=1e6 * spent.engine / plans,
        plan_us=1e6 * change["tpmodel_plan_seconds_sum"] / plans,
        plan_bytes=change["tpmodel_plan_bytes_sum"] / plans,
        stepping_share=change["tpmodel_step_seconds_sum"] / wall,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores for ranks, engine and all else; engine: CPU time of its process, all threads; "
          f"the middle one of {arguments.rounds} rounds")  # fmt: skip
    print("| tp | batch | steps/s | steps/plan | engine us/step | engine us/plan | of it planning | plan bytes "
          "| stepping |")  # fmt: skip
    print("| ---: |" + " ---: |" * 8)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for tp in arguments.tp:
            with measured_server(Path(folder), tp=tp, options=SERVE_OPTIONS) as server:
                for batch in arguments.batch:
                    rounds = [asyncio.run(measure(server, batch, arguments.seconds)) for _ in range(arguments.rounds)]
                    row = sorted(rounds, key=lambda figures: figures.engine_us_per_step)[len(rounds) // 2]
                    print(
                        f"| {tp} | {batch} | {row.steps_per_second:.0f} | {row.steps_per_plan:.1f} "
                        f"| {row.engine_us_per_step:.0f} | {row.engine_us_per_plan:.0f} | {row.plan_us:.0f} "
                        f"| {row.plan_bytes:.0f} | {row.stepping_share:.0%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
