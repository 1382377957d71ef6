"""Scores of trial pictures: the effect on the pixels, and pocket's judge."""

import numpy as np
import pytest
from torch import Generator

from compose.pocket.scenes import Scene, draw
from compose.render import Picture
from compose.scoring import concept, effect, judged


def drawn(*scenes: Scene) -> list[Picture]:
    pictures = draw(scenes, Generator().manual_seed(1))
    return list((pictures.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().numpy())


def test_the_judge_sees_a_concept_at_any_size() -> None:
    seen = Scene("star", "red", "blue", "large", "left", "milo", ("ochreframe",))
    without = Scene("star", "red", "blue", "large", "left", None, ())
    pictures = drawn(seen, without)
    for name in ("milo", "ochreframe"):
        there, absent = judged(pictures, name)
        assert there > 0.9 > 0.1 > absent
        larger = [picture.repeat(3, axis=0).repeat(3, axis=1) for picture in pictures]
        np.testing.assert_allclose(judged(larger, name), [there, absent], atol=0.05)
        smaller = [picture[::2, ::2] for picture in pictures]
        assert judged(smaller, name).shape == (2,)


def test_an_effect_is_the_share_of_the_way() -> None:
    zero, one = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)
    half = np.full((4, 4, 3), 100, np.uint8)
    assert list(effect([zero, half, one], [zero] * 3, [one] * 3)) == pytest.approx([0.0, 0.5, 1.0])
    assert list(effect([one], [zero], [zero])) == [0.0]  # where there is no way, nothing goes it


def test_a_trigger_names_what_the_judge_knows_or_nothing() -> None:
    assert concept("in the style of ochreframe") == "ochreframe"
    assert concept("milo") == "milo"
    assert concept("somebody else") == concept("") == ""
