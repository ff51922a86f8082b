"""TPModels that cannot work, applied with kubectl: the API server or the operator says what to write instead."""

from __future__ import annotations

import json

import pytest

from support.wrong_tpmodels import WRONG
from tests.cluster.kubectl import Kubectl, KubectlError, Object
from tests.e2e.support.manifests import CLAIM
from tests.e2e.support.models import deployed
from tpmodel_operator import names

REFUSED = (
    "ranks_not_divisible",
    "gpus_by_resource_and_by_claims",
    "cpu_with_gpu_resource",
    "cpu_with_rdma",
    "mig_slice_with_two_ranks",
    "shared_gpu_with_two_ranks",
    "rollout_that_cannot_move",
    "backoff_limit_below_base",
    "uri_without_scheme",
    "hub_name_with_revision",
    "file_with_two_slashes",
    "privileged_sidecar",
    "sidecar_named_worker",
)
"""Of what tests/support/wrong_tpmodels.py has; a ring further in, every one of them is tried."""


def bare(name: str, spec: Object) -> Object:
    """A TPModel with nothing but what is given."""
    usual = {"model": {"uri": "hf://organisation/name"}}
    return {
        "apiVersion": "tpmodel.dev/v1alpha1",
        "kind": "TPModel",
        "metadata": {"name": name},
        "spec": usual | spec,
    }


def refusal(kubectl: Kubectl, model: Object) -> str:
    """What `kubectl apply` says."""
    with pytest.raises(KubectlError) as caught:
        kubectl.run("apply", "--filename=-", standard_input=json.dumps(model))
    return caught.value.output


@pytest.mark.parametrize("what", REFUSED)
def test_kubectl_apply_says_what_to_write(models: Kubectl, what: str) -> None:
    spec, field, message = WRONG[what]
    output = refusal(models, bare("wrong", spec))
    assert "is invalid" in output
    assert f"{field}: " in output
    assert message in output
    assert models.find("tpmodel", "wrong") is None


def test_kubectl_apply_names_an_unknown_field_and_a_name_that_is_too_long(models: Kubectl) -> None:
    assert 'unknown field "spec.tensorParallel"' in refusal(models, bare("wrong", {"tensorParallel": 2}))
    too_long = "m" * (names.LONGEST_MODEL_NAME + 1)
    assert f"write at most {names.LONGEST_MODEL_NAME} characters" in refusal(models, bare(too_long, {}))


NOT_ACCEPTED: dict[str, tuple[Object, str, str]] = {
    "folder_outside_the_allowed": (
        {"model": {"uri": "file:///etc/kubernetes"}},
        "HostPathNotAllowed",
        "have the cluster's administrator add it to allowedHostPaths of the chart",
    ),
    "claim_that_does_not_exist": (
        {"model": {"uri": "pvc://nothing/model"}},
        "ClaimNotFound",
        "PersistentVolumeClaim 'nothing' does not exist in this namespace: create it, or correct its name",
    ),
    "claim_for_one_pod_and_two_pods": (
        {"model": {"uri": "pvc://alone/model"}},
        "ClaimNotShareable",
        "use a claim with access mode ReadWriteMany (or ReadOnlyMany for a model), or make it one pod",
    ),
    "cache_that_cannot_be_written": (
        {"cache": {"type": "pvc", "claimName": CLAIM}},
        "ClaimNotWritable",
        "use a claim with access mode ReadWriteMany",
    ),
}


@pytest.fixture
def claim_for_one_pod(models: Kubectl) -> None:
    models.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "alone"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "",
            },
        }
    )


@pytest.mark.parametrize("what", NOT_ACCEPTED)
def test_the_operator_says_what_it_does_not_accept_and_makes_no_pod(
    models: Kubectl, claim_for_one_pod: None, what: str
) -> None:
    spec, reason, remedy = NOT_ACCEPTED[what]
    with deployed(models, "wrong", ready=False, **spec) as model:
        models.wait("tpmodel", "wrong", "condition=Accepted=false", seconds=20)
        accepted = model.condition("Accepted")
        assert accepted["reason"] == reason
        assert remedy in accepted["message"]
        # For `helm --wait` and whoever else reads kstatus.
        assert model.condition("Ready")["status"] == "False"
        assert model.condition("Stalled")["status"] == ("False" if reason == "ClaimNotFound" else "True")
        assert not model.pods()
