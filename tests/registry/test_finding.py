"""Searching and filtering: what is there is found, whatever is typed, and pages stay right under writes."""

import random
import re
import sqlite3
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.about import about
from registry.catalog import Catalog
from registry.finding import Query, match


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    opened = Catalog(tmp_path_factory.mktemp("found") / "data")
    for name, family, trigger, card in (
        (
            "aria-fox",
            "sd1",
            "aria fox",
            b"---\nauthor: Ann\nlicense: mit\ntags: [Fox, red]\n---\nA clever vixen.",
        ),
        (
            "bruno",
            "sdxl",
            "brn",
            b"---\nauthor: bob\ntags: [bear]\n---\nCaf\xc3\xa9 owner, friend of the fox.",
        ),
        ("glaze", "sdxl", "", b""),
    ):
        facts = {
            "family": family,
            "triggers": [{"word": trigger, "source": "user"}] if trigger else [],
            "about": about(card, {}),
            "file_name": f"{name}_final2.safetensors",
        }
        kind = "textual_inversion" if name == "glaze" else "lora"
        with opened.blobs.upload() as upload:
            upload.write(name.encode())
            opened.add(upload, name=name, kind=kind, facts=facts, card=card)
    yield opened
    opened.close()


def found(catalog: Catalog, text: str = "", *labels: tuple[str, str], **more: object) -> list[str]:
    return [v.name for v in catalog.newest(query=Query(text=text, labels=labels, **more))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("fox", ["aria-fox", "bruno"]),
        ("FOX vix", ["aria-fox"]),
        ("cafe", ["bruno"]),
        ("aria", ["aria-fox"]),
        ("brn", ["bruno"]),
        ("glaze_final2", ["glaze"]),
        ("fox wolf", []),
        ('"', []),
        ("", ["aria-fox", "bruno", "glaze"]),
    ],
)
def test_words_are_found_in_names_triggers_tags_and_cards(
    catalog: Catalog, text: str, names: list[str]
) -> None:
    assert found(catalog, text) == names


@pytest.mark.parametrize("word", ["Zürich", "résumé", "русский", "ガラス", "Hà Nội", "q\u0303uery", "樂園"])
def test_words_are_found_however_their_accents_are_written(tmp_path: Path, word: str) -> None:
    catalog = Catalog(tmp_path / "data")
    for form in ("NFC", "NFD"):
        facts = {"file_name": f"a {unicodedata.normalize(form, word)}.safetensors"}
        with catalog.blobs.upload() as upload:
            upload.write(form.encode())
            catalog.add(upload, name=form.lower(), kind="lora", facts=facts)
    for form in ("NFC", "NFD"):
        assert found(catalog, unicodedata.normalize(form, word)) == ["nfc", "nfd"]
    catalog.close()


def test_what_was_indexed_before_accents_were_composed_is_indexed_again(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")
    with catalog.blobs.upload() as upload:
        upload.write(b"one")
        catalog.add(
            upload, name="hero", kind="lora", facts={"file_name": unicodedata.normalize("NFD", "ガラス")}
        )
    catalog.close()
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.db")) as old:
        old.execute("update search set words = ?", [unicodedata.normalize("NFD", "ガラス")])
        old.execute("delete from _sqlite_migrations where name like 'm009%'")
        old.commit()
    catalog = Catalog(tmp_path / "data")
    assert found(catalog, "ガラス") == found(catalog, "hero") == ["hero"]
    catalog.close()


def test_labels_fit_exactly_whatever_their_case(catalog: Catalog) -> None:
    assert found(catalog, "", ("tag", "FOX")) == ["aria-fox"]
    assert found(catalog, "", ("base", "sdxl")) == ["bruno", "glaze"]
    assert found(catalog, "", ("base", "sdxl"), ("kind", "lora")) == ["bruno"]
    assert found(catalog, "", ("author", "ann")) == found(catalog, "", ("licence", "MIT")) == ["aria-fox"]
    assert found(catalog, "", ("trigger", "aria fox")) == ["aria-fox"]
    assert found(catalog, "fox", ("base", "sd1"), ("base", "sdxl")) == []


def test_dates_bound_the_check_in(catalog: Catalog) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    assert len(found(catalog, made_after=now - hour, made_before=now + hour)) == 3
    assert found(catalog, made_after=now + hour) == found(catalog, made_before=now - hour) == []


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=60), st.text(alphabet='"*()-:^+ \n\0NEARANDORf', max_size=30)))
def test_search_never_errors(catalog: Catalog, text: str) -> None:
    names = found(catalog, text)
    assert set(names) <= {"aria-fox", "bruno", "glaze"}
    assert names == ["aria-fox", "bruno", "glaze"] if not text.strip() else True
    assert match(text).count('"') % 2 == 0


def test_a_new_version_with_another_card_is_found_by_it_alone(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")
    for card in (b"an owl", b"a heron"):
        with catalog.blobs.upload() as upload:
            upload.write(b"same")
            catalog.add(upload, name="bird", kind="lora", facts={}, card=card)
    assert (found(catalog, "owl"), found(catalog, "heron")) == ([], ["bird"])
    catalog.delete("bird:2")
    assert (found(catalog, "owl"), found(catalog, "heron")) == (["bird"], [])
    catalog.close()


def test_pages_stay_right_while_assets_come_and_go(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")

    def add(name: str) -> None:
        with catalog.blobs.upload() as upload:
            upload.write(name.encode())
            catalog.add(upload, name=name, kind="lora", facts={}, card=b"fox")

    for index in range(10):
        add(f"n{index}")
    query = Query(text="fox")
    first = [v.name for v in catalog.newest(limit=4, query=query)]
    add("a-new-one")  # before the page that was read
    catalog.delete("n5:1")
    rest = [v.name for v in catalog.newest(after=first[-1], limit=100, query=query)]
    assert first + rest == [f"n{index}" for index in range(10) if index != 5]
    catalog.close()


def test_every_question_is_answered_as_by_looking_at_each_asset(tmp_path: Path) -> None:
    rng, catalog = random.Random(5), Catalog(tmp_path / "data")
    letters = ["fox", "foxes", "owl", "ow", "é", "fo"]
    tags, families = ["red", "RED", "blue fox", "fox"], ["sd1", "sdxl"]
    names = [f"{a}{joint}{b}" for a in ("fox", "a", "m") for joint in "-._" for b in ("1", "12", "owl", "x")]
    there: dict[str, list[tuple[str, set[str], set[tuple[str, str]], datetime]]] = {}

    def change(name: str) -> None:
        said, tag, base = rng.sample(letters, 2), rng.sample(tags, 2), rng.choice(families)
        card = f"---\ntags: {tag}\n---\n{' '.join(said)} \ue000".encode()
        if (versions := there.get(name)) and rng.random() < 0.3:
            catalog.delete(versions.pop()[0])
            return
        facts = {"family": base, "about": about(card, {})}
        with catalog.blobs.upload() as upload:
            upload.write(rng.randbytes(8))
            found, _ = catalog.add(upload, name=name, kind="lora", facts=facts, card=card)
        labels = {("kind", "lora"), ("base", base), *(("tag", t.lower()) for t in tag)}
        words = {*re.findall(r"[a-z0-9é]+", " ".join([name, *tag, *said]).lower())}
        there.setdefault(name, []).append((found.ref, words, labels, found.created_at))

    def wanted(query: Query) -> list[str]:
        *whole, begun = query.text.split() or [""]
        return [
            ref
            for name in sorted(there)
            for ref, words, labels, at in there[name][-1:]
            if words >= set(whole)
            and any(word.startswith(begun) for word in words)
            and {(field, value.lower()) for field, value in query.labels} <= labels
            and (query.made_after is None or at >= query.made_after)
            and (query.made_before is None or at < query.made_before)
        ]

    asked = 0
    for turn in range(600):
        change(rng.choice(names))
        moments = [versions[-1][3] for versions in there.values() if versions] or [datetime.now(UTC)]
        query = Query(
            text=" ".join(rng.sample(["fox", "owl", "1", "f", "m", "12", "x"], rng.choice([0, 0, 1, 1, 2]))),
            labels=rng.sample(
                [("tag", "Red"), ("tag", "blue fox"), ("base", "sd1"), ("kind", "lora"), ("tag", "fo")],
                rng.choice([0, 0, 1, 2]),
            ),
            made_after=rng.choice([None, None, *moments]) if turn % 3 == 0 else None,
            made_before=rng.choice([None, *moments]) if turn % 3 == 1 else None,
        )
        answer, after, size = list[str](), "", rng.randint(1, 7)
        while page := catalog.newest(after=after, limit=size, query=query):
            answer += [version.ref for version in page]
            after = page[-1].name
        assert answer == wanted(query), query
        asked += bool(answer)
    assert asked > 150
    catalog.close()


def test_a_label_cannot_be_typed_nor_written_into_a_card(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")

    def add(name: str, kind: str, card: bytes) -> None:
        with catalog.blobs.upload() as upload:
            upload.write(name.encode())
            catalog.add(upload, name=name, kind=kind, facts={}, card=card)

    add("honest", "lora", b"")
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.db")) as connection:
        ((words,),) = connection.execute("select words from search")
    (told,) = (word for word in words.split() if word.startswith("\ue000"))  # the label of its kind
    add("forged", "other", f"I am {told} {told[1:]} \ue000{told}.".encode())
    assert found(catalog, "", ("kind", "lora")) == ["honest"]
    assert found(catalog, "", ("kind", "other")) == ["forged"]
    assert found(catalog, told) == found(catalog, told[1:]) == ["forged"]  # what the card says, no label
    catalog.close()
