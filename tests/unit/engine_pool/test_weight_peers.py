"""Which of the other gangs have weights that a gang could copy."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tpmodel.v1 import kv_pb2
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.auth import Expected, NoTokenError, TokenInterceptor
from tpmodel_worker.engine.weight_peers import Peer, WeightPeers, difference, weight_set
from tpmodel_worker.settings import ServeSettings

HOST = "127.0.0.1"
TOKEN = "secret"
OURS = pb.WeightSet(model_id="m", config_digest="c", dtype="bfloat16", ranks=2)


def handler(answer: pb.GetVersionResponse) -> grpc.GenericRpcHandler:
    """Of the one call that other gangs are asked by."""

    async def get_version(_request: pb.GetVersionRequest, _context: Any) -> pb.GetVersionResponse:
        return answer

    methods: Any = {
        "GetVersion": grpc.unary_unary_rpc_method_handler(
            get_version,
            request_deserializer=pb.GetVersionRequest.FromString,
            response_serializer=pb.GetVersionResponse.SerializeToString,
        )
    }
    return grpc.method_handlers_generic_handler("tpmodel.v1.WeightService", methods)


@contextlib.asynccontextmanager
async def gangs(*answers: pb.GetVersionResponse, token: str = TOKEN) -> AsyncIterator[list[str]]:
    """Their control ports."""
    async with contextlib.AsyncExitStack() as stack:
        targets: list[str] = []
        for answer in answers:
            server = grpc.aio.server(interceptors=[TokenInterceptor(Expected.gang_token(token))])
            server.add_generic_rpc_handlers((handler(answer),))
            targets.append(f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}")
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield targets


def serves(version: int | None, **changed: object) -> pb.GetVersionResponse:
    weights = pb.WeightSet()
    weights.CopyFrom(OURS)
    for name, value in changed.items():
        setattr(weights, name, value)
    served = pb.ServedVersion(reason="WeightsLost") if version is None else pb.ServedVersion(version=version)
    return pb.GetVersionResponse(served=served, set=weights)


def peers(*targets: str) -> WeightPeers:
    return WeightPeers(targets, token=read_token, address=HOST)


async def read_token() -> str:
    return TOKEN


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"ranks": 4}, "tensor-parallel size: 4 there, 2 here"),
        ({"dtype": "float16"}, "dtype: 'float16' there, 'bfloat16' here"),
        ({"model_id": "n"}, "model: 'n' there, 'm' here"),
        ({"config_digest": "d"}, "digest of config.json: 'd' there, 'c' here"),
        ({"expert_parallel": True}, "expert parallelism: True there, False here"),
        ({"revision": "r"}, "revision of the checkpoint: 'r' there, '' here"),
        ({"source": "s"}, "checkpoint that versions count from: 's' there, '' here"),
    ],
)
def test_the_first_difference_is_named_with_both_values(changed: dict[str, object], said: str) -> None:
    assert difference(serves(1, **changed).set, OURS) == said


def test_a_gangs_weights_are_what_its_cache_and_its_settings_say() -> None:
    settings = ServeSettings(
        model_path="/m", model_id="m", served_name="m", model_revision="r", weights_source="s", expert_parallel=True
    )
    layout = kv_pb2.KvLayout(model_id="m", config_digest="c", dtype="float32", ranks=4)
    assert weight_set(settings, layout) == pb.WeightSet(
        model_id="m", config_digest="c", dtype="float32", ranks=4, expert_parallel=True, revision="r", source="s"
    )


async def test_all_are_asked_and_the_newest_version_comes_first() -> None:
    async with gangs(serves(3), serves(5), serves(None), pb.GetVersionResponse(), serves(9, ranks=1)) as targets:
        found = await peers(*targets).ask(OURS)
        assert [(peer.target, peer.version) for peer in found[:2]] == [(targets[1], 5), (targets[0], 3)]
        assert {peer.target: peer.refusal for peer in found[2:]} == {
            targets[2]: "it serves nothing: WeightsLost",
            targets[3]: "it has no weights yet",
            targets[4]: "tensor-parallel size: 1 there, 2 here",
        }
        assert await peers(*targets).newest(OURS) == 5


async def test_a_gang_does_not_ask_itself() -> None:
    async with gangs(serves(3), serves(4)) as targets:
        asking = peers(*targets)
        asking.own_port = int(targets[1].rpartition(":")[2])
        assert await asking.ask(OURS) == [Peer(targets[0], version=3)]


async def test_those_that_do_not_answer_are_named_and_stand_for_no_version() -> None:
    async with gangs(serves(3), token="another") as targets:
        asking = peers(*targets, f"{HOST}:9", "no.such.name:9001")
        found = {peer.target: peer.refusal for peer in await asking.ask(OURS)}
        assert found[targets[0]].startswith("UNAUTHENTICATED: ")
        assert found[f"{HOST}:9"].startswith("UNAVAILABLE: ")
        assert found["no.such.name:9001"].startswith("its name has no address: ")
        assert await asking.newest(OURS) == 0


async def test_without_the_trainers_token_nobody_is_asked() -> None:
    async def no_token() -> str:
        raise NoTokenError("there is none")

    async with gangs(serves(3)) as targets:
        asking = WeightPeers(targets, token=no_token, address=HOST)
        assert await asking.ask(OURS) == [Peer(targets[0], refusal="there is none")]
