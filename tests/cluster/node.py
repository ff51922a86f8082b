"""One node: containerd, kubelet and kube-proxy in namespaces of their own.

The node has its own process, mount and network namespaces. Its programs see a private /run, /var/log and /srv, so
all nodes are configured alike, and ending the first process ends the node: every process, mount and link of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from . import addresses, binaries, cgroups, debian, pause_image
from .apiserver import ApiServer
from .errors import ClusterError
from .namespaces import Namespaces
from .network import Network
from .processes import Daemon, run
from .waiting import wait_until

DISK = "/run/node"
"""Where a node's programs see the node's disk."""
SRV = "/srv"
"""Each node's own folder for hostPath volumes."""
SOCKET = "/run/containerd/containerd.sock"
CRI_VERSION = "/runtime.v1.RuntimeService/Version"
"""What kubelet asks first."""
START_SECONDS = 30.0
CTR_SECONDS = 300.0


@dataclass(kw_only=True)
class Node:
    """Node `number` of `count`, counted from 1; everything of it is in `folder`."""

    number: int
    count: int
    folder: Path
    api: ApiServer
    network: Network
    namespaces: Namespaces = field(init=False)
    containerd: Daemon = field(init=False)
    kubelet: Daemon = field(init=False)
    proxy: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.namespaces = Namespaces(holder=Daemon(name="node", folder=self.folder), kinds=("net", "mount", "pid"))
        self.containerd = Daemon(name="containerd", folder=self.folder)
        self.kubelet = Daemon(name="kubelet", folder=self.folder)
        self.proxy = Daemon(name="kube-proxy", folder=self.folder)

    @property
    def name(self) -> str:
        """As Kubernetes knows it."""
        return f"node{self.number}"

    @property
    def address(self) -> str:
        """On the switch."""
        return addresses.node_address(self.number)

    @property
    def disk(self) -> Path:
        """The node's disk, as this machine sees it: it outlives the node's processes."""
        return self.folder / "disk"

    def start(self) -> None:
        """Starts what does not run; returns when containerd answers (readiness is the cluster's to wait for)."""
        if not self.namespaces.is_furnished():
            self.destroy()
            self.namespaces.create()
            self._mount()
            self.network.attach(self.namespaces, self.number, self.count)
            self.namespaces.furnished()
        self._write_configuration()
        self.start_containerd()
        self._start_proxy()
        self.start_kubelet()

    def start_containerd(self) -> None:
        """Returns when it answers, kubelet too, and has the image of pod sandboxes."""
        self.containerd.start(self.namespaces.entering(["containerd", "--config", str(self._file("containerd.toml"))]))
        what = f"containerd of {self.name}"
        wait_until(self._containerd_answers, what=what, seconds=START_SECONDS, explain=self.containerd.last_lines)
        if pause_image.NAME not in self.ctr("images", "list", "--quiet").split():
            self.ctr("images", "import", str(pause_image.archive()))
        wait_until(self._serves_kubelet, what=what, seconds=START_SECONDS, explain=self.containerd.last_lines)

    def start_kubelet(self) -> None:
        """It registers the node with the API server."""
        command = [str(binaries.path(binaries.KUBELET)), f"--config={self._file('kubelet.json')}"]
        command += [f"--kubeconfig={self._user(f'system:node:{self.name}', 'system:nodes', 'kubelet')}"]
        command += [f"--hostname-override={self.name}", f"--node-ip={self.address}"]
        self.kubelet.start(self.namespaces.entering(command))

    def stop_kubelet_and_containerd(self) -> None:
        """The node is lost to the cluster while its containers live on."""
        self.kubelet.kill()
        self.containerd.kill()

    def power_off(self) -> None:
        """Cuts the link and kills every process of the node at once; only its disk stays. `start` is power on."""
        if self.namespaces.exist():
            self.network.set_link(self.number, up=False)
        self.destroy()

    def destroy(self) -> None:
        """Ends every process of the node, whatever state it is in."""
        self.namespaces.destroy()
        for daemon in (self.kubelet, self.proxy, self.containerd):
            daemon.kill()

    def ctr(self, *arguments: str) -> str:
        """Runs containerd's own client on the images and containers that kubelet uses."""
        command = ["ctr", "--connect-timeout=60s", f"--address={SOCKET}", "--namespace=k8s.io", *arguments]
        return run(self.namespaces.entering(command), seconds=CTR_SECONDS)

    def explain(self) -> str:
        """The ends of its logs."""
        return "\n".join(daemon.last_lines() for daemon in (self.containerd, self.kubelet, self.proxy))

    def _mount(self) -> None:
        for folder in (self.disk / "srv", self.disk / "kubelet", self.folder / "log"):
            folder.mkdir(parents=True, exist_ok=True)
        steps = [
            "mount -t tmpfs -o mode=755 tmpfs /run",
            f"mkdir -p {DISK}",
            f"mount --bind '{self.disk}' {DISK}",
            # kubelet's device plugins are at a fixed path; the layer lets it exist for this node alone.
            "mkdir -p /run/var-lib/upper /run/var-lib/work",
            "mount -t overlay -o lowerdir=/var/lib,upperdir=/run/var-lib/upper,workdir=/run/var-lib/work node /var/lib",
            "mkdir -p /var/lib/kubelet",
            f"mount --bind {DISK}/kubelet /var/lib/kubelet",
            f"mount --bind '{self.folder / 'log'}' /var/log",
            f"mount --bind '{self.disk / 'srv'}' {SRV}",
            # Pods may want to see mounts that appear later; nothing of it leaves the node.
            "mount --make-rshared /",
        ]
        self.namespaces.run(["sh", "-ec", "\n".join(steps)], only=["mount"])

    def _start_proxy(self) -> None:
        command = [str(binaries.path(binaries.PROXY)), f"--hostname-override={self.name}", "--proxy-mode=iptables"]
        command += [f"--kubeconfig={self._user('system:kube-proxy', '', 'kube-proxy')}"]
        # The conntrack table is the whole machine's, not this namespace's to size.
        command += [f"--cluster-cidr={addresses.POD_RANGE}", "--conntrack-max-per-core=0"]
        self.proxy.start(self.namespaces.entering(command))

    def _user(self, common_name: str, organization: str, file: str) -> Path:
        return self.api.user(f"{self.name}-{file}.kubeconfig", common_name, organization=organization)

    def _containerd_answers(self) -> bool:
        if not self.containerd.running():
            raise ClusterError(self.containerd.last_lines())
        try:
            self.ctr("version")
        except ClusterError:
            return False
        return True

    def _serves_kubelet(self) -> bool:
        """Whether containerd has taken up the containers that it knows: before that kubelet would end."""
        # Inside the node's own /run.
        socket = f"/proc/{self.namespaces.first_process()}/root{SOCKET}"
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            try:
                channel.unary_unary(CRI_VERSION)(b"", timeout=5)
            except grpc.RpcError:
                return False
        return True

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _write_configuration(self) -> None:
        network = self.disk / "cni"
        network.mkdir(parents=True, exist_ok=True)
        (network / "10-pods.conflist").write_text(json.dumps(_cni_configuration(self.number), indent=1))
        self._file("containerd.toml").write_text(_containerd_configuration())
        authority = self.api.authority.certificate.certificate
        kubelet = _kubelet_configuration(authority=authority, cgroup=cgroups.create(self.name))
        self._file("kubelet.json").write_text(json.dumps(kubelet, indent=1))


def _containerd_configuration() -> str:
    return f"""version = 2
root = "{DISK}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
address = "{SOCKET}"

[plugins."io.containerd.internal.v1.opt"]
path = "/run/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause_image.NAME}"
# Where CAP_SYS_RESOURCE is missing, no process may get a lower score than its parent, and no sandbox would start.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{debian.CNI_PLUGINS}"
conf_dir = "{DISK}/cni"
"""


def _cni_configuration(number: int) -> dict[str, object]:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        # A pod that reaches itself through its Service comes back over the port it left by.
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{DISK}/pod-addresses",
            "ranges": [[{"subnet": addresses.pod_subnet(number)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}


def _kubelet_configuration(*, authority: Path, cgroup: str) -> dict[str, object]:
    return {
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "clusterDNS": [addresses.HOST],
        "clusterDomain": addresses.CLUSTER_DOMAIN,
        "resolvConf": "",
        "volumePluginDir": f"{DISK}/volume-plugins",
        # All nodes share one disk and one memory: only a machine that is really full evicts.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        # Sooner than the defaults (10 s, 40 s), so that tests of a lost node wait less; see control_plane.py.
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 16,
        # Default 1 min: how often a pod is looked at of which nothing new is known, such as its mounted ConfigMaps.
        "syncFrequency": "10s",
    }
