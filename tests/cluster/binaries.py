"""Programs that a cluster runs, built from pinned Go modules into the cache.

Nothing is fetched ready-made: the Go module proxy is the one source, go.sum and the checksum database the check.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .errors import ClusterError

MODULES = Path(__file__).parent / "modules"
KUBERNETES_VERSION = "v1.34.4"
"""The same as in modules/kubernetes/go.mod."""
HELM_VERSION = "v4.3.1"
COREDNS_VERSION = "v1.14.7"
KWOK_VERSION = "v0.8.0"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program: the Go package that makes it, and which module pins its version.

    `module` is a folder under modules/; empty where the package's own go.mod serves, at `version`.
    """

    name: str
    package: str
    version: str
    module: str = ""
    variables: tuple[str, ...] = ()
    """Values that the linker sets, as `path.name=value`."""


def _kubernetes(name: str) -> Program:
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    values = {"gitVersion": KUBERNETES_VERSION, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    # Else the server calls itself v0.0.0-master, and a chart's kubeVersion refuses it.
    paths = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return Program(
        name=name,
        package=f"k8s.io/kubernetes/cmd/{name}",
        version=KUBERNETES_VERSION,
        module="kubernetes",
        variables=tuple(f"{path}.{key}={value}" for path in paths for key, value in values.items()),
    )


APISERVER = _kubernetes("kube-apiserver")
CONTROLLER_MANAGER = _kubernetes("kube-controller-manager")
SCHEDULER = _kubernetes("kube-scheduler")
KUBELET = _kubernetes("kubelet")
PROXY = _kubernetes("kube-proxy")
KUBECTL = _kubernetes("kubectl")
ETCD = Program(name="etcd", package="go.etcd.io/etcd/server/v3", version="", module="kubernetes")
PAUSE = Program(name="pause", package=".", version="", module="pause")
HELM = Program(
    name="helm",
    package="helm.sh/helm/v4/cmd/helm",
    version=HELM_VERSION,
    variables=(f"helm.sh/helm/v4/internal/version.version={HELM_VERSION}",),
)
COREDNS = Program(name="coredns", package="github.com/coredns/coredns", version=COREDNS_VERSION)
KWOK = Program(name="kwok", package="sigs.k8s.io/kwok/cmd/kwok", version=KWOK_VERSION)

API_PROGRAMS = (ETCD, APISERVER)
CLUSTER_PROGRAMS = (*API_PROGRAMS, KUBECTL, CONTROLLER_MANAGER, SCHEDULER, KUBELET, PROXY, PAUSE, COREDNS)
ALL_PROGRAMS = (*CLUSTER_PROGRAMS, HELM, KWOK)


def folder() -> Path:
    """Where all programs are."""
    return cache.folder() / "binaries"


def path(program: Program) -> Path:
    """The program, built now if the cache does not have it. Minutes the first time."""
    target = _built(program)
    if target.exists():
        return target
    with cache.locked("binaries"):
        if not target.exists():
            _build(program, target)
            if built():
                # The compiler's intermediate files take gigabytes, and nothing is left to build.
                shutil.rmtree(_compiler_cache(), ignore_errors=True)
    return target


def ensure(programs: tuple[Program, ...] = ALL_PROGRAMS) -> list[Path]:
    """The paths of several programs."""
    return [path(program) for program in programs]


def built() -> bool:
    """Whether the cache has every program."""
    return all(_built(program).exists() for program in ALL_PROGRAMS)


def _built(program: Program) -> Path:
    return folder() / _key(program) / program.name


def _key(program: Program) -> str:
    if not program.module:
        return f"{program.name}-{program.version}"
    folder = MODULES / program.module
    files = [file for file in folder.iterdir() if file.suffix in (".go", ".mod", ".sum")]
    return f"{program.module}-{cache.files_key(folder, files, *program.variables)}"


def _compiler_cache() -> Path:
    return cache.folder() / "go-build"


def _build(program: Program, built: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ClusterError("the test cluster's programs are built with Go: install Go 1.26 or newer")
    built.parent.mkdir(parents=True, exist_ok=True)
    linker = " ".join(["-s", "-w", *(f"-X {variable}" for variable in program.variables)])
    with tempfile.TemporaryDirectory(dir=built.parent, prefix=".build-") as scratch:
        # Static programs: they run in any namespace and image, and need no C compiler.
        environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "", "GOCACHE": str(_compiler_cache())}
        flags = ["-trimpath", "-buildvcs=false", f"-ldflags={linker}"]
        if program.module:
            command = [go, "build", "-mod=readonly", *flags, "-o", f"{scratch}/{program.name}", program.package]
            folder = MODULES / program.module
        else:
            command = [go, "install", *flags, f"{program.package}@{program.version}"]
            environment["GOBIN"] = scratch
            folder = Path(scratch)
        print(f"building {program.name} {program.version}", flush=True)
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise ClusterError(f"building {program.name} failed:\n{result.stderr[-4000:]}")
        # Complete or absent, whatever interrupts this.
        (Path(scratch) / program.name).rename(built)
