"""What loading costs a real rank process: memory at its peak, and bytes out of the files."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint
from support.rank_gang import RankGang, new_world
from tpmodel.v1 import worker_pb2 as pb

POLL_SECONDS = 0.01
ALLOWANCE_BYTES = 200 << 20
WORLD_SIZE = 2


class PeakMemory:
    """Polls RssAnon + RssShmem of a process; a context manager."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self.samples = [self._resident()]

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Bytes at the peak over the beginning."""
        return max(self.samples) - self.samples[0]

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.samples.append(self._resident())

    def _resident(self) -> int:
        fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
        return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 590 MB, so that a second copy of a rank's shard in float32 would not fit into the allowance."""
    return make_checkpoint(
        tmp_path_factory.mktemp("large"),
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_rank_stays_within_its_shard_at_the_peak_and_reads_only_its_slices(
    checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    """Within the shard + 10% + 200 MiB over an idle rank after import, and 1.05 times its bytes."""
    gang = RankGang(tmp_path, WORLD_SIZE)
    try:
        async with new_world(gang) as world:
            await world.init()
            peaks = [PeakMemory(process.pid) for process in gang.processes]
            with peaks[0], peaks[1]:
                replies = await world.control(
                    timeout=120,
                    load_dense_shard=pb.LoadDenseShardRequest(
                        model_id="test",
                        config_json=(checkpoint / "config.json").read_text(),
                        safetensors_paths=[str(checkpoint / "model.safetensors")],
                        load_format="safetensors",
                        dtype=dtype,
                        max_model_len=64,
                        max_num_seqs=4,
                        max_num_batched_tokens=64,
                        block_size=8,
                        kv_cache_bytes=4 << 20,
                    ),
                )
    finally:
        gang.close()
    file_bytes_per_byte = {"float32": 1, "bfloat16": 2}[dtype]
    for reply, peak in zip(replies, peaks, strict=True):
        loaded = reply.load_dense_shard_ok
        assert len(peak.samples) > 3
        assert loaded.bytes <= peak.growth <= 1.1 * loaded.bytes + ALLOWANCE_BYTES, peak.growth
        assert 0 < loaded.bytes_read <= 1.05 * loaded.bytes * file_bytes_per_byte
