"""Lines of the pod's processes."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from tpmodel_worker.supervisor.output import OutputReader, label


class Printed:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, process: str, line: str) -> None:
        self.lines.append((process, line))


async def read(*pieces: bytes) -> tuple[Printed, OutputReader]:
    printed = Printed()
    reading, writing = os.pipe()
    reader = await OutputReader.read(reading, "rank 1", printed)
    for piece in pieces:
        await asyncio.to_thread(os.write, writing, piece)  # blocks while the pipe is full
    os.close(writing)
    await reader.ended
    return printed, reader


async def test_lines_are_put_together_from_pieces() -> None:
    printed, _ = await read(b"one\ntw", b"o\r\nthr", b"ee")
    assert printed.lines == [("rank 1", "one"), ("rank 1", "two"), ("rank 1", "three")]


async def test_the_last_lines_are_kept() -> None:
    _, reader = await read(b"".join(b"%d\n" % number for number in range(100)))
    assert list(reader.last_lines) == [str(number) for number in range(80, 100)]


async def test_a_line_without_end_is_cut() -> None:
    printed, _ = await read(*[b"x" * 50_000] * 3)
    assert [len(line) for _, line in printed.lines] == [65536, 65536, 150_000 - 2 * 65536]


async def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    printed, _ = await read(b"\xff\n")
    assert printed.lines == [("rank 1", "\ufffd")]


@pytest.mark.parametrize(
    ("line", "log_format", "expected"),
    [
        ("hello", "text", "[rank 1] hello"),
        ("[rank 1] info: loaded", "text", "[rank 1] info: loaded"),
        ('{"process": "rank 1"}', "json", '{"process": "rank 1"}'),
        ("Segmentation fault", "json", json.dumps({"process": "rank 1", "message": "Segmentation fault"})),
    ],
)
def test_lines_are_labelled_with_the_process(line: str, log_format: str, expected: str) -> None:
    """P3: output labelled with the rank."""
    assert label("rank 1", line, "text" if log_format == "text" else "json") == expected
