"""The real Hub, for whoever has a token: `ATELIER_REAL_HUB=ORG HF_TOKEN=… pytest tests/hub/test_real_hub.py`.
It makes a private repository in ORG, and takes it away again.
"""

import os
import uuid

import pytest
from huggingface_hub import HfApi

from registry.hub.client import Hub
from registry.hub.endpoint import DEFAULT, endpoint
from registry.hub.guard import Call, calling
from registry.hub.pull import pull
from registry.hub.push import push
from tests.hub.conftest import Open

ORG = os.environ.get("ATELIER_REAL_HUB", "")


@pytest.mark.skipif(not ORG, reason="ATELIER_REAL_HUB names no organisation")
def test_a_round_trip_over_the_real_hub(studios: Open) -> None:
    hub = Hub(endpoint(DEFAULT))
    studio, other, repo = studios(hub), studios(hub), f"{ORG}/atelier-test-{uuid.uuid4().hex[:12]}"
    digest = studio.check_in("milo", card=b"---\nlicense: mit\n---\n# Milo\n").digest
    try:
        done = push(studio.exchange, "milo", repo=repo, private=True)
        pulled = pull(other.exchange, repo, name="milo").version
        assert (pulled.digest, other.card("milo")) == (digest, studio.card("milo"))
        other.check_in("milo")
        assert [o.action for o in other.sync()] == ["published"]
        assert [o.action for o in studio.sync()] == ["pulled"]
        assert hub.tags(repo) == {"v1": done.commit, "v2": hub.head(repo).commit}
    finally:
        with calling(Call(hub.endpoint)):
            HfApi(token=hub.endpoint.token).delete_repo(repo, missing_ok=True)
