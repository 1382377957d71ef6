"""What becomes of errors that no code of ours raises."""

import grpc
import pytest
import torch

from server.errors import status


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_not_there_is_told_wherever_it_was_asked_for(error: Exception) -> None:
    code, message, _ = status(error)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "out of memory" in message


def test_a_fault_is_a_fault() -> None:
    assert status(RuntimeError("something else"))[0] is grpc.StatusCode.INTERNAL
