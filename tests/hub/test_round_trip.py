"""What is published comes back the same, and loads in plain diffusers."""

import io
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import save_file

from compose import pocket
from registry.errors import Conflict, Denied, InvalidFile, InvalidName, NotFound
from registry.headers import read_header
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open, Studio, impatient, plain_client
from tests.hub.repos import File
from tests.hub.standin import StandIn

CARD = b"---\nlicense: mit\ninstance_prompt: milo\n# mine\ntags: [red, hat]\n---\n\nMilo   wears a hat. \r\n"


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(out, "PNG")
    return out.getvalue()


def show(studio: Studio, ref: str, colour: str, caption: str = "") -> str:
    version = studio.catalog.resolve(ref)
    return studio.exchange.door.add_preview(version, png(colour), caption, "ann")


def test_what_is_pushed_comes_back_with_the_same_digests_and_the_card_byte_for_byte(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    version = studio.check_in("milo", card=CARD)
    shown = show(studio, "milo", "red", "a milo on red")
    done = push(studio.exchange, "milo", repo="ann/milo")
    assert done.made
    there, other = standin.repo("ann/milo"), studios()
    assert there.tags == {"v1": done.commit} == {"v1": there.head.oid}
    pulled = pull(other.exchange, "ann/milo").version
    assert (pulled.name, pulled.digest, pulled.digests) == ("milo", version.digest, version.digests)
    card = there.head.files["README.md"].data
    assert other.card("milo") == studio.card("milo") == card
    assert b"\n# mine\n" in card
    assert b"---\n\nMilo   wears a hat. \r\n\n<Gallery />\n" in card
    assert [(p.digest, p.caption) for p in other.catalog.previews(pulled)] == [(shown, "a milo on red")]
    assert [t["word"] for t in pulled.facts["triggers"]] == ["milo"]
    assert pulled.facts["origin"] == {
        "hub": standin.url, "repo": "ann/milo", "commit": done.commit, "file": WEIGHTS["lora"],
    }  # fmt: skip
    for side in (studio, other):
        (outcome,) = side.sync()
        assert (outcome.action, outcome.commit, outcome.notes) == ("unchanged", done.commit, ())


def test_a_push_is_one_commit_and_pushing_again_is_none(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", card=CARD)
    show(studio, "milo", "red")
    first = push(studio.exchange, "milo", repo="ann/milo", private=True)
    repo = standin.repo("ann/milo")
    assert repo.private
    assert [commit.title for commit in repo.commits] == ["initial", "milo version 1"]
    again = push(studio.exchange, "milo")
    assert (again.made, again.commit) == (False, first.commit)
    assert len(repo.commits) == 2
    assert [event.action for event in studio.catalog.events(0)][-2:] == ["publish", "publish"]


def test_a_dry_run_shows_files_and_card_and_touches_nothing(standin: StandIn, studio: Studio) -> None:
    version = studio.check_in("milo", card=CARD)
    show(studio, "milo", "red")
    before = studio.catalog.events(0)
    plan = push(studio.exchange, "milo", repo="ann/milo", dry_run=True).plan
    names = {planned.path for planned in plan.files}
    assert {"README.md", "pytorch_lora_weights.safetensors"} < names
    assert len(names) == 3
    assert b"template:sd-lora" in plan.card
    assert not standin.repos
    assert {seen.method for seen in standin.requests} == {"GET"}
    assert studio.catalog.events(0) == before
    assert studio.catalog.resolve("milo").card_digest == version.card_digest
    push(studio.exchange, "milo", repo="ann/milo")
    assert {p: f.size for p, f in standin.repo("ann/milo").head.files.items() if p in names} == {
        planned.path: planned.size for planned in plan.files
    }
    again = push(studio.exchange, "milo", dry_run=True).plan
    assert not any(planned.fresh for planned in again.files)


def test_every_version_has_its_tag_and_an_older_one_does_not_take_the_head(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    digests = []
    for _ in range(2):
        digests.append(studio.check_in("milo").digest)
        push(studio.exchange, "milo", repo="ann/milo")
    assert list(standin.repo("ann/milo").tags) == ["v1", "v2"]
    with pytest.raises(Conflict, match=r"milo:2 is published at ann/milo already"):
        push(studio.exchange, "milo:1")
    other = studios()
    pinned = pull(other.exchange, "ann/milo", revision="v1", name="pinned").version
    assert pinned.digest == digests[0]
    assert other.sync() == []  # a pinned revision follows nothing


def test_a_pull_without_a_name_lands_on_nothing_from_elsewhere(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    mine = studio.check_in("milo").digest
    eve = studios()
    theirs = eve.check_in("milo").digest
    push(eve.exchange, "milo", repo="eve/milo")
    for revision in ("", "v1"):
        with pytest.raises(
            Conflict, match=r"milo:1 is here already and is not from eve/milo; choose another"
        ):
            pull(studio.exchange, "eve/milo", revision=revision)
    push(studio.exchange, "milo", repo="ann/milo")
    for revision, name in (("", ""), ("v1", ""), ("v1", "milo")):
        with pytest.raises(Conflict, match=r"milo is linked with ann/milo already; choose another --name"):
            pull(studio.exchange, "eve/milo", revision=revision, name=name)
    assert [version.digest for version in studio.catalog.history("milo")] == [mine]
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]
    pulled = pull(studio.exchange, "eve/milo", revision="v1", name="eves").version
    assert (pulled.ref, pulled.digest) == ("eves:1", theirs)


def test_a_chosen_name_is_pulled_onto_unless_it_is_linked(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    eve = studios()
    eve.check_in("milo")
    push(eve.exchange, "milo", repo="eve/milo")
    studio.check_in("milo")
    assert pull(studio.exchange, "eve/milo", revision="v1", name="milo").version.ref == "milo:2"
    eve.check_in("milo")
    push(eve.exchange, "milo")
    assert pull(studio.exchange, "eve/milo", revision="v2").version.ref == "milo:3"  # its own repository's


def test_an_older_revision_does_not_become_the_newest_version_of_what_is_linked(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    for _ in range(2):
        studio.check_in("luna")
        push(studio.exchange, "luna", repo="ann/luna")
    other = studios()
    pull(other.exchange, "ann/luna")
    for side in (studio, other):
        newest = side.catalog.resolve("luna")
        with pytest.raises(Conflict, match=r"ann/luna@v1 would become its newest version; choose another"):
            pull(side.exchange, "ann/luna", revision="v1")
        assert side.catalog.resolve("luna") == newest
        assert pull(side.exchange, "ann/luna", revision="v1", name="luna-pinned").created


def test_a_header_that_tells_of_its_training_is_stripped_on_request(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    told = {
        "ss_dataset_dirs": '{"10_secret": 1}',
        "ss_base_model_version": "sd_1.5",
        "note": "at /home/ann/x",
    }
    studio.check_in("milo", path=studio.weights(metadata=told))
    (note, *_) = push(studio.exchange, "milo", repo="ann/told").notes
    assert "tells of its training (note, ss_dataset_dirs); --strip leaves that out" in note
    done = push(studio.exchange, "milo", repo="ann/milo", strip=True, relink=True)
    assert done.notes[0] == "left out of the file's header: note, ss_dataset_dirs"
    file = standin.repo("ann/milo").head.files[WEIGHTS["lora"]]
    assert read_header(standin.storage.path(file.sha256)).metadata == {"ss_base_model_version": "sd_1.5"}
    (outcome,) = studio.sync()
    assert outcome.action == "unchanged"
    there = pull(studios().exchange, "ann/milo").version
    assert there.digests == studio.catalog.resolve("milo").digests


def test_several_weight_files_are_listed_and_one_is_chosen(standin: StandIn, studio: Studio) -> None:
    files = {f"{name}.safetensors": standin.storage.put(studio.weights().read_bytes()) for name in "ab"}
    standin.repo("ann/two").write({**files}, "two")
    with pytest.raises(NotFound, match=r"several weight files; choose one with --file: a.safe.*, b.safe"):
        pull(studio.exchange, "ann/two")
    with pytest.raises(NotFound, match=r"has no 'c'; choose one"):
        pull(studio.exchange, "ann/two", file="c")
    version = pull(studio.exchange, "ann/two", file="b.safetensors").version
    assert version.digest == f"sha256:{files['b.safetensors'].sha256}"
    assert version.name == "two"


def test_gated_private_missing_and_renamed_each_say_so(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    nobody = studios(impatient(standin, token=""))
    standin.repo("ann/gated", gated=True)
    standin.repo("ann/secret", private=True)
    standin.repo("ann/new")
    standin.renamed["ann/old"] = "ann/new"
    for who, repo, kind, message in (
        (nobody, "ann/gated", Denied, r"is gated; accept its conditions on its page, then set HF_TOKEN_127"),
        (nobody, "ann/secret", NotFound, r"no ann/secret on .*, or it is private; set HF_TOKEN_127"),
        (studio, "ann/none", NotFound, r"no ann/none on .*, or it is private; ask its owners"),
        (studio, "ann/old", NotFound, r"renamed; it is ann/new now: `atelier hub pull ann/new`"),
        (studio, "ann/old@main", NotFound, r"renamed; it is ann/new now: `atelier hub pull ann/new@main`"),
        (studio, "ann/new@v9", NotFound, r"has no such revision"),
        (studio, "ann/new", NotFound, r"has no safetensors file"),
        (studio, "../etc", InvalidName, r"'../etc' is no repository; write ORG/NAME"),
        (studio, "ann/new@../x", InvalidName, r"is no revision"),
        (
            studios(impatient(standin, token="hf_wrong")),
            "ann/new",
            Denied,
            r"does not know the token in HF_T",
        ),
    ):
        name, _, revision = repo.partition("@")
        with pytest.raises(kind, match=message):
            pull(who.exchange, name, revision=revision, name="x")
    nobody.check_in("milo")
    with pytest.raises(Denied, match="wants a token"):
        push(nobody.exchange, "milo", repo="ann/milo")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_repository_that_was_deleted_there_is_not_made_again(
    standin: StandIn, studio: Studio, dry_run: bool
) -> None:
    studio.check_in("milo")
    push(studio.exchange, "milo", repo="ann/milo", private=True)
    del standin.repos["ann/milo"]
    for private in (False, True):
        with pytest.raises(NotFound, match=r"no ann/milo on .*milo:1 was published there.*--repo ORG/NAME"):
            push(studio.exchange, "milo", private=private, dry_run=dry_run)
    assert standin.repos == {}
    push(studio.exchange, "milo", repo="ann/again", private=True, relink=True)
    assert standin.repo("ann/again").private


def test_a_repository_that_is_there_is_not_asked_for_again(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo")
    push(studio.exchange, "milo", repo="ann/milo")
    studio.check_in("milo")
    with standin.counted() as seen:
        push(studio.exchange, "milo")
    assert "/api/repos/create" not in {request.path for request in seen}


def test_a_push_takes_nobodys_place(standin: StandIn, studio: Studio, studios: Open) -> None:
    studio.check_in("milo")
    standin.repo("ann/taken").write({"README.md": File.regular(b"# Mine")}, "by hand")
    with pytest.raises(Conflict, match=r"ann/taken holds something already; take it first: atelier hub pull"):
        push(studio.exchange, "milo", repo="ann/taken")
    push(studio.exchange, "milo", repo="ann/milo")
    studio.check_in("other")
    with pytest.raises(Conflict, match="ann/milo is the repository of milo"):
        push(studio.exchange, "other", repo="ann/milo")
    with pytest.raises(InvalidName, match=r"where to\? other has no repository yet; --repo"):
        push(studio.exchange, "other")
    standin.repo("ann/milo").write({"README.md": File.regular(b"# Edited there")}, "by hand")
    with pytest.raises(Conflict, match=r"was changed on the Hub since.*hub sync milo"):
        push(studio.exchange, "milo")


def test_a_merge_whose_licence_nobody_settled_is_not_published(studio: Studio) -> None:
    path = studio.weights()
    studio.check_in("merged", path=path, origin='{"recipe": {"method": "svd"}, "licence": "needs review"}')
    with pytest.raises(InvalidFile, match=r"licence of merged:1 needs review.*settle it in its card"):
        push(studio.exchange, "merged", repo="ann/merged")
    studio.set_card("merged", b"---\nlicense: mit\n---\n")
    push(studio.exchange, "merged", repo="ann/merged")


def test_published_words_load_in_plain_diffusers(
    standin: StandIn, studio: Studio, studios: Open, tmp_path: Path
) -> None:
    save_file({"<fungo>": torch.randn(2, 96)}, tmp_path / "words.safetensors")
    version = studio.check_in("fungo", path=tmp_path / "words.safetensors")
    assert version.kind == "textual_inversion"
    push(studio.exchange, "fungo", repo="ann/fungo")
    with plain_client():
        folder = snapshot_download("ann/fungo", endpoint=standin.url, token=False, cache_dir=tmp_path / "c")
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None)
    pipeline.load_textual_inversion(folder)
    assert len(pipeline.tokenizer("<fungo> <fungo>_1", add_special_tokens=False).input_ids) == 2
    again = pull(studios().exchange, "ann/fungo").version
    assert (again.digest, again.kind) == (version.digest, version.kind)
    assert [t["word"] for t in again.facts["triggers"]] == [t["word"] for t in version.facts["triggers"]]


def test_a_published_lora_loads_in_plain_diffusers(standin: StandIn, studio: Studio, tmp_path: Path) -> None:
    milo = Path("compose/pocket/adapters/milo.safetensors")
    studio.check_in("milo", path=milo, card=milo.with_suffix(".md").read_bytes())
    push(studio.exchange, "milo", repo="ann/milo")
    with plain_client():
        folder = snapshot_download(
            "ann/milo", endpoint=standin.url, token=False, cache_dir=tmp_path / "cache"
        )
    assert (Path(folder) / WEIGHTS["lora"]).read_bytes() == milo.read_bytes()
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.WEIGHTS, safety_checker=None)
    pipeline.load_lora_weights(folder)
    assert pipeline.get_list_adapters().keys() == {"unet", "text_encoder"}
