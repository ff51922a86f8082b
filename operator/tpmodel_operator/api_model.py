"""spec.model of a TPModel: which checkpoint is served, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tpmodel_operator.api_types import (
    CLAIM_RULE,
    FOLDER_RULE,
    LONGEST_TEXT,
    PATH_RULE,
    Model,
    SecretKey,
    Text,
    checked,
    must,
)
from tpmodel_operator.engine_options import OPTION_RULES

ModelUri = Annotated[
    str,
    Field(
        max_length=LONGEST_TEXT,
        json_schema_extra=checked(
            must(
                "self.startsWith('hf://') || self.startsWith('pvc://') || self.startsWith('file://') || "
                "self.startsWith('oci://')",
                "write hf://organisation/name, pvc://claim/path, file:///path (a folder of the node) or "
                "oci://registry/image:tag",
            ),
            must(
                "!self.startsWith('hf://') || "
                "self.matches('^hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$')",
                "write hf://organisation/name, such as hf://Qwen/Qwen3-8B; a branch, tag or commit goes into revision",
            ),
            CLAIM_RULE,
            FOLDER_RULE,
            must(
                r"!self.startsWith('oci://') || self.matches('^oci://[A-Za-z0-9][^\\s]*$')",
                "write oci://registry/image:tag or oci://registry/image@sha256:digest",
            ),
            PATH_RULE,
        ),
    ),
]

Revision = Annotated[
    str,
    Field(
        max_length=255,
        json_schema_extra=checked(
            must("self.matches('^[-A-Za-z0-9._/]*$')", "write a branch, tag or commit of the repository, such as main")
        ),
    ),
]

EngineOptions = Annotated[
    dict[str, Annotated[str, Field(max_length=64)]],
    Field(max_length=32, json_schema_extra=checked(*OPTION_RULES)),
]


class ModelSource(Model):
    """Which checkpoint is served, and how."""

    uri: ModelUri
    """Where the checkpoint (config.json, tokenizer, safetensors) is: hf://organisation/name is downloaded from the
    hub into the cache; pvc://claim/path is a folder of a PersistentVolumeClaim of this namespace; file:///path is a
    folder of the node (only under prefixes that the operator's administrator allows); oci://image is an image volume.
    Changing it is a rollout."""
    revision: Revision = ""
    """For hf:// only: branch, tag or commit; left out: the repository's default branch. It is resolved to a commit
    once per rollout, so that all gangs of a rollout serve the same weights."""
    secret_ref: SecretKey | None = None
    """For hf:// only: the Secret key with the hub's token, for gated and private repositories."""
    served_name: Text = ""
    """The model's name in the APIs. Left out: the last part of uri."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and computation; auto: what the checkpoint says."""
    quantization: Literal["none"] = "none"
    """Quantization of the weights; none is the only value so far."""
    max_model_len: int = Field(
        default=0,
        ge=0,
        le=16_777_216,
        json_schema_extra=checked(
            must("self != 1", "a prompt and an answer need at least 2 tokens: write 2 or more, or leave it out")
        ),
    )
    """Longest context, tokens of prompt and output together; 0: what the checkpoint says."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """dummy makes random weights from config.json alone, for tests of capacity and networks."""
    engine_options: EngineOptions = {}
    """Settings of the engine by name; values are strings. max_num_seqs (64): requests that run at once.
    max_num_batched_tokens (2048): most tokens of one step. block_size (16): tokens in a block of the KV cache.
    kv_cache_memory: KV cache of each rank, such as 2Gi; left out: what is free. prefix_cache (true). state_snapshots:
    of models that keep recurrent state, snapshots of it for the prefix cache, which is off with 0; left out: a tenth
    of the KV cache. queue_limit (1024): requests that may wait. api_processes (1): processes that face clients.
    communicator (auto, shared_memory, gloo, nccl). step_deadline (5, on cpu 30): least seconds before a step counts as
    hung. respawn (fork): how a dead rank is replaced; spare is fastest and keeps a CUDA context on every device of a
    pod, cold is slowest and keeps nothing. In mode InPlace: rebuild_limit (10): rebuilds in place, without
    rebuild_stability_window (300) seconds of serving between them, after which all pods restart. rebuild_wait (60):
    seconds that a request without a deadline waits for a rebuild. expert_parallel (false): every rank holds some
    experts of a mixture of experts whole, instead of a part of each. dummy_seed: for loadFormat dummy."""
