"""What a merge method can be told. None means: not said."""

import math
from dataclasses import dataclass, fields

from compose.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Parameters:
    """rank: of the result; energy: share of the squared norm to keep, (0, 1]; strength, protect: see
    `orthogonal`.
    """

    rank: int | None = None
    energy: float | None = None
    strength: float | None = None
    protect: float | None = None

    def given(self) -> set[str]:
        """Names of the parameters that were said."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}

    def check(self, rank_limit: int) -> None:
        """Raises InvalidRequest for a value out of range."""
        if self.rank is not None and self.energy is not None:
            raise InvalidRequest("rank and energy exclude each other; give one", field="method.energy")
        if self.rank is not None and not 1 <= self.rank <= rank_limit:
            raise InvalidRequest(f"rank {self.rank} is not within 1 and {rank_limit}", field="method.rank")
        for name, low_open in (("energy", True), ("protect", True), ("strength", False)):
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or not 0 <= value <= 1 or (low_open and value == 0):
                span = "(0, 1]" if low_open else "[0, 1]"
                raise InvalidRequest(f"{name} {value} is not within {span}", field=f"method.{name}")
