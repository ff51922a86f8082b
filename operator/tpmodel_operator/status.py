"""The status of a TPModel out of its gangs."""

from __future__ import annotations

from datetime import datetime

from tpmodel_operator import names, weights
from tpmodel_operator.api import GangStatus, TPModel, TPModelStatus
from tpmodel_operator.conditions import Situation, conditions


def build(model: TPModel, situation: Situation, leaving: list[GangStatus], now: datetime) -> TPModelStatus:
    """Everything but the conditions' former times is computed anew."""
    gangs = sorted([*situation.gangs, *leaving], key=lambda gang: (gang.index, gang.name))
    return TPModelStatus(
        observed_generation=model.generation,
        conditions=conditions(model.status.conditions, situation, generation=model.generation, now=now),
        replicas=len(situation.gangs),
        ready_replicas=situation.ready,
        updated_replicas=len(situation.updated),
        ready=f"{situation.ready}/{situation.wanted}",
        selector=f"{names.MODEL_LABEL}={model.name},{names.POD_INDEX}=0",
        restarts=sum(gang.restarts_total for gang in gangs),
        revision=situation.revision,
        image=situation.image,
        model_revision=situation.model_revision,
        rebuild_requested=situation.rebuild_requested,
        url=names.url(model.name, model.namespace),
        trainers_url=names.trainers_url(model.name, model.namespace) if model.spec.auth.trainer_token else "",
        weights_version=weights.all_serve(situation.gangs),
        weights_newest=situation.weights.newest,
        weights_source=situation.weights.source,
        weights_reset=situation.weights.reset,
        state=word(situation),
        gangs=gangs,
    )


def word(situation: Situation) -> str:
    """For the STATUS column: the gravest thing that is the case."""
    phases = {gang.phase for gang in situation.gangs}
    answers = {
        "Refused": situation.refusal is not None,
        "ScaledToZero": situation.wanted == 0 and not situation.gangs,
        "Stalled": situation.stuck is not None and situation.ready > 0,
        "Failed": situation.stuck is not None,
        "Restarting": "Restarting" in phases,
        "RollingOut": situation.outdated > 0,
        "Degraded": bool(phases & {"Failed", "Rebuilding", "Draining"}),
        "Scaling": len(situation.gangs) != situation.wanted or situation.leaving > 0,
        "Loading": "Loading" in phases,
        "Forming": bool(phases & {"Forming", "Pending"}),
    }
    return next((answer for answer, holds in answers.items() if holds), "Ready")
