"""Runs a real api process against a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from support.scripted_engine import Script, ScriptedEngine
from support.text_checkpoint import write_text_checkpoint
from tpmodel.local import free_ports
from tpmodel.v1 import pod_pb2
from tpmodel_worker.framing import read_message
from tpmodel_worker.settings import ServeSettings

START_SECONDS = 120.0


@dataclass(slots=True)
class ApiUnderTest:
    """A listening api process, its engine and its checkpoint's tokenizer."""

    settings: ServeSettings
    engine: ScriptedEngine
    tokenizer: Tokenizer
    process: asyncio.subprocess.Process
    report: pod_pb2.ProcessReport
    """The process's first."""
    reports: asyncio.Queue[pod_pb2.ProcessReport]
    """Those of all api processes since."""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.settings.http_port}"

    async def standard_error(self) -> str:
        """What the process logged, once it has ended."""
        async with asyncio.timeout(START_SECONDS):
            await self.process.wait()
        return error_file(self.settings, 0).read_text()


def error_file(settings: ServeSettings, index: int) -> Path:
    return Path(settings.runtime_dir) / f"api-{index}.stderr"


async def start_api(settings: ServeSettings, *, index: int) -> asyncio.subprocess.Process:
    settings_file = Path(settings.runtime_dir) / "settings.json"
    settings_file.write_text(settings.to_json())
    with error_file(settings, index).open("wb") as errors:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tpmodel_worker.api", "--settings-file", str(settings_file), "--index", str(index)),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=errors,
        )


@contextlib.asynccontextmanager
async def api_under_test(
    script: Script, *, config: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[ApiUnderTest]:
    """Starts both; ends both. `config` replaces entries of config.json, `settings` those of ServeSettings."""
    # Unix socket paths must be short.
    with tempfile.TemporaryDirectory(prefix="tpm-") as folder:
        root = Path(folder)
        port, http_port = free_ports(2)
        tokenizer = write_text_checkpoint(root / "model", **(config or {}))
        values: dict[str, Any] = {
            "model_path": str(root / "model"),
            "model_id": "test/model",
            "served_name": "test-model",
            "runtime_dir": folder,
            "port": port,
            "http_port": http_port,
            "drain_timeout": 5.0,
        }
        chosen = ServeSettings(**(values | settings))
        reports: asyncio.Queue[pod_pb2.ProcessReport] = asyncio.Queue()

        async def on_report(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while (report := await read_message(reader, pod_pb2.ProcessReport)) is not None:
                reports.put_nowait(report)
            writer.close()

        supervisor = await asyncio.start_unix_server(on_report, path=str(chosen.report_socket))
        async with ScriptedEngine(chosen.front_socket, script) as engine:
            process = await start_api(chosen, index=0)
            try:
                async with asyncio.timeout(START_SECONDS):
                    report = await reports.get()
                yield ApiUnderTest(chosen, engine, tokenizer, process, report, reports)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                supervisor.close()
