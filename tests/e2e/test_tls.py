"""TLS on a real socket: who may be trusted, certificates that are renewed, and what is refused."""

import shutil
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from server.tls import credentials
from tests.e2e.test_serve import process, refused

KEYS = Path(__file__).parent / "tls"
"""For localhost and 127.0.0.1, signed by themselves; used here and nowhere else."""


def options(folder: Path, name: str) -> list[str]:
    return ["--tls-certificate", str(folder / f"{name}.pem"), "--tls-key", str(folder / f"{name}.key")]


async def test_both_clients_reach_an_encrypted_server_and_others_are_told_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(tmp_path / "data", "127.0.0.1:0", *options(KEYS, "one")) as (_, address):
        assert address.startswith("grpcs://127.0.0.1:")
        with Client(address, timeout=20) as client, pytest.raises(AtelierError, match="is not trusted here"):
            list(client.list())
        monkeypatch.setenv("ATELIER_CA", str(KEYS / "two.pem"))
        with Client(address, timeout=20) as client, pytest.raises(AtelierError, match="is not trusted here"):
            list(client.list())
        monkeypatch.setenv("ATELIER_CA", str(KEYS / "one.pem"))
        with Client(address, timeout=60) as client:
            assert list(client.list()) == []
        async with AsyncClient(address, timeout=60) as atelier:
            assert [v async for v in atelier.list()] == []
        clear = address.removeprefix("grpcs://")
        with (
            Client(clear, timeout=20) as client,
            pytest.raises(AtelierError, match="no server answers") as caught,
        ):
            list(client.list())
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_renewed_certificate_needs_no_restart_and_a_broken_one_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str) -> None:
        for end in ("pem", "key"):
            shutil.copyfile(KEYS / f"{name}.{end}", tmp_path / f"new.{end}")
            (tmp_path / f"new.{end}").replace(tmp_path / f"now.{end}")

    def reaches(trusted: str) -> bool:
        monkeypatch.setenv("ATELIER_CA", str(KEYS / f"{trusted}.pem"))
        with Client(address, timeout=20) as client:
            try:
                return list(client.list()) == []
            except AtelierError:
                return False

    put("one")
    with process(tmp_path / "data", "127.0.0.1:0", *options(tmp_path, "now")) as (_, address):
        assert (reaches("one"), reaches("two")) == (True, False)
        put("two")
        assert (reaches("one"), reaches("two")) == (False, True)
        (tmp_path / "now.key").write_text("nothing")
        assert reaches("two")


@pytest.mark.parametrize(
    ("certificate", "key", "told"),
    [
        ("one.pem", "", "belong together"),
        ("", "one.key", "belong together"),
        ("one.pem", "two.key", "are no certificate and its key"),
        ("one.pem", "locked.key", "locked with a password"),
        ("one.key", "one.pem", "are no certificate and its key"),
        ("none.pem", "one.key", "No such file"),
    ],
)
def test_certificates_that_are_none(tmp_path: Path, certificate: str, key: str, told: str) -> None:
    pairs = {"--tls-certificate": certificate, "--tls-key": key}
    given = [word for option, name in pairs.items() if name for word in (option, str(KEYS / name))]
    if (certificate, key) == ("one.pem", "two.key"):  # one of them all the way
        code, said = refused(tmp_path, "127.0.0.1:0", *given)
        assert (code, told in said) == (4, True)
    with pytest.raises(Exception, match=told):
        credentials(*(KEYS / name if name else None for name in pairs.values()))


def test_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AtelierError, match="grpcs://HOST:PORT for one with TLS"):
        Client("https://studio.example:7431")
    monkeypatch.setenv("ATELIER_CA", "/nowhere/ca.pem")
    with pytest.raises(AtelierError, match=r"ATELIER_CA=.* cannot be read"):
        Client("grpcs://studio.example:7431")
