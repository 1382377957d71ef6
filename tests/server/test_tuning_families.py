"""Tuning and `auto` on bases of every family, at the base's own size and at others."""

import json
from collections.abc import Iterator

import pytest

from atelier.client import Client
from atelier.messages import method
from compose import bases
from compose.clip import Clip
from compose.formats.export import to_diffusers
from compose.residence import Residence
from compose.warm import warm_up
from server.engine import InProcessEngine
from tests.adapters import random_factors
from tests.conftest import serving
from tests.pipelines import tiny
from tests.scorers import tiny_scorer

FAMILIES = ("sd1", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module", params=["effect", "clip"])
def scorer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def atelier(tmp_path_factory: pytest.TempPathFactory, scorer: str) -> Iterator[Client]:
    """A server with a base of every family, and two adapters for each; started with a scorer or without."""
    folder = tmp_path_factory.mktemp("families")
    first, *others = (
        bases.find(f"{family}-base={tiny(family, folder / family, clip=768)}") for family in FAMILIES
    )
    warm = warm_up(first)
    clip = Clip(tiny_scorer(folder / "scorer")) if scorer == "clip" else None
    with (
        serving(folder / "data", warm, engine=InProcessEngine(Residence(warm, others)), clip=clip) as running,
        Client(running.address, timeout=240) as client,
    ):
        for family in FAMILIES:
            for seed, name in enumerate(("one", "two")):
                layers = random_factors(
                    family,
                    seed=seed,
                    rank=2,
                    scale=1.0,
                    where=lambda n: n.startswith("text_encoder.") and early(n),
                )
                path = folder / f"{family}-{name}.safetensors"
                path.write_bytes(to_diffusers(layers, family))
                client.check_in(path, name=f"{family}-{name}", base=family, triggers=[name])
        yield client


def early(name: str) -> bool:
    """Whether a layer is attention of the first text encoder, within the three layers that it has here."""
    return name.startswith("text_encoder.") and any(f"layers.{i}.self_attn" in name for i in range(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_is_tuned_on_a_base_of_any_family(family: str, scorer: str, atelier: Client) -> None:
    stack = {f"{family}-one": 1.0, f"{family}-two": 0.7}
    tried: list[float] = []
    summary = atelier.tune(stack, pictures=2, steps=2, size=48, tried=lambda trial: tried.append(trial.value))
    assert (summary.base, summary.scorer) == (f"{family}-base", scorer)
    assert len(tried) >= 6
    assert summary.best.value == max(tried) > 0
    assert all("one" in prompt and "two" in prompt for prompt in summary.prompts)
    alone = atelier.tune({f"{family}-one": 1.0}, pictures=1, steps=1)  # at its own size
    assert alone.best.value == pytest.approx(1.0, abs=1e-6) if scorer == "effect" else alone.best.value > 0
    assert alone.best.HasField("prompt") == (scorer == "clip")


@pytest.mark.parametrize(
    "family", FAMILIES[:3]
)  # the tiny FLUX.1's own size is 256 pixels, which takes minutes
def test_auto_merges_on_a_base_of_any_family(family: str, scorer: str, atelier: Client) -> None:
    merged = atelier.merge({f"{family}-one": 1.0}, name=f"{family}-auto", method=method("auto"))
    assert merged.version.family == family
    assert json.loads(merged.version.recipe_json)["scorer"] == scorer
    assert atelier.remake(f"{family}-auto").same
