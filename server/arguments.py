"""Command lines of the programs that `atelier` runs in its place: mistakes are one line, as everywhere."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong and where to look, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` shows what it takes\n")
