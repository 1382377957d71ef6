"""`--scheduler NAME:OPTION=VALUE,…` as it is typed."""

import pytest
import typer

from atelier.picturing import scheduling


@pytest.mark.parametrize(
    ("typed", "name", "options"),
    [
        ("", "", {}),
        ("DDIMScheduler", "DDIMScheduler", {}),
        (":timestep_spacing=trailing", "", {"timestep_spacing": "trailing"}),
        (
            "A:use_karras=true, solver_order=3,flow_shift=2.5,sigma_min=null,algorithm_type=sde-dpmsolver++",
            "A",
            {
                "use_karras": True,
                "solver_order": 3,
                "flow_shift": 2.5,
                "sigma_min": None,
                "algorithm_type": "sde-dpmsolver++",
            },
        ),
        ("A:x=NaN", "A", {"x": "NaN"}),
    ],
)
def test_a_scheduler_with_its_options(typed: str, name: str, options: dict[str, object]) -> None:
    assert scheduling(typed) == {"scheduler": name, "scheduler_options": options}


@pytest.mark.parametrize("typed", ["A:x", "A:=1", "A:,", "A:a=1,,b=2"])
def test_a_scheduler_that_is_mistyped(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        scheduling(typed)
    assert ended.value.exit_code == 2
    assert "write NAME:OPTION=VALUE" in capsys.readouterr().err
