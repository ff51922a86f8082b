"""What the commands refuse, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tpmodel.cli import main
from tpmodel.cli.serve import ByteSize


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_generate_needs_a_prompt_or_ids() -> None:
    code, output = run("generate")
    assert code == 2
    assert "give either PROMPT or --token-ids" in output


def test_generate_refuses_both_a_prompt_and_ids() -> None:
    assert run("generate", "hello", "--token-ids", "1,2")[0] == 2


@pytest.mark.parametrize("ids", ["1,x", "1,,2", "-1"])
def test_generate_refuses_what_are_no_ids(ids: str) -> None:
    code, output = run("generate", f"--token-ids={ids}")
    assert code == 2
    assert "--token-ids" in output


def test_generate_without_a_server_names_the_target() -> None:
    code, output = run("generate", "--target", "127.0.0.1:1", "--wait", "0.1", "hello")
    assert code == 1
    assert "127.0.0.1:1" in output


def test_serve_refuses_less_than_one_rank(tmp_path: Path) -> None:
    """P2, on the command line."""
    code, output = run("serve", str(tmp_path), "--tp", "0")
    assert code == 2
    assert "--tp" in output


def test_serve_refuses_a_folder_without_config(tmp_path: Path) -> None:
    code, output = run("serve", str(tmp_path))
    assert code == 2
    assert "config.json" in output


def test_serve_refuses_what_is_neither_folder_nor_hub_name() -> None:
    code, output = run("serve", "no-such-folder")
    assert code == 2
    assert "neither a folder nor a hub name" in output


@pytest.mark.parametrize(("text", "expected"), [("500", 500), ("2k", 2000), ("1.5Gi", 3 << 29), ("4 MiB", 4 << 20)])
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert ByteSize().convert(text, None, None) == expected
