"""Factors where a server keeps them, on its GPU, without one: torch's fake tensors have a device and no
numbers, and refuse what would mix two.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compose import projection
from compose.factors import Factors
from compose.groups import Adapter, group
from compose.moments import Moment

GPU = "cuda:0"


@pytest.fixture(autouse=True)
def no_numbers() -> Iterator[None]:
    projection._signs.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    projection._signs.cache_clear()  # or the next tests would get fake ones


def factors(device: str) -> Factors:
    return Factors(torch.empty(300, 2, device=device), torch.empty(2, 260, device=device))


@pytest.mark.parametrize("stack", [(GPU, GPU), (GPU, "cpu"), ("cpu", GPU), ("cpu", "cpu")])
@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_a_stack_is_batched_on_one_device_wherever_its_adapters_are(
    stack: tuple[str, str], device: str
) -> None:
    moments = {"unet.x": Moment(torch.empty(260), torch.empty(260, 3))}
    adapters = [Adapter({"unet.x": factors(where)}, moments=moments) for where in stack]
    (batch,) = group(adapters, device)
    assert (batch.up.shape, batch.down.shape) == ((1, 300, 4), (1, 4, 260))
    parts = [t for m in batch.members for t in (m.up, m.down, m.weight)]
    parts += [t for m in batch.moments.values() for t in (m.diagonal, m.factor)]
    assert {str(t.device) for t in (batch.up, batch.down, *parts)} == {device}


def test_a_merge_on_a_gpu_is_projected_and_the_projection_is_in_memory() -> None:
    assert projection._sketch("unet.x", factors(GPU)).device == torch.device("cpu")
