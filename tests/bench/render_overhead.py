"""What gRPC and scheduling cost a render: the time a client waits beyond what the pipeline itself takes.

    beyond       total - (patch + embed + denoise + decode): contract, queue, composition, PNG, transport
    serving      the same without writing the PNG, which a direct call does not do
    direct       a bare diffusers call of as many steps and pixels in this process, by turns; it has a thread
                 for every core, as the server does with SD 1.5's size; with pocket it leaves one to its loop

on pocket (20 steps, 64x64; a stack that stays, and one that changes with every render), and on a pipeline of
SD 1.5's size with random weights (2 steps, 256x256; on a GPU 20 steps, 512x512, in half precision).
Run: `python -m tests.bench.render_overhead [cuda]`.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from atelier.client import Client
from compose import pocket
from compose.families import families
from compose.pocket.architecture import tokenizer
from tests.adapters import random_factors, write_kohya
from tests.bench.report import ratio, save, spread, timed
from tests.bench.transfer import serving

PROMPT = "a red star on a blue background"
POCKET, SD1 = {"steps": 20}, {"steps": 2, "width": 256, "height": 256}
SD1_ON_GPU = {"steps": 20, "width": 512, "height": 512}
ROUNDS = {"cpu": {"pocket": 20, "sd1": 4}, "cuda": {"pocket": 20, "sd1": 5}}
PIPELINE = ("patch", "embed", "denoise", "decode")


def write_sd1(path: Path) -> None:
    """A pipeline directory of SD 1.5's size, random weights, half precision on the disk."""
    torch.manual_seed(0)
    config = {name: dict(families()["sd1"].config(name)) for name in ("unet", "text_encoder")}
    widths = [128, 256, 512, 512]
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        unet=UNet2DConditionModel.from_config(config["unet"]).half(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).half(),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def render(client: Client, stack: dict[str, float], settings: dict[str, int]) -> dict[str, float]:
    """Seconds by phase, as the server says; `total` as the client sees it, and what of it is `beyond`."""
    start = perf_counter()
    rendering = client.render(PROMPT, stack=stack, seed=1, **settings)
    list(rendering)
    total, seconds = perf_counter() - start, rendering.summary.seconds
    beyond = total - sum(seconds[phase] for phase in PIPELINE)
    return {**seconds, "total": total, "beyond": beyond, "serving": beyond - seconds["encode"]}


def compared(
    client: Client, base: Path, names: list[str], settings: dict[str, int], rounds: int, device: str
) -> Any:
    """The figures of one base; `names` are two adapters for it."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None).to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    told = {name: value for name, value in settings.items() if name != "steps"}

    def direct() -> object:
        seed = torch.Generator().manual_seed(1)
        return pipeline(PROMPT, num_inference_steps=settings["steps"], generator=seed, **told)

    staying, changing, bare = [], [], []
    for name in names:
        render(client, {name: 1.0}, settings)
    direct()
    for _ in range(rounds):
        render(client, {names[0]: 1.0}, settings)
        staying.append(render(client, {names[0]: 1.0}, settings))
        changing.append(render(client, {names[1]: 1.0}, settings))
        bare.append(timed(direct, device=device))
    return {
        **{
            stack: {
                "beyond_milliseconds": spread([r["beyond"] * 1e3 for r in found]),
                "serving_milliseconds": spread([r["serving"] * 1e3 for r in found]),
                "beyond_share_of_total": spread([r["beyond"] / r["total"] for r in found]),
                "phases_milliseconds": {phase: spread([r[phase] * 1e3 for r in found]) for phase in found[0]},
            }
            for stack, found in (("same_stack", staying), ("changing_stack", changing))
        },
        "direct_milliseconds": spread([t * 1e3 for t in bare]),
        "total_over_direct": ratio([r["total"] for r in staying], bare),
    }


def main(device: str = "cpu") -> None:
    """Measures, prints, writes results/render_overhead.json."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder) / "big"
        write_sd1(big)
        rounds = ROUNDS[device]
        large = SD1 if device == "cpu" else SD1_ON_GPU
        bases = {"pocket": ("pocket", pocket.WEIGHTS, POCKET), "sd1": (f"big={big}", big, large)}
        for family, (told, path, settings) in bases.items():
            data = Path(folder) / family
            with serving(data, "--base", told, "--device", device) as (client, _):
                names = [f"{family}-{word}" for word in ("one", "two")]
                for seed, name in enumerate(names):
                    write_kohya(data / name, random_factors(family, seed=seed, rank=8), family=family)
                    client.check_in(data / name, name=name, base=family)
                result[family] = compared(client, path, names, settings, rounds[family], device)
            save("render_overhead", result, device=device)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    main(*sys.argv[1:])
