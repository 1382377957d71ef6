"""What publishing costs, against huggingface_hub's own upload_folder and snapshot_download in the same run,
on the stand-in Hub of tests/hub (this machine, no network: requests and work are compared, not distance).

    unchanged    syncing 500 assets that nobody changed: requests and seconds; the peer uploads each folder
                 and downloads each snapshot again, which is how two sides are kept the same with it
    push         publishing a file of 200 MB from a server process: seconds, and growth of its memory; the
                 peer is a process that uploads the same file with upload_folder

Run: `python -m tests.bench.hub_sync [--quick]`; a whole run writes results/hub_sync.json.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import logging as huggingface_logging

from registry.catalog import Catalog
from registry.hub.client import Hub
from registry.hub.endpoint import Endpoint, token_variable
from registry.hub.exchange import Exchange
from registry.hub.push import push
from server.door import Gate
from tests.bench.report import ratio, save, spread
from tests.bench.transfer import MB, peak, resident, serving, write_large
from tests.hub.conftest import Studio, plain_client
from tests.hub.standin import TOKEN, StandIn

ASSETS, ROUNDS, BYTES = 500, 5, 200 * MB
QUICK = (20, 2, 20 * MB)
CARD = b"---\nlicense: mit\ninstance_prompt: thing\n---\n\n# A thing\n"
PEER = """
import sys
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars
constants.HF_HUB_DISABLE_XET = True
disable_progress_bars()
url, token, folder = sys.argv[1:]
api = HfApi(endpoint=url, token=token)
print("ready", flush=True)
for line in sys.stdin:
    api.create_repo(f"peer/large-{line.strip()}")
    api.upload_folder(repo_id=f"peer/large-{line.strip()}", folder_path=folder)
    print("done", flush=True)
"""


def published(studio: Studio, number: int) -> None:
    """That many assets, each in a repository of its own."""
    for place in range(number):
        name = f"asset-{place}"
        studio.check_in(name, card=CARD)
        push(studio.exchange, name, repo=f"ann/{name}")


def folders(standin: StandIn, root: Path) -> list[Path]:
    """The same repositories as folders of the peer."""
    made = []
    for name, repo in standin.repos.items():
        folder = root / name.replace("/", "-")
        folder.mkdir(parents=True)
        for path, file in repo.head.files.items():
            data = standin.storage.path(file.sha256).read_bytes() if file.sha256 else file.data
            (folder / path).write_bytes(data)
        made.append(folder)
    return made


def unchanged(folder: Path, number: int, rounds: int) -> dict[str, Any]:
    """Both by turns; each round of either is checked to change nothing."""
    seconds: dict[str, list[float]] = {"sync": [], "peer": []}
    requests: dict[str, int] = {}
    (folder / "standin").mkdir()
    with StandIn(folder / "standin") as standin, closing(Catalog(folder / "data")) as catalog:
        hub = Hub(Endpoint(standin.url, TOKEN))
        studio = Studio(catalog, Exchange(catalog, hub, Gate(catalog)), folder)
        published(studio, number)
        mirrors, api = folders(standin, folder / "mirrors"), HfApi(endpoint=standin.url, token=TOKEN)

        def ours() -> None:
            if {outcome.action for outcome in studio.sync()} != {"unchanged"}:
                raise SystemExit("something changed")

        def theirs() -> None:
            with plain_client():
                for mirror, name in zip(mirrors, list(standin.repos), strict=True):
                    api.upload_folder(repo_id=name, folder_path=mirror)
                    api.snapshot_download(name, cache_dir=folder / "cache")

        ways: list[tuple[str, Callable[[], None]]] = [("sync", ours), ("peer", theirs)]
        for turn, (name, work) in itertools.product(range(rounds + 1), ways):
            with standin.counted() as seen:
                start = time.perf_counter()
                work()
                took = time.perf_counter() - start
            requests[name] = len(seen)
            if turn:  # the first fills the peer's cache
                seconds[name].append(took)
        if {len(repo.commits) for repo in standin.repos.values()} != {2}:
            raise SystemExit("something was committed")
    return {
        "assets": number,
        "requests": requests,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "peer_to_sync": ratio(seconds["peer"], seconds["sync"]),
    }


def large(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """A large file, from a server process and from the peer's by turns, each time into a new repository."""
    path = folder / "mirror" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    write_large(path, size)
    write_large(folder / "small.safetensors", MB)
    (folder / "standin").mkdir()
    with StandIn(folder / "standin") as standin:
        os.environ[token_variable(standin.url)] = TOKEN
        with serving(folder / "data", "--hub", standin.url) as (client, pid), _peer(standin, path) as peer:
            for name, file in (("small", folder / "small.safetensors"), ("large", path)):
                client.check_in(file, name=name, base="sdxl", card=CARD)
            client.hub_push("small", repo="ann/small")

            def ours(turn: int) -> None:
                client.hub_push("large", repo=f"ann/large-{turn}", relink=True)

            ways = [("ours", pid, ours), ("peer", peer.pid, partial(_upload, peer))]
            before = {name: resident(process) for name, process, _ in ways}
            seconds: dict[str, list[float]] = {"ours": [], "peer": []}
            growth: dict[str, list[float]] = {"ours": [], "peer": []}
            for turn, (name, process, push_it) in itertools.product(range(rounds), ways):
                for stored in standin.directory.iterdir():  # or it would be there already
                    stored.unlink()
                start = time.perf_counter()
                most = peak(process, partial(push_it, turn))
                seconds[name].append(time.perf_counter() - start)
                growth[name].append(most["VmRSS"] - before[name]["VmRSS"])
    return {
        "bytes": path.stat().st_size,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "growth_mb": {name: max(sizes) for name, sizes in growth.items()},
        "peer_to_ours": ratio(seconds["peer"], seconds["ours"]),
    }


@contextmanager
def _peer(standin: StandIn, path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PEER, standin.url, TOKEN, str(path.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout:
            process.stdout.readline()
        yield process
        process.terminate()


def _upload(peer: "subprocess.Popen[str]", turn: int) -> None:
    if not peer.stdin or not peer.stdout:
        raise SystemExit("the peer has no pipes")
    peer.stdin.write(f"{turn}\n")
    peer.stdin.flush()
    if peer.stdout.readline() != "done\n":
        raise SystemExit("the peer failed")


def main() -> None:
    """Measures, prints, writes results/hub_sync.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.hub_sync")
    parser.add_argument("--quick", action="store_true", help="few assets and a small file, to try it out")
    quick = parser.parse_args().quick
    assets, rounds, size = QUICK if quick else (ASSETS, ROUNDS, BYTES)
    torch.set_num_threads(1)
    huggingface_logging.set_verbosity_error()  # it says of every folder that nothing changed
    with tempfile.TemporaryDirectory() as folder:
        result = {"unchanged": unchanged(Path(folder), assets, rounds)}
    with tempfile.TemporaryDirectory() as folder:
        result["push"] = large(Path(folder), size, rounds)
    if quick:
        print(json.dumps(result, indent=2))
    else:
        save("hub_sync", result)


if __name__ == "__main__":
    main()
