"""Certificates for tests of TLS, by openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class IssuedCertificate:
    """A server's certificate, its key, and the authority that signed it; all PEM."""

    certificate: bytes
    key: bytes
    authority: Path


def issue(folder: Path, *names: str) -> IssuedCertificate:
    """For these DNS names, by an authority made for it."""
    authority, authority_key = folder / "ca.crt", folder / "ca.key"
    key, request, certificate, extensions = (folder / f"tls.{end}" for end in ("key", "csr", "crt", "ext"))
    extensions.write_text("subjectAltName=" + ",".join(f"DNS:{name}" for name in names))
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    _openssl(*new, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", authority_key, "-out", authority)
    _openssl(*new, "-subj", "/CN=server", "-keyout", key, "-out", request)
    signing = ["-CA", authority, "-CAkey", authority_key, "-CAcreateserial", "-extfile", extensions]
    _openssl("x509", "-req", "-days", "2", "-in", request, "-out", certificate, *signing)
    return IssuedCertificate(certificate.read_bytes(), key.read_bytes(), authority)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
