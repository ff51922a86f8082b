"""The decision of one pass over one TPModel: from what was observed to status, actions and events. No I/O.

Every pass decides everything anew from what exists and what status remembers; nothing depends on having seen an
event. In turn: each gang is judged, the spec is reviewed, and the set of gangs is brought a step closer to the spec.
A spec that is not accepted touches nothing; gangs that fail meanwhile are restarted as they were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from tpmodel_operator import (
    acceptance,
    advice,
    disruption,
    events,
    images,
    life,
    model_revision,
    names,
    rebuilds,
    rollout,
    status,
    weights,
)
from tpmodel_operator.actions import Action, Decision, DeleteGang, EnsureGang, EnsureModelChildren
from tpmodel_operator.api import GangStatus, TPModel
from tpmodel_operator.circumstances import Circumstances
from tpmodel_operator.conditions import Situation
from tpmodel_operator.gangs import Existence, Gang, collect
from tpmodel_operator.images import Target
from tpmodel_operator.observed import Observed, Orders
from tpmodel_operator.restarts import Judged
from tpmodel_operator.settings import OperatorSettings
from tpmodel_operator.weights import Weights

LOOK_AGAIN_AT_REFUSAL = 30.0
"""Seconds: claims are not watched."""


def decide(observed: Observed, settings: OperatorSettings) -> Decision:
    """What this pass writes, does, says, and when time alone calls for the next one."""
    model = observed.model
    if model.deleting:
        return Decision(status=model.status)  # the children are owned: they go by themselves
    around = Circumstances.of(observed)
    gangs = [gang for gang in collect(observed) if gang.existence is not Existence.GONE]
    commits = model_revision.known(model.status, gangs)
    gangs = [rebuilds.asked(model_revision.given(gang, commits), model) for gang in gangs]
    gangs = [weights.reported(gang, observed.now) for gang in gangs]
    wanted = weights.wanted(model, gangs)
    gangs = [weights.told(gang, wanted, model) for gang in gangs]
    turns = [Turn(gang, life.judge(gang, around)) for gang in gangs]
    refusal = acceptance.review(model, volumes=observed.volumes, settings=settings) or _conflict(observed)
    if refusal is not None:
        return _refused(model, refusal, turns, observed.now)
    target = images.resolve(model, gangs, settings.default_image)
    if not target.image:
        return _refused(model, NO_IMAGE, turns, observed.now)
    return _accepted(observed, target, turns, around, commits, wanted)


NO_IMAGE = acceptance.Refusal(
    reason="NoImage", message="the operator has no default image: write the worker's image as spec.image.reference"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One gang and what became of it in this pass."""

    gang: Gang
    judged: Judged

    @property
    def leaving(self) -> bool:
        """Whether it is being removed."""
        return self.gang.existence is Existence.LEAVING

    @property
    def status(self) -> GangStatus:
        """Its new status."""
        return self.judged.status


def _conflict(observed: Observed) -> acceptance.Refusal | None:
    """A TPModel takes nothing over that is not its own."""
    if not observed.conflicts:
        return None
    return acceptance.Refusal(
        reason="NameTaken",
        message=f"{', '.join(observed.conflicts)} exists already and belongs to somebody else: delete it, or give the "
        "TPModel another name",
        transient=True,
    )


def _refused(model: TPModel, refusal: acceptance.Refusal, turns: list[Turn], now: datetime) -> Decision:
    situation = Situation(
        wanted=model.spec.replicas,
        revision=model.status.revision,
        image=model.status.image,
        gangs=tuple(turn.status for turn in turns if not turn.leaving),
        leaving=sum(turn.leaving for turn in turns),
        refusal=refusal,
        model_revision=model.status.model_revision,
        rebuild_requested=rebuilds.request(model),
        weights=weights.remembered(model),
    )
    decision = _decision(model, situation, turns, (), now)
    if not refusal.transient:
        return decision
    return replace(decision, requeue_after=min(decision.requeue_after or LOOK_AGAIN_AT_REFUSAL, LOOK_AGAIN_AT_REFUSAL))


def _accepted(
    observed: Observed,
    target: Target,
    turns: list[Turn],
    around: Circumstances,
    commits: Mapping[str, str],
    wanted: Weights,
) -> Decision:
    model = observed.model
    commit = commits.get(target.revision, "")
    turns = [turn for turn in turns if not _forgotten(turn, target)]
    plan = rollout.plan(
        [_member(turn, target) for turn in turns], wanted=model.spec.replicas, rollout=model.spec.rollout
    )
    turns = [_removed(turn, around) if turn.gang.name in plan.remove else turn for turn in turns]
    turns = [turn for turn in turns if turn.gang.existence is not Existence.GONE]
    turns += [_created(model, index, target, commit, wanted, observed.orders) for index in plan.create]
    situation = Situation(
        wanted=model.spec.replicas,
        revision=target.revision,
        image=target.image,
        newer_image=target.newer_image,
        advice=advice.about_nodes(model.spec, observed.largest_node),
        model_revision=commit,
        rebuild_requested=rebuilds.request(model),
        weights=wanted,
        gangs=tuple(turn.status for turn in turns if not turn.leaving),
        leaving=sum(turn.leaving for turn in turns),
    )
    staying = [replace(turn.gang, status=turn.status) for turn in turns if not turn.leaving]
    children = EnsureModelChildren(disruptable_pods=disruption.disruptable_pods(model.spec, staying))
    return _decision(model, situation, turns, (children, *_of_set(turns, target)), observed.now)


def _forgotten(turn: Turn, target: Target) -> bool:
    """An outdated gang that was planned and has not been seen: should it appear, it is found again."""
    return turn.gang.existence is Existence.PLANNED and turn.status.revision != target.revision


def _member(turn: Turn, target: Target) -> rollout.Member:
    gang = turn.status
    return rollout.Member(
        name=gang.name,
        index=gang.index,
        updated=gang.revision == target.revision,
        ready=gang.ready,
        stuck=gang.failure is not None or gang.deadline_missed,
        leaving=turn.leaving,
    )


def _removed(turn: Turn, around: Circumstances) -> Turn:
    if turn.gang.existence is Existence.PLANNED:
        return Turn(replace(turn.gang, existence=Existence.GONE), turn.judged)
    leaving = replace(turn.gang, existence=Existence.LEAVING)
    return Turn(leaving, life.leave(leaving, around))


def _created(
    model: TPModel, index: int, target: Target, commit: str, wanted: Weights, orders: Mapping[str, Orders]
) -> Turn:
    """A ConfigMap of that name says that the gang exists after all, unseen: it is taken up at its attempt."""
    name = names.gang_name(model.name, index, target.revision)
    known = orders.get(name)
    gang = GangStatus(
        name=name,
        index=index,
        revision=target.revision,
        image=target.image,
        attempt=known.attempt if known is not None else 1,
        model_revision=commit,
        weights_committed=wanted.newest,
    )
    planned = Gang(
        status=gang,
        existence=Existence.PLANNED,
        statefulset=None,
        pods=(),
        known=known,
        token_missing=False,
        report=None,
    )
    return Turn(planned, Judged(status=gang))


def _of_set(turns: list[Turn], target: Target) -> list[Action]:
    """Removals first: what is made may need the room."""
    actions: list[Action] = []
    for turn in turns:
        statefulset = turn.gang.statefulset
        if turn.leaving and statefulset is not None and not statefulset.deleting:
            actions.append(DeleteGang(name=statefulset.name, uid=statefulset.uid))
    actions += [
        EnsureGang(
            name=turn.status.name,
            index=turn.status.index,
            revision=turn.status.revision,
            image=target.image,
            attempt=turn.status.attempt,
            model_revision=turn.status.model_revision,
            weights_version=turn.status.weights_committed,
        )
        for turn in turns
        if turn.gang.existence is Existence.PLANNED
    ]
    return actions


def _decision(
    model: TPModel, situation: Situation, turns: list[Turn], actions: tuple[Action, ...], now: datetime
) -> Decision:
    """Restarts come before everything else: what serves again soonest."""
    leaving = [turn.status for turn in turns if turn.leaving]
    after = status.build(model, situation, leaving, now)
    wakeups = [moment for turn in turns for moment in turn.judged.wakeups if moment > now]
    return Decision(
        status=after,
        actions=(*(action for turn in turns for action in turn.judged.actions), *actions),
        events=events.between(model.status, after, model.spec),
        requeue_after=(min(wakeups) - now).total_seconds() if wakeups else None,
    )
