"""A merge made again by another server process, with other threads: the same bytes, or it is said why not."""

from pathlib import Path

from atelier.client import Client
from atelier.messages import method
from compose.methods import METHODS
from compose.pocket import ADAPTERS
from tests.e2e.test_serve import process

STACK = {"fungo": 1.0, "ochreframe": (0.8, {"text_encoder": 0.5}), "milo": -0.4}


def test_under_another_number_of_threads_it_is_the_same_merge_and_the_number_is_told(tmp_path: Path) -> None:
    """Sums are split among threads: a digit may round otherwise, which is no other merge."""
    one = process(tmp_path / "data", "127.0.0.1:0", "--threads", "1")
    with one as (_, address), Client(address, timeout=120) as client:
        for name in STACK:
            path = ADAPTERS / f"{name}.safetensors"
            client.check_in(path, name=name, card=path.with_suffix(".md").read_bytes())
        for name in METHODS:
            client.merge(STACK, name=f"one-{name}", method=method(name))
            assert list(client.remake(f"one-{name}").differences) == []
    two = process(tmp_path / "data", "127.0.0.1:0", "--threads", "2")
    with two as (_, address), Client(address, timeout=120) as client:
        for name in METHODS:
            again = client.remake(f"one-{name}")
            assert list(again.differences) == ["threads was 1, here it is 2"]
            assert again.same == (again.digest == again.version.digest)
            client.merge(STACK, name=f"two-{name}", method=method(name))
            apart = client.compare(f"one-{name}", f"two-{name}").total
            assert apart.change < 1e-5 * apart.before, name
