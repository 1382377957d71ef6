"""No thread of ours works with more threads than torch was told to."""

import os
import subprocess
import sys

import pytest

from compose.projection import THREADS

COUNTED = """
import os, threading, torch
torch.set_num_threads(1)
{prepare}
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
{work}
print(threads() - before)
"""
PREPARE = """
from compose.factors import Factors
from compose.projection import projection
from compose.threads import heed
matrix = torch.randn(1500, 1500)
layers = {name: Factors(torch.randn(64, 4), torch.randn(4, 64)) for name in "abcd"}
"""
IN_A_THREAD = """
done = threading.Event()
def work():
    {first}
    matrix @ matrix
    done.set()
    waiting.wait()
waiting = threading.Event()
threading.Thread(target=work, daemon=True).start()
done.wait()
"""
IN_A_PROJECTION = """
seen = []
class Counted(dict):
    def __getitem__(self, name):
        matrix @ matrix
        seen.append(threads())
        return super().__getitem__(name)
projection(Counted(layers))
threads = lambda: max(seen)
"""


def more(work: str) -> int:
    """Threads that are there at the end of the work, and were not before."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    told = subprocess.run(
        [sys.executable, "-c", COUNTED.format(prepare=PREPARE, work=work)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_a_thread_that_heeds_has_no_helpers() -> None:
    assert more(IN_A_THREAD.format(first="heed()")) == 1  # itself


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_those_of_a_projection_have_none() -> None:
    assert more(IN_A_PROJECTION) <= THREADS
