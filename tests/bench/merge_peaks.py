"""How much memory a merge takes beyond what lies there before it, ours and peft's svd, each in a process of
its own: three adapters (16 + 16 + 32) on the SD 1.5 UNet's attention layers, and with its feed-forward ones.

Run: `python -m tests.bench.merge_peaks`. Linux alone tells a process's peak from a moment on.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from compose.merging import Prepared
from compose.methods import Parameters
from compose.weights import Weight
from tests.bench.merge_methods import CASES, shapes, stack
from tests.bench.report import ratio, save, spread

FAMILY, RANKS, RESULT, COMPONENT = CASES["sd1 3 x rank 16"]
ROUNDS = 2


def layers(kind: str) -> dict[str, tuple[int, int]]:
    """`attention`, or `all` that the other benchmarks merge."""
    found = shapes(FAMILY, COMPONENT)
    return {name: shape for name, shape in found.items() if kind == "all" or ".ff." not in name}


class _Layers(nn.Module):
    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        for i, (d, k) in enumerate(sizes):
            self.add_module(f"layer{i}", nn.Linear(k, d, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Never called."""
        return x


def theirs(kind: str) -> None:
    """peft's merge."""
    sizes = list(layers(kind).values())
    targets = [f"layer{i}" for i in range(len(sizes))]
    first, *others = (
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
        for rank in RANKS
    )
    model = peft.PeftModel(_Layers(sizes), first, adapter_name="a0")
    for i, config in enumerate(others, 1):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(len(RANKS))]
    _begin()
    model.add_weighted_adapter(names, [1.0] * len(names), "m", combination_type="svd", svd_rank=RESULT)


def ours(kind: str) -> None:
    """Atelier's, which keeps for the next one what no weight changes."""
    prepared = Prepared(stack(layers(kind), RANKS, "cpu"))
    _begin()
    weights = [Weight(1.0) for _ in RANKS]
    merged = prepared.merge(weights, method="svd", parameters=Parameters(rank=RESULT))
    assert len(merged.layers) == len(layers(kind))


_before = 0


def _status(name: str) -> int:
    """Bytes, by the system's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _begin() -> None:
    global _before
    matrix = torch.eye(64, dtype=torch.float64)
    torch.linalg.svd(matrix), torch.linalg.eigh(matrix)  # the libraries are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    _before = _status("VmRSS")


def measured(who: str, kind: str) -> float:
    """Bytes, in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.merge_peaks", who, kind],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    """Measures, prints, writes results/merge_peaks.json."""
    results: dict[str, object] = {"ranks": RANKS, "result_rank": RESULT}
    for kind in ("attention", "all"):
        pairs = [(measured("ours", kind), measured("theirs", kind)) for _ in range(ROUNDS)]
        mine, peer = zip(*pairs, strict=True)
        results[kind] = {
            "layers": len(layers(kind)),
            "ours_bytes": spread(mine),
            "peft_bytes": spread(peer),
            "peft_over_ours": ratio(peer, mine),
        }
    save("merge_peaks", results)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        warnings.simplefilter("ignore")
        {"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2])
        print(json.dumps(_status("VmHWM") - _before))
    else:
        main()
