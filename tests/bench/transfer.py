"""Large files on their way: how fast a check-in is against the least that any could do, and how much memory
the server needs for one.

    upload    check-in of an SDXL LoRA of 256 MB and of 1 GB: into a catalog in this process, against reading,
              hashing, writing and syncing the same file by hand; over gRPC into a server process, against
              that, and against the same done by hand behind gRPC (`raw_upload`), whose client and server
              share this machine's cores as ours do. What a check-in leaves to a quiet moment (the digests of
              the body and of a large file's tensors) is in no time, and done before the next turn
    memory    growth of a server process while 1 GB comes in over gRPC and goes out again

Run: `python -m tests.bench.transfer [--quick]`; a whole run writes results/transfer.json.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from atelier.client import Client
from compose import formats
from compose.families import table
from compose.projection import projection
from registry.catalog import Catalog
from registry.digests import DigestStream, digests
from registry.headers import read_header
from registry.intake import Intake
from server.catalog import LARGE
from server.checkin import Declared, arriving, check_in, recognise
from tests.adapters import attention
from tests.bench import raw_upload
from tests.bench.report import ratio, save, spread

MB = 1 << 20
SPEED_LIMIT, GROWTH_LIMIT = 0.7, 64.0
SIZES, QUICK = {256 * MB: 7, 1024 * MB: 5}, {16 * MB: 3, 64 * MB: 3}
"""Sizes of files in bytes, each with its rounds."""


def write_large(path: Path, size: int) -> None:
    """A kohya LoRA of SDXL's attention layers, float16, of the largest rank that fits in `size` bytes."""
    layers = {n: m for n, m in table("sdxl").items() if n.startswith("unet.") and attention(n)}
    rank = max(1, size // (2 * sum(module.d + module.k for module in layers.values())))
    header: dict[str, Any] = {"__metadata__": {"ss_base_model_version": "sdxl_base_v1-0", "turn": "0" * 8}}
    end = 0
    for name, module in layers.items():
        key = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        for part, shape in (("lora_down", (rank, module.k)), ("lora_up", (module.d, rank))):
            start, end = end, end + 2 * shape[0] * shape[1]
            header[f"{key}.{part}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    noise = (
        torch.randn(8 * MB, generator=torch.Generator().manual_seed(0)).mul_(0.02).half().numpy().tobytes()
    )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])
    os.sync()


def retouch(path: Path, turn: int) -> None:
    """Other bytes in the header, so that no two turns bring the same file."""
    with path.open("r+b") as file:
        start = file.read(1 << 12)
        at = re.search(rb'"turn": "(\d{8})"', start)
        if not at:
            raise SystemExit("the header has no turn to change")
        file.seek(at.start(1))
        file.write(b"%08d" % turn)
        file.flush()
        os.fsync(file.fileno())


def by_hand(path: Path, copy: Path) -> str:
    """The peer: what no upload can do without."""
    seen = hashlib.sha256()
    with path.open("rb") as source, copy.open("wb") as target:
        while chunk := source.read(MB):
            seen.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return seen.hexdigest()


def into(catalog: Catalog, path: Path) -> None:
    """The whole check-in, without gRPC; written, hashed and looked at by threads, as the server does."""
    seen, declared = (
        DigestStream(whole=path.stat().st_size < LARGE),
        Declared(name="large", base="sdxl", file_name=path.name),
    )
    arrived = arriving(declared, path.stat().st_size)
    with path.open("rb") as source, catalog.blobs.upload() as upload:
        with Intake(upload.write, seen.update, arrived.update) as intake:
            while chunk := source.read(MB):
                for done in intake.feed(chunk):
                    done.result()
            for done in intake.rest():
                done.result()
        check_in(catalog, upload, declared, seen, arrived)


def stages(path: Path) -> dict[str, float]:
    """Seconds of what a check-in does, each by itself on a file in the page cache."""

    def projected() -> None:
        binding = formats.require(recognise(read_header(path)), "sdxl", what=path.name)
        with formats.layers(path, binding) as layers:
            projection(layers)

    def hashed() -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    work = {
        "sha256": hashed,
        "projection": projected,
        "digests": lambda: digests(path, read_header(path)),
        "copy_and_fsync": lambda: _copy(path, path.with_suffix(".copy")),
    }
    found = {name: _seconds(call) for name, call in work.items()}
    path.with_suffix(".copy").unlink()
    return found


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(MB):
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def serving(data: Path, *more: str) -> Iterator[tuple[Client, int]]:
    """A client of a server process, and the process's id."""
    command = [sys.executable, "-m", "atelier.cli", "serve", "--data", str(data), "--listen", "127.0.0.1:0"]
    command += more
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("listening on "):
            raise SystemExit(f"the server did not start (exit status {process.wait()})")
        with Client(line.split()[-1]) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(60)


def upload(folder: Path, sizes: Mapping[int, int]) -> dict[str, Any]:
    """By hand, into a catalog, over gRPC, by turns; what each brought is removed before the next."""
    with (
        closing(Catalog(folder / "here")) as catalog,
        serving(folder / "there") as (client, _),
        raw_upload.serving(folder) as raw,
    ):
        write_large(folder / "warm.safetensors", MB)
        into(catalog, folder / "warm.safetensors")
        client.check_in(folder / "warm.safetensors", name="large", base="sdxl")
        return {
            f"{size // MB}_mb": _uploads(folder, catalog, client, raw, size, rounds)
            for size, rounds in sizes.items()
        }


def _uploads(
    folder: Path, catalog: Catalog, client: Client, raw: Callable[[Path], None], size: int, rounds: int
) -> dict[str, Any]:
    path, copy = folder / "large.safetensors", folder / "copy"
    write_large(path, size)
    no_time = timedelta()
    seconds: dict[str, list[float]] = {"by_hand": [], "by_hand_grpc": [], "catalog": [], "grpc": []}
    ways: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("by_hand", lambda: by_hand(path, copy), copy.unlink),
        ("by_hand_grpc", lambda: raw(path), (folder / "received").unlink),
        ("catalog", lambda: into(catalog, path), lambda: _forget(catalog)),
        (
            "grpc",
            lambda: client.check_in(path, name="large", base="sdxl"),
            lambda: (
                _read_again(client),
                client.delete("large"),
                client.collect_garbage(retention=no_time, grace=no_time),
            ),
        ),
    ]
    for turn in range(rounds + 1):  # the first is to warm up
        retouch(path, turn + 1)
        for name, bring, remove in ways:
            took = _seconds(bring)
            remove()
            os.sync()
            if turn:
                seconds[name].append(took)
    real = path.stat().st_size
    result = {
        "bytes": real,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "mb_a_second": {name: real / MB / statistics.median(times) for name, times in seconds.items()},
        "speed_to_by_hand": {
            name: ratio(seconds["by_hand"], seconds[name]) for name in ("catalog", "grpc", "by_hand_grpc")
        },
        "speed_to_by_hand_grpc": {"grpc": ratio(seconds["by_hand_grpc"], seconds["grpc"])},
        "stages_seconds": stages(path),
    }
    path.unlink()
    return result


def _read_again(client: Client) -> None:
    """Waits until the server has done what it left for later, or that would slow the next turn."""
    while not client.get("large").version.body_digest:
        time.sleep(0.02)


def _forget(catalog: Catalog) -> None:
    catalog.delete("large")
    catalog.collect_garbage(retention=timedelta(), grace=timedelta())


def resident(pid: int) -> dict[str, float]:
    """Megabytes: VmRSS, and of it RssAnon (the process's own) and RssFile (files it has mapped)."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {
        name: int(kb) / 1024 for name, kb in re.findall(r"^(VmRSS|RssAnon|RssFile):\s+(\d+) kB", text, re.M)
    }


def peak(pid: int, work: Callable[[], object]) -> dict[str, float]:
    """The most of each while `work` runs, looked at every 20 ms."""
    most, done = resident(pid), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in resident(pid).items():
                most[name] = max(most[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most


def memory(folder: Path, sizes: Mapping[int, int]) -> dict[str, Any]:
    """Growth of the server over what it had after a first, small file."""
    path, size = folder / "large.safetensors", max(sizes)
    write_large(folder / "warm.safetensors", MB)
    write_large(path, size)
    with serving(folder / "data") as (client, pid):
        idle = resident(pid)
        client.check_in(folder / "warm.safetensors", name="warm", base="sdxl")
        client.download("warm", folder / "back")
        before = resident(pid)
        coming = peak(pid, lambda: client.check_in(path, name="large", base="sdxl"))
        between = resident(pid)
        going = peak(pid, lambda: client.download("large", folder / "back"))
        after = resident(pid)
    result = {
        "bytes": path.stat().st_size,
        "idle_mb": idle,
        "after_a_small_file_mb": before,
        "peak_growth_mb": {
            "upload": {name: coming[name] - before[name] for name in before},
            "download": {name: going[name] - between[name] for name in before},
            "both": {name: max(coming[name], going[name]) - before[name] for name in before},
        },
        "left_at_the_end_mb": {name: after[name] - before[name] for name in before},
    }
    path.unlink()
    return result


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether that is kept."""
    found = []
    for size, uploads in result["upload"].items():
        for way, peer in (("catalog", "by_hand"), ("grpc", "by_hand"), ("grpc", "by_hand_grpc")):
            what, value = f"upload {size} {way}, of {peer}", uploads[f"speed_to_{peer}"][way]["median"]
            found.append({"what": what, "value": value, "limit": SPEED_LIMIT, "met": value >= SPEED_LIMIT})
    for way, growth in result["memory"]["peak_growth_mb"].items():
        what, value = f"memory {way}, growth of VmRSS, MB", growth["VmRSS"]
        found.append({"what": what, "value": value, "limit": GROWTH_LIMIT, "met": value < GROWTH_LIMIT})
    return found


def main() -> None:
    """Measures, prints, writes results/transfer.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transfer")
    parser.add_argument("--quick", action="store_true", help="small files, to try it out")
    sizes = QUICK if parser.parse_args().quick else SIZES
    torch.set_num_threads(1)  # what the server gives itself on two cores
    result: dict[str, Any] = {}
    for name, measure in (("upload", upload), ("memory", memory)):
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder), sizes)
    result["targets"] = targets(result)
    if sizes is QUICK:
        print(json.dumps(result, indent=2))
    else:
        save("transfer", result)


if __name__ == "__main__":
    main()
