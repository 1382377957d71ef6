"""The merge methods, one file each, one signature: `run(group, parameters) -> Outcome`.

Adding a method is adding one file that holds a `METHOD`; its name is the file's, with hyphens.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from compose.methods.method import Method, Parameters

METHODS: Mapping[str, Method] = {
    info.name.replace("_", "-"): found
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: (info.name != "naive", info.name))
    if isinstance(
        found := getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHOD", None), Method
    )
}

__all__ = ["METHODS", "Method", "Parameters"]
