"""Searching and filtering: what is there is found, whatever is typed, and pages stay right under writes."""

from collections.abc import Iterator
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
