"""Scores by a CLIP model: what is refused, and numbers that can be worked out by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from compose.clip import Clip, concept, prompt_kept
from compose.errors import InvalidRequest
from tests.scorers import tiny_scorer


@pytest.fixture(scope="module", params=["clip", "siglip"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scorer(tmp_path_factory.mktemp("scorer") / request.param, kind=request.param)


def unit(*rows: list[float]) -> np.ndarray:
    found = np.array(rows, dtype=np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_pictures_and_texts_are_embedded_alike_alone_and_in_batches(path: Path) -> None:
    clip = Clip(path)
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    many, one = clip.pictures(list(noise)), clip.pictures([noise[17]])
    assert many.shape[0] == 20
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1.0)
    np.testing.assert_allclose(many[17], one[0], atol=1e-5)
    told = clip.texts(["a star", "", "a star", "a moon " * 500])
    np.testing.assert_allclose(told[0], told[2])
    assert np.abs(told[0] - told[1]).max() > 1e-6
    assert told.shape == (4, many.shape[1])
    assert clip.nbytes() > 1000


def test_a_concept_is_0_without_and_1_alone_and_in_between_between() -> None:
    without, alone = unit([1, 0, 0], [1, 0, 0]), unit([1, 1, 0], [0, 1, 0])
    np.testing.assert_allclose(concept(without, without, alone), 0.0)
    np.testing.assert_allclose(concept(alone, without, alone), 1.0)
    halfway = (without + alone) / 2
    np.testing.assert_allclose(concept(halfway, without, alone), 0.5)
    np.testing.assert_allclose(concept(2 * without - alone, without, alone), 0.0)  # away from it
    np.testing.assert_allclose(concept(2 * alone - without, without, alone), 1.0)  # beyond it


def test_a_picture_that_the_adapter_hardly_changes_is_not_scored_by_noise() -> None:
    without = unit([1, 0, 0], [1, 0, 0])
    alone = unit([0, 1, 0], [1, 1e-4, 0])
    noisy = unit([1, 0, 0], [1, -2e-4, 1e-4])
    assert concept(noisy, without, alone)[1] == 0.0
    assert concept(alone, without, alone)[1] < 1e-6
    unchanged = concept(noisy, without, without)
    assert np.isfinite(unchanged).all()
    assert (unchanged == 0).all()


def test_a_prompt_is_kept_as_far_as_it_is_seen_with_each_adapter_alone() -> None:
    prompt, nothing = unit([1, 0, 0], [1, 0, 0], [1, 0, 0]), unit([0, 0, 1])
    seen, less, unseen = [1.0, 1, 0], [1.0, 3, 0], [0.0, 1, 0]
    alone = [unit(seen, seen, unseen), unit(less, seen, seen)]
    kept = prompt_kept(unit(less, less, unseen), alone, prompt, nothing)
    cosine = {"seen": 1 / 2**0.5, "less": 1 / 10**0.5}
    np.testing.assert_allclose(kept, [1.0, cosine["less"] / cosine["seen"], 1.0])
    lost = prompt_kept(unit(unseen, [-1, 1, 0], unseen), alone, prompt, nothing)
    np.testing.assert_allclose(lost, [0.0, 0.0, 1.0])  # what was not seen alone cannot be lost


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: shutil.rmtree(p), "config.json cannot be read"),
        (lambda p: (p / "config.json").write_text('{"model_type": "bert"}'), "names a 'bert', not clip or"),
        (lambda p: (p / "config.json").write_text("[]"), "is no configuration"),
        (lambda p: (p / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 99), "is no scorer: "),
        (lambda p: (p / "preprocessor_config.json").unlink(), "is no scorer: "),
        (
            lambda p: [f.unlink() for f in p.glob("*token*")] + [f.unlink() for f in p.glob("vocab*")],
            "no scorer",
        ),
        (
            lambda p: (p / "preprocessor_config.json").write_text(
                json.dumps(
                    json.loads((p / "preprocessor_config.json").read_text())
                    | {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
                )
            ),
            "it does not work",
        ),
    ],
)
def test_a_directory_that_is_no_scorer_is_refused_with_what_is_missing(
    path: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(InvalidRequest, match=message) as caught:
        Clip(copy)
    assert "give a directory with a CLIP or SigLIP model" in str(caught.value)
