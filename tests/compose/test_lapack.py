"""Eigenproblems by several threads: the same to the bit, and nobody else's threads are touched."""

import threading

import pytest
import torch

from compose import lapack
from compose.methods.elementwise import factored


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def symmetric(n: int, size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    X = torch.randn(n, size, size, generator=g, dtype=torch.float64)
    return X @ X.mT


@pytest.mark.parametrize(("n", "size"), [(2, 96), (9, 64), (40, 32), (1, 300), (2, 64), (1, 1)])
def test_a_matrix_comes_out_as_from_one_thread(two_threads: None, n: int, size: int) -> None:
    batch = symmetric(n, size)
    values, vectors = lapack.eigh(batch)
    torch.set_num_threads(1)
    meant = [torch.linalg.eigh(matrix) for matrix in batch]
    assert torch.equal(values, torch.stack([found for found, _ in meant]))
    assert torch.equal(vectors, torch.stack([found for _, found in meant]))


def test_the_threads_have_one_thread_each_and_all_others_theirs(two_threads: None) -> None:
    lapack.start()
    inside = lapack._pools[0].submit(torch.get_num_threads).result(10)
    told: list[int] = []
    new = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
    new.start()
    new.join(10)
    assert (inside, told, torch.get_num_threads()) == (1, [2], 2)


@pytest.mark.parametrize("shape", [(320, 320), (320, 40)])
def test_a_dense_merge_is_factored_the_same_by_any_number_of_threads(
    two_threads: None, shape: tuple[int, int]
) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    both = factored(matrix, 16, seed=2)
    torch.set_num_threads(1)
    one = factored(matrix, 16, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(both[:2], one[:2], strict=True))
