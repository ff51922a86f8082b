"""TLS on the ports for clients: both of them, with a certificate that is renewed while they serve."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import grpc
import httpx
import pytest

from support.api_process import api_under_test
from support.scripted_engine import Exchange
from tpmodel import AsyncClient
from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.tls import ServerCertificate
from tpmodel_worker.models.config import ConfigError

SECONDS = 10.0


def write_certificate(folder: Path) -> bytes:
    """A new self-signed certificate for localhost, as a mounted Secret has it."""
    folder.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
               "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "tls.crt").read_bytes()


async def one_token(exchange: Exchange) -> None:
    await exchange.admit()
    await exchange.tokens([5], finish=inference_pb2.FINISH_REASON_LENGTH)


async def grpc_completes(target: str, root: bytes) -> bool:
    credentials = grpc.ssl_channel_credentials(root)
    async with AsyncClient(target, credentials=credentials) as client:
        answer = await client.complete("hello", max_tokens=1)
    return list(answer.token_ids[0]) == [5]


async def test_both_ports_speak_tls_and_nothing_else(tmp_path: Path) -> None:
    root = write_certificate(tmp_path / "tls")
    async with api_under_test(one_token, tls_dir=str(tmp_path / "tls")) as api:
        assert await grpc_completes(api.target, root)
        context = ssl.create_default_context(cadata=root.decode())
        async with httpx.AsyncClient(verify=context, timeout=SECONDS) as http:
            models = await http.get(f"https://127.0.0.1:{api.settings.http_port}/v1/models")
            assert models.status_code == 200
        async with httpx.AsyncClient(timeout=SECONDS) as http:
            with pytest.raises(httpx.HTTPError):
                await http.get(f"{api.http}/v1/models")
        async with grpc.aio.insecure_channel(api.target) as channel:
            call = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=SECONDS)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_presented_to_new_connections(tmp_path: Path) -> None:
    first = write_certificate(tmp_path / "tls")
    async with api_under_test(one_token, tls_dir=str(tmp_path / "tls")) as api:
        assert await grpc_completes(api.target, first)
        second = write_certificate(tmp_path / "tls")
        assert await grpc_completes(api.target, second)
        async with grpc.aio.secure_channel(api.target, grpc.ssl_channel_credentials(first)) as channel:
            call = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"", timeout=SECONDS)


async def test_a_folder_without_a_usable_certificate_is_refused_naming_it(tmp_path: Path) -> None:
    write_certificate(tmp_path / "tls")
    (tmp_path / "tls" / "tls.key").write_text("no key")
    for folder in (tmp_path / "tls", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=rf"{folder}: tls\.crt and tls\.key are no usable certificate"):
            ServerCertificate(folder)
