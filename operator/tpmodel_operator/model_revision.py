"""Which commit of a hub's model a rollout uses: the first one that one of its pods has found, for all that start later.

The operator needs no way to the hub. Pods resolve a branch by themselves as long as nothing is recorded; what the
first answer says is written to status, then to the ConfigMap of every gang of that revision. Where two gangs' first
pods found different commits, one is recorded, and the pods of the other end with 75 when they read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tpmodel_operator.api import TPModelStatus
from tpmodel_operator.gangs import Gang

_COMMIT = re.compile(r"[0-9a-f]{40}")


def known(status: TPModelStatus, gangs: Iterable[Gang]) -> Mapping[str, str]:
    """The commit by revision: what was recorded, else what the first gang reports."""
    commits = {status.revision: status.model_revision} if status.model_revision else {}
    ordered = sorted(gangs, key=lambda gang: gang.status.index)
    for gang in ordered:
        if gang.status.model_revision:
            commits.setdefault(gang.status.revision, gang.status.model_revision)
    for gang in ordered:
        if gang.report is not None and _COMMIT.fullmatch(gang.report.model_revision):
            commits.setdefault(gang.status.revision, gang.report.model_revision)
    return commits


def given(gang: Gang, commits: Mapping[str, str]) -> Gang:
    """The gang, told of its revision's commit."""
    commit = commits.get(gang.status.revision, "")
    return replace(gang, status=gang.status.model_copy(update={"model_revision": commit})) if commit else gang
