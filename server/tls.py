"""TLS: the server's certificate, read again whenever its file changes, for renewals without a restart."""

import logging
import ssl
from pathlib import Path

import grpc

from compose.errors import InvalidRequest

log = logging.getLogger("atelier")


def credentials(certificate: Path | None, key: Path | None) -> grpc.ServerCredentials | None:
    """What a port is served with: PEM files, the certificate with its chain; None in clear. Raises
    InvalidRequest.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidRequest(
            "--tls-certificate and --tls-key belong together; give both", field="tls-certificate"
        )
    files = _Files(certificate, key)
    return grpc.dynamic_ssl_server_credentials(files.read(), files.changed)


class _Files:
    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._seen = self._marks()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises InvalidRequest."""
        certificate, key = self._paths
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
            pair = (key.read_bytes(), certificate.read_bytes())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            told = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise InvalidRequest(
                f"{certificate} and {key} are no certificate and its key (PEM, without a password): {told}",
                field="tls-certificate",
            ) from None
        return grpc.ssl_server_certificate_configuration([pair])

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate, when there is one; a broken one is told of and the old one stays."""
        if (now := self._marks()) == self._seen:
            return None
        try:
            found = self.read()
        except InvalidRequest as error:
            log.warning("%s; the earlier certificate goes on", error)
            found = None
        self._seen = now
        return found

    def _marks(self) -> tuple[tuple[int, int], ...]:
        try:
            return tuple((stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in self._paths))
        except OSError:
            return ()


def _no_password() -> str:
    raise ValueError("the key is locked with a password")
