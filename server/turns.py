"""A render of several pictures in turns, between which others have theirs.

Every picture comes from its own seed, whatever ran before it: in turns they are the same as in one go.
"""

from collections.abc import Sequence
from dataclasses import replace

from compose.render import Rendered
from server.calls import OTHERS
from server.engine import AnyWork, Result, Work


def left_by(work: AnyWork, result: Result) -> range:
    """The pictures of a render that are not made after a turn which came to `result`."""
    if not isinstance(work, Work) or not isinstance(result, Rendered) or result.gave_way_at is None:
        return range(0)
    return range(result.gave_way_at, work.settings.count)


def turn_of(work: AnyWork, left: range) -> AnyWork:
    """What there is to do when some pictures are made already; an empty range is none."""
    return replace(work, images=left) if isinstance(work, Work) and left else work


def together(results: Sequence[Result], others_seconds: float) -> Result:
    """What the turns came to as one, with the seconds in which others had theirs."""
    rendered = [result for result in results if isinstance(result, Rendered)]
    if len(rendered) < 2:
        return results[-1]
    phases = dict.fromkeys(phase for each in rendered for phase in each.seconds)
    seconds = {phase: sum(each.seconds.get(phase, 0.0) for each in rendered) for phase in phases}
    idle = set.intersection(*(set(each.idle) for each in rendered))
    return Rendered({**seconds, OTHERS: others_seconds}, rendered[0].tokens_dropped, tuple(sorted(idle)))
