"""The table that switches a stack in one launch, on a CPU: its layers are written by numpy, from the same
addresses as the kernel's (which `test_gpu` tries).
"""

import ctypes
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from compose.bases import load
from compose.errors import IncompatibleBase
from compose.factors import Factors
from compose.factors import Layers as Kept
from compose.switchboard import PART, PROGRAMS, Switchboard
from compose.warm import WarmPipeline, alone
from compose.weights import Weight
from tests.adapters import Layers, random_factors


class ByNumpy:
    """Writes the layers of a table as the kernel does; remembers how many, and may fail."""

    tile = (64, 32)

    def __init__(self) -> None:
        self.written: list[int] = []
        self.fails = False

    def __call__(
        self, table: Tensor, owner: Tensor, dtype: torch.dtype, *, aligned: bool, even: bool
    ) -> None:
        self.written.append(len(table))
        programs = np.bincount(owner.numpy(), minlength=len(table))
        for row, (live, golden, d, k, first, number, back, *parts) in enumerate(table.tolist()):
            assert programs[row] == -(-d // self.tile[0]) * -(-k // self.tile[1])
            assert owner[first] == row
            assert first == 0 or owner[first - 1] == row - 1
            assert not aligned or (k * dtype.itemsize % 16 == 0 and live % 16 == 0)
            total = _at(golden, (d, k)).copy()
            for up, down, rank, up_by, down_by in batched(parts)[:number]:
                assert rank
                assert not even or (rank % 4 == 0 and up % 16 == 0)
                left = _single(up_by) * _at(up, (d, rank))
                right = _single(down_by) * _at(down, (rank, k))
                assert max(abs(left).max(), abs(right).max()) < 2**15  # a float16 holds it
                total += _single(back) * (left @ right)
            _at(live, (d, k))[:] = total
            if self.fails:
                raise RuntimeError("the device is gone")


def batched(parts: list[int]) -> list[tuple[int, ...]]:
    return list(zip(*[iter(parts)] * PART, strict=True))


def _single(bits: int) -> np.float32:
    return np.int32(bits).view(np.float32)


def _at(address: int, shape: tuple[int, int]) -> np.ndarray:
    memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)


@pytest.fixture(scope="module")
def pair(warm: WarmPipeline) -> tuple[WarmPipeline, WarmPipeline, ByNumpy]:
    """One pipeline with a switchboard, one without."""
    kernel = ByNumpy()
    board, plain = (WarmPipeline(warm.base, load(warm.base, device="cpu", dtype=torch.float32)) for _ in "ab")
    board._board = Switchboard(board.base.name, board._arenas, kernel)
    return board, plain, kernel


@pytest.fixture
def board(pair: tuple[WarmPipeline, WarmPipeline, ByNumpy]) -> Iterator[WarmPipeline]:
    """A golden pipeline with a switchboard, which is golden again afterwards."""
    yield pair[0]
    pair[2].fails = False
    pair[0].apply(())
    assert pair[0].is_golden()


@pytest.fixture
def plain(pair: tuple[WarmPipeline, WarmPipeline, ByNumpy]) -> WarmPipeline:
    """The same base, patched layer by layer."""
    return pair[1]


@pytest.fixture
def kernel(pair: tuple[WarmPipeline, WarmPipeline, ByNumpy]) -> ByNumpy:
    """What writes the board's layers."""
    pair[2].written.clear()
    return pair[2]


def some(name: str) -> bool:
    """Layers of the middle, and of the text encoder."""
    return "mid_block" in name or name.startswith("text")


ONE = Kept(random_factors("pocket", seed=1, rank=4))
TWO = Kept(random_factors("pocket", seed=2, rank=7, where=some))
STACKS = (
    alone(ONE),
    ((ONE, Weight(0.7)), (TWO, Weight(-0.4))),
    ((TWO, Weight(-0.4)), (ONE, Weight(0.7))),
    ((ONE, Weight(0.7, (("text_encoder", 0.0), ("up_blocks", 0.5)))), (TWO, Weight(0.0))),
    (),
)


def live(warm: WarmPipeline) -> dict[str, Tensor]:
    return {name: warm.live(name).clone() for name in warm.layers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("factors", [(), (0.5, 0.0)])
def test_a_stack_comes_out_as_layer_by_layer(
    board: WarmPipeline, plain: WarmPipeline, factors: tuple[float, ...]
) -> None:
    for stack in STACKS:
        for warm in (board, plain):
            warm.apply(stack, factors=factors[: len(stack)])
        for name, weight in live(plain).items():
            torch.testing.assert_close(board.live(name), weight, rtol=1e-6, atol=1e-6)
        assert board.text_key("it") == plain.text_key("it")


def test_what_a_stack_comes_to_does_not_depend_on_what_was_there(board: WarmPipeline) -> None:
    first = []
    for stack in STACKS:
        board.apply(())
        board.apply(stack)
        first.append(live(board))
    for before in STACKS:
        for stack, meant in zip(STACKS, first, strict=True):
            board.apply(before)
            board.apply(stack)
            assert same(live(board), meant)


def test_numbers_too_large_for_the_kernel_come_out_layer_by_layer(
    board: WarmPipeline, plain: WarmPipeline, kernel: ByNumpy
) -> None:
    name = next(iter(ONE))
    for size in (2.0**30, 2.0**60):
        board.apply(())
        kernel.written.clear()
        large = Kept({name: Factors(ONE[name].up * size, ONE[name].down / size)})
        for warm in (board, plain):
            warm.apply(((large, Weight(0.5)),))
        torch.testing.assert_close(board.live(name), plain.live(name), rtol=1e-5, atol=1e-6)
        assert bool(kernel.written) == (size < 2.0**40)


def test_only_layers_that_differ_are_written(board: WarmPipeline, kernel: ByNumpy) -> None:
    board.apply(alone(ONE))
    assert sum(kernel.written) == len(ONE)
    kernel.written.clear()
    board.apply(((ONE, Weight()), (TWO, Weight(0.5))))
    assert sum(kernel.written) == len(TWO)
    kernel.written.clear()
    board.apply(((ONE, Weight()), (TWO, Weight(0.5))), check=lambda: pytest.fail("nothing is written"))
    board.apply(((ONE, Weight()), (Kept(TWO), Weight(0.5))))  # the same factors in another mapping
    assert not kernel.written


def test_a_dora_layer_goes_the_other_way_and_back(board: WarmPipeline, plain: WarmPipeline) -> None:
    name = next(iter(TWO))
    dora = Kept({name: Factors(TWO[name].up, TWO[name].down, torch.ones(len(TWO[name].up), 1))})
    for stack in (alone(ONE), ((ONE, Weight(0.3)), (dora, Weight(0.8))), alone(ONE), alone(dora), alone(TWO)):
        for warm in (board, plain):
            warm.apply(stack)
        for layer, weight in live(plain).items():
            torch.testing.assert_close(board.live(layer), weight, rtol=1e-6, atol=1e-6)


def test_after_a_failure_every_layer_is_golden_and_the_next_stack_right(
    board: WarmPipeline, kernel: ByNumpy
) -> None:
    board.apply(alone(ONE), key="one")
    meant = live(board)
    kernel.fails = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        board.apply(alone(TWO), key="two")
    assert board.is_golden()
    kernel.fails = False
    board.apply(alone(ONE), key="one")
    assert same(live(board), meant)


def test_when_putting_back_fails_as_well_the_next_stack_is_right_all_the_same(
    board: WarmPipeline, kernel: ByNumpy, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.apply(alone(ONE))
    meant = live(board)
    kernel.fails = True
    with monkeypatch.context() as patched:
        patched.setattr("compose.arenas.Arena.restore", _nor_read)
        with pytest.raises(RuntimeError, match="nor can it be read"):
            board.apply(alone(TWO))
    kernel.fails = False
    board.apply(alone(ONE))
    assert same(live(board), meant)


def _nor_read(*_: object) -> None:
    raise RuntimeError("nor can it be read")


@pytest.mark.parametrize("stack", [alone(TWO), ()])
def test_what_is_called_off_changes_nothing(board: WarmPipeline, stack: tuple) -> None:
    board.apply(alone(ONE), key="one")
    before = live(board)

    def unwanted() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        board.apply(stack, key="other", check=unwanted)
    assert same(live(board), before)


def test_a_layer_that_the_base_does_not_have_changes_nothing(board: WarmPipeline) -> None:
    board.apply(alone(ONE), key="one")
    before, name = live(board), next(iter(ONE))
    for layers in ({"unet.nowhere": ONE[name]}, {name: Factors(ONE[name].up[:-1], ONE[name].down)}):
        with pytest.raises(IncompatibleBase, match="pocket has no"):
            board.apply(alone(layers))
    with pytest.raises(RuntimeError, match="do not multiply"):
        board.apply(alone({name: Factors(ONE[name].up, ONE[name].down[:-1])}))
    assert same(live(board), before)


def test_what_is_known_of_an_adapter_goes_with_it(board: WarmPipeline) -> None:
    assert board._board
    known = len(board._board._known)
    mine = Kept(random_factors("pocket", seed=3, rank=2, where=some))
    factor = torch.utils.weak.WeakTensorKeyDictionary({next(iter(mine.values())).up: True})
    board.apply(alone(mine))
    assert len(board._board._known) == known + 1
    del mine
    gc.collect()
    assert len(board._board._known) == known
    assert len(factor) == 1  # it is on: what the table tells by address stays
    board.apply(())
    gc.collect()
    assert not len(factor)


def test_what_the_device_holds_of_many_ways_is_bounded_and_each_is_right_again(board: WarmPipeline) -> None:
    assert board._board
    stacks = [alone(Kept({name: ONE[name]})) for name in list(ONE)[: PROGRAMS + 2]]
    first = []
    for stack in stacks:
        board.apply(())
        board.apply(stack)
        first.append(live(board))
    assert len(board._board._programs) == PROGRAMS
    for stack, meant in zip(stacks, first, strict=True):  # ways that are kept, whose programs are gone
        board.apply(())
        board.apply(stack)
        assert same(live(board), meant)


def test_a_pipeline_that_is_let_go_is_gone_at_once(board: WarmPipeline) -> None:
    fresh = WarmPipeline(board.base, load(board.base, device="cpu", dtype=torch.float32))
    fresh._board = Switchboard(fresh.base.name, fresh._arenas, ByNumpy())
    fresh.apply(alone(ONE))
    gone = weakref.ref(fresh._arenas[0])
    gc.collect()
    gc.disable()
    try:
        del fresh
        assert gone() is None
    finally:
        gc.enable()


def test_factors_that_do_not_lie_in_rows_are_read_right(board: WarmPipeline, plain: WarmPipeline) -> None:
    turned: Layers = {n: Factors(f.up.T.contiguous().T, f.down.T.contiguous().T) for n, f in TWO.items()}
    odd = {n: Factors(torch.cat([f.up[:, :1], f.up], 1)[:, 1:], f.down) for n, f in TWO.items()}
    plain.apply(alone(TWO))
    for layers in (turned, odd):
        board.apply(alone(layers))
        for name, weight in live(plain).items():
            torch.testing.assert_close(board.live(name), weight, rtol=1e-6, atol=1e-6)
