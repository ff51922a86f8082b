"""The project's two images: named by the content they are made of, built when there is none of that content.

Their large layers (system, torch and other packages) come from buildah's cache of layers while requirements and
Dockerfile stay as they are: a change of code builds and loads a few megabytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import base_image, buildah, cache

ROOT = Path(__file__).parents[2]
PREFIX = "localhost/tpmodel-test"
SOURCES = (
    "pyproject.toml",
    "hatch_build.py",
    "README.md",
    "LICENSE",
    ".dockerignore",
    "Dockerfile.worker",
    "Dockerfile.operator",
    "requirements",
    "protos",
    "client",
    "operator",
    "worker",
)
"""What builds get; the same as in .dockerignore, and the Dockerfiles."""
GENERATED = ("client/tpmodel/v1", "__pycache__", ".egg-info", ".so")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
KEPT = 4
"""Images of earlier code that stay, of each kind, so that going back to them takes no build."""


@dataclass(frozen=True)
class Image:
    """One of the project's images."""

    kind: str

    @property
    def dockerfile(self) -> str:
        """Relative to the repository's root."""
        return f"Dockerfile.{self.kind}"

    def build(self, source: Path = ROOT) -> str:
        """The image of a source tree, built if the storage does not have it; returns its name."""
        key = cache.files_key(source, list(_sources(source)), base_image.name(), _torch_backend())
        made = f"{PREFIX}/{self.kind}:{key}"
        with cache.locked("images"):
            if not buildah.exists(made):
                print(f"building {made}; minutes if requirements or the Dockerfile have changed", flush=True)
                self._build(source, made)
                self._forget_older(made)
        return made

    def _build(self, source: Path, name: str) -> None:
        arguments = {"BASE_IMAGE": base_image.name()}
        if self.kind == "worker":
            arguments["TORCH_BACKEND"] = _torch_backend()
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder) / "source"
            _stage(source, staged)
            environment = Path(folder) / "build_environment"
            environment.write_text(_build_environment())
            secrets = {"build_environment": environment}
            if CERTIFICATES.exists():
                secrets["certificates"] = CERTIFICATES
            buildah.build(staged, self.dockerfile, name=name, arguments=arguments, secrets=secrets)

    def _forget_older(self, made: str) -> None:
        """Removes earlier images: those with other large layers, and of the others all but the newest few."""
        earlier = [name for name in buildah.names(f"{PREFIX}/{self.kind}") if name != made]
        alike = [name for name in earlier if buildah.large_layers(name) == buildah.large_layers(made)]
        for name in {*earlier} - {*alike[:KEPT]}:
            buildah.call("rmi", name)


WORKER = Image("worker")
OPERATOR = Image("operator")
ALL = (WORKER, OPERATOR)


def _sources(source: Path) -> Iterator[Path]:
    for name in SOURCES:
        top = source / name
        for path in [top] if top.is_file() else top.rglob("*"):
            relative = str(path.relative_to(source))
            if path.is_file() and not any(part in relative for part in GENERATED):
                yield path


def _stage(source: Path, folder: Path) -> None:
    """Copies what a build gets, with equal times: buildah takes a file of another time for another file."""
    for path in _sources(source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
        os.utime(copy, (0, 0))
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
            os.utime(path, (0, 0))


def _torch_backend() -> str:
    """The build of torch that scripts/setup found reachable: its own for processors, else the one with CUDA."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return "cpu" if version.endswith("+cpu") else ""


def _build_environment() -> str:
    """How this machine reaches packages, for the build and not for the image."""
    values = {name: os.environ[name] for name in PROXIES if name in os.environ}
    if CERTIFICATES.exists():
        values |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), "/run/secrets/certificates")
    index = _pip_setting("global.index-url")
    if index:
        values |= dict.fromkeys(("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), index)
    return "".join(f"export {name}='{value}'\n" for name, value in values.items())


def _pip_setting(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", name]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
