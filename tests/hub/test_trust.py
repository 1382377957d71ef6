"""Whom the token and the bytes go to, and what of a stranger's repository is looked at."""

import logging
import sys
import traceback
from pathlib import Path

import pytest

from registry.errors import InvalidName, NotFound, RegistryError, Untrusted
from registry.hub import guard
from registry.hub.client import Hub
from registry.hub.endpoint import DEFAULT, Endpoint, check_repo, check_revision, endpoint, token_variable
from registry.hub.files import WEIGHTS
from registry.hub.pull import pull
from registry.hub.push import push
from server.main import chosen_hubs
from tests.hub.conftest import Open, Studio, impatient
from tests.hub.repos import File
from tests.hub.routes import Answer
from tests.hub.standin import TOKEN, StandIn, Trouble


@pytest.fixture
def elsewhere(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Another host."""
    (tmp_path / "elsewhere").mkdir()
    with StandIn(tmp_path / "elsewhere") as running:
        yield running


def test_no_implicit_token(standin: StandIn, elsewhere: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    elsewhere.repo("ann/milo")
    Hub(endpoint(elsewhere.url)).head("ann/milo")
    assert [seen.authorization for seen in elsewhere.requests] == [""]
    monkeypatch.setenv(token_variable(standin.url), "hf_mine")
    assert endpoint(standin.url).token == "hf_mine"
    assert endpoint(elsewhere.url).token == ""
    assert endpoint(DEFAULT).token == TOKEN
    monkeypatch.setenv("HF_ENDPOINT", elsewhere.url)  # as huggingface_hub has it: then HF_TOKEN is for that
    assert (endpoint(DEFAULT).token, endpoint(elsewhere.url).token) == ("", TOKEN)


@pytest.mark.parametrize(
    ("urls", "name"),
    [
        (["https://hub-a.example", "https://hub.a.example"], "HF_TOKEN_HUB_A_EXAMPLE"),
        (["https://hub.example:8443", "https://hub-example-8443"], "HF_TOKEN_HUB_EXAMPLE_8443"),
        (["https://hub.example", "https://hub.example/"], "HF_TOKEN_HUB_EXAMPLE"),
        (["https://a.example", "https://b.example", "https://B.example,files.example"], "HF_TOKEN_B_EXAMPLE"),
        ([DEFAULT, f"{DEFAULT}:443"], ""),
    ],
)
def test_no_two_hubs_share_a_token(urls: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if name:
        with pytest.raises(InvalidName, match=f"two Hubs would share the token in {name}; leave one out"):
            chosen_hubs(urls, offline=False)
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert [one.token for one in chosen_hubs(urls, offline=False).endpoints] == [TOKEN, ""]


def test_a_token_from_the_keyring_is_used_where_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)  # so that it is as it was afterwards
    del sys.modules["keyring"]
    (tmp_path / "keyring.py").write_text("def get_password(service, user): return f'{service} {user}'")
    monkeypatch.syspath_prepend(tmp_path)
    assert endpoint("https://hub.example", {}).token == "atelier https://hub.example"
    assert endpoint("https://hub.example", {"HF_TOKEN_HUB_EXAMPLE": "hf_mine"}).token == "hf_mine"
    (tmp_path / "keyring.py").write_text("def get_password(service, user): raise RuntimeError('locked')")
    del sys.modules["keyring"]
    assert endpoint("https://hub.example", {}).token == ""


@pytest.mark.parametrize(
    "text",
    [
        "", "huggingface.co", "ftp://hub.example", "https://", "https://hub.example/api", "https://a@hub.example",
        "https://hub.example?x", "http://hub.example", "http://10.0.0.1", "https://[", "https://hub:99999",
    ],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidName, match="--hub https://"):
        endpoint(text, {})


@pytest.mark.parametrize(
    "repo",
    [
        "x",
        "a/b/c",
        "../x",
        "a/..",
        "a/b\n",
        "a/b?",
        "a/-b",
        "a/.b",
        "a--b/c",
        "https://a/b",
        "a/b.git",
        "ä/b",
        "/",
    ],
)
def test_what_is_no_repository_is_refused(repo: str) -> None:
    with pytest.raises(InvalidName, match="ORG/NAME"):
        check_repo(repo)


@pytest.mark.parametrize(
    "revision", ["..", "a/../b", "a b", "a\0b", "?x", "-x", "a//b", "", "x" * 200, "/main"]
)
def test_what_is_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(InvalidName, match="is no revision"):
        check_revision(revision)


def test_redirect_to_internal_refused(
    standin: StandIn, studio: Studio, studios: Open, elsewhere: StandIn
) -> None:
    studio.check_in("milo")
    push(studio.exchange, "milo", repo="ann/milo")
    studio = studios()
    standin.redirects[WEIGHTS["lora"]] = f"{elsewhere.url}/internal"
    with pytest.raises(Untrusted, match=rf"pointed to {elsewhere.url}, which is not among its hosts"):
        pull(studio.exchange, "ann/milo", name="other")
    assert elsewhere.requests == []
    standin.redirects[WEIGHTS["lora"]] = f"{standin.url}/ann/milo/resolve/main/{WEIGHTS['lora']}"
    with pytest.raises(Untrusted):  # in circles
        pull(studio.exchange, "ann/milo", name="other")


def test_lfs_href_other_origin_refused(standin: StandIn, studio: Studio, elsewhere: StandIn) -> None:
    studio.check_in("milo")
    for links in ("upload_to", "verify_to"):
        setattr(standin, links, elsewhere.url)
        with pytest.raises(Untrusted, match="so nothing was sent"):
            push(studio.exchange, "milo", repo="ann/milo")
        setattr(standin, links, "")
        standin.storage.path(studio.catalog.resolve("milo").digest[7:]).unlink(missing_ok=True)
    assert elsewhere.requests == []
    assert push(studio.exchange, "milo").made


def test_storage_that_the_operator_allows_gets_bytes_and_no_token(standin: StandIn, studio: Studio) -> None:
    home = Endpoint("https://hub.example", TOKEN, ("files.example",))
    assert home.may_reach("https", "files.example", None)
    assert not home.may_reach("http", "files.example", None)
    assert not home.is_home("https", "files.example", None)
    for host in ("hub.example.evil", "xfiles.example", "169.254.169.254", "localhost"):
        assert not home.may_reach("https", host, None)
    assert not home.may_reach("https", "hub.example", 8443)
    assert not home.may_reach("http", "hub.example", 443)
    public = endpoint(DEFAULT, {})
    assert public.may_reach("https", "cdn-lfs.huggingface.co", None)
    assert public.may_reach("https", "cas-bridge.xethub.hf.co", None)
    assert not public.may_reach("https", "huggingface.co.evil.example", None)


def test_hostile_tree(standin: StandIn, studio: Studio, tmp_path: Path) -> None:
    data = studio.weights().read_bytes()
    standin.repo("ann/milo").write({"good.safetensors": standin.storage.put(data)}, "good")
    good = standin.repo("ann/milo").head.files["good.safetensors"]
    hostile = [
        "a\\..\\b.safetensors", ".hidden/config.safetensors", "a\nb.safetensors", "a\u202eb.safetensors",
        "GOOD.safetensors.", "x/" * 40 + "deep.safetensors", "n" * 300 + ".safetensors", "a..b.safetensors",
    ]  # fmt: skip
    standin.extra = [good.entry(path) for path in hostile]
    before = {path for path in tmp_path.rglob("*") if "studio-0/data" not in str(path)}
    version = pull(studio.exchange, "ann/milo").version
    assert version.facts["file_name"] == "good.safetensors"
    assert {path for path in tmp_path.rglob("*") if "studio-0/data" not in str(path)} == before
    standin.extra = [good.entry("Good.safetensors")]  # on some disks the same file
    with pytest.raises(NotFound, match="or another is the same but for its case"):
        pull(studio.exchange, "ann/milo", name="clash")


def test_a_file_that_is_no_adapter_meets_the_ordinary_gate(standin: StandIn, studio: Studio) -> None:
    for data in (b"PK\x03\x04 a pickle", b"\x80\x02}q\x00.", b"{}", b""):
        repo = standin.repo("ann/bad")
        repo.write({WEIGHTS["lora"]: standin.storage.put(data) if data else File.regular(data)}, "bad")
        with pytest.raises(RegistryError):
            pull(studio.exchange, "ann/bad")
    assert not studio.catalog.newest()


def test_pictures_that_are_none_are_left_and_said(standin: StandIn, studio: Studio) -> None:
    files = {WEIGHTS["lora"]: standin.storage.put(studio.weights().read_bytes())}
    files |= {f"{n}.png": File.regular(b"<svg onload=alert(1)>" + bytes([n])) for n in range(2)}
    standin.repo("ann/milo").write({**files}, "pictures")
    done = pull(studio.exchange, "ann/milo")
    assert [note.split(":")[0] for note in done.notes] == ["0.png", "1.png"]
    assert studio.catalog.previews(done.version) == []
    (outcome,) = studio.sync()
    assert (outcome.action, outcome.notes) == ("unchanged", ())


def test_endless_pages_end(standin: StandIn, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "REQUESTS_LIMIT", 20)
    standin.repo("ann/milo")
    standin.page, standin.endless = 1, True
    with pytest.raises(Untrusted, match="from page to page without an end"):
        hub.tree("ann/milo", standin.repo("ann/milo").head.oid)


def test_pages_are_read_to_their_end(standin: StandIn, hub: Hub) -> None:
    standin.page = 2
    repo = standin.repo("ann/milo")
    repo.write({f"{n}.txt": File.regular(b"x") for n in range(7)}, "many")
    assert len(hub.tree("ann/milo", repo.head.oid)) == 8


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, b"\x1f\x8b", {"Content-Encoding": "gzip"}), "sent compressed"),
        (Answer(200, b"x" * (33 << 20)), "more than 32 MiB"),
        (Answer(302, b"", {"Location": "http://169.254.169.254/latest/meta-data"}), "169.254.169.254"),
        (Answer(302, b"", {"Location": "file:///etc/passwd"}), "."),
        (Answer(418, {}), r"refused the request \(418\)"),
    ],
)
def test_answers_that_no_hub_gives_are_refused(
    standin: StandIn, hub: Hub, answer: Answer, message: str
) -> None:
    standin.trouble(".*", answer, times=9)
    with pytest.raises(Untrusted, match=message):
        hub.head("ann/milo")


def test_outside_of_a_call_nobody_reaches_a_hub(hub: Hub) -> None:
    from huggingface_hub import HfApi

    guard.install()
    with pytest.raises(Untrusted):
        HfApi(endpoint="https://huggingface.co", token=False).model_info("ann/milo")


def test_token_never_appears(
    standin: StandIn, elsewhere: StandIn, studio: Studio, studios: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Every path that fails, at DEBUG: not in errors, what they hold, logs, database, or blobs."""
    caplog.set_level(logging.DEBUG)
    studio.check_in("milo", card=b"---\nlicense: mit\n---\n")
    push(studio.exchange, "milo", repo="ann/milo")
    standin.repo("ann/gated", gated=True)
    told: list[str] = [repr(studio.exchange), repr(studio.exchange.hub.endpoint)]
    wrong = studios(impatient(standin, TOKEN + "x"))
    wrong.check_in("milo")
    for trouble in (
        Trouble.CUT_BEFORE, Trouble.CUT_AFTER, *(Answer(status, {"error": TOKEN}) for status in (
            400, 401, 403, 404, 409, 412, 418, 429, 500,
        )), Answer(302, b"", {"Location": elsewhere.url}), Answer(200, b"[]"),
    ):  # fmt: skip
        standin.trouble(".*", trouble, times=1000)
        for work in (
            lambda: pull(studio.exchange, "ann/milo", name="x"),
            lambda: pull(wrong.exchange, "ann/gated"),
            lambda: push(studio.exchange, "milo"),
            lambda: push(wrong.exchange, "milo", repo="ann/other"),
        ):
            with pytest.raises(RegistryError) as caught:
                work()
            error: BaseException | None = caught.value
            assert (error.__cause__, error.__suppress_context__) == (None, True) or error.__context__ is None
            told += [repr(error), str(vars(caught.value)), *traceback.format_exception(caught.value)]
        (outcome,) = studio.sync()
        told += [repr(outcome)]
        standin._planned.clear()
    told.append(caplog.text)
    assert not [text for text in told if TOKEN in text]
    files = [p for root in (studio, wrong) for p in (root.folder / "data").rglob("*") if p.is_file()]
    assert len(files) > 4
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert elsewhere.requests == []
