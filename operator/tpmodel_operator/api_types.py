"""Building blocks of the TPModel API: the base of all parts, and strings, numbers and maps with their bounds.

Every string, list and map has a maximum: the API server estimates what a CEL rule costs from these and refuses a
CRD that could cost too much.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

RULES = "x-kubernetes-validations"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
LIST_TYPE = "x-kubernetes-list-type"
LIST_KEYS = "x-kubernetes-list-map-keys"


def must(rule: str, message: str, *, field: str = "") -> dict[str, Any]:
    """One CEL rule, as the CRD holds it; the message says what to write.

    Args:
        rule: true where the value is accepted.
        message: shown where it is not.
        field: where the error is reported, relative to the value, such as `.ranksPerPod`.
    """
    entry = {"rule": rule, "message": message}
    return entry | ({"fieldPath": field} if field else {})


def checked(*rules: dict[str, Any]) -> dict[str, Any]:
    """Extra schema of a field or type: the CEL rules of its own value."""
    return {RULES: list(rules)}


CLAIM_RULE = must(
    "!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
    "write pvc://claim/path, where claim is a PersistentVolumeClaim in this namespace",
)
FOLDER_RULE = must(
    "!self.startsWith('file://') || self.matches('^file:///[^/].*$')",
    "write file:///path with three slashes: an absolute folder of the node, not its root",
)
PATH_RULE = must(r"!self.matches('/\\.\\.?(/|$)')", "leave '.' and '..' parts out of the path")
"""What a place of files has to be, where its scheme is pvc:// or file://."""


def keyed_by(key: str) -> dict[str, Any]:
    """Extra schema of a list whose items are told apart by one field: no duplicates, merged item by item."""
    return {LIST_TYPE: "map", LIST_KEYS: [key]}


def free_form(**properties: dict[str, Any]) -> dict[str, Any]:
    """Schema of an object that is passed on as it is; the named properties are those that rules look at."""
    schema: dict[str, Any] = {"type": "object", PRESERVE: True}
    return schema | ({"properties": properties} if properties else {})


class Model(BaseModel):
    """Base of all parts: camelCase outside, nothing unknown accepted, never changed."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(alias=to_camel),
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


class StatusModel(Model):
    """Base of the parts of status: a newer operator may have written more, which does not disturb this one."""

    model_config = ConfigDict(extra="ignore")


LONGEST_TEXT = 1024
LONGEST_MESSAGE = 32_768

_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_NAME_HELP = "write a Kubernetes name: lower-case letters, digits, '-' and '.', such as my-claim"
_RESOURCE = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"

Text = Annotated[str, Field(max_length=LONGEST_TEXT)]

Name = Annotated[
    str, Field(min_length=1, max_length=253, json_schema_extra=checked(must(f"self.matches('{_NAME}')", _NAME_HELP)))
]
"""Of an object in the same namespace or of the cluster."""

OptionalName = Annotated[
    str,
    Field(max_length=253, json_schema_extra=checked(must(f"self.size() == 0 || self.matches('{_NAME}')", _NAME_HELP))),
]

OptionalResourceName = Annotated[
    str,
    Field(
        max_length=253,
        json_schema_extra=checked(
            must(
                f"self.size() == 0 || self.matches('{_RESOURCE}')",
                "write an extended resource as nodes offer it, such as nvidia.com/gpu or rdma/hca",
            )
        ),
    ),
]

Quantity = Annotated[
    str,
    Field(
        max_length=32,
        json_schema_extra=checked(
            must(
                "self.size() == 0 || (isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))",
                "write a quantity above 0, such as 500m or 4 for cpu, 16Gi for memory",
            )
        ),
    ),
]
"""Empty: not set."""

HostPath = Annotated[
    str,
    Field(
        max_length=LONGEST_TEXT,
        json_schema_extra=checked(
            must(
                r"self.size() == 0 || (self.startsWith('/') && !self.matches('(^|/)\\.\\.?(/|$)'))",
                "write an absolute path without '.' and '..' parts, such as /var/lib/models",
            )
        ),
    ),
]

Duration = Annotated[int, Field(ge=0, le=604_800)]
"""Seconds; at most a week."""

Deadline = Annotated[int, Field(ge=10, le=604_800)]
"""Seconds; a deadline of a few seconds is a mistake."""

Labels = Annotated[dict[str, Text], Field(max_length=64)]

FreeForm = Annotated[dict[str, Any], WithJsonSchema(free_form())]
"""A Kubernetes type that is passed on as it is; the API server checks it where it is used."""


def _clipped(longest: int) -> BeforeValidator:
    def clip(value: Any) -> Any:
        return value[: longest - 3] + "..." if isinstance(value, str) and len(value) > longest else value

    return BeforeValidator(clip)


StatusText = Annotated[str, _clipped(LONGEST_TEXT), Field(max_length=LONGEST_TEXT)]
"""Cut where it is too long: a long cause must not keep the status from being written."""

Message = Annotated[str, _clipped(LONGEST_MESSAGE), Field(max_length=LONGEST_MESSAGE)]
"""Cut where it is too long."""


class SecretKey(Model):
    """One key of a Secret in the TPModel's namespace."""

    name: Name
    """Name of the Secret."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Key whose value is taken."""
