"""Memory of a merge that does not fit: eight rank-128 LoRAs on FLUX.1's attention layers, svd to rank 128.

The files, half precision, are checked into a catalog; a process of its own then merges them as the server
does (`Stacks.bake`, on the CPU) and tells how far its memory grew beyond what it had when it started. The
factors of the stack in float32 are told beside it: what a merge that loads them all needs for its input.

Run: `python -m tests.bench.merge_memory [ADAPTERS]`; it writes 3.5 GB of files for a while.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from compose import bases
from compose.families import table
from compose.methods import Parameters
from compose.weights import Weight
from registry.catalog import Catalog
from registry.digests import DigestStream
from server.calibrations import Calibrations
from server.checkin import Declared, check_in
from server.served import served
from server.stacks import Stacks
from tests.bench.report import save

RANK = 128


def layers() -> dict[str, tuple[int, int]]:
    """The attention layers of FLUX.1, with their sizes."""
    return {
        name: (module.d, module.k)
        for name, module in table("flux").items()
        if ".attn.to_" in name or ".attn.add_" in name
    }


def write(path: Path, seed: int) -> None:
    """A LoRA as ai-toolkit and diffusers write it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d, k) in layers().items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, k, generator=generator).half()
        tensors[f"{name}.lora_B.weight"] = (0.01 * torch.randn(d, RANK, generator=generator)).half()
    save_file(tensors, path)


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def merge(data: Path, adapters: int) -> None:
    """In a process of its own: prints seconds and bytes."""
    catalog = Catalog(data)
    try:
        stacks = Stacks(catalog, Calibrations(catalog, served([bases.find("pocket")])))
        told = Parameters(rank=RANK)
        stack = stacks.pin([(f"a{i}", Weight(0.5)) for i in range(adapters)], method="svd", parameters=told)
        before, start = peak(), time.perf_counter()
        version, _, merged = stacks.bake(stack, method="svd", parameters=told, name="merged")
        seconds = time.perf_counter() - start
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "before": before,
                    "peak": peak(),
                    "error": merged.truncation_error,
                    "size": version.size_bytes,
                }
            )
        )
    finally:
        catalog.close()


def main(adapters: int = 8) -> None:
    """Measures, prints, writes results/merge_memory.json."""
    with tempfile.TemporaryDirectory() as folder:
        data, file = Path(folder) / "data", Path(folder) / "adapter.safetensors"
        catalog = Catalog(data)
        for seed in range(adapters):
            write(file, seed)
            with catalog.blobs.upload() as upload, file.open("rb") as opened:
                seen = DigestStream()
                while chunk := opened.read(8 << 20):
                    upload.write(chunk)
                    seen.update(chunk)
                check_in(catalog, upload, Declared(name=f"a{seed}"), seen)
        catalog.close()
        ran = subprocess.run(
            [sys.executable, "-m", "tests.bench.merge_memory", "merge", str(data), str(adapters)],
            capture_output=True,
            text=True,
            check=True,
        )
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    numbers = sum(RANK * (d + k) for d, k in layers().values())
    save(
        "merge_memory",
        {
            "layers": len(layers()),
            "adapters": adapters,
            "rank": RANK,
            "factors_gb_float32": adapters * numbers * 4 / 1e9,
            "grown_gb": (told["peak"] - told["before"]) / 1e9,
            "peak_gb": told["peak"] / 1e9,
            "result_gb": told["size"] / 1e9,
            "seconds": told["seconds"],
            "truncation_error": told["error"],
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["merge"]:
        merge(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
