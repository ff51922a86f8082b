"""TPModels as the tests apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.cluster import checkpoints
from tests.cluster.kubectl import Object

CLAIM = "models"
"""The claim through which pods read the nodes' checkpoints."""
CHECKPOINT = checkpoints.DEFAULT_MODEL.name
DTYPE = "float32"
"""In which tokens do not depend on how ranks talk to each other."""


def tpmodel(name: str, **spec: Any) -> Object:
    """The default model in gangs of two pods with a rank each; `spec` is merged into it, at any depth.

    Small in all it asks for: several gangs share two cores.
    """
    usual: Object = {
        "model": {
            "uri": f"pvc://{CLAIM}/{CHECKPOINT}",
            "dtype": DTYPE,
            "engineOptions": {"kv_cache_memory": "64Mi", "max_num_seqs": "16"},
        },
        "tensorParallelSize": 2,
        "ranksPerPod": 1,
        "device": "cpu",
        "replicas": 1,
        "resources": {"cpu": "50m", "memory": "2Gi"},
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        # These tests are about restarts of whole gangs, whatever the default is.
        "recovery": {"mode": "Restart"},
    }
    return {
        "apiVersion": "tpmodel.dev/v1alpha1",
        "kind": "TPModel",
        "metadata": {"name": name},
        "spec": merged(usual, spec),
    }


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Object:
    """Both; where both have a value, the second's, and parts of both are merged in turn."""
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = merged(before, value) if both else value  # pyright: ignore[reportArgumentType]
    return result


RESTRICTED_CONTAINER: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
RESTRICTED_POD: Object = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def restricted_namespace(name: str) -> Object:
    """A namespace where Pod Security refuses every pod that is not `restricted`, and warns of nothing less."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": levels}}
