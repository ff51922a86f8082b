"""TPModel, as users write it and read it: the one source of the CRD, its defaults, bounds and descriptions.

Python names are snake_case, in YAML they are camelCase. Rules between fields that the API server can check are
CEL, in crd.py; what only the operator can see is refused by acceptance.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

GROUP = "tpmodel.dev"
VERSION = "v1alpha1"
KIND = "TPModel"
PLURAL = "tpmodels"

Text = Annotated[str, StringConstraints(max_length=1024)]
Name = Annotated[str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Duration = Annotated[int, Field(ge=0, le=604_800)]
"""Seconds."""
Labels = Annotated[dict[Annotated[str, StringConstraints(max_length=317)], Text], Field(max_length=64)]
FreeForm = dict[str, Any]
"""A Kubernetes type that is passed on as it is; the API server checks it where it is used."""


class Model(BaseModel):
    """Base of all parts: camelCase outside, nothing unknown accepted, never changed."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(alias=to_camel), populate_by_name=True, extra="forbid", frozen=True
    )


# ------------------------------------------------------------------------------------------------------- spec


class SecretKey(Model):
    """One key of a Secret in the TPModel's namespace."""

    name: Name
    key: Text


class ModelSource(Model):
    """Which checkpoint is served, and how."""

    uri: Text
    """hf://org/name, pvc://claim/path, file:///path (a hostPath) or oci://image (an image volume)."""
    revision: Text = ""
    secret_ref: SecretKey | None = None
    served_name: Text = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none"] = "none"
    max_model_len: int = Field(default=0, ge=0, le=16_777_216)
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    engine_options: Annotated[dict[Text, Text], Field(max_length=32)] = {}


class ResourceClaim(Model):
    """A DRA claim template that gives every pod its devices."""

    name: Name
    resource_claim_template_name: Name


class ImageSpec(Model):
    """The worker's image."""

    reference: Text = ""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: Annotated[list[Name], Field(max_length=16)] = []


class Resources(Model):
    """Of one pod; memory includes what lies in shared memory."""

    cpu: Quantity = ""
    memory: Quantity = ""
    cpu_limit: Quantity = ""


class Cache(Model):
    """Where downloads and compiled kernels are kept over restarts."""

    type: Literal["emptyDir", "pvc", "hostPath"] = "emptyDir"
    claim_name: Name | Literal[""] = ""
    path: Text = ""
    size_limit: Quantity | Literal[""] = ""


class Network(Model):
    """How pods of a gang reach each other."""

    rdma: bool = False
    rdma_resource_name: Text = "rdma/hca"


class EnvironmentVariable(Model):
    """One variable of the worker's container."""

    name: Text
    value: Annotated[str, StringConstraints(max_length=4096)] = ""
    secret_key_ref: SecretKey | None = None


class Scheduling(Model):
    """Where pods may run."""

    node_selector: Labels = {}
    tolerations: Annotated[list[FreeForm], Field(max_length=32)] = []
    dead_node_toleration: Duration = 30
    affinity: FreeForm | None = None
    priority_class_name: Name | Literal[""] = ""
    scheduler_name: Text = ""
    topology_key: Text = ""


class Recovery(Model):
    """What is done when something fails, and how often."""

    mode: Literal["InPlace", "Restart"] = "Restart"
    deadline: Duration = 120
    max_restarts: int = Field(default=10, ge=0, le=1000)
    backoff_base: Duration = 30
    backoff_limit: Duration = 600
    stability_window: Duration = 600
    formation_deadline: Duration = 1800
    progress_deadline: Duration = 600


class Rollout(Model):
    """How gangs are replaced when the spec changes; counted in gangs."""

    max_unavailable: int = Field(default=1, ge=0, le=1000)
    max_surge: int = Field(default=0, ge=0, le=1000)


class ServiceSpec(Model):
    """The client Services."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: int = Field(default=9000, ge=1, le=65535)
    http_port: int = Field(default=8000, ge=1, le=65535)
    annotations: Labels = {}
    from_: Annotated[list[FreeForm], Field(max_length=32, alias="from")] = []
    """NetworkPolicyPeers that may reach the inference ports; empty: anybody."""


class Auth(Model):
    """Secrets that clients and processes use."""

    api_key: SecretKey | None = None
    tls_secret_name: Name | Literal[""] = ""


class PodTemplate(Model):
    """The closed list of what may be added to the pods."""

    labels: Labels = {}
    annotations: Labels = {}
    volumes: Annotated[list[FreeForm], Field(max_length=16)] = []
    volume_mounts: Annotated[list[FreeForm], Field(max_length=16)] = []
    sidecars: Annotated[list[FreeForm], Field(max_length=4)] = []


class TPModelSpec(Model):
    """What the user wants."""

    model: ModelSource
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    ranks_per_pod: int | None = Field(default=None, ge=1, le=64)
    replicas: int = Field(default=1, ge=0, le=1000)
    device: Literal["cuda", "cpu"] = "cuda"
    gpu_resource_name: Text = ""
    """Empty: nvidia.com/gpu, unless resourceClaims are given or the device is cpu."""
    resource_claims: Annotated[list[ResourceClaim], Field(max_length=8)] = []
    image: ImageSpec = ImageSpec()
    resources: Resources = Resources()
    cache: Cache = Cache()
    network: Network = Network()
    env: Annotated[list[EnvironmentVariable], Field(max_length=64)] = []
    scheduling: Scheduling = Scheduling()
    recovery: Recovery = Recovery()
    rollout: Rollout = Rollout()
    disruption_budget: int = Field(default=1, ge=0, le=1000)
    drain_timeout: Duration = 120
    service: ServiceSpec = ServiceSpec()
    auth: Auth = Auth()
    pod_template: PodTemplate = PodTemplate()


# ----------------------------------------------------------------------------------------------------- status


class Condition(Model):
    """A metav1.Condition."""

    type: Text
    status: Literal["True", "False", "Unknown"]
    reason: Text
    message: Annotated[str, StringConstraints(max_length=32768)] = ""
    last_transition_time: Text
    observed_generation: int = 0


class GangPod(Model):
    """One pod of a gang, as last seen."""

    name: Text
    uid: Text
    ready: bool = False
    node: Text = ""


class HandledEnd(Model):
    """The ends of a pod's container up to restart_count have been answered by a restart."""

    uid: Text
    restart_count: int


class LastRestart(Model):
    """The latest coordinated restart."""

    cause: Text
    exit_code: int | None = None
    time: Text
    """RFC 3339."""
    attempt: int


class Restart(Model):
    """A coordinated restart under way: written before any pod is deleted."""

    attempt: int
    """The new one."""
    cause: Text
    exit_code: int | None = None
    doomed: Annotated[list[Text], Field(max_length=1024)] = []
    """UIDs of pods of older attempts; any other pod of the gang is of the new one."""
    not_before: Text = ""
    """RFC 3339: end of the backoff; no pod is deleted before."""
    started: Text = ""


class GangStatus(Model):
    """One gang."""

    name: Text
    index: int
    revision: Text
    """hash5 of the spec it was made from."""
    attempt: int = 1
    epoch: int = 0
    phase: Literal["Pending", "Forming", "Loading", "Serving", "Rebuilding", "Draining", "Restarting", "Failed"] = (
        "Pending"
    )
    ready: bool = False
    ready_ranks: int = 0
    load_percent: int = 0
    pods: Annotated[list[GangPod], Field(max_length=1024)] = []
    restarts: int = 0
    """Of the budget: reset after the stability window."""
    restarts_total: int = 0
    ready_since: Text = ""
    last_restart: LastRestart | None = None
    restart: Restart | None = None
    handled: Annotated[list[HandledEnd], Field(max_length=1024)] = []
    image: Text = ""
    """The resolved image that the gang was made with."""


class TPModelStatus(Model):
    """What the operator found and did."""

    observed_generation: int = 0
    conditions: Annotated[list[Condition], Field(max_length=16)] = []
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0
    selector: Text = ""
    restarts: int = 0
    revision: Text = ""
    image: Text = ""
    """Resolved once per rollout."""
    model_revision: Text = ""
    url: Text = ""
    state: Text = ""
    """One word for the STATUS column."""
    gangs: Annotated[list[GangStatus], Field(max_length=1000)] = []


class TPModel(Model):
    """The object as the API server gives it."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str = ""
    deleting: bool = False
    annotations: dict[str, str] = {}
    spec: TPModelSpec
    status: TPModelStatus = TPModelStatus()
