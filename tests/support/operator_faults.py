"""A cluster that moves by itself, at random, and an operator that may see it late and die between any two actions.

Pods behave as the worker's do: they read their attempt when their container starts, form a world with peers of the
same attempt, end with 75 when a peer is lost, and end as stale when a peer is at a higher attempt.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

from support.operator_cluster import Cluster
from tpmodel_operator import clock, gang, life, names
from tpmodel_operator.actions import Decision, DeleteGang, DeletePod, WriteAttempt
from tpmodel_operator.api import GangStatus, TPModelStatus
from tpmodel_operator.circumstances import Circumstances
from tpmodel_operator.gangs import collect
from tpmodel_operator.observed import NodeRecord, Observed, PodRecord, StatefulSetRecord

Snapshot = tuple[dict[str, StatefulSetRecord], dict[str, PodRecord]]


@dataclass
class FaultyCluster(Cluster):
    """See the module."""

    random: Random = field(default_factory=lambda: Random(0))
    read: dict[str, int] = field(default_factory=dict)
    """Attempt that each pod's container has read, by UID."""
    worlds: set[str] = field(default_factory=set)
    """Pods that are part of a world."""
    hung: set[str] = field(default_factory=set)
    """Leader pods that stay not Ready."""
    revisions: dict[str, str] = field(default_factory=dict)
    """Revision that each pod was made of, by UID."""
    history: list[Snapshot] = field(default_factory=list)
    seen: int = -1
    """Newest snapshot that the operator has seen."""
    passes: int = 0

    # ------------------------------------------------------------------------------------------------ operator

    def lagging(self, lag: int) -> Observed:
        """What an operator sees whose watches are behind; they never go back."""
        self.history.append((dict(self.statefulsets), dict(self.pods)))
        self.seen = max(self.seen, len(self.history) - 1 - lag)
        statefulsets, pods = self.history[self.seen]
        now = (self.statefulsets, self.pods)
        self.statefulsets, self.pods = statefulsets, pods
        observed = self.observed()
        self.statefulsets, self.pods = now
        return observed

    def run_operator(self, *, lag: int = 0, dies_after: int | None = None, writes: bool = True) -> Decision:
        """One pass. It may be the last of its process: before the status is written, or after some actions."""
        observed = self.lagging(lag)
        decision = gang.decide(observed, self.settings)
        self.passes += 1
        if not writes:
            return decision
        self._check_status(decision.status)
        self._check_removals(observed, decision)
        self.status = TPModelStatus.model_validate_json(decision.status.model_dump_json(by_alias=True))
        self.tokens_missing.clear()
        for action in decision.actions[:dies_after]:
            if isinstance(action, DeletePod):
                self._check_deletion(observed, action)
            self.carry_out(action)
        return decision

    # ---------------------------------------------------------------------------------------------- by itself

    def move(self) -> bool:
        """One thing that the cluster does by itself, which takes a second; False: there is nothing to do."""
        possible = [self.statefulset_step, self.taint_step]
        possible += [lambda pod=pod: self.pod_step(pod) for pod in self.pods.values()]
        possible += [lambda name=name: self.world_step(name) for name in self.statefulsets]
        self.random.shuffle(possible)
        if not any(step() for step in possible):
            return False
        self.wait(1)
        for name in self.statefulsets:
            self.notice_losses(name)
        return True

    def statefulset_step(self) -> bool:
        """One missing pod is made."""
        before = set(self.pods)
        self.statefulset_controller()
        new = [uid for uid in self.pods if uid not in before]
        for uid in new:
            pod = self.pods[uid]
            node = self.random.choice([name for name in self.nodes if self.nodes[name].ready] or ["spare"])
            self.nodes.setdefault(node, NodeRecord(name=node, ready=True))
            self.change(pod, node=node)
            self.revisions[uid] = self.statefulsets[pod.gang].revision
        return bool(new)

    def taint_step(self) -> bool:
        """Pods are deleted off a node that has been not ready for longer than they tolerate."""
        for pod in self.pods.values():
            node = self.nodes[pod.node]
            since = node.ready_changed
            toleration = self.spec.scheduling.dead_node_toleration
            if pod.deleting_since is not None or node.ready or since is None:
                continue
            if (self.now - since).total_seconds() >= toleration:
                self.delete_pod(pod.uid, self.spec.drain_timeout + 15)
                return True
        return False

    def pod_step(self, pod: PodRecord) -> bool:
        """The kubelet does its next thing for a pod."""
        if not self.nodes[pod.node].ready:
            return False
        if pod.deleting_since is not None:
            if pod.running:
                self.end_container(pod, 0)
            else:
                del self.pods[pod.uid]
            return True
        if pod.running:
            return False
        if pod.ended is not None:
            self.restart_container(pod)
        else:
            self.change(pod, running=True, phase="Running")
        self.read[pod.uid] = self.attempts.get(pod.gang, 1)
        self.worlds.discard(pod.uid)
        return True

    def world_step(self, name: str) -> bool:
        """The pods of a gang find each other, or notice what has become of each other."""
        pods = {pod.index: pod for pod in self.pods.values() if pod.gang == name}
        alive = {index: pod for index, pod in pods.items() if pod.running and self.nodes[pod.node].ready}
        stale = [pod for pod in alive.values() if self.read[pod.uid] < self._highest(alive)]
        if stale:
            self.end_container(stale[0], 75, "stale attempt: the gang is at a higher one")
            return True
        leader = alive.get(0)
        if leader is None:
            return False
        whole = len(alive) == self.statefulsets[name].pods
        draining = any(pod.deleting_since is not None for pod in pods.values())
        ready = whole and not draining and leader.uid not in self.hung
        if ready == leader.ready:
            return False
        if ready:
            self.worlds |= {pod.uid for pod in alive.values()}
        for pod in alive.values() if ready else [leader]:
            self.change(pod, ready=ready, ready_changed=self.now)
        return True

    def notice_losses(self, name: str) -> None:
        """A leader learns of a lost peer much faster than anything changes in the API: its session breaks."""
        pods = {pod.index: pod for pod in self.pods.values() if pod.gang == name}
        leader = pods.get(0)
        if leader is None or leader.uid not in self.worlds or not self.nodes[leader.node].ready:
            return
        if self.spec.recovery.mode == "InPlace":
            return  # survivors wait
        peers = [pods.get(index) for index in range(self.statefulsets[name].pods)]
        if leader.running and not all(peer is not None and peer.running and self._of_world(peer) for peer in peers):
            self.worlds.discard(leader.uid)
            self.end_container(leader, 75, "a rank was lost")

    def come_to_rest(self, *, hours: float = 48) -> None:
        """No more faults: passes happen only when something changed, or when the last one asked for it."""
        end = self.now.timestamp() + hours * 3600
        self.nodes = {name: NodeRecord(name=name, ready=True) for name in self.nodes}
        self.hung.clear()
        due: float | None = 0
        seen: object = None
        while self.now.timestamp() < end:
            state = (dict(self.statefulsets), dict(self.pods), self.status)
            if state != seen or due == 0:
                seen, due = state, self.run_operator().requeue_after
            elif not self.move():
                if due is None:
                    return
                self.wait(due)
                due = 0
        raise AssertionError(f"no rest after {hours} h: {self.status.model_dump_json(indent=1)}")

    # ------------------------------------------------------------------------------------------------ invariants

    def check(self) -> None:
        """What must hold at any moment."""
        by_gang: dict[str, set[str]] = defaultdict(set)
        for pod in self.pods.values():
            by_gang[pod.gang].add(self.revisions[pod.uid])
        assert all(len(found) == 1 for found in by_gang.values()), "a gang of two revisions"
        assert all(entry.restarts <= self.spec.recovery.max_restarts for entry in self.status.gangs)
        existing = {*self.statefulsets, *(pod.gang for pod in self.pods.values())}
        assert all(names.gang_of_name(self.name, name) for name in existing)

    def _check_status(self, after: TPModelStatus) -> None:
        before = {entry.name: entry for entry in self.status.gangs}
        for entry in after.gangs:
            was = before.get(entry.name)
            if was is not None and was.uid in ("", entry.uid):
                self._check_gang(was, entry)

    def _check_gang(self, was: GangStatus, entry: GangStatus) -> None:
        assert entry.attempt - was.attempt in (0, 1), "an attempt was skipped or lowered"
        assert entry.restarts_total - was.restarts_total in (0, 1)
        assert _decided_attempt(entry) - entry.restarts_total <= _decided_attempt(was) - was.restarts_total
        if was.restart is not None and was.restart.began and entry.restart is None:
            survivors = set(was.restart.doomed) & set(self.pods)
            assert not survivors or entry.phase == "Draining", "a doomed pod has survived its restart"
        began = entry.restart is not None and entry.restart.began
        if began and entry.restart is not None and (not_before := clock.moment(entry.restart.not_before)) is not None:
            assert not_before <= self.now, "a restart began before its backoff was over"
        if began and was.restart is not None and was.restart.began:
            assert entry.restart is not None
            assert entry.restart.doomed == was.restart.doomed, "doomed is not final"

    def _check_removals(self, observed: Observed, decision: Decision) -> None:
        """A rollout removes no Ready gang unless enough of them stay."""
        removed = {action.name for action in decision.actions if isinstance(action, DeleteGang)}
        around = Circumstances.of(observed)
        judged = [life.judge(found, around).status for found in collect(observed)]
        spec = observed.model.spec
        outdated = [entry for entry in judged if entry.revision != decision.status.revision]
        if any(entry.ready and entry.name in removed for entry in outdated):
            left = sum(entry.ready for entry in judged if entry.name not in removed)
            assert left >= spec.replicas - spec.rollout.max_unavailable, "a rollout took too much"

    def _check_deletion(self, observed: Observed, action: DeletePod) -> None:
        pod = next(pod for pod in observed.pods if pod.uid == action.uid)
        entry = next(entry for entry in self.status.gangs if entry.name == pod.gang)
        on_dead_node = pod.deleting_since is not None and not self.nodes[pod.node].ready
        assert action.grace_seconds > 0 or on_dead_node, "no grace for a pod on a live node"
        if entry.phase == "Draining" or (entry.restart is None and action.grace_seconds == 0):
            assert on_dead_node, "a pod was deleted that nobody had given up"
            return
        assert entry.restart is not None
        assert entry.restart.began
        assert action.uid in entry.restart.doomed, "a pod was deleted that was not doomed"
        assert self.attempts.get(pod.gang, 0) >= entry.attempt, "deleted before the attempt was written"

    # -------------------------------------------------------------------------------------------------- privates

    def carry_out(self, action: object) -> None:
        """As any cluster does; attempts are never lowered."""
        before = dict(self.attempts)
        super().carry_out(action)  # type: ignore[arg-type]
        if isinstance(action, WriteAttempt):
            assert self.attempts[action.gang] >= before.get(action.gang, 0)

    def _highest(self, alive: dict[int, PodRecord]) -> int:
        return max(self.read[pod.uid] for pod in alive.values())

    def _of_world(self, pod: PodRecord | None) -> bool:
        return pod is not None and pod.uid in self.worlds


def _decided_attempt(entry: GangStatus) -> int:
    """The attempt that a gang is at, or is to be at after a backoff."""
    return entry.restart.attempt if entry.restart is not None else entry.attempt
