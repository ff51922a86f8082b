"""Kubeconfig files that hold all they need, so that they can be copied anywhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from .certificates import Certificate


def write(path: Path, *, server: str, authority: Certificate, user: Certificate) -> Path:
    """Writes a kubeconfig (JSON is YAML) for one user of one cluster, readable by its owner only."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "tpmodel-test",
                "cluster": {"server": server, "certificate-authority-data": _encoded(authority.certificate)},
            }
        ],
        "users": [
            {
                "name": "tpmodel-test",
                "user": {
                    "client-certificate-data": _encoded(user.certificate),
                    "client-key-data": _encoded(user.key),
                },
            }
        ],
        "contexts": [{"name": "tpmodel-test", "context": {"cluster": "tpmodel-test", "user": "tpmodel-test"}}],
        "current-context": "tpmodel-test",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))
    return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
