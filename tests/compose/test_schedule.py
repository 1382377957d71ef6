"""When adapters act: shares of the steps, turns, each for itself."""

from dataclasses import replace

import numpy as np
import pytest

from compose.errors import InvalidRequest
from compose.layerwise import Stack
from compose.pocket.calibrate import Silent
from compose.render import Picture, render
from compose.schedule import Phase, Plan
from compose.settings import Settings
from compose.warm import WarmPipeline
from compose.weights import Weight
from tests.adapters import random_factors

SETTINGS = Settings(prompt="a red star", seed=5, steps=4, guidance=4.0, width=64, height=64)
ONE = random_factors("pocket", seed=1, rank=2, where=lambda n: n.startswith("unet"))
TWO = random_factors("pocket", seed=2, rank=2, where=lambda n: n.startswith("unet"))
BOTH: Stack = ((ONE, Weight(0.8)), (TWO, Weight(0.5)))


class Kept(Silent):
    """Keeps the pictures, and how often weights changed."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def picture(self, image: int, picture: Picture) -> None:
        self.pictures.append(picture)


def drawn(warm: WarmPipeline, plan: Plan, stack: Stack = BOTH, settings: Settings = SETTINGS) -> Picture:
    kept = Kept()
    render(warm, settings, stack=stack, key=None, listener=kept, plan=plan)
    return kept.pictures[-1]


def test_the_factors_of_every_step() -> None:
    late, less = (Phase(0.4, 1.0),), (Phase(0.0, 0.5, 1.0, 0.0), Phase(0.75, 1.0, -2.0))
    plan = Plan((late, less))
    found = [plan.factors(step, 4, 2) for step in range(4)]
    assert found == [(0.0, 1.0), (0.0, 0.5), (1.0, 0.0), (1.0, -2.0)]
    assert Plan(((), ())).factors(2, 4, 2) == ()
    assert [Plan(mode="switch", every=2).factors(s, 6, 2) for s in (0, 1, 2, 3, 4)] == [
        (1.0, 0.0),
        (1.0, 0.0),
        (0.0, 1.0),
        (0.0, 1.0),
        (1.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((Phase(-0.1, 0.5),), "from -0.1 to 0.5 is none"),
        ((Phase(0.5, 0.5),), "from 0.5 to 0.5 is none"),
        ((Phase(0.5, 1.1),), "from 0.5 to 1.1 is none"),
        ((Phase(float("nan"), 1.0),), "from nan to 1 is none"),
        ((Phase(0.0, 0.5), Phase(0.4, 1.0)), "starts at 0.4, before the one before it ends at 0.5"),
        ((Phase(0.0, 0.5, float("inf")),), "weight inf is not within"),
        ((Phase(0.0, 0.5, 1.0, 9.0),), "weight 9.0 is not within"),
        (tuple(Phase(i / 20, (i + 1) / 20) for i in range(17)), "17 phases, the limit is 16"),
    ],
)
def test_a_schedule_that_is_none(schedule: tuple[Phase, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan((schedule,)).check(1)
    with pytest.raises(InvalidRequest, match="2 schedules for 1 adapters"):
        Plan(((), ())).check(1)


def test_a_phase_over_all_steps_is_no_schedule_and_one_over_none_is_no_adapter(warm: WarmPipeline) -> None:
    whole, nothing = drawn(warm, Plan()), drawn(warm, Plan(), ())
    assert np.array_equal(drawn(warm, Plan(((Phase(0, 1),), (Phase(0, 1),)))), whole)
    assert np.array_equal(drawn(warm, Plan(((Phase(0, 1, 0.0),), (Phase(0, 1, 0.0),)))), nothing)
    first = drawn(warm, Plan(), BOTH[:1])
    assert np.array_equal(drawn(warm, Plan(((), (Phase(0, 1, 0.0),)))), first)
    half = drawn(warm, Plan(((), (Phase(0, 1, 0.5),))))
    assert np.array_equal(half, drawn(warm, Plan(), (BOTH[0], (TWO, Weight(0.25)))))


def test_a_late_adapter_changes_the_picture_and_every_picture_of_a_request_alike(warm: WarmPipeline) -> None:
    late = Plan(((), (Phase(0.5, 1.0),)))
    one = drawn(warm, late)
    assert not np.array_equal(one, drawn(warm, Plan()))
    assert not np.array_equal(one, drawn(warm, Plan(), BOTH[:1]))
    second = drawn(warm, late, settings=replace(SETTINGS, seed=4, count=2))
    assert np.array_equal(second, one)


def test_switching_is_a_schedule_by_turns(warm: WarmPipeline) -> None:
    turns = Plan(
        (
            (Phase(0.0, 0.25), Phase(0.5, 0.75)),
            (Phase(0.25, 0.5), Phase(0.75, 1.0)),
        )
    )
    assert np.array_equal(drawn(warm, Plan(mode="switch")), drawn(warm, turns))
    assert not np.array_equal(drawn(warm, Plan(mode="switch", every=2)), drawn(warm, turns))


def test_a_step_of_two_model_calls_is_one_turn(warm: WarmPipeline) -> None:
    """Heun asks the model twice a step: both times with the adapter whose turn it is."""
    heun = replace(SETTINGS, scheduler="HeunDiscreteScheduler")
    seen: list[tuple[float, ...]] = []

    class Noting(Kept):
        def step(self, image: int, step: int) -> None:
            seen.append(
                tuple(f is ONE["unet.conv_in"] for f, _ in warm._layerwise.applied.get("unet.conv_in", ()))
            )

    assert "unet.conv_in" in ONE
    render(warm, heun, stack=BOTH, key=None, listener=Noting(), plan=Plan(mode="switch"))
    assert seen == [(True,), (False,), (True,), (False,)]


def test_composite_is_the_mean_of_each_alone(warm: WarmPipeline) -> None:
    one_step = replace(SETTINGS, steps=1)
    same = ((ONE, Weight(0.8)), (dict(ONE), Weight(0.8)))
    alone = drawn(warm, Plan(), BOTH[:1])
    difference = drawn(warm, Plan(mode="composite"), same).astype(int) - alone
    assert np.abs(difference).max() <= 1  # (x + x) / 2, and the guidance's own rounding
    mixed = drawn(warm, Plan(mode="composite"), settings=one_step)
    assert not np.array_equal(mixed, drawn(warm, Plan(), settings=one_step))
    assert "forward" not in vars(warm.denoiser)  # nothing of it stays
    warm.apply(())
    assert warm.is_golden()


def test_a_render_that_ends_in_the_middle_leaves_nothing_behind(warm: WarmPipeline) -> None:
    class Stops(Kept):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks > 5:
                raise TimeoutError

    before = drawn(warm, Plan(), ())
    for plan in (Plan(mode="composite"), Plan(mode="switch"), Plan(((), (Phase(0.5, 1.0),)))):
        with pytest.raises(TimeoutError):
            render(warm, SETTINGS, stack=BOTH, key="x", listener=Stops(), plan=plan)
        assert np.array_equal(drawn(warm, Plan(), ()), before)
    warm.apply(())
    assert warm.is_golden()
