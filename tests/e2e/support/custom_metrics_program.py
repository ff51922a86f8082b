"""A custom-metrics API server: every pod that a query selects has the value that a file says. Standard library only.

python custom_metrics_program.py CERTIFICATE KEY VALUE_FILE
"""

from __future__ import annotations

import json
import re
import ssl
import sys
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GROUP, VERSION = "custom.metrics.k8s.io", "v1beta2"
BASE = f"/apis/{GROUP}/{VERSION}"
PORT = 8443
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PODS = re.compile(rf"^{BASE}/namespaces/([^/]+)/pods/\*/([^/]+)$")

Json = dict[str, Any]


def resources() -> Json:
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": f"{GROUP}/{VERSION}", "resources": []}


def pods(namespace: str, selector: str) -> list[Json]:
    query = urllib.parse.urlencode({"labelSelector": selector})
    request = urllib.request.Request(
        f"https://kubernetes.default.svc/api/v1/namespaces/{namespace}/pods?{query}",
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        return json.load(answer)["items"]


def values(namespace: str, metric: str, selector: str, value: str) -> Json:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    items = [
        {
            "describedObject": {
                "kind": "Pod",
                "apiVersion": "v1",
                "namespace": namespace,
                "name": pod["metadata"]["name"],
            },
            "metric": {"name": metric},
            "timestamp": now,
            "value": value,
        }
        for pod in pods(namespace, selector)
    ]
    return {"kind": "MetricValueList", "apiVersion": f"{GROUP}/{VERSION}", "metadata": {}, "items": items}


class Handler(BaseHTTPRequestHandler):
    value_file = Path()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        asked = PODS.match(urllib.parse.unquote(parts.path))
        if parts.path == BASE:
            self.answer(200, resources())
        elif asked:
            selector = urllib.parse.parse_qs(parts.query).get("labelSelector", [""])[0]
            self.answer(200, values(asked[1], asked[2], selector, self.value_file.read_text().strip()))
        else:
            self.answer(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: autoscalers ask often."""

    def answer(self, code: int, body: Json) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main(certificate: str, key: str, value_file: str) -> None:
    Handler.value_file = Path(value_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("", PORT), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
