"""The GPU's kernels on a CPU, by Triton's interpreter: where Triton is installed,
`TRITON_INTERPRET=1 pytest tests/compose/test_kernels.py`.
"""

import os

import numpy as np
import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET=1 interprets Triton's kernels", allow_module_level=True)
pytest.importorskip("triton")

from compose import bases, fused, jacobi
from compose.switchboard import CELL, Switchboard, tell
from compose.warm import WarmPipeline
from compose.weights import Weight
from tests.adapters import delta, random_factors

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_are_written_as_float64_says(dtype: torch.dtype) -> None:
    base = bases.find("pocket")
    warm = WarmPipeline(base, bases.load(base, device="cpu", dtype=dtype))
    kernel = fused.ready(CPU, [dtype])
    assert kernel
    warm._board = Switchboard(base.name, warm._arenas, kernel)
    golden = {name: warm.live(name).double() for name in warm.layers()}
    one = random_factors("pocket", seed=1, rank=20, where=lambda _: True)
    two = random_factors("pocket", seed=2, rank=7, where=lambda name: "mid_block" in name)
    warm.apply(((one, Weight(0.7)), (two, Weight(-0.4))))
    for name in one:
        meant = golden[name] + 0.7 * delta(one[name]) - (0.4 * delta(two[name]) if name in two else 0)
        rounding = torch.finfo(dtype).eps * meant.abs() + 1e-6
        assert ((warm.live(name).double() - meant).abs() <= rounding).all(), name
    warm.apply(())
    assert warm.is_golden()


@pytest.mark.parametrize("aligned", [True, False])
def test_what_has_nothing_on_is_golden_to_the_bit(aligned: bool) -> None:
    golden = torch.randn(70, 40)
    golden[::2] = -0.0
    live = torch.ones_like(golden)
    table = torch.tensor(
        [[live.data_ptr(), golden.data_ptr(), 70, 40, 0, *tell(np.zeros((1, CELL), np.int64))[0]]]
    )
    fused.Fused()(table, torch.zeros(2, dtype=torch.int32), torch.float32, aligned=aligned, even=True)
    assert torch.equal(live.view(torch.int32), golden.view(torch.int32))


def test_a_kernel_that_does_not_run_is_not_ready_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forget() -> None:
        fused._goes.cache_clear()
        jacobi.ready.cache_clear()

    forget()
    monkeypatch.setattr(fused, "_write", None)
    monkeypatch.setattr(jacobi, "_orthogonalise", None)
    assert not any(fused.ready(CPU, [torch.float32]) or jacobi.ready(CPU) for _ in range(2))
    assert len(caplog.records) == 2
    monkeypatch.undo()
    forget()
    assert fused.ready(CPU, [torch.float32])
    assert not fused.ready(CPU, [torch.float32, torch.float64])
    assert jacobi.ready(CPU)
    assert len(caplog.records) == 2


def test_a_kernel_that_is_wrong_for_one_kind_of_layer_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_whole_rows(self: fused.Fused, *table: object, aligned: bool, even: bool) -> None:
        if aligned:
            written(self, *table, aligned=aligned, even=even)

    written = fused.Fused.__call__
    fused._goes.cache_clear()
    monkeypatch.setattr(fused.Fused, "__call__", only_whole_rows)
    assert not fused.ready(CPU, [torch.float32])
    fused._goes.cache_clear()


@pytest.mark.parametrize("size", [1e-120, 1e-80, 1e80, 1e120])
def test_eigenvectors_of_very_small_and_very_large_matrices_are_lapacks(size: float) -> None:
    X = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = X @ X.mT
    values, vectors = jacobi.eigh(M * size)
    torch.testing.assert_close(values / size, torch.linalg.eigvalsh(M), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vectors @ torch.diag_embed(values / size) @ vectors.mT, M)


def test_values_that_go_down_to_rounding_have_orthogonal_eigenvectors() -> None:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(48, 48, generator=g, dtype=torch.float64)).Q
    meant = torch.logspace(-14, 0, 48, dtype=torch.float64)
    values, vectors = jacobi.eigh(((Q * meant) @ Q.mT)[None])
    torch.testing.assert_close(values[0], meant, rtol=0, atol=1e-13)
    kept = vectors[0, :, meant > 2e-14]
    torch.testing.assert_close(kept.mT @ kept, torch.eye(kept.shape[1], dtype=torch.float64))


def test_a_matrix_of_no_rows_has_no_values() -> None:
    values, vectors = jacobi.eigh(torch.zeros(2, 0, 0, dtype=torch.float64))
    assert (values.shape, vectors.shape) == ((2, 0), (2, 0, 0))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 20, 33])
def test_eigenvectors_are_lapacks(n: int) -> None:
    X = torch.randn(2, n, n + 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    M = X @ X.mT
    values, vectors = jacobi.eigh(M)
    torch.testing.assert_close(
        values, torch.linalg.eigvalsh(M), rtol=1e-12, atol=1e-12 * float(M.abs().max())
    )
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, M, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=torch.float64).expand_as(M))


def test_a_matrix_of_lower_rank_has_its_values_and_zeros() -> None:
    X = torch.randn(1, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = torch.cat([X @ X.mT, torch.zeros(1, 10, 10), torch.eye(10)[None] * 3])
    values, vectors = jacobi.eigh(M)
    assert (values[0, :6] < 1e-13 * values[0, -1]).all()
    assert not values[1].any()
    torch.testing.assert_close(values[2], torch.full((10,), 3.0, dtype=torch.float64))
    kept = torch.where(values > 1e-13 * values[:, -1:], values, 0)
    torch.testing.assert_close(vectors @ torch.diag_embed(kept) @ vectors.mT, M, rtol=1e-10, atol=1e-10)


def test_nan_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        jacobi.eigh(torch.full((1, 4, 4), torch.nan, dtype=torch.float64))
