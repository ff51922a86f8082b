"""TLS through a port-forward.

The tunnel leads to the pod that was chosen, which the cluster vouches for, so whatever certificate it presents is the
model's. What gRPC wants to know of it beforehand is asked for first.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

import grpc

from tpmodel.kubectl.problems import KubectlError

_SECONDS = 10.0
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a gRPC client is told of the server."""

    credentials: grpc.ChannelCredentials
    server_name: str


def identity_behind(port: int) -> Identity:
    """That of the server at the other end of a tunnel from this port.

    Raises:
        KubectlError: it speaks no TLS, or its certificate is of no use.
    """
    try:
        certificate = ssl.get_server_certificate((_HOST, port), timeout=_SECONDS)
        name = _name_in(certificate, port)
    except (OSError, ssl.SSLError) as error:
        raise KubectlError(f"the pod's TLS cannot be used: {error}") from error
    return Identity(grpc.ssl_channel_credentials(certificate.encode()), name)


def _name_in(certificate: str, port: int) -> str:
    """A name that the certificate is for; read by a handshake that trusts it alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    with (
        socket.create_connection((_HOST, port), _SECONDS) as connection,
        context.wrap_socket(connection) as secured,
    ):
        entry = secured.getpeercert() or {}
    names = [str(value[1]) for value in entry.get("subjectAltName", ()) if value[0] in ("DNS", "IP Address")]
    if not names:
        raise ssl.SSLError("its certificate has no subjectAltName")
    return names[0].replace("*", "any", 1)
