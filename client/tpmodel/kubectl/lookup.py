"""Finds what a command is about: the TPModel, its gangs, a leader pod that takes requests."""

from __future__ import annotations

from dataclasses import dataclass

from tpmodel.kubectl.kubectl import Kubectl
from tpmodel.kubectl.names import MODELS, command
from tpmodel.kubectl.pods import PodView
from tpmodel.kubectl.problems import KubectlError
from tpmodel.kubectl.view import GangView, ModelView, model_view, pod_selector


@dataclass(frozen=True, slots=True)
class Leader:
    """A gang's leader pod that takes requests."""

    model: ModelView
    gang: GangView
    pod: PodView

    @property
    def described(self) -> str:
        """For messages."""
        return f"gang {self.gang.index} of {self.model.full_name} (pod {self.pod.name})"


def find_model(kubectl: Kubectl, name: str) -> ModelView:
    """The TPModel with its pods.

    Raises:
        KubectlError: there is none; says which there are.
    """
    try:
        model = kubectl.get(MODELS, name)
    except KubectlError as error:
        if not error.not_found:
            raise
        raise KubectlError(_no_such_model(kubectl, name)) from error
    return model_view(model, kubectl.items("pods", f"--selector={pod_selector(name)}"))


def choose_gang(model: ModelView, wanted: str | None) -> GangView | None:
    """The gang that --gang names by number or name; None: any will do.

    Raises:
        KubectlError: there is no such gang; says which there are.
    """
    if wanted is None:
        return None
    for gang in model.gangs:
        if wanted in (gang.name, str(gang.index)):
            return gang
    there = ", ".join(f"{gang.index} ({gang.name})" for gang in model.gangs) or "none"
    raise KubectlError(f"{model.full_name} has no gang {wanted}; there are: {there}")


def find_leader(kubectl: Kubectl, name: str, wanted: str | None) -> Leader:
    """A leader pod of the TPModel, or of the gang that is wanted, that is ready now.

    Raises:
        KubectlError: there is none; says why, as far as status tells.
    """
    return choose_leader(find_model(kubectl, name), wanted, hint=command(f"status {name}", kubectl.connection))


def choose_leader(model: ModelView, wanted: str | None, *, hint: str) -> Leader:
    """As find_leader; hint: the command that shows more."""
    gang = choose_gang(model, wanted)
    for candidate in model.gangs if gang is None else (gang,):
        if candidate.leader is not None:
            return Leader(model, candidate, candidate.leader)
    if gang is not None:
        raise KubectlError(f"gang {gang.index} of {model.full_name} takes no requests, it is {gang.phase}; see: {hint}")
    if model.replicas == 0:
        raise KubectlError(
            f"{model.full_name} is scaled to zero: kubectl scale tpmodel {model.name} -n {model.namespace} --replicas=1"
        )
    why = model.problem or "no leader pod is ready"
    raise KubectlError(f"{model.full_name} has no gang that takes requests: {why}; see: {hint}")


def _no_such_model(kubectl: Kubectl, name: str) -> str:
    models = [model_view(item) for item in kubectl.items(MODELS)]
    if models:
        there = ", ".join(sorted(model.name for model in models)[:20])
        return f"there is no TPModel {name} in namespace {models[0].namespace}; there are: {there}"
    namespace = kubectl.connection.namespace or "the context's namespace"
    return f"there is no TPModel {name}, and none at all in {namespace}; see: kubectl tpmodel list --all-namespaces"
