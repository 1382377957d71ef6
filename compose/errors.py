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
