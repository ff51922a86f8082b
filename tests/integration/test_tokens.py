"""The gang's own token, the trainer's and the clients' API key: each opens its own services and no other.

Those of ranks and supervisors are in test_inner_ports.py, those of clients in test_api_lifecycle.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.fake_rank import TOKEN
from support.whole_engine import TIMEOUTS, engine_settings
from tpmodel.v1 import kv_pb2, kv_pb2_grpc, weights_pb2, weights_pb2_grpc, worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings

TRAINER = "the trainer's"
API_KEY = "the clients'"
GANG_CALLS = {
    "Register": (worker_pb2_grpc.GangServiceStub, worker_pb2.RegisterRequest()),
    "Drain": (worker_pb2_grpc.GangServiceStub, worker_pb2.DrainRequest()),
    "Rebuild": (worker_pb2_grpc.GangServiceStub, worker_pb2.RebuildRequest()),
    "Follow": (worker_pb2_grpc.GangServiceStub, worker_pb2.FollowRequest()),
    "Fetch": (kv_pb2_grpc.KvServiceStub, kv_pb2.FetchKvRequest()),
}
TRAINER_CALLS = {
    "GetParameterInfo": weights_pb2.GetParameterInfoRequest(),
    "InitUpdate": weights_pb2.InitUpdateRequest(),
    "StartUpdate": weights_pb2.StartUpdateRequest(),
    "AwaitUpdate": weights_pb2.AwaitUpdateRequest(),
    "Update": weights_pb2.UpdateRequest(),
    "FinishUpdate": weights_pb2.FinishUpdateRequest(),
    "AbortUpdate": weights_pb2.AbortUpdateRequest(),
    "GetVersion": weights_pb2.GetVersionRequest(),
}


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    file = tmp_path / "trainer-token"
    file.write_text(f"{TRAINER}\n")
    return dataclasses.replace(engine_settings(tmp_path), api_key=API_KEY, trainer_token_file=str(file))


@pytest.fixture
async def engine(settings: ServeSettings) -> AsyncIterator[Engine]:
    made = Engine(settings, timeouts=TIMEOUTS)
    await made.start()
    yield made
    await made.stop()


def change_file(settings: ServeSettings, text: str | None) -> None:
    """Writes the file of the trainer's token, or (None) removes it."""
    file = Path(settings.trainer_token_file)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


async def ask(engine: Engine, stub: Any, method: str, request: Any, token: str) -> tuple[grpc.StatusCode, str]:
    """How the call ends, with the token or ("") without one."""
    metadata = token_metadata(token) if token else ()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        call = getattr(stub(channel), method)(request, timeout=10, metadata=metadata)
        try:
            if hasattr(call, "read"):
                await call.read()
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def ask_version(engine: Engine, token: str) -> tuple[grpc.StatusCode, str]:
    stub, request = weights_pb2_grpc.WeightServiceStub, weights_pb2.GetVersionRequest()
    return await ask(engine, stub, "GetVersion", request, token)


@pytest.mark.parametrize("token", [TRAINER, API_KEY, "another", ""])
@pytest.mark.parametrize("method", GANG_CALLS)
async def test_what_commands_a_gang_takes_its_own_token_only(engine: Engine, method: str, token: str) -> None:
    stub, request = GANG_CALLS[method]
    code, message = await ask(engine, stub, method, request, token)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "takes the gang's own token" in message
    assert message.endswith("presents another one" if token else "presents none")


@pytest.mark.parametrize("token", [TOKEN, API_KEY, "another", ""])
@pytest.mark.parametrize("method", TRAINER_CALLS)
async def test_what_updates_weights_takes_the_trainers_token_only(engine: Engine, method: str, token: str) -> None:
    stub = weights_pb2_grpc.WeightServiceStub
    code, message = await ask(engine, stub, method, TRAINER_CALLS[method], token)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "takes the trainer's token (--trainer-token-file, in Kubernetes auth.trainerToken)" in message


async def test_the_right_tokens_are_let_in(engine: Engine) -> None:
    assert (await ask_version(engine, TRAINER))[0] is grpc.StatusCode.OK
    stub, request = GANG_CALLS["Follow"]
    assert (await ask(engine, stub, "Follow", request, TOKEN))[0] is grpc.StatusCode.OK


async def test_a_trainers_token_that_is_changed_counts_from_the_next_call_on(
    engine: Engine, settings: ServeSettings
) -> None:
    change_file(settings, "a new one")
    assert (await ask_version(engine, TRAINER))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await ask_version(engine, "a new one"))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("token", [TRAINER, ""])
async def test_no_trainer_is_let_in_while_the_file_cannot_be_read(
    engine: Engine, settings: ServeSettings, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    change_file(settings, "\n")
    code, message = await ask_version(engine, token)
    assert (code, "its log says why" in message) == (grpc.StatusCode.PERMISSION_DENIED, True)
    assert f"--trainer-token-file {settings.trainer_token_file}: the file is empty" in caplog.text
    change_file(settings, None)
    assert (await ask_version(engine, token))[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("token", [TOKEN, TRAINER, ""])
async def test_a_gang_without_a_trainers_token_takes_no_updates(tmp_path: Path, token: str) -> None:
    engine = Engine(engine_settings(tmp_path), timeouts=TIMEOUTS)
    await engine.start()
    try:
        code, message = await ask_version(engine, token)
    finally:
        await engine.stop()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "takes no weight updates: name the file of its trainer's token, --trainer-token-file" in message
