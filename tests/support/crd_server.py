"""A real kube-apiserver that serves TPModels, for tests of what the API server itself does with them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from kubernetes import config

from tests.cluster import apiserver
from tpmodel_operator import crd
from tpmodel_operator.api import GROUP, KIND, PLURAL, VERSION

NAMESPACE = "default"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
MODELS = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}"
Json = dict[str, Any]


def tpmodel(name: str = "model", **spec: Any) -> Json:
    """A small valid object, with fields of the spec replaced."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"model": {"uri": "hf://organisation/name"}} | spec,
    }


class RefusedError(Exception):
    """The API server's answer to what it does not do."""

    def __init__(self, code: int, answer: Json) -> None:
        super().__init__(f"{code} {answer.get('message', '')}")
        self.code = code
        causes = answer.get("details", {}).get("causes", [])
        self.causes = [(cause.get("field", ""), cause["message"]) for cause in causes]
        """Field and message of each cause."""


class KubeApi:
    """Plain requests to an API server."""

    def __init__(self, api: apiserver.ApiServer, kubeconfig: str | None = None) -> None:
        self.api = api
        self._client = config.new_client_from_config(kubeconfig or str(api.kubeconfig))

    def call(self, method: str, path: str, body: Any = None, **query: str) -> Json:
        """JSON in, JSON out; keyword arguments are the query, `accept` and `content_type` the headers."""
        headers = {
            "Accept": query.pop("accept", "application/json"),
            "Content-Type": query.pop("content_type", "application/json"),
        }
        url = f"{self._client.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        response = self._client.rest_client.request(method, url, headers=headers, body=body)
        text = response.read()
        if response.status >= 400:
            # A path that nobody serves is answered in plain text.
            is_json = text.startswith(b"{")
            raise RefusedError(response.status, json.loads(text) if is_json else {"message": text.decode()})
        return json.loads(text)

    def install_crd(self, document: Json | None = None) -> None:
        """Creates the CRD and returns when it is served; RefusedError where the API server does not take it."""
        self.call("POST", CRDS, document or crd.render())
        deadline = time.monotonic() + 30
        while True:
            try:
                self.create(tpmodel(), dry_run=True)
            except RefusedError as error:
                if error.code != 404 or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        """A TPModel as kubectl creates it: unknown fields are refused."""
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self.call("POST", MODELS, body, **query)

    def apply(self, body: Json, *, subresource: str = "", manager: str = "test") -> Json:
        """Server-side apply."""
        path = f"{MODELS}/{body['metadata']['name']}" + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": manager, "fieldValidation": "Strict"}
        return self.call("PATCH", path, body, content_type="application/apply-patch+yaml", **query)


@contextlib.contextmanager
def serving() -> Iterator[KubeApi]:
    """An API server of the caller's own, with the CRD installed."""
    with apiserver.running() as api:
        server = KubeApi(api)
        server.install_crd()
        yield server
