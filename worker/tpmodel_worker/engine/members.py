"""Who has registered: the pods of the gang and their ranks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from tpmodel.v1 import worker_pb2
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.engine.session import RankEndpoint


class RegistrationError(Exception):
    """A pod that can't belong to this gang."""


class OtherAttemptError(RegistrationError):
    """A pod of another attempt of this gang."""

    def __init__(self, message: str, attempt: int) -> None:
        super().__init__(message)
        self.attempt = attempt
        """The pod's."""


class OtherModelError(RegistrationError):
    """A pod with another checkpoint: its ranks would compute something else."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A complete gang: every rank's address, by rank, and the store that they meet at."""

    version: int
    ranks: tuple[RankEndpoint, ...]
    rendezvous: str


@dataclass(frozen=True, slots=True)
class _Pod:
    name: str
    endpoints: tuple[RankEndpoint, ...]
    rendezvous: str
    supervisor: str
    """host:port of its SupervisorService; "" where it has none."""


class Members:
    """The latest registration of every pod. Its version rises with each change."""

    def __init__(self, world_size: int, attempt: int, model_path: str = "") -> None:
        """model_path: the checkpoint folder that every pod must have; "": any."""
        self._world_size = world_size
        self._attempt = attempt
        self._model_path = model_path
        self._pods: dict[str, _Pod] = {}
        self._changed = asyncio.Event()
        self.version = 0

    def register(self, request: worker_pb2.RegisterRequest) -> bool:
        """Takes a pod's registration; True when it changes anything. Raises RegistrationError."""
        if request.attempt != self._attempt:
            message = f"this engine is of attempt {self._attempt}, the pod is of attempt {request.attempt}"
            raise OtherAttemptError(message, request.attempt)
        if self._model_path and request.model_path not in ("", self._model_path):
            raise OtherModelError(f"this gang serves {self._model_path}, the pod has {request.model_path}")
        beyond = [str(rank.rank) for rank in request.ranks if rank.rank >= self._world_size]
        if beyond:
            raise RegistrationError(f"rank {', '.join(beyond)} is outside a world of {self._world_size}")
        endpoints = tuple(
            RankEndpoint(rank.rank, request.address, rank.port, request.pod_uid, rank.pid)
            for rank in sorted(request.ranks, key=lambda entry: entry.rank)
        )
        if len({endpoint.rank for endpoint in endpoints}) != len(endpoints):
            raise RegistrationError("a rank is named twice")
        supervisor = join_host_port(request.address, request.supervisor_port) if request.supervisor_port else ""
        pod = _Pod(request.pod_name or request.pod_uid, endpoints, request.rendezvous, supervisor)
        if self._pods.get(request.pod_uid) == pod:
            return False
        # The pod that a rank moved away from is gone, even if nobody has said so.
        claimed = {endpoint.rank for endpoint in endpoints}
        for uid, other in list(self._pods.items()):
            if any(endpoint.rank in claimed for endpoint in other.endpoints):
                del self._pods[uid]
        self._pods[request.pod_uid] = pod
        self._note_change()
        return True

    def lost(self, rank: int, pid: int) -> bool:
        """A rank's process has ended: its pod must present another one. False: it was not registered."""
        for uid, pod in self._pods.items():
            left = tuple(endpoint for endpoint in pod.endpoints if (endpoint.rank, endpoint.pid) != (rank, pid))
            if left != pod.endpoints:
                self._pods[uid] = replace(pod, endpoints=left)
                self._note_change()
                return True
        return False

    def part(self, uid: str) -> None:
        """A pod that drains is let go: its ranks are missing."""
        if self._pods.pop(uid, None) is not None:
            self._note_change()

    def touch(self) -> None:
        """Whoever waits for a change looks again: there is another reason to build."""
        self._note_change()

    def _note_change(self) -> None:
        self.version += 1
        self._changed.set()

    @property
    def supervisors(self) -> dict[str, str]:
        """Where the supervisors of the registered pods listen, by pod UID."""
        return {uid: pod.supervisor for uid, pod in self._pods.items() if pod.supervisor}

    @property
    def rendezvous(self) -> str:
        """Where the store is that ranks meet at; "": there is none."""
        return next((pod.rendezvous for pod in self._pods.values() if pod.rendezvous), "")

    def has_pod(self, uid: str) -> bool:
        """Whether a pod is registered."""
        return uid in self._pods

    def pod_name(self, uid: str) -> str:
        """What people call a pod; of one that is gone, its UID."""
        pod = self._pods.get(uid)
        return pod.name if pod is not None else uid

    @property
    def endpoints(self) -> dict[int, RankEndpoint]:
        """The registered ranks."""
        return {endpoint.rank: endpoint for pod in self._pods.values() for endpoint in pod.endpoints}

    @property
    def missing(self) -> list[str]:
        """What the world still waits for, in words."""
        known = self.endpoints
        absent = [f"rank {rank}" for rank in range(self._world_size) if rank not in known]
        return absent if self.rendezvous else [*absent, "the rendezvous store"]

    @property
    def complete(self) -> Membership | None:
        """The whole gang, or None while something is missing."""
        if self.missing:
            return None
        known = self.endpoints
        return Membership(self.version, tuple(known[rank] for rank in range(self._world_size)), self.rendezvous)

    async def changed(self, since: int, timeout: float) -> bool:
        """Waits until the version is above `since`; False when it is not in time."""
        try:
            async with asyncio.timeout(timeout):
                while self.version <= since:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
