"""A stack, inspected: strengths, crosstalk by part, and what it means in sentences."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atelier.v1 import compose_pb2
from compose.errors import InvalidRequest
from compose.groups import nobody_asks
from compose.heatmap import ADAPTERS_LIMIT, heat_map
from compose.interference import ALL, Report, interference
from compose.methods import Parameters
from compose.weights import Weight
from server.pinned import Pinned
from server.shelf import Check
from server.stacks import Stacks

LOUD, FAINT, UNEVEN, FINDINGS = 0.5, 0.2, 4.0, 5

RECORDED_BYTES = 64 << 20
"""Of a stack's factors in float32, beyond which a merge records no report. At any size it takes longer than a
plain merge: ten times as long as naive, twice as long as svd. Up to here that is a second of one core or so.
"""


def inspect(
    stacks: Stacks,
    refs: Sequence[tuple[str, Weight]],
    *,
    norms: Callable[[str], Mapping[str, float]],
    picture: bool,
    base: str = "",
    check: Check = nobody_asks,
) -> compose_pb2.InspectStackResponse:
    """The report on a stack; `norms` tells those of a base that was warm, `base` is which to look at, "" the
    first that the stack fits; what `check` raises in between ends it. Raises RegistryError, ComposeError,
    BadRequest.
    """
    stack = stacks.pin(refs, method="naive", parameters=Parameters())
    if len(stack) < 2:
        raise InvalidRequest(f"it takes 2 adapters or more to fight, not {len(stack)}", field="stack")
    if picture and len(stack) > ADAPTERS_LIMIT:
        raise InvalidRequest(
            f"a heat map shows at most {ADAPTERS_LIMIT} adapters, not {len(stack)}; leave it out",
            field="picture",
        )
    on, adapters = stacks.weighed(stack, base, check)
    known = norms(on.name) if on else {}
    report = interference(adapters, check=check)
    drawn = io.BytesIO()
    if picture:
        heat_map(report, [pinned.version.ref for pinned in stack]).save(drawn, "png")
    return compose_pb2.InspectStackResponse(
        adapters=[_strength(report, i, pinned, known) for i, pinned in enumerate(stack)],
        crosstalk=_crosstalk(report),
        coherence=report.coherence(),
        findings=findings(report, stack, {i: _relative(report, i, known) for i in range(len(stack))}),
        picture=drawn.getvalue(),
    )


def recorded(
    stacks: Stacks,
    stack: Sequence[Pinned],
    *,
    norms: Callable[[str], Mapping[str, float]],
    base: str,
    check: Check,
) -> dict[str, Any]:
    """The report on what was merged, for its recipe: {} of one adapter alone, of a large stack why there is
    none. Loudness is rounded, and None where the one that lives there says nothing. Raises as `inspect`.
    """
    if len(stack) < 2:
        return {}
    if (size := 2 * sum(p.version.size_bytes for p in stack)) > RECORDED_BYTES:
        told = f"not measured: the stack has {size >> 20} MB, the limit is {RECORDED_BYTES >> 20}"
        return {"interference": {"left_out": f"{told}; atelier inspect measures it"}}
    on, adapters = stacks.weighed(stack, base, check)
    known = norms(on.name) if on else {}
    report, places = interference(adapters, check=check), range(len(stack))
    relative = {i: _relative(report, i, known) for i in places}
    crosstalk = [[_rounded(report.crosstalk(i, j)) if i != j else 1.0 for j in places] for i in places]
    return {
        "interference": {
            "norm": [_rounded(report.norm(i)) for i in places],
            "relative": [_rounded(relative[i]) for i in places],
            "calibrated": list(report.calibrated),
            "crosstalk": crosstalk,
            "cosine": [[_rounded(report.cosine(i, j)) if i != j else 1.0 for j in places] for i in places],
            "coherence": _rounded(report.coherence()),
            "findings": findings(report, stack, relative),
        }
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _strength(report: Report, i: int, pinned: Pinned, norms: Mapping[str, float]) -> compose_pb2.Strength:
    return compose_pb2.Strength(
        ref=pinned.version.ref,
        weight=pinned.weight.value,
        parts=dict(pinned.weight.parts),
        norm=report.norm(i),
        relative=_relative(report, i, norms),
        calibrated=report.calibrated[i],
    )


def _relative(report: Report, i: int, norms: Mapping[str, float]) -> float | None:
    """||weighted update|| over ||base|| of the layers it changes; None for another base's."""
    if not report.layers[i] or not norms.keys() >= report.layers[i]:
        return None
    base = math.sqrt(sum(norms[layer] ** 2 for layer in report.layers[i]))
    return report.norm(i) / base if base else None


def _pairs(report: Report) -> list[tuple[int, int]]:
    places = range(len(report.calibrated))
    return [(i, j) for i in places for j in places if i != j]


def _crosstalk(report: Report) -> list[compose_pb2.Crosstalk]:
    overall = [_told(report, ALL, i, j) for i, j in _pairs(report)]
    by_part = [_told(report, part, i, j) for part in report.parts for i, j in _pairs(report)]
    return overall + sorted(by_part, key=lambda told: -told.loudness)


def _told(report: Report, part: str, i: int, j: int) -> compose_pb2.Crosstalk:
    loudness = report.crosstalk(i, j, part)
    inputs, outputs = report.cosines.get((part, i, j), (0.0, 0.0))
    return compose_pb2.Crosstalk(
        part=part,
        lives=i,
        answers=j,
        loudness=loudness if math.isfinite(loudness) else None,
        cosine=report.cosine(i, j) if part == ALL else 0.0,
        input_cosine=inputs,
        output_cosine=outputs,
    )


def findings(report: Report, stack: Sequence[Pinned], relative: Mapping[int, float | None]) -> list[str]:
    """What a report means: the loudest meetings and where they happen, unlike strengths, what was not
    measured.
    """
    names = [pinned.version.ref for pinned in stack]
    silent = [i for i in range(len(stack)) if not report.norm(i)]
    told = [
        f"{names[i]} changes nothing at weight {stack[i].weight}: as if it were not there" for i in silent
    ]
    loud = sorted(((report.crosstalk(i, j), i, j) for i, j in _pairs(report)), key=lambda found: -found[0])
    for loudness, i, j in loud:
        if not LOUD <= loudness < math.inf:
            continue
        worst = max(report.parts, key=lambda part: _finite(report.crosstalk(i, j, part)))
        there = report.crosstalk(i, j, worst)
        does = "drowns" if loudness >= 1 else "disturbs"
        told.append(
            f"{names[j]} {does} {names[i]}: where {names[i]} lives it answers {loudness:.1f} times as loudly,"
            f" most of all in {worst} ({there:.1f} times); for less of it there: "
            f"{names[j]}={_halved(stack[j].weight, worst.split()[0])}"
        )
    speaking = [loudness for loudness, i, j in loud if i not in silent and j not in silent]
    if speaking and max(speaking) < FAINT:
        told.append("nobody is heard where another lives: the plain sum will do")
    known = {i: share for i, share in relative.items() if share}
    if len(known) > 1:
        strong, weak = max(known, key=lambda i: known[i]), min(known, key=lambda i: known[i])
        if known[strong] > UNEVEN * known[weak]:
            told.append(
                f"{names[strong]} changes its layers by {known[strong]:.1%}, {names[weak]} by "
                f"{known[weak]:.2%}: at equal weights they are not equally strong"
            )
    told = told[:FINDINGS]
    missing = [name for name, has in zip(names, report.calibrated, strict=True) if not has]
    if missing:
        told.append(
            f"not calibrated: {', '.join(missing)}; what is said of where they live comes from weights alone "
            f"(atelier calibrate {missing[0]})"
        )
    return told


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def _halved(weight: Weight, part: str) -> str:
    """Half as strong in a part, as it is written on the command line."""
    parts = dict(weight.parts)
    return str(Weight.of_parts(weight.value, parts | {part: parts.get(part, 1.0) / 2})).replace(",", "/")
