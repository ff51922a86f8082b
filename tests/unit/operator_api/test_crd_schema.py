"""The rendered CRD: structural, bounded, described, and the same API as the Python classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tpmodel_operator import crd
from tpmodel_operator.api import TPModelSpec, TPModelStatus
from tpmodel_operator.engine_options import ENGINE_OPTIONS

Node = tuple[str, dict[str, Any]]
CRD = crd.render()
VERSION = CRD["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[Node]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


ALL_NODES = [node for node in nodes(SCHEMA) if node[0].startswith((".spec", ".status"))]


def at(path: str) -> dict[str, Any]:
    return dict(ALL_NODES)[path]


def test_no_reference_or_union_is_left() -> None:
    forbidden = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "propertyNames", "pattern"}
    assert [(path, forbidden & set(node)) for path, node in ALL_NODES if forbidden & set(node)] == []


def test_every_node_has_one_type() -> None:
    types = {"object", "array", "string", "integer", "boolean"}
    assert [path for path, node in ALL_NODES if node.get("type") not in types] == []


def test_every_field_is_described_for_kubectl_explain() -> None:
    assert [path for path, node in ALL_NODES if not path.endswith("[]") and len(node.get("description", "")) < 8] == []


def test_every_string_list_and_map_has_a_maximum() -> None:
    unbounded = [
        path
        for path, node in ALL_NODES
        if (node["type"] == "string" and "maxLength" not in node and "enum" not in node)
        or (node["type"] == "array" and "maxItems" not in node)
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert unbounded == []


def test_every_number_of_the_spec_has_bounds() -> None:
    numbers = [(path, node) for path, node in ALL_NODES if node["type"] == "integer" and path.startswith(".spec")]
    without_least = [path for path, node in numbers if "minimum" not in node and "runAsUser" not in path]
    kubernetes_own = ("runAsUser", "hostPort", "tolerationSeconds")
    without_most = [path for path, node in numbers if "maximum" not in node and not path.endswith(kubernetes_own)]
    assert [path for path in without_least if not path.endswith(kubernetes_own)] == []
    assert without_most == []


def with_server_defaults(schema: dict[str, Any], value: Any) -> Any:
    """What the API server makes of a value: defaults, from the top down."""
    if isinstance(value, dict) and "properties" in schema:
        filled = value | {
            name: child["default"]
            for name, child in schema["properties"].items()
            if name not in value and "default" in child
        }
        return {name: with_server_defaults(schema["properties"].get(name, {}), item) for name, item in filled.items()}
    return value


def test_defaults_of_the_api_server_are_those_of_the_code() -> None:
    written = {"model": {"uri": "hf://organisation/name"}}
    assert TPModelSpec.model_validate(with_server_defaults(SPEC, written)) == TPModelSpec.model_validate(written)


def test_a_default_that_says_nothing_is_left_out_of_stored_objects() -> None:
    stored = with_server_defaults(SPEC, {"model": {"uri": "hf://organisation/name"}})
    assert set(stored) == {
        "model",
        "tensorParallelSize",
        "replicas",
        "device",
        "image",
        "cache",
        "network",
        "scheduling",
        "recovery",
        "rollout",
        "disruptionBudget",
        "drainTimeout",
        "service",
    }


def test_the_api_server_sets_no_defaults_in_a_status() -> None:
    assert [path for path, node in ALL_NODES if path.startswith(".status") and "default" in node] == []


def test_python_takes_a_whole_written_spec() -> None:
    """Every field that the schema offers exists in Python under the same name."""

    def example(schema: dict[str, Any]) -> Any:
        match schema["type"]:
            case "object":
                if "additionalProperties" in schema:
                    return {"key": example(schema["additionalProperties"])}
                return {name: example(child) for name, child in schema.get("properties", {}).items()}
            case "array":
                return [example(schema["items"])]
            case "string":
                return schema.get("enum", ["text"])[0]
            case "integer":
                return schema.get("minimum", 1)
            case _:
                return False

    written = example(SPEC)
    assert TPModelSpec.model_validate(written).model_dump(by_alias=True) == written


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (".status.conditions", "type"),
        (".status.gangs", "name"),
        (".spec.env", "name"),
        (".spec.resourceClaims", "name"),
        (".spec.podTemplate.volumes", "name"),
        (".spec.podTemplate.volumeMounts", "mountPath"),
        (".spec.podTemplate.sidecars", "name"),
    ],
)
def test_lists_that_are_applied_item_by_item_have_keys(path: str, key: str) -> None:
    node = at(path)
    assert (node["x-kubernetes-list-type"], node["x-kubernetes-list-map-keys"]) == ("map", [key])
    assert key in node["items"]["required"]


def test_columns() -> None:
    columns = VERSION["additionalPrinterColumns"]
    shown = [column["name"].upper() for column in columns if not column.get("priority")]
    assert shown == ["MODEL", "TP", "READY", "STATUS", "RESTARTS", "URL", "AGE"]


def test_every_column_and_scale_path_exists() -> None:
    paths = [column["jsonPath"] for column in VERSION["additionalPrinterColumns"]]
    paths += VERSION["subresources"]["scale"].values()
    assert [path for path in paths if path != ".metadata.creationTimestamp" and path not in dict(ALL_NODES)] == []


def test_every_rule_has_a_message_that_says_what_to_write() -> None:
    rules = [rule for _, node in nodes(SCHEMA) for rule in node.get("x-kubernetes-validations", [])]
    remedies = ("write", "leave", "use ", "belong", "add ", "engine options are", "only ")
    assert len(rules) > 60
    assert [rule["message"] for rule in rules if not any(word in rule["message"] for word in remedies)] == []
    # The names of all options are a list, however many there are; what is said about them is bounded as all else is.
    messages = [rule["message"].replace(", ".join(ENGINE_OPTIONS), "") for rule in rules]
    assert [message for message in messages if "\n" in message or len(message) > 250] == []


def test_the_status_carries_what_the_columns_show() -> None:
    assert {"ready", "state", "restarts", "url"} <= set(TPModelStatus.model_fields)


def test_yaml_reads_back_as_rendered() -> None:
    assert yaml.safe_load(crd.to_yaml(CRD)) == CRD
