"""A stand-in Hub, and the client of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint
from tests.hub.standin import TOKEN, StandIn


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[StandIn]:
    (tmp_path / "standin").mkdir()
    with StandIn(tmp_path / "standin") as running:
        yield running


@pytest.fixture
def hub(standin: StandIn) -> Hub:
    """An impatient client with the right token."""
    return Hub(Endpoint(standin.url, TOKEN), silent=1.0, answer=2.0, pauses=(0.01, 0.02))
