"""A program named kubectl that answers as it is told, for tests of what runs kubectl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """\
#!{python} -ISB
import json, sys, time
arguments = sys.argv[1:]
with open({calls!r}, "a") as calls:
    print(json.dumps(arguments), file=calls)
with open({answers!r}) as file:
    answers = json.load(file)

def matches(words):
    left = iter(arguments)
    return all(word in left for word in words)

for answer in answers:
    if matches(answer["words"]):
        print(answer["output"], end="", flush=True)
        print(answer["errors"], end="", file=sys.stderr, flush=True)
        if answer["stays"]:
            time.sleep(60)
        sys.exit(answer["code"])
print(f"the test has no answer to {{arguments}}", file=sys.stderr)
sys.exit(99)
"""


class StandInKubectl:
    """The answers it gives, and the calls it got. Answers given last come first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """folder: becomes all of PATH."""
        self._answers: list[dict[str, Any]] = []
        self._answers_file = folder / "answers.json"
        self._calls_file = folder / "calls.jsonl"
        self._write()
        program = folder / "kubectl"
        text = _PROGRAM.format(python=sys.executable, calls=str(self._calls_file), answers=str(self._answers_file))
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    def answer(self, *words: str, output: Any = "", errors: str = "", code: int = 0, stays: bool = False) -> None:
        """To calls whose arguments hold these words in this order; what is no text goes out as JSON."""
        text = output if isinstance(output, str) else json.dumps(output)
        entry = {"words": words, "output": text, "errors": errors, "code": code, "stays": stays}
        self._answers.insert(0, entry)
        self._write()

    def has(self, model: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """The cluster holds this TPModel and its pods, and no other."""
        self.answer("get", "tpmodels.tpmodel.dev", output={"items": [model]})
        self.answer("get", "tpmodels.tpmodel.dev", model["metadata"]["name"], output=model)
        self.answer("get", "pods", output={"items": pods})
        self.answer("get", "events", output={"items": []})

    @property
    def calls(self) -> list[list[str]]:
        """Arguments of all calls so far."""
        if not self._calls_file.exists():
            return []
        return [json.loads(line) for line in self._calls_file.read_text().splitlines()]

    def _write(self) -> None:
        self._answers_file.write_text(json.dumps(self._answers))
