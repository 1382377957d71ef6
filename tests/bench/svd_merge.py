"""svd merge in factor space against peft's `add_weighted_adapter(combination_type="svd")`, in the same run.

The attention layers of the SD 1.5 UNet (16 transformer blocks, 8 projections each), random factors, three
adapters of ranks 16, 16, 32, result rank 32. Run: `python -m tests.bench.svd_merge`.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import peft
import torch
from torch import nn

from compose.factors import Factors
from compose.methods import merge
from compose.methods.parameters import Parameters

RANKS, WEIGHTS, RESULT = (16, 16, 32), (1.0, 0.7, 0.5), 32
BLOCKS = [*[320] * 2, *[640] * 2, *[1280] * 2, 1280, *[1280] * 3, *[640] * 3, *[320] * 3]
REPEATS = 7


class Attention(nn.Module):
    """The four projections of one attention layer; keys and values read `context` features."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)


def main() -> None:
    """Measures, prints the table, writes results/svd_merge.json."""
    torch.manual_seed(0)
    model = nn.ModuleList([Attention(w, c) for w in BLOCKS for c in (w, 768)])
    targets = ["to_q", "to_k", "to_v", "to_out"]
    configs = [
        peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets, init_lora_weights=False) for r in RANKS
    ]
    wrapped = peft.PeftModel(model, configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], 1):
        wrapped.add_adapter(f"a{i}", config)
    adapters = [
        {
            name: Factors(layer.lora_B[f"a{i}"].weight.detach(), layer.lora_A[f"a{i}"].weight.detach())
            for name, layer in wrapped.named_modules()
            if isinstance(layer, peft.tuners.lora.Linear)
        }
        for i in range(len(RANKS))
    ]
    stack = list(zip(adapters, WEIGHTS, strict=True))

    ours = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        merged = merge(stack, method="svd", parameters=Parameters(rank=RESULT))
        ours.append(time.perf_counter() - start)
    start = time.perf_counter()
    names = [f"a{i}" for i in range(len(RANKS))]
    wrapped.add_weighted_adapter(names, list(WEIGHTS), "m", combination_type="svd", svd_rank=RESULT)
    theirs = time.perf_counter() - start
    worst = 0.0
    for name, layer in wrapped.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            dense = layer.lora_B["m"].weight.detach().double() @ layer.lora_A["m"].weight.detach().double()
            mine = merged.layers[name].up.double() @ merged.layers[name].down.double()
            worst = max(worst, float((mine - dense).norm() / dense.norm()))
    result = {
        "layers": len(merged.layers),
        "ours_seconds": {"median": statistics.median(ours), "min": min(ours), "max": max(ours)},
        "peft_seconds": theirs,
        "ratio": {
            "median": theirs / statistics.median(ours),
            "min": theirs / max(ours),
            "max": theirs / min(ours),
        },
        "worst_relative_difference": worst,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cpu",
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
    }
    print(json.dumps(result, indent=2))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "svd_merge.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
