"""What a render spends outside the denoising loop, over gRPC, and against a bare diffusers call of the same
render.

A server process on pocket, a client in this one; 20 steps, 64x64. By turns: a stack that stays, a stack that
changes with every render, and `StableDiffusionPipeline.__call__` on the bare base in this process.
Run: `python -m tests.bench.render_overhead`.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from atelier.client import Client
from compose import pocket
from server.demo import server
from tests.adapters import random_factors, write_kohya
from tests.bench.report import ratio, save, spread, timed

ROUNDS, STEPS, PROMPT = 20, 20, "a red star on a blue background"


def render(client: Client, stack: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, as the server says, with `total` as the client sees it."""
    start = time.perf_counter()
    rendering = client.render(PROMPT, stack=stack, seed=1, steps=STEPS)
    list(rendering)
    total = time.perf_counter() - start
    return {**rendering.summary.seconds, "total": total}


def summary(renders: list[dict[str, float]]) -> dict[str, Any]:
    """Milliseconds: by phase, and outside the loop."""
    outside = [(r["total"] - r["denoise"]) * 1e3 for r in renders]
    phases = {phase: spread([r[phase] * 1e3 for r in renders]) for phase in renders[0]}
    return {"outside_denoise": spread(outside), "phases": phases}


def main() -> None:
    """Measures, prints, writes results/render_overhead.json."""
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def direct() -> object:
        seed = torch.Generator().manual_seed(1)
        return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, generator=seed)

    staying, changing, bare = [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder) / "catalog") as address,
        Client(address) as client,
    ):
        for seed, name in enumerate(("one", "two")):
            write_kohya(Path(folder) / name, random_factors("pocket", seed=seed, rank=8))
            client.check_in(Path(folder) / name, name=name, base="pocket")
            render(client, {name: 1.0})
        direct()
        for _ in range(ROUNDS):
            render(client, {"one": 1.0})
            staying.append(render(client, {"one": 1.0}))
            changing.append(render(client, {"two": 1.0}))
            bare.append(timed(direct))
    result = {
        "milliseconds": {"same_stack": summary(staying), "changing_stack": summary(changing)},
        "direct_diffusers_call_milliseconds": spread([t * 1e3 for t in bare]),
        "grpc_over_direct": ratio([r["total"] for r in staying], bare),
        "denoising_loop_over_direct": ratio([r["denoise"] for r in staying], bare),
    }
    save("render_overhead", result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
