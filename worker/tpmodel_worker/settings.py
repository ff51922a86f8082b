"""Everything that one gang's processes are told at their start, as one value."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings of one pod of a gang; the same value reaches every process of the pod.

    Ports are concrete by the time a child process reads them: the supervisor has reserved them.
    """

    # The model.
    model_path: str
    """Folder with config.json, the tokenizer and (unless load_format is dummy) safetensors files."""
    model_id: str
    served_name: str
    dtype: str = ""
    """float32, bfloat16 or float16; empty: what config.json says."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    dummy_seed: int = 0
    max_model_len: int = 0
    """Tokens of prompt and output together; the supervisor fills 0 in from config.json."""

    # The gang.
    world_size: int = 1
    device: Device = "cpu"
    communicator: Literal["auto", "shared_memory", "gloo", "nccl"] = "auto"
    attempt: int = 1
    pod_uid: str = "local"
    address: str = "127.0.0.1"
    """IP of this pod, where its rank, supervisor and store ports listen."""
    token: str = ""
    """The gang's secret; the supervisor draws one where it was given none."""

    # Scheduling.
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    """Most tokens that one step computes; longer prompts go in chunks."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    kv_cache_bytes: int = 0
    """Bytes of each rank's KV cache; 0: chosen by what is free."""
    prefix_cache: bool = True
    queue_limit: int = 1024
    """Requests that may wait; one more is RESOURCE_EXHAUSTED."""

    # Where clients come in.
    host: str = "127.0.0.1"
    port: int = 9000
    http_port: int = 8000
    control_port: int = 9001
    health_port: int = 9002
    metrics_port: int = 9003
    api_processes: int = 1
    api_key: str = ""
    """When set, clients must send it as a bearer token."""

    # Deadlines, seconds.
    drain_timeout: float = 120.0
    init_timeout: float = 60.0
    progress_deadline: float = 600.0
    """A load that makes no progress for this long ends the pod with 75."""
    step_deadline: float = 30.0
    """Least time a step may take before it counts as hung."""

    # Where things lie on this machine.
    runtime_dir: str = ""
    """Short-lived folder of this pod: Unix sockets, metrics files."""
    log_format: Literal["auto", "json", "text"] = "auto"

    @property
    def front_socket(self) -> Path:
        """The engine listens here for api processes (pod.proto: FrontRequest, FrontResponse)."""
        return Path(self.runtime_dir) / "front.sock"

    @property
    def report_socket(self) -> Path:
        """The supervisor listens here for engine and api (pod.proto: ProcessReport, EngineCommand)."""
        return Path(self.runtime_dir) / "report.sock"

    @property
    def rank_socket(self) -> Path:
        """The supervisor listens here for its ranks (pod.proto: RankLinkRequest, RankLinkResponse)."""
        return Path(self.runtime_dir) / "rank.sock"

    @property
    def metrics_dir(self) -> Path:
        """Files through which all processes of the pod share their metrics."""
        return Path(self.runtime_dir) / "metrics"

    def to_json(self) -> str:
        """The settings as JSON, for the environment or command line of a child process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what to_json wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)
