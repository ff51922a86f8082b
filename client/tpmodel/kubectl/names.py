"""What the operator calls things in the cluster, as far as this plugin asks for them."""

from __future__ import annotations

from tpmodel.kubectl.connection import Connection

MODELS = "tpmodels.tpmodel.dev"
"""With its group: another product may have TPModels too."""

MODEL_LABEL = "tpmodel.dev/model"
GANG_LABEL = "tpmodel.dev/gang"
POD_INDEX_LABEL = "apps.kubernetes.io/pod-index"
CONTAINER = "worker"
TLS_VOLUME = "tls"
"""Mounted where the client ports speak TLS."""

INFERENCE_PORT = 9000
HTTP_PORT = 8000


def command(text: str, connection: Connection) -> str:
    """A command of this plugin for messages, as the user has to type it to reach the same cluster."""
    return " ".join(["kubectl tpmodel", text, *connection.arguments])
