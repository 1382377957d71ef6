"""The same code on CUDA: exact on the way back, and the same merges."""

import numpy as np
import pytest
import torch

from compose import bases
from compose.difference import differences, total
from compose.formats.export import to_diffusers
from compose.groups import Adapter
from compose.interference import interference
from compose.methods import Parameters
from compose.projection import projection
from compose.warm import WarmPipeline, alone, warm_up
from tests.adapters import Layers, blend, delta, random_factors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(layers: Layers, device: str) -> Layers:
    return {name: factors.to(device) for name, factors in layers.items()}


def test_a_half_precision_base_is_rounded_once_and_restored_to_the_bit() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    one = random_factors("pocket", seed=1, rank=4)
    golden = {name: warm.live(name).clone() for name in one}
    warm.apply(alone(one))
    for name, factors in one.items():
        meant = (golden[name].float() + factors.up.cuda() @ factors.down.cuda()).half()
        torch.testing.assert_close(warm.live(name), meant, rtol=1e-3, atol=1e-4)
    warm.apply(())
    assert warm.is_golden()


@pytest.mark.parametrize("kept", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["naive", "svd", "orthogonal"])
def test_a_merge_on_the_gpu_is_the_merge_on_the_cpu(method: str, kept: str) -> None:
    stack = [(random_factors("pocket", seed=seed, rank=6), 0.5 + seed) for seed in range(3)]
    told = Parameters(rank=8) if method == "svd" else Parameters()
    here = blend(stack, method=method, parameters=told)
    stack = [(moved(layers, kept), weight) for layers, weight in stack]
    there = blend(stack, method=method, parameters=told, device="cuda")
    for name, factors in here.layers.items():
        mine, theirs = delta(factors), delta(there.layers[name]).cpu()
        assert (mine - theirs).norm() < 1e-4 * mine.norm()


def test_factors_on_the_gpu_are_projected_compared_and_inspected_as_in_memory() -> None:
    here = [random_factors("pocket", seed=seed, rank=6) for seed in range(2)]
    there = [moved(layers, "cuda") for layers in here]
    meant, found = (np.frombuffer(projection(layers[0]), np.float32) for layers in (here, there))
    assert np.abs(found - meant).max() < 1e-4 * np.abs(meant).max()
    assert total(differences(*there)).change == pytest.approx(total(differences(*here)).change, rel=1e-5)
    reports = [interference([Adapter(layers) for layers in stack]) for stack in (here, there)]
    assert reports[1].crosstalk(0, 1) == pytest.approx(reports[0].crosstalk(0, 1), rel=1e-4)
    assert to_diffusers(there[0], "pocket") == to_diffusers(here[0], "pocket")


def test_a_stack_is_the_same_to_the_bit_whatever_was_applied_before() -> None:
    warm = warm_up(bases.find("pocket"), device="cuda")
    one, two = (random_factors("pocket", seed=seed, rank=4) for seed in (1, 2))
    some = {name: f for i, (name, f) in enumerate(one.items()) if i % 3}
    warm.apply(alone(one))
    first = {name: warm.live(name).clone() for name in warm.layers()}
    for before in (some, two, {**two, **some}):
        warm.apply(alone(before))
        warm.apply(alone(one))
        assert all(torch.equal(warm.live(name), bits) for name, bits in first.items())


def test_golden_weights_in_host_memory_are_as_good() -> None:
    base = bases.find("pocket")
    for dtype in (torch.float16, torch.float32):
        pipeline = bases.load(base, device="cuda", dtype=dtype)
        warm = WarmPipeline(base, pipeline, golden_on_host=True)
        warm.apply(alone(random_factors("pocket", seed=1, rank=4)))
        assert not warm.is_golden()
        warm.apply(())
        assert warm.is_golden()
