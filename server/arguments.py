"""Command lines of the programs that `atelier` runs in its place: mistakes are one line, as everywhere, and
whoever stops reading gets no error.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong and where to look, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` shows what it takes\n")


@contextmanager
def while_read() -> Iterator[None]:
    """Ends the program, quietly and with status 1, when whoever reads its output has seen enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
