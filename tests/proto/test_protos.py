"""The committed stubs are what proto/generate.sh makes of the protos, and every element of the contract is
explained.
"""

import filecmp
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
STUBS = sorted(p.name for p in (PROTO / "atelier/v1").glob("*_pb2*"))


def test_the_stubs_regenerate_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "atelier/v1").mkdir(parents=True)
    subprocess.run(
        [PROTO / "generate.sh", tmp_path], check=True, env={**os.environ, "PYTHON": sys.executable}
    )
    _, different, missing = filecmp.cmpfiles(
        PROTO / "atelier/v1", tmp_path / "atelier/v1", STUBS, shallow=False
    )
    assert (different, missing) == ([], [])


@pytest.mark.parametrize("proto", sorted(PROTO.glob("atelier/v1/*.proto")), ids=lambda p: p.name)
def test_every_rpc_message_and_field_has_a_comment(proto: Path) -> None:
    lines = [line.strip() for line in proto.read_text().splitlines()]
    elements = ("service ", "rpc ", "message ", "enum ", "oneof ")
    bare = [
        line
        for above, line in itertools.pairwise(lines)
        if (
            line.startswith(elements)
            or (line.endswith(";") and " = " in line and not line.startswith("syntax"))
        )
        and not above.startswith("//")
    ]
    assert bare == []
