"""Every merge method on the layers of SD 1.5, SDXL and FLUX.1, against peft's dense merges, in the same run.

Random factors on every attention (and feed-forward) Linear of the family's table, ranks 4 to 128, 2 to 8
adapters. Ours merges the whole set in batches, first from nothing, then again under other weights. peft
merges layer by layer, so it is timed on one layer of each shape, by turns with ours, and multiplied by how
many there are.
Run: `python -m tests.bench.merge_methods [--quick] [sparse] [cuda]`.
"""

import sys
import warnings
from collections import Counter

import peft
import torch
from torch import nn

from compose.factors import Factors
from compose.families import table
from compose.groups import Adapter
from compose.merging import Prepared
from compose.methods import METHODS, Parameters
from compose.moments import Moment
from compose.weights import Weight
from tests.bench.report import ratio, save, spread, timed

CASES = {
    # name: (family, ranks, result rank, which layers)
    "sd1 3 x rank 16": ("sd1", (16, 16, 32), 32, "unet"),
    "sd1 8 x rank 4": ("sd1", (4,) * 8, 16, "unet"),
    "sdxl 3 x rank 32": ("sdxl", (32,) * 3, 32, "unet"),
    "sdxl 2 x rank 128": ("sdxl", (128,) * 2, 64, "unet"),
    "flux 3 x rank 16": ("flux", (16,) * 3, 16, "transformer"),
}
QUICK = ("sd1 3 x rank 16",)
SPARSE = {
    "ties": "ties_svd",
    "dare-ties": "dare_ties_svd",
    "dare-linear": "dare_linear_svd",
    "magnitude-prune": "magnitude_prune_svd",
}
ROUNDS, KINDS = (
    3,
    (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
    ),
)


def shapes(family: str, component: str) -> dict[str, tuple[int, int]]:
    """The attention and feed-forward layers of a family's denoiser."""
    return {
        name: (module.d, module.k)
        for name, module in table(family).items()
        if name.startswith(f"{component}.") and name.endswith(KINDS) and not module.kernel
    }


def stack(layers: dict[str, tuple[int, int]], ranks: tuple[int, ...], *, measured: bool) -> list[Adapter]:
    """Random adapters, with moments where a method needs them."""
    g = torch.Generator().manual_seed(0)
    found = []
    for rank in ranks:
        factors = {
            name: Factors(torch.randn(d, rank, generator=g) / d**0.5, torch.randn(rank, k, generator=g))
            for name, (d, k) in layers.items()
        }
        moments = (
            {
                name: Moment(torch.rand(k, generator=g) + 0.1, torch.randn(k, 32, generator=g))
                for name, (_, k) in layers.items()
            }
            if measured
            else {}
        )
        found.append(Adapter(factors, Weight(1.0), moments))
    return found


def one(
    method: str, family: str, ranks: tuple[int, ...], result: int, component: str, device: str
) -> tuple[float, float]:
    """Seconds of a first merge, and of one after it with one weight moved, as a slider does."""
    how = METHODS[method]
    prepared = Prepared(stack(shapes(family, component), ranks, measured=how.calibrated), device=device)
    told = Parameters(rank=result) if "rank" in how.parameters else Parameters()
    weights = [Weight(1.0 - 0.1 * i) for i in range(len(ranks))]
    first = timed(lambda: prepared.merge(weights, method=method, parameters=told), device=device)
    again = [
        timed(
            lambda i=i: prepared.merge(
                [weights[0].scaled(0.9 - 0.1 * i), *weights[1:]], method=method, parameters=told
            ),
            device=device,
        )
        for i in range(3)
    ]
    return first, min(again)


def theirs(
    combination: str, layers: dict[str, tuple[int, int]], ranks: tuple[int, ...], result: int, device: str
) -> float:
    """Seconds of peft's merge of the whole set: one layer of each shape, times how many there are."""
    seconds = 0.0
    for (d, k), count in Counter(layers.values()).items():
        model = nn.ModuleDict({"layer": nn.Linear(k, d, bias=False)}).to(device)
        configs = [
            peft.LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights=False)
            for r in ranks
        ]
        wrapped = peft.PeftModel(model, configs[0], adapter_name="a0")
        for i, config in enumerate(configs[1:], 1):
            wrapped.add_adapter(f"a{i}", config)
        names, more = [f"a{i}" for i in range(len(ranks))], {} if combination == "svd" else {"density": 0.5}
        seconds += count * timed(
            lambda w=wrapped, n=names, m=more: w.add_weighted_adapter(
                n,
                [1.0 - 0.1 * i for i in range(len(n))],
                "m",
                combination_type=combination,
                svd_rank=result,
                **m,
            ),
            device=device,
        )
    return seconds


def main(arguments: list[str]) -> None:
    """Measures, prints, writes results/merge_methods.json."""
    device = "cuda" if "cuda" in arguments else "cpu"
    results: dict[str, object] = {}
    for name, (family, ranks, result, component) in CASES.items():
        if "--quick" in arguments and name not in QUICK:
            continue
        layers = shapes(family, component)
        svd, dense = [], []
        for _ in range(ROUNDS if name in QUICK else 1):
            svd.append(one("svd", family, ranks, result, component, device))
            dense.append(theirs("svd", layers, ranks, result, device))
        case: dict[str, object] = {
            "layers": len(layers),
            "svd_first_seconds": spread([first for first, _ in svd]),
            "svd_again_over_first": ratio([again for _, again in svd], [first for first, _ in svd]),
            "peft_svd_seconds": spread(dense),
            "peft_svd_over_ours": ratio(dense, [first for first, _ in svd]),
        }
        methods: dict[str, object] = {}
        for method in METHODS:
            if method in SPARSE and "sparse" not in arguments:
                continue  # dense by nature: minutes, ours and theirs
            first, again = one(method, family, ranks, result, component, device)
            methods[method] = {"first_seconds": first, "again_over_first": again / first}
            if method in SPARSE:
                peer = theirs(SPARSE[method], layers, ranks, result, device)
                methods[method] |= {"peft_seconds": peer, "peft_over_ours": peer / first}  # type: ignore[operator]
        case["methods"] = methods
        results[name] = case
        print(name, case, flush=True)
        save("merge_methods", results, device=device)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
