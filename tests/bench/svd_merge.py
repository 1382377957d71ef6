"""svd merge in factor space against peft's `add_weighted_adapter(combination_type="svd")`, in the same run.

The attention layers of the SD 1.5 UNet (16 transformer blocks, 8 projections each), random factors, three
adapters of ranks 16, 16, 32, result rank 32; ours and peft's by turns. Run: `python -m tests.bench.svd_merge
[cuda]`.
"""

import sys
import warnings

import peft
import torch
from torch import nn

from compose.factors import Factors
from compose.groups import Adapter
from compose.merging import Merged, merge
from compose.methods import Parameters
from compose.weights import Weight
from tests.bench.report import ratio, save, spread, timed

RANKS, WEIGHTS, RESULT = (16, 16, 32), (1.0, 0.7, 0.5), 32
BLOCKS = [*[320] * 2, *[640] * 2, *[1280] * 2, 1280, *[1280] * 3, *[640] * 3, *[320] * 3]
ROUNDS, OURS_A_ROUND = 3, 5


class Attention(nn.Module):
    """The four projections of one attention layer; keys and values read `context` features."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)


def layers(model: nn.Module) -> dict[str, peft.tuners.lora.Linear]:
    """The adapted layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def main(device: str = "cpu") -> None:
    """Measures, prints, writes results/svd_merge.json."""
    torch.manual_seed(0)
    model = nn.ModuleList([Attention(w, c) for w in BLOCKS for c in (w, 768)]).to(device)
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
            for name, layer in layers(wrapped).items()
        }
        for i in range(len(RANKS))
    ]
    stack = [Adapter(layers, Weight(w)) for layers, w in zip(adapters, WEIGHTS, strict=True)]
    names = [f"a{i}" for i in range(len(RANKS))]

    def ours() -> Merged:
        return merge(stack, method="svd", parameters=Parameters(rank=RESULT), device=device)

    def theirs() -> None:
        wrapped.add_weighted_adapter(names, list(WEIGHTS), "m", combination_type="svd", svd_rank=RESULT)

    ours()
    our_times: list[float] = []
    peft_times: list[float] = []
    for turn in range(ROUNDS):
        our_times += [timed(ours, device=device) for _ in range(OURS_A_ROUND)]
        if turn:
            wrapped.delete_adapter("m")
        peft_times.append(timed(theirs, device=device))
    merged, worst = ours(), 0.0
    for name, layer in layers(wrapped).items():
        dense = layer.lora_B["m"].weight.detach().double() @ layer.lora_A["m"].weight.detach().double()
        mine = merged.layers[name].up.double() @ merged.layers[name].down.double()
        worst = max(worst, float((mine - dense).norm() / dense.norm()))
    result = {
        "layers": len(merged.layers),
        "ours_seconds": spread(our_times),
        "peft_seconds": spread(peft_times),
        "ratio": ratio(peft_times, our_times),
        "worst_relative_difference": worst,
    }
    save("svd_merge", result, device=device)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
