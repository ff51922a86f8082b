"""The updater's command line, the numbering of ranks, and the file for trainers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.updater.bridge_config import write_bridge_config
from tpmodel_worker.updater.layout import LayoutError, many_nodes, one_node, serving_nodes


def run(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """The real command; its exit code and what it says on standard error."""
    token = tmp_path / "token"
    token.write_text("secret\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_", "NUM_INF"))}
    command = [sys.executable, "-m", "tpmodel_worker.updater", "--trainer-token-file", str(token), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=60, check=False)
    return done.returncode, done.stderr


class TestRefusals:
    """U28: a message that says what to give, no traceback."""

    @pytest.mark.parametrize(
        ("arguments", "environment", "message"),
        [
            ([], {}, "the trainer's address is missing: give --master-address or MASTER_ADDR"),
            (["--master-address", "x", "--gang-index", "2"], {}, "gang index 2: 1 gangs are 0 to 0"),
            ([], {"MASTER_ADDR": "x", "NUM_INFERENCE_NODES": "2"}, "give --nodes or SLURM_JOB_NODELIST"),
            (
                [],
                {"MASTER_ADDR": "x", "NUM_INFERENCE_NODES": "2", "SLURM_JOB_NODELIST": "gpu[1-3]"},
                "is none of gpu2, gpu3: name its node with --node",
            ),
            (
                ["--node", "gpu1"],
                {"NUM_INFERENCE_NODES": "2", "SLURM_JOB_NODELIST": "gpu[1-3]"},
                "node gpu1 is none of gpu2, gpu3",
            ),
            (["--master-address", "x", "--trainer-token-file", "/none"], {}, "--trainer-token-file /none"),
            (["--master-address", "x"], {"MASTER_PORT": "0"}, "MASTER_PORT"),
        ],
    )
    def test_what_is_missing_or_cannot_be_is_named(
        self, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
    ) -> None:
        code, text = run(tmp_path, *arguments, **environment)
        assert code == 64
        assert message in text
        assert "Traceback" not in text

    def test_a_gang_that_is_not_there_is_an_error_after_some_tries(self, tmp_path: Path) -> None:
        arguments = ["--gang", "127.0.0.1:1", "--master-address", "127.0.0.1", "--max-errors", "1"]
        code, text = run(tmp_path, *arguments)
        assert code == 1
        assert "tpmodel-weight-updater: gang 127.0.0.1:1: UNAVAILABLE" in text
        assert "Traceback" not in text

    def test_another_port_than_the_control_port_is_called_so_at_once(self, tmp_path: Path) -> None:
        server = grpc.server(ThreadPoolExecutor(1))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            code, text = run(tmp_path, "--gang", f"127.0.0.1:{port}", "--master-address", "127.0.0.1")
        finally:
            server.stop(None).wait()
        assert code == 1
        assert f"gang 127.0.0.1:{port}: UNIMPLEMENTED: that is no control port" in text
        assert "Traceback" not in text


class TestRanks:
    """U29: unique for any tensor-parallel size and any number of nodes, the trainer counted."""

    @pytest.mark.parametrize("world_size", range(1, 10))
    @pytest.mark.parametrize("gangs", [1, 2, 5])
    @pytest.mark.parametrize("trainers", [1, 4])
    def test_gangs_of_one_node(self, world_size: int, gangs: int, trainers: int) -> None:
        layouts = [
            one_node(trainer_ranks=trainers, world_size=world_size, gang_index=index, gangs=gangs)
            for index in range(gangs)
        ]
        ranks = [layout.first + rank for layout in layouts for rank in range(world_size)]
        assert [*range(trainers), *ranks] == list(range(layouts[0].group_size))
        assert len({layout.group_size for layout in layouts}) == 1

    @pytest.mark.parametrize("count", [1, 2, 3, 8])
    @pytest.mark.parametrize(("world_size", "per_node"), [(1, 1), (1, 8), (2, 8), (4, 8), (8, 8), (2, 4), (3, 6)])
    @pytest.mark.parametrize("trainers", [1, 8])
    def test_gangs_within_nodes(self, count: int, world_size: int, per_node: int, trainers: int) -> None:
        nodes = [f"n{number}" for number in range(count)]
        ranks: list[int] = []
        for node, first in itertools.product(nodes, range(0, per_node, world_size)):
            layout = many_nodes(
                trainer_ranks=trainers,
                world_size=world_size,
                nodes=nodes,
                node=node,
                ranks_per_node=per_node,
                first_on_node=first,
            )
            assert layout.group_size == trainers + count * per_node
            ranks += range(layout.first, layout.first + world_size)
        assert [*range(trainers), *ranks] == list(range(trainers + count * per_node))

    def test_a_gang_over_several_nodes(self) -> None:
        nodes = ["a", "b", "c", "d"]
        layouts = [many_nodes(trainer_ranks=1, world_size=16, nodes=nodes, node=node) for node in ("a", "c")]
        assert [(layout.first, layout.group_size) for layout in layouts] == [(1, 33), (17, 33)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"node": "x"}, "node x is none of a, b"),
            ({"world_size": 6, "first_on_node": 4}, "a gang is on one node"),
            ({"world_size": 12}, "a gang is on one node"),
            ({"world_size": 16, "node": "b"}, "2 nodes have 16 ranks in all"),
            ({"first_on_node": 8}, "8 ranks are 0 to 7"),
            ({"nodes": ["a", "a"]}, "one is named twice"),
            ({"trainer_ranks": 0}, "rank 0 is the trainer"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, arguments: dict[str, object], message: str) -> None:
        fits: dict[str, object] = {"trainer_ranks": 1, "world_size": 4, "nodes": ["a", "b"], "node": "a"}
        with pytest.raises(LayoutError, match=message):
            many_nodes(**(fits | arguments))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("nodelist", "expected"),
        [
            ("a,b,c", ["b", "c"]),
            ("gpu[1-3]", ["gpu2", "gpu3"]),
            ("gpu[08-10,12],x1", ["gpu12", "x1"]),
            ("r[1-2]n[1-2]", ["r2n1", "r2n2"]),
        ],
    )
    def test_slurm_node_lists(self, nodelist: str, expected: list[str]) -> None:
        assert serving_nodes(nodelist, 2) == expected

    @pytest.mark.parametrize("nodelist", ["a,b", "gpu[x-3],b,c", ""])
    def test_lists_that_cannot_be_read_or_are_too_short(self, nodelist: str) -> None:
        with pytest.raises(LayoutError):
            serving_nodes(nodelist, 2)


def test_the_file_for_trainers_has_names_in_order_with_shapes_and_dtypes(tmp_path: Path) -> None:
    """U30: as trainers of the indexed way read it."""
    described = pb.GetParameterInfoResponse(device="cuda", world_size=2)
    for name, tied in (("b", False), ("lm_head", True), ("a", False)):
        described.parameters.add(name=name, shape=[4, 2], dtype="bfloat16", tied=tied)
    document = json.loads(write_bridge_config(tmp_path / "new", described).read_text())
    assert document["param_names"] == ["a", "b"] == sorted(document["param_mappings"])
    assert document["tp_degree"] == 2
    expected = {"vllm_name": "a", "shape": [4, 2], "local_shape": [4, 2], "dtype": "torch.bfloat16", "device": "cuda"}
    assert document["param_mappings"]["a"] == expected
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vllm_bridge_config.json"]
