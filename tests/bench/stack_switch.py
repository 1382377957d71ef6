"""Switching stacks on the SD 1.5 UNet, and what a denoising step costs afterwards, against diffusers and
peft.

Random weights, three rank-16 adapters on all attention projections, resident in memory on both sides.

    switch    ours: merge (naive) and patch; theirs: set_adapters (cheap now, dear at every step), or
              unfuse_lora + set_adapters + fuse_lora (dear now, free afterwards)
    step      one UNet forward at 32x32 latents with 0, 1, 3 adapters
    drift     largest weight difference after rotating switches and back to none

Run: `python -m tests.bench.stack_switch [cuda]`.
"""

import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from compose.bases import Base
from compose.factors import Factors
from compose.families import families, table
from compose.groups import Adapter
from compose.merging import merge
from compose.pocket.architecture import tokenizer
from compose.warm import WarmPipeline
from compose.weights import Weight
from tests.adapters import Layers, attention, random_factors
from tests.bench.report import ratio, save, spread, timed

STACKS = ((("a", 1.0),), (("a", 0.7), ("b", 0.5)), (("a", 0.4), ("b", 0.3), ("c", 0.9)))
ROUNDS, SWITCHES, PEER_SWITCHES = 5, 1000, 20


def pipeline(device: str) -> StableDiffusionPipeline:
    """An SD 1.5 of random weights; only the UNet is used, so the other parts are small or untrained."""
    torch.manual_seed(0)
    family = families()["sd1"]
    built = StableDiffusionPipeline(
        vae=AutoencoderTiny(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**family.config("text_encoder"))),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel.from_config(dict(family.config("unet"))),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (built.unet, built.text_encoder, built.vae):
        part.requires_grad_(False).eval()
    return built.to(device, torch.float16 if device != "cpu" else torch.float32)


def state(layers: Layers) -> dict[str, torch.Tensor]:
    """The layers as diffusers loads them."""
    tensors = {}
    for name, f in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = f.down, f.up
    return tensors


def step(unet: UNet2DConditionModel, device: str) -> Callable[[], object]:
    """One denoising step's forward."""
    dtype = unet.dtype
    latent = torch.randn(1, 4, 32, 32, device=device, dtype=dtype)
    words = torch.randn(1, 77, 768, device=device, dtype=dtype)

    def run() -> object:
        with torch.no_grad():
            return unet(latent, 500, words, return_dict=False)[0]

    return run


def measure_ours(adapters: dict[str, Layers], device: str) -> dict[str, Any]:
    """Switch and step times of a warm pipeline, and its drift."""
    base = Base("sd1", "sd1", path=None, digest="", steps=20, guidance=7.5)  # type: ignore[arg-type]  # not on disk
    warm = WarmPipeline(base, pipeline(device))
    golden = {name: warm.golden(name).clone() for name in warm.layers() if name in adapters["a"]}
    resident = {
        n: {k: Factors(f.up.to(device), f.down.to(device)) for k, f in a.items()} for n, a in adapters.items()
    }

    def switch(stack: tuple[tuple[str, float], ...]) -> None:
        warm.apply(
            merge([Adapter(resident[name], Weight(weight)) for name, weight in stack], device=device).layers
        )

    switches = [timed(lambda s=s: switch(s), device=device) for _ in range(ROUNDS) for s in STACKS]
    run = step(warm.pipeline.unet, device)
    steps: dict[int, list[float]] = {0: [], 1: [], 3: []}
    run()
    for _ in range(ROUNDS):
        for count, stack in ((0, ()), (1, STACKS[0]), (3, STACKS[2])):
            warm.apply(()) if not stack else switch(stack)
            steps[count].append(timed(run, device=device))
    for turn in range(SWITCHES):
        switch(STACKS[turn % 3])
    warm.apply(())
    drift = max(float((warm.live(n).float() - g.float()).abs().max()) for n, g in golden.items())
    return {"switch": switches, "steps": steps, "drift": drift}


def measure_theirs(adapters: dict[str, Layers], device: str) -> dict[str, Any]:
    """The same of diffusers' set_adapters and fuse_lora, peft's layers underneath."""
    built = pipeline(device)
    run = step(built.unet, device)
    run()
    steps: dict[int, list[float]] = {0: [timed(run, device=device) for _ in range(ROUNDS)], 1: [], 3: []}
    for name, layers in adapters.items():
        built.load_lora_weights(state(layers), adapter_name=name)

    def choose(stack: tuple[tuple[str, float], ...]) -> None:
        built.set_adapters([name for name, _ in stack], [weight for _, weight in stack])

    def refuse(stack: tuple[tuple[str, float], ...]) -> None:
        built.unfuse_lora(components=["unet"])
        choose(stack)
        built.fuse_lora(components=["unet"], adapter_names=[name for name, _ in stack])

    chosen = [timed(lambda s=s: choose(s), device=device) for _ in range(ROUNDS) for s in STACKS]
    for _ in range(ROUNDS):
        for count, stack in ((1, STACKS[0]), (3, STACKS[2])):
            choose(stack)
            steps[count].append(timed(run, device=device))
    weights = {n: m.base_layer.weight for n, m in built.unet.named_modules() if hasattr(m, "base_layer")}
    before = {n: w.clone() for n, w in weights.items()}
    choose(STACKS[0])
    built.fuse_lora(components=["unet"], adapter_names=["a"])
    fused = [timed(lambda s=s: refuse(s), device=device) for _ in range(ROUNDS) for s in STACKS]
    for turn in range(PEER_SWITCHES):
        refuse(STACKS[turn % 3])
    built.unfuse_lora(components=["unet"])
    drift = max(float((weights[n].float() - w.float()).abs().max()) for n, w in before.items())
    return {"set_adapters": chosen, "fuse": fused, "steps": steps, "drift": drift}


def main(device: str = "cpu") -> None:
    """Measures, prints, writes results/stack_switch.json."""
    unet = {name for name in table("sd1") if name.startswith("unet.") and attention(name)}
    adapters = {
        name: random_factors("sd1", seed=seed, rank=16, scale=0.02, where=unet.__contains__)
        for seed, name in enumerate("abc")
    }
    ours = measure_ours(adapters, device)
    gc.collect()
    theirs = measure_theirs(adapters, device)
    result = {
        "layers": len(unet),
        "switch_seconds": {
            "ours": spread(ours["switch"]),
            "set_adapters": spread(theirs["set_adapters"]),
            "unfuse_set_fuse": spread(theirs["fuse"]),
        },
        "switch_ratio_to_fuse": ratio(theirs["fuse"], ours["switch"]),
        "switch_ratio_to_set_adapters": ratio(theirs["set_adapters"], ours["switch"]),
        "step_seconds_ours": {str(n): spread(t) for n, t in ours["steps"].items()},
        "step_seconds_peft": {str(n): spread(t) for n, t in theirs["steps"].items()},
        "step_against_own_bare": {
            "ours": {str(n): ratio(ours["steps"][n], ours["steps"][0]) for n in (1, 3)},
            "peft": {str(n): ratio(theirs["steps"][n], theirs["steps"][0]) for n in (1, 3)},
        },
        "largest_weight_difference": {
            f"ours_after_{SWITCHES}_switches": ours["drift"],
            f"fuse_after_{PEER_SWITCHES + ROUNDS * len(STACKS)}_switches": theirs["drift"],
        },
    }
    save("stack_switch", result, device=device)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()  # it names every key of every other adapter
    main(*sys.argv[1:])
