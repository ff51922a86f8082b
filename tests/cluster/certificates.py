"""A certificate authority of the cluster's own, and the certificates it signs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .processes import run

DAYS = "30"
KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
# Without a configuration of our own openssl adds the system's extensions, which make every certificate an authority.
CONFIGURATION = "[req]\ndistinguished_name=name\nprompt=no\n[name]\n"


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """Signs certificates; all files are in `folder`."""

    folder: Path
    name: str = "authority"

    @property
    def certificate(self) -> Certificate:
        """The authority's own."""
        return self._files(self.name)

    def create(self) -> None:
        """Makes the authority unless it exists."""
        if self.certificate.certificate.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "openssl.cnf").write_text(CONFIGURATION)
        extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"]
        self._request(self.name, f"/CN=test cluster {self.name}", extensions)

    def issue(
        self, file: str, common_name: str, *, organization: str = "", alternative_names: Iterable[str] = ()
    ) -> Certificate:
        """Signs a certificate for servers and clients unless the file exists; names such as `IP:127.0.0.1`."""
        issued = self._files(file)
        if issued.certificate.exists():
            return issued
        extensions = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "extendedKeyUsage=serverAuth,clientAuth",
        ]
        names = ",".join(alternative_names)
        if names:
            extensions.append(f"subjectAltName={names}")
        subject = (f"/O={organization}" if organization else "") + f"/CN={common_name}"
        self._request(file, subject, extensions, signer=self.certificate)
        return issued

    def _files(self, file: str) -> Certificate:
        return Certificate(certificate=self.folder / f"{file}.crt", key=self.folder / f"{file}.key")

    def _request(
        self, file: str, subject: str, extensions: Iterable[str], *, signer: Certificate | None = None
    ) -> None:
        made = self._files(file)
        command = ["openssl", "req", "-x509", "-config", str(self.folder / "openssl.cnf"), *KEY, "-days", DAYS]
        command += ["-subj", subject, "-keyout", str(made.key), "-out", str(made.certificate)]
        for extension in extensions:
            command += ["-addext", extension]
        if signer is not None:
            command += ["-CA", str(signer.certificate), "-CAkey", str(signer.key)]
        run(command)
