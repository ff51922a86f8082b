"""Build hook: generates the gRPC stubs and compiles the CPU communicator's C part.

Neither is committed: stubs refuse older runtimes than their generator's, and the library is machine code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "client" / "tpmodel" / "v1"
COMM = ROOT / "worker" / "tpmodel_worker" / "comm"
# Linker and compiler flags for one small library; -O3 vectorises the sums.
C_FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]


def generate_stubs() -> None:
    """Writes client/tpmodel/v1: messages, services and their type stubs."""
    # Inside the isolated build environment the plugins are not on PATH.
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    STUBS.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(path) for path in (PROTOS / "tpmodel" / "v1").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    command += [f"--{kind}_out={STUBS.parent.parent}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *protos], check=True, env=environment)
    (STUBS / "__init__.py").write_text('"""Generated from protos/tpmodel/v1 at build time."""\n')


def compile_shared_memory() -> None:
    """Compiles comm/shared_memory.c to a library that ctypes loads."""
    source = COMM / "shared_memory.c"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler found: install one (gcc or clang) or set CC, then build again")
    flags = [*C_FLAGS, "-mavx2", "-mfma"] if os.uname().machine == "x86_64" else C_FLAGS
    subprocess.run([compiler, *flags, "-o", str(COMM / "_shared_memory.so"), str(source)], check=True)


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs both steps before hatchling collects files, for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates what the wheel needs and marks it as specific to this platform."""
        generate_stubs()
        compile_shared_memory()
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


if __name__ == "__main__":
    generate_stubs()
    compile_shared_memory()
