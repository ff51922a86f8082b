"""The pods of a gang, as its StatefulSet makes them."""

from dataclasses import replace
from typing import Any

import pytest

from support.operator_cluster import IMAGE
from support.operator_objects import GANG, model_with, sibling
from tpmodel_operator import names, weights
from tpmodel_operator.resources import statefulset, volumes


def stateful(**changes: Any) -> dict[str, Any]:
    return statefulset.build(model_with(**changes), GANG)


def pod(**changes: Any) -> dict[str, Any]:
    return stateful(**changes)["spec"]["template"]["spec"]


def worker(**changes: Any) -> dict[str, Any]:
    (container,) = pod(**changes)["containers"]
    return container


def arguments(**changes: Any) -> dict[str, str]:
    """The command line by option; options that are given several times are left out."""
    return dict(argument.removeprefix("--").split("=", 1) for argument in worker(**changes)["args"])


def volume(name: str, **changes: Any) -> dict[str, Any]:
    (found,) = (volume for volume in pod(**changes)["volumes"] if volume["name"] == name)
    return found


def mounts(**changes: Any) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in worker(**changes)["volumeMounts"]}


# ------------------------------------------------------------------------------------------------ the StatefulSet


def test_a_statefulset_makes_all_pods_at_once_and_replaces_none_by_itself():
    spec = stateful(tensorParallelSize=4, ranksPerPod=2)["spec"]
    assert spec["replicas"] == 2
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "OnDelete"}
    assert spec["serviceName"] == "chat-pods"
    assert "volumeClaimTemplates" not in spec


def test_a_statefulset_is_named_labelled_and_owned():
    metadata = stateful()["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("chat-0-bcdfg", "space")
    assert metadata["labels"] == names.gang_labels("chat", "chat-0-bcdfg", 0, "bcdfg")
    source = weights.source(model_with())
    assert metadata["annotations"] == {names.IMAGE_ANNOTATION: IMAGE, names.WEIGHTS_SOURCE_ANNOTATION: source}
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("TPModel", "model-uid", True)


def test_a_statefulset_selects_the_pods_of_its_gang_only():
    spec = stateful()["spec"]
    assert spec["selector"]["matchLabels"] == {names.GANG_LABEL: "chat-0-bcdfg"}
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_the_attempt_is_not_part_of_the_pods():
    """It changes with every restart, the StatefulSet never does."""
    assert "attempt" not in " ".join(stateful()["spec"]["template"]["metadata"]["labels"])
    other = statefulset.build(
        model_with(), type(GANG)(name=GANG.name, index=0, revision=GANG.revision, image=GANG.image, attempt=9)
    )
    assert other == stateful()


# ------------------------------------------------------------------------------------------------- the command line


def test_the_worker_is_told_everything():
    assert arguments(drainTimeout=60) == {
        "model-uri": "hf://organisation/model",
        "served-name": "organisation/model",
        "tensor-parallel-size": "2",
        "ranks-per-pod": "1",
        "leader-host": "chat-0-bcdfg-0.chat-pods.space.svc",
        "device": "cpu",
        "dtype": "auto",
        "quantization": "none",
        "max-model-len": "0",
        "load-format": "safetensors",
        "recovery-mode": "Restart",
        "drain-timeout": "60",
        "progress-deadline": "600",
        "cache-dir": "/cache",
        "attempt-file": "/etc/tpmodel/attempt/attempt",
        "token-file": "/etc/tpmodel/token/token",
    }
    assert worker()["command"] == ["tpmodel-worker"]


def test_engine_options_are_given_one_by_one():
    model = {"uri": "hf://organisation/model", "engineOptions": {"queue_limit": "5", "block_size": "32"}}
    assert worker(model=model)["args"][-2:] == ["--engine-option=block_size=32", "--engine-option=queue_limit=5"]


def test_a_value_that_looks_like_a_variable_is_not_expanded():
    model = {"uri": "hf://organisation/model", "servedName": "$(HF_TOKEN)"}
    assert arguments(model=model)["served-name"] == "$$(HF_TOKEN)"


@pytest.mark.parametrize(
    ("uri", "source", "path"),
    [
        ("pvc://weights/llama/8b", {"persistentVolumeClaim": {"claimName": "weights"}}, "/model/llama/8b"),
        ("pvc://weights", {"persistentVolumeClaim": {"claimName": "weights"}}, "/model"),
        ("file:///var/models/8b", {"hostPath": {"path": "/var/models/8b", "type": "Directory"}}, "/model"),
        ("oci://r.example/8b:1", {"image": {"reference": "r.example/8b:1", "pullPolicy": "IfNotPresent"}}, "/model"),
    ],
)
def test_a_checkpoint_is_mounted_read_only(uri: str, source: dict[str, Any], path: str):
    model = {"uri": uri}
    assert volume("model", model=model) == {"name": "model"} | source
    assert mounts(model=model)["/model"]["readOnly"] is True
    assert arguments(model=model)["model-path"] == path


def test_a_model_of_the_hub_is_downloaded_into_the_cache():
    model = {"uri": "hf://organisation/model", "revision": "main", "secretRef": {"name": "hub", "key": "token"}}
    assert "/model" not in mounts(model=model)
    assert "model-path" not in arguments(model=model)
    assert arguments(model=model)["model-revision"] == "main"
    token = next(variable for variable in worker(model=model)["env"] if variable["name"] == "HF_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


# ---------------------------------------------------------------------------------------------- volumes, variables


@pytest.mark.parametrize(
    ("cache", "source"),
    [
        ({}, {"emptyDir": {}}),
        ({"type": "emptyDir", "sizeLimit": "10Gi"}, {"emptyDir": {"sizeLimit": "10Gi"}}),
        ({"type": "pvc", "claimName": "shared"}, {"persistentVolumeClaim": {"claimName": "shared"}}),
        (
            {"type": "hostPath", "path": "/var/cache"},
            {"hostPath": {"path": "/var/cache", "type": "DirectoryOrCreate"}},
        ),
    ],
)
def test_the_cache_is_of_the_kind_that_is_wanted(cache: dict[str, Any], source: dict[str, Any]):
    assert volume("cache", cache=cache) == {"name": "cache"} | source
    assert "readOnly" not in mounts(cache=cache)["/cache"]


def test_everything_that_the_worker_writes_has_a_volume_since_its_root_is_read_only():
    assert {path for path, mount in mounts().items() if not mount.get("readOnly")} == {
        "/cache",
        "/run/tpmodel",
        "/dev/shm",
        "/tmp",
    }
    for name in ("runtime", "shared-memory"):
        assert volume(name)["emptyDir"] == {"medium": "Memory"}


def test_attempt_and_token_are_the_gangs_own():
    assert volume("attempt")["configMap"]["name"] == "chat-0-bcdfg-attempt"
    assert volume("token")["secret"]["secretName"] == "chat-0-bcdfg-token"
    assert mounts()["/etc/tpmodel/token"]["readOnly"] is True


def test_secrets_can_be_read_by_the_pods_group_only():
    auth = {"apiKey": {"name": "keys", "key": "chat"}, "tlsSecretName": "cert"}
    for name in ("token", "api-key", "tls"):
        assert volume(name, auth=auth)["secret"]["defaultMode"] == 0o440


def test_an_api_key_and_a_certificate_are_mounted_where_they_are_given():
    auth = {"apiKey": {"name": "keys", "key": "chat"}, "tlsSecretName": "cert"}
    assert volume("api-key", auth=auth)["secret"]["items"] == [{"key": "chat", "path": "api-key"}]
    assert volume("tls", auth=auth)["secret"]["secretName"] == "cert"
    assert arguments(auth=auth)["api-key-file"] == "/etc/tpmodel/auth/api-key"
    assert arguments(auth=auth)["tls-dir"] == "/etc/tpmodel/tls"
    assert "/etc/tpmodel/tls" not in mounts()


def test_a_pod_learns_who_it_is():
    fields = {
        variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"]
        for variable in worker()["env"]
        if "fieldRef" in variable.get("valueFrom", {})
    }
    assert fields == {
        "TPMODEL_POD_NAME": "metadata.name",
        "TPMODEL_POD_UID": "metadata.uid",
        "TPMODEL_POD_IP": "status.podIP",
        "TPMODEL_NAMESPACE": "metadata.namespace",
        "TPMODEL_POD_INDEX": "metadata.labels['apps.kubernetes.io/pod-index']",
    }


def test_downloads_and_compiled_kernels_are_kept_in_the_cache():
    variables = {variable["name"]: variable.get("value") for variable in worker()["env"]}
    assert variables["HF_HOME"] == "/cache/hub"
    assert variables["TRITON_CACHE_DIR"] == "/cache/triton"
    assert variables["HOME"] == "/tmp"


def test_variables_of_the_user_come_last_so_that_they_can_refer_to_the_others():
    env = [
        {"name": "ADDRESS", "value": "$(TPMODEL_POD_IP):80"},
        {"name": "KEY", "secretKeyRef": {"name": "keys", "key": "a"}},
    ]
    assert worker(env=env)["env"][-2:] == [
        {"name": "ADDRESS", "value": "$(TPMODEL_POD_IP):80"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a"}}},
    ]


# ------------------------------------------------------------------------------------------------------- resources


def test_gpus_follow_from_ranks_per_pod():
    resources = worker(device="cuda", tensorParallelSize=8, ranksPerPod=4)["resources"]
    assert resources["limits"] == resources["requests"] == {"nvidia.com/gpu": "4"}


def test_without_ranks_per_pod_as_many_gpus_as_a_host_has_go_into_a_pod():
    made = stateful(device="cuda", tensorParallelSize=16, ranksPerPod=None)
    assert made["spec"]["replicas"] == 2
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_another_resource_can_stand_for_a_gpu():
    resources = worker(device="cuda", gpuResourceName="amd.com/gpu")["resources"]
    assert resources["limits"] == {"amd.com/gpu": "1"}


def test_claims_give_the_gpus_instead():
    claims = [{"name": "gpus", "resourceClaimTemplateName": "four-gpus"}]
    assert pod(device="cuda", resourceClaims=claims)["resourceClaims"] == claims
    resources = worker(device="cuda", resourceClaims=claims)["resources"]
    assert resources == {"claims": [{"name": "gpus"}]}


def test_on_cpu_no_gpu_is_asked_for():
    assert worker()["resources"] == {}


def test_memory_is_requested_as_it_is_limited_and_cpu_is_not():
    wanted = {"cpu": "4", "memory": "64Gi", "cpuLimit": "8"}
    assert worker(resources=wanted)["resources"] == {
        "requests": {"cpu": "4", "memory": "64Gi"},
        "limits": {"cpu": "8", "memory": "64Gi"},
    }


def test_only_rdma_brings_a_device_and_the_right_to_lock_memory():
    rdma = worker(device="cuda", network={"rdma": True, "rdmaResourceName": "rdma/ib"})
    assert rdma["resources"]["limits"] == {"nvidia.com/gpu": "1", "rdma/ib": "1"}
    assert rdma["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert worker()["securityContext"]["capabilities"] == {"drop": ["ALL"]}


# ------------------------------------------------------------------------------------------------ security, probes


def test_pods_are_as_pod_security_restricted_wants_them():
    made = pod()
    context = made["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 1000, 1000)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    container = worker()["securityContext"]
    assert container["allowPrivilegeEscalation"] is False
    assert container["readOnlyRootFilesystem"] is True
    assert made["automountServiceAccountToken"] is False
    assert made["enableServiceLinks"] is False
    assert made["serviceAccountName"] == "chat"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(made)


def test_a_pod_has_its_drain_and_a_quarter_of_a_minute_to_end():
    assert pod(drainTimeout=100)["terminationGracePeriodSeconds"] == 115


def test_the_supervisor_is_asked_whether_it_lives_and_the_gang_whether_it_is_ready():
    made = worker()
    assert made["livenessProbe"]["grpc"] == {"port": 9002, "service": ""}
    assert made["readinessProbe"]["grpc"] == {"port": 9002, "service": "tpmodel.v1.Ready"}
    assert "startupProbe" not in made


def test_an_answer_that_is_late_is_not_taken_for_a_no():
    probe = worker()["readinessProbe"]
    # "No" counts at once; silence has to last.
    assert probe["failureThreshold"] == 1
    assert probe["timeoutSeconds"] >= 5


def test_the_termination_message_is_what_the_supervisor_wrote_never_its_log():
    assert worker()["terminationMessagePolicy"] == "File"


def test_ports_have_names():
    ports = {port["name"]: port["containerPort"] for port in worker()["ports"]}
    assert ports == {"grpc": 9000, "http": 8000, "control": 9001, "health": 9002, "metrics": 9003}


def test_the_image_is_that_of_the_gang_and_pulled_as_wanted():
    image = {"reference": "another/one:2", "pullPolicy": "Always", "pullSecrets": ["registry"]}
    assert (worker(image=image)["image"], worker(image=image)["imagePullPolicy"]) == (IMAGE, "Always")
    assert pod(image=image)["imagePullSecrets"] == [{"name": "registry"}]


# ------------------------------------------------------------------------------------------------------- placement


def test_a_dead_node_is_tolerated_for_a_short_while_only():
    user = {"key": "gpu", "operator": "Exists"}
    tolerations = pod(scheduling={"tolerations": [user], "deadNodeToleration": 20})["tolerations"]
    assert tolerations[0] == user
    assert {(entry["key"], entry["tolerationSeconds"]) for entry in tolerations[1:]} == {
        ("node.kubernetes.io/not-ready", 20),
        ("node.kubernetes.io/unreachable", 20),
    }


def test_without_a_topology_key_the_users_affinity_is_passed_on():
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    assert pod(scheduling={"affinity": affinity})["affinity"] == affinity
    assert "affinity" not in pod()


def test_a_topology_key_keeps_a_gang_together_and_gangs_apart_where_possible():
    rack = "example.com/rack"
    affinity = pod(scheduling={"topologyKey": rack})["affinity"]
    (together,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert together == {"topologyKey": rack, "labelSelector": {"matchLabels": {names.GANG_LABEL: "chat-0-bcdfg"}}}
    (apart,) = affinity["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert apart["podAffinityTerm"]["topologyKey"] == rack
    selector = apart["podAffinityTerm"]["labelSelector"]
    assert selector["matchLabels"] == {names.MODEL_LABEL: "chat"}
    (not_this_gang,) = selector["matchExpressions"]
    assert (not_this_gang["operator"], not_this_gang["values"]) == ("NotIn", ["chat-0-bcdfg"])


def test_a_topology_key_adds_to_the_users_affinity_without_changing_the_spec():
    term = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "db"}}}
    model = model_with(
        scheduling={
            "topologyKey": "rack",
            "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}},
        }
    )
    first, second = (statefulset.build(model, GANG)["spec"]["template"]["spec"]["affinity"] for _ in range(2))
    assert first == second
    assert first["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0] == term
    assert len(first["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]) == 2


def test_where_pods_go_is_passed_on():
    made = pod(scheduling={"nodeSelector": {"gpu": "h200"}, "priorityClassName": "high", "schedulerName": "volcano"})
    assert made["nodeSelector"] == {"gpu": "h200"}
    assert (made["priorityClassName"], made["schedulerName"]) == ("high", "volcano")
    assert not {"nodeSelector", "priorityClassName", "schedulerName"} & set(pod())


# ---------------------------------------------------------------------------------------------------- podTemplate


def test_labels_and_annotations_are_added_but_never_instead_of_the_operators():
    added = {"labels": {"team": "a", names.GANG_LABEL: "another"}, "annotations": {"note": "b"}}
    metadata = stateful(podTemplate=added)["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["labels"][names.GANG_LABEL] == "chat-0-bcdfg"
    assert metadata["annotations"] == {"note": "b"}


def test_extra_volumes_are_mounted_in_the_worker():
    added = {
        "volumes": [{"name": "extra", "configMap": {"name": "settings"}}],
        "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
    }
    assert volume("extra", podTemplate=added) == added["volumes"][0]
    assert mounts(podTemplate=added)["/extra"] == added["volumeMounts"][0]


def test_a_sidecar_starts_before_the_worker_outlives_its_drain_and_has_no_privilege():
    sidecar = {"name": "logs", "image": "logs:1", "securityContext": {"runAsUser": 1234}}
    (made,) = pod(podTemplate={"sidecars": [sidecar]})["initContainers"]
    assert made["restartPolicy"] == "Always"
    assert made["securityContext"] == {
        "runAsUser": 1234,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


# ------------------------------------------------------------------------------------------- weight updates

TRAINER = {"trainerToken": {"name": "trainer", "key": "secret"}}


def test_a_gang_has_a_token_of_its_own_also_where_trainers_have_one():
    for auth in ({}, TRAINER):
        assert volume("token", auth=auth)["secret"]["secretName"] == "chat-0-bcdfg-token"
        assert arguments(auth=auth)["token-file"] == "/etc/tpmodel/token/token"


def test_the_token_of_trainers_is_a_file_that_follows_its_secret():
    source = volume("trainer-token", auth=TRAINER)["secret"]
    assert (source["secretName"], source["items"]) == ("trainer", [{"key": "secret", "path": names.TOKEN_KEY}])
    mount = mounts(auth=TRAINER)["/etc/tpmodel/trainer"]
    assert mount == {"name": "trainer-token", "mountPath": "/etc/tpmodel/trainer", "readOnly": True}
    assert arguments(auth=TRAINER)["trainer-token-file"] == "/etc/tpmodel/trainer/token"


def test_without_a_trainers_token_there_are_no_updates():
    assert "trainer-token-file" not in arguments()


def test_updates_are_not_kept_unless_that_is_asked_for():
    assert "persist-updates" not in arguments()


def test_updates_are_kept_in_a_folder_of_this_models_present_checkpoint():
    """Others may share the volume, and versions of another checkpoint are other weights."""
    changes = {"weightUpdates": {"persistUpdates": "pvc://sets/here"}}
    source = weights.source(model_with(**changes))
    assert arguments(**changes)["persist-updates"] == f"/persisted-updates/here/space.chat.{source}/0"
    assert volume("persisted-updates", **changes)["persistentVolumeClaim"] == {"claimName": "sets"}
    assert "readOnly" not in mounts(**changes)["/persisted-updates"]
    other = {"model": {"uri": "hf://organisation/other"}, **changes}
    assert arguments(**other)["persist-updates"] != arguments(**changes)["persist-updates"]


def test_updates_may_be_kept_in_a_folder_of_the_node():
    changes = {"weightUpdates": {"persistUpdates": "file:///srv/sets"}}
    assert volume("persisted-updates", **changes)["hostPath"]["path"] == "/srv/sets"
    assert arguments(**changes)["persist-updates"].startswith("/persisted-updates/space.chat.")


def test_gangs_keep_their_updates_in_folders_of_their_own_which_outlive_a_rollout():
    model = model_with(weightUpdates={"persistUpdates": "pvc://sets"})
    rolled = model_with(weightUpdates={"persistUpdates": "pvc://sets"}, drainTimeout=60)
    next_revision = replace(GANG, name="chat-0-zzzzz", revision="zzzzz")
    paths = [volumes.updates_path(model, GANG), volumes.updates_path(model, sibling(1))]
    assert len(set(paths)) == 2
    assert volumes.updates_path(rolled, next_revision) == paths[0]


def test_a_gang_is_told_where_the_others_are_that_may_have_weights_which_it_lost():
    said = arguments(auth=TRAINER)
    assert said["weights-from"] == "chat-trainers.space.svc:9001"
    assert said["weights-source"] == weights.source(model_with(auth=TRAINER))


def test_without_a_common_token_gangs_do_not_ask_each_other():
    assert not {"weights-from", "weights-source"} & arguments().keys()
