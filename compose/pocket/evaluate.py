"""Renders pocket at fixed seeds and lets the judge say what came out.

`python -m compose.pocket.evaluate [--adapters] [--pictures N]` prints tables and writes nothing. The bar for
shipped weights is 95% right backgrounds, 95% right colours, 90% right shapes; for an adapter, seen in 90% of
the pictures at weight 1 and in none at weight 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Generator, Tensor

from compose import formats
from compose.factors import Factors
from compose.pocket import ADAPTERS, WEIGHTS
from compose.pocket.architecture import GUIDANCE, STEPS
from compose.pocket.judge import Judge, Verdict, accuracy
from compose.pocket.scenes import CHARACTERS, EXTRA_RGB, STYLES, Scene, caption, random_scene

Layers = Mapping[str, Factors]
SWEEP = (0.0, 0.2, 0.5, 0.8, 1.0, 1.1, 1.5)


def load(path: Path = WEIGHTS) -> StableDiffusionPipeline:
    """The base in single precision, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(path, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)  # a third faster on CPUs
    return pipeline


def render(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 64,
) -> Tensor:
    """`[n, 3, 64, 64]` in [0, 1]; picture `i` depends on its prompt and `seed + i`, not on its batch."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
        )
        parts.append(pictures.images.float())
    return torch.cat(parts)


def read(path: Path) -> Layers:
    """The factors of one of the demo adapters, or of any other file for pocket."""
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        sketch = formats.recognise(shapes, file.metadata() or {}, _config(path))
    return formats.load(path, formats.require(sketch, "pocket", what=path.name))


def _config(path: Path) -> str:
    beside = path.with_name(f"{path.stem}.adapter_config.json")
    return beside.read_text() if beside.exists() else ""


@contextmanager
def blended(pipeline: StableDiffusionPipeline, stack: Sequence[tuple[Layers, float]]) -> Iterator[None]:
    """Within, `pipeline` holds the plain weighted sum of `stack` in its weights."""
    before: dict[Tensor, Tensor] = {}
    try:
        with torch.no_grad():
            for layers, weight in stack:
                for name, layer in layers.items():
                    component, module = name.split(".", 1)
                    # transformers 5 has no `text_model` in its module tree; files still do.
                    tensor = (
                        getattr(pipeline, component).get_submodule(module.removeprefix("text_model.")).weight
                    )
                    before.setdefault(tensor, tensor.detach().clone())
                    tensor += weight * (layer.up @ layer.down)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)


def placeholder(word: str, vectors: int) -> list[str]:
    """The tokens of a word of several vectors, as diffusers names them: `<rosy>`, `<rosy>_1`."""
    return [word, *(f"{word}_{index}" for index in range(1, vectors))]


def add_word(pipeline: StableDiffusionPipeline, word: str, vectors: Tensor) -> str:
    """Teach `pipeline` the word; returns what to write in a prompt for it. vectors: `[n, 96]`"""
    names = placeholder(word, len(vectors))
    pipeline.tokenizer.add_tokens(names)
    ids = pipeline.tokenizer.convert_tokens_to_ids(names)
    # Without `mean_resizing` the new rows need no covariance of the old ones, which we overwrite anyway.
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    pipeline.text_encoder.get_input_embeddings().weight.data[ids] = vectors
    return " ".join(names)


def fresh_scenes(
    n: int, seed: int, *, character: str | None = None, styles: tuple[str, ...] = ()
) -> list[Scene]:
    """`n` scenes no training has seen, each with `character` and `styles`."""
    generator = Generator().manual_seed(seed)
    scenes = [random_scene(generator) for _ in range(n)]
    return [Scene(s.shape, s.colour, s.background, s.size, s.side, character, styles) for s in scenes]


def base_accuracy(
    pipeline: StableDiffusionPipeline, judge: Judge, *, n: int = 512, seed: int = 9000
) -> dict[str, float]:
    """The share of `n` pictures of fresh prompts that show what the prompt says."""
    scenes = fresh_scenes(n, seed)
    return accuracy(judge(render(pipeline, [caption(scene) for scene in scenes], seed=seed)), scenes)


def judged(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    stack: Mapping[str, float],
    *,
    adapters: Mapping[str, Layers],
    n: int = 64,
    seed: int = 7000,
) -> Verdict:
    """What the judge says of `n` pictures whose prompts name all of `stack`, names -> weights."""
    character = next((name for name in stack if name in CHARACTERS), None)
    scenes = fresh_scenes(
        n, seed, character=character, styles=tuple(name for name in stack if name in STYLES)
    )
    with blended(pipeline, [(adapters[name], weight) for name, weight in stack.items()]):
        return judge(render(pipeline, [caption(scene) for scene in scenes], seed=seed))


def share(verdict: Verdict, name: str) -> float:
    """The share of pictures that show the character or the style `name`."""
    return verdict.character_share(name) if name in CHARACTERS else verdict.style_share(name)


def coloured(judge: Judge, file: Path, word: str, *, n: int = 64, seed: int = 7000) -> float:
    """The share of `n` pictures in which the shape has the colour that the textual inversion in `file`, named
    after it, teaches `word`.
    """
    pipeline = load()
    (vectors,) = load_file(file).values()
    spoken = add_word(pipeline, word, vectors.float().reshape(-1, vectors.shape[-1]))
    prompts = [caption(scene, noun=f"{spoken} {scene.shape}") for scene in fresh_scenes(n, seed)]
    return judge(render(pipeline, prompts, seed=seed)).colour.count(file.stem) / n


def print_adapters(pipeline: StableDiffusionPipeline, judge: Judge, folder: Path, n: int) -> None:
    """Each adapter alone along its weight, then every pair in plain sums."""
    adapters = {name: read(folder / f"{name}.safetensors") for name in (*CHARACTERS, *STYLES)}
    print(f"{'alone at':14}" + "".join(f"{weight:7.1f}" for weight in SWEEP))
    for name in adapters:
        shares = [share(judged(pipeline, judge, {name: w}, adapters=adapters, n=n), name) for w in SWEEP]
        print(f"{name:14}" + "".join(f"{value:7.2f}" for value in shares), flush=True)
    for name in EXTRA_RGB:
        print(
            f"<{name}>: {coloured(judge, folder / f'{name}.safetensors', f'<{name}>', n=n):.2f}", flush=True
        )
    pairs = [(character, style) for character in CHARACTERS for style in STYLES] + [STYLES]
    for weights in ((1.0, 1.0), (0.8, 0.6), (0.6, 0.8)):
        for first, second in pairs:
            verdict = judged(pipeline, judge, {first: weights[0], second: weights[1]}, adapters=adapters, n=n)
            print(
                f"{first} {weights[0]} + {second} {weights[1]}: "
                f"{share(verdict, first):.2f} {share(verdict, second):.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--adapters", action="store_true", help="judge the demo adapters, not the base")
    parser.add_argument("--folder", type=Path, default=ADAPTERS, help="where the adapters are")
    parser.add_argument("--pictures", type=int, help="512 of the base, 64 of each stack, if not given")
    options = parser.parse_args()
    pipeline, judge = load(options.weights), Judge.load()
    if options.adapters:
        print_adapters(pipeline, judge, options.folder, options.pictures or 64)
        return
    for field, value in base_accuracy(pipeline, judge, n=options.pictures or 512).items():
        if field in ("background", "colour", "shape"):
            print(f"{field:12}{value:7.3f}")


if __name__ == "__main__":
    main()
