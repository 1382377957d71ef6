"""What is said of a library's error, also of one that says nothing itself."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from transformers import CLIPModel

from compose import bases
from compose.clip import Clip
from compose.errors import InvalidRequest, first_line
from tests.scorers import tiny_scorer


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("it is bad\nand worse"), "it is bad"),
        (ValueError("\n  it is bad  \n"), "it is bad"),
        (RuntimeError("Error(s) in loading:\n\tMissing key 'a'\n\tand more"), "Missing key 'a'"),
        (RuntimeError("Error(s) in loading:"), "Error(s) in loading:"),
        (MemoryError(), "MemoryError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error_is_what_it_says_or_what_it_is(error: Exception, line: str) -> None:
    assert first_line(error) == line


def silent(*_: object, **__: object) -> None:
    raise TimeoutError


def test_a_base_that_cannot_be_had_for_no_reason_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", silent)
    with pytest.raises(InvalidRequest, match="hub:a/b cannot be had: TimeoutError"):
        bases.find("hub:a/b")


def test_a_scorer_that_fails_without_a_word_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_scorer(tmp_path / "clip", kind="clip")
    monkeypatch.setattr(CLIPModel, "get_image_features", silent)
    with pytest.raises(InvalidRequest, match="is no scorer: it does not work: TimeoutError"):
        Clip(path)
