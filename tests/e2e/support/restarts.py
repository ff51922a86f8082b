"""Restarts of a model's only gang: what the tests of faults look at."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cluster.kubectl import Object
from tests.e2e.support.clients import Client
from tests.e2e.support.models import READY_SECONDS, DeployedModel
from tpmodel_operator import names

STURDY: Object = {
    # Restarts at once, as often as tests want.
    "recovery": {"maxRestarts": 1000, "backoffBase": 0, "backoffLimit": 0},
    "drainTimeout": 5,
    "scheduling": {
        "deadNodeToleration": 5,
        "affinity": {
            # Each pod on a node of its own, where there are enough.
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {
                            "topologyKey": "kubernetes.io/hostname",
                            "labelSelector": {"matchExpressions": [{"key": names.GANG_LABEL, "operator": "Exists"}]},
                        },
                    }
                ]
            },
        },
    },
}
"""Of a model whose gang is broken in many ways, one after the other."""
PROMPT = [5, 17, 256, 1024]


@dataclass(frozen=True)
class Before:
    """A gang before a fault."""

    model: DeployedModel
    gang: Object
    pods: list[Object]

    @classmethod
    def of(cls, model: DeployedModel) -> Before:
        """As it is now; it must be complete."""
        return cls(model, model.gang(), model.pods())

    @property
    def attempt(self) -> int:
        """Its attempt."""
        return self.gang["attempt"]

    @property
    def leader(self) -> Object:
        """The leader pod."""
        return self.pods[0]

    @property
    def worker(self) -> Object:
        """The other pod."""
        return self.pods[1]

    @property
    def uids(self) -> set[str]:
        """Of its pods."""
        return {pod["metadata"]["uid"] for pod in self.pods}

    def wait_restarted(self, *, seconds: float = READY_SECONDS) -> Object:
        """Waits until the gang is Ready again, after exactly one restart; returns its status."""
        self.model.until(self._is_ready_again, what="Ready after a restart", seconds=seconds, interval=0.2)
        return self.check_restarted_once()

    def check_restarted_once(self) -> Object:
        """One attempt more, everywhere, and none of the former pods; returns the gang's status."""
        gang = self.model.gang(self.gang["name"])
        why = self.model.explain()
        assert gang["attempt"] == self.attempt + 1, why
        assert gang["restartsTotal"] == self.gang["restartsTotal"] + 1, why
        assert attempt_in_config_map(self.model, gang["name"]) == gang["attempt"]
        assert not self.uids & self.model.uids(), why
        return gang

    def check_untouched(self) -> None:
        """No restart has been decided, and no pod replaced."""
        assert self.model.gang(self.gang["name"])["attempt"] == self.attempt, self.model.explain()
        assert self.model.uids() == self.uids, self.model.explain()

    def _is_ready_again(self) -> bool:
        gang = self.model.gang(self.gang["name"])
        return gang["attempt"] > self.attempt and gang["ready"] and "restart" not in gang


def attempt_in_config_map(model: DeployedModel, gang: str) -> int:
    """What the gang's pods read when they start."""
    item = model.kubectl.get("configmap", names.attempt_config_map(gang))
    return int(item["data"][names.ATTEMPT_KEY])


def ask(model: DeployedModel, client: Client) -> list[list[int]]:
    """An answer, through the Service whose address stays: name servers may remember the names of pods for 30 s."""
    service = f"{model.name}.{model.kubectl.namespace}.svc:{names.INFERENCE_PORT}"
    return client.complete(service, [PROMPT], max_tokens=8, temperature=0, ignore_eos=True)
