"""Kubernetes types inside a TPModel: passed on to the pods as they are, and described as far as rules look at them.

In Python they are plain dicts, as in YAML. Volumes and sidecars are a closed list: a TPModel must not give its author
more power over a node than the model needs. acceptance.py looks once more at what these rules refuse.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from tpmodel_operator.api_types import LONGEST_TEXT, checked, free_form, must

VOLUME_SOURCES = (
    "configMap",
    "secret",
    "emptyDir",
    "persistentVolumeClaim",
    "projected",
    "downwardAPI",
    "csi",
    "ephemeral",
    "image",
)
"""What Pod Security `restricted` allows; none reaches into the node's own files."""

RESERVED_PATHS = ("/model", "/cache", "/run/tpmodel", "/dev/shm", "/tmp", "/etc/tpmodel", "/persisted-updates")  # noqa: S108
"""Where the worker's own volumes are mounted."""

RESERVED_VOLUMES = (
    "model",
    "cache",
    "runtime",
    "shared-memory",
    "temporary",
    "attempt",
    "token",
    "trainer-token",
    "api-key",
    "tls",
    "persisted-updates",
)
"""Names of the worker's own volumes."""

RESERVED_CONTAINER = "worker"


def _text(description: str, longest: int = LONGEST_TEXT) -> dict[str, Any]:
    return {"type": "string", "maxLength": longest, "description": description}


def _choice(description: str, *values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values), "description": description}


def _list_of(items: dict[str, Any], description: str, most: int) -> dict[str, Any]:
    return {"type": "array", "maxItems": most, "items": items, "description": description}


def _object(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})


_TOLERATION = _object(
    key=_text("Taint key; left out with operator Exists: every taint.", 317),
    operator=_choice("Exists: any value is tolerated. Equal: only this value.", "Exists", "Equal"),
    value=_text("Taint value for operator Equal.", 63),
    effect=_choice("Left out: every effect.", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds={
        "type": "integer",
        "minimum": 0,
        "description": "For NoExecute: how long the pod stays. Left out: for ever.",
    },
) | checked(
    must(
        "!has(self.key) || !(self.key in ['node.kubernetes.io/not-ready', 'node.kubernetes.io/unreachable'])",
        "how long pods stay on a dead node is set by scheduling.deadNodeToleration: leave this toleration out",
    )
)

_PEER = _object(
    podSelector=free_form() | {"description": "Pods, in this namespace or those of namespaceSelector."},
    namespaceSelector=free_form() | {"description": "Namespaces; an empty one selects all."},
    ipBlock=_object(
        ("cidr",),
        cidr=_text("Range of addresses, such as 10.0.0.0/8.", 64),
        **{"except": _list_of(_text("A range.", 64), "Ranges inside cidr that are left out.", 16)},
    )
    | {"description": "Addresses outside of the cluster."},
) | checked(
    must(
        "has(self.ipBlock) != (has(self.podSelector) || has(self.namespaceSelector))",
        "write either ipBlock, or podSelector and/or namespaceSelector, in each entry",
    )
)

_VOLUME = _object(
    ("name",),
    name=_text("What volumeMounts call it.", 63),
    hostPath=free_form() | {"description": "Refused: pods must not reach into the node's files this way."},
    **{source: free_form() | {"description": f"A {source} volume, as in a pod."} for source in VOLUME_SOURCES},
) | checked(
    must(
        "!has(self.hostPath)",
        "hostPath volumes are not allowed here: use another kind of volume, or cache.type hostPath or a file:// "
        "model under the prefixes that the operator allows",
    ),
    must(
        "has(self.hostPath) || ["
        + ", ".join(f"has(self.{source})" for source in VOLUME_SOURCES)
        + "].filter(given, given).size() == 1",
        "write exactly one of " + ", ".join(VOLUME_SOURCES),
    ),
    must(
        "!(self.name in [" + ", ".join(f"'{name}'" for name in RESERVED_VOLUMES) + "])",
        "names " + ", ".join(RESERVED_VOLUMES) + " belong to the worker's own volumes: write another name",
    ),
)

_VOLUME_MOUNT = _object(
    ("name", "mountPath"),
    name=_text("A volume of podTemplate.volumes.", 63),
    mountPath=_text("Where the worker's container sees it."),
    readOnly={"type": "boolean", "description": "Whether writing is refused."},
    subPath=_text("Path within the volume; left out: its root."),
) | checked(
    must(
        r"self.mountPath.startsWith('/') && !self.mountPath.matches('(^|/)\\.\\.?(/|$)')",
        "write an absolute mountPath without '.' and '..' parts, such as /extra",
    ),
    must(
        "["
        + ", ".join(f"'{path}'" for path in RESERVED_PATHS)
        + "].all(taken, self.mountPath != taken && !self.mountPath.startsWith(taken + '/'))",
        "this mountPath belongs to the worker (" + ", ".join(RESERVED_PATHS) + "): write another one, such as /extra",
    ),
)

_SECURITY_CONTEXT = free_form(
    privileged={"type": "boolean", "description": "Must not be true."},
    allowPrivilegeEscalation={"type": "boolean", "description": "Must not be true."},
    runAsNonRoot={"type": "boolean", "description": "Must not be false."},
    runAsUser={"type": "integer", "description": "Must not be 0."},
    procMount=_text("Must be left out or Default.", 63),
    capabilities=free_form(add=_list_of(_text("A capability.", 63), "Must be empty.", 64))
    | {"description": "Capabilities may only be dropped."},
    seccompProfile=free_form(type=_text("Must not be Unconfined.", 63)) | {"description": "System call filter."},
)

_SIDECAR = (
    free_form(
        name=_text("Name of the container.", 63),
        image=_text("Image of the container."),
        securityContext=_SECURITY_CONTEXT | {"description": "No privilege can be asked for."},
        ports=_list_of(
            free_form(hostPort={"type": "integer", "description": "Must be left out."}), "Ports that it opens.", 32
        ),
    )
    | {"required": ["name", "image"]}
    | checked(
        must(
            f"self.name != '{RESERVED_CONTAINER}'",
            f"the name {RESERVED_CONTAINER} belongs to the model's container: write another one",
        ),
        must(
            "!has(self.securityContext) || !("
            "(has(self.securityContext.privileged) && self.securityContext.privileged) || "
            "(has(self.securityContext.allowPrivilegeEscalation) && self.securityContext.allowPrivilegeEscalation) || "
            "(has(self.securityContext.runAsNonRoot) && !self.securityContext.runAsNonRoot) || "
            "(has(self.securityContext.runAsUser) && self.securityContext.runAsUser == 0) || "
            "(has(self.securityContext.procMount) && self.securityContext.procMount != 'Default') || "
            "(has(self.securityContext.seccompProfile) && has(self.securityContext.seccompProfile.type) && "
            "self.securityContext.seccompProfile.type == 'Unconfined') || "
            "(has(self.securityContext.capabilities) && has(self.securityContext.capabilities.add) && "
            "self.securityContext.capabilities.add.size() > 0))",
            "a sidecar runs without privilege: leave privileged, allowPrivilegeEscalation, root, procMount, "
            "seccompProfile Unconfined and capabilities.add out of its securityContext",
        ),
        must(
            "!has(self.ports) || self.ports.all(port, !has(port.hostPort))",
            "a sidecar opens no port of its node: leave hostPort out",
        ),
    )
)

Toleration = Annotated[dict[str, Any], WithJsonSchema(_TOLERATION)]
NetworkPolicyPeer = Annotated[dict[str, Any], WithJsonSchema(_PEER)]
Volume = Annotated[dict[str, Any], WithJsonSchema(_VOLUME)]
VolumeMount = Annotated[dict[str, Any], WithJsonSchema(_VOLUME_MOUNT)]
Sidecar = Annotated[dict[str, Any], WithJsonSchema(_SIDECAR)]
