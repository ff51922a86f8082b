"""`kubectl tpmodel status` as text: model, conditions, gangs, pods. Pure: the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from tpmodel.cli.tables import table
from tpmodel.kubectl.ages import age, until
from tpmodel.kubectl.pods import PodView
from tpmodel.kubectl.view import CauseView, ConditionView, GangView, ModelView

_STEP = "  "


def render(model: ModelView, now: datetime) -> list[str]:
    """The lines of the whole tree."""
    lines = [f"TPModel {model.full_name}: {_headline(model)}"]
    if model.unseen:
        lines.append(f"{_STEP}{model.unseen}")
    facts = [
        ("model", f"{model.uri}, {model.tensor_parallel_size} ranks a gang"),
        ("image", model.image),
        ("url", model.url),
        ("trainers", model.trainers_url),
        ("age", age(model.created, now)),
    ]
    width = max(7, *(len(name) + 2 for name, value in facts if value))
    lines += [f"{_STEP}{name:<{width}}{value}" for name, value in facts if value]
    if model.conditions:
        lines.append(f"{_STEP}conditions")
        lines += _indented(table([], [_condition(condition, now) for condition in model.conditions]), 2)
    for gang in model.gangs:
        lines += _indented(_gang(gang, model, now), 1)
    return lines


def _headline(model: ModelView) -> str:
    restarts = f", {_count(model.restarts, 'restart')}" if model.restarts else ""
    return f"{model.state or 'unknown'}, {model.ready or f'0/{model.replicas}'} gangs ready{restarts}"


def _condition(condition: ConditionView, now: datetime) -> list[str]:
    return [condition.type, condition.status, age(condition.since, now), condition.told]


def _gang(gang: GangView, model: ModelView, now: datetime) -> list[str]:
    loading = f" {gang.load_percent}%" if gang.phase == "Loading" else ""
    lines = [f"gang {gang.index if gang.index >= 0 else '?'}, {gang.name}: {gang.phase}{loading}"]
    lines += _indented(_facts(gang, model, now), 1)
    header = ["POD", "NODE", "READY", "RESTARTS", "STATE"]
    rows = [_pod(pod) for pod in gang.pods]
    return lines + _indented(table(header, rows) if rows else [_joined("no pods", gang.warning)], 1)


def _facts(gang: GangView, model: ModelView, now: datetime) -> list[str]:
    budget = f", {gang.restarts_counted} of {model.max_restarts} of its budget" if gang.restarts_counted else ""
    # A leader that serves, and has not been asked yet or cannot be.
    ranks = "?" if gang.ready and not gang.epoch else gang.ready_ranks
    numbers = [
        f"revision {gang.revision}",
        f"attempt {gang.attempt}",
        *([f"epoch {gang.epoch}"] if gang.epoch else []),
        f"{ranks} of {model.tensor_parallel_size} ranks ready",
        f"{_count(gang.restarts, 'restart')}{budget}",
        *([f"weights of version {gang.weights_version}"] if gang.weights_version else []),
        *([f"version {gang.weights_kept} on its volume"] if gang.weights_kept else []),
    ]
    lines = [", ".join(numbers)] if gang.revision else []
    if gang.weights_condition:
        lines.append(f"{gang.weights_condition}: {gang.weights_message}")
    if gang.weights_keeping_error:
        lines.append(f"its weights are not kept: {gang.weights_keeping_error}")
    if gang.failure is not None:
        lines.append(f"failed {age(gang.failure.time, now)} ago, {gang.failure.reason}: {_cause(gang.failure)}")
    if gang.last_restart is not None and gang.last_restart.time:
        # Status knows the attempt that a restart begins before its pods are of it.
        which = f"attempt {gang.last_restart.attempt}, {age(gang.last_restart.time, now)} ago"
        lines.append(f"last restart ({which}): {_cause(gang.last_restart)}")
    for fault in gang.faults:
        words = f": {fault.message}" if fault.message else ""
        lines.append(f"fault {age(fault.time, now)} ago, epoch {fault.epoch}: {fault.kind}{words}")
    for rebuild in gang.rebuilds:
        went_on = f"{_count(rebuild.replayed_requests, 'request')} went on"
        seconds = f"{rebuild.milliseconds / 1000:.1f} s"
        lines.append(
            f"rebuilt {age(rebuild.time, now)} ago, epoch {rebuild.epoch}: {rebuild.kind}, {seconds}, {went_on}"
        )
    if gang.restart_not_before and (wait := until(gang.restart_not_before, now)):
        lines.append(f"it waits {wait} before this restart")
    return lines


def _cause(cause: CauseView) -> str:
    code = f", exit code {cause.exit_code}" if cause.exit_code is not None else ""
    return f"{cause.cause}{code}" + (f": {cause.message}" if cause.message else "")


def _pod(pod: PodView) -> list[str]:
    state = _joined(pod.state, pod.warning)
    return [pod.name, pod.node or "-", "yes" if pod.ready else "no", str(pod.restarts), state]


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _indented(lines: Iterable[str], steps: int) -> list[str]:
    return [f"{_STEP * steps}{line}" for line in lines]
