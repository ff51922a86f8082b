"""The worker's container: its command line, environment, resources, ports and probes."""

from __future__ import annotations

from tpmodel_operator import defaults, names, weights
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import EnvironmentVariable, SecretKey, TPModel, TPModelSpec
from tpmodel_operator.resources import volumes
from tpmodel_operator.resources.objects import Object

COMMAND = "tpmodel-worker"
READY_SERVICE = "tpmodel.v1.Ready"
PROBE_SECONDS = 5
"""For an answer. "Not ready" comes at once and counts at once; one that a busy machine only holds up must not take a
gang that serves away from its clients, and out of its disruption budget's protection."""

_PORTS = {
    "grpc": names.INFERENCE_PORT,
    "http": names.HTTP_PORT,
    "control": names.CONTROL_PORT,
    "health": names.HEALTH_PORT,
    "metrics": names.METRICS_PORT,
}


def build(model: TPModel, gang: EnsureGang) -> Object:
    """The container `worker`."""
    spec = model.spec
    mounts = [mounted.mount() for mounted in volumes.mounted(model, gang)]
    return {
        "name": names.CONTAINER,
        "image": gang.image,
        "imagePullPolicy": spec.image.pull_policy,
        "command": [COMMAND],
        "args": arguments(model, gang),
        "env": environment(spec),
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in _PORTS.items()],
        "resources": resources(spec),
        "securityContext": security_context(spec),
        "livenessProbe": _probe("", period=10, failures=6),
        "readinessProbe": _probe(READY_SERVICE, period=2, failures=1),
        "terminationMessagePolicy": "File",
        "volumeMounts": [*mounts, *spec.pod_template.volume_mounts],
    }


def arguments(model: TPModel, gang: EnsureGang) -> list[str]:
    """The command line. Everything is said, so that a pod's description shows what it was told."""
    spec = model.spec
    given: dict[str, object] = {
        "model-uri": spec.model.uri,
        "model-path": volumes.model_path(spec),
        "model-revision": spec.model.revision,
        "served-name": defaults.served_name(spec),
        "tensor-parallel-size": spec.tensor_parallel_size,
        "ranks-per-pod": defaults.ranks_per_pod(spec),
        "leader-host": names.leader_host(model.name, gang.name, model.namespace),
        "device": spec.device,
        "dtype": spec.model.dtype,
        "quantization": spec.model.quantization,
        "max-model-len": spec.model.max_model_len,
        "load-format": spec.model.load_format,
        "recovery-mode": spec.recovery.mode,
        "drain-timeout": spec.drain_timeout,
        "progress-deadline": spec.recovery.progress_deadline,
        "cache-dir": volumes.CACHE_FOLDER,
        "attempt-file": f"{volumes.ATTEMPT_FOLDER}/{names.ATTEMPT_KEY}",
        "token-file": f"{volumes.TOKEN_FOLDER}/{names.TOKEN_KEY}",
        "trainer-token-file": f"{volumes.TRAINER_TOKEN_FOLDER}/{names.TOKEN_KEY}" if spec.auth.trainer_token else "",
        "api-key-file": f"{volumes.API_KEY_FOLDER}/{volumes.API_KEY_FILE}" if spec.auth.api_key else "",
        "persist-updates": volumes.updates_path(model, gang),
        **_other_gangs(model),
        "tls-dir": volumes.TLS_FOLDER if spec.auth.tls_secret_name else "",
    }
    options = [f"--engine-option={key}={value}" for key, value in sorted(spec.model.engine_options.items())]
    written = [f"--{name}={value}" for name, value in given.items() if value != ""] + options
    return [argument.replace("$(", "$$(") for argument in written]  # Kubernetes would put a variable's value there


def _other_gangs(model: TPModel) -> dict[str, object]:
    """From where a gang copies weights that it has lost. Without a trainer's token, by which gangs know each other,
    nobody can have updated them."""
    if model.spec.auth.trainer_token is None:
        return {}
    return {
        "weights-from": names.trainers_target(model.name, model.namespace),
        "weights-source": weights.source(model),
    }


def environment(spec: TPModelSpec) -> list[Object]:
    """The operator's variables first: those that the user adds may refer to them as $(NAME)."""
    own = [
        _from_field("TPMODEL_POD_NAME", "metadata.name"),
        _from_field("TPMODEL_POD_UID", "metadata.uid"),
        _from_field("TPMODEL_POD_IP", "status.podIP"),
        _from_field("TPMODEL_NAMESPACE", "metadata.namespace"),
        _from_field("TPMODEL_POD_INDEX", f"metadata.labels['{names.POD_INDEX}']"),
        {"name": "HOME", "value": volumes.TEMPORARY},
        {"name": "HF_HOME", "value": f"{volumes.CACHE_FOLDER}/hub"},
        {"name": "TRITON_CACHE_DIR", "value": f"{volumes.CACHE_FOLDER}/triton"},
    ]
    if spec.model.secret_ref is not None:
        own.append(_from_secret("HF_TOKEN", spec.model.secret_ref))
    return own + [_of_user(variable) for variable in spec.env]


def resources(spec: TPModelSpec) -> Object:
    """Memory is requested as it is limited: a gang must not die of its neighbours' appetite."""
    wanted = spec.resources
    devices = _devices(spec)
    requests = _given(cpu=wanted.cpu, memory=wanted.memory) | devices
    limits = _given(cpu=wanted.cpu_limit, memory=wanted.memory) | devices
    claims = [{"name": claim.name} for claim in spec.resource_claims]
    parts = {"requests": requests, "limits": limits, "claims": claims}
    return {name: part for name, part in parts.items() if part}


def security_context(spec: TPModelSpec) -> Object:
    """As Pod Security `restricted` asks, but for RDMA, which needs memory that stays where it is."""
    capabilities: Object = {"drop": ["ALL"]}
    if spec.network.rdma:
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": capabilities,
    }


def _devices(spec: TPModelSpec) -> dict[str, str]:
    found = {}
    if gpu := defaults.gpu_resource(spec):
        found[gpu] = str(defaults.ranks_per_pod(spec))
    if spec.network.rdma:
        found[spec.network.rdma_resource_name] = "1"
    return found


def _given(**quantities: str) -> dict[str, str]:
    return {name: quantity for name, quantity in quantities.items() if quantity}


def _probe(service: str, *, period: int, failures: int) -> Object:
    return {
        "grpc": {"port": names.HEALTH_PORT, "service": service},
        "periodSeconds": period,
        "timeoutSeconds": PROBE_SECONDS,
        "failureThreshold": failures,
    }


def _from_field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _from_secret(name: str, source: SecretKey) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": source.name, "key": source.key}}}


def _of_user(variable: EnvironmentVariable) -> Object:
    if variable.secret_key_ref is not None:
        return _from_secret(variable.name, variable.secret_key_ref)
    return {"name": variable.name, "value": variable.value}
