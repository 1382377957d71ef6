"""The tensors of a file that goes by in pieces, each as soon as its last byte is here: whoever wants to look
at them need not read the file again.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator

from registry.headers import HEADER_LIMIT, Header, TensorInfo, header_of
from registry.intake import Bytes


class TensorStream:
    """A file of `size` bytes. Its header passes the gate, and is told to `begin`, before any tensor is; one
    tensor is held, with as many bytes as came of it.
    """

    def __init__(self, size: int, begin: Callable[[Header], object]) -> None:
        self._size, self._begin = size, begin
        self._head: bytearray | None = bytearray()
        self._left, self._part = deque[tuple[str, TensorInfo]](), bytearray()

    def update(self, data: Bytes) -> Iterator[tuple[str, TensorInfo, bytearray]]:
        """The tensors that the next bytes complete, in the order of the file; to be used up before there are
        more bytes. Raises InvalidFile, and what `begin` does.
        """
        view = memoryview(data)
        if self._head is not None:
            self._head += view
            length = 8 + int.from_bytes(self._head[:8], "little")
            if len(self._head) < min(max(9, length), 8 + HEADER_LIMIT):
                return
            header = header_of(io.BytesIO(self._head), self._size)
            self._left.extend(sorted(header.tensors.items(), key=lambda t: (t[1].start, t[1].stop)))
            view, self._head = memoryview(self._head)[header.data_offset :], None
            self._begin(header)
        while self._left:
            name, info = self._left[0]
            missing = info.stop - info.start - len(self._part)
            self._part += view[:missing]
            if len(view) < missing:
                return
            view, part, self._part = view[missing:], self._part, bytearray()
            self._left.popleft()
            yield name, info, part

    @property
    def done(self) -> bool:
        """Whether the last tensor was told of."""
        return self._head is None and not self._left
