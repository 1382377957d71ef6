"""A stand-in Hub, the client of it, and studios: catalogs that exchange with it."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from registry.catalog import Catalog
from registry.digests import DigestStream
from registry.hub import guard
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from registry.hub.exchange import Exchange
from registry.hub.sync import Outcome, Wish, linked, sync
from registry.records import Version
from server.checkin import Declared, check_in
from server.door import Gate
from tests.adapters import random_factors, write_kohya
from tests.hub.standin import TOKEN, StandIn

SEEDS = itertools.count(50_000)


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[StandIn]:
    (tmp_path / "standin").mkdir()
    with StandIn(tmp_path / "standin") as running:
        yield running


def impatient(standin: StandIn, token: str = TOKEN) -> Hub:
    """A client that gives up soon."""
    return Hub(Endpoint(standin.url, token), silent=5.0, answer=30.0, pauses=(0.01, 0.02))


@pytest.fixture
def hub(standin: StandIn) -> Hub:
    """An impatient client with the right token."""
    return impatient(standin)


@contextmanager
def plain_client() -> Iterator[None]:
    """huggingface_hub as everybody has it: within, nothing is guarded."""
    guard.install()
    set_client_factory(default_client_factory)
    try:
        yield
    finally:
        set_client_factory(guard.client)


@dataclass(frozen=True, slots=True)
class Studio:
    """A catalog, and what brings it and a Hub together."""

    catalog: Catalog
    exchange: Exchange
    folder: Path

    def check_in(self, name: str, *, card: bytes = b"", path: Path | None = None, **said: object) -> Version:
        """A LoRA of a few kilobytes, of bytes that nobody else has."""
        path = path or self.weights()
        digests, declared = DigestStream(), Declared(name=name, card=card, **said)  # type: ignore[arg-type]
        with self.catalog.blobs.upload() as upload:
            upload.write(path.read_bytes())
            digests.update(path.read_bytes())
            return check_in(self.catalog, upload, declared, digests)[0]

    def weights(self, **how: object) -> Path:
        """A file that nobody else has."""
        path = self.folder / f"{next(SEEDS)}.safetensors"
        factors = random_factors("pocket", seed=next(SEEDS), rank=1)
        write_kohya(path, dict(itertools.islice(factors.items(), 1)), **how)  # type: ignore[arg-type]
        return path

    def card(self, ref: str) -> bytes:
        return self.catalog.card(self.catalog.resolve(ref))

    def set_card(self, ref: str, card: bytes) -> Version:
        return Gate(self.catalog).set_card(self.catalog.resolve(ref), card, "")

    def sync(self, *names: str, **wish: object) -> list[Outcome]:
        links = linked(self.exchange, names)
        return list(sync(self.exchange, links, Wish(**wish)))  # type: ignore[arg-type]


Open = Callable[..., Studio]


@pytest.fixture
def studios(tmp_path: Path, hub: Hub) -> Iterator[Open]:
    """Opens one more studio, with this client of the Hub or another."""
    opened: list[Studio] = []

    def more(client: Hub = hub) -> Studio:
        folder = tmp_path / f"studio-{len(opened)}"
        catalog = Catalog(folder / "data")
        opened.append(Studio(catalog, Exchange(catalog, client, Gate(catalog), actor="ann"), folder))
        return opened[-1]

    yield more
    for studio in opened:
        studio.catalog.close()


@pytest.fixture
def studio(studios: Open) -> Studio:
    """The first."""
    return studios()
