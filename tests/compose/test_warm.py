"""Golden weights: exact, restored to the bit, and the same numbers as everybody else's."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from compose import pocket
from compose.arenas import Arena
from compose.bases import load
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.formats.export import to_diffusers
from compose.layerwise import Stack
from compose.warm import WarmPipeline, alone
from compose.weights import Weight
from tests.adapters import Layers, delta, random_factors


def live(warm: WarmPipeline) -> dict[str, torch.Tensor]:
    return {name: warm.live(name).clone() for name in warm.layers()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def one() -> Layers:
    return random_factors("pocket", seed=1, rank=4)


@pytest.fixture(scope="module")
def two() -> Layers:
    return random_factors("pocket", seed=2, rank=7, where=lambda n: "mid_block" in n or n.startswith("text"))


def test_a_then_b_then_a_then_none_is_what_it_was_the_first_time(
    warm: WarmPipeline, one: Layers, two: Layers
) -> None:
    warm.apply(())  # whoever had it before
    bare = live(warm)
    warm.apply(alone(one))
    first = live(warm)
    warm.apply(alone(two))
    assert not same(first, live(warm))
    warm.apply(alone(one))
    assert same(first, live(warm))
    warm.apply(())
    assert same(bare, live(warm))
    assert warm.is_golden()


def test_ten_thousand_rotating_switches_end_on_the_golden_bytes(
    warm: WarmPipeline, one: Layers, two: Layers
) -> None:
    names = list(two)[:6]
    stacks = [
        {n: Factors(two[n].up * w, two[n].down) for n in names[i:] if n in two}
        for i, w in enumerate((0.3, -1.0, 2.0))
    ]
    for turn in range(10_000):
        warm.apply(alone(stacks[turn % 3]))
    warm.apply(())
    assert warm.is_golden()


def test_live_weights_are_golden_plus_the_update(warm: WarmPipeline, one: Layers) -> None:
    bare = live(warm)
    warm.apply(alone(one))
    for name, factors in one.items():
        meant = bare[name].double() + delta(factors)
        torch.testing.assert_close(warm.live(name).double(), meant, rtol=1e-6, atol=1e-6)
    warm.apply(())


def test_the_weights_stay_where_they_are_in_memory(warm: WarmPipeline, one: Layers) -> None:
    before = {n: p.data_ptr() for n, p in warm.pipeline.unet.named_parameters()}
    warm.apply(alone(one))
    warm.apply(())
    assert before == {n: p.data_ptr() for n, p in warm.pipeline.unet.named_parameters()}


def test_the_same_key_is_nothing_to_do(warm: WarmPipeline, one: Layers) -> None:
    warm.apply(alone(one), key="one")
    marked = live(warm)
    warm.apply((), key="one")
    assert same(marked, live(warm))
    warm.apply((), key="none")
    assert warm.is_golden()


def test_a_failure_midway_leaves_the_golden_weights(warm: WarmPipeline, one: Layers) -> None:
    broken = dict(one)
    last = list(broken)[-1]
    broken[last] = Factors(broken[last].up, broken[last].down[:-1])
    with pytest.raises(RuntimeError):
        warm.apply(alone(broken), key="broken")
    assert warm.is_golden()
    misfit = Factors(one[last].up[:-1], one[last].down)
    for name, factors in (("unet.nowhere", one[last]), (last, misfit)):
        warm.apply(alone(one), key="kept")
        before = live(warm)
        with pytest.raises(IncompatibleBase, match=name):
            warm.apply(alone({name: factors}))
        assert same(before, live(warm))
        warm.apply(())
    warm.apply(alone(one), key="broken")
    assert not warm.is_golden()
    warm.apply(())


def test_golden_means_the_same_bits() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.zeros_(layer.weight)
    arena = Arena([("layer", layer)], golden_on_host=False)
    factors = Factors(torch.ones(4, 1), torch.ones(1, 4))
    arena.patch(["layer"], {"layer": [(factors, 1.0)]})
    assert not arena.is_golden()
    layer.weight.data.fill_(-0.0)  # equal to the golden ones, and other bits
    assert not arena.is_golden()
    arena.restore(["layer"])
    assert arena.is_golden()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft's word for a second adapter
def test_one_denoising_step_is_that_of_diffusers_with_set_adapters(
    warm: WarmPipeline, one: Layers, two: Layers, tmp_path: Path
) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    for name, layers in (("one", one), ("two", two)):
        (tmp_path / f"{name}.safetensors").write_bytes(to_diffusers(layers, "pocket"))
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(["one", "two"], [0.7, -0.4])
    assert any(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.text_encoder.modules())
    warm.apply([(one, Weight(0.7)), (two, Weight(-0.4))])
    latent = torch.randn(1, theirs.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = theirs.tokenizer("a red star", padding="max_length", return_tensors="pt").input_ids
    steps = []
    with torch.no_grad():
        for pipeline in (theirs, warm.pipeline):
            words = pipeline.text_encoder(tokens).last_hidden_state
            steps.append(pipeline.unet(latent, 500, words, return_dict=False)[0])
    warm.apply(())
    assert (steps[0] - steps[1]).norm() < 1e-5 * steps[0].norm()


class Unwanted(Exception):
    """What a `check` raises."""


class Patience:
    """A `check` that raises when it is called for the last of so many times."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Unwanted


def test_a_patch_that_is_called_off_between_arenas_leaves_what_the_next_stack_needs(
    warm: WarmPipeline, one: Layers, two: Layers
) -> None:
    def fresh() -> WarmPipeline:
        return WarmPipeline(warm.base, load(warm.base, device="cpu", dtype=torch.float32))

    def shown(pipeline: WarmPipeline, layers: Layers) -> dict[str, torch.Tensor]:
        pipeline.apply(alone(layers) if layers else (), key=len(layers))
        return live(pipeline)

    expected = {name: shown(fresh(), layers) for name, layers in (("two", two), ("none", {}))}
    counted = Patience(0)
    shown(tried := fresh(), one)
    tried.apply(alone(two), check=counted)
    arenas = -counted.left
    assert arenas > 3
    for number in range(1, arenas + 1):
        for after in ("two", "none"):
            interrupted = tried if number > 1 else fresh()
            shown(interrupted, one)
            with pytest.raises(Unwanted):
                interrupted.apply(alone(two), key="two", check=Patience(number))
            assert same(shown(interrupted, two if after == "two" else {}), expected[after])
    assert tried.is_golden()


class Failing(TorchDispatchMode):
    """Whatever torch does from the n-th operation on fails."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left, self.done = after, 0

    def __torch_dispatch__(
        self, call: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.left, self.done = self.left - 1, self.done + 1
        if self.left < 0:
            raise RuntimeError("the device is gone")
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("after", ["two", "one", "none"])
def test_when_putting_back_fails_as_well_the_next_stack_is_right_all_the_same(
    warm: WarmPipeline, one: Layers, two: Layers, after: str
) -> None:
    stacks: Mapping[str, Stack] = {"one": alone(one), "two": alone(two), "none": ()}
    expected = {}
    for name, stack in stacks.items():
        warm.apply(stack)
        expected[name] = live(warm)
    warm.apply(stacks["one"])
    with Failing(sys.maxsize) as counted:
        warm.apply(stacks["two"])
    for share in (0.1, 0.5, 0.9):
        warm.apply(stacks["one"], key="one")
        with pytest.raises(RuntimeError, match="the device is gone"), Failing(int(share * counted.done)):
            warm.apply(stacks["two"], key="two")
        warm.apply(stacks[after], key=after)
        assert same(live(warm), expected[after])
    warm.apply(())


def test_a_stack_that_is_there_asks_nobody(warm: WarmPipeline, one: Layers) -> None:
    warm.apply(alone(one), key="there")
    warm.apply(alone(one), key="there", check=Patience(1))
    warm.apply(alone(one), check=Patience(1))  # without a key, too: nothing is written
    warm.apply(())


def test_a_golden_copy_that_finds_no_room_leaves_the_weights_golden_and_the_next_stack_right(
    warm: WarmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = WarmPipeline(warm.base, load(warm.base, device="cpu", dtype=torch.float32))
    first, *_, last = fresh._arenas
    one, two = (
        alone(random_factors("pocket", seed=seed, rank=2, where=arena.names[:1].__contains__))
        for seed, arena in enumerate((first, last))
    )
    fresh.apply(one)
    with_one = fresh.live(first.names[0]).clone()

    def full(self: Arena) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Arena, "copied", full)
        with pytest.raises(torch.OutOfMemoryError):
            fresh.apply(two)
    assert fresh.is_golden()
    fresh.apply(one)
    assert torch.equal(fresh.live(first.names[0]), with_one)
    fresh.apply(two)
    fresh.apply(())
    assert fresh.is_golden()
