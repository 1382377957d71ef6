"""What is published loads over HTTP in plain diffusers and peft, as the card says, and acts as it does here.

Every load is in a process of its own that knows nothing but HF_ENDPOINT.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compose import formats, pocket
from compose.pocket.layouts import beside
from registry.headers import read_header
from registry.hub.alphas import mixed
from registry.hub.files import PEFT, WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from server.checkin import recognise
from tests.adapters import random_factors, write_kohya
from tests.hub.conftest import SEEDS, Open, Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn

ADAPTERS = Path("compose/pocket/adapters")
START = f"""
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
BASE = {str(pocket.WEIGHTS)!r}


def base():
    return DiffusionPipeline.from_pretrained(BASE, safety_checker=None, torch_dtype=torch.float32)

plain = base()

def effect(pipeline):
    '''What an adapter adds to each layer of the UNet.'''
    before, unet = plain.unet.state_dict(), pipeline.unet
    if hasattr(unet, "merge_and_unload"):
        after = unet.merge_and_unload().state_dict()
    else:
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
        after = pipeline.unet.state_dict()
    return {{k: (after[k] - before[k]).contiguous() for k in before if not torch.equal(after[k], before[k])}}
"""


def elsewhere(standin: StandIn, folder: Path, script: str) -> str:
    """What a script prints in a fresh process with huggingface_hub as everybody has it."""
    kept = ("PATH", "PYTHONPATH", "LANG", "HOME")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "HF_ENDPOINT": standin.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", START + script, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def code(standin: StandIn, repo: str) -> str:
    """What the card of a repository says to write, for a base that is on this disk."""
    card = standin.repo(repo).head.files["README.md"].data.decode()
    (found,) = re.findall(r"```py\n(.*?)\n```", card, flags=re.S)
    whole = found.replace('from_pretrained("atelier/pocket"', "from_pretrained(BASE, safety_checker=None")
    assert whole != found
    return whole.replace(").images[0]", ', num_inference_steps=1, output_type="np").images[0]')


def updates(path: Path, config: str = "") -> dict[str, torch.Tensor]:
    """The UNet's updates that a file makes, by layer, as they are composed here."""
    sketch = recognise(read_header(path), config)
    layers = formats.load(path, formats.infer(sketch))
    return {n.removeprefix("unet."): f.up @ f.down for n, f in layers.items() if n.startswith("unet.")}


def same_updates(made: dict[str, torch.Tensor], meant: dict[str, torch.Tensor]) -> None:
    assert {name.removesuffix(".weight") for name in made} == meant.keys()
    for name, update in meant.items():
        there = made[f"{name}.weight"].reshape(update.shape)
        torch.testing.assert_close(there, update, rtol=1e-3, atol=2e-5)


def test_a_lora_loads_by_the_name_of_its_repository_and_a_revision_is_exactly_that_version(
    standin: StandIn, studio: Studio, tmp_path: Path
) -> None:
    kohya, diffusers = studio.folder / "kohya.safetensors", ADAPTERS / "milo.safetensors"
    # One alpha for all: those of fungo.safetensors differ by layer, which diffusers mixes up.
    factors = random_factors("pocket", seed=next(SEEDS), rank=4)
    write_kohya(kohya, factors, alpha=lambda name: 2.0)
    layouts = []
    for path in (kohya, diffusers):
        layouts.append(studio.check_in("milo", path=path, card=b"---\nlicense: mit\n---\n").facts["layout"])
        push(studio.exchange, "milo", repo="ann/milo")
    assert sorted(layouts) == ["diffusers", "kohya"]
    script = f"""
{code(standin, "ann/milo")}
for name, revision in (("newest", None), ("first", "v1")):
    pipeline = base()
    pipeline.load_lora_weights("ann/milo", revision=revision)
    save_file(effect(pipeline), f"{{sys.argv[1]}}/{{name}}")
"""
    elsewhere(standin, tmp_path, script)
    same_updates(load_file(tmp_path / "newest"), updates(diffusers))
    same_updates(load_file(tmp_path / "first"), updates(kohya))


def test_words_load_by_the_name_of_their_repository(standin: StandIn, studio: Studio, tmp_path: Path) -> None:
    vectors = torch.randn(2, 96)
    save_file({"<fungo>": vectors}, tmp_path / "words.safetensors")
    studio.check_in("fungo", path=tmp_path / "words.safetensors")
    push(studio.exchange, "fungo", repo="ann/fungo")
    script = f"""
{code(standin, "ann/fungo")}
pipeline = base()
pipeline.load_textual_inversion("ann/fungo")
ids = pipeline.tokenizer("<fungo> <fungo>_1", add_special_tokens=False).input_ids
words = pipeline.text_encoder.get_input_embeddings().weight[ids]
save_file({{"words": words.contiguous()}}, sys.argv[1] + "/words")
"""
    elsewhere(standin, tmp_path, script)
    torch.testing.assert_close(load_file(tmp_path / "words")["words"], vectors)


def test_what_peft_wrote_loads_in_peft_with_its_scale(
    standin: StandIn, studio: Studio, studios: Open, tmp_path: Path
) -> None:
    path = ADAPTERS / "nightbars.safetensors"
    told = json.loads(beside(path).read_text()) | {"base_model_name_or_path": "/home/ann/models/secret"}
    config = json.dumps(told)
    for name in ("whole", "stripped"):
        version = studio.check_in(name, path=path, adapter_config=config)
        assert version.facts["layout"] == "peft"
        push(studio.exchange, name, repo=f"ann/{name}", strip=name == "stripped")
        there = standin.repo(f"ann/{name}").head.files
        assert {PEFT, "adapter_config.json"} <= there.keys()
        assert not {*WEIGHTS.values()} & there.keys()
        assert (b"secret" in there["adapter_config.json"].data) is (name == "whole")
        again = pull(studios().exchange, f"ann/{name}").version
        assert again.digest == version.digest
    script = f"""
{code(standin, "ann/whole")}
for name in ("whole", "stripped"):
    pipeline = base()
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, f"ann/{{name}}")
    save_file(effect(pipeline), f"{{sys.argv[1]}}/{{name}}")
"""
    elsewhere(standin, tmp_path, script)
    for name in ("whole", "stripped"):
        same_updates(load_file(tmp_path / name), updates(path, config))
    assert [outcome.action for outcome in studio.sync()] == ["unchanged", "unchanged"]


def test_a_configuration_lies_beside_its_weights_in_a_folder_of_the_repository(
    standin: StandIn, studio: Studio, studios: Open, tmp_path: Path
) -> None:
    path = ADAPTERS / "nightbars.safetensors"
    files: dict[str, File | None] = {
        f"unet/{PEFT}": standin.storage.put(path.read_bytes()),
        "unet/adapter_config.json": File.regular(beside(path).read_bytes()),
    }
    standin.repo("ann/night").write(files, "theirs")
    pull(studio.exchange, "ann/night", name="night")
    config = json.dumps(json.loads(beside(path).read_text()) | {"lora_alpha": 7})
    studio.check_in(
        "night", path=path, adapter_config=config, card=b"---\nlicense: mit\n---\n", commit="x" * 40
    )
    assert [outcome.action for outcome in studio.sync()] == ["published"]
    there = standin.repo("ann/night").head.files
    assert json.loads(there["unet/adapter_config.json"].data)["lora_alpha"] == 7
    assert "adapter_config.json" not in there
    script = f"""
{code(standin, "ann/night")}
pipeline = base()
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "ann/night", subfolder="unet")
save_file(effect(pipeline), sys.argv[1] + "/effect")
"""
    elsewhere(standin, tmp_path, script)
    same_updates(load_file(tmp_path / "effect"), updates(path, config))
    other = pull(studios().exchange, "ann/night", name="night").version
    assert json.loads(other.facts["declared"]["adapter_config"])["lora_alpha"] == 7


def test_a_file_whose_alphas_diffusers_mixes_up_is_told_of(
    standin: StandIn, studio: Studio, tmp_path: Path
) -> None:
    note = "its layers have different alphas, which diffusers mixes up; `atelier save-as` makes a file of it"
    alike = tmp_path / "alike.safetensors"
    factors = random_factors("pocket", seed=next(SEEDS), rank=4)
    write_kohya(alike, factors, alpha=lambda name: 2.0)
    for name, path, told in (
        ("fungo", ADAPTERS / "fungo.safetensors", True),
        ("alike", alike, False),
        ("milo", ADAPTERS / "milo.safetensors", False),
    ):
        studio.check_in(name, path=path)
        notes = push(studio.exchange, name, repo=f"ann/{name}", dry_run=True).notes
        assert any(said.startswith(note) for said in notes) is told
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.float8_e4m3fn):
        tensors = load_file(alike)
        names = [name for name in tensors if name.endswith(".alpha")]
        for place, name in enumerate(names):
            tensors[name] = torch.tensor(1 + place % 2).to(dtype)
        save_file(tensors, tmp_path / "mixed.safetensors")
        assert mixed(tmp_path / "mixed.safetensors") is (dtype is not torch.float8_e4m3fn)


def test_a_layout_that_diffusers_does_not_load_promises_nothing(standin: StandIn, studio: Studio) -> None:
    tensors = {}
    for key in ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",):
        for part, shape in (
            ("hada_w1_a", (80, 4)),
            ("hada_w1_b", (4, 80)),
            ("hada_w2_a", (80, 4)),
            ("hada_w2_b", (4, 80)),
        ):
            tensors[f"lora_unet_{key}.{part}"] = torch.randn(shape)
    save_file(tensors, studio.folder / "loha.safetensors")
    version = studio.check_in("loha", path=studio.folder / "loha.safetensors")
    assert version.facts["layout"] == "lycoris"
    done = push(studio.exchange, "loha", repo="ann/loha")
    card = standin.repo("ann/loha").head.files["README.md"].data.decode()
    assert "diffusers does not load its layout, lycoris, by itself; web UIs do." in card
    assert "load_lora_weights" not in card
    assert any("which diffusers does not load by itself" in note for note in done.notes)
