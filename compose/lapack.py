"""Decompositions of small matrices, many at a time.

On a GPU its library takes one matrix after the other; where Triton is, our own kernel takes all at once
(`compose.jacobi`). On a CPU torch hands a batch to LAPACK one matrix after the other, and lets it have every
thread for each: at the size of a stack's summed rank most of them wait. Here every thread takes its share of
the matrices, and works on each alone, so that a matrix comes out the same however many threads there are.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from compose.threads import heed

T = TypeVar("T")

WORTH_SPLITTING = 1 << 20
"""Of a batch, the number of matrices times the cube of their size: below, one thread takes them all."""

_starting = threading.Lock()
_pools: list[ThreadPoolExecutor] = []  # none, or the one


def start() -> None:
    """Starts the threads, as many as torch has here; else the first large batch does it.

    A server does it before its other threads: how many threads a thread has is told to it when it first asks
    torch for something, and for an instant that is 1 for all.
    """
    threads = torch.get_num_threads()
    with _starting:
        if _pools or threads < 2:
            return
        ready = threading.Barrier(threads + 1)

        def ready_alone() -> None:
            heed()
            torch.set_num_threads(1)  # for this thread, and for those that ask from now on
            ready.wait()

        pool = ThreadPoolExecutor(threads, "lapack", ready_alone)
        for _ in range(threads):
            pool.submit(int)  # nothing; a thread is started for each, as none is free yet
        ready.wait()
        torch.set_num_threads(threads)
        _pools.append(pool)


def alone(work: Callable[[Tensor], T], on: Tensor) -> T:
    """`work(on)`, by one thread if it is on a CPU."""
    if on.is_cuda or torch.get_num_threads() < 2:
        return work(on)
    start()
    return _pools[0].submit(work, on).result()


def eigh(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues `[L, n]` and eigenvectors `[L, n, n]` of symmetric positive semidefinite matrices
    `[L, n, n]`. Eigenvectors of values that are rounding, below 1e-14 of the largest, may be anything.
    """
    if batch.is_cuda:
        jacobi = _jacobi(batch.device)
        if jacobi and batch.shape[-1] <= jacobi.LARGEST:
            pair: tuple[Tensor, Tensor] = jacobi.eigh(batch)
            return pair
        values, vectors = torch.linalg.eigh(batch)
        return values, vectors
    threads = min(torch.get_num_threads(), len(batch))
    if threads < 2 or len(batch) * batch.shape[-1] ** 3 < WORTH_SPLITTING:
        values, vectors = alone(torch.linalg.eigh, batch)
        return values, vectors
    start()
    found = list(_pools[0].map(torch.linalg.eigh, batch.tensor_split(threads)))
    return torch.cat([values for values, _ in found]), torch.cat([vectors for _, vectors in found])


@cache
def _jacobi(device: torch.device) -> ModuleType | None:
    try:
        from compose import jacobi
    except ImportError:  # Triton is not there for every system
        return None
    return jacobi if jacobi.ready(device) else None
