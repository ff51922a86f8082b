"""What the docs and examples show is what the code takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from support import documents
from support.documents import EXAMPLES, PAGES, ROOT, Block, Json
from tpmodel.cli import main as tpmodel_command
from tpmodel.kubectl import commands as plugin
from tpmodel_operator import acceptance, defaults
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(default_image="worker:1", allowed_host_paths=("/srv/models",))


def model_of(item: Json) -> TPModel:
    metadata = item["metadata"]
    spec = TPModelSpec.model_validate(item["spec"])
    return TPModel(name=metadata["name"], namespace="default", uid="uid", generation=1, spec=spec)


def models(items: list[Json]) -> list[TPModel]:
    return [model_of(item) for item in items if item["kind"] == "TPModel"]


@pytest.mark.parametrize("path", documents.examples(), ids=lambda path: path.name)
def test_every_example_is_accepted_with_the_claims_of_its_folder(path: Path) -> None:
    claims: dict[str, tuple[str, ...]] = {
        item["metadata"]["name"]: tuple(item["spec"]["accessModes"])
        for file in documents.examples()
        for item in documents.objects_in(file)
        if item["kind"] == "PersistentVolumeClaim"
    }
    for model in models(documents.objects_in(path)):
        assert acceptance.review(model, volumes=claims, settings=SETTINGS) is None


def test_the_examples_are_what_they_are_called() -> None:
    shapes = {}
    for path in documents.examples():
        for model in models(documents.objects_in(path)):
            ranks = defaults.ranks_per_pod(model.spec)
            shapes[path.stem] = (model.spec.device, defaults.pods_per_gang(model.spec), ranks)
    assert shapes == {"cpu-demo": ("cpu", 1, 2), "gpu-1x4": ("cuda", 1, 4), "gpu-2x8": ("cuda", 2, 8)}


@pytest.mark.parametrize("block", documents.yaml_blocks(), ids=str)
def test_every_tpmodel_in_the_docs_is_accepted(block: Block) -> None:
    for model in models(documents.objects_of(block)):
        anything = dict.fromkeys(defaults.claims(model.spec), ("ReadWriteMany",))
        assert acceptance.review(model, volumes=anything, settings=SETTINGS) is None


def test_the_docs_show_every_way_to_give_a_checkpoint() -> None:
    shown = [model for block in documents.yaml_blocks() for model in models(documents.objects_of(block))]
    assert {model.spec.model.uri.partition(":")[0] for model in shown} == {"hf", "pvc", "file", "oci"}


def test_every_file_that_a_page_links_to_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text()):
            if target and "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def test_every_heading_that_a_page_links_to_exists() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
            there = (page.parent / target if target else page).read_text()
            anchors = {anchor(line) for line in re.findall(r"^#+ (.*)$", there, re.MULTILINE)}
            assert heading in anchors, (page.name, target, heading)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def typed(program: str) -> list[tuple[Block, list[str]]]:
    found = []
    for block, line in documents.command_lines():
        if line.startswith(f"{program} "):
            found.append((block, shlex.split(line)[len(program.split()) :]))
    return found


def check(command: click.Command, arguments: list[str], where: Block) -> None:
    """Everything is known and has a value that fits; nothing is run."""
    if isinstance(command, click.Group):
        if "--help" in arguments[:1]:
            return
        below = command.commands.get(arguments[0])
        assert below is not None, (str(where), arguments)
        check(below, arguments[1:], where)
        return
    command.make_context(command.name, arguments)


@pytest.mark.parametrize(("program", "command"), [("kubectl tpmodel", plugin), ("tpmodel", tpmodel_command)])
def test_every_command_of_this_project_in_the_docs_can_be_typed(program: str, command: click.Group) -> None:
    lines = [(block, arguments) for block, arguments in typed(program) if "PATH_OR_HUB_NAME" not in arguments]
    assert len(lines) >= 4
    for block, arguments in lines:
        if any(part.startswith(("[", "MODEL")) for part in arguments):
            continue  # a synopsis
        check(command, arguments, block)


def test_every_file_that_a_command_applies_exists() -> None:
    applied = [arguments for _, arguments in typed("kubectl apply")]
    files = [arguments[arguments.index("-f") + 1] for arguments in applied if "-f" in arguments]
    assert {ROOT / file for file in files if file.startswith("examples/kubernetes/")} == {
        *(EXAMPLES / f"{name}.yaml" for name in ("cpu-demo", "cpu-demo-claim", "gpu-1x4", "send-checkpoint"))
    }
    assert all((ROOT / file).exists() for file in files)


def test_every_value_that_a_command_sets_is_one_of_the_charts() -> None:
    values = yaml.safe_load((ROOT / "charts" / "tpmodel" / "values.yaml").read_text())
    text = "\n".join(page.read_text() for page in PAGES)
    paths = set(re.findall(r"--set '?([A-Za-z.]+)=", text))
    assert {"operator.image.repository", "watchNamespaces"} <= paths
    for path in paths:
        found: Any = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]
