"""Clients and commands with a server that speaks TLS."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from support.tls_certificates import IssuedCertificate, issue
from tpmodel import AsyncClient, Client, UnavailableError
from tpmodel.channel import RetryPolicy
from tpmodel.cli import main
from tpmodel.v1 import inference_pb2 as pb

ONCE = RetryPolicy(window=0.0)
ELSEWHERE = "chat-leaders.default.svc"


@pytest.fixture
def issued(tmp_path: Path) -> IssuedCertificate:
    return issue(tmp_path, "localhost", ELSEWHERE)


@pytest.fixture
def port(issued: IssuedCertificate) -> Iterator[int]:
    """Of a server that answers hello."""

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        started = pb.GenerateStarted(request_id="r", seed=1, weight_version=1, prompt_tokens=1)
        yield pb.GenerateResponse(chunk=pb.GenerateChunk(started=started, text="hello", token_ids=[1]))
        sample = pb.SampleCompletion(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=1)
        yield pb.GenerateResponse(completion=pb.GenerateCompletion(samples=[sample], weight_versions=[1]))

    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_stream_rpc_method_handler(
        generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("tpmodel.v1.InferenceService", {"Generate": method})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(issued.key, issued.certificate)]))
    server.start()
    yield port
    server.stop(None)


def test_a_client_trusts_the_authority_that_it_is_given(issued: IssuedCertificate, port: int) -> None:
    credentials = grpc.ssl_channel_credentials(issued.authority.read_bytes())
    with Client(f"localhost:{port}", credentials=credentials) as client:
        assert client.complete("Hi").text == "hello"


async def test_behind_a_tunnel_the_servers_name_is_given(issued: IssuedCertificate, port: int) -> None:
    credentials = grpc.ssl_channel_credentials(issued.authority.read_bytes())
    with Client(f"127.0.0.1:{port}", credentials=credentials, server_name=ELSEWHERE) as client:
        assert client.complete("Hi").text == "hello"
    async with AsyncClient(f"127.0.0.1:{port}", credentials=credentials, server_name=ELSEWHERE) as client:
        assert (await client.complete("Hi")).text == "hello"


def test_a_certificate_for_another_name_is_refused(issued: IssuedCertificate, port: int) -> None:
    credentials = grpc.ssl_channel_credentials(issued.authority.read_bytes())
    with Client(f"127.0.0.1:{port}", credentials=credentials, retry=ONCE) as client:
        with pytest.raises(UnavailableError):
            client.complete("Hi")


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["generate", "Hi", "--wait=0", *arguments])


def test_a_command_uses_tls_with_the_certificates_to_trust(issued: IssuedCertificate, port: int) -> None:
    plain = generate("--target", f"localhost:{port}")
    assert plain.exit_code == 1
    trusting = generate("--target", f"localhost:{port}", "--tls-ca", str(issued.authority))
    assert (trusting.exit_code, trusting.output) == (0, "hello\n")


def test_a_file_of_certificates_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = generate("--tls-ca", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "--tls-ca" in result.output
