"""Rules between fields that the API server checks when a TPModel is applied (CEL), by the part they belong to.

Rules about one value alone stand beside its type (api_types.py, api_spec.py, api_kubernetes.py). Every message says
what to write; messages made from the values would cost more than the API server's budget. Fields whose default says
nothing are absent where nobody wrote them, hence the `has`.
"""

from __future__ import annotations

from typing import Any

from tpmodel_operator import api
from tpmodel_operator.api_types import must
from tpmodel_operator.names import LONGEST_MODEL_NAME


def _given(*path: str) -> str:
    """Whether a text, list or map that may be absent holds anything."""
    steps = [".".join(path[: end + 1]) for end in range(len(path))]
    return "(" + " && ".join([*(f"has(self.{step})" for step in steps), f"self.{steps[-1]}.size() > 0"]) + ")"


_GPU_RESOURCE = _given("gpuResourceName")
_CLAIMS = _given("resourceClaims")
_OPTIONS = "has(self.model.engineOptions)"
_COMMUNICATOR = f"({_OPTIONS} && 'communicator' in self.model.engineOptions)"

OBJECT_RULES = (
    must(
        f"self.metadata.name.size() <= {LONGEST_MODEL_NAME}",
        f"metadata.name is too long: pods and Services are named after it, write at most {LONGEST_MODEL_NAME} "
        "characters",
    ),
    # Kubernetes itself allows lower-case letters, digits, '-' and '.'; digits come before letters. A regular expression
    # would be over budget, since the length of a name is not known to it.
    must(
        "!self.metadata.name.contains('.') && self.metadata.name >= 'a'",
        "metadata.name also names Services: write lower-case letters, digits and '-', beginning with a letter, such "
        "as qwen3-8b",
    ),
)
"""Of the whole object."""

_SPEC_RULES = (
    must(
        "!has(self.ranksPerPod) || self.tensorParallelSize % self.ranksPerPod == 0",
        "tensorParallelSize is not divisible by ranksPerPod: write a ranksPerPod that divides it, or leave it out",
        field=".ranksPerPod",
    ),
    must(
        f"!({_GPU_RESOURCE} && {_CLAIMS})",
        "gpuResourceName and resourceClaims both ask for GPUs: write only one of them",
        field=".resourceClaims",
    ),
    must(
        f"self.device != 'cpu' || !{_GPU_RESOURCE}",
        "device is cpu: leave gpuResourceName out, or write device: cuda",
        field=".gpuResourceName",
    ),
    must(
        f"self.device != 'cpu' || !{_CLAIMS}",
        "device is cpu: leave resourceClaims out, or write device: cuda",
        field=".resourceClaims",
    ),
    must(
        "self.device != 'cpu' || !self.network.rdma",
        "device is cpu: leave network.rdma out, or write device: cuda",
        field=".network.rdma",
    ),
    must(
        f"!{_GPU_RESOURCE} || !self.gpuResourceName.contains('mig-') || self.tensorParallelSize == 1",
        "MIG slices cannot talk to each other: write tensorParallelSize: 1, or a whole GPU as gpuResourceName, such as "
        "nvidia.com/gpu",
        field=".gpuResourceName",
    ),
    must(
        f"!{_GPU_RESOURCE} || !self.gpuResourceName.endsWith('.shared') || self.tensorParallelSize == 1",
        "two ranks of a gang may get the same shared GPU: write tensorParallelSize: 1, or a whole GPU as "
        "gpuResourceName, such as nvidia.com/gpu",
        field=".gpuResourceName",
    ),
    must(
        f"!{_COMMUNICATOR} || self.model.engineOptions['communicator'] != 'nccl' || self.device == 'cuda'",
        "communicator nccl needs device: cuda; for cpu leave communicator out",
        field=".model.engineOptions",
    ),
    must(
        f"!{_COMMUNICATOR} || !(self.model.engineOptions['communicator'] in ['gloo', 'shared_memory']) || "
        "self.device == 'cpu'",
        "communicator gloo and shared_memory need device: cpu; for cuda leave communicator out",
        field=".model.engineOptions",
    ),
    must(
        f"!{_COMMUNICATOR} || self.model.engineOptions['communicator'] != 'shared_memory' || "
        "self.tensorParallelSize == (has(self.ranksPerPod) ? self.ranksPerPod : 1)",
        "communicator shared_memory needs all ranks in one pod: write ranksPerPod equal to tensorParallelSize, or "
        "leave communicator out",
        field=".model.engineOptions",
    ),
    must(
        "!has(self.weightUpdates) || !has(self.weightUpdates.from) || self.weightUpdates.from.size() == 0 || "
        "(has(self.auth) && has(self.auth.trainerToken))",
        "weightUpdates.from is for trainers, who present a token: write auth.trainerToken, or leave from out",
        field=".weightUpdates",
    ),
)

_MODEL_RULES = (
    must(
        f"!{_given('revision')} || self.uri.startsWith('hf://')",
        "revision is for hf:// models: leave it out; an oci:// image carries its tag or digest in uri",
        field=".revision",
    ),
    must(
        "!has(self.secretRef) || self.uri.startsWith('hf://')",
        "secretRef is the hub's token, for hf:// models: leave it out; a registry's Secret goes into image.pullSecrets",
        field=".secretRef",
    ),
    must(
        "!has(self.engineOptions) || !('dummy_seed' in self.engineOptions) || self.loadFormat == 'dummy'",
        "dummy_seed is for loadFormat: dummy: leave it out, or write loadFormat: dummy",
        field=".engineOptions",
    ),
)

_CACHE_RULES = (
    must(
        f"self.type != 'pvc' || {_given('claimName')}",
        "cache.type pvc needs cache.claimName: write the name of a PersistentVolumeClaim in this namespace",
        field=".claimName",
    ),
    must(
        f"self.type != 'hostPath' || {_given('path')}",
        "cache.type hostPath needs cache.path: write a folder of the node, such as /var/lib/tpmodel",
        field=".path",
    ),
    must(
        f"self.type == 'pvc' || !{_given('claimName')}",
        "cache.claimName is for cache.type pvc: write type: pvc, or leave claimName out",
        field=".claimName",
    ),
    must(
        f"self.type == 'hostPath' || !{_given('path')}",
        "cache.path is for cache.type hostPath: write type: hostPath, or leave path out",
        field=".path",
    ),
    must(
        f"self.type == 'emptyDir' || !{_given('sizeLimit')}",
        "cache.sizeLimit is for cache.type emptyDir: leave it out",
        field=".sizeLimit",
    ),
)

_RESOURCES_RULES = (
    must(
        f"!{_given('cpu')} || !{_given('cpuLimit')} || !isQuantity(self.cpu) || !isQuantity(self.cpuLimit) || "
        "!quantity(self.cpu).isGreaterThan(quantity(self.cpuLimit))",
        "cpuLimit is below cpu: write a limit of at least the request, or leave cpuLimit out",
        field=".cpuLimit",
    ),
)

_NETWORK_RULES = (
    must(
        f"!self.rdma || {_given('rdmaResourceName')}",
        "rdma needs rdmaResourceName: write the extended resource of the RDMA devices, such as rdma/hca",
        field=".rdmaResourceName",
    ),
)

_ENVIRONMENT_RULES = (
    must(
        f"!(has(self.secretKeyRef) && {_given('value')})",
        "value and secretKeyRef both give the variable's value: write only one of them",
        field=".secretKeyRef",
    ),
)

_RECOVERY_RULES = (
    must(
        "self.backoffLimit >= self.backoffBase",
        "backoffLimit is below backoffBase: write a backoffLimit of at least backoffBase",
        field=".backoffLimit",
    ),
)

_ROLLOUT_RULES = (
    must(
        "self.maxUnavailable > 0 || self.maxSurge > 0",
        "maxUnavailable and maxSurge are both 0, so no gang could ever be replaced: write at least 1 for one of them",
        field=".maxUnavailable",
    ),
)

_SERVICE_RULES = (
    must(
        "self.port != self.httpPort",
        "port and httpPort are the same: write two different ports",
        field=".httpPort",
    ),
)

_POD_TEMPLATE_RULES = (
    must(
        "!has(self.labels) || self.labels.all(key, !key.startsWith('tpmodel.dev/') && "
        "!key.startsWith('app.kubernetes.io/') && !key.startsWith('apps.kubernetes.io/') && "
        "!key.startsWith('statefulset.kubernetes.io/') && key != 'controller-revision-hash')",
        "labels under tpmodel.dev/, app.kubernetes.io/, apps.kubernetes.io/ and statefulset.kubernetes.io/ belong to "
        "the operator and to Kubernetes: write labels with a prefix of your own",
        field=".labels",
    ),
    must(
        "!has(self.annotations) || self.annotations.all(key, !key.startsWith('tpmodel.dev/'))",
        "annotations under tpmodel.dev/ belong to the operator: write annotations with a prefix of your own",
        field=".annotations",
    ),
    must(
        "!has(self.volumeMounts) || self.volumeMounts.all(mount, has(self.volumes) && "
        "self.volumes.exists(volume, volume.name == mount.name))",
        "each of volumeMounts must name one of podTemplate.volumes: add the volume, or correct the name",
        field=".volumeMounts",
    ),
)

PART_RULES: dict[type[api.Model], tuple[dict[str, Any], ...]] = {
    api.TPModelSpec: _SPEC_RULES,
    api.ModelSource: _MODEL_RULES,
    api.Cache: _CACHE_RULES,
    api.Resources: _RESOURCES_RULES,
    api.Network: _NETWORK_RULES,
    api.EnvironmentVariable: _ENVIRONMENT_RULES,
    api.Recovery: _RECOVERY_RULES,
    api.Rollout: _ROLLOUT_RULES,
    api.ServiceSpec: _SERVICE_RULES,
    api.PodTemplate: _POD_TEMPLATE_RULES,
}
"""By the class that describes the part."""
