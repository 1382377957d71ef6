"""The least that an upload over gRPC can do, as a server of its own: it hashes what comes, writes and syncs
it, and compares the client's digest; no catalog, no tensors looked at, nothing kept.

The messages are those of CheckIn, so that the same client code sends to it. `serving(folder)` runs one in
another process and gives a function that uploads a file to it.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from atelier.channels import channel, stubs
from atelier.messages import OPTIONS, check_in_parts
from atelier.v1 import catalog_pb2, catalog_pb2_grpc


class Receiver(catalog_pb2_grpc.CatalogServiceServicer):
    """Writes every upload to the same file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def CheckIn(
        self, requests: Iterator[catalog_pb2.CheckInRequest], context: grpc.ServicerContext
    ) -> catalog_pb2.CheckInResponse:
        seen, digest = hashlib.sha256(), ""
        with self._target.open("wb") as file:
            for request in requests:
                digest, chunk = request.digest, request.chunk  # every reading of it is a copy
                seen.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest != f"sha256:{seen.hexdigest()}":
            context.abort(grpc.StatusCode.DATA_LOSS, "the digests differ")
        return catalog_pb2.CheckInResponse()


@contextmanager
def serving(folder: Path) -> Iterator[Callable[[Path], None]]:
    """What uploads a file to a receiver in another process."""
    command = [sys.executable, "-m", "tests.bench.raw_upload", str(folder / "received")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = process.stdout.readline().strip() if process.stdout else ""
        with channel(f"127.0.0.1:{port}") as connection:
            stub = stubs(connection)["catalog"]

            def upload(path: Path) -> None:
                header = catalog_pb2.CheckInHeader(size_bytes=path.stat().st_size)
                with path.open("rb") as file:
                    stub.CheckIn(check_in_parts(file, header, None))

            yield upload
    finally:
        process.terminate()
        process.wait(60)


def main(target: Path) -> None:
    """Serves until it is stopped; prints its port."""
    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(Receiver(target), server)  # type: ignore[no-untyped-call]
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
