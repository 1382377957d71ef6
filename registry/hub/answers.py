"""What a Hub's refusals become: one of our errors, which says what to do, and holds neither the request nor
the token in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from registry.errors import (
    Conflict,
    Denied,
    InvalidFile,
    NotFound,
    RegistryError,
    Unavailable,
    Untrusted,
)
from registry.hub.endpoint import Endpoint, token_variable

MOVED = "{repo} was changed on the Hub meanwhile; `atelier hub sync` shows how, then try again"


class Busy(Unavailable):
    """Another commit is being made (409): the head is where it was."""


class HeadMoved(Conflict):
    """The head is another by now (412)."""


@contextmanager
def translated(endpoint: Endpoint, repo: str) -> Iterator[None]:
    """huggingface_hub's errors as ours, without the request that they hold."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        raise _ours(error, endpoint, repo) from None


def _ours(error: Exception, endpoint: Endpoint, repo: str) -> Exception:
    chain: BaseException | None = error
    while chain is not None:  # the upload of large files wraps whatever it meets
        if isinstance(chain, RegistryError):
            return chain
        chain = chain.__cause__ or chain.__context__
    name, has = token_variable(endpoint.url), bool(endpoint.token)
    ask = "ask its owners" if has else f"set {name} to a token that may see it"
    match error:
        case GatedRepoError():
            why = "accept its conditions on its page" + ("" if has else f", then set {name}")
            return Denied(f"{repo} is gated; {why}", field="repo")
        case RepositoryNotFoundError():
            return NotFound(f"there is no {repo} on {endpoint.url}, or it is private; {ask}", field="repo")
        case RevisionNotFoundError():
            why = "has no such revision; its page lists branches and tags"
            return NotFound(f"{repo} {why}", field="revision")
        case EntryNotFoundError():
            return NotFound(f"{repo} has no such file", field="file")
        case HFValidationError():
            return Untrusted(f"{endpoint.url} names what has no name a Hub would give")
        case HfHubHTTPError():
            return _by_status(error.response.status_code, endpoint, repo)
        case ValueError() if str(error).startswith("Invalid metadata in README.md"):
            told = "".join(c if c.isprintable() else " " for c in str(error))[:300]
            return InvalidFile(f"{endpoint.url} does not take the card: {told}; correct it", field="card")
        case httpx2.HTTPError():
            return Untrusted(f"{endpoint.url} sends in circles, or not as HTTP does")
        case OSError() | MemoryError():  # this machine's
            return error
    return Untrusted(f"{endpoint.url} answered what is no Hub's answer ({type(error).__name__})")


def _by_status(status: int, endpoint: Endpoint, repo: str) -> RegistryError:
    name = token_variable(endpoint.url)
    if status == 401:
        told = f"does not know the token in {name}; make another"
        if not endpoint.token:
            told = f"wants a token: set {name}"
        return Denied(f"{endpoint.url} {told}", field="repo")
    if status == 403:
        whose = f"the token in {name} has" if endpoint.token else "nobody without a token has"
        return Denied(f"{whose} no right to this with {repo}; set {name} to one that has", field="repo")
    if status == 409:
        return Busy(f"{repo} is being written to; try again later")
    if status == 412:
        return HeadMoved(f"{repo} was changed meanwhile")
    if status == 404:
        return NotFound(f"there is no {repo} on {endpoint.url}", field="repo")
    return Untrusted(f"{endpoint.url} refused the request ({status})")
