"""What a picture depends on besides the weights."""

import math
import unicodedata
from dataclasses import dataclass

from compose.emphasis import parse
from compose.errors import InvalidRequest

PROMPT_LIMIT, COUNT_LIMIT, BATCH_LIMIT = 4096, 64, 16
STEPS_LIMIT, GUIDANCE_LIMIT, SIDE_LIMIT = 150, 50, 2048
CONTROL = {"Cc", "Cs"}
SEED_LIMIT, PIXELS_LIMIT = 1 << 63, 4 * 2048 * 2048

Option = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | None
Options = tuple[tuple[str, Option], ...]
"""Names with values, in order of name; lists as tuples, so that all of it can be a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes in pixels; `scheduler` is a name of diffusers', "" the base's own, with options of its own;
    `literal` reads the prompts without emphasis and one window of them, as the first manifests did.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    width: int = 512
    height: int = 512
    count: int = 1
    batch: int = 1
    scheduler: str = ""
    scheduler_options: Options = ()
    literal: bool = False

    def check(self, granularity: int) -> None:
        """Raises InvalidRequest for a value out of range, naming the field."""
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > PROMPT_LIMIT:
                raise InvalidRequest(
                    f"{name} has {len(text)} characters, the limit is {PROMPT_LIMIT}", field=name
                )
            if bad := next(
                (c for c in text if unicodedata.category(c) in CONTROL and c not in "\n\r\t"), None
            ):
                raise InvalidRequest(f"{name} holds the control character {bad!r}; take it out", field=name)
            if not self.literal:
                parse(text, field=name)
        for name, value, low, high in (
            ("seed", self.seed, 0, SEED_LIMIT - COUNT_LIMIT),
            ("steps", self.steps, 1, STEPS_LIMIT),
            ("count", self.count, 1, COUNT_LIMIT),
            ("batch", self.batch, 1, BATCH_LIMIT),
            ("guidance", self.guidance, 0, GUIDANCE_LIMIT),
        ):
            if not math.isfinite(value) or not low <= value <= high:
                raise InvalidRequest(f"{name} {value} is not within {low} and {high}", field=name)
        for name, side in (("width", self.width), ("height", self.height)):
            if side % granularity or not granularity <= side <= SIDE_LIMIT:
                raise InvalidRequest(
                    f"{name} {side} must be a multiple of {granularity}, from {granularity} to {SIDE_LIMIT}",
                    field=name,
                )
        if (pixels := self.width * self.height * min(self.batch, self.count)) > PIXELS_LIMIT:
            raise InvalidRequest(
                f"batch {self.batch} of {self.width}x{self.height} is {pixels} pixels at once, "
                f"the limit is {PIXELS_LIMIT}",
                field="batch",
            )
