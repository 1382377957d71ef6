"""Which Hubs may be reached, under which token: an operator says it at the start, no request can.

A token belongs to one endpoint and goes nowhere else. That of https://huggingface.co is HF_TOKEN, that of
https://hub.studio.example:8443 HF_TOKEN_HUB_STUDIO_EXAMPLE_8443; where the environment has none, the system's
keyring is asked (service `atelier`, user the endpoint) if the `keyring` package is installed. HF_ENDPOINT is
respected as huggingface_hub does: HF_TOKEN is then that endpoint's.
"""

import importlib
import importlib.util
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from registry.errors import InvalidName

DEFAULT = "https://huggingface.co"
STORAGE = {DEFAULT: ("*.huggingface.co", "*.hf.co", "hf-hub-lfs-*.amazonaws.com")}
"""Hosts that an endpoint keeps large files on; they get bytes and signed links, never the token."""
_REPO = re.compile(r"(?![._-])[A-Za-z0-9_.-]{1,96}(?<![.-])/(?![.-])[A-Za-z0-9_.-]{1,96}(?<![.-])")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(?:/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}){0,3}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A Hub. `storage` are patterns of the hosts that its large files may come from and go to, over https."""

    url: str
    token: str = field(default="", repr=False)
    storage: tuple[str, ...] = ()

    def is_home(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether this is the endpoint itself, which may see the token."""
        own = urlsplit(self.url)
        return (scheme, host, _port(scheme, port)) == (own.scheme, own.hostname, _port(own.scheme, own.port))

    def may_reach(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether a request may go there."""
        if self.is_home(scheme, host, port):
            return True
        return scheme == "https" and any(fnmatchcase(host, pattern) for pattern in self.storage)


def endpoint(text: str, environment: Mapping[str, str] | None = None) -> Endpoint:
    """`https://hub.studio.example`, or with the hosts of its storage behind: `…,files.studio.example`. Plain
    http is for this machine only. Raises InvalidName.
    """
    url, *storage = (part.strip().rstrip("/") for part in text.split(","))
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    more = parts.path or parts.query or parts.fragment or parts.username
    if not host or more or parts.scheme not in {"https", "http"}:
        raise InvalidName(f"{text[:120]!r} is no Hub; write --hub https://HOST", field="hub")
    if parts.scheme == "http" and not _loopback(host):
        raise InvalidName(
            f"{url} would send files and tokens in the clear; write --hub https://{parts.netloc}", field="hub"
        )
    url = f"{parts.scheme}://{host if ':' not in host else f'[{host}]'}" + (f":{port}" if port else "")
    return Endpoint(
        url, _token(url, os.environ if environment is None else environment),
        (*STORAGE.get(url, ()), *storage),
    )  # fmt: skip


def check_repo(repo: str) -> str:
    """The repository's name itself, ORG/NAME. Raises InvalidName."""
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise InvalidName(f"{repo[:120]!r} is no repository; write ORG/NAME", field="repo")
    return repo


def check_revision(revision: str) -> str:
    """The revision itself: a branch, a tag or a commit. Raises InvalidName (the Hub's own client checks
    none, and `..` becomes another route).
    """
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidName(f"{revision[:120]!r} is no revision: a branch, a tag or a commit", field="revision")
    return revision


def _port(scheme: str, port: int | None) -> int:
    return port or {"http": 80}.get(scheme, 443)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token(url: str, environment: Mapping[str, str]) -> str:
    name = token_variable(url, environment)
    token = environment.get(name, "").strip() or _from_keyring(url)
    if not token.isascii() or not token.isprintable():
        raise InvalidName(f"the token in {name} has characters that no token has; set it anew", field="hub")
    return token


def token_variable(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """The environment variable of an endpoint's token."""
    if url == (environment.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT):
        return "HF_TOKEN"
    return "HF_TOKEN_" + re.sub(r"[^A-Z0-9]+", "_", urlsplit(url).netloc.upper()).strip("_")


def _from_keyring(url: str) -> str:
    if importlib.util.find_spec("keyring") is None:
        return ""
    try:
        return importlib.import_module("keyring").get_password("atelier", url) or ""
    except Exception:  # a keyring that is locked, or has no backend, is none
        return ""
