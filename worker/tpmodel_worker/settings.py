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

    model_uri: str = ""
    """Where the model comes from, as users name it; hf://... is downloaded by the supervisor into cache_dir."""
    model_revision: str = ""
    """Branch, tag or commit of an hf:// model; the commit, once it has been downloaded."""
    cache_dir: str = ""
    """Folder that may be shared with other pods and outlives them: downloads."""

    # The gang.
    world_size: int = 1
    ranks_per_pod: int = 0
    """0: all ranks are in one pod."""
    expert_parallel: bool = False
    """Mixture of experts: whether every rank holds some experts whole, instead of a part of each."""
    pod_index: int = 0
    """0 is the leader pod, which has the engine and faces the clients."""
    device: Device = "cpu"
    communicator: Literal["auto", "shared_memory", "gloo", "nccl"] = "auto"
    share_devices: bool = False
    """Whether ranks share CUDA devices where there are more of them; slow, for development."""
    respawn: Literal["cold", "fork", "spare"] = "fork"
    """How a rank's process comes about: cold by a new interpreter, fork from one that has imported torch, spare by
    promoting a process that was forked ahead and, on CUDA, has a context on every device of its pod."""
    recovery_mode: Literal["Restart", "InPlace"] = "Restart"
    """What a fault of the serving world does. Restart: every pod ends with 75, and the gang is started again.
    InPlace: dead processes are replaced, the world is rebuilt at the next epoch, and requests go on."""
    attempt: int = 1
    pod_uid: str = "local"
    pod_name: str = "local"
    address: str = "127.0.0.1"
    """IP of this pod, where its rank, supervisor and store ports listen."""
    gang_dir: str = ""
    """Folder in which the operator leaves word while the pod runs (gang_files.py); empty: there is no operator."""
    leader_host: str = ""
    """Name or IP of the leader pod, for the other pods."""
    token: str = ""
    """The gang's secret, for its own processes; the supervisor draws one where it was given none."""
    trainer_token_file: str = ""
    """Holds the token that WeightService takes, and may change; empty: there are no weight updates."""

    persist_updates: str = ""
    """Folder that outlives the pods, where committed weights are kept; empty: nowhere."""

    weights_from: tuple[str, ...] = ()
    """Control ports (host:port; a name stands for all its addresses) of gangs with the same token, from which weights
    that this gang does not have are copied."""
    weights_source: str = ""
    """What the operator calls the checkpoint that versions count from: weights of another one are not copied."""

    # Scheduling.
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    """Most tokens that one step computes; longer prompts go in chunks."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    kv_cache_bytes: int = 0
    """Bytes of each rank's KV cache; 0: chosen by what is free."""
    prefix_cache: bool = True
    state_snapshots: int | None = None
    """Of models that keep recurrent state: snapshots of it for the prefix cache, which is off with 0; None: by what is
    free."""
    queue_limit: int = 1024
    """Requests that may wait; one more is RESOURCE_EXHAUSTED."""

    # Handing requests over to other gangs.
    kv_sources: tuple[str, ...] = ()
    """Control ports (host:port) of gangs with the same token, whose KV caches requests may name as their source."""
    kv_transfer_deadline: float = 30.0
    """Seconds that connecting two ranks, and one piece of a cache, may take."""

    # Rebuilding in place.
    rebuild_wait: float = 60.0
    """Seconds that a request without a deadline of its own waits for a rebuild before it fails UNAVAILABLE."""
    rebuild_limit: int = 10
    """Rebuilds, counted over restarts of engine and container, after which the gang restarts (75)."""
    rebuild_stability_window: float = 300.0
    """Seconds of serving that give the whole rebuild_limit back."""
    state_dir: str = ""
    """Folder that outlives the container but not the pod, for the count of rebuilds; empty: runtime_dir."""

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
    tls_dir: str = ""
    """Folder with tls.crt and tls.key: the ports for clients speak TLS; empty: plain text."""

    # Deadlines, seconds.
    drain_timeout: float = 120.0
    """From the order to drain to the end of the last stream."""
    endpoint_propagation: float = 0.0
    """How long a draining leader still takes new requests: others learn only then that it is not ready."""
    init_timeout: float = 60.0
    progress_deadline: float = 600.0
    """A download or load that makes no progress for this long ends the pod."""
    step_deadline: float = 0.0
    """Least time a step may take before it counts as hung; 0: what least_step_deadline says."""

    # Where things lie on this machine.
    runtime_dir: str = ""
    """Short-lived folder of this pod: Unix sockets, metrics files."""
    log_format: Literal["auto", "json", "text"] = "auto"

    @property
    def rebuilds(self) -> bool:
        """Whether a lost world is rebuilt in place."""
        return self.recovery_mode == "InPlace"

    @property
    def least_step_deadline(self) -> float:
        """Seconds; on CPU ranks the first step of a long prompt, before there is a running mean, takes its time."""
        return self.step_deadline or (5.0 if self.device == "cuda" else 30.0)

    @property
    def ranks_here(self) -> range:
        """The ranks of this pod."""
        count = self.ranks_per_pod or self.world_size
        return range(self.pod_index * count, min((self.pod_index + 1) * count, self.world_size))

    @property
    def pods(self) -> int:
        """Of the gang."""
        return max(1, -(-self.world_size // (self.ranks_per_pod or self.world_size or 1)))

    @property
    def leads(self) -> bool:
        """Whether this is the leader pod."""
        return self.pod_index == 0

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
    def rebuilds_file(self) -> Path:
        """Where the engine counts rebuilds."""
        return Path(self.state_dir or self.runtime_dir) / f"rebuilds-{self.pod_uid}.json"

    @property
    def weights_version_file(self) -> Path:
        """Where the engine notes which version of the weights it committed."""
        return Path(self.state_dir or self.runtime_dir) / f"weights-version-{self.pod_uid}"

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
        for name in ("kv_sources", "weights_from"):
            values[name] = tuple(values[name])
        return cls(**values)
