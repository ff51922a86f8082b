"""What the docs and examples tell users to apply and to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "kubernetes"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "charts" / "tpmodel" / "README.md")

Json = dict[str, Any]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code in a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """All of them."""
    for page in PAGES:
        text = page.read_text()
        for found in _BLOCK.finditer(text):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def objects_of(block: Block) -> list[Json]:
    """The objects of a block of YAML; a TPModel's spec alone becomes one."""
    documents = [document for document in yaml.safe_load_all(block.text) if document]
    return [tpmodel(document["spec"]) if set(document) == {"spec"} else document for document in documents]


def tpmodel(spec: Json) -> Json:
    """A TPModel around a spec."""
    return {"apiVersion": "tpmodel.dev/v1alpha1", "kind": "TPModel", "metadata": {"name": "shown"}, "spec": spec}


def yaml_blocks() -> list[Block]:
    """Blocks that hold objects for kubectl."""
    return [
        block for block in blocks() if block.language == "yaml" and all("kind" in each for each in objects_of(block))
    ]


def examples() -> list[Path]:
    """Files of examples/kubernetes."""
    return sorted(EXAMPLES.glob("*.yaml"))


def objects_in(path: Path) -> list[Json]:
    """The objects of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def command_lines() -> Iterator[tuple[Block, str]]:
    """Commands that blocks without a language show; continued lines are joined, prompts left out."""
    for block in blocks():
        if block.language in ("", "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").partition("  #")[0].strip()
                if command:
                    yield block, command
