"""The whole cluster on this machine: `up` makes what is missing, `down` removes everything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import addresses, binaries, cache, cgroups, debian, kernel_settings, network, requirements
from .apiserver import ApiServer
from .controllers import Controllers
from .dns import Dns
from .errors import ClusterError
from .kubectl import Kubectl
from .network import Network
from .node import Node
from .processes import Daemon, kill_forgotten
from .waiting import wait_until

NODES = 3
READY_SECONDS = 120.0
NODES_RECORD = "nodes.json"


def folder() -> Path:
    """Everything that a running cluster writes."""
    return cache.folder() / "cluster"


@dataclass(kw_only=True)
class LocalCluster:
    """Control plane, name server and nodes; `count` nodes."""

    count: int = NODES
    prepare_disk: Callable[[Node], None] = field(default=lambda node: None)
    """Fills a new node's disk (images, checkpoints) before its programs start."""
    folder: Path = field(default_factory=folder)
    network: Network = field(init=False)
    api: ApiServer = field(init=False)
    controllers: Controllers = field(init=False)
    dns: Dns = field(init=False)
    nodes: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= addresses.MOST_NODES:
            raise ClusterError(f"a cluster has 1 to {addresses.MOST_NODES} nodes, not {self.count}")
        self.network = Network(folder=self.folder)
        self.api = ApiServer(
            folder=self.folder,
            address=addresses.HOST,
            port=addresses.API_PORT,
            etcd_port=addresses.ETCD_PORT,
            etcd_peer_port=addresses.ETCD_PEER_PORT,
        )
        self.controllers = Controllers(api=self.api)
        self.dns = Dns(api=self.api)
        self.nodes = [
            Node(
                number=number,
                count=self.count,
                folder=self.folder / "nodes" / f"node{number}",
                api=self.api,
                network=self.network,
            )
            for number in range(1, self.count + 1)
        ]

    @classmethod
    def running(cls) -> LocalCluster:
        """The one that is up."""
        record = folder() / NODES_RECORD
        if not record.exists():
            raise ClusterError("no cluster is up")
        return cls(count=json.loads(record.read_text()))

    @property
    def kubeconfig(self) -> Path:
        """For a user who may do everything."""
        return self.api.kubeconfig

    @property
    def kubectl(self) -> Kubectl:
        """With that kubeconfig."""
        return Kubectl(self.kubeconfig)

    def node(self, name: str) -> Node:
        """By the name that Kubernetes knows."""
        return next(node for node in self.nodes if node.name == name)

    def up(self) -> None:
        """Starts what does not run and returns when every node is Ready."""
        requirements.check()
        debian.ensure(debian.NODE_NEEDS)
        binaries.ensure(binaries.CLUSTER_PROGRAMS)
        was_up = self.folder.exists()
        try:
            with cache.locked("cluster"):
                self._start()
        except KeyboardInterrupt:
            # Half a cluster is of no use; one that was there before stays.
            if not was_up:
                self.down()
            raise

    def _start(self) -> None:
        self._check_count()
        kernel_settings.remember(self._settings_record)
        self.network.create(self.count)
        self.api.start()
        self.controllers.start()
        self.dns.start(self.kubectl)
        for node in self.nodes:
            if not node.disk.exists():
                self.prepare_disk(node)
            node.start()
        self.wait_ready()

    def wait_ready(self, *, seconds: float = READY_SECONDS) -> None:
        """Returns when every node is Ready."""
        wait_until(
            lambda: not self.not_ready(), what="every node Ready", seconds=seconds, explain=self._explain, interval=0.5
        )

    def not_ready(self) -> list[str]:
        """Nodes that are not Ready, or not registered."""
        ready = {
            item["metadata"]["name"]
            for item in self.kubectl.list("nodes")
            for condition in item.get("status", {}).get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        }
        return [node.name for node in self.nodes if node.name not in ready]

    def daemons(self) -> list[Daemon]:
        """Every program of the cluster."""
        control = [self.api.etcd, self.api.apiserver, self.controllers.controller_manager, self.controllers.scheduler]
        nodes = [daemon for node in self.nodes for daemon in (node.containerd, node.proxy, node.kubelet)]
        return [*control, self.dns.coredns, *nodes]

    def down(self) -> None:
        """Removes everything, whatever state it finds; the cache of programs and images stays."""
        with cache.locked("cluster"):
            for node in self._every_node():
                node.destroy()
            self.dns.stop()
            self.controllers.stop()
            self.api.stop()
            self.network.remove()
            kill_forgotten(self.folder, binaries.folder())
            cgroups.remove()
            kernel_settings.put_back(self._settings_record)
            shutil.rmtree(self.folder, ignore_errors=True)
            left = [str(path) for path in (self.folder, *cgroups.left()) if path.exists()]
            if left or network.left():
                raise ClusterError(f"could not be removed: {', '.join(left) or network.HOST_INTERFACE}")

    @property
    def _settings_record(self) -> Path:
        return self.folder / "kernel-settings.json"

    def _check_count(self) -> None:
        """Nodes know of each other's subnets from the start, so their number is fixed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / NODES_RECORD
        if not record.exists():
            record.write_text(json.dumps(self.count))
        there = json.loads(record.read_text())
        if there != self.count:
            raise ClusterError(f"a cluster of {there} nodes is up: take it down before another of {self.count}")

    def _every_node(self) -> list[Node]:
        """Also those of a cluster that was started with another number of nodes."""
        there = (self.folder / "nodes").glob("node*")
        numbers = sorted({int(path.name.removeprefix("node")) for path in there})
        return [
            Node(
                number=number,
                count=self.count,
                folder=self.folder / "nodes" / f"node{number}",
                api=self.api,
                network=self.network,
            )
            for number in numbers
        ]

    def _explain(self) -> str:
        missing = self.not_ready()
        return "\n".join(f"{node.name} is not Ready\n{node.explain()}" for node in self.nodes if node.name in missing)
