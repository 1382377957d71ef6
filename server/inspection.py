"""A stack, inspected: strengths, crosstalk by part and by layer, what it means in sentences, what to do."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atelier.v1 import compose_pb2
from compose.errors import InvalidRequest
from compose.groups import nobody_asks
from compose.heatmap import ADAPTERS_LIMIT, heat_map
from compose.interference import ALL, Report, interference, part_of
from compose.methods import Parameters
from compose.weights import Weight
from server import convert
from server.layered import unmergeable
from server.pinned import Pinned
from server.shelf import Check
from server.stacks import Stacks
from server.suggestion import LOUD, SAME, finite, pairs, said, scaled, suggest

FAINT, UNEVEN, FINDINGS = 0.2, 4.0, 5
MEETINGS_LIMIT = 20_000
"""Of adapters in single layers, in one answer: 4 MB or so."""

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
    layers: bool = False,
    base: str = "",
    check: Check = nobody_asks,
) -> compose_pb2.InspectStackResponse:
    """The report on a stack, of every layer, too, with `layers`; `norms` tells those of a base that was warm,
    `base` is which to look at, "" the first that the stack fits; what `check` raises in between ends it.
    Raises RegistryError, ComposeError, BadRequest.
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
    meetings = len(stack) * (len(stack) - 1) * len({name for a in adapters for name in a.layers})
    if layers and meetings > MEETINGS_LIMIT:
        raise InvalidRequest(
            f"these adapters meet {meetings} times in single layers, and {MEETINGS_LIMIT} can be told; leave "
            "the layers out, or some of the adapters",
            field="layers",
        )
    report = interference(adapters, check=check)
    suggestion = suggest(report, stack)
    drawn = io.BytesIO()
    if picture:
        heat_map(report, [pinned.version.ref for pinned in stack]).save(drawn, "png")
    return compose_pb2.InspectStackResponse(
        adapters=[_strength(report, i, pinned, known) for i, pinned in enumerate(stack)],
        crosstalk=_crosstalk(report, [ALL]) + _crosstalk(report, report.parts),
        parts=[_part(report, part, known) for part in (ALL, *report.parts)],
        layers=[_part(report, layer, known) for layer in report.every_layer if layers],
        layer_crosstalk=_crosstalk(report, report.every_layer) if layers else (),
        suggestion=compose_pb2.Suggestion(
            method=convert.told(suggestion.method, suggestion.parameters),
            stack=[convert.weighted(stack[i].version.ref, suggestion.weights[i]) for i in suggestion.order],
            reason=suggestion.reason,
            unmergeable=unmergeable(stack),
        ),
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
            "apart": [_rounded(report.apart(i)) for i in places],
            "calibrated": list(report.calibrated),
            "crosstalk": crosstalk,
            "cosine": [[_rounded(report.cosine(i, j)) if i != j else 1.0 for j in places] for i in places],
            "coherence": _rounded(report.coherence()),
            "findings": findings(report, stack, relative),
            "suggestion": suggest(report, stack).told(stack),
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
        apart=report.apart(i),
    )


def _relative(report: Report, i: int, norms: Mapping[str, float], part: str = ALL) -> float | None:
    """||weighted update|| over ||base|| of the layers it changes in a part; None for another base's."""
    if not report.layers[i] or not norms.keys() >= report.layers[i]:
        return None
    inside = (norms[layer] ** 2 for layer in report.layers[i] if part in {ALL, layer, part_of(layer)})
    base = math.sqrt(sum(inside))
    return report.norm(i, part) / base if base else None


def _part(report: Report, part: str, norms: Mapping[str, float]) -> compose_pb2.PartStrength:
    places = range(len(report.calibrated))
    known = all(_relative(report, i, norms) is not None for i in places)
    return compose_pb2.PartStrength(
        part=part,
        norms=[report.norm(i, part) for i in places],
        relative=[_relative(report, i, norms, part) or 0.0 for i in places if known],
        apart=[report.apart(i, part) for i in places],
        coherence=report.coherence(part),
    )


def _pairs(report: Report) -> list[tuple[int, int]]:
    return pairs(range(len(report.calibrated)))


def _crosstalk(report: Report, parts: Sequence[str]) -> list[compose_pb2.Crosstalk]:
    """The loudest first; of all layers together as they come."""
    told = [_told(report, part, i, j) for part in parts for i, j in _pairs(report)]
    return told if parts == [ALL] else sorted(told, key=lambda one: -one.loudness)


def _told(report: Report, part: str, i: int, j: int) -> compose_pb2.Crosstalk:
    loudness, in_weights = report.crosstalk(i, j, part), report.crosstalk_in_weights(i, j, part)
    inputs, outputs = report.cosines.get((part, i, j), (0.0, 0.0))
    return compose_pb2.Crosstalk(
        part=part,
        lives=i,
        answers=j,
        loudness=loudness if math.isfinite(loudness) else None,
        cosine=report.cosine(i, j, part),
        input_cosine=inputs,
        output_cosine=outputs,
        in_weights=in_weights if math.isfinite(in_weights) else None,
    )


def findings(report: Report, stack: Sequence[Pinned], relative: Mapping[int, float | None]) -> list[str]:
    """What a report means: who is whose twin or opposite, the loudest meetings and where they happen, unlike
    strengths, what was not measured.
    """
    names = [pinned.version.ref for pinned in stack]
    silent = [i for i in range(len(stack)) if not report.norm(i)]
    told = [
        f"{names[i]} changes nothing at weight {stack[i].weight}: as if it were not there" for i in silent
    ]
    for i, j in _pairs(report):
        if i < j and abs(cosine := report.cosine(i, j)) >= SAME:
            does = "add up as one voice" if cosine > 0 else "take each other back"
            out = "one of them" if cosine > 0 else "both"
            told.append(f"{names[i]} and {names[j]} {does} (cosine {cosine:+.2f}): leave {out} out")
    loud = sorted(((report.crosstalk(i, j), i, j) for i, j in _pairs(report)), key=lambda found: -found[0])
    for loudness, i, j in loud:
        if not LOUD <= loudness < math.inf or abs(report.cosine(i, j)) >= SAME:
            continue
        worst = max(report.parts, key=lambda part: finite(report.crosstalk(i, j, part)))
        there = report.crosstalk(i, j, worst)
        does = "drowns" if loudness >= 1 else "disturbs"
        told.append(
            f"{names[j]} {does} {names[i]}: where {names[i]} lives it answers {loudness:.2f} times as loudly,"
            f" most of all in {worst} ({there:.2f} times); for less of it there: "
            f"{names[j]}={str(scaled(stack[j].weight, said(worst), 0.5)).replace(',', '/')}"
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
