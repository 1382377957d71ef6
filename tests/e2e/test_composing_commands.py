"""The commands that compose, as typed, against the session's server."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compose.pocket import ADAPTERS
from tests.conftest import Running
from tests.e2e.test_cli import Run, atelier, failed, good, size


@pytest.fixture
def run(server: Running, tmp_path: Path) -> Run:
    """The command in an empty directory, with a character and a style checked in."""

    def call(*arguments: object):  # type: ignore[no-untyped-def]
        return atelier(*arguments, server=server.address, cwd=tmp_path)

    for asset, name in (("led", "fungo"), ("led-frame", "ochreframe")):
        call("checkin", ADAPTERS / f"{name}.safetensors", "--name", asset, "--card", ADAPTERS / f"{name}.md")
    return call


STACK = ("led=1", "led-frame=0.8/text_encoder=0.5")


def test_a_fight_is_inspected_tuned_and_settled(run: Run, tmp_path: Path) -> None:
    told = good(run("inspect", *STACK, "-o", "fight.png"))
    for part in (
        "led-frame:1",
        "0.8/text_encoder=0.5",
        "text_encoder",
        "calibrated",
        "fight.png: the heat map",
    ):
        assert part in told
    with Image.open(tmp_path / "fight.png") as image:
        assert image.width > 200
    report = json.loads(good(run("inspect", *STACK, "--json")))
    assert {adapter["ref"] for adapter in report["adapters"]} == {"led:1", "led-frame:1"}
    told = good(run("tune", *STACK, "--pictures", 1, "--steps", 1, "-o", "trials.png"))
    for part in ("best", "naive", "left of led", "next: atelier merge", "trials.png: the trials"):
        assert part in told
    told = good(run("tune", "led=1", "--weights", "--pictures", 1, "--steps", 1, "--size", 32))
    assert "weight  left of led" in told
    assert "←" in told
    summary = json.loads(good(run("tune", *STACK, "--pictures", 1, "--steps", 1, "--json")))
    assert summary["picture"] == ""
    assert summary["base"] == "pocket"
    few = ("--pictures", 1, "--steps", 1, "--base", "pocket")
    assert "--base pocket --name NAME" in good(run("tune", "led=1", *few, "--size", 32)).replace("\n", " ")
    assert "led:1: " in good(run("calibrate", "led", *few, "--size", 32, "--again"))
    report = json.loads(good(run("inspect", *STACK, "--json")))  # as it is calibrated now
    told = good(run("merge", *STACK, "--method", "orthogonal", "--set", "side=output", "--name", "led-both"))
    assert "0.8/text_encoder=0.5" in told
    shown = " ".join(good(run("show", "led-both")).split())
    assert "merged" in shown
    assert all(finding in shown for finding in report["findings"])
    assert "side output" in good(run("show", "led-both"))
    assert "led-both:1: the same bytes" in good(run("remake", "led-both"))
    assert "rank 2" in good(run("resize", "led", "--rank", 2, "--name", "led-small"))
    assert "is calibrated on pocket already" in good(run("calibrate", "led"))
    wrong = "this server has no base 'nowhere'; it has pocket"
    for command in (("tune", "led=1"), ("calibrate", "led"), ("inspect", *STACK)):
        failed(run(*command, "--base", "nowhere"), 4, wrong)
    failed(run("merge", "led=1", "--method", "auto", "--name", "x", "--base", "nowhere"), 4, wrong)
    assert "activation" in good(run("methods"))


def test_a_saved_stack_is_tuned_member_by_member(run: Run, tmp_path: Path) -> None:
    good(run("stack", "save", "led-two", "led=1", "led-frame=0.5"))
    few = ("--pictures", 1, "--steps", 1, "--size", 32)
    told = good(run("tune", "led-two=1", "--weights", *few, "-o", "two.png"))
    grid = " ".join(told.split())
    for member in ("left of led:1", "left of led-frame:1"):
        assert grid.count(member) == 2  # in the table, and over its curve
    assert "left of led-two" not in grid
    assert "1 prompt, scored" in grid
    assert "next: atelier merge led" in grid
    assert size(tmp_path / "two.png")[0] >= 440
    nothing = good(run("tune", "led=0", *few))
    assert "in every trial something is as good as gone: look at the pictures (-o)" in " ".join(
        nothing.split()
    )


def test_what_cannot_be_merged_is_shown_how_to_be_rendered_and_kept(run: Run, tmp_path: Path) -> None:
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{linear}.lora_up.weight": torch.randn(128, 2),
        f"{linear}.lora_down.weight": torch.randn(2, 128),
    }
    save_file({**tensors, f"{linear}.dora_scale": torch.ones(128, 1)}, tmp_path / "dora.safetensors")
    save_file({**tensors, "bundle_emb.zorp.clip_l": torch.randn(1, 96)}, tmp_path / "zorp.safetensors")
    few = ("--pictures", 1, "--steps", 1, "--size", 32, "--prompt", "a led, it's on")
    for name, why in (("dora", "is a DoRA"), ("zorp", "brings the words zorp along")):
        good(run("checkin", f"{name}.safetensors", "--name", f"led-{name}"))
        told = " ".join(good(run("tune", "led=1", f"led-{name}=0.5", *few)).split())
        assert "atelier merge" not in told
        assert why in told.partition("no merge: ")[2]
        hint = told.partition("next: atelier ")[2].partition(", or atelier ")
        made = shlex.split(hint[0].replace("FILE.png", f"{name}.png"))
        good(run(*made, "--steps", 1))
        assert (tmp_path / f"{name}.png").is_file()
        if hint[2]:
            good(run(*shlex.split(hint[2].replace("NAME", f"led-{name}-kept"))))
            good(run("show", f"led-{name}-kept"))
    assert (
        "brings the words zorp"
        in json.loads(good(run("inspect", "led=1", "led-zorp=1", "--json")))["suggestion"]["unmergeable"]
    )
    shown = good(run("inspect", "led=1", "led-zorp=1", "--layers"))
    assert "suggested: atelier render PROMPT --stack" in shown
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in shown.replace("…", "")


def test_a_lora_is_saved_for_other_programs(run: Run, tmp_path: Path) -> None:
    assert "out.safetensors" in good(run("save-as", "kohya", "led", "-o", "out.safetensors"))
    good(run("save-as", "peft", "led", "-o", "led-peft"))
    assert json.loads((tmp_path / "led-peft/unet/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert good(run("checkin", "led-peft/unet", "--name", "led-again"))


def test_mistakes_of_composing_are_one_line(run: Run) -> None:
    failed(run("merge", "led=1/txt=0.5", "--name", "x"), 4, "led:1 changes no layer in 'txt'")
    failed(run("merge", "led=1/text_encoder=abc", "--name", "x"), 2, "'abc' in 'led=1/text_encoder=abc'")
    failed(
        run("merge", "led=1", "--set", "foo=1", "--name", "x"), 2, "no method takes 'foo'; there are density"
    )
    failed(run("merge", "led=1", "--set", "mu", "--name", "x"), 2, "write NAME=VALUE")
    failed(run("merge", "led=1/unet=1/unet=2", "--name", "x"), 2, "a part is twice in 'led=1/unet=1/unet=2'")
    for twice in (("--set", "mu=1", "--set", "mu=2"), ("--rank", 4, "--set", "rank=4")):
        failed(run("merge", "led=1", *twice, "--name", "x"), 2, "is given twice")
    failed(run("merge", "led=1", "--set", "mu=null", "--name", "x"), 2, "Couldn't parse float: null")
    failed(run("merge", "led=1", "--set", "name=svd", "--name", "x"), 2, "--method svd")
    failed(
        run("merge", "led=1", "--method", "svd", "--set", "mu=abc", "--name", "x"),
        2,
        "Couldn't parse float: abc",
    )
    failed(run("merge", "led=1", "--method", "svd", "--set", "mu=1", "--name", "x"), 4, "'svd' takes no mu")
    failed(run("resize", "led", "--name", "x"), 2, "--rank, --energy or --ratio")
    failed(run("remake", "led"), 4, "has no recipe")
    failed(run("inspect", "led"), 4, "2 adapters or more")
    failed(run("save-as", "ckpt", "led", "-o", "x"), 4, "unknown format 'ckpt'")
    failed(run("inspect", *STACK, "-o", "no/where.png"), 3, "no directory")
