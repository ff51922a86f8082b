"""Leader election by a Lease: of several operator processes one works, the others wait.

What to do with a Lease as it was read is a pure function; around it the calls. A holder that could not renew for
RENEW_SECONDS stops by itself, before the others, who wait DURATION_SECONDS, take over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NoReturn, Protocol

from tpmodel_operator import names
from tpmodel_operator.kube import LEASES, ApiError, Json, Resource

logger = logging.getLogger(__name__)

DURATION_SECONDS = 15
RENEW_SECONDS = 10
RETRY_SECONDS = 2

Step = Literal["create", "take", "renew", "wait"]


class LeadershipLostError(Exception):
    """Another process may hold the Lease: nothing may be written any more."""


class LeaseCalls(Protocol):
    """The part of Kube that the election needs."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """One object."""
        ...

    async def create(self, resource: Resource, namespace: str, body: Json) -> Json:
        """A new object."""
        ...

    async def replace(self, resource: Resource, namespace: str, body: Json) -> Json:
        """The whole object."""
        ...


@dataclass(frozen=True, slots=True)
class Sighting:
    """A Lease, and when this process first saw it like this, by its own clock: clocks of others are not trusted."""

    holder: str
    renewed: str
    duration: float
    since: float


def sight(lease: Json, earlier: Sighting | None, now: float) -> Sighting:
    """The Lease as read now; an unchanged one keeps its time."""
    spec = lease.get("spec", {})
    seen = Sighting(
        holder=spec.get("holderIdentity") or "",
        renewed=spec.get("renewTime") or "",
        duration=float(spec.get("leaseDurationSeconds") or DURATION_SECONDS),
        since=now,
    )
    unchanged = earlier is not None and (earlier.holder, earlier.renewed) == (seen.holder, seen.renewed)
    return earlier if unchanged and earlier is not None else seen


def next_step(seen: Sighting | None, *, me: str, now: float) -> Step:
    """What a process of that identity does about the Lease; None: there is no Lease."""
    if seen is None:
        return "create"
    if seen.holder == me:
        return "renew"
    if not seen.holder or now - seen.since > seen.duration:
        return "take"
    return "wait"


class Leadership:
    """This process's part in the election."""

    def __init__(
        self, kube: LeaseCalls, *, namespace: str, identity: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._identity = identity
        self._clock = clock
        self._lease: Json = {}
        self._seen: Sighting | None = None
        self._renewed = -float("inf")
        self._stale = True

    @property
    def held(self) -> bool:
        """Whether nobody else can have taken the Lease by now."""
        return self._clock() - self._renewed < RENEW_SECONDS

    def check(self) -> None:
        """Before every write: a process that was stopped for a while must not go on where it was."""
        if not self.held:
            raise LeadershipLostError(f"the Lease was not renewed for {RENEW_SECONDS} s")

    async def acquire(self) -> None:
        """Returns once this process holds the Lease."""
        while True:
            if await self._try():
                logger.info("leading as %s", self._identity)
                return
            await asyncio.sleep(self._until_next_look())

    async def keep(self) -> NoReturn:
        """Renews; raises LeadershipLostError when it cannot, or another process holds the Lease."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if not await self._try() and self._seen is not None and self._seen.holder != self._identity:
                raise LeadershipLostError(f"{self._seen.holder or 'nobody'} holds the Lease")
            self.check()

    async def release(self) -> None:
        """Lets another process take over at once; after this nothing may be written."""
        if not self.held:
            return
        self._renewed = -float("inf")
        body = self._body(transitions=self._transitions())
        body["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._kube.replace(LEASES, self._namespace, body)
        except ApiError as error:
            logger.warning("the Lease was not released, it will expire: %s", error)

    async def _try(self) -> bool:
        """One look, one step; whether this process holds the Lease now."""
        started = self._clock()
        try:
            # A call that hangs must not outlive the right to lead.
            async with asyncio.timeout(self._patience()):
                await self._look(started)
                step = next_step(self._seen, me=self._identity, now=self._clock())
                if step == "wait":
                    return False
                await self._write(step)
        except (ApiError, TimeoutError) as error:
            self._stale = True
            logger.warning("Lease: %s", error or "no answer")
            return False
        # Counted from before the call: the others count from after it.
        self._renewed = started
        return True

    def _until_next_look(self) -> float:
        """Not a moment later than the Lease of another runs out."""
        if self._seen is None or not self._seen.holder:
            return RETRY_SECONDS
        left = self._seen.since + self._seen.duration - self._clock()
        return min(RETRY_SECONDS, left + 0.05) if left > 0 else RETRY_SECONDS

    def _patience(self) -> float:
        left = self._renewed + RENEW_SECONDS - self._clock()
        return max(left, 0.5) if self.held else RENEW_SECONDS / 2

    async def _look(self, now: float) -> None:
        if self.held and not self._stale:
            return  # nobody else writes it: the version of the last renewal is current, else there is a conflict
        try:
            self._lease = await self._kube.get(LEASES, self._namespace, names.MANAGER)
            self._seen = sight(self._lease, self._seen, now)
        except ApiError as error:
            if not error.not_found:
                raise
            self._lease, self._seen = {}, None

    async def _write(self, step: Step) -> None:
        body = self._body(transitions=self._transitions() + (step == "take"))
        if step == "create":
            self._lease = await self._kube.create(LEASES, self._namespace, body)
        else:
            self._lease = await self._kube.replace(LEASES, self._namespace, body)
        self._seen = sight(self._lease, None, self._clock())
        self._stale = False

    def _transitions(self) -> int:
        return int(self._lease.get("spec", {}).get("leaseTransitions") or 0)

    def _body(self, *, transitions: int) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = {"name": names.MANAGER, "namespace": self._namespace}
        if version := self._lease.get("metadata", {}).get("resourceVersion"):
            metadata["resourceVersion"] = version
        acquired = self._lease.get("spec", {}).get("acquireTime")
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": DURATION_SECONDS,
                "acquireTime": acquired if self.held and acquired else now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }
