"""etcd and kube-apiserver: the part of a cluster that is enough to test what only reads and writes objects.

`running()` gives a test one of its own, on free loopback ports and in a temporary folder:

    with apiserver.running() as api:
        ...  # api.kubeconfig, api.server
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tpmodel.local import free_ports

from . import binaries, kubeconfig
from .certificates import Authority, Certificate
from .errors import ClusterError
from .processes import Daemon
from .waiting import wait_until

ADMIN_GROUP = "system:masters"
SERVICE_RANGE = "10.96.0.0/16"
FIRST_SERVICE_ADDRESS = "10.96.0.1"
READY_SECONDS = 60.0
TRIES = 3


@dataclass(kw_only=True)
class ApiServer:
    """etcd and kube-apiserver with their keys, all of it in `folder`."""

    folder: Path
    address: str = "127.0.0.1"
    port: int
    etcd_port: int
    etcd_peer_port: int
    flags: tuple[str, ...] = ()
    dies_with_parent: bool = False
    authority: Authority = field(init=False)
    etcd: Daemon = field(init=False)
    apiserver: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.authority = Authority(self.folder / "keys")
        self.etcd = Daemon(name="etcd", folder=self.folder)
        self.apiserver = Daemon(name="kube-apiserver", folder=self.folder)

    @property
    def server(self) -> str:
        """Its address as a URL."""
        return f"https://{self.address}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """For a user who may do everything."""
        return self.folder / "kubeconfig"

    @property
    def service_account(self) -> Certificate:
        """Signs service accounts' tokens."""
        return self.authority.issue("service-account", "service-account")

    def start(self) -> None:
        """Starts both unless they run, and returns when requests are answered."""
        self.authority.create()
        self.user("kubeconfig", "admin", organization=ADMIN_GROUP)
        self.start_etcd()
        self.start_apiserver()

    def start_etcd(self) -> None:
        """Without fsync: a crash of this machine may lose the cluster, which is only a test's."""
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.etcd_port, self.etcd_peer_port))
        command = [str(binaries.path(binaries.ETCD)), f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync"]
        command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        command += [f"--initial-cluster=default={peer}", "--quota-backend-bytes=4294967296", "--log-level=warn"]
        self.etcd.start(command, dies_with_parent=self.dies_with_parent)

    def start_apiserver(self) -> None:
        """Returns when it is ready."""
        names = [f"IP:{address}" for address in {"127.0.0.1", self.address, FIRST_SERVICE_ADDRESS}]
        names += ["DNS:localhost", "DNS:kubernetes.default.svc"]
        serving = self.authority.issue("apiserver", "kube-apiserver", alternative_names=sorted(names))
        kubelet_client = self.authority.issue("kubelet-client", "kubelet-client", organization=ADMIN_GROUP)
        front_proxy = Authority(self.folder / "keys", "front-proxy")
        front_proxy.create()
        proxy_client = front_proxy.issue("front-proxy-client", "front-proxy-client")
        command = [
            str(binaries.path(binaries.APISERVER)),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={self.port}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={self.authority.certificate.certificate}",
            f"--service-account-key-file={self.service_account.certificate}",
            f"--service-account-signing-key-file={self.service_account.key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            # Node names are in no DNS: logs and exec go to the node's address.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            # Served metrics APIs: the apiserver dials their pods, since it has no service addresses.
            "--enable-aggregator-routing=true",
            f"--requestheader-client-ca-file={front_proxy.certificate.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={proxy_client.certificate}",
            f"--proxy-client-key-file={proxy_client.key}",
            *self.flags,
        ]
        self.apiserver.start(command, dies_with_parent=self.dies_with_parent)
        wait_until(self._ready_or_ended, what="a ready kube-apiserver", seconds=READY_SECONDS, explain=self.explain)

    def user(self, file: str, common_name: str, *, organization: str = "") -> Path:
        """A kubeconfig for a user of this name and group; RBAC says what the user may do."""
        issued = self.authority.issue(f"user-{file}", common_name, organization=organization)
        return kubeconfig.write(
            self.folder / file, server=self.server, authority=self.authority.certificate, user=issued
        )

    def ready(self) -> bool:
        """Whether /readyz says so."""
        user = self.authority.issue("user-kubeconfig", "admin", organization=ADMIN_GROUP)
        try:
            return _get_status(f"{self.server}/readyz", self.authority.certificate, user) == http.client.OK
        except OSError:
            return False

    def stop(self) -> None:
        """Ends both at once; nothing is left to be written."""
        self.apiserver.kill()
        self.etcd.kill()

    def explain(self) -> str:
        """The ends of both logs."""
        return f"{self.etcd.last_lines()}\n{self.apiserver.last_lines()}"

    def _ready_or_ended(self) -> bool:
        if not (self.etcd.running() and self.apiserver.running()):
            raise ClusterError(f"the API server ended while it started\n{self.explain()}")
        return self.ready()


@contextlib.contextmanager
def running(*flags: str) -> Iterator[ApiServer]:
    """An API server of the caller's own, about 5 s away. Gone at the end, also when the caller is killed.

    No controller runs: nothing makes pods of a StatefulSet, collects garbage or adds service accounts.
    """
    with tempfile.TemporaryDirectory(prefix="tpmodel-apiserver-") as folder:
        api = _started(Path(folder), flags)
        try:
            yield api
        finally:
            api.stop()


def _started(folder: Path, flags: tuple[str, ...]) -> ApiServer:
    """A port is free only until another takes it: then other ports are tried."""
    binaries.ensure(binaries.API_PROGRAMS)
    for attempt in range(1, TRIES + 1):
        port, etcd_port, etcd_peer_port = free_ports(3)
        api = ApiServer(
            folder=folder / str(attempt),
            port=port,
            etcd_port=etcd_port,
            etcd_peer_port=etcd_peer_port,
            # Nothing makes service accounts here, and loopback can be no endpoint of the kubernetes service.
            flags=("--disable-admission-plugins=ServiceAccount", "--endpoint-reconciler-type=none", *flags),
            dies_with_parent=True,
        )
        try:
            with contextlib.ExitStack() as when_failed:
                when_failed.callback(api.stop)
                api.start()
                when_failed.pop_all()
        except ClusterError as error:
            if "address already in use" not in str(error) or attempt == TRIES:
                raise
        else:
            return api
    raise AssertionError("unreachable: the last attempt returns or raises")


def _get_status(url: str, authority: Certificate, user: Certificate) -> int:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(user.certificate, user.key)
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", parts.path)
        return connection.getresponse().status
