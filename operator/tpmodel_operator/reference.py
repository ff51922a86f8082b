"""Renders docs/reference.md, every field of a TPModel, from the CRD.

`python -m tpmodel_operator.reference` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpmodel_operator import api, crd
from tpmodel_operator.api_types import LIST_KEYS, RULES

Schema = dict[str, Any]

_HEAD = f"""# Every field of a TPModel

`apiVersion: {api.GROUP}/{api.VERSION}`, `kind: {api.KIND}`, short name `tpm`. `kubectl explain tpm.spec` says the same.
Generated from the API's code (`make manifests`); do not edit. All times are in seconds.

*Refused* lists what the API server refuses when a TPModel is applied, in the words of its error message. What it
cannot see is reported by condition Accepted=False, with reason and remedy: a hostPath outside of the operator's
allowed prefixes, a PersistentVolumeClaim that is missing or cannot be shared by that many pods.
"""


def render() -> str:
    """The page, Markdown."""
    schema = crd.object_schema()
    parts = [_HEAD]
    parts += ["## Object", *_refused(schema)]
    for name in ("spec", "status"):
        parts += [section for path, node in _objects(schema["properties"][name], name) for section in _part(path, node)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _objects(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Objects with fields of their own, parents first."""
    if "properties" in schema:
        yield path, schema
        for name, child in schema["properties"].items():
            yield from _objects(child, f"{path}.{name}")
    elif "properties" in schema.get("items", {}):
        yield from _objects(schema["items"], f"{path}[]")


def _part(path: str, schema: Schema) -> Iterator[str]:
    yield f"{'##' if '.' not in path else '###'} {path}"
    description = schema.get("description", "")
    if description:
        yield description
    required = schema.get("required", [])
    rows = [_row(name, child, required=name in required) for name, child in schema["properties"].items()]
    yield "\n".join(["| field | type | default | what |", "| --- | --- | --- | --- |", *rows])
    yield from _refused(schema)


def _row(name: str, schema: Schema, *, required: bool) -> str:
    default = "required" if required else _code(schema["default"]) if _is_scalar_default(schema) else ""
    return f"| `{name}` | {_type(schema)} | {default} | {_escaped(schema.get('description', ''))} |"


def _is_scalar_default(schema: Schema) -> bool:
    return "default" in schema and not isinstance(schema["default"], dict)


def _type(schema: Schema) -> str:
    """The type with its bounds."""
    match schema["type"]:
        case "string" if "enum" in schema:
            return ", ".join(_code(value) for value in schema["enum"])
        case "string":
            return f"string, up to {schema['maxLength']}"
        case "integer":
            bounds = [f"{schema[key]:,}" for key in ("minimum", "maximum") if key in schema]
            return "integer" + (f", {' to '.join(bounds)}" if len(bounds) == 2 else "")
        case "array":
            kind = schema["items"]["type"] + "s"
            keys = f", one per `{schema[LIST_KEYS][0]}`" if LIST_KEYS in schema else ""
            return f"list of {kind}, up to {schema['maxItems']:,}{keys}"
        case "object" if "additionalProperties" in schema:
            return f"map of strings, up to {schema['maxProperties']}"
        case kind:
            return kind


def _refused(schema: Schema) -> Iterator[str]:
    """The rules of the part, and of its fields where they are no parts themselves."""
    entries = [("", rule["message"]) for rule in schema.get(RULES, [])]
    for name, child in schema["properties"].items():
        for owner in (child, child.get("items", {})):
            if "properties" not in owner:
                entries += [(name, rule["message"]) for rule in owner.get(RULES, [])]
    if entries:
        lines = (f"- {f'`{name}`: ' if name else ''}{_escaped(message)}" for name, message in entries)
        yield "Refused:"
        yield "\n".join(dict.fromkeys(lines))


def _code(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(render(), end="")
