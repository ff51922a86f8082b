"""`helm test`: the operator answers, TPModels are served, a good one is taken and a wrong one refused."""

import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def read(name: str) -> str:
    """One file of this pod's service account."""
    return (ACCOUNT / name).read_text().strip()


def create(tensor_parallel_size: int) -> tuple[int, str]:
    """The HTTP status of a dry run, and what is wrong: nothing is made."""
    model = {
        "apiVersion": "tpmodel.dev/v1alpha1",
        "kind": "TPModel",
        "metadata": {"name": "helm-test"},
        "spec": {
            "model": {"uri": "hf://organisation/name"},
            "tensorParallelSize": tensor_parallel_size,
            "ranksPerPod": 2,
        },
    }
    host = f"{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    request = urllib.request.Request(
        f"https://{host}/apis/tpmodel.dev/v1alpha1/namespaces/{read('namespace')}/tpmodels?dryRun=All",
        json.dumps(model).encode(),
        {"Authorization": f"Bearer {read('token')}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


with urllib.request.urlopen(os.environ["METRICS_URL"], timeout=10) as answer:
    metrics = answer.read().decode()
assert "tpmodel_operator_models" in metrics, metrics
print("ok: the operator serves its metrics")

status, problem = create(4)
assert status == 201, (status, problem)
print("ok: a TPModel is taken")

status, problem = create(3)
assert status == 422, (status, problem)
assert "not divisible by ranksPerPod" in problem, problem
print("ok: a wrong TPModel is refused")
