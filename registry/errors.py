"""What can go wrong in the catalog. Every message says what, which value, and what to do."""


class RegistryError(Exception):
    """Anything the catalog refuses. `field` names the part of the request at fault, where one is."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotFound(RegistryError):
    """No such asset, version or alias."""


class Renamed(NotFound):
    """A repository that has another name now, `new`."""

    def __init__(self, message: str, *, new: str, field: str = "") -> None:
        super().__init__(message, field=field)
        self.new = new


class InvalidName(RegistryError):
    """A name, alias or reference that does not follow the rules."""


class InvalidFile(RegistryError):
    """Bytes that are not an acceptable safetensors file or card."""


class Conflict(RegistryError):
    """Somebody else was first; nothing was changed."""


class Moved(Conflict):
    """The newest version is not the one that was seen, or has another card; nothing was changed."""


class Locked(RegistryError):
    """Another process owns the data directory."""


class Damaged(RegistryError):
    """Stored bytes are missing or do not match their digest."""


class Unavailable(RegistryError):
    """The Hub does not answer, or not now; nothing is known to have happened. `seconds` says when to try
    again, 0 when nobody does.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Denied(RegistryError):
    """The Hub does not let this token, or nobody without one."""


class Stopped(RegistryError):
    """The caller does not want the answer any more."""


class Untrusted(RegistryError):
    """The Hub answered what a Hub must not: another host, a path out of its repository, no end."""
