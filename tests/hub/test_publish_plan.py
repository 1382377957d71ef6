"""A dry run is the push up to where anything would change: it shows the same, and refuses the same."""

import hashlib
from collections.abc import Callable

import pytest

from registry.errors import Conflict, InvalidFile, InvalidName, NotFound, RegistryError, Renamed
from registry.hub.plan import Plan, Shot
from registry.hub.pull import pull
from registry.hub.push import push
from server.previews import redrawn
from tests.hub.conftest import Open, Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn, Trouble
from tests.hub.test_publish_strip import TELLING, peft
from tests.hub.test_round_trip import CARD, png, show

LOOKS = {"GET", "HEAD"}


def shown(plan: Plan) -> tuple[object, ...]:
    return plan.files, plan.delete, plan.card, plan.tag, plan.repo, plan.notes


def nothing_changes(standin: StandIn, studio: Studio, work: Callable[[], object]) -> None:
    """Neither there nor here."""
    repos = {name: [c.oid for c in repo.commits] for name, repo in standin.repos.items()}
    tags = {name: dict(repo.tags) for name, repo in standin.repos.items()}
    events, links = studio.catalog.events(0), studio.exchange.links.all()
    blobs = {digest for digest, _ in studio.catalog.blobs.files()}
    with standin.counted() as seen:
        work()
    assert {request.method for request in seen} <= LOOKS
    assert {name: [c.oid for c in repo.commits] for name, repo in standin.repos.items()} == repos
    assert {name: dict(repo.tags) for name, repo in standin.repos.items()} == tags
    assert (studio.catalog.events(0), studio.exchange.links.all()) == (events, links)
    assert {digest for digest, _ in studio.catalog.blobs.files()} == blobs


def test_a_dry_run_shows_what_the_push_sends(standin: StandIn, studio: Studio) -> None:
    for told in ({}, TELLING):
        studio.check_in("milo", card=CARD, path=studio.weights(metadata=told or None))
        show(studio, "milo", "red", "on red")
        shot = Shot(redrawn(png("blue"))[0], "sweep: milo 0 to 1.2; a milo")
        dry: list[Plan] = []

        def look(shot: Shot = shot, dry: list[Plan] = dry) -> None:
            dry.append(
                push(studio.exchange, "milo", repo="ann/milo", strip=True, shot=shot, dry_run=True).plan
            )

        nothing_changes(standin, studio, look)
        done = push(studio.exchange, "milo", repo="ann/milo", strip=True, shot=shot)
        assert shown(dry[0]) == shown(done.plan)
        there = standin.repo("ann/milo").head.files
        assert {f.path: f.size for f in done.plan.files} == {
            path: file.size for path, file in there.items() if path in {f.path for f in done.plan.files}
        }
        picture = f"images/{hashlib.sha256(shot.png).hexdigest()[:16]}.png"
        assert picture in there
        assert picture.encode() in there["README.md"].data
        captions = [p.caption for p in studio.catalog.previews(studio.catalog.resolve("milo"))]
        assert captions == ["on red", "sweep: milo 0 to 1.2; a milo"]


def refusals(standin: StandIn, studio: Studio, studios: Open) -> dict[str, tuple[type[RegistryError], str]]:
    """By name of the asset, what its push is refused with; its repository is ann/NAME."""
    studio.check_in(
        "merged", path=studio.weights(), origin='{"recipe": {"method": "svd"}, "licence": "needs review"}'
    )
    studio.check_in("unread", card=b"---\nmade: 2026-13-45\n---\n")
    studio.check_in("taken")
    standin.repo("ann/taken").write({"README.md": File.regular(b"# Mine")}, "by hand")
    studio.check_in("changed")
    push(studio.exchange, "changed", repo="ann/changed")
    standin.repo("ann/changed").write({"README.md": File.regular(b"# Edited there")}, "theirs")
    studio.check_in("gone")
    push(studio.exchange, "gone", repo="ann/gone")
    del standin.repos["ann/gone"]
    studio.check_in("renamed")
    standin.repo("ann/anew")
    standin.renamed["ann/renamed"] = "ann/anew"
    studio.check_in("moved")
    push(studio.exchange, "moved", repo="ann/elsewhere")
    studio.check_in("public")
    standin.repo("ann/public")
    studio.check_in("full")
    for n in range(8):
        show(studio, "full", f"#0000{n:02x}")
    return {
        "merged": (InvalidFile, "licence of merged:1 needs review"),
        "unread": (InvalidFile, r"no Hub reads the card's front matter: month must be in 1\.\.12; put the"),
        "taken": (Conflict, "ann/taken holds something already; take it first: atelier hub pull"),
        "changed": (Conflict, "ann/changed was changed on the Hub since it was last seen"),
        "gone": (NotFound, "a repository that is gone is not made again: .* --repo ORG/NAME --relink"),
        "renamed": (
            Renamed,
            "ann/renamed has been renamed; it is ann/anew now. .*push renamed --repo ann/anew`",
        ),
        "moved": (Conflict, "moved is published at ann/elsewhere on .*; --relink leaves that as it is"),
        "public": (Conflict, "ann/public is there and public, and --private makes only a new"),
        "full": (Conflict, "full:1 has 8 previews already; take one away first"),
    }


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_push_refuses_a_dry_run_refuses_and_neither_changes_anything(
    standin: StandIn, studio: Studio, studios: Open, dry_run: bool
) -> None:
    for name, (kind, message) in refusals(standin, studio, studios).items():
        shot = Shot(redrawn(png("blue"))[0], "") if name == "full" else None

        def work(
            name: str = name, shot: Shot | None = shot, kind: type = kind, message: str = message
        ) -> None:
            with pytest.raises(kind, match=message):
                push(
                    studio.exchange,
                    name,
                    repo=f"ann/{name}",
                    private=name == "public",
                    dry_run=dry_run,
                    shot=shot,
                )

        nothing_changes(standin, studio, work)


def test_a_dry_run_knows_of_a_push_whose_end_nobody_heard_and_settles_nothing(
    standin: StandIn, studio: Studio
) -> None:
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo")
    studio.check_in("milo", card=CARD)
    gone: list[str] = []

    def cut(request: str) -> Trouble | None:
        first = "/commit/" in request and not gone
        gone.extend([request] if first else [])
        return Trouble.CUT_AFTER if first else Trouble.CUT_BEFORE if gone else None

    standin.dead = cut
    with pytest.raises(RegistryError):
        push(studio.exchange, "milo")
    standin.dead = None

    def look() -> None:
        plan = push(studio.exchange, "milo", dry_run=True).plan
        assert not any(file.fresh for file in plan.files)
        (outcome,) = studio.sync(dry_run=True)
        assert outcome.action == "unchanged"

    nothing_changes(standin, studio, look)
    assert standin.repo("ann/milo").tags.keys() == {"v1"}
    again = push(studio.exchange, "milo")
    assert (again.made, standin.repo("ann/milo").tags["v2"]) == (False, again.commit)


def test_an_asset_has_another_repository_only_when_that_is_said(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", path=studio.weights(metadata=TELLING))
    push(studio.exchange, "milo", repo="ann/milo", strip=True)
    before = studio.exchange.links.of("milo")
    with pytest.raises(Conflict, match=r"milo is published at ann/milo on .*; --relink leaves that as it is"):
        push(studio.exchange, "milo", repo="ann/other")
    assert studio.exchange.links.of("milo") == before
    assert list(standin.repos) == ["ann/milo"]
    push(studio.exchange, "milo", repo="ann/milo")  # its own needs no word
    done = push(studio.exchange, "milo", repo="ann/other", relink=True)
    assert (done.made, standin.repo("ann/other").tags) == (True, {"v1": done.commit})
    assert "ss_dataset_dirs" in done.notes[0]  # stripped as before
    assert studio.exchange.links.of("milo").repo == "ann/other"
    assert len(standin.repo("ann/milo").commits) == 2
    standin.repo("ann/third").write({"README.md": File.regular(b"# Mine")}, "by hand")
    with pytest.raises(Conflict, match=r"ann/third holds something already; choose a --repo that is empty"):
        push(studio.exchange, "milo", repo="ann/third", relink=True)


def test_a_first_push_that_failed_binds_an_asset_to_nothing(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", card=CARD)
    standin.repo("ann/taken").write({"README.md": File.regular(b"# Mine")}, "by hand")
    with pytest.raises(Conflict):
        push(studio.exchange, "milo", repo="ann/taken")
    with pytest.raises(InvalidName, match="where to"):
        push(studio.exchange, "milo")
    assert push(studio.exchange, "milo", repo="ann/milo").made


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_renamed_repository_is_named_and_followed_when_that_is_said(
    standin: StandIn, studio: Studio, dry_run: bool
) -> None:
    studio.check_in("milo", card=CARD)
    first = push(studio.exchange, "milo", repo="ann/milo")
    standin.repos["ann/new"] = standin.repos.pop("ann/milo")
    standin.repos["ann/new"].id = "ann/new"
    standin.renamed["ann/milo"] = "ann/new"
    studio.check_in("milo", card=CARD)
    message = (
        r"ann/milo has been renamed; it is ann/new now\. `atelier hub push milo --repo ann/new --relink`"
    )
    for repo in ("", "ann/milo"):
        with pytest.raises(Renamed, match=message):
            push(studio.exchange, "milo", repo=repo, dry_run=dry_run)
    assert list(standin.repos) == ["ann/new"]
    with pytest.raises(Conflict, match="--relink"):
        push(studio.exchange, "milo", repo="ann/new", dry_run=dry_run)
    if not dry_run:
        done = push(studio.exchange, "milo", repo="ann/new", relink=True)
        assert standin.repo("ann/new").tags == {"v1": first.commit, "v2": done.commit}
        assert [outcome.action for outcome in studio.sync()] == ["unchanged"]


def test_a_renamed_repository_that_was_changed_is_followed_by_syncs_too(
    standin: StandIn, studio: Studio
) -> None:
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo")
    standin.repos["ann/new"] = standin.repos.pop("ann/milo")
    standin.repos["ann/new"].id = "ann/new"
    standin.renamed["ann/milo"] = "ann/new"
    standin.repo("ann/new").write({"README.md": File.regular(b"# Edited there")}, "theirs")
    (outcome,) = studio.sync()
    assert outcome.action == "failed"
    assert outcome.notes == (
        "ann/milo has been renamed; it is ann/new now; `atelier hub push milo --repo ann/new --relink` "
        "follows it",
    )
    with pytest.raises(Conflict, match="ann/new was changed on the Hub since it was last seen"):
        push(studio.exchange, "milo", repo="ann/new", relink=True)
    assert [outcome.action for outcome in studio.sync()] == ["pulled"]
    assert studio.card("milo") == b"# Edited there"


def test_a_new_repository_is_private_when_that_is_said(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo", private=True)
    assert standin.repo("ann/milo").private
    studio.check_in("milo", card=CARD)
    assert push(studio.exchange, "milo", private=True).made  # it is already


def test_a_configuration_goes_with_the_weights_it_belongs_to(
    standin: StandIn, studio: Studio, studios: Open
) -> None:
    config = peft(studio.folder / "peft.safetensors")
    studio.check_in("milo", path=studio.folder / "peft.safetensors", adapter_config=config)
    push(studio.exchange, "milo", repo="ann/milo")
    assert "adapter_config.json" in standin.repo("ann/milo").head.files
    studio.check_in("milo")
    dry = push(studio.exchange, "milo", dry_run=True)
    assert dry.plan.delete == ("adapter_config.json",)
    assert "adapter_config.json there goes: it belongs to the weights before these" in dry.notes
    push(studio.exchange, "milo")
    assert "adapter_config.json" not in standin.repo("ann/milo").head.files
    version = pull(studios().exchange, "ann/milo").version
    assert version.digest == studio.catalog.resolve("milo").digest


def test_a_card_that_gets_too_long_is_refused_by_the_dry_run(standin: StandIn, studio: Studio) -> None:
    studio.check_in("milo", card=b"---\nlicense: mit\nnote: " + b"x" * ((32 << 10) - 60) + b"\n---\n# Milo\n")
    for dry_run in (True, False):
        with pytest.raises(InvalidFile, match=r"front matter has \d+ characters, the limit is 32768"):
            push(studio.exchange, "milo", repo="ann/milo", dry_run=dry_run)
    assert not standin.repos


def test_what_somebody_else_makes_public_meanwhile_is_not_published_to(
    standin: StandIn, studio: Studio
) -> None:
    studio.check_in("milo")
    standin.dead = lambda request: standin.repo("ann/milo") and None if "repos/create" in request else None
    with pytest.raises(Conflict, match="ann/milo is there now and public, so nothing was published"):
        push(studio.exchange, "milo", repo="ann/milo", private=True)
    assert len(standin.repo("ann/milo").commits) == 1


def test_a_dry_run_says_which_tag_stays_elsewhere(standin: StandIn, studio: Studio, studios: Open) -> None:
    studio.check_in("milo", card=CARD)
    push(studio.exchange, "milo", repo="ann/milo")
    repo = standin.repo("ann/milo")
    repo.tags["v2"] = repo.head.oid
    studio.check_in("milo", card=CARD)
    dry = push(studio.exchange, "milo", dry_run=True)
    done = push(studio.exchange, "milo")
    assert (dry.tag, dry.notes) == (done.tag, done.notes)
    assert done.tag == ""
    assert push(studio.exchange, "milo:2", dry_run=True).tag == ""
    repo.tags["v2"] = repo.head.oid
    assert push(studio.exchange, "milo:2", dry_run=True).tag == "v2"
