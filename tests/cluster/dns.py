"""CoreDNS as a process of this machine; pods are told its address by kubelet."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import addresses, binaries
from .apiserver import ApiServer
from .kubectl import Kubectl
from .processes import Daemon
from .waiting import wait_until

USER = "system:coredns"
READY_PORT = 8181
READY_SECONDS = 20.0


@dataclass(kw_only=True)
class Dns:
    """The cluster's name server, set up as kubeadm does: it answers names of the cluster from what it watches."""

    api: ApiServer
    coredns: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.coredns = Daemon(name="coredns", folder=self.api.folder)

    def start(self, kubectl: Kubectl) -> None:
        """Starts it unless it runs; returns when it answers."""
        kubectl.apply(_permission())
        self._start()

    def serve(self, *, denied: Iterable[str] = (), remembers: bool = False) -> None:
        """From now on serves so; without arguments all is as usual.

        denied: these names, and those below them, do not exist (NXDOMAIN).
        remembers: keeps answers for 30 s, also that there is no such name. Caches on nodes do, and older clusters.
        """
        self.coredns.kill()
        self._start(denied=tuple(denied), remembers=remembers)

    def stop(self) -> None:
        """Ends it."""
        self.coredns.kill()

    def _start(self, *, denied: tuple[str, ...] = (), remembers: bool = False) -> None:
        if self.coredns.running():
            return
        user = self.api.user("coredns.kubeconfig", USER)
        corefile = self.api.folder / "Corefile"
        corefile.write_text(_corefile(str(user), denied=denied, remembers=remembers))
        self.coredns.start([str(binaries.path(binaries.COREDNS)), "-conf", str(corefile)])
        wait_until(_ready, what="a ready CoreDNS", seconds=READY_SECONDS, explain=self.coredns.last_lines)


def _ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://{addresses.HOST}:{READY_PORT}/ready", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _corefile(kubeconfig: str, *, denied: tuple[str, ...], remembers: bool) -> str:
    refused = "".join(f"    template ANY ANY {name} {{\n        rcode NXDOMAIN\n    }}\n" for name in denied)
    domain = addresses.CLUSTER_DOMAIN
    not_cached = "" if remembers else f" {{\n        disable success {domain}\n        disable denial {domain}\n    }}"
    return f""".:53 {{
    bind {addresses.HOST}
    errors
    ready {addresses.HOST}:{READY_PORT}
{refused}    kubernetes {domain} in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 30
    }}
    cache 30{not_cached}
}}
"""


def _permission() -> dict[str, object]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": USER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
    }
