"""Bundles carry everything to another catalog, and a hostile one gets nowhere."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atelier import bundles
from atelier.client import Client
from atelier.v1 import catalog_pb2
from compose.warm import WarmPipeline
from tests.adapters import random_factors, write_kohya
from tests.conftest import Running, serving
from tests.e2e.test_cli import atelier, failed, good
from tests.server.test_previews import picture

CARD = b"---\ninstance_prompt: milo\nlicense: mit\n---\nMilo.\n"


def fill(client: Client, folder: Path) -> None:
    for seed, name in enumerate(("hero", "style")):
        write_kohya(folder / name, random_factors("pocket", seed=900 + seed, rank=3))
        client.check_in(folder / name, name=name, card=CARD if seed == 0 else b"", triggers=["exy"][:seed])
    write_kohya(folder / "second", random_factors("pocket", seed=905, rank=2))
    client.check_in(folder / "second", name="hero", alias="stable", triggers=["milo"])
    client.add_preview("hero:1", picture(), caption="on a beach")
    save_file({"<w>": torch.ones(1, 96)}, folder / "word")
    client.check_in(folder / "word", name="word")
    client.merge({"hero:1": 0.5, "style": 0.5}, name="both")
    client.save_stack({"hero@stable": 0.7, "word": 1.0}, name="look", prompt="a {hero}", steps=5)


def test_a_bundle_carries_everything_to_another_catalog(tmp_path: Path, warm: WarmPipeline) -> None:
    bundle = tmp_path / "studio.tar"
    with serving(tmp_path / "here", warm) as here, Client(here.address) as client:
        fill(client, tmp_path)
        out = good(atelier("export", "hero", "both", "look", "-o", bundle, server=here.address))
        assert "both:1, hero:1, hero:2, word:1, look:1; `atelier import" in out
        kept = {f"{v.name}:{v.number}": v for name in ("hero", "both", "look") for v in client.history(name)}
        card = client.get("hero:1").card
    with serving(tmp_path / "there", warm) as there, Client(there.address) as client:
        write_kohya(tmp_path / "own", random_factors("pocket", seed=950, rank=2))
        client.check_in(tmp_path / "own", name="hero", alias="stable")
        lines = good(atelier("import", bundle, server=there.address)).splitlines()
        assert lines == [
            "both:1 is both:1",
            "hero:1 is hero:2",
            "hero:2 is hero:3",
            "word:1 is word:1",
            "look:1 is look:1",
        ]
        for ref, old in {"hero:2": "hero:1", "hero:3": "hero:2", "both:1": "both:1"}.items():
            assert client.get(ref).version.digest == kept[old].digest
        assert client.get("hero:2").card == card
        (preview,) = client.get("hero:2").previews
        assert preview.caption == "on a beach"
        assert client.get("hero@stable").version.number == 1  # what it named here, it names still
        origin = json.loads(client.get("both").version.origin_json)
        assert (origin["ref"], origin["recipe"]["method"]) == ("both:1", "naive")
        assert [t.word for t in client.get("both").version.triggers] == ["milo", "exy"]
        assert client.get("both").version.about.licence.value == "needs review"
        shown = good(atelier("show", "both", server=there.address))
        assert "bundle studio.tar, licence needs review, ref both:1, merged from hero:1 + style:1" in shown
        old_stack, new_stack = (
            json.loads(v.stack_json) for v in (kept["look:1"], client.get("look").version)
        )
        members = [[(m["digest"], m["weight"]) for m in s["members"]] for s in (old_stack, new_stack)]
        assert members[0] == members[1]
        assert (new_stack["prompt"], new_stack["steps"]) == ("a {hero}", 5)
        before = [event.seq for event in client.watch(wait=False)]
        again = good(atelier("import", bundle, server=there.address)).splitlines()
        assert all(line.endswith(", which was here already") for line in again)
        assert list(client.watch(since=before[-1], wait=False)) == []


def carry(source: Client, target: Client, bundle: Path, *refs: str) -> list[tuple[str, str, bool]]:
    with bundle.open("wb") as file:
        bundles.export(source, refs, file)
    return list(bundles.bring_in(target, bundle))


def test_a_stack_arrives_with_its_weights_by_part_and_its_names(
    server: Running, tmp_path: Path, warm: WarmPipeline
) -> None:
    parts = {"up_blocks": 0.5, "down_blocks": -1.0}
    write_kohya(tmp_path / "milo", random_factors("pocket", seed=960, rank=2))
    with serving(tmp_path / "there", warm) as there, Client(there.address) as target:
        target.check_in(tmp_path / "milo", name="a-twin", triggers=["other"])
        with Client(server.address) as source:
            source.check_in(tmp_path / "milo", name="parted-milo", triggers=["milo"])
            source.save_stack([("parted-milo", (0.7, parts))], name="parted", prompt="a {parted-milo}")
            for created in (True, False):
                came = carry(source, target, tmp_path / "bundle", "parted")
                assert came == [
                    ("parted-milo:1", "parted-milo:1", created),
                    ("parted:1", "parted:1", created),
                ]
            (member,) = json.loads(source.get("parted").version.stack_json)["members"]
        assert json.loads(target.get("parted").version.stack_json)["members"] == [member]
        assert (member["parts"], member["words"]) == (parts, ["milo"])


def test_the_licence_of_a_merge_comes_along_however_often_it_is_carried(
    tmp_path: Path, warm: WarmPipeline
) -> None:
    with ExitStack() as opened:
        running = [opened.enter_context(serving(tmp_path / name, warm)) for name in "abcd"]
        clients = [opened.enter_context(Client(one.address)) for one in running]
        for seed, licence in ((970, b"cc-by-nc-4.0"), (971, b"mit")):
            write_kohya(tmp_path / "file", random_factors("pocket", seed=seed, rank=2))
            card = b"---\nlicense: " + licence + b"\n---\n"
            clients[0].check_in(tmp_path / "file", name=f"parent-{seed}", card=card)
        clients[0].merge({"parent-970": 0.5, "parent-971": 0.5}, name="both")
        recipe = json.loads(clients[0].get("both").version.recipe_json)
        for hop, (source, target) in enumerate(pairwise(clients)):
            carry(source, target, tmp_path / f"bundle{hop}", "both")
            version = target.get("both").version
            assert version.about.licence.value == "cc-by-nc-4.0"
            origin = json.loads(version.origin_json)
            assert (origin["bundle"], origin["recipe"]) == (f"bundle{hop}", recipe)
            assert origin.get("origin") == ({"bundle": "bundle0", "ref": "both:1"} if hop else None)


def index(*entries: dict[str, Any], **more: object) -> bytes:
    return json.dumps({"format": 1, "versions": list(entries)} | more).encode()


def entry(**more: object) -> dict[str, Any]:
    told = {
        "name": "evil", "number": 1, "kind": "lora", "digest": "sha256:" + "0" * 64, "size_bytes": 1,
        "card": "", "aliases": [], "previews": [], "base": "", "triggers": [], "adapter_config": "",
        "file_name": "",
    }  # fmt: skip
    return told | more


def stack(**more: object) -> dict[str, Any]:
    member = {"ref": "hero:1", "digest": "sha256:" + "0" * 64, "weight": 1} | more
    return entry(kind="stack", stack={"members": [member]})


def tar(path: Path, *members: tuple[str, bytes], mode: Any = "w", change: Any = None) -> Path:
    with tarfile.open(path, mode) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            out.addfile(info, io.BytesIO(data))
    return path


def link(info: tarfile.TarInfo) -> None:
    if info.name.startswith("sha256/"):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


GOOD = b"data"
NAME = f"sha256/{hashlib.sha256(GOOD).hexdigest()}"
INDEX = bundles.INDEX
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zeros": (lambda p: _write(p, b"\0" * 4096), "the first file is not"),
    "text": (lambda p: _write(p, b"hello"), "is no bundle"),
    "empty": (lambda p: _write(p, b""), "is no bundle"),
    "traversal": (lambda p: tar(p, (INDEX, index()), ("../../evil", GOOD)), "'../../evil' does not belong"),
    "absolute": (lambda p: tar(p, (INDEX, index()), ("/etc/evil", GOOD)), "'/etc/evil' does not belong"),
    "link": (lambda p: tar(p, (INDEX, index()), (NAME, b""), change=link), "does not belong"),
    "lie": (lambda p: tar(p, (INDEX, index()), (NAME, b"other")), "does not contain what its name says"),
    "no index": (lambda p: tar(p, (NAME, GOOD)), "the first file is not"),
    "not json": (lambda p: tar(p, (INDEX, b"{" * 100_000)), "is damaged"),
    "format": (lambda p: tar(p, (INDEX, index(format=2))), "of a format"),
    "list": (lambda p: tar(p, (INDEX, index(versions={}))), "holds no list"),
    "field": (lambda p: tar(p, (INDEX, index(entry(name=3)))), "a wrong 'name'"),
    "preview": (lambda p: tar(p, (INDEX, index(entry(previews=[3])))), "a wrong 'previews'"),
    "digest": (lambda p: tar(p, (INDEX, index(entry(digest="../../x")))), "'../../x' is no digest"),
    "stack": (lambda p: tar(p, (INDEX, index(stack(weight=10**400)))), "the stack evil:1 is damaged"),
    "parts": (lambda p: tar(p, (INDEX, index(stack(parts=[1])))), "the stack evil:1 is damaged"),
    "missing": (lambda p: tar(p, (INDEX, index(entry()))), "which is not in"),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_bundle_is_refused_before_anything_is_checked_in(
    server: Running, client: Client, tmp_path: Path, case: str
) -> None:
    make, message = HOSTILE[case]
    before = list(client.watch(wait=False))[-1:]
    folder = tmp_path / "in"
    folder.mkdir()
    failed(atelier("import", make(folder / "b.tar"), server=server.address), 4, message)
    assert [path.name for path in folder.iterdir()] == ["b.tar"]
    assert list(client.watch(wait=False))[-1:] == before


# Threat 4: a bomb in a bundle.
def test_bundle_bomb(server: Running, tmp_path: Path) -> None:
    zeros = b"\0" * (1 << 20)
    for mode in ("w:gz", "w:xz"):
        tar(tmp_path / "bomb", (INDEX, index()), *[(NAME, zeros)] * 64, mode=mode)
        assert (tmp_path / "bomb").stat().st_size < 1 << 20
        failed(atelier("import", tmp_path / "bomb", server=server.address), 4, "is no bundle (a plain tar")
    sparse = tarfile.TarInfo(NAME)
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 30),
                          "GNU.sparse.map": f"0,0,{1 << 30},0", "GNU.sparse.numblocks": "2"}  # fmt: skip
    with tarfile.open(tmp_path / "sparse", "w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo(INDEX)
        info.size = len(index())
        out.addfile(info, io.BytesIO(index()))
        out.addfile(sparse, io.BytesIO(b""))
    failed(atelier("import", tmp_path / "sparse", server=server.address), 4, "does not belong into a bundle")


def test_a_file_that_the_gate_refuses_is_told(server: Running, tmp_path: Path) -> None:
    bad = entry(digest=f"sha256:{NAME[7:]}", number=1)
    path = tar(tmp_path / "bad.tar", (INDEX, index(bad)), (NAME, GOOD))
    failed(atelier("import", path, server=server.address), 4, "too few to be safetensors")


def test_what_is_not_there_is_not_exported(server: Running, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    failed(atelier("export", "nobody-here", "-o", out, server=server.address), 3, "there is no 'nobody-here'")
    failed(atelier("import", out, server=server.address), 3, "there is no")
    assert list(tmp_path.iterdir()) == []


def test_kinds_have_the_names_bundles_use() -> None:
    assert {kind.removeprefix("KIND_").lower() for kind in catalog_pb2.Kind.keys()} >= {"lora", "stack"}  # noqa: SIM118
