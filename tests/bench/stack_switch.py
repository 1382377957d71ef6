"""Switching stacks on the SD 1.5 (or SDXL) UNet, and what a step costs then, against diffusers and peft.

Random weights, eight rank-16 adapters on all attention projections, resident in memory on both sides; rounds
of ours and theirs by turns, each on a UNet of its own.

    floor     moving the bytes: golden weights of the touched layers copied onto the live ones
    switch    ours: patch; theirs: set_adapters (cheap now, dear at every step), or unfuse_lora, set_adapters
              and fuse_lora (dear now, free afterwards)
    step      one UNet forward at 32x32 latents with 0, 1, 3, 8 adapters; on a GPU at 64x64, as a captured
              graph: ours one for all stacks, theirs one for each
    cold      from a file on the disk to the first step: ours reads, binds and patches; theirs is
              load_lora_weights and set_adapters; the first step itself, over the bare base's, apart
    rotating  steps a second over 16 stacks by turns, 4 (SDXL: 2; on a GPU 10 and 5) steps each, against one
              stack that stays
    drift     largest weight difference after rotating switches and back to none

Run: `python -m tests.bench.stack_switch [sdxl] [cuda]`.
"""

import gc
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from compose import formats
from compose.bases import Base
from compose.factors import Layers as Resident
from compose.factors import to_device
from compose.families import families, table
from compose.formats.export import to_diffusers
from compose.layerwise import Stack
from compose.pocket.architecture import tokenizer
from compose.warm import WarmPipeline, alone
from compose.weights import Weight
from registry.headers import read_header
from server.checkin import recognise
from tests.adapters import Layers, attention, random_factors
from tests.bench.report import ratio, save, spread, timed
from tests.graphs import captured

NAMES = "abcdefgh"
STACKS = ((("a", 1.0),), (("a", 0.7), ("b", 0.5)), (("a", 0.4), ("b", 0.3), ("c", 0.9)))
EIGHT = tuple((name, 0.3) for name in NAMES)
COUNTED = {0: (), 1: STACKS[0], 3: STACKS[2], 8: EIGHT}
ROTATING = 16

Named = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How often: rounds of everything, switches of ours and of theirs before the drift is looked at, and the
    steps of each render by turns.
    """

    rounds: int
    switches: int
    peer_switches: int
    steps: int


COUNTS = {"sd1": Counts(5, 300, 20, 4), "sdxl": Counts(3, 60, 6, 2)}
ON_GPU = {"sd1": Counts(9, 1000, 20, 10), "sdxl": Counts(7, 300, 6, 5)}


def counts(family: str, device: str) -> Counts:
    """How often on a device."""
    return (COUNTS if device == "cpu" else ON_GPU)[family]


def pipeline(family: str, device: str) -> Any:
    """A pipeline of random weights; only the UNet is used, so the other parts are small or untrained."""
    torch.manual_seed(0)
    known = families()[family]
    dtype = torch.float16 if device != "cpu" else torch.bfloat16 if family == "sdxl" else torch.float32
    torch.set_default_dtype(dtype)  # SDXL twice in fp32, and golden copies, would not fit 24 GB
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(dict(known.config("unet")))
    torch.set_default_dtype(torch.float32)
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    common = {"vae": AutoencoderTiny(), "unet": unet, "scheduler": DDIMScheduler(), "tokenizer": tokenizer()}
    if family == "sdxl":
        built: Any = StableDiffusionXLPipeline(
            **common,
            text_encoder=CLIPTextModel(CLIPTextConfig(**tiny)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**tiny)),
            tokenizer_2=tokenizer(),
        )
    else:
        built = StableDiffusionPipeline(
            **common,
            text_encoder=CLIPTextModel(CLIPTextConfig(**tiny)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for part in (built.unet, built.text_encoder, built.vae):
        part.requires_grad_(False).eval()
    return built.to(device, dtype)


def state(layers: Layers) -> dict[str, Tensor]:
    """The layers as diffusers loads them."""
    tensors = {}
    for name, f in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = f.down, f.up
    return tensors


def stepping(unet: Any, device: str) -> Callable[[], object]:
    """One denoising step's forward."""
    config, dtype = unet.config, unet.dtype
    side = 32 if device == "cpu" else 64
    latent = torch.randn(1, config.in_channels, side, side, device=device, dtype=dtype)
    words = torch.randn(1, 77, config.cross_attention_dim, device=device, dtype=dtype)
    time = torch.tensor(500, device=device)
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        more["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 1280, device=device, dtype=dtype),
            "time_ids": torch.ones(1, 6, device=device, dtype=dtype),
        }

    def run() -> object:
        with torch.no_grad():
            return unet(latent, time, words, return_dict=False, **more)[0]

    return run


def replaying(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The step, on a GPU as a graph of it: called operation by operation it would wait for the host."""
    return step if device == "cpu" else captured(step)[0]


def neighbours(places: Iterable[int]) -> Iterator[range]:
    """Runs of numbers that follow one another."""
    for _, run in itertools.groupby(enumerate(sorted(places)), lambda item: item[1] - item[0]):
        found = [place for _, place in run]
        yield range(found[0], found[-1] + 1)


class Ours:
    """A warm pipeline with the adapters on its device."""

    def __init__(self, family: str, adapters: dict[str, Layers], device: str) -> None:
        base = Base(family, family, Path(), "", 20, 7.5, 512, 8, "DDIMScheduler", 0)
        self.warm, self.device, self._family = WarmPipeline(base, pipeline(family, device)), device, family
        self._switches = counts(family, device).switches
        self._adapters = {
            n: Resident({k: f.to(device) for k, f in layers.items()}) for n, layers in adapters.items()
        }
        self.step = stepping(self.warm.pipeline.unet, device)
        self.touched = list(adapters["a"])
        self.warm.apply(alone(self._adapters["a"]))  # the golden copies are made now
        self.warm.apply(())
        self.step()
        self.bare = [timed(self.step, device=device) for _ in range(counts(family, device).rounds)]
        self.replay = replaying(self.step, device)
        self._moved = [
            (arena.live[run.start : run.stop], arena.copied()[run.start : run.stop])
            for arena in self.warm._arenas
            for run in neighbours(arena.place[name] for name in self.touched if name in arena.place)
        ]

    def stack(self, named: Named) -> Stack:
        return tuple((self._adapters[name], Weight(weight)) for name, weight in named)

    def switch(self, named: Named) -> None:
        self.warm.apply(self.stack(named))

    def floor(self) -> None:
        """Reads golden and writes live: neighbours among the touched layers at once."""
        for live, golden in self._moved:
            live.copy_(golden)

    def cold(self, path: Path) -> None:
        binding = formats.require(recognise(read_header(path)), self._family, what="the file")
        with formats.layers(path, binding) as layers:
            self.warm.apply(alone(to_device(layers.items(), self.device)))

    def drift(self) -> float:
        golden = {name: self.warm.golden(name).clone() for name in self.touched}
        for turn in range(self._switches):
            self.switch(STACKS[turn % 3])
        self.warm.apply(())
        return max(float((self.warm.live(n).float() - g.float()).abs().max()) for n, g in golden.items())


class Theirs:
    """diffusers with peft's layers, which stay where they are put."""

    def __init__(self, family: str, adapters: dict[str, Layers], device: str) -> None:
        self.built = pipeline(family, device)
        self.step, self._switches = stepping(self.built.unet, device), counts(family, device).peer_switches
        self.step()
        rounds = range(counts(family, device).rounds)
        self.bare = [timed(self.step, device=device) for _ in rounds]
        replay = replaying(self.step, device)
        self.bare_replay = [timed(replay, device=device) for _ in rounds]
        for name, layers in adapters.items():
            self.built.load_lora_weights(state(layers), adapter_name=name)

    def choose(self, named: Named) -> None:
        self.built.set_adapters([name for name, _ in named], [weight for _, weight in named])

    def fuse(self, named: Named) -> None:
        self.choose(named)
        self.built.fuse_lora(components=["unet"], adapter_names=[name for name, _ in named])

    def refuse(self, named: Named) -> None:
        self.built.unfuse_lora(components=["unet"])
        self.fuse(named)

    def drift(self) -> float:
        """After as many switches of fusing and unfusing."""
        unet = self.built.unet
        weights = {n: m.base_layer.weight for n, m in unet.named_modules() if hasattr(m, "base_layer")}
        before = {n: w.clone() for n, w in weights.items()}
        self.fuse(STACKS[0])
        for turn in range(self._switches):
            self.refuse(STACKS[turn % 3])
        self.built.unfuse_lora(components=["unet"])
        return max(float((weights[n].float() - w.float()).abs().max()) for n, w in before.items())

    def cold(self, path: Path) -> None:
        self.built.load_lora_weights(path.parent, weight_name=path.name, adapter_name="cold")
        self.built.set_adapters(["cold"])


def rotating(ours: Ours, device: str, steps: int) -> dict[str, list[float]]:
    """Seconds for ROTATING renders of so many steps with one stack, and with as many stacks by turns."""
    many = [((NAMES[i % 8], 0.5 + i / 32), (NAMES[(i + 1) % 8], 0.4)) for i in range(ROTATING)]

    def renders(stacks: list[Named]) -> None:
        for named in stacks:
            ours.switch(named)
            for _ in range(steps):
                ours.replay()

    found: dict[str, list[float]] = {"one": [], "many": []}
    for _ in range(2):
        found["one"].append(timed(lambda: renders([many[0]] * ROTATING), device=device))
        found["many"].append(timed(lambda: renders(list(many)), device=device))
    return found


def main(*arguments: str) -> None:
    """Measures, prints, writes results/stack_switch[_sdxl].json."""
    family = "sdxl" if "sdxl" in arguments else "sd1"
    device = "cuda" if "cuda" in arguments else "cpu"
    often = counts(family, device)
    unet = {name for name in table(family) if name.startswith("unet.") and attention(name)}
    adapters = {
        name: random_factors(family, seed=seed, rank=16, scale=0.02, where=unet.__contains__)
        for seed, name in enumerate(NAMES)
    }
    ours, theirs = Ours(family, adapters, device), Theirs(family, adapters, device)
    gc.freeze()  # what is there by now is nothing to look through before each timing
    found: dict[str, list[float]] = {name: [] for name in ("floor", "patch", "set", "fuse")}
    steps: dict[str, dict[int, list[float]]] = {
        "ours": {n: [] for n in COUNTED},
        "peft": {0: theirs.bare_replay} | {n: [] for n in COUNTED if n},
    }
    theirs.fuse(STACKS[2])
    for _ in range(often.rounds):
        for named in STACKS:
            found["floor"].append(timed(ours.floor, device=device))
            ours.warm.apply(())
            ours.switch(STACKS[2] if named != STACKS[2] else STACKS[1])
            found["patch"].append(timed(lambda s=named: ours.switch(s), device=device))
            found["fuse"].append(timed(lambda s=named: theirs.refuse(s), device=device))
    theirs.built.unfuse_lora(components=["unet"])
    print("switches", {name: min(values) for name, values in found.items() if values}, flush=True)
    replays = {}
    for count, named in COUNTED.items():
        if count:
            theirs.choose(named)
            replays[count] = replaying(theirs.step, device)
    for _ in range(often.rounds):
        for named in STACKS:
            found["set"].append(timed(lambda s=named: theirs.choose(s), device=device))
        for count, named in COUNTED.items():
            ours.switch(named)
            steps["ours"][count].append(timed(ours.replay, device=device))
            if count:
                theirs.choose(named)
                steps["peft"][count].append(timed(replays[count], device=device))
    print("steps", {side: {n: min(t) for n, t in each.items()} for side, each in steps.items()}, flush=True)
    turns = rotating(ours, device, often.steps)
    print("rotating", turns, flush=True)
    drift = {"ours": ours.drift(), "fuse": theirs.drift()}
    print("drift", drift, flush=True)
    cold, first = _cold(ours, theirs, adapters["a"], family, device)
    bare = {"ours": ours.bare, "load_lora_weights": theirs.bare}
    result = {
        "layers": len(unet),
        "adapters": {"number": len(adapters), "rank": 16},
        "floor_seconds": spread(found["floor"]),
        "switch_seconds": {
            "ours": spread(found["patch"]),
            "set_adapters": spread(found["set"]),
            "unfuse_set_fuse": spread(found["fuse"]),
        },
        "switch_over_floor": ratio(found["patch"], found["floor"]),
        "switch_over_floor_by_adapters": {
            str(len(named)): ratio(found["patch"][i :: len(STACKS)], found["floor"][i :: len(STACKS)])
            for i, named in enumerate(STACKS)
        },
        "switch_ratio_to_fuse": ratio(found["fuse"], found["patch"]),
        "step_seconds_ours": {str(n): spread(t) for n, t in steps["ours"].items()},
        "step_seconds_peft": {str(n): spread(t) for n, t in steps["peft"].items()},
        "step_against_own_bare": {
            side: {str(n): ratio(each[n], each[0]) for n in COUNTED if n} for side, each in steps.items()
        },
        "steps_after_which_patching_wins_over_set_adapters": {
            str(n): _crossover(found, steps, n) for n in COUNTED if n
        },
        "cold_seconds": {side: spread(each) for side, each in cold.items()},
        "cold_ratio": ratio(cold["load_lora_weights"], cold["ours"]),
        "cold_first_step_over_bare": {side: ratio(each, bare[side]) for side, each in first.items()},
        "rotating_throughput": ratio(turns["one"], turns["many"]),
        "largest_weight_difference": {
            f"ours_after_{often.switches}_switches": drift["ours"],
            f"fuse_after_{often.peer_switches}_switches": drift["fuse"],
        },
    }
    save("stack_switch" + ("_sdxl" if family == "sdxl" else ""), result, device=device)


def _crossover(found: dict[str, list[float]], steps: dict[str, dict[int, list[float]]], n: int) -> float:
    """(patch - set_adapters) / (what peft's step costs more than ours), medians; at least 0."""
    each = {name: spread(values)["median"] for name, values in found.items()}
    more = spread(steps["peft"][n])["median"] - spread(steps["ours"][n])["median"]
    return max(0.0, (each["patch"] - each["set"]) / more) if more > 0 else float("inf")


def _cold(
    ours: Ours, theirs: Theirs, layers: Layers, family: str, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds to load a file, and of the step after that, for each side."""
    loaded: dict[str, list[float]] = {"ours": [], "load_lora_weights": []}
    first: dict[str, list[float]] = {"ours": [], "load_lora_weights": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cold.safetensors"
        path.write_bytes(to_diffusers(layers, family))
        theirs.built.delete_adapters(list(NAMES))
        gc.collect()
        for _ in range(counts(family, device).rounds):
            ours.warm.apply(())
            for name, side in (("ours", ours), ("load_lora_weights", theirs)):
                loaded[name].append(timed(lambda s=side: s.cold(path), device=device))
                first[name].append(timed(side.step, device=device))
            theirs.built.delete_adapters(["cold"])
    return loaded, first


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()  # it names every key of every other adapter
    main(*sys.argv[1:])
