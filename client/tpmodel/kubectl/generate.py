"""`kubectl tpmodel generate`: one prompt to a model in the cluster, its answer streamed to the terminal."""

from __future__ import annotations

import click

from tpmodel.cli.common import api_key_option
from tpmodel.cli.generate import Question, question_options
from tpmodel.errors import AuthenticationError, TpmodelError
from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.forward import forwarding
from tpmodel.kubectl.kubectl import Kubectl, with_kubectl
from tpmodel.kubectl.lookup import Leader, find_leader
from tpmodel.kubectl.names import INFERENCE_PORT
from tpmodel.kubectl.problems import KubectlError
from tpmodel.kubectl.tunnel_tls import identity_behind


@click.command()
@click.argument("model")
@question_options
@click.option("--gang", default=None, metavar="N", help="Ask this gang; default: the first that takes requests.")
@api_key_option
@connection_options
@with_kubectl
def generate(kubectl: Kubectl, model: str, question: Question, gang: str | None, api_key: str | None) -> None:
    """Have MODEL continue PROMPT (or --token-ids), through a port-forward to a gang's leader pod."""
    leader = find_leader(kubectl, model, gang)
    with forwarding(kubectl, leader.pod.name, {INFERENCE_PORT: 0}) as forward:
        try:
            port = forward.local_port(INFERENCE_PORT)
            identity = identity_behind(port) if leader.pod.tls else None
            question.answer(
                f"127.0.0.1:{port}",
                api_key=api_key,
                credentials=identity.credentials if identity else None,
                server_name=identity.server_name if identity else "",
            )
        except AuthenticationError as error:
            raise KubectlError(_no_key(leader, error)) from error
        except TpmodelError as error:
            lost = f"; the port-forward has ended: {forward.ended}" if forward.ended else ""
            raise KubectlError(f"{leader.described}: {error}{lost}") from error


def _no_key(leader: Leader, error: AuthenticationError) -> str:
    where = leader.model.api_key or "another place than spec.auth.apiKey"
    return f"{leader.described}: {error}; give --api-key or set TPMODEL_API_KEY: the key is {where}"
