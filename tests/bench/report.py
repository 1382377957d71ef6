"""What every benchmark shares: repeated timing, ratios with their spread, and a JSON file with the machine's
description.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch

RESULTS = Path(__file__).parent / "results"


def timed(work: Callable[[], object], *, device: str = "cpu") -> float:
    """Seconds one call takes, the device's queue included, which is empty before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """theirs / ours: of the medians, and the least and the most favourable of all pairs."""
    return {
        "median": statistics.median(theirs) / statistics.median(ours),
        "min": min(theirs) / max(ours),
        "max": max(theirs) / min(ours),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "unknown",
    )
    return {
        "cpu": f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def save(name: str, result: dict[str, Any], *, device: str = "cpu") -> None:
    """Prints the result and writes results/NAME.json (on a GPU: NAME-cuda.json)."""
    result = {**result, "machine": machine(device)}
    text = json.dumps(result, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}{'' if device == 'cpu' else '-cuda'}.json").write_text(text + "\n")
