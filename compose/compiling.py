"""Kernels of our own, which Triton compiles: each is tried before it is relied on.

Triton is not there for every system, needs a C compiler, and does not know every GPU. Where a kernel does not
go, torch's own way is taken, and one line of the log says so.
"""

import logging
from collections.abc import Callable

import torch


def goes(what: str, is_right: Callable[[], bool], instead: str) -> bool:
    """Whether a kernel runs and is right; warns where it is not. What finds no memory says nothing about a
    kernel, and is raised.
    """
    try:
        if is_right():
            return True
        why = "it comes out wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises whatever its compiler, its driver or Python does
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    logging.getLogger(__name__).warning("%s: no kernel of our own here, but %s (%s)", what, instead, why)
    return False
