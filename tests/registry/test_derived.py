"""Derived files: whole or not there, and gone with the bytes they were made from."""

import os
from datetime import timedelta
from pathlib import Path

from registry.catalog import Catalog


def test_a_derived_file_is_read_by_what_it_depends_on_and_goes_with_its_version(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "data")
    digests = []
    for data in (b"one", b"two"):
        with catalog.blobs.upload() as upload:
            upload.write(data)
            version, _ = catalog.add(upload, name=data.decode(), kind="lora", facts={}, card=b"")
            digests.append(version.digest)
    for digest in digests:
        catalog.derived.write("moments", digest, b"old", of="base")
        catalog.derived.write("moments", digest, b"kept", of="base")
    assert catalog.derived.read("moments", digests[0], of="base") == b"kept"
    assert catalog.derived.read("moments", digests[0], of="another base") is None
    half = tmp_path / "data" / "derived" / "moments" / ".half"
    half.write_bytes(b"x")
    os.utime(half, (0, 0))
    catalog.delete("one:1")
    catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0), dry_run=True)
    assert catalog.derived.read("moments", digests[0], of="base") == b"kept"
    catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0))
    catalog.derived.write(
        "moments", digests[0], b"late", of="base"
    )  # a measurement that ends after the purge
    catalog.collect_garbage(retention=timedelta(0), grace=timedelta(0))
    assert catalog.derived.read("moments", digests[0], of="base") is None
    assert catalog.derived.read("moments", digests[1], of="base") == b"kept"
    assert not half.exists()
    catalog.close()
