"""What the command prints of how adapters get on: inspections and tunings, made with Rich."""

import json
import math
import shlex
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from atelier.v1 import compose_pb2, render_pb2
from atelier.views import headed, weight

PARTS_SHOWN, NAMES_SHOWN = 16, 4
CURVE = 32
"""Columns of a bar that is full."""
NOTHING = 0.05
"""Of what is left together."""


def inspection(answer: compose_pb2.InspectStackResponse, base: str = "") -> RenderableType:
    """Who is how strong, who is heard where another lives, part by part (layer by layer where that was asked
    for), what it means, and what to do; `base` is the one that was asked for.
    """
    names = [adapter.ref for adapter in answer.adapters]
    strengths = headed("adapter", "weight", "norm", "of its layers", "kept when last", "calibrated")
    for adapter in answer.adapters:
        share = f"{adapter.relative:.2%}" if adapter.HasField("relative") else "–"
        strengths.add_row(
            adapter.ref,
            weight(adapter.weight, adapter.parts),
            f"{adapter.norm:.3g}",
            share,
            f"{adapter.apart:.0%}",
            "yes" if adapter.calibrated else "no",
        )
    together = (
        f"the sum has {answer.coherence:.0%} of the sum of their norms (100%: all point one way, "
        f"{1 / math.sqrt(len(names)):.0%}: strangers of one size, 0%: they take each other back)"
    )
    loudness = headed(
        "where lives", "answers", "loudness", "in weights", "cosine", "nearest inputs", "nearest outputs"
    )
    for told in (told for told in answer.crosstalk if not told.part):
        angles = (
            f"{math.degrees(math.acos(min(1.0, c))):.0f}°" for c in (told.input_cosine, told.output_cosine)
        )
        in_weights = f"{told.in_weights:.2f}" if told.HasField("in_weights") else "alone"
        row = names[told.lives], names[told.answers], _loudness(told), in_weights, f"{told.cosine:+.3f}"
        loudness.add_row(*row, *angles)
    findings = [Text(f"• {finding}") for finding in answer.findings]
    suggested = answer.suggestion
    refs = [f"{ref.ref}={weight(ref.weight, ref.parts)}" for ref in suggested.stack]
    how = f"--method {suggested.method.name}{_on(base)}"
    hint = f"atelier merge {' '.join(refs)} {how} --name NAME"
    if suggested.unmergeable:
        hint = f"atelier render PROMPT --stack {','.join(refs)} {how} -o FILE.png"
    return Group(
        strengths,
        Text(together),
        Text(),
        loudness,
        Text(),
        Text(
            "by part: how much each changes its layers, the sum against the sum of norms, the loudest meeting"
        ),
        _where(answer, names),
        Text(),
        *findings,
        Text(f"suggested: {hint}", style="bold"),
        Text(f"for {suggested.reason}"),
    )


def _where(answer: compose_pb2.InspectStackResponse, names: Sequence[str]) -> Table:
    """The loudest parts, or all layers: how strong everybody is there, and who is heard most."""
    strengths = {told.part: told for told in answer.layers or answer.parts}
    met: dict[str, compose_pb2.Crosstalk] = {}
    for told in answer.layer_crosstalk if answer.layers else answer.crosstalk:
        if told.part:
            met.setdefault(told.part, told)  # the loudest comes first
    shown = names if len(names) <= NAMES_SHOWN else []
    grid = headed("loudest in", *shown, "sum", "loudness", "")
    for part, told in list(met.items())[: None if answer.layers else PARTS_SHOWN]:
        if not told.loudness:  # nobody meets anybody there
            continue
        there = strengths[part]
        shares = [f"{share:.1%}" for share in there.relative] or [f"norm {norm:.3g}" for norm in there.norms]
        who = f"{names[told.answers]} where {names[told.lives]} lives"
        grid.add_row(part, *shares[: len(shown)], f"{there.coherence:.0%}", _loudness(told), who)
    return grid


def _on(base: str) -> str:
    return f" --base {base}" if base else ""


def trial(told: render_pb2.Trial) -> str:
    """A trial in a line."""
    return f"{_how(told.method)} {' '.join(_stacked(told))}: {told.value:.0%}"


def tuned(summary: render_pb2.TuneSummary, base: str = "") -> RenderableType:
    """The best against the plain sum, and how to have it; `base` is the one that was asked for."""
    names = [ref.ref for ref in summary.naive.stack]  # in the order of the request, a saved stack's members
    prompt = summary.best.HasField("prompt")
    titles = [*(f"left of {name}" for name in names), *(["of the prompt"] if prompt else []), "together"]
    grid = headed("", "method", "stack, by priority", *titles)
    for title, told in (("best", summary.best), ("naive", summary.naive)):
        left = [f"{share:.0%}" for share in (*told.retention, *([told.prompt] if prompt else []))]
        grid.add_row(title, _how(told.method), " ".join(_stacked(told)), *left, f"{told.value:.0%}")
    stack, best = _stacked(summary.best), summary.best.method
    how = " ".join([f"--method {best.name}", *(f"--set {said}" for said in _said(best))]) + _on(base)
    hint = f"next: atelier merge {' '.join(stack)} {how} --name NAME"
    if summary.unmergeable:
        keep = f", or atelier stack save NAME {' '.join(stack)}" if best.name == "naive" else ""
        shown = (
            f"atelier render {shlex.quote(summary.prompts[0])} --stack {','.join(stack)} {how} -o FILE.png"
        )
        hint = f"no merge: {summary.unmergeable}\nnext: {shown}{keep}"
    if summary.best.value < NOTHING:
        hint = (
            "in every trial something is as good as gone: look at the pictures (-o), ask for more --steps, "
            f"or give a --prompt that calls all of it\n{hint}"
        )
    scored = {
        "judge": "scored by the base's judge",
        "clip": "scored by what the server's CLIP model sees",
        "effect": "scored by their effect on the picture",
    }
    return Group(
        grid,
        *(part for climb in summary.climbs for part in (Text(), _curve(climb, names[climb.place]))),
        *[Text()] * bool(summary.climbs),
        Text(f"{counted(len(summary.prompts), 'prompt')}, {scored.get(summary.scorer, '')}"),
        Text(hint, style="dim"),
    )


def counted(number: int, what: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {what}{'s' * (number != 1)}"


def _curve(climb: render_pb2.Climb, name: str) -> RenderableType:
    """How much of an adapter is there as its weight goes up."""
    grid = headed("weight", f"left of {name}", "")
    for at, share in zip(climb.weights, climb.retention, strict=True):
        grid.add_row(f"{at:g}", "█" * round(share * CURVE), f"{share:.0%}{' ←' * (at == climb.chosen)}")
    return grid


def _stacked(told: render_pb2.Trial) -> list[str]:
    return [f"{ref.ref}={weight(ref.weight, ref.parts)}" for ref in told.stack]


def _said(method: compose_pb2.Method) -> list[str]:
    said = ((field.name, value) for field, value in method.ListFields() if field.name != "name")
    return [f"{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in said]


def _how(method: compose_pb2.Method) -> str:
    return " ".join((method.name, *_said(method)))


def _loudness(told: compose_pb2.Crosstalk) -> str:
    return f"{told.loudness:.2f}" if told.HasField("loudness") else "alone"
