"""What counts as a change, and what is looked at when: configurations, pictures, choices that were cut."""

import io
import threading

import pytest
from PIL import Image

from registry.hub.files import WEIGHTS
from registry.hub.plan import Planned
from registry.hub.pull import pull
from registry.hub.push import push
from registry.hub.sync import linked, sync
from tests.hub.conftest import Open, Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn, Trouble
from tests.hub.test_round_trip import png, show
from tests.hub.test_sync import meanwhile, same_on_both_sides, sha256, theirs

CONFIG = '{"peft_type": "LORA", "r": 1}'


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo, with a configuration of PEFT's."""
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n", adapter_config=CONFIG)
    push(studio.exchange, "milo", repo="ann/milo")
    return studio


def config_of(studio: Studio, ref: str) -> object:
    return studio.catalog.resolve(ref).facts["declared"]["adapter_config"]


def test_a_configuration_that_is_gone_there_makes_a_version_without_it(
    standin: StandIn, milo: Studio
) -> None:
    standin.repo("ann/milo").write({"adapter_config.json": None}, "theirs")
    (outcome,) = milo.sync()
    assert (outcome.action, outcome.number) == ("pulled", 2)
    assert (config_of(milo, "milo:1"), config_of(milo, "milo:2")) == (CONFIG, "")
    same_on_both_sides(standin, milo)


def test_a_card_that_changed_as_well_hides_no_configuration_that_is_gone(
    standin: StandIn, milo: Studio
) -> None:
    standin.repo("ann/milo").write({"adapter_config.json": None, "README.md": File.regular(b"# x")}, "theirs")
    (outcome,) = milo.sync()
    assert (outcome.action, config_of(milo, "milo:2")) == ("pulled", "")


def test_weights_without_a_configuration_leave_none_beside_them(standin: StandIn, milo: Studio) -> None:
    milo.check_in("milo", card=milo.card("milo"))
    standin.repo("ann/milo").write({"adapter_config.json": File.regular(b'{"r": 2}')}, "theirs")
    (outcome,) = milo.sync(keep="ours")
    assert outcome.action == "published"
    assert "adapter_config.json" not in standin.repo("ann/milo").head.files


@pytest.mark.parametrize("keep", ["theirs", "both"])
def test_another_configuration_of_the_same_file_is_a_change_of_ours(
    standin: StandIn, milo: Studio, keep: str
) -> None:
    path = milo.catalog.blobs.path(milo.catalog.resolve("milo").digest)
    milo.check_in("milo", path=path, card=milo.card("milo"), adapter_config='{"peft_type": "LORA", "r": 2}')
    theirs(standin, milo, card="# Theirs")
    (outcome,) = milo.sync()
    assert outcome.action == "conflict"
    (outcome,) = milo.sync(keep=keep)
    assert outcome.action == {"theirs": "pulled", "both": "both"}[keep]
    assert (outcome.number, config_of(milo, "milo:2"), config_of(milo, "milo:3")) == (
        3, '{"peft_type": "LORA", "r": 2}', CONFIG,
    )  # fmt: skip
    if keep == "both":
        assert standin.repo("ann/milo").at("v2").files["adapter_config.json"].data.endswith(b'"r": 2}')
    same_on_both_sides(standin, milo)


def test_pictures_that_came_while_we_only_published_are_taken_later(standin: StandIn, milo: Studio) -> None:
    repo = standin.repo("ann/milo")
    repo.write({"red.png": File.regular(png("red"))}, "theirs")
    milo.check_in("milo", card=milo.card("milo"))
    assert [o.action for o in milo.sync(direction="push")] == ["published"]
    assert milo.catalog.previews(milo.catalog.resolve("milo")) == []
    for _ in range(2):
        assert [o.action for o in milo.sync()] == ["unchanged"]
        assert len(milo.catalog.previews(milo.catalog.resolve("milo"))) == 1
    with standin.counted() as seen:
        milo.sync()
    assert len(seen) == 1


def test_pictures_that_went_while_we_only_published_are_not_sent_again(
    standin: StandIn, milo: Studio
) -> None:
    repo = standin.repo("ann/milo")
    show(milo, "milo", "red")
    milo.sync()
    (path,) = (path for path in repo.head.files if path.endswith(".png"))
    repo.write({path: None}, "theirs")
    milo.set_card("milo", b"---\nlicense: mit\n---\n# Ours\n")
    assert [o.action for o in milo.sync(direction="push")] == ["published"]
    assert path not in repo.head.files
    assert len(milo.catalog.previews(milo.catalog.resolve("milo"))) == 1


def test_pictures_that_came_while_the_version_was_deleted_are_taken_by_the_next_one(
    standin: StandIn, milo: Studio
) -> None:
    milo.check_in("milo")
    milo.sync()
    milo.catalog.delete("milo:2")
    standin.repo("ann/milo").write({"red.png": File.regular(png("red"))}, "theirs")
    assert [o.action for o in milo.sync()] == ["unchanged"]
    milo.check_in("milo")
    milo.sync()
    assert len(milo.catalog.previews(milo.catalog.resolve("milo:3"))) == 1
    same_on_both_sides(standin, milo)


@pytest.mark.parametrize("then", ["theirs", "both", ""])
def test_a_choice_that_was_cut_before_anything_was_sent_can_be_another(
    standin: StandIn, milo: Studio, then: str
) -> None:
    milo.check_in("milo")
    other = sha256(theirs(standin, milo, weights=True))
    standin.trouble("POST .*/commit/", Trouble.CUT_BEFORE, times=9)
    assert [o.action for o in milo.sync(keep="ours")] == ["failed"]
    standin._planned.clear()
    (outcome,) = milo.sync(keep=then)
    assert outcome.action == {"theirs": "pulled", "both": "both", "": "conflict"}[then]
    assert standin.repo("ann/milo").head.files[WEIGHTS["lora"]].sha256 == other


def test_a_configuration_that_goes_in_the_midst_of_a_pull_is_looked_at_again(
    standin: StandIn, milo: Studio
) -> None:
    repo = standin.repo("ann/milo")
    theirs(standin, milo, weights=True)
    gone = {"adapter_config.json": None}
    meanwhile(standin, "GET .*/resolve/.*safetensors", lambda: repo.write({**gone}, "theirs"))
    (outcome,) = milo.sync()
    assert (outcome.action, config_of(milo, "milo")) == ("pulled", "")
    same_on_both_sides(standin, milo)


@pytest.mark.parametrize("keep", ["", "ours"])
def test_a_picture_that_was_pulled_stays_there_byte_for_byte(
    standin: StandIn, studio: Studio, studios: Open, keep: str
) -> None:
    studio.check_in("milo", card=b"# Milo")
    push(studio.exchange, "milo", repo="ann/milo")
    repo, other = standin.repo("ann/milo"), studios()
    image = io.BytesIO()
    Image.new("RGB", (3000, 40), "red").save(image, "JPEG")  # larger than previews are kept
    repo.write({"images/red.jpg": File.regular(image.getvalue())}, "theirs")
    (shown,) = other.catalog.previews(pull(other.exchange, "ann/milo").version)
    assert shown.width < 3000
    other.set_card("milo", other.card("milo") + b"\nEdited here.\n")
    if keep:
        repo.write({"README.md": File.regular(b"# Theirs")}, "theirs")
        (outcome,) = other.sync(keep=keep)
        assert outcome.action == "published"
    else:
        plan = push(other.exchange, "milo").plan
        assert Planned("images/red.jpg", len(image.getvalue()), fresh=False) in plan.files
    assert b"Edited here." in repo.head.files["README.md"].data
    assert repo.head.files["images/red.jpg"].data == image.getvalue()
    assert [path for path in repo.head.files if path.startswith("images/")] == ["images/red.jpg"]
    assert [outcome.action for outcome in other.sync()] == ["unchanged"]


def test_what_is_done_first_is_told_first(standin: StandIn, studio: Studio) -> None:
    for name in ("alba", "milo"):
        studio.check_in(name)
        push(studio.exchange, name, repo=f"ann/{name}")
    told = threading.Event()

    def wait(request: str) -> None:
        if "ann/alba" in request:
            told.wait(10)

    standin.dead = wait
    outcomes = sync(studio.exchange, linked(studio.exchange, ["alba", "milo"]))
    assert next(outcomes).name == "milo"
    told.set()
    assert [outcome.name for outcome in outcomes] == ["alba"]
