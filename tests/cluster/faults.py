"""Ways to break the local cluster, each of which `mend` undoes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .local import LocalCluster


@dataclass(frozen=True)
class Faults:
    """Breaks nodes, links, API server and name server of one cluster."""

    cluster: LocalCluster

    def stop_kubelet_and_containerd(self, node: str) -> None:
        """The node is lost to the cluster, its containers and network live on."""
        self.cluster.node(node).stop_kubelet_and_containerd()

    def power_off(self, node: str) -> None:
        """Every process of the node is killed and its link cut; its disk stays."""
        self.cluster.node(node).power_off()

    def cut_link(self, node: str) -> None:
        """Nothing reaches the node or its pods and nothing leaves them; everything runs on."""
        self.cluster.network.set_link(self.cluster.node(node).number, up=False)

    def bring_back(self, node: str) -> None:
        """Undoes any of these; returns when the node is Ready again."""
        broken = self.cluster.node(node)
        broken.start()
        self.cluster.network.set_link(broken.number, up=True)
        self.cluster.wait_ready()

    @contextlib.contextmanager
    def without_apiserver(self) -> Iterator[None]:
        """Kills the API server, and with it every watch, for as long as the block lasts. The state is in etcd."""
        self.cluster.api.apiserver.kill()
        try:
            yield
        finally:
            self.cluster.api.start_apiserver()

    def deny_names(self, names: Iterable[str]) -> None:
        """These names do not exist (NXDOMAIN), nor those below them, until called again; none: all exist."""
        self.cluster.dns.serve(denied=names)

    def remember_names(self) -> None:
        """The name server keeps its answers for 30 s, however wrong they have become."""
        self.cluster.dns.serve(remembers=True)

    def mend(self) -> None:
        """Brings everything back; returns when every node is Ready."""
        self.cluster.api.start()
        self.cluster.controllers.start()
        self.cluster.dns.serve()
        for node in self.cluster.nodes:
            node.start()
            self.cluster.network.set_link(node.number, up=True)
        self.cluster.wait_ready()
