"""The catalog at its full size: what it takes to find things among 100,000 versions, alone and in a crowd.

    find      `resolve`, pages of the list, searches, histories, what is near a version (every check-in over
              gRPC asks that): milliseconds, one caller
    crowd     64 threads that resolve and search (9 to 1) while one checks in: as fast as they can, and at a
              steady rate, timed from when each call was due

The catalog is filled by `Catalog.add` in memory (on disk every call waits for its fsyncs), then copied to
disk. Run: `python -m tests.bench.catalog [--quick] [find] [crowd]`; only a whole run writes
results/catalog.json.
"""

import argparse
import gc
import itertools
import json
import os
import random
import shutil
import statistics
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compose.projection import COORDINATES
from registry.catalog import Catalog
from registry.errors import Conflict
from registry.finding import Query
from registry.nearest import Projection
from tests.bench.report import save

MEMORY = Path("/dev/shm")  # a file system without a disk: fsync costs nothing there
MB, PAGE, READERS, RESOLVES_A_SEARCH = 1 << 20, 101, 64, 9
RESOLVE_LIMIT, SEARCH_LIMIT = 2.0, 20.0
FAMILIES = {"sd1": 45, "sdxl": 40, "sd2": 10, "pocket": 5}
LICENCES = ("mit", "apache-2.0", "creativeml-openrail-m", "openrail++", "cc-by-4.0", "cc-by-nc-4.0")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything. `seconds` of a crowd."""

    versions: int = 100_000
    assets: int = 20_000
    samples: int = 3000
    searches: int = 300
    seconds: float = 15.0
    rate: float = 2.0  # calls a second of each reader, in the steady crowd


QUICK = Scale(5000, 1000, samples=500, searches=40, seconds=3.0)


# What is in the catalog


@dataclass(frozen=True, slots=True)
class Asset:
    """An invented asset: what all its versions share."""

    name: str
    kind: str
    family: str
    trigger: str
    author: str
    licence: str
    tags: tuple[str, ...]
    text: str


class World:
    """Invented words, tags and authors, few of them frequent and most of them rare (Zipf's law)."""

    def __init__(self, scale: Scale) -> None:
        self.random = random.Random(0)
        syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
        short = ["".join(parts) for parts in itertools.product(syllables, repeat=2)]
        long = ["".join(parts) for parts in itertools.product(syllables, repeat=3)]
        self.words = [*self.random.sample(short, 3000), *self.random.sample(long, 17_000)]
        self.tags = self.random.sample(self.words, 400)
        self.authors = self.random.sample(self.words, 2000)
        self._weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(self.words))))
        names = dict.fromkeys(
            "-".join(self.random.choices(self.words, k=2)) for _ in range(scale.assets * 11 // 10)
        )
        self.assets = [self._asset(name) for name in itertools.islice(names, scale.assets)]

    def some(self, words: Sequence[str], count: int) -> list[str]:
        """Words drawn by frequency."""
        return self.random.choices(words, cum_weights=self._weights[: len(words)], k=count)

    def _asset(self, name: str) -> Asset:
        pick = self.random.choices
        return Asset(
            name=name,
            kind=pick(("lora", "textual_inversion"), (9, 1))[0],
            family=pick(tuple(FAMILIES), tuple(FAMILIES.values()))[0],
            trigger=f"{name.split('-')[0]}{self.random.randrange(10**6)}",
            author=self.some(self.authors, 1)[0],
            licence=pick(LICENCES)[0],
            tags=tuple(dict.fromkeys(self.some(self.tags, self.random.randint(2, 8)))),
            text=" ".join(self.some(self.words, 120)),
        )

    def card(self, asset: Asset, number: int) -> bytes:
        """About 1 KB; a paragraph of it is this version's own."""
        front = f"title: {asset.name}\nauthor: {asset.author}\nlicense: {asset.licence}\n"
        front += f"instance_prompt: {asset.trigger}\ntags: [{', '.join(asset.tags)}]\n"
        news = " ".join(self.some(self.words, 30))
        return f"---\n{front}---\n# {asset.name}\n\n{asset.text}.\n\nVersion {number}: {news}.\n".encode()

    def facts(self, asset: Asset, number: int) -> dict[str, Any]:
        """What `server.checkin` would have found."""
        rank, layers = self.random.choice((4, 8, 16, 32, 64)), self.random.choice((64, 128, 192, 264))
        told = {"title": asset.name, "author": asset.author, "licence": asset.licence, "tags": asset.tags}
        return {
            "family": asset.family,
            "layout": "kohya",
            "rank": rank,
            "components": ["text_encoder", "unet"],
            "targets": ["k_proj", "out_proj", "q_proj", "to_k", "to_out", "to_q", "to_v", "v_proj"],
            "coverage": {"base": asset.family, "bound": layers, "total": layers, "unbound": []},
            "triggers": [{"word": asset.trigger, "source": "card"}],
            "about": {name: {"value": value, "source": "card"} for name, value in told.items()},
            "file_name": f"{asset.name}-{number:06}.safetensors",
            "declared": {"base": asset.family, "triggers": [], "adapter_config": ""},
        }

    def add(self, catalog: Catalog, asset: Asset, number: int, data: bytes, alias: str = "") -> str:
        """Checks a version in; its digest."""
        with catalog.blobs.upload() as upload:
            upload.write(data)
            version, _ = catalog.add(
                upload,
                name=asset.name,
                kind=asset.kind,
                facts=self.facts(asset, number),
                card=self.card(asset, number),
                alias=alias,
                request_id=f"{asset.name}/{number}",
                projection=Projection(f"{asset.kind}/{asset.family}", self._vector()),
                actor="bench",
            )
        return version.digest

    def _vector(self) -> bytes:
        return struct.pack(f"{COORDINATES}f", *(self.random.uniform(-1, 1) for _ in range(COORDINATES)))


@dataclass(frozen=True, slots=True)
class Known:
    """What can be asked for: references by their form, names by how often they should come."""

    refs: dict[str, list[str]]
    names: list[str]


def fill(catalog: Catalog, world: World, scale: Scale) -> Known:
    """Every asset once, then most versions to a few assets; 1 % of the versions are deleted again."""
    rng, count = world.random, dict.fromkeys(world.assets, 0)
    shares = [min(rng.paretovariate(1.5), 150) for _ in world.assets]
    order = [*world.assets, *rng.choices(world.assets, shares, k=scale.versions - scale.assets)]
    rng.shuffle(order)
    digest_of, aliased = dict[str, str](), set[str]()
    for asset in order:
        count[asset] += 1
        ref = f"{asset.name}:{count[asset]}"
        alias = rng.choice(("stable", "beta", *[""] * 8))
        digest_of[ref] = world.add(catalog, asset, count[asset], ref.encode(), alias)
        if alias:
            aliased.add(f"{asset.name}@{alias}")
    more = [asset for asset, versions in count.items() if versions > 1]
    for asset in rng.sample(more, min(len(more), scale.versions // 100)):
        ref = f"{asset.name}:{count[asset]}"
        try:
            catalog.delete(ref, actor="bench")
        except Conflict:  # an alias names it
            continue
        del digest_of[ref]
    refs = {
        "name": [asset.name for asset in world.assets],
        "name:number": list(digest_of),
        "name@alias": sorted(aliased),
        "sha256": list(digest_of.values()),
    }
    return Known(refs, [asset.name for asset in order])


def filled(folder: Path, world: World, scale: Scale) -> tuple[Known, dict[str, float]]:
    """Fills a catalog in memory and moves it to `folder`; how long that took, and how large it is."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        start = time.perf_counter()
        with closing(Catalog(Path(scratch) / "data")) as catalog:
            known = fill(catalog, world, scale)
        seconds = time.perf_counter() - start
        shutil.copytree(Path(scratch) / "data", folder)
    os.sync()
    size = (folder / "catalog.db").stat().st_size
    facts = {
        "versions": scale.versions,
        "assets": scale.assets,
        "database_mb": size / MB,
        "database_bytes_a_version": size / scale.versions,
        "add_milliseconds_without_a_disk": seconds / scale.versions * 1e3,
    }
    return known, facts


def questions(world: World, scale: Scale) -> dict[str, list[Query]]:
    """Searches by kind. The last word of each is a prefix, so `common` finds longer words too."""
    rng = world.random
    common, middling, rare = world.words[:20], world.words[300:2000], [a.trigger for a in world.assets]
    frequent = [("base", "sd1"), ("base", "sdxl"), ("kind", "lora")]

    def ask(text: Callable[[], str], labels: Callable[[], list[tuple[str, str]]] = list) -> list[Query]:
        return [Query(text=text(), labels=labels()) for _ in range(scale.searches)]

    return {
        "rare word": ask(lambda: rng.choice(rare)),
        "middling word": ask(lambda: rng.choice(middling)),
        "common word": ask(lambda: rng.choice(common)),
        "two middling words": ask(lambda: " ".join(rng.sample(middling, 2))),
        "two common words": ask(lambda: " ".join(rng.sample(common, 2))),
        "common word, rare word": ask(lambda: f"{rng.choice(common)} {rng.choice(rare)}"),
        "no such word": ask(lambda: f"{rng.choice(middling)} qx{rng.randrange(1000)}"),
        "prefix of 1 letter": ask(lambda: rng.choice(common)[:1]),
        "prefix of 2 letters": ask(lambda: rng.choice(common)[:2]),
        "prefix of 3 letters": ask(lambda: rng.choice(middling)[:3]),
        "common word, frequent label": ask(lambda: rng.choice(common), lambda: [rng.choice(frequent)]),
        "middling word, tag": ask(lambda: rng.choice(middling), lambda: [("tag", rng.choice(world.tags))]),
        "common word, tag": ask(lambda: rng.choice(common), lambda: [("tag", rng.choice(world.tags))]),
        "frequent label alone": ask(str, lambda: [rng.choice(frequent)]),
        "author alone": ask(str, lambda: [("author", rng.choice(world.authors))]),
        "two labels": ask(str, lambda: [("tag", rng.choice(world.tags[:50])), rng.choice(frequent)]),
    }


# How long it takes


def milliseconds(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p99, the longest, and how many there were."""
    found = sorted(value * 1e3 for value in seconds)
    if not found:
        return {"count": 0}
    p50, p99 = (found[len(found) * part // 100] for part in (50, 99))
    return {"p50": p50, "p99": p99, "max": found[-1], "count": len(found)}


def each(call: Callable[[Any], object], arguments: Iterable[object]) -> list[float]:
    """Seconds of each call, one after the other (`report.timed` would collect garbage before each)."""
    times = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        times.append(time.perf_counter() - start)
    return times


def find(catalog: Catalog, world: World, known: Known, scale: Scale) -> dict[str, Any]:
    """One caller, nobody else."""
    rng = world.random
    each(catalog.resolve, rng.choices(known.names, k=200))
    resolves = {
        form: each(catalog.resolve, rng.choices(refs, k=scale.samples)) for form, refs in known.refs.items()
    }
    pages = each(lambda after: catalog.newest(after=after, limit=PAGE), rng.choices(known.names, k=300))
    asked = questions(world, scale)
    searches, hits = dict[str, list[float]](), dict[str, float]()
    for kind, queries in asked.items():
        searches[kind] = each(lambda query: catalog.newest(limit=PAGE, query=query), queries)
        hits[kind] = statistics.mean(len(catalog.newest(limit=PAGE, query=query)) for query in queries[:20])
    longest = statistics.mode(known.names)

    def near(ref: str) -> None:
        catalog.nearest(catalog.resolve(ref), at_least=0.75, limit=20)

    first = each(near, known.names[:1])  # reads all projections
    return {
        "resolve": {form: milliseconds(times) for form, times in resolves.items()},
        "list_page_of_100": milliseconds(pages),
        "search": {kind: {**milliseconds(t), "mean_hits": hits[kind]} for kind, t in searches.items()},
        "search_all_kinds": milliseconds(itertools.chain.from_iterable(searches.values())),
        "history": milliseconds(each(catalog.history, rng.choices(known.refs["name"], k=scale.samples))),
        f"history_of_{len(catalog.history(longest))}_versions": milliseconds(
            each(catalog.history, [longest] * 50)
        ),
        "nearest_of_a_check_in": milliseconds(each(near, rng.choices(known.names, k=300))),
        "nearest_of_the_first_check_in": milliseconds(first),
    }


@contextmanager
def collecting() -> Iterator[dict[str, float]]:
    """How often Python's full garbage collection stopped everything meanwhile, and for how long at most."""
    pauses, start = {"full_collections": 0, "longest_ms": 0.0}, [0.0]

    def note(phase: str, about: dict[str, int]) -> None:
        if about["generation"] == 2 and phase == "start":
            start[0] = time.perf_counter()
        elif about["generation"] == 2:
            pauses["full_collections"] += 1
            pauses["longest_ms"] = max(pauses["longest_ms"], (time.perf_counter() - start[0]) * 1e3)

    gc.callbacks.append(note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(note)


# In a crowd


@dataclass(frozen=True, slots=True)
class Reader:
    """A thread's work: calls by turns, and how long each took from when it was due."""

    calls: Sequence[tuple[str, Callable[[], object]]]
    first: int
    times: list[tuple[str, float]] = field(default_factory=list)

    def run(self, until: float, rate: float, phase: float) -> None:
        """Until a moment of the clock; `rate` calls a second, 0: one after the other."""
        due = time.perf_counter() + phase
        for what, call in itertools.islice(itertools.cycle(self.calls), self.first, None):
            if rate:
                if due >= until:
                    return
                time.sleep(max(0.0, due - time.perf_counter()))
            start = due if rate else time.perf_counter()
            if start >= until:
                return
            call()
            self.times.append((what, time.perf_counter() - start))
            if rate:
                due += 1 / rate


def crowd(catalog: Catalog, world: World, known: Known, scale: Scale) -> dict[str, Any]:
    """One writer alone; then with readers as fast as they can; then with readers at a steady rate."""
    refs = list(itertools.chain.from_iterable(zip(*_drawn(world, known, 500), strict=True)))
    asked = list(itertools.chain.from_iterable(zip(*questions(world, scale).values(), strict=True)))
    written = itertools.count()

    calls: list[tuple[str, Callable[[], object]]] = []
    for query in asked:
        for ref in world.random.sample(refs, RESOLVES_A_SEARCH):
            calls.append(("resolve", lambda ref=ref: catalog.resolve(ref)))
        calls.append(("search", lambda query=query: catalog.newest(limit=PAGE, query=query)))

    def write(until: float, times: list[float]) -> None:
        while time.perf_counter() < until:
            number = next(written)
            asset, data = world.assets[number % 50], random.Random(number).randbytes(65536)
            start = time.perf_counter()
            world.add(catalog, asset, 10**6 + number, data)
            times.append(time.perf_counter() - start)

    def together(count: int, rate: float) -> dict[str, Any]:
        readers = [Reader(calls, index * 97) for index in range(count)]
        times: list[float] = []
        start = time.perf_counter()
        until = start + scale.seconds
        with ThreadPoolExecutor(count + 1) as pool:
            work = [pool.submit(write, until, times)]
            for index, reader in enumerate(readers):
                work.append(pool.submit(reader.run, until, rate, index / count / rate if rate else 0.0))
        for done in work:
            done.result()
        took = time.perf_counter() - start
        waited = [pair for reader in readers for pair in reader.times]
        result = {"check_ins_a_second": len(times) / took, "check_in": milliseconds(times)}
        if count:
            result["reads_a_second"] = len(waited) / took
            result |= {w: milliseconds(t for what, t in waited if what == w) for w in ("resolve", "search")}
        return result

    return {
        "writer_alone": together(0, 0.0),
        f"{READERS}_readers_as_fast_as_they_can": together(READERS, 0.0),
        f"{READERS}_readers_{scale.rate:g}_calls_a_second_each": together(READERS, scale.rate),
    }


def _drawn(world: World, known: Known, count: int) -> list[list[str]]:
    return [world.random.choices(refs, k=count) for refs in known.refs.values()]


# All of it


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether that is kept."""
    promised: list[tuple[str, float, float, bool]] = []
    if "find" in result:
        resolves = {f"resolve {form} p99 ms": t["p99"] for form, t in result["find"]["resolve"].items()}
        searches = {f"search {kind} p99 ms": t["p99"] for kind, t in result["find"]["search"].items()}
        promised += [(name, value, RESOLVE_LIMIT, value < RESOLVE_LIMIT) for name, value in resolves.items()]
        promised += [(name, value, SEARCH_LIMIT, value < SEARCH_LIMIT) for name, value in searches.items()]
    return [{"what": what, "value": v, "limit": limit, "met": met} for what, v, limit, met in promised]


def disk(folder: Path) -> dict[str, Any]:
    """The file system below, and what an fsync of 4 KB costs there."""

    def sync(_: object) -> None:
        with (folder / "sync").open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())

    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, _, kind = max((m for m in mounts if folder.is_relative_to(m[1])), key=lambda m: len(m[1]))
    return {"device": device, "file_system": kind, "fsync": milliseconds(each(sync, range(50)))}


def main() -> None:
    """Measures, prints, writes results/catalog.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.catalog")
    parser.add_argument("--quick", action="store_true", help="5,000 versions and small files, to try it out")
    parser.add_argument("parts", nargs="*", help="find, crowd; both when none is named")
    arguments = parser.parse_args()
    scale, parts = QUICK if arguments.quick else Scale(), set(arguments.parts)
    if unknown := parts - {"find", "crowd"}:
        parser.error(f"there is no part {sorted(unknown)[0]!r}")
    wanted = parts or {"find", "crowd"}
    torch.set_num_threads(1)  # what the server gives itself on two cores
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        result: dict[str, Any] = {"disk": disk(folder)}
        if wanted & {"find", "crowd"}:
            world = World(scale)
            known, result["filled"] = filled(folder / "catalog", world, scale)
            with closing(Catalog(folder / "catalog")) as catalog:
                for name, ask in (("find", find), ("crowd", crowd)):
                    if name in wanted:
                        with collecting() as pauses:
                            result[name] = ask(catalog, world, known, scale)
                        result[name]["garbage_collection"] = pauses
            shutil.rmtree(folder / "catalog")
    result["targets"] = targets(result)
    if arguments.quick or parts:
        print(json.dumps(result, indent=2))
    else:
        save("catalog", result)
    for target in result["targets"]:
        kept = "met   " if target["met"] else "MISSED"
        print(f"{kept}  {target['what']}: {target['value']:.3g} (target {target['limit']:g})")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
