"""kube-controller-manager and kube-scheduler: what makes pods out of StatefulSets and puts them on nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tpmodel.local import free_ports

from . import binaries
from .apiserver import ApiServer
from .processes import Daemon

NODE_GRACE_PERIOD = "16s"
"""A node that has not reported for so long is NotReady; the default is 50 s."""
AUTOSCALER_PERIOD = "5s"
"""How often a HorizontalPodAutoscaler looks; the default is 15 s."""


@dataclass(kw_only=True)
class Controllers:
    """Both programs, for one API server."""

    api: ApiServer
    controller_manager_flags: tuple[str, ...] = ()
    scheduler_flags: tuple[str, ...] = ()
    dies_with_parent: bool = False
    controller_manager: Daemon = field(init=False)
    scheduler: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.controller_manager = Daemon(name="kube-controller-manager", folder=self.api.folder)
        self.scheduler = Daemon(name="kube-scheduler", folder=self.api.folder)

    def start(self) -> None:
        """Starts what does not run."""
        self._start(
            self.controller_manager,
            binaries.path(binaries.CONTROLLER_MANAGER),
            f"--root-ca-file={self.api.authority.certificate.certificate}",
            f"--service-account-private-key-file={self.api.service_account.key}",
            f"--cluster-signing-cert-file={self.api.authority.certificate.certificate}",
            f"--cluster-signing-key-file={self.api.authority.certificate.key}",
            "--use-service-account-credentials",
            # Its default is a folder of the whole machine, which it makes.
            f"--flex-volume-plugin-dir={self.api.folder / 'volume-plugins'}",
            f"--node-monitor-grace-period={NODE_GRACE_PERIOD}",
            f"--horizontal-pod-autoscaler-sync-period={AUTOSCALER_PERIOD}",
            *self.controller_manager_flags,
        )
        self._start(self.scheduler, binaries.path(binaries.SCHEDULER), *self.scheduler_flags)

    def stop(self) -> None:
        """Ends both at once."""
        self.controller_manager.kill()
        self.scheduler.kill()

    def explain(self) -> str:
        """The ends of both logs."""
        return f"{self.controller_manager.last_lines()}\n{self.scheduler.last_lines()}"

    def _start(self, daemon: Daemon, program: Path, *flags: str) -> None:
        if daemon.running():
            return
        user = self.api.user(f"{daemon.name}.kubeconfig", f"system:{daemon.name}")
        access = [
            f"--{kind}={user}" for kind in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
        ]
        # One of each: an election would only delay the start.
        own = ["--leader-elect=false", "--bind-address=127.0.0.1", f"--secure-port={free_ports(1)[0]}"]
        daemon.start([str(program), *access, *own, *flags], dies_with_parent=self.dies_with_parent)
