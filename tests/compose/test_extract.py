"""A checkpoint against its base: what is found is what was trained."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from compose.errors import IncompatibleBase, InvalidRequest, NonFinite
from compose.extract import extract
from compose.pocket import WEIGHTS
from tests.adapters import Layers, delta, random_factors

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def tuned(directory: Path, layers: Layers, bias: float = 0.0) -> Path:
    """Pocket in float32 with the layers' updates in its weights."""
    shutil.copytree(WEIGHTS, directory)
    for file, component in ((UNET, "unet"), (TEXT, "text_encoder")):
        tensors = {name: tensor.float() for name, tensor in load_file(directory / file).items()}
        for name, factors in layers.items():
            if name.startswith(f"{component}."):
                path = name.split(".", 1)[1]
                key = next(
                    k
                    for k in (f"{path}.weight", f"{path.removeprefix('text_model.')}.weight")
                    if k in tensors
                )
                tensors[key] = tensors[key] + delta(factors).float().view_as(tensors[key])
        if bias:
            tensors[next(name for name in tensors if name.endswith(".bias"))] += bias
        save_file(tensors, directory / file)
    return directory


def test_an_update_is_found_again_with_the_rank_it_has(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=3, where=lambda n: ".attn2." in n or ".self_attn." in n or "conv1" in n
    )
    found = extract(tuned(tmp_path / "tuned", layers), WEIGHTS, "pocket", energy=0.9999)
    assert found.layers.keys() == layers.keys()
    assert {factors.rank for factors in found.layers.values()} == {3}
    for name, factors in layers.items():
        assert (delta(found.layers[name]) - delta(factors)).norm() < 1e-4 * delta(factors).norm()
    assert found.error < 1e-3
    assert (found.left_behind, found.left_share) == ((), 0.0)


def test_the_rank_follows_the_energy_and_the_error_is_known(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=6, where=lambda n: n.endswith("mid_block.attentions.0.proj_in")
    )
    (name,) = layers
    directory = tuned(tmp_path / "tuned", layers)
    values = torch.linalg.svdvals(delta(layers[name]))
    shares = values.square().cumsum(0) / values.square().sum()
    found = extract(directory, WEIGHTS, "pocket", energy=0.8)
    kept = int((shares < 0.8).sum()) + 1
    assert found.layers[name].rank == kept
    assert found.error == pytest.approx(float((1 - shares[kept - 1]).sqrt()), rel=1e-3)
    assert extract(directory, WEIGHTS, "pocket", rank=2, energy=1.0).layers[name].rank == 2


def test_what_no_lora_can_hold_is_told(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=3, where=lambda n: n.endswith("mid_block.attentions.0.proj_in")
    )
    found = extract(tuned(tmp_path / "tuned", layers, bias=0.1), WEIGHTS, "pocket")
    assert len(found.left_behind) == 2
    assert all(name.endswith(".bias") for name in found.left_behind)
    assert 0 < found.left_share < 1


def test_what_is_no_checkpoint_of_the_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not differ"):
        extract(WEIGHTS, WEIGHTS, "pocket")
    with pytest.raises(IncompatibleBase, match=r"is no diffusers directory .*save_pretrained"):
        extract(tmp_path, WEIGHTS, "pocket")
    with pytest.raises(InvalidRequest, match=r"rank 0 is not within 1 and 1024"):
        extract(WEIGHTS, WEIGHTS, "pocket", rank=0)
    with pytest.raises(InvalidRequest, match=r"energy nan is not within"):
        extract(WEIGHTS, WEIGHTS, "pocket", energy=float("nan"))
    with pytest.raises(InvalidRequest, match=r"unknown family 'sd9'"):
        extract(WEIGHTS, WEIGHTS, "sd9")
    other = tmp_path / "other"
    shutil.copytree(WEIGHTS, other)
    tensors = load_file(other / UNET)
    save_file({n: t for n, t in tensors.items() if "mid_block" not in n}, other / UNET)
    with pytest.raises(IncompatibleBase, match=r"has no .*mid_block.* of that shape: it is not its base"):
        extract(WEIGHTS, other, "pocket")
    (other / UNET).write_bytes((other / UNET).read_bytes()[:100])
    with pytest.raises(IncompatibleBase, match="cannot be read"):
        extract(other, WEIGHTS, "pocket")


def test_of_several_weight_files_the_plainest_name_is_read(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=3, where=lambda n: n.endswith("mid_block.attentions.0.proj_in")
    )
    directory = tuned(tmp_path / "tuned", layers)
    stem = (directory / UNET).with_suffix("")
    for other in ("fp16", "non_ema"):
        shutil.copy(WEIGHTS / UNET, stem.with_suffix(f".{other}.safetensors"))
    assert extract(directory, WEIGHTS, "pocket").layers.keys() == layers.keys()
    (directory / "unet" / "x.safetensors.index.json").write_text("[]")
    with pytest.raises(IncompatibleBase, match=r"index\.json cannot be read"):
        extract(directory, WEIGHTS, "pocket")


def test_shards_are_read_whole_in_one_precision_and_in_another(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=3, where=lambda n: n.endswith(("mid_block.attentions.0.proj_in", "conv_out"))
    )
    directory = tuned(tmp_path / "tuned", layers)
    model = UNet2DConditionModel.from_pretrained(directory / "unet")
    (directory / UNET).unlink()
    model.save_pretrained(directory / "unet", variant="fp16", max_shard_size="1MB")
    assert len(list((directory / "unet").glob("*-of-*.safetensors"))) > 2
    assert extract(directory, WEIGHTS, "pocket").layers.keys() == layers.keys()
    UNet2DConditionModel.from_pretrained(WEIGHTS / "unet").save_pretrained(
        directory / "unet", max_shard_size="1MB"
    )
    with pytest.raises(InvalidRequest, match="does not differ"):
        extract(directory, WEIGHTS, "pocket")
    for index in (directory / "unet").glob("*.json"):
        index.unlink()
    with pytest.raises(IncompatibleBase, match="shards without their index"):
        extract(directory, WEIGHTS, "pocket")


def test_the_numbers_of_the_positions_in_old_files_are_no_weights(tmp_path: Path) -> None:
    layers = random_factors("pocket", seed=1, rank=3, where=lambda n: n.endswith("layers.0.mlp.fc1"))
    directory = tuned(tmp_path / "tuned", layers)
    tensors = load_file(directory / TEXT)
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, directory / TEXT)
    found = extract(directory, WEIGHTS, "pocket")
    assert (found.layers.keys(), found.left_behind) == (layers.keys(), ())


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    layers = random_factors(
        "pocket", seed=1, rank=3, where=lambda n: n.endswith("mid_block.attentions.0.proj_in")
    )
    directory = tuned(tmp_path / "tuned", layers, bias=float("nan"))
    with pytest.raises(NonFinite, match=r"'.*bias' holds NaN or infinity"):
        extract(directory, WEIGHTS, "pocket")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["stored", "by way of"])
def test_layers_that_were_only_stored_in_another_precision_are_not_taken_for_trained(
    tmp_path: Path, dtype: torch.dtype, way: str
) -> None:
    """An SD 1.5 in float32 and a DreamBooth of it in half precision is the usual case."""
    layers = random_factors("pocket", seed=1, rank=3, where=lambda n: n.endswith("attn2.to_v"))
    (tmp_path / "base").mkdir()
    noise = torch.Generator().manual_seed(0)
    for place, own in (("base", {}), ("tuned", layers)):
        noise.manual_seed(0)
        directory = tuned(tmp_path / place / "pipeline", own)
        for file in (UNET, TEXT):  # numbers that no half precision holds
            full = {
                k: t + 1e-4 * t * torch.rand(t.shape, generator=noise)
                for k, t in load_file(directory / file).items()
            }
            if place == "tuned":
                full = {k: t.to(dtype) if way == "stored" else t.to(dtype).float() for k, t in full.items()}
            save_file(full, directory / file)
    found = extract(tmp_path / "tuned" / "pipeline", tmp_path / "base" / "pipeline", "pocket", energy=0.99)
    assert found.layers.keys() == layers.keys()
    assert (found.left_behind, found.left_share) == ((), 0.0)
    for name, factors in layers.items():
        assert (delta(found.layers[name]) - delta(factors)).norm() < 0.2 * delta(factors).norm()
