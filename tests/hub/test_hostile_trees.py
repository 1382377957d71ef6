"""Trees that no git could hold, or that lie: each is refused with what is wrong, and nothing has changed."""

import hashlib

import pytest

from registry.errors import Damaged, InvalidFile, NotFound, RegistryError, Untrusted
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Studio
from tests.hub.repos import File
from tests.hub.standin import StandIn

FILE = WEIGHTS["lora"]
Entry = dict[str, object]


def entry(path: object, *, size: object = 4, oid: object = "0" * 40, **more: object) -> Entry:
    return {"type": "file", "path": path, "size": size, "oid": oid, **more}


def large(oid: object, size: object = 4) -> Entry:
    return {"lfs": {"oid": oid, "size": size, "pointerSize": 130}}


@pytest.fixture
def milo(standin: StandIn, studio: Studio) -> Studio:
    """A studio that has published milo."""
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n")
    push(studio.exchange, "milo", repo="ann/milo")
    return studio


def everything(studio: Studio) -> dict[str, object]:
    """What is here: assets, links, blobs; and the files around."""
    root, data = studio.folder.parent, studio.folder / "data"
    return {
        "versions": studio.catalog.history("milo"),
        "links": studio.exchange.links.all(),
        "blobs": sorted(studio.catalog.blobs.files()),
        "incoming": list(studio.catalog.blobs.incoming.iterdir()),
        "around": sorted(path for path in root.rglob("*") if data not in path.parents),
    }


def check_refused(
    standin: StandIn, studio: Studio, error: type[RegistryError], message: str, extra: list[Entry]
) -> None:
    """Neither a pull nor a sync takes anything, and both say why."""
    standin.repo("ann/milo").write({"note.txt": File.regular(b"a commit")}, "theirs")
    standin.extra = extra
    before = everything(studio)
    with pytest.raises(error, match=message):
        pull(studio.exchange, "ann/milo", name="other")
    (outcome,) = studio.sync("milo")
    assert (outcome.action, type(outcome.error)) == ("failed", error)
    assert {seen.method for seen in standin.requests[-4:]} == {"GET"}
    assert everything(studio) == before
    standin.extra = []
    assert [outcome.action for outcome in studio.sync()] == ["unchanged"]


@pytest.mark.parametrize(
    "path",
    [
        "../up.safetensors", "a/../../up.safetensors", "a/..", "..", ".", "a/./b.safetensors",
        "/etc/passwd.safetensors", "a//b.safetensors", "a/", "", "a\0b.safetensors", "evil.png\0",
        ".git/config.safetensors", "a/.git/hooks/post-merge", "n" * 5000, "x/" * 3000 + "y",
        7, None, ["README.md"], True,
    ],
)  # fmt: skip
def test_a_path_out_of_the_repository(standin: StandIn, milo: Studio, path: object) -> None:
    check_refused(standin, milo, Untrusted, "which is no path within a repository", [entry(path)])
    if isinstance(path, str):
        folder = [{"type": "directory", "path": path, "oid": "0" * 40}]
        check_refused(standin, milo, Untrusted, "which is no path within a repository", folder)


def test_a_path_that_is_too_deep(standin: StandIn, milo: Studio) -> None:
    extra = [entry("/".join("d" * 65))]
    check_refused(standin, milo, Untrusted, "which is more than 64 folders deep", extra)


def test_another_readme_buries_no_card(standin: StandIn, milo: Studio) -> None:
    files = {"readme.md": File.regular(b"# Another"), "README.md": File.regular(b"# Theirs")}
    standin.repo("ann/milo").write({**files}, "theirs")
    assert [outcome.action for outcome in milo.sync()] == ["pulled"]
    assert milo.card("milo") == b"# Theirs"
    assert pull(milo.exchange, "ann/milo", name="other").version.card_digest


@pytest.mark.parametrize(
    "extra",
    [
        [entry(FILE)],
        [entry("README.md")],
        [entry("x.png"), entry("x.png")],
        [{"type": "directory", "path": FILE, "oid": "0" * 40}],
        [{"type": "directory", "path": "x", "oid": "0" * 40}, entry("x")],
    ],
)
def test_a_path_that_is_listed_twice(standin: StandIn, milo: Studio, extra: list[Entry]) -> None:
    check_refused(standin, milo, Untrusted, r"lists '[\w.]+' twice", extra)


@pytest.mark.parametrize("under", ["x", "x/y", "x/y/z"])
def test_a_file_that_is_a_folder_too(standin: StandIn, milo: Studio, under: str) -> None:
    for extra in ([entry(under), entry(f"{under}/up.safetensors")], [entry(f"{under}/1/2"), entry(under)]):
        check_refused(standin, milo, Untrusted, rf"lists '{under}' as a file and as a folder", extra)


@pytest.mark.parametrize(
    "oid",
    [
        "", "ab/dev/zero", "0" * 39, "0" * 41, "g" * 40, "A" * 40, "0" * 39 + "\n", "٠" * 40, "../" * 13,
        7, None, [],
    ],
)  # fmt: skip
def test_a_digest_that_is_none(standin: StandIn, milo: Studio, oid: object) -> None:
    check_refused(standin, milo, Untrusted, "a file whose digest is none", [entry("x.txt", oid=oid)])
    if oid is not None:
        told = oid * 2 if isinstance(oid, str) else oid
        extra = [entry("x.safetensors", **large(told))]
        check_refused(standin, milo, Untrusted, "a file whose digest is none", extra)


@pytest.mark.parametrize(
    "size", [-1, -(1 << 63), 1 << 51, 10**400, 1.5, float("nan"), float("inf"), "4", None, True]
)
def test_a_size_that_is_none(standin: StandIn, milo: Studio, size: object) -> None:
    check_refused(standin, milo, Untrusted, "which is no size", [entry("x.txt", size=size)])


def test_two_sizes_of_one_file(standin: StandIn, milo: Studio) -> None:
    extra = [entry("x.safetensors", size=4, **large("0" * 64, 5))]
    check_refused(standin, milo, Untrusted, "with 4 and 5 bytes, which is no size", extra)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"type": "file"}, {"type": "file", "path": "x"}, {}, 7, None, "x", [],
        entry("x", lfs=7), entry("x", lfs={}), entry("x", lfs={"oid": "0" * 64}), entry("x", lfs=[1]),
        entry("x", lastCommit=7),
    ],
)  # fmt: skip
def test_an_entry_that_is_none(standin: StandIn, milo: Studio, nonsense: Entry) -> None:
    check_refused(standin, milo, Untrusted, "answered what is no Hub's answer", [nonsense])


def test_more_files_than_a_repository_has(standin: StandIn, milo: Studio) -> None:
    standin.page = 100_000
    extra = [entry(f"{n}.txt") for n in range(20_001)]
    check_refused(standin, milo, Untrusted, "has more than 20000 files and folders", extra)
    folders: list[Entry] = [{"type": "directory", "path": str(n), "oid": "0" * 40} for n in range(20_001)]
    check_refused(standin, milo, Untrusted, "has more than 20000 files and folders", folders)


@pytest.mark.parametrize("lie", [-1, 1, 1 << 20])
@pytest.mark.parametrize("path", [FILE, "README.md"])
def test_a_size_that_is_a_lie(standin: StandIn, studio: Studio, lie: int, path: str) -> None:
    data = studio.weights().read_bytes()
    files = {FILE: standin.storage.put(data), "README.md": File.regular(b"# Milo")}
    true = files[path]
    files[path] = File(true.size + lie, true.oid, true.data, true.sha256)
    standin.repo("ann/milo").write({**files}, "theirs")
    with pytest.raises((Damaged, InvalidFile), match=f"{path} of ann/milo"):
        pull(studio.exchange, "ann/milo")
    assert not studio.catalog.newest()
    assert not studio.exchange.links.all()
    assert list(studio.catalog.blobs.files()) == list(studio.catalog.blobs.incoming.iterdir()) == []


def weights_at(standin: StandIn, studio: Studio, *paths: str) -> str:
    """A repository with the same weights in each of these places; their digest."""
    data = studio.weights().read_bytes()
    standin.repo("ann/odd").write({path: standin.storage.put(data) for path in paths}, "odd")
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize(
    "path",
    [
        "a\\..\\b.safetensors", "a\nb.safetensors", "a\u202eb.safetensors", "x/" * 9 + "deep.safetensors",
        "n" * 300 + ".safetensors", ".hidden/x.safetensors", "a\x7fb.safetensors",
    ],
)  # fmt: skip
def test_weights_in_no_plain_place_are_not_taken_and_said(
    standin: StandIn, studio: Studio, path: str
) -> None:
    weights_at(standin, studio, path)
    with pytest.raises(NotFound, match=r"ann/odd has no weights that are taken: '.*' is no plain path"):
        pull(studio.exchange, "ann/odd")
    with pytest.raises(NotFound):
        pull(studio.exchange, "ann/odd", file=path)
    assert not studio.catalog.newest()


def test_weights_that_are_too_large_are_not_taken_and_said(standin: StandIn, studio: Studio) -> None:
    standin.repo("ann/odd")
    standin.extra = [entry("big.safetensors", size=9 << 30, **large("0" * 64, 9 << 30))]
    with pytest.raises(NotFound, match=r"'big.safetensors' has 9663676416 bytes, the limit is 8589934592"):
        pull(studio.exchange, "ann/odd")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Milo.safetensors", "milo.safetensors"),
        ("\u00e9.safetensors", "e\u0301.safetensors"),  # the same letter, put together
        ("ﬁ.safetensors", "fi.safetensors"),
        ("straße.safetensors", "STRASSE.safetensors"),
    ],
)
def test_names_that_some_disks_take_for_one_are_both_left(
    standin: StandIn, studio: Studio, one: str, other: str
) -> None:
    weights_at(standin, studio, one, other)
    with pytest.raises(NotFound, match="or another is the same but for its case"):
        pull(studio.exchange, "ann/odd")
    digest = weights_at(standin, studio, FILE)
    assert pull(studio.exchange, "ann/odd").version.digest == digest


def test_a_name_that_only_looks_conventional_is_none(standin: StandIn, studio: Studio) -> None:
    digest = weights_at(standin, studio, FILE)
    fake = standin.storage.put(studio.weights().read_bytes())
    lookalikes = {"pytorch_l\u043era_weights.safetensors": fake, "READM\u0395.md": File.regular(b"---\n&x\n")}
    standin.repo("ann/odd").write({**lookalikes}, "look-alikes")  # Cyrillic and Greek
    version = pull(studio.exchange, "ann/odd").version
    assert (version.digest, version.facts["file_name"]) == (digest, FILE)
    assert studio.catalog.card(version) == b""
