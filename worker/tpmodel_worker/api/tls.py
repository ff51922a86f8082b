"""TLS on the ports for clients, with a certificate that may be renewed while the process runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from tpmodel_worker.models.config import ConfigError

logger = logging.getLogger(__name__)

CERTIFICATE = "tls.crt"
KEY = "tls.key"
_RENEWAL_SECONDS = 30.0


class ServerCertificate:
    """tls.crt (with its chain) and tls.key of a folder, as a mounted Secret has them; read again when they change."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError where the two are missing or do not belong together."""
        self.certificate_file = Path(folder) / CERTIFICATE
        self.key_file = Path(folder) / KEY
        try:
            self._current = self._read()
            self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.context.load_cert_chain(self.certificate_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{folder}: {CERTIFICATE} and {KEY} are no usable certificate: {error}") from error

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server: asked for the present certificate at every handshake."""
        # None, for "as before", is allowed by the documentation but not by the types.
        fetch: Any = self._fetch
        return grpc.dynamic_ssl_server_credentials(_configuration(*self._current), fetch, False)

    async def renew(self) -> None:
        """Keeps the context of other servers up to date, until cancelled."""
        known = self._current
        while True:
            await asyncio.sleep(_RENEWAL_SECONDS)
            try:
                present = await asyncio.to_thread(self._read)
                if present != known:
                    self.context.load_cert_chain(self.certificate_file, self.key_file)
                    known = present
                    logger.info("the certificate was renewed")
            except (OSError, ssl.SSLError) as error:
                # The two files change one after the other.
                logger.warning("%s: %s: the certificate stays as it is", self.certificate_file, error)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            present = self._read()
        except OSError:
            return None
        if present == self._current:
            return None
        self._current = present
        return _configuration(*present)

    def _read(self) -> tuple[bytes, bytes]:
        return self.certificate_file.read_bytes(), self.key_file.read_bytes()


def _configuration(certificate: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, certificate)])
