"""The status of a TPModel: what the operator found and did, as users and the operator's next pass read it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tpmodel_operator.api_types import Message, StatusModel, StatusText, keyed_by

KEPT = 4
"""Entries of each history: a status with many gangs must stay small."""


class Condition(StatusModel):
    """A metav1.Condition."""

    type: StatusText
    """Accepted, Ready, Progressing, Degraded, Stalled, UpgradeAvailable, WeightsReady, Advice or Reconciling."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: StatusText
    """One CamelCase word for programs."""
    message: Message = ""
    """For people: what is the case, and what to do about it."""
    last_transition_time: StatusText
    """When status last changed, RFC 3339."""
    observed_generation: int = 0
    """metadata.generation that this was decided from."""


class GangPod(StatusModel):
    """One pod of a gang, as last seen."""

    name: StatusText
    """Name of the pod; ends in its ordinal, 0 is the leader pod."""
    uid: StatusText
    """UID: a pod made again under the same name has another."""
    ready: bool = False
    """Whether the pod is Ready."""
    node: StatusText = ""
    """Node that it is bound to."""
    terminating: bool = False
    """Whether it is being deleted."""


class HandledEnd(StatusModel):
    """The ends of a pod's container up to restartCount have been answered by a restart."""

    uid: StatusText
    """UID of the pod."""
    restart_count: int
    """The container's restartCount up to which nothing is left to do."""


class LastRestart(StatusModel):
    """The latest coordinated restart."""

    cause: StatusText
    """Why all pods of the gang were made again: one CamelCase word."""
    message: StatusText = ""
    """What was seen, with the pod's own words where it had any."""
    exit_code: int | None = None
    """Exit code of the container that caused it, if one did."""
    time: StatusText
    """When it was decided, RFC 3339."""
    attempt: int
    """The attempt that it began."""


class Restart(StatusModel):
    """A coordinated restart under way: written before any pod is deleted."""

    attempt: int
    """The new attempt."""
    cause: StatusText
    """Why all pods of the gang are made again: one CamelCase word."""
    message: StatusText = ""
    """What was seen, with the pod's own words where it had any."""
    exit_code: int | None = None
    """Exit code of the container that caused it, if one did."""
    doomed: Annotated[list[StatusText], Field(max_length=1024)] = []
    """UIDs of pods of older attempts; any other pod of the gang is of the new one."""
    not_before: StatusText = ""
    """End of the backoff, RFC 3339: no pod is deleted before."""
    started: StatusText = ""
    """When it was decided, RFC 3339."""
    began: StatusText = ""
    """When its pods began to be deleted, RFC 3339: from then on doomed is final."""


class Failure(StatusModel):
    """Why a gang is Failed: it is left alone until the spec changes, or it becomes Ready by itself."""

    reason: Literal["ConfigurationRefused", "BudgetSpent"]
    """ConfigurationRefused: its container ended with 64. BudgetSpent: it has restarted recovery.maxRestarts times."""
    cause: StatusText
    """The cause of its last fault: one CamelCase word."""
    message: StatusText = ""
    """What was seen, with the pod's own words where it had any."""
    exit_code: int | None = None
    """Exit code of the container that caused it, if one did."""
    time: StatusText
    """When it was decided, RFC 3339."""


class GangFault(StatusModel):
    """A fault of a world that served, as its engine reported it."""

    time: StatusText
    """When it was detected, RFC 3339."""
    epoch: int
    """The world that it hit."""
    kind: StatusText
    """One word for programs."""
    message: StatusText = ""
    """What was seen."""


class GangRebuild(StatusModel):
    """A world that was rebuilt in place after a fault: processes and weights that were left are still the same."""

    time: StatusText
    """When the fault was detected, RFC 3339."""
    epoch: int
    """The new world."""
    kind: StatusText
    """Kind of the fault."""
    milliseconds: int
    """From the detection to the first step of the new world."""
    replayed_requests: int = 0
    """Requests that were under way and went on."""


class GangStatus(StatusModel):
    """One gang: the pods that serve one copy of the model."""

    name: StatusText
    """Name of its StatefulSet, and value of the label tpmodel.dev/gang."""
    index: int
    """Number of the gang within the TPModel."""
    revision: StatusText
    """Hash of the spec and image that it was made from."""
    uid: StatusText = ""
    """UID of its StatefulSet; empty until it has been seen."""
    attempt: int = 1
    """Number of its set of pods: each coordinated restart raises it."""
    epoch: int = 0
    """Number of its world, as its leader reports it."""
    phase: Literal["Pending", "Forming", "Loading", "Serving", "Rebuilding", "Draining", "Restarting", "Failed"] = (
        "Pending"
    )
    """Where it is in its life."""
    ready: bool = False
    """Whether its leader pod takes requests."""
    ready_ranks: int = 0
    """Ranks that have joined its world."""
    load_percent: int = 0
    """How much of the weights is loaded."""
    pods: Annotated[list[GangPod], Field(max_length=1024)] = []
    """Its pods."""
    restarts: int = 0
    """Restarts that count against recovery.maxRestarts: reset after the stability window."""
    restarts_total: int = 0
    """Restarts since it was made."""
    formed: bool = False
    """Whether all containers of this attempt have started; from then on losing one is a fault."""
    ready_since: StatusText = ""
    """Since when it has been Ready, RFC 3339."""
    not_ready_since: StatusText = ""
    """Since when it is no longer Ready, RFC 3339; empty before it has been Ready in this attempt."""
    was_ready_since: StatusText = ""
    """Since when it had been Ready before that, RFC 3339."""
    incomplete_since: StatusText = ""
    """Since when a pod that had started is being made again within the attempt, RFC 3339; empty: none is."""
    rebuilds_requested: int = 0
    """How often the annotation tpmodel.dev/rebuild has asked it for a new world."""
    faults: Annotated[list[GangFault], Field(max_length=KEPT)] = []
    """The last faults of its worlds, oldest first."""
    rebuilds: Annotated[list[GangRebuild], Field(max_length=KEPT)] = []
    """The last worlds that were rebuilt in place, oldest first."""
    last_restart: LastRestart | None = None
    """The latest coordinated restart."""
    restart: Restart | None = None
    """The coordinated restart under way."""
    failure: Failure | None = None
    """Why it is Failed."""
    handled: Annotated[list[HandledEnd], Field(max_length=1024)] = []
    """Container ends that have been answered by a restart."""
    image: StatusText = ""
    """The resolved image that it was made with."""
    model_revision: StatusText = ""
    """The commit that its pods use, of a model from a hub."""
    weights_version: int | None = None
    """The version of the weights that it serves, as its leader reports it; 0: the checkpoint. Absent: none, or not
    known."""
    weights_committed: int = 0
    """The last version that it has committed, or that it was made to have; its pods read it when they start."""
    weights_condition: StatusText = ""
    """Why it serves no weights, as its leader reports it: WeightsUpdating, WeightsIncomplete or WeightsLost."""
    weights_message: StatusText = ""
    """The same in words, and what to do."""
    weights_kept: int = 0
    """The newest version that all its ranks have in the volume of weightUpdates.persistUpdates; 0: none."""
    weights_keeping_error: StatusText = ""
    """Why the version that it serves is not kept there."""
    deadline_missed: bool = False
    """Whether it has missed the formation deadline and has not been Ready since."""


class TPModelStatus(StatusModel):
    """What the operator found and did."""

    observed_generation: int = 0
    """metadata.generation that this status was decided from."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=keyed_by("type"))] = []
    """Accepted: the spec can be served. Ready: enough gangs take requests. Progressing: gangs are being made or
    replaced. Degraded: fewer gangs than wanted serve. Stalled: nothing will change without a change of the spec.
    UpgradeAvailable: the operator's default image is newer than the one in use. WeightsReady: there only where weights
    were updated: all gangs serve the same version. Advice: there only where no node
    could hold a pod, with the value to write. Reconciling: there only while Progressing is True, for tools that know
    it from elsewhere."""
    replicas: int = 0
    """Gangs that exist."""
    ready_replicas: int = 0
    """Gangs that take requests."""
    updated_replicas: int = 0
    """Gangs of the newest revision."""
    ready: StatusText = ""
    """Ready gangs out of wanted gangs, such as 1/2."""
    selector: StatusText = ""
    """Label selector of the leader pods: what a HorizontalPodAutoscaler counts, one pod a gang."""
    restarts: int = 0
    """Coordinated restarts of all gangs that exist."""
    revision: StatusText = ""
    """The newest revision: hash of spec and image."""
    image: StatusText = ""
    """The worker image in use, resolved once per rollout."""
    model_revision: StatusText = ""
    """The commit that model.revision was resolved to, once per rollout."""
    rebuild_requested: StatusText = ""
    """The value of the annotation tpmodel.dev/rebuild that gangs were last told of."""
    url: StatusText = ""
    """What gRPC clients in the cluster dial."""
    trainers_url: StatusText = ""
    """What trainers of live weight updates dial, where auth.trainerToken lets them."""
    weights_version: int | None = None
    """The version of the weights, where all gangs serve the same; 0: the checkpoint."""
    weights_newest: int = 0
    """The newest version that a gang has committed: gangs that are made from now on are to have it."""
    weights_source: StatusText = ""
    """Hash of the checkpoint that the versions count from: with another one they count from 0 again."""
    weights_reset: StatusText = ""
    """The value of the annotation tpmodel.dev/reset-weights that gangs were last made with."""
    state: StatusText = ""
    """One word for the STATUS column."""
    gangs: Annotated[list[GangStatus], Field(max_length=4096, json_schema_extra=keyed_by("name"))] = []
    """Each gang."""
