"""What can go wrong with tensors. Every message says what, which value, and what to do."""


class ComposeError(Exception):
    """Anything composition refuses. `field` names the part of the request at fault, where one is."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(ComposeError):
    """A parameter out of range or not of this method."""


class UnsupportedLayout(ComposeError):
    """Tensors that are no adapter layout we read."""


class IncompatibleBase(ComposeError):
    """An adapter of another family, or layers that do not fit the base."""


class NonFinite(ComposeError):
    """NaN or infinity in an adapter's tensors."""


class NoRoom(ComposeError):
    """More memory than the budget has."""


def first_line(error: Exception) -> str:
    """What an error says, less a heading and what comes after; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether that is why: Python says so by the type, torch on a GPU by its own, on a CPU by its words."""
    kind = type(error).__name__
    return kind in {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in str(error)
