r"""Emphasis in prompts, as artists write it (the syntax of AUTOMATIC1111's web UI):

    (more)  1.1 times     (much more:1.4)     [less]  1/1.1 times     ((both))  1.21 times
    \( \) \[ \] \: \\     the characters themselves; \BREAK the word
    BREAK                 what follows begins a new window of the text encoder

What does not close is taken to close at the end; what does not open is itself.
"""

import math
import re

from compose.errors import InvalidRequest

STEP, LIMIT = 1.1, 10.0
_TOKEN = re.compile(
    r"\\([()\[\]\\:B])|(\()|(\[)|:\s*([+-]?[\d.]+)\s*\)|(\))|(\])|(\bBREAK\b)|[^\\()\[\]:B]+|.", re.S
)

Segment = tuple[str, float]
"""Text and how strongly it counts; the text "BREAK" with weight 0 is the mark."""

BREAK: Segment = ("BREAK", 0.0)


def parse(prompt: str, *, field: str = "prompt") -> list[Segment]:
    """The prompt in segments, neighbours of one weight joined. Raises InvalidRequest for a weight beyond the
    limit, with the `field` that it is in.
    """
    found: list[Segment] = []
    open_: list[tuple[str, int]] = []  # which bracket, and where its segments begin

    def close(bracket: str, factor: float, literal: str) -> None:
        if not open_ or open_[-1][0] != bracket:
            found.append((literal, 1.0))
            return
        _, start = open_.pop()
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    for match in _TOKEN.finditer(prompt):
        escaped, round_, square, number, round_end, square_end, mark = match.groups()
        if escaped:
            found.append((escaped, 1.0))
        elif round_ or square:
            open_.append((match[0], len(found)))
        elif number and open_ and open_[-1][0] == "(":
            close("(", _number(number, prompt, field), match[0])
        elif round_end:
            close("(", STEP, match[0])
        elif square_end:
            close("[", 1 / STEP, match[0])
        elif mark:
            found.append(BREAK)
        elif number:  # a number and a bracket that nothing opened
            found.append((match[0], 1.0))
        else:
            found.append((match[0], 1.0))
    while open_:
        bracket, _ = open_[-1]
        close(bracket, STEP if bracket == "(" else 1 / STEP, "")
    beyond = [weight for _, weight in found if not abs(weight) <= LIMIT]  # so is a NaN
    if beyond:
        raise InvalidRequest(
            f"the {field.replace('_', ' ')} emphasises something {beyond[0]:g} times, the limit is {LIMIT:g}",
            field=field,
        )
    return _joined(found)


def escape(text: str) -> str:
    """Text that `parse` gives back as it is."""
    return re.sub(r"[()\[\]\\:]|\bB(?=REAK\b)", r"\\\g<0>", text)


def _number(text: str, prompt: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} in the prompt {prompt[:60]!r} is no number", field=field) from None
    if not math.isfinite(value):
        raise InvalidRequest(f"{text!r} in the prompt is no number", field=field)
    return value


def _joined(found: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for text, weight in found:
        if joined and joined[-1][1] == weight and (text, weight) != BREAK and joined[-1] != BREAK:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined
