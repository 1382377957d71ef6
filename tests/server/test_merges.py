"""What the server keeps of merges, by numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from compose import bases
from compose.methods import Parameters
from compose.weights import Weight
from registry.catalog import Catalog
from registry.digests import DigestStream
from server.calibrations import Calibrations
from server.checkin import Declared, check_in
from server.merges import Merges
from server.pinned import Pinned
from server.stacks import Stacks
from tests.adapters import random_factors, write_kohya


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Stacks]:
    """Over a catalog of four adapters, `a0` to `a3`."""
    catalog = Catalog(tmp_path / "data")
    try:
        for seed in range(4):
            file = tmp_path / "adapter.safetensors"
            write_kohya(file, random_factors("pocket", seed=seed, rank=4))
            with catalog.blobs.upload() as upload:
                seen, data = DigestStream(), file.read_bytes()
                upload.write(data)
                seen.update(data)
                check_in(catalog, upload, Declared(name=f"a{seed}"), seen)
        yield Stacks(catalog, Calibrations(catalog, bases.find("pocket")))
    finally:
        catalog.close()


def test_prepared_stacks_stay_within_their_bytes_and_the_last_used_stays(stacks: Stacks) -> None:
    told = Parameters(rank=4)

    def pinned(first: int, second: int, weight: float = 0.5) -> tuple[Pinned, ...]:
        refs = [(f"a{first}", Weight(1.0)), (f"a{second}", Weight(weight))]
        return stacks.pin(refs, method="svd", parameters=told)

    free = Merges(stacks.shelf, Calibrations(stacks._catalog, bases.find("pocket")))
    free.merge(pinned(0, 1), "pocket", "svd", told)
    one = free.prepared_bytes()
    assert one > 0
    free.merge(pinned(0, 1, 0.7), "pocket", "svd", told)
    assert free.prepared_bytes() == one  # another weight, nothing more to keep
    free.merge(pinned(2, 3), "pocket", "svd", told)
    assert free.prepared_bytes() == 2 * one

    bounded = Merges(
        stacks.shelf, Calibrations(stacks._catalog, bases.find("pocket")), prepared_bytes=2 * one
    )
    for n, (first, second) in enumerate([(0, 1), (2, 3), (0, 1), (0, 2)]):  # the third asks for what is there
        bounded.merge(pinned(first, second, 0.1 * n + 0.3), "pocket", "svd", told)
        assert bounded.prepared_bytes() <= 2 * one
    asked = bounded.caches[1].hits
    bounded.merge(pinned(0, 1, 0.9), "pocket", "svd", told)
    assert bounded.caches[1].hits == asked + 1
    bounded.merge(pinned(2, 3, 0.9), "pocket", "svd", told)
    assert bounded.caches[1].hits == asked + 1  # it had made room

    tight = Merges(stacks.shelf, Calibrations(stacks._catalog, bases.find("pocket")), prepared_bytes=1)
    for first, second in ((0, 1), (2, 3)):
        tight.merge(pinned(first, second), "pocket", "svd", told)
        assert tight.prepared_bytes() == one
