"""`AsyncClient` is `Client` with `await`: every call of one is a call of the other, and answers the same."""

import asyncio
import inspect
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client, method
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running

ONLY_ASYNC = {"events"}
"""A render's events; `Client.render` gives an object that is iterated over."""
OTHER_SHAPE = {"render", "replay"}


def public(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(kind).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    sync, asynchronous = public(Client), public(AsyncClient)
    assert asynchronous.keys() - sync.keys() == ONLY_ASYNC
    assert sync.keys() - asynchronous.keys() == set()
    for name, signature in sync.items():
        assert asynchronous[name].parameters == signature.parameters, name
        if name not in OTHER_SHAPE:
            told = str(asynchronous[name].return_annotation).removeprefix("Async")
            plain = str(signature.return_annotation)
            assert told.split(".")[-1] == plain.split(".")[-1], name
    functions = vars(AsyncClient)
    assert all(
        inspect.iscoroutinefunction(functions[name]) or inspect.isasyncgenfunction(functions[name])
        for name in asynchronous
    )


async def test_cards_previews_deletion_and_garbage(server: Running, lora: Path, client: Client) -> None:
    async with AsyncClient(server.address) as atelier:
        await atelier.check_in(lora, name="aio-kept", card=b"# One")
        changed = await atelier.set_card("aio-kept", b"# Two")
        assert changed.revision == 2
        with pytest.raises(AtelierError, match="changed meanwhile") as caught:
            await atelier.set_card("aio-kept", b"# Three", expected_card_digest="sha256:" + "0" * 64)
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert [r.card for r in await atelier.cards("aio-kept")] == [b"# Two", b"# One"]
        (png,) = await atelier.render("a star", width=64, height=64, steps=1, seed=1)
        shown = await atelier.add_preview("aio-kept", png, caption="a star")
        assert (await atelier.get("aio-kept")).previews == [shown]
        assert await atelier.preview("aio-kept") == client.preview("aio-kept", shown.digest)
        assert list(await atelier.remove_preview("aio-kept", shown.digest)) == []
        assert (await atelier.delete("aio-kept")).name == "aio-kept"
        assert (await atelier.undelete("aio-kept:1")).number == 1
        would = await atelier.collect_garbage(dry_run=True, grace=timedelta(0))
        assert shown.digest in would.orphans
        events = [event async for event in atelier.watch(wait=False) if event.name == "aio-kept"]
        assert [event.action for event in events] == [
            "checkin", "card", "preview", "preview", "delete", "undelete",
        ]  # fmt: skip


async def test_stacks_likes_bases_and_methods(server: Running, tmp_path: Path, client: Client) -> None:
    factors = random_factors("pocket", seed=77, rank=4)
    for name in ("aio-a", "aio-b"):
        write_kohya(tmp_path / name, factors)
    async with AsyncClient(server.address) as atelier:
        for name in ("aio-a", "aio-b"):
            await atelier.check_in(tmp_path / name, name=name)
        half = await atelier.merge({"aio-a": 0.5}, name="aio-half", method=method("naive"))
        assert half.version.ByteSize() > 0
        found = await atelier.similar("aio-a", at_least=0.9)
        assert {s.version.name for s in found} >= {"aio-b", "aio-half"}
        again = client.similar("aio-a", at_least=0.9)
        assert [(s.version.name, s.cosine) for s in found] == [(s.version.name, s.cosine) for s in again]
        saved = await atelier.save_stack({"aio-a": 0.5}, name="aio-stack", prompt="a star", steps=3)
        assert saved.created
        one, other = await atelier.compare("aio-a", "aio-half"), client.compare("aio-a", "aio-half")
        assert list(one.layers) == list(other.layers)
        assert await atelier.methods() == client.methods()
        assert await atelier.bases() == client.bases()


async def test_a_download_is_whole_or_not_there_and_goes_on(
    server: Running, lora: Path, tmp_path: Path
) -> None:
    seen, data = list[tuple[int, int]](), await asyncio.to_thread(lora.read_bytes)
    async with AsyncClient(server.address) as atelier:
        digest = (await atelier.check_in(lora, name="aio-down")).version.digest
        part = tmp_path / f".back.{digest[7:19]}.part"
        part.write_bytes(data[:100])
        got = await atelier.download(
            "aio-down", tmp_path / "back", progress=lambda done, total: seen.append((done, total))
        )
        assert (got.digest, await asyncio.to_thread((tmp_path / "back").read_bytes)) == (digest, data)
        assert seen == [(len(data), len(data))]  # in one piece, from byte 100 on
        assert not part.exists()
        part.write_bytes(b"x" * 100)
        with pytest.raises(AtelierError, match="arrived damaged; download it again"):
            await atelier.download("aio-down", tmp_path / "back")
        with pytest.raises(AtelierError, match="there is no 'aio-none'"):
            await atelier.download("aio-none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
