"""TPModels as users get them wrong: each with the field that the API server names, and what it says."""

from __future__ import annotations

from typing import Any

HUB = "hf://organisation/name"
NAME_HELP = "write a Kubernetes name: lower-case letters, digits, '-' and '.', such as my-claim"
QUANTITY_HELP = "write a quantity above 0, such as 500m or 4 for cpu, 16Gi for memory"
RESOURCE_HELP = "write an extended resource as nodes offer it, such as nvidia.com/gpu or rdma/hca"
WHOLE_GPU = "write tensorParallelSize: 1, or a whole GPU as gpuResourceName, such as nvidia.com/gpu"
PATH_HELP = "write an absolute path without '.' and '..' parts, such as /var/lib/models"
PRIVILEGE_HELP = (
    "a sidecar runs without privilege: leave privileged, allowPrivilegeEscalation, root, procMount, seccompProfile "
    "Unconfined and capabilities.add out of its securityContext"
)
RESERVED_LABELS = (
    "labels under tpmodel.dev/, app.kubernetes.io/, apps.kubernetes.io/ and statefulset.kubernetes.io/ belong to the "
    "operator and to Kubernetes: write labels with a prefix of your own"
)
MANY_OPTIONS = (
    "engine options are max_num_seqs, max_num_batched_tokens, block_size, kv_cache_memory, prefix_cache, "
    "state_snapshots, queue_limit, api_processes, communicator, step_deadline, respawn, rebuild_limit, rebuild_wait, "
    "rebuild_stability_window, expert_parallel, dummy_seed"
)
RESERVED_ENVIRONMENT = (
    "leave this variable out, the operator sets it: a hub token goes into model.secretRef, the folder of downloads "
    "and compiled kernels into cache"
)
OTHER_CLAIM = {"name": "gpus", "resourceClaimTemplateName": "eight"}


def model(**fields: Any) -> dict[str, Any]:
    return {"model": {"uri": HUB} | fields}


def options(**values: str) -> dict[str, Any]:
    return model(engineOptions=values)


def sidecar(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": {"sidecars": [{"name": "s", "image": "image:1"} | fields]}}


def volume(**source: Any) -> dict[str, Any]:
    return {"podTemplate": {"volumes": [{"name": "v"} | source]}}


def mount(path: str, name: str = "v") -> dict[str, Any]:
    return {
        "podTemplate": {
            "volumes": [{"name": "v", "emptyDir": {}}],
            "volumeMounts": [{"name": name, "mountPath": path}],
        }
    }


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    # what, spec, field of the error, what is to be written
    "ranks_not_divisible": (
        {"tensorParallelSize": 6, "ranksPerPod": 4},
        "spec.ranksPerPod",
        "tensorParallelSize is not divisible by ranksPerPod: write a ranksPerPod that divides it, or leave it out",
    ),
    "more_ranks_in_a_pod_than_ranks": (
        {"tensorParallelSize": 2, "ranksPerPod": 4},
        "spec.ranksPerPod",
        "tensorParallelSize is not divisible by ranksPerPod: write a ranksPerPod that divides it, or leave it out",
    ),
    "gpus_by_resource_and_by_claims": (
        {"gpuResourceName": "nvidia.com/gpu", "resourceClaims": [OTHER_CLAIM]},
        "spec.resourceClaims",
        "gpuResourceName and resourceClaims both ask for GPUs: write only one of them",
    ),
    "cpu_with_gpu_resource": (
        {"device": "cpu", "gpuResourceName": "nvidia.com/gpu"},
        "spec.gpuResourceName",
        "device is cpu: leave gpuResourceName out, or write device: cuda",
    ),
    "cpu_with_claims": (
        {"device": "cpu", "resourceClaims": [OTHER_CLAIM]},
        "spec.resourceClaims",
        "device is cpu: leave resourceClaims out, or write device: cuda",
    ),
    "cpu_with_rdma": (
        {"device": "cpu", "network": {"rdma": True}},
        "spec.network.rdma",
        "device is cpu: leave network.rdma out, or write device: cuda",
    ),
    "rdma_without_resource": (
        {"network": {"rdma": True, "rdmaResourceName": ""}},
        "spec.network.rdmaResourceName",
        "rdma needs rdmaResourceName: write the extended resource of the RDMA devices, such as rdma/hca",
    ),
    "mig_slice_with_two_ranks": (
        {"tensorParallelSize": 2, "gpuResourceName": "nvidia.com/mig-1g.10gb"},
        "spec.gpuResourceName",
        f"MIG slices cannot talk to each other: {WHOLE_GPU}",
    ),
    "shared_gpu_with_two_ranks": (
        {"tensorParallelSize": 2, "gpuResourceName": "nvidia.com/gpu.shared"},
        "spec.gpuResourceName",
        f"two ranks of a gang may get the same shared GPU: {WHOLE_GPU}",
    ),
    "gpu_resource_without_domain": ({"gpuResourceName": "gpu"}, "spec.gpuResourceName", RESOURCE_HELP),
    "rollout_that_cannot_move": (
        {"rollout": {"maxUnavailable": 0, "maxSurge": 0}},
        "spec.rollout.maxUnavailable",
        "maxUnavailable and maxSurge are both 0, so no gang could ever be replaced: write at least 1 for one of them",
    ),
    "backoff_limit_below_base": (
        {"recovery": {"backoffBase": 60, "backoffLimit": 30}},
        "spec.recovery.backoffLimit",
        "backoffLimit is below backoffBase: write a backoffLimit of at least backoffBase",
    ),
    "uri_without_scheme": (
        {"model": {"uri": "Qwen/Qwen3-8B"}},
        "spec.model.uri",
        (
            "write hf://organisation/name, pvc://claim/path, file:///path (a folder of the node) or "
            "oci://registry/image:tag"
        ),
    ),
    "uri_of_another_store": (
        {"model": {"uri": "s3://bucket/model"}},
        "spec.model.uri",
        (
            "write hf://organisation/name, pvc://claim/path, file:///path (a folder of the node) or "
            "oci://registry/image:tag"
        ),
    ),
    "hub_name_with_revision": (
        {"model": {"uri": "hf://Qwen/Qwen3-8B@main"}},
        "spec.model.uri",
        "write hf://organisation/name, such as hf://Qwen/Qwen3-8B; a branch, tag or commit goes into revision",
    ),
    "claim_in_capitals": (
        {"model": {"uri": "pvc://Models/x"}},
        "spec.model.uri",
        "write pvc://claim/path, where claim is a PersistentVolumeClaim in this namespace",
    ),
    "file_with_two_slashes": (
        {"model": {"uri": "file://models/x"}},
        "spec.model.uri",
        "write file:///path with three slashes: an absolute folder of the node, not its root",
    ),
    "root_of_the_node": (
        {"model": {"uri": "file:///"}},
        "spec.model.uri",
        "write file:///path with three slashes: an absolute folder of the node, not its root",
    ),
    "image_with_a_space": (
        {"model": {"uri": "oci://registry.example/model :1"}},
        "spec.model.uri",
        "write oci://registry/image:tag or oci://registry/image@sha256:digest",
    ),
    "path_that_climbs": (
        {"model": {"uri": "pvc://models/a/../b"}},
        "spec.model.uri",
        "leave '.' and '..' parts out of the path",
    ),
    "revision_of_a_claim": (
        {"model": {"uri": "pvc://models/x", "revision": "main"}},
        "spec.model.revision",
        "revision is for hf:// models: leave it out; an oci:// image carries its tag or digest in uri",
    ),
    "token_for_an_image": (
        {"model": {"uri": "oci://registry.example/model:1", "secretRef": {"name": "s", "key": "k"}}},
        "spec.model.secretRef",
        "secretRef is the hub's token, for hf:// models: leave it out; a registry's Secret goes into image.pullSecrets",
    ),
    "context_of_one_token": (
        model(maxModelLen=1),
        "spec.model.maxModelLen",
        "a prompt and an answer need at least 2 tokens: write 2 or more, or leave it out",
    ),
    "unknown_engine_option": (options(gpu_memory_utilization="0.9"), "spec.model.engineOptions", MANY_OPTIONS),
    "engine_option_in_camel_case": (options(maxNumSeqs="8"), "spec.model.engineOptions", MANY_OPTIONS),
    "engine_option_not_a_number": (
        options(max_num_seqs="many"),
        "spec.model.engineOptions",
        "max_num_seqs: write a whole number of at least 1",
    ),
    "engine_option_size": (
        options(kv_cache_memory="2 GB"),
        "spec.model.engineOptions",
        "kv_cache_memory: write a size such as 500M or 2Gi",
    ),
    "engine_option_flag": (
        options(prefix_cache="yes"),
        "spec.model.engineOptions",
        "prefix_cache: write 'true' or 'false', in quotes",
    ),
    "seed_without_dummy_weights": (
        options(dummy_seed="1"),
        "spec.model.engineOptions",
        "dummy_seed is for loadFormat: dummy: leave it out, or write loadFormat: dummy",
    ),
    "nccl_on_cpu": (
        {"device": "cpu"} | options(communicator="nccl"),
        "spec.model.engineOptions",
        "communicator nccl needs device: cuda; for cpu leave communicator out",
    ),
    "gloo_on_cuda": (
        options(communicator="gloo"),
        "spec.model.engineOptions",
        "communicator gloo and shared_memory need device: cpu; for cuda leave communicator out",
    ),
    "shared_memory_between_pods": (
        {"device": "cpu", "tensorParallelSize": 2} | options(communicator="shared_memory"),
        "spec.model.engineOptions",
        (
            "communicator shared_memory needs all ranks in one pod: write ranksPerPod equal to tensorParallelSize, or "
            "leave communicator out"
        ),
    ),
    "trainers_without_a_token": (
        {"weightUpdates": {"from": [{"podSelector": {}}]}},
        "spec.weightUpdates",
        "weightUpdates.from is for trainers, who present a token: write auth.trainerToken, or leave from out",
    ),
    "updates_kept_in_no_volume": (
        {"weightUpdates": {"persistUpdates": "/sets"}},
        "spec.weightUpdates.persistUpdates",
        "write pvc://claim/path, or file:///path (a folder of the node)",
    ),
    "updates_kept_in_a_claim_of_no_name": (
        {"weightUpdates": {"persistUpdates": "pvc://Sets"}},
        "spec.weightUpdates.persistUpdates",
        "write pvc://claim/path, where claim is a PersistentVolumeClaim in this namespace",
    ),
    "cache_claim_missing": (
        {"cache": {"type": "pvc"}},
        "spec.cache.claimName",
        "cache.type pvc needs cache.claimName: write the name of a PersistentVolumeClaim in this namespace",
    ),
    "cache_path_missing": (
        {"cache": {"type": "hostPath"}},
        "spec.cache.path",
        "cache.type hostPath needs cache.path: write a folder of the node, such as /var/lib/tpmodel",
    ),
    "cache_claim_without_type": (
        {"cache": {"claimName": "cache"}},
        "spec.cache.claimName",
        "cache.claimName is for cache.type pvc: write type: pvc, or leave claimName out",
    ),
    "cache_path_without_type": (
        {"cache": {"path": "/var/lib/tpmodel"}},
        "spec.cache.path",
        "cache.path is for cache.type hostPath: write type: hostPath, or leave path out",
    ),
    "cache_size_of_a_claim": (
        {"cache": {"type": "pvc", "claimName": "cache", "sizeLimit": "10Gi"}},
        "spec.cache.sizeLimit",
        "cache.sizeLimit is for cache.type emptyDir: leave it out",
    ),
    "cache_path_that_climbs": (
        {"cache": {"type": "hostPath", "path": "/models/../etc"}},
        "spec.cache.path",
        PATH_HELP,
    ),
    "memory_unit": ({"resources": {"memory": "16GB"}}, "spec.resources.memory", QUANTITY_HELP),
    "no_memory": ({"resources": {"memory": "0"}}, "spec.resources.memory", QUANTITY_HELP),
    "cpu_limit_below_request": (
        {"resources": {"cpu": "4", "cpuLimit": "2500m"}},
        "spec.resources.cpuLimit",
        "cpuLimit is below cpu: write a limit of at least the request, or leave cpuLimit out",
    ),
    "image_with_scheme": (
        {"image": {"reference": "https://registry.example/worker:1"}},
        "spec.image.reference",
        "write an image without scheme and spaces, such as registry.example/tpmodel-worker:1.0",
    ),
    "pull_secret_in_capitals": ({"image": {"pullSecrets": ["My_Secret"]}}, "spec.image.pullSecrets[0]", NAME_HELP),
    "variable_with_dash": (
        {"env": [{"name": "NCCL-DEBUG", "value": "INFO"}]},
        "spec.env[0].name",
        "write a variable's name: letters, digits and '_'",
    ),
    "variable_of_the_operator": (
        {"env": [{"name": "TPMODEL_POD_NAME", "value": "x"}]},
        "spec.env[0].name",
        "names that begin with TPMODEL_ belong to the operator",
    ),
    "token_in_the_environment": (
        {"env": [{"name": "HF_TOKEN", "value": "x"}]},
        "spec.env[0].name",
        RESERVED_ENVIRONMENT,
    ),
    "variable_with_two_values": (
        {"env": [{"name": "A", "value": "x", "secretKeyRef": {"name": "s", "key": "k"}}]},
        "spec.env[0].secretKeyRef",
        "value and secretKeyRef both give the variable's value: write only one of them",
    ),
    "own_toleration_of_dead_nodes": (
        {"scheduling": {"tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}]}},
        "spec.scheduling.tolerations[0]",
        "how long pods stay on a dead node is set by scheduling.deadNodeToleration: leave this toleration out",
    ),
    "topology_key_with_space": (
        {"scheduling": {"topologyKey": "my rack"}},
        "spec.scheduling.topologyKey",
        "write a node label's key, such as topology.kubernetes.io/zone",
    ),
    "one_port_for_two": (
        {"service": {"port": 8000}},
        "spec.service.httpPort",
        "port and httpPort are the same: write two different ports",
    ),
    "peer_of_two_kinds": (
        {"service": {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}},
        "spec.service.from[0]",
        "write either ipBlock, or podSelector and/or namespaceSelector, in each entry",
    ),
    "secret_without_name": (
        {"auth": {"apiKey": {"name": "Key!", "key": "k"}}},
        "spec.auth.apiKey.name",
        NAME_HELP,
    ),
    "label_of_the_operator": (
        {"podTemplate": {"labels": {"tpmodel.dev/model": "other"}}},
        "spec.podTemplate.labels",
        RESERVED_LABELS,
    ),
    "label_of_the_statefulset": (
        {"podTemplate": {"labels": {"apps.kubernetes.io/pod-index": "0"}}},
        "spec.podTemplate.labels",
        RESERVED_LABELS,
    ),
    "annotation_of_the_operator": (
        {"podTemplate": {"annotations": {"tpmodel.dev/image": "other"}}},
        "spec.podTemplate.annotations",
        "annotations under tpmodel.dev/ belong to the operator: write annotations with a prefix of your own",
    ),
    "host_path_volume": (
        volume(hostPath={"path": "/"}),
        "spec.podTemplate.volumes[0]",
        (
            "hostPath volumes are not allowed here: use another kind of volume, or cache.type hostPath or a file:// "
            "model under the prefixes that the operator allows"
        ),
    ),
    "volume_without_source": (
        volume(),
        "spec.podTemplate.volumes[0]",
        (
            "write exactly one of configMap, secret, emptyDir, persistentVolumeClaim, projected, downwardAPI, csi, "
            "ephemeral, image"
        ),
    ),
    "volume_of_the_worker": (
        {"podTemplate": {"volumes": [{"name": "token", "emptyDir": {}}]}},
        "spec.podTemplate.volumes[0]",
        (
            "names model, cache, runtime, shared-memory, temporary, attempt, token, trainer-token, api-key, tls, "
            "persisted-updates belong to the worker's own volumes: write another name"
        ),
    ),
    "mount_without_volume": (
        mount("/extra", name="other"),
        "spec.podTemplate.volumeMounts",
        "each of volumeMounts must name one of podTemplate.volumes: add the volume, or correct the name",
    ),
    "mount_over_the_worker": (
        mount("/etc/tpmodel/token"),
        "spec.podTemplate.volumeMounts[0]",
        (
            "this mountPath belongs to the worker (/model, /cache, /run/tpmodel, /dev/shm, /tmp, /etc/tpmodel, "
            "/persisted-updates): write another one, such as /extra"
        ),
    ),
    "mount_at_a_relative_path": (
        mount("extra"),
        "spec.podTemplate.volumeMounts[0]",
        "write an absolute mountPath without '.' and '..' parts, such as /extra",
    ),
    "privileged_sidecar": (
        sidecar(securityContext={"privileged": True}),
        "spec.podTemplate.sidecars[0]",
        PRIVILEGE_HELP,
    ),
    "sidecar_with_capability": (
        sidecar(securityContext={"capabilities": {"add": ["NET_ADMIN"]}}),
        "spec.podTemplate.sidecars[0]",
        PRIVILEGE_HELP,
    ),
    "sidecar_as_root": (sidecar(securityContext={"runAsUser": 0}), "spec.podTemplate.sidecars[0]", PRIVILEGE_HELP),
    "sidecar_on_the_nodes_port": (
        sidecar(ports=[{"containerPort": 80, "hostPort": 80}]),
        "spec.podTemplate.sidecars[0]",
        "a sidecar opens no port of its node: leave hostPort out",
    ),
    "sidecar_named_worker": (
        sidecar(name="worker"),
        "spec.podTemplate.sidecars[0]",
        "the name worker belongs to the model's container: write another one",
    ),
}
