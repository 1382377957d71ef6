"""A kernel is relied on where it compiles and is right; elsewhere one line says why not."""

import logging

import pytest
import torch

from compose.compiling import goes


def fails() -> bool:
    raise RuntimeError("no C compiler:\n  set CC")


def full() -> bool:
    raise torch.OutOfMemoryError("everything is taken")


def test_a_kernel_that_does_not_go_or_is_wrong_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert goes("switching", lambda: True, "layer by layer")
    assert not caplog.records
    assert not goes("switching", fails, "layer by layer")
    assert not goes("switching", lambda: False, "layer by layer")
    assert [record.getMessage() for record in caplog.records] == [
        "switching: no kernel of our own here, but layer by layer (RuntimeError: no C compiler: set CC)",
        "switching: no kernel of our own here, but layer by layer (it comes out wrong)",
    ]
    assert all(record.levelno == logging.WARNING and not record.exc_info for record in caplog.records)


def test_want_of_memory_says_nothing_about_a_kernel(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        goes("switching", full, "layer by layer")
    assert not caplog.records
