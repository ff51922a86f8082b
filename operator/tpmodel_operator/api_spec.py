"""The spec of a TPModel: what users write. Field docs are what `kubectl explain` shows.

Rules between fields are in rules.py. A default that says nothing ("", [], {}) is left out of the CRD, so that objects
hold what was written and what means something.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tpmodel_operator.api_kubernetes import NetworkPolicyPeer, Sidecar, Toleration, Volume, VolumeMount
from tpmodel_operator.api_model import ModelSource
from tpmodel_operator.api_types import (
    LIST_TYPE,
    LONGEST_TEXT,
    Deadline,
    Duration,
    FreeForm,
    HostPath,
    Labels,
    Model,
    Name,
    OptionalName,
    OptionalResourceName,
    Quantity,
    SecretKey,
    checked,
    keyed_by,
    must,
)
from tpmodel_operator.api_weights import WeightUpdates

ImageReference = Annotated[
    str,
    Field(
        max_length=LONGEST_TEXT,
        json_schema_extra=checked(
            must(
                r"self.matches('^([A-Za-z0-9][^\\s]*)?$') && !self.contains('://')",
                "write an image without scheme and spaces, such as registry.example/tpmodel-worker:1.0",
            )
        ),
    ),
]

RESERVED_VARIABLES = ("HF_TOKEN", "HF_HOME", "TRITON_CACHE_DIR", "HOME")

VariableName = Annotated[
    str,
    Field(
        max_length=253,
        json_schema_extra=checked(
            must("self.matches('^[A-Za-z_][A-Za-z0-9_]*$')", "write a variable's name: letters, digits and '_'"),
            must("!self.startsWith('TPMODEL_')", "names that begin with TPMODEL_ belong to the operator"),
            must(
                "!(self in [" + ", ".join(f"'{name}'" for name in RESERVED_VARIABLES) + "])",
                "leave this variable out, the operator sets it: a hub token goes into model.secretRef, the folder of "
                "downloads and compiled kernels into cache",
            ),
        ),
    ),
]


class ResourceClaim(Model):
    """A DRA claim template that gives every pod its devices."""

    name: Annotated[Name, Field(max_length=63)]
    """What the pod calls the claim."""
    resource_claim_template_name: Name
    """A ResourceClaimTemplate of this namespace; its claims must give each pod ranksPerPod devices."""


class ImageSpec(Model):
    """The worker's image."""

    reference: ImageReference = ""
    """Image of the pods. Left out: the operator's default, taken once per rollout; a newer default is shown by
    condition UpgradeAvailable and moves nothing by itself."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes pull it. Always costs a round trip to the registry at every restart."""
    pull_secrets: Annotated[list[Name], Field(max_length=16, json_schema_extra={LIST_TYPE: "set"})] = []
    """Names of registry Secrets in this namespace, also for an oci:// model."""


class Resources(Model):
    """Of one pod, with all its ranks. GPUs are not written here: they follow from ranksPerPod."""

    cpu: Quantity = ""
    """CPU request, such as 4. Left out: none; give at least one CPU per rank for steady step times."""
    memory: Quantity = ""
    """Memory request and limit, such as 64Gi. It includes shared memory (/dev/shm); for device cpu it must hold the
    weights and the KV cache of the pod's ranks. Left out: none."""
    cpu_limit: Quantity = ""
    """CPU limit. Left out: none, which is best: a throttled rank stalls all others of its gang."""


class Cache(Model):
    """Where downloads and compiled kernels are kept over restarts."""

    type: Literal["emptyDir", "pvc", "hostPath"] = "emptyDir"
    """emptyDir: kept over container restarts only. pvc: a claim that all pods share, downloaded once. hostPath: a
    folder of each node (only under prefixes that the operator's administrator allows)."""
    claim_name: OptionalName = ""
    """For type pvc: a PersistentVolumeClaim of this namespace; ReadWriteMany when there is more than one pod."""
    path: HostPath = ""
    """For type hostPath: an absolute folder of the node, made where it is missing."""
    size_limit: Quantity = ""
    """For type emptyDir: the pod is evicted beyond it. Left out: no limit but the node's disk."""


class Network(Model):
    """How pods of a gang reach each other."""

    rdma: bool = False
    """Asks for an RDMA device in each pod and lets it lock memory, for NCCL between hosts."""
    rdma_resource_name: OptionalResourceName = "rdma/hca"
    """The extended resource by which nodes offer RDMA devices."""


class EnvironmentVariable(Model):
    """One variable of the worker's container."""

    name: VariableName
    """Name of the variable, such as NCCL_DEBUG."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Its value."""
    secret_key_ref: SecretKey | None = None
    """Takes the value from a Secret, instead of value."""


class Scheduling(Model):
    """Where pods may run."""

    node_selector: Labels = {}
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that pods tolerate."""
    dead_node_toleration: Duration = 30
    """Seconds that pods stay bound to a node that is not ready or unreachable, before the gang restarts elsewhere;
    Kubernetes' own default is 300."""
    affinity: FreeForm | None = None
    """Node, pod and pod anti-affinity, as in a pod."""
    priority_class_name: OptionalName = ""
    """PriorityClass of the pods."""
    scheduler_name: OptionalName = ""
    """Scheduler of the pods. Left out: the cluster's default."""
    topology_key: Annotated[
        str,
        Field(
            max_length=317,
            json_schema_extra=checked(
                must(
                    "self.matches('^([a-z0-9][-a-z0-9.]*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$') || "
                    "self.size() == 0",
                    "write a node label's key, such as topology.kubernetes.io/zone",
                )
            ),
        ),
    ] = ""
    """Node label whose value all pods of a gang must share, such as a rack or a block of one fast network. Left out:
    pods of a gang may be anywhere."""


class Recovery(Model):
    """What is done when something fails, and how often. Times are in seconds."""

    mode: Literal["InPlace", "Restart"] = "InPlace"
    """InPlace: what died is replaced, all else keeps its weights, and running requests go on; only where that does not
    help, all pods restart. Restart: any lost rank restarts all pods of its gang. Changing it is a rollout."""
    deadline: Deadline = 120
    """How long a gang that was Ready may be not Ready, and a minute more, before all its pods restart; in mode InPlace
    this is what a rebuild may take, and the load of a container that was started again. Not counted while a pod that
    was made again waits for a node or loads."""
    max_restarts: int = Field(default=10, ge=0, le=1000)
    """Restarts of a gang before it is Failed; counted anew after stabilityWindow. 0: never restart."""
    backoff_base: Duration = 30
    """Wait before the second restart in a row; it doubles with each one."""
    backoff_limit: Duration = 600
    """Longest wait between restarts."""
    stability_window: Duration = 600
    """A gang that is Ready for this long gets its whole budget back."""
    formation_deadline: Deadline = 1800
    """How long a new gang's pods may show no change before all its containers run; a rollout then counts as
    stalled. Time to get nodes and pull images belongs here."""
    progress_deadline: Deadline = 600
    """How long a download or load of weights may make no progress before the gang restarts."""


class Rollout(Model):
    """How gangs are replaced when the spec changes; counted in gangs. Pods of one gang are never of mixed revisions."""

    max_unavailable: int = Field(default=1, ge=0, le=1000)
    """Gangs that may be missing while others are replaced. With replicas 1 and maxSurge 0 the model is away while
    its gang is replaced."""
    max_surge: int = Field(default=0, ge=0, le=1000)
    """Gangs that may exist above replicas. It needs that many free GPUs; with 1 and maxUnavailable 0 nothing is ever
    missing."""


class ServiceSpec(Model):
    """The Services that clients use: the name of the TPModel, and with -leaders for gRPC clients that balance."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the Service with the TPModel's name."""
    port: int = Field(default=9000, ge=1, le=65535)
    """gRPC port of that Service."""
    http_port: int = Field(default=8000, ge=1, le=65535)
    """OpenAI HTTP port of that Service."""
    annotations: Labels = {}
    """Annotations of that Service, such as a load balancer's settings."""
    from_: Annotated[list[NetworkPolicyPeer], Field(max_length=32, alias="from")] = []
    """Who may reach the client ports, as the peers of a NetworkPolicy. Left out: everybody."""


class Auth(Model):
    """Secrets that clients and processes use."""

    api_key: SecretKey | None = None
    """Secret key that clients must send as bearer token. Left out: clients need none."""
    tls_secret_name: OptionalName = ""
    """A Secret of type kubernetes.io/tls: the client ports, gRPC and HTTP, then speak TLS; a renewed certificate is
    taken up while they serve. Left out: plain text inside the cluster's network."""
    trainer_token: SecretKey | None = None
    """Secret key with the token that trainers of live weight updates present; it lets them do nothing else. Left out:
    the gangs take no updates. A changed value in the Secret is taken up while they serve; naming another Secret or key
    is a rollout."""


class PodTemplate(Model):
    """All that may be added to the pods; nothing else can."""

    labels: Labels = {}
    """Labels of the pods. Keys under tpmodel.dev/ and app.kubernetes.io/ belong to the operator."""
    annotations: Labels = {}
    """Annotations of the pods. Keys under tpmodel.dev/ belong to the operator."""
    volumes: Annotated[list[Volume], Field(max_length=16, json_schema_extra=keyed_by("name"))] = []
    """Volumes of the pods; hostPath is not among them."""
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=16, json_schema_extra=keyed_by("mountPath"))] = []
    """Where the worker's container sees these volumes."""
    sidecars: Annotated[list[Sidecar], Field(max_length=4, json_schema_extra=keyed_by("name"))] = []
    """More containers of the pods, without privilege. They may mount these volumes."""


class TPModelSpec(Model):
    """What the user wants."""

    model: ModelSource
    """Which checkpoint is served, and how."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """Ranks (GPUs) over which one copy of the model is split. Changing it is a rollout."""
    ranks_per_pod: int | None = Field(default=None, ge=1, le=64)
    """Ranks (GPUs) in one pod; a gang has tensorParallelSize / ranksPerPod pods. GPUs of one host belong in one pod:
    only there ranks talk over NVLink. Left out: for device cuda the largest divisor of tensorParallelSize that is not
    above 8, for cpu 1."""
    replicas: int = Field(default=1, ge=0, le=1000)
    """Gangs: copies of the model that serve independently. This is what kubectl scale and a HorizontalPodAutoscaler
    set; 0 stops the model and frees its GPUs."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What ranks run on. cpu is for tests and small models."""
    gpu_resource_name: OptionalResourceName = ""
    """Extended resource that stands for one GPU. Left out: nvidia.com/gpu, unless resourceClaims are given or the
    device is cpu."""
    resource_claims: Annotated[list[ResourceClaim], Field(max_length=8, json_schema_extra=keyed_by("name"))] = []
    """Dynamic Resource Allocation claims that give pods their GPUs, instead of gpuResourceName."""
    image: ImageSpec = ImageSpec()
    """The worker's image."""
    resources: Resources = Resources()
    """CPU and memory of one pod."""
    cache: Cache = Cache()
    """Where downloads and compiled kernels are kept over restarts."""
    network: Network = Network()
    """How pods of a gang reach each other."""
    env: Annotated[list[EnvironmentVariable], Field(max_length=64, json_schema_extra=keyed_by("name"))] = []
    """More variables of the worker's container."""
    scheduling: Scheduling = Scheduling()
    """Where pods may run."""
    recovery: Recovery = Recovery()
    """What is done when something fails, and how often."""
    rollout: Rollout = Rollout()
    """How gangs are replaced when the spec changes."""
    disruption_budget: int = Field(default=1, ge=0, le=1000)
    """Gangs that evictions (kubectl drain, node upgrades) may disturb at the same time, for TPModels of 2 gangs and
    more; a single gang is not protected. 0 forbids evictions, which also blocks node upgrades."""
    drain_timeout: Annotated[int, Field(ge=0, le=86_400)] = 120
    """Seconds that running streams have to finish when a pod is stopped; at most a day."""
    service: ServiceSpec = ServiceSpec()
    """The Services that clients use."""
    auth: Auth = Auth()
    """Secrets that clients and processes use."""
    weight_updates: WeightUpdates = WeightUpdates()
    """New weights from a trainer, while the gangs serve; it needs auth.trainerToken."""
    pod_template: PodTemplate = PodTemplate()
    """All that may be added to the pods."""
