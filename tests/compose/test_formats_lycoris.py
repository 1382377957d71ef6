"""LoCon, LoHa and LoKr, as LyCORIS and PEFT write them: the factors make the update those layers apply."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from lycoris import LoConModule, LohaModule, LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compose import formats
from compose.errors import UnsupportedLayout
from compose.families import table
from compose.formats.forms import FORMS
from tests.adapters import assert_updates, read, sketch

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
Tensors = dict[str, Tensor]


def layer(name: str) -> nn.Linear | nn.Conv2d:
    module = table("pocket")[name]
    if not module.kernel:
        return nn.Linear(module.k, module.d, bias=False)
    h, w = module.kernel
    return nn.Conv2d(module.k // (h * w), module.d, (h, w), padding=h // 2, bias=False)


def flat(name: str) -> str:
    component, path = name.split(".", 1)
    return f"{'lora_unet' if component == 'unet' else 'lora_te'}_{path.replace('.', '_')}"


def write(
    path: Path, kind: Callable[..., nn.Module], names: list[str], seed: int = 0, **how: object
) -> tuple[dict[str, Tensor], dict[str, tuple[nn.Module, nn.Linear | nn.Conv2d]]]:
    """A file of LyCORIS modules with random weights; what each changes in the layer below, by its forward
    pass on unit inputs, float64.
    """
    torch.manual_seed(seed)
    tensors, updates, modules = {}, {}, {}
    for name in names:
        base = layer(name)
        module = kind(flat(name), base, multiplier=1.0, bypass_mode=False, **how)
        for key, parameter in module.named_parameters():
            if not key.startswith("org") and key != "dora_scale":
                nn.init.normal_(parameter, std=0.5)
        state = {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}
        tensors |= {f"{flat(name)}.{key}": value for key, value in state.items()}
        updates[name] = effect(module, base)
        modules[name] = (module, base)
    save_file(tensors, path)
    return updates, modules


def effect(module: nn.Module, base: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight that a module's forward pass adds to its layer's, read off with unit inputs."""
    module, base = module.double(), base.double()
    module.double()
    d, *rest = base.weight.shape
    with torch.no_grad():
        if isinstance(base, nn.Linear):
            return (
                module(torch.eye(rest[0], dtype=torch.float64))
                - base(torch.eye(rest[0], dtype=torch.float64))
            ).mT
        channels, h, w = rest
        units = torch.zeros(channels * h * w, channels, h, w, dtype=torch.float64)
        for index, unit in enumerate(
            units
        ):  # the middle output of a padded convolution sees each position once
            unit.view(-1)[index] = 1.0
        out = module(units) - base(units)
        return out[:, :, h // 2, w // 2].mT.reshape(d, -1)


@pytest.mark.parametrize("alpha", [4, 1, 6.5])
@pytest.mark.parametrize("rank", [4, 12])
def test_loha_is_read_exactly_below_and_above_the_full_rank(tmp_path: Path, alpha: float, rank: int) -> None:
    updates, _ = write(tmp_path / "a", LohaModule, [LINEAR, TEXT, CONV], lora_dim=rank, alpha=alpha)
    assert sketch(tmp_path / "a").layout == "lycoris"
    found = read(tmp_path / "a")
    assert_updates(found, updates)
    for name, factors in found.items():
        module = table("pocket")[name]
        assert factors.rank == min(rank * rank, module.d, module.k)


def test_loha_in_tucker_form(tmp_path: Path) -> None:
    updates, _ = write(tmp_path / "a", LohaModule, [CONV], lora_dim=3, alpha=2, use_tucker=True)
    assert_updates(read(tmp_path / "a"), updates)


@pytest.mark.parametrize(
    "how",
    [
        {"lora_dim": 2, "alpha": 1},
        {"lora_dim": 2, "alpha": 1, "factor": 4},
        {"lora_dim": 2, "alpha": 3, "decompose_both": True},
        {"lora_dim": 2, "alpha": 1, "use_tucker": True},
        {"lora_dim": 2, "alpha": 5, "use_tucker": True, "decompose_both": True, "factor": 8},
        {"lora_dim": 10000, "alpha": 7},
        {"lora_dim": 2, "alpha": 7, "full_matrix": True, "factor": 2},
        {"lora_dim": 5, "alpha": 1, "unbalanced_factorization": True},
    ],
    ids=str,
)
def test_lokr_of_every_kind_is_read_exactly(tmp_path: Path, how: dict[str, object]) -> None:
    updates, _ = write(tmp_path / "a", LokrModule, [LINEAR, TEXT, CONV], **how)
    found = read(tmp_path / "a")
    assert_updates(found, updates)
    for name, factors in found.items():
        assert factors.rank <= min(table("pocket")[name].d, table("pocket")[name].k)


def test_lokr_takes_the_smaller_of_its_two_kronecker_forms() -> None:
    """rank r times the smaller side of the whole factor, and r r' where both are decomposed."""
    shapes = {"lokr_w1": (2, 16), "lokr_w2_a": (40, 3), "lokr_w2_b": (3, 50)}
    assert FORMS["lokr"].size(shapes).rank == 2 * 3
    assert FORMS["lokr"].size({**shapes, "lokr_w1": (16, 2)}).rank == 2 * 3
    both = {"lokr_w1_a": (16, 2), "lokr_w1_b": (2, 16), "lokr_w2_a": (40, 3), "lokr_w2_b": (3, 50)}
    assert FORMS["lokr"].size(both).rank == 2 * 3


def test_locon_with_a_middle_and_without(tmp_path: Path) -> None:
    for tucker in (False, True):
        updates, _ = write(
            tmp_path / "a", LoConModule, [LINEAR, CONV], lora_dim=4, alpha=2, use_tucker=tucker
        )
        assert {e.form for e in sketch(tmp_path / "a").entries} == (
            {"lora", "tucker"} if tucker else {"lora"}
        )
        assert_updates(read(tmp_path / "a"), updates)


def test_the_scale_of_an_rslora_of_lycoris_is_in_its_alpha(tmp_path: Path) -> None:
    updates, _ = write(tmp_path / "a", LohaModule, [LINEAR], lora_dim=4, alpha=2, rs_lora=True)
    assert_updates(read(tmp_path / "a"), updates)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
@pytest.mark.parametrize("whole", [False, True])
def test_loha_and_lokr_of_peft(tmp_path: Path, config: type, whole: bool) -> None:
    torch.manual_seed(0)
    names = ["unet.conv_in", LINEAR]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = nn.ModuleDict({"conv_in": layer("unet.conv_in")})
            holder = self.unet
            for part in LINEAR.removeprefix("unet.").split(".")[:-1]:
                holder[part] = nn.ModuleDict()
                holder = holder[part]
            holder["to_q"] = layer(LINEAR)

    how = {"r": 64 if whole else 2, "alpha": 3, "target_modules": ["conv_in", "to_q"], "init_weights": False}
    wrapped = peft.PeftModel(Holder().unet, config(**how, use_effective_conv2d=not whole))
    wrapped.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    modules = {n: m for n, m in wrapped.named_modules() if hasattr(m, "get_delta_weight")}
    updates = {
        n.replace("base_model.model.", "unet."): m.get_delta_weight("default").detach()
        for n, m in modules.items()
    }
    assert set(updates) == set(names)
    assert_updates(read(tmp_path / "adapter_model.safetensors", config=text), updates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hada_w1_b": (4, 81)}, "both products of a LoHa are of one shape"),
        ({"hada_w1_b": (5, 80)}, "w_a is .out, rank., w_b is .rank, in."),
        ({"hada_w1_a": None}, "has no matching hada_w1_a"),
        ({"hada_t1": (4, 4, 3, 3)}, "has no matching hada_t2"),
        ({"lokr_w1": (4, 4)}, "has lokr_w1 besides"),
        ({"hada_w2_a": (80, 0)}, "a matrix is"),
        ({"hada_w1_a": (80, 40), "hada_w1_b": (40, 80), "hada_w2_a": (80, 40, 1)}, "a matrix is"),
        ({"alpha": (2,)}, "must be one number"),
    ],
)
def test_a_loha_that_does_not_fit_is_refused(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    whole = {"hada_w1_a": (80, 4), "hada_w1_b": (4, 80), "hada_w2_a": (80, 4), "hada_w2_b": (4, 80)}
    shapes = {f"lora_unet_x.{role}": shape for role, shape in (whole | change).items() if shape}
    with pytest.raises(UnsupportedLayout, match=message):
        formats.recognise(shapes, {})


def test_a_lokr_of_whole_matrices_has_a_layers_full_rank_and_is_read(tmp_path: Path) -> None:
    """As ai-toolkit writes it, and LyCORIS with a dim of 100000: most LoKrs there are."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(8, 8, generator=g), torch.randn(160, 160, generator=g)
    key = f"lycoris_{path.replace('.', '_')}"
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": torch.tensor(1e10)}
    save_file(tensors, tmp_path / "a")
    (factors,) = read(tmp_path / "a", "sd1").values()
    assert sketch(tmp_path / "a").rank == factors.rank == 1280
    assert torch.equal(factors.up @ factors.down, torch.kron(w1, w2))
    shapes = {"lora_unet_x.lokr_w1": (8, 8), "lora_unet_x.lokr_w2": (160, 160)}
    with pytest.raises(UnsupportedLayout, match="lokr_t1"):
        formats.recognise({**shapes, "lora_unet_x.lokr_t1": (2, 2, 3, 3)}, {})


def test_differences_beside_a_lora_are_named_and_the_lora_is_read(tmp_path: Path) -> None:
    updates, _ = write(tmp_path / "a", LoConModule, [LINEAR], lora_dim=4, alpha=4)
    more = {f"{flat(CONV)}.diff_b": torch.ones(4), "lora_unet_conv_norm_out.w_norm": torch.ones(80)}
    save_file({**load_file(tmp_path / "a"), **more}, tmp_path / "b")
    binding = formats.bind(sketch(tmp_path / "b"), "pocket")
    assert set(binding.unbound) == set(more)
    assert_updates(formats.load(tmp_path / "b", binding), updates)
