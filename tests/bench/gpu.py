"""All that wants a GPU, one after the other, what was least tried first: its tests, then each benchmark.

A part that fails or takes too long stops none after it; each writes its file as ever. Run on the machine with
the card: `python -m tests.bench.gpu [PART…]`, where any part of a name chooses; a quarter of an hour at most.
"""

import subprocess
import sys
import time

PARTS = {
    # name: (seconds at most, arguments of python)
    "tests": (240, ["-m", "pytest", "-m", "gpu", "-v"]),
    "stack_switch": (150, ["-m", "tests.bench.stack_switch", "cuda"]),
    "merge sdxl 3 x rank 32": (120, ["-m", "tests.bench.merge_methods", "sdxl 3 x rank 32", "cuda"]),
    "render_overhead": (120, ["-m", "tests.bench.render_overhead", "cuda"]),
    "stack_switch sdxl": (150, ["-m", "tests.bench.stack_switch", "sdxl", "cuda"]),
    "merge sd1 3 x rank 16": (120, ["-m", "tests.bench.merge_methods", "sd1 3 x rank 16", "cuda"]),
}


def main(wanted: list[str]) -> int:
    """Runs the parts, and tells how each ended; how many failed."""
    failed = 0
    for name, (seconds, arguments) in PARTS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        try:
            code = subprocess.run([sys.executable, *arguments], timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        failed += code != 0
        how = {0: "done", -1: f"cut after {seconds} s"}.get(code, f"failed with {code}")
        print(f"== {name}: {how}, {time.monotonic() - begun:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
