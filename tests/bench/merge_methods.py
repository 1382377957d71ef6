"""Every merge method on the layers of SD 1.5, SDXL and FLUX.1, against peft's dense merges, in the same run.

Random factors on every attention (and feed-forward) Linear of the family's table, ranks 4 to 128, 2 to 8
adapters. Ours merges the whole set in batches, first from nothing, then again with one weight moved. peft
merges layer by layer, as does kohya's dense merge, so both are timed on one layer of each shape and
multiplied by how many there are; peft's svd by turns with ours where that takes seconds. On a GPU the factors
are there, as a server keeps them, and each side has run once before it is timed.
Run: `python -m tests.bench.merge_methods [CASE…] [sparse] [cuda]`, a case as `"sdxl 3 x rank 32"`; none means
those that take a minute or two. What other runs on the same machine found is kept in the file.
"""

import gc
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import peft
import torch
from torch import nn

from compose.factors import Factors, Layers
from compose.families import table
from compose.groups import Adapter
from compose.merging import Prepared
from compose.methods import METHODS, Parameters
from compose.moments import Moment
from compose.weights import Weight
from tests.bench.report import RESULTS, machine, ratio, save, spread, timed

CASES = {
    # name: (family, ranks, result rank, which layers)
    "sd1 3 x rank 16": ("sd1", (16, 16, 32), 32, "unet"),
    "sd1 8 x rank 4": ("sd1", (4,) * 8, 16, "unet"),
    "sdxl 3 x rank 32": ("sdxl", (32,) * 3, 32, "unet"),
    "sdxl 2 x rank 128": ("sdxl", (128,) * 2, 64, "unet"),
    "flux 3 x rank 16": ("flux", (16,) * 3, 16, "transformer"),
}
QUICK = ("sd1 3 x rank 16", "sd1 8 x rank 4")
ROUNDS = {"sd1 3 x rank 16": 3}
ONLY = {
    "sdxl 2 x rank 128": ("naive", "svd")
}  # 2.7 GB of factors: nothing of them is kept, each merge is a first
SPARSE = {
    "ties": "ties_svd",
    "dare-ties": "dare_ties_svd",
    "dare-linear": "dare_linear_svd",
    "magnitude-prune": "magnitude_prune_svd",
}
KINDS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
)


def shapes(family: str, component: str) -> dict[str, tuple[int, int]]:
    """The attention and feed-forward layers of a family's denoiser."""
    return {
        name: (module.d, module.k)
        for name, module in table(family).items()
        if name.startswith(f"{component}.") and name.endswith(KINDS) and not module.kernel
    }


def stack(layers: dict[str, tuple[int, int]], ranks: tuple[int, ...], device: str) -> list[Adapter]:
    """Random adapters, measured; their factors on the device."""
    g = torch.Generator().manual_seed(0)
    found = []
    for rank in ranks:
        factors = {
            name: Factors(torch.randn(d, rank, generator=g) / d**0.5, torch.randn(rank, k, generator=g))
            for name, (d, k) in layers.items()
        }
        moments = {
            name: Moment(torch.rand(k, generator=g) + 0.1, torch.randn(k, 32, generator=g))
            for name, (_, k) in layers.items()
        }
        resident = Layers({name: f.to(device) for name, f in factors.items()})
        found.append(Adapter(resident, Weight(1.0), moments))
    return found


def one(method: str, adapters: Sequence[Adapter], result: int, device: str) -> tuple[float, float]:
    """Seconds of a first merge, and of one after it with one weight moved, as a slider does."""
    how = METHODS[method]
    if not how.calibrated:
        adapters = [replace(adapter, moments={}) for adapter in adapters]
    prepared = Prepared(adapters, device=device)
    told = Parameters(rank=result) if "rank" in how.parameters else Parameters()
    weights = [Weight(1.0 - 0.1 * i) for i in range(len(adapters))]
    first = timed(lambda: prepared.merge(weights, method=method, parameters=told), device=device)
    again = [
        timed(
            lambda i=i: prepared.merge(
                [weights[0].scaled(0.9 - 0.1 * i), *weights[1:]], method=method, parameters=told
            ),
            device=device,
        )
        for i in range(3 if first < 5 else 1)
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


def kohya(layers: dict[str, tuple[int, int]], ranks: tuple[int, ...], result: int, device: str) -> float:
    """Seconds of a merge of the whole set as sd-scripts' `svd_merge_lora.py` does it: the dense sum of a
    layer, its whole SVD, values clamped at their 0.99 quantile; counted as `theirs` is.
    """

    def one(d: int, k: int) -> None:
        merged = torch.zeros(d, k, device=device)
        for up, down in pairs:
            merged += up @ down
        U, S, Vh = torch.linalg.svd(merged)
        U, Vh = U[:, :result] @ torch.diag(S[:result]), Vh[:result]
        high = torch.quantile(torch.cat([U.flatten(), Vh.flatten()]), 0.99)
        U.clamp_(-high, high), Vh.clamp_(-high, high)

    seconds = 0.0
    for (d, k), count in Counter(layers.values()).items():
        pairs = [(torch.randn(d, r, device=device), torch.randn(r, k, device=device)) for r in ranks]
        seconds += count * timed(lambda d=d, k=k: one(d, k), device=device)
    return seconds


def measured(name: str, device: str, *, sparse: bool) -> dict[str, object]:
    """A case: its svd beside peft's, then every method by itself."""
    family, ranks, result, component = CASES[name]
    layers = shapes(family, component)
    adapters = stack(layers, ranks, device)
    svd, dense = [], []
    if device != "cpu":  # its libraries are loaded when they are first asked for
        of_each = {shape: layer for layer, shape in layers.items()}.values()
        few = [Adapter({n: a.layers[n] for n in of_each}, moments=a.moments) for a in adapters]
        for method in ONLY.get(name, METHODS):
            if sparse or method not in SPARSE:
                one(method, few, result, device)
        theirs("svd", {layer: layers[layer] for layer in list(of_each)[:1]}, ranks, result, device)
    gc.freeze()  # what is there by now is nothing to look through before each timing
    for _ in range(ROUNDS.get(name, 1) if device == "cpu" else 1):
        svd.append(one("svd", adapters, result, device))
        dense.append(theirs("svd", layers, ranks, result, device))
    methods: dict[str, dict[str, float]] = {}
    for method in ONLY.get(name, METHODS):
        if method in SPARSE and not sparse:
            continue  # dense by nature: minutes, ours and theirs
        first, again = one(method, adapters, result, device)
        methods[method] = {"first_seconds": first, "again_over_first": again / first}
        if method in SPARSE:
            peer = theirs(SPARSE[method], layers, ranks, result, device)
            methods[method] |= {"peft_seconds": peer, "peft_over_ours": peer / first}
        print(name, method, methods[method], flush=True)
    return {
        "layers": len(layers),
        "svd_first_seconds": spread([first for first, _ in svd]),
        "svd_again_over_first": ratio([again for _, again in svd], [first for first, _ in svd]),
        "peft_svd_seconds": spread(dense),
        "peft_svd_over_ours": ratio(dense, [first for first, _ in svd]),
        "peft_svd_over_again": ratio(dense, [again for _, again in svd]),
        "kohya_svd_over_ours": ratio([kohya(layers, ranks, result, device)], [first for first, _ in svd]),
        "methods": methods,
    }


def known(device: str) -> dict[str, object]:
    """What runs before this one found on this machine."""
    file = RESULTS / f"merge_methods{'' if device == 'cpu' else '-cuda'}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    return before if before.pop("machine", None) == machine(device) else {}


def main(arguments: list[str]) -> None:
    """Measures, prints, writes results/merge_methods.json."""
    device = "cuda" if "cuda" in arguments else "cpu"
    wanted = [argument for argument in arguments if argument not in {"sparse", "cuda"}] or QUICK
    results = known(device)
    for name in wanted:
        results[name] = measured(name, device, sparse="sparse" in arguments)
        save("merge_methods", results, device=device)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
