"""Who may call what. Threat 34: an unauthenticated write."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from compose.warm import WarmPipeline
from registry.errors import InvalidFile, InvalidName, NotFound
from server.auth import Tokens
from tests.conftest import Running, serving


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    (tmp_path / "data").mkdir()
    return Tokens(tmp_path / "data")


@pytest.fixture
def guarded(tmp_path: Path, warm: WarmPipeline, tokens: Tokens) -> Iterator[Running]:
    with serving(tmp_path / "data", warm, tokens=tokens) as running:
        yield running


def refused(call: Callable[[], object], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(AtelierError, match=message) as caught:
        call()
    assert caught.value.code is code


def test_bind_and_auth(
    guarded: Running, tokens: Tokens, lora: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    with Client(guarded.address) as client:
        client.check_in(lora, name="open")  # no tokens: nobody needs one
        ann, bob, root = (
            tokens.add(n, r) for n, r in (("ann", "reader"), ("bob", "writer"), ("root", "admin"))
        )
        for call in (
            lambda: client.get("open"),
            lambda: list(client.list()),
            lambda: client.check_in(lora, name="b"),
            lambda: list(client.watch(wait=False)),
            lambda: client.download("open", tmp_path / "x"),
            lambda: client.delete("open"),
        ):
            monkeypatch.delenv("ATELIER_TOKEN", raising=False)
            refused(call, missing, "set ATELIER_TOKEN")
            monkeypatch.setenv("ATELIER_TOKEN", "atelier_wrong")
            refused(call, missing, "does not know that token")
        monkeypatch.setenv("ATELIER_TOKEN", ann)
        assert client.get("open").version.number == 1
        list(client.render("a star", steps=1))
        refused(
            lambda: client.delete("open"),
            denied,
            "DeleteVersion needs the role writer; .*'ann' is a reader's",
        )
        refused(lambda: client.check_in(lora, name="b"), denied, "CheckIn needs the role writer")
        monkeypatch.setenv("ATELIER_TOKEN", bob)
        monkeypatch.setenv("ATELIER_USER", "somebody else")
        client.set_alias("open", "stable", 1)
        refused(client.collect_garbage, denied, "needs the role admin")
        monkeypatch.setenv("ATELIER_TOKEN", root)
        client.collect_garbage(dry_run=True)
        assert list(client.watch(wait=False))[-1].actor == "bob"  # the token's name, not what the client says
        for name in ("root", "bob", "ann"):
            tokens.revoke(name)
            refused(client.collect_garbage, missing, "does not know that token")
        (tmp_path / "data" / "tokens").unlink()
        refused(client.collect_garbage, missing, "does not know that token")  # no door opens by itself


async def test_the_async_client_sends_its_token(
    guarded: Running, tokens: Tokens, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_TOKEN", tokens.add("cy", "writer"))
    async with AsyncClient(guarded.address) as atelier:
        await atelier.check_in(lora, name="signed")
        assert [v.name async for v in atelier.list()] == ["signed"]
        watching = atelier.watch()
        assert (await anext(watching)).actor == "cy"
        await watching.aclose()


def test_tokens_are_kept_as_hashes_of_their_owner_alone(tokens: Tokens, tmp_path: Path) -> None:
    token = tokens.add("ann", "reader")
    file = tmp_path / "data" / "tokens"
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert tokens.entries() == [("ann", "reader")]
    for name, role in (
        ("ann", "writer"),
        ("", "reader"),
        ("a b", "reader"),
        ("new", "king"),
        ("a\nb", "admin"),
    ):
        with pytest.raises(InvalidName):
            tokens.add(name, role)
    with pytest.raises(NotFound):
        tokens.revoke("bob")
    for damage in (b"ann king\n", b"\xff\xfe"):
        file.write_bytes(damage)
        with pytest.raises(InvalidFile, match="is damaged"):
            Tokens(tmp_path / "data")


def test_of_tokens_added_at_once_none_is_lost(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: Tokens(tmp_path).add(f"user-{n}", "reader"), range(24)))
    assert len(Tokens(tmp_path).entries()) == 24


def test_of_two_tokens_added_at_once_under_one_name_there_is_one(tmp_path: Path) -> None:
    opened = [Tokens(tmp_path) for _ in range(2)]  # both have read the file before either writes
    opened[0].add("ann", "reader")
    with pytest.raises(InvalidName, match="not in use"):
        opened[1].add("ann", "admin")
    assert Tokens(tmp_path).entries() == [("ann", "reader")]


def test_a_change_of_tokens_is_durable_before_it_is_told(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    def watched(name: str, path_of: Callable[..., str]) -> Callable[..., object]:
        call = getattr(os, name)
        return lambda *given: (told.append((name, path_of(*given))), call(*given))[1]

    monkeypatch.setattr(os, "fsync", watched("fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", watched("replace", lambda old, new: str(new)))
    tokens.add("ann", "reader")
    data = tmp_path / "data"
    assert told == [
        ("fsync", str(data / "tokens.new")), ("replace", str(data / "tokens")), ("fsync", str(data))
    ]  # fmt: skip


def keep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120)


def test_beyond_this_machine_a_token_is_needed(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    told = keep("server", "--data", data, "--listen", "0.0.0.0:0")
    assert (told.returncode, told.stdout) == (4, "")
    assert "reaches beyond this machine" in told.stderr
    added = keep("server.keep", "token", "add", "ann", "--role", "writer", "--data", data)
    assert added.returncode == 0
    assert added.stdout.startswith("atelier_")
    assert keep("server.keep", "token", "list", "--data", data).stdout == "ann  writer\n"
    gone = keep("server.keep", "token", "revoke", "ann", "--data", data)
    assert "a server started from now on asks for none" in gone.stdout
    assert keep("server.keep", "token", "revoke", "ann", "--data", data).returncode == 3
