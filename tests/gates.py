"""Holding a real server where a test wants it: a gate, an engine and a blob store that pass through it, and a
wire that can be cut.
"""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from compose.factors import Factors
from compose.render import Listener, Picture, YieldingListener
from compose.residence import Residence
from compose.warm import WarmPipeline
from registry.blobs import BlobStore
from server.engine import AnyWork, InProcessEngine, Result, Work


class Gate:
    """Holds the first thread that comes to a phase until it is opened; steps since then are counted."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self._phase = ""
        self.steps = 0

    def shut(self, phase: str) -> None:
        """Holds whoever comes to this phase next."""
        self.reached.clear()
        self._opened.clear()
        self._phase = phase

    def open(self) -> None:
        """Lets it pass."""
        self._phase, self.steps = "", 0
        self._opened.set()

    def at(self, phase: str) -> None:
        """A thread comes by."""
        if phase == self._phase:
            self._phase = ""
            self.reached.set()
            assert self._opened.wait(60)


class HeldEngine(InProcessEngine):
    """Renders as ever, by way of a gate: `warming` (a base), `patching`, `denoising` (after the second step),
    `decoding`.
    """

    def __init__(self, warm: WarmPipeline | Residence, gate: Gate) -> None:
        super().__init__(warm)
        self._gate = gate

    def do(self, work: AnyWork, listener: Listener) -> Result:
        """Does it."""
        if isinstance(work, Work):
            stack = work.composition
            held = replace(stack, stack=tuple((HeldLayers(f, self._gate), w) for f, w in stack.stack))
            work = replace(work, composition=held)
            return super().do(work, HeldListener(listener, self._gate, work.settings.steps))
        return super().do(work, listener)


class HeldLayers(Mapping[str, Factors]):
    """A stack's layers; one halfway is where the gate is."""

    def __init__(self, layers: Mapping[str, Factors], gate: Gate) -> None:
        self._layers, self._gate = layers, gate
        self._looked = 0

    def __getitem__(self, name: str) -> Factors:
        self._looked += 1
        if self._looked == 1 + len(self._layers) // 2:
            self._gate.at("patching")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(slots=True)
class HeldListener:
    """Tells another listener, by way of the gate."""

    to: Listener
    gate: Gate
    steps: int
    done: int = 0

    def check(self) -> None:
        self.gate.at("warming")
        self.to.check()

    def step(self, image: int, step: int) -> None:
        self.gate.steps += 1
        self.to.step(image, step)
        if step == 2:
            self.gate.at("denoising")
        if step == self.steps:
            self.gate.at("decoding")

    def preview(self, image: int, step: int, picture: Picture) -> None:
        self.to.preview(image, step, picture)

    def picture(self, image: int, picture: Picture) -> None:
        self.to.picture(image, picture)
        self.gate.at("delivering")

    def gives_way(self) -> bool:
        return isinstance(self.to, YieldingListener) and self.to.gives_way()


class HeldBlobs(BlobStore):
    """Files that are read by way of the gate: `loading`."""

    def __init__(self, root: Path, gate: Gate) -> None:
        super().__init__(root)
        self._gate = gate

    def verified(self, digest: str) -> Path:
        """The blob's path."""
        self._gate.at("loading")
        return super().verified(digest)


@contextmanager
def wire(address: str) -> Iterator["Wire"]:
    """A way to a server that can be cut."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Wire(listening, address)


class Wire:
    """Passes bytes on, both ways, over one connection."""

    def __init__(self, listening: socket.socket, to: str) -> None:
        host, port = listening.getsockname()
        self.address = f"{host}:{port}"
        self._listening, self._to = listening, to.rsplit(":", 1)
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._connect, daemon=True).start()

    def _connect(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection((self._to[0], int(self._to[1])))
        self._ends = [near, far]
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        """Ends the connection, as a machine that dies does."""
        for end in self._ends:
            end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._listening.close()  # and nobody comes back
