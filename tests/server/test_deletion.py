"""Deleting, collecting garbage and watching over gRPC, and what a check-in says of files it has seen."""

import threading
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from atelier import views
from atelier.aio import AsyncClient
from atelier.client import AtelierError, Client
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving


def test_a_file_with_another_header_is_told_to_hold_the_same_tensors(
    client: Client, lora: Path, tmp_path: Path
) -> None:
    first = client.check_in(lora, name="tensors")
    assert list(first.same_tensors) == []
    save_file(
        dict(reversed(load_file(lora).items())),
        tmp_path / "b",
        metadata={"ss_output_name": "stolen"},
    )
    again = client.check_in(tmp_path / "b", name="tensors-b")
    assert (list(again.same_bytes), list(again.same_tensors)) == ([], ["tensors:1"])
    assert again.version.tensor_digest == first.version.tensor_digest != first.version.digest


def test_a_deleted_version_is_gone_from_lists_and_stacks_until_it_is_back(client: Client, lora: Path) -> None:
    client.check_in(lora, name="going")
    assert client.delete("going:1").HasField("delete_time") is False  # as it was
    assert "going" not in {version.name for version in client.list()}
    assert client.history("going")[0].HasField("delete_time")
    with pytest.raises(AtelierError, match="`atelier undelete going:1` brings it back") as caught:
        list(client.render("a star", stack={"going:1": 1.0}, steps=1))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert client.undelete("going:1").name == "going"
    list(client.render("a star", stack={"going:1": 1.0}, steps=1))


def test_garbage_is_collected_on_request(tmp_path: Path, warm: WarmPipeline) -> None:
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=4))
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        client.check_in(tmp_path / "a", name="hero")
        client.delete("hero")
        nothing, now = client.collect_garbage(), timedelta(0)
        assert (list(nothing.versions), nothing.size_bytes) == ([], 0)
        told = client.collect_garbage(dry_run=True, retention=now, grace=now)
        assert (list(told.versions), told.size_bytes) == (["hero:1"], (tmp_path / "a").stat().st_size)
        assert client.collect_garbage(retention=now, grace=now) == told
        with pytest.raises(AtelierError, match="are purged; check the file in again") as caught:
            client.undelete("hero:1")
        assert caught.value.code is grpc.StatusCode.ABORTED
        with pytest.raises(AtelierError, match="grace must be from 0") as caught:
            client.collect_garbage(grace=timedelta(days=-1))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_watcher_misses_nothing_and_sees_nothing_twice(
    tmp_path: Path, warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_USER", "ann")
    write_kohya(tmp_path / "a", random_factors("pocket", seed=1, rank=4))
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=60) as client:
        client.check_in(tmp_path / "a", name="hero", alias="stable")

        def work() -> None:
            for number in range(20):
                client.set_alias("hero", f"a{number}", 1)

        worker = threading.Thread(target=work)
        worker.start()
        seen = []
        for event in client.watch():  # cut off after ten, and again
            seen.append(event)
            if len(seen) == 10:
                break
        for event in client.watch(since=seen[-1].seq):
            seen.append(event)
            if len(seen) == 22:
                break
        worker.join()
        assert [event.seq for event in seen] == list(range(1, 23))
        assert {event.actor for event in seen} == {"ann"}
        assert [event.action for event in seen] == ["checkin"] + ["alias"] * 21
        assert list(client.watch(since=22, wait=False)) == []
        with pytest.raises(AtelierError, match="since 23 is beyond 22, the last change here"):
            list(client.watch(since=23))
        with pytest.raises(AtelierError, match="below 0"):
            list(client.watch(since=-1, wait=False))


async def test_the_async_client_watches_too(server: Running, client: Client, lora: Path) -> None:
    client.check_in(lora, name="watched")
    async with AsyncClient(server.address) as atelier:
        async for event in atelier.watch():
            if event.name == "watched":
                break
    assert (event.action, event.number) == ("checkin", 1)


def test_a_parent_that_a_merge_needs_is_held_and_the_merge_can_be_made_again(
    tmp_path: Path, warm: WarmPipeline
) -> None:
    at_once = timedelta(0)
    with serving(tmp_path / "data", warm) as running, Client(running.address, timeout=60) as client:
        for seed, name in enumerate(("hero", "glow")):
            write_kohya(tmp_path / name, random_factors("pocket", seed=seed, rank=4))
            client.check_in(tmp_path / name, name=name)
        merge = client.merge({"hero": 0.7, "glow": 0.3}, name="mix").version
        client.delete("hero")
        for dry_run in (True, False):
            went = client.collect_garbage(dry_run=dry_run, retention=at_once, grace=at_once)
            assert [(held.ref, held.merge) for held in went.held] == [("hero:1", "mix:1")]
            assert list(went.versions) == []
            told = views.garbage(went, dry_run=dry_run).splitlines()[1]
            assert told.endswith("hero:1: mix:1 was made of it; delete that first")
        client.undelete("hero:1")
        assert client.merge({"hero": 0.7, "glow": 0.3}, name="mix").version.digest == merge.digest
