"""Renders the CustomResourceDefinition of TPModel from api.py and rules.py.

`python -m tpmodel_operator.crd` prints it as YAML. pydantic's JSON Schema is not what the API server takes: it wants
a structural schema, without references, without unions with null, and with defaults that need no other default.
"""

from __future__ import annotations

from typing import Any

import yaml

from tpmodel_operator import api
from tpmodel_operator.api_types import RULES
from tpmodel_operator.rules import OBJECT_RULES, PART_RULES

Schema = dict[str, Any]

_ORDER = (
    "type",
    "description",
    "default",
    "format",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
)
"""Keywords that mean the same to pydantic and to the API server. Titles say nothing, unknown fields are pruned."""


def render() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{api.PLURAL}.{api.GROUP}"},
        "spec": {
            "group": api.GROUP,
            "names": {
                "kind": api.KIND,
                "listKind": f"{api.KIND}List",
                "plural": api.PLURAL,
                "singular": api.KIND.lower(),
                "shortNames": ["tpm"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": api.VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": _columns(),
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "schema": {"openAPIV3Schema": object_schema()},
                }
            ],
        },
    }


def object_schema() -> Schema:
    """The structural schema of the whole object."""
    return {
        "type": "object",
        "description": "One large language model, served by gangs of pods with tensor parallelism.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(api.TPModelSpec, defaults=True),
            "status": structural(api.TPModelStatus, defaults=False),
        },
        RULES: list(OBJECT_RULES),
    }


def structural(part: type[api.Model], *, defaults: bool) -> Schema:
    """The structural schema of one part, with the rules of all parts below.

    The API server fills in the spec's defaults; a status is written whole by the operator.
    """
    document = part.model_json_schema(by_alias=True, mode="validation")
    definitions: dict[str, Schema] = document.pop("$defs", {})
    rules = {model.__name__: list(entries) for model, entries in PART_RULES.items()}
    root = definitions | {part.__name__: document}
    return _Flattening(root, rules, defaults=defaults).flatten({"$ref": f"#/$defs/{part.__name__}"})


class _Flattening:
    """Turns pydantic's nodes into structural ones."""

    def __init__(self, definitions: dict[str, Schema], rules: dict[str, list[Schema]], *, defaults: bool) -> None:
        self._definitions = definitions
        self._rules = rules
        self._defaults = defaults

    def flatten(self, node: Schema) -> Schema:
        """One node without reference and union; what a field says of itself wins over what its type says."""
        schema = self._type_of(node) | _keywords(node)
        if schema.get("type") == "integer":
            schema["format"] = "int32" if schema.get("maximum", 2**31) < 2**31 else "int64"
        default = self._default_of(node, schema)
        return _ordered(schema if default is None else schema | {"default": default})

    def _type_of(self, node: Schema) -> Schema:
        if "anyOf" in node:
            alternatives = [option for option in node["anyOf"] if option.get("type") != "null"]
            if len(alternatives) != 1:
                raise ValueError(f"the API server takes one type for a field, not {node['anyOf']}")
            return self.flatten(alternatives[0])
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            rules = self._rules.get(name)
            return self.flatten(self._definitions[name]) | ({RULES: rules} if rules else {})
        return self._children_of(node)

    def _children_of(self, node: Schema) -> Schema:
        if "items" in node:
            return {"items": self.flatten(node["items"])}
        if "properties" in node:
            return {"properties": {name: self.flatten(child) for name, child in node["properties"].items()}}
        if isinstance(node.get("additionalProperties"), dict):
            return {"additionalProperties": self.flatten(node["additionalProperties"])}
        return {}

    def _default_of(self, node: Schema, schema: Schema) -> Any:
        """The default where it says something. An object's holds those of its fields: rules see it as it stands."""
        default = node.get("default")
        if not self._defaults or default in (None, "", [], {}):
            return None
        if "properties" not in schema:
            return default
        below = {name: child["default"] for name, child in schema["properties"].items() if "default" in child}
        return below or None


def _keywords(node: Schema) -> Schema:
    kept = {key: value for key, value in node.items() if key in _ORDER or key.startswith("x-kubernetes-")}
    kept.pop("default", None)
    if "const" in node:
        kept["enum"] = [node["const"]]
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].split())
    return kept


def _ordered(schema: Schema) -> Schema:
    """In the order in which people read it, children last."""
    last = ("properties", "additionalProperties", "items")
    head = {key: schema[key] for key in _ORDER if key in schema}
    return (
        head
        | {key: value for key, value in schema.items() if key not in last}
        | {key: schema[key] for key in last if key in schema}
    )


def _columns() -> list[dict[str, Any]]:
    def column(name: str, path: str, kind: str, description: str, *, wide: bool = False) -> dict[str, Any]:
        entry = {"name": name, "type": kind, "jsonPath": path, "description": description}
        return entry | ({"priority": 1} if wide else {})

    return [
        column("Model", ".spec.model.uri", "string", "The checkpoint."),
        column("TP", ".spec.tensorParallelSize", "integer", "Ranks of each gang."),
        column("Ready", ".status.ready", "string", "Gangs that take requests, out of those wanted."),
        column("Status", ".status.state", "string", "One word."),
        column("Restarts", ".status.restarts", "integer", "Coordinated restarts of its gangs."),
        column("URL", ".status.url", "string", "What gRPC clients in the cluster dial."),
        column("Age", ".metadata.creationTimestamp", "date", "When it was created."),
        column("Image", ".status.image", "string", "The worker image in use.", wide=True),
        column("Weights", ".status.weightsVersion", "integer", "Version, where all gangs serve the same.", wide=True),
        column("Revision", ".status.revision", "string", "Hash of the newest spec and image.", wide=True),
    ]


class _Dumper(yaml.SafeDumper):
    """Repeats what occurs twice instead of pointing at it, and indents lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def to_yaml(document: dict[str, Any]) -> str:
    """YAML in a stable form."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=116, allow_unicode=False)


if __name__ == "__main__":
    print(to_yaml(render()), end="")
