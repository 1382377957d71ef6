"""One budget for everything: what is counted, who goes, who is refused; in bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compose import bases
from compose.arenas import arenas, pinned_bytes
from compose.errors import InvalidRequest, NoRoom
from compose.ledger import Ledger
from compose.residence import Residence, check_room, estimate, golden_on_host, held, needs
from compose.warm import WarmPipeline, alone, warm_up
from tests.adapters import random_factors
from tests.pipelines import tiny


def filled(ledger: Ledger, freed: list[object], **sizes: int) -> None:
    for name, size in sizes.items():
        ledger.claim("adapters", name, size, free=lambda name=name: freed.append(name))  # type: ignore[misc]


def test_what_was_used_least_recently_goes_first_and_no_more_than_must() -> None:
    ledger, freed = Ledger(100), list[object]()
    filled(ledger, freed, a=30, b=30, c=30)
    ledger.touch("adapters", "a")
    filled(ledger, freed, d=30)
    assert freed == ["b"]
    ledger.claim("merges", "m", 41, free=lambda: freed.append("m"))
    assert freed == ["b", "c", "a"]
    assert ledger.parts() == {"adapters": 30, "merges": 41}
    ledger.claim("merges", "m", 20, free=lambda: freed.append("m"))  # smaller than it was
    assert (ledger.used(), freed) == (50, ["b", "c", "a"])
    ledger.release("merges", "m")
    ledger.release("merges", "m")
    assert ledger.parts() == {"adapters": 30}


def test_what_finds_no_room_is_refused_and_nothing_goes() -> None:
    ledger, freed = Ledger(100_000_000), list[object]()
    ledger.claim("scorer", "clip", 40_000_000)  # stays
    filled(ledger, freed, a=50_000_000)
    with pytest.raises(NoRoom, match="hero:1 needs 61 MB, and beside the 40 MB that stay the budget"):
        ledger.claim("adapters", "hero", 60_000_001, free=lambda: None, what="hero:1")
    assert (ledger.used(), freed) == (90_000_000, [])
    filled(ledger, freed, b=60_000_000)
    assert (ledger.used(), freed) == (100_000_000, ["a"])


def test_what_is_owned_is_freed_by_its_owner_alone_when_the_room_is_owed() -> None:
    ledger, freed = Ledger(100), list[object]()

    def base(name: str, size: int) -> None:
        parts = {"bases": size, "golden": size}
        ledger.claim("bases", name, parts, free=lambda: freed.append(name), owned=True)

    base("old", 20)
    base("new", 20)
    filled(ledger, freed, a=50)  # over the budget by what `old` will make room for
    assert (ledger.used(), freed) == (130, [])
    with pytest.raises(NoRoom):
        filled(ledger, freed, b=61)  # beside `new`, which works, there is no room for it
    base("new", 20)
    assert (ledger.parts(), freed) == ({"bases": 20, "golden": 20, "adapters": 50}, ["old"])
    base("other", 26)
    assert freed == ["old", "a"]  # used before `new` was


@given(
    st.lists(
        st.tuples(st.sampled_from(["claim", "touch", "release"]), st.integers(0, 5), st.integers(0, 60)),
        max_size=40,
    )
)
def test_what_is_counted_is_what_is_there_and_never_more_than_the_budget(
    acts: list[tuple[str, int, int]],
) -> None:
    ledger, there = Ledger(100), dict[int, int]()
    for act, name, size in acts:
        if act == "claim":
            ledger.claim("x", name, size, free=lambda name=name: there.pop(name))  # type: ignore[misc]
            there[name] = size
        elif act == "touch":
            ledger.touch("x", name)
        else:
            ledger.release("x", name)
            there.pop(name, None)
        assert ledger.used() == sum(there.values()) <= 100


def test_a_base_counts_with_what_its_golden_copies_may_grow_to(warm: WarmPipeline) -> None:
    fresh = warm_up(bases.find("pocket"))
    parts = held(fresh)
    assert parts["bases"] == sum(
        p.nbytes
        for part in ("unet", "vae", "text_encoder")
        for p in getattr(fresh.pipeline, part).parameters()
    )
    assert parts["golden"] == sum(fresh.live(name).nbytes for name in fresh.layers())
    assert fresh.nbytes() == parts["bases"]  # none of it is there yet
    fresh.apply(alone(random_factors("pocket", seed=1, rank=1, where=lambda name: True)))
    assert fresh.nbytes() == parts["bases"] + parts["golden"]
    assert parts["bases"] + parts["golden"] <= needs(fresh.base, fresh.device) + 256 * 4 * 64 * 2


def test_bases_and_adapters_share_one_budget_and_the_least_used_of_all_goes(
    warm: WarmPipeline, tmp_path: Path
) -> None:
    small = bases.find(f"small={tiny('sdxl', tmp_path / 'small')}")
    mine, theirs = sum(held(warm).values()), needs(small, warm.device)
    residence, freed = Residence(warm, [small], budget=mine + theirs + 1000), list[object]()
    ledger = residence.ledger
    assert ledger.used() == mine
    filled(ledger, freed, a=900)
    assert residence.warm("small").base.name == "small"
    exact = sum(held(residence.warm("small")).values())
    assert ledger.used() == mine + exact + 900
    filled(ledger, freed, b=theirs - exact + 1000)  # only what was used before pocket and small: a
    assert (freed, residence.held()) == (["a"], mine + exact)
    residence.warm("pocket")
    filled(ledger, freed, c=theirs + 600)  # b goes, and small will: pocket is at work
    assert freed == ["a", "b"]
    assert [w.base.name for w in residence.loaded()] == ["small", "pocket"]
    residence.warm("pocket")
    assert [w.base.name for w in residence.loaded()] == ["pocket"]
    assert (ledger.used(), freed) == (mine + theirs + 600, ["a", "b"])


def test_a_base_that_fails_to_load_is_not_counted(warm: WarmPipeline, tmp_path: Path) -> None:
    path = tiny("sdxl", tmp_path / "small")
    small = bases.find(f"small={path}")
    residence = Residence(warm, [small])
    before = residence.ledger.parts()
    (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(Exception, match="cannot be loaded"):
        residence.warm("small")
    assert residence.ledger.parts() == before


def test_a_base_whose_golden_copy_finds_no_room_on_the_host_is_not_counted(
    warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(warm.base, name="other")
    residence = Residence(warm, [other], host_budget=10)
    before = residence.ledger.parts()
    monkeypatch.setattr("compose.residence.golden_on_host", lambda *_: True)  # as on a GPU that is small
    with pytest.raises(NoRoom, match="the golden copy of other needs"):
        residence.warm("other")
    assert (residence.ledger.parts(), residence.host.parts()) == (before, {})
    assert [w.base.name for w in residence.loaded()] == ["pocket"]


def test_bases_have_what_the_scorer_leaves_of_the_budget(warm: WarmPipeline) -> None:
    other = replace(warm.base, name="other")
    budget = needs(other, warm.device) + 1000
    Residence(warm, [other], budget=budget, taken=1000)
    with pytest.raises(
        InvalidRequest, match=r"other needs .*, of which the scorer takes 1 MB; raise --memory"
    ):
        Residence(warm, [other], budget=budget, taken=1001)
    with pytest.raises(InvalidRequest, match="pocket needs"):
        Residence(warm, budget=sum(held(warm).values()), taken=1)


def test_golden_copies_are_placed_within_what_the_scorer_leaves(
    warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, asked = replace(warm.base, name="other"), list[int]()
    monkeypatch.setattr("compose.residence.golden_on_host", lambda *a: asked.append(a[2]))  # the CPU has none
    Residence(warm, [other], budget=10**9, taken=1000).warm("other")
    assert asked == [10**9 - 1000]


def test_pinned_memory_counts_as_the_power_of_two_that_it_takes() -> None:
    assert [pinned_bytes(n) for n in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    (arena,) = arenas([("a", torch.nn.Linear(3, 5))], golden_on_host=True)
    assert arena.golden_bytes() == arena.live.nbytes == 60  # on a CPU nothing is pinned
    arena.golden_is_on_host = True
    assert arena.golden_bytes() == 64


def test_golden_copies_go_to_the_host_where_the_budget_of_a_gpu_does_not_hold_them() -> None:
    base, gpu, cpu = bases.find("pocket"), torch.device("cuda"), torch.device("cpu")
    parts = estimate(base, gpu)
    assert parts["bases"] == parts["golden"] == 2 * base.parameters  # half precision
    assert not golden_on_host(base, gpu, 4 * base.parameters)
    assert golden_on_host(base, gpu, 4 * base.parameters - 1)
    check_room("pocket", parts, gpu, 2 * base.parameters)
    for device, most in ((gpu, 2 * base.parameters - 1), (cpu, 8 * base.parameters - 1)):
        assert not golden_on_host(base, cpu, most)
        with pytest.raises(InvalidRequest, match="raise --memory, or leave it out"):
            check_room("pocket", estimate(base, device), device, most)
