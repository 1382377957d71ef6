"""What the command prints for people: tables and one-screen answers, made with Rich."""

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from atelier.v1 import catalog_pb2, compose_pb2

EMPTY = "The catalog is empty; `atelier checkin FILE --name NAME` fills it."
LAYERS_SHOWN = 12
KINDS = {
    catalog_pb2.KIND_LORA: "LoRA",
    catalog_pb2.KIND_TEXTUAL_INVERSION: "textual inversion",
    catalog_pb2.KIND_STACK: "stack",
}


def size(number: int) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000  # type: ignore[assignment]
    return f"{number:.1f} GB"


def table(versions: Sequence[catalog_pb2.Version]) -> Table:
    """Versions, a line each."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("version", "kind", "base", "rank", "trigger", "aliases", "size", "made"):
        found.add_column(heading, overflow="fold")
    for v in versions:
        deleted = " (deleted)" if v.HasField("delete_time") else ""
        found.add_row(
            f"{v.name}:{v.number}{deleted}",
            KINDS[v.kind],
            v.family or "unknown",
            str(v.rank),
            Text(_words(v)),
            ", ".join(v.aliases),
            size(v.size_bytes),
            v.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        )
    return found


def _facts(v: catalog_pb2.Version) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in _rows(v):
        if value:
            grid.add_row(Text(name, style="dim"), Text(value))
    return grid


def _rows(v: catalog_pb2.Version) -> list[tuple[str, str]]:
    """What a version is, for people; "" where there is nothing to say."""
    count = "vectors" if v.kind == catalog_pb2.KIND_TEXTUAL_INVERSION else "rank"
    covered = (
        f"{v.coverage.bound} of {v.coverage.total} layers found in it"
        if v.coverage.base
        else "no layers known"
    )
    rows = [
        ("kind", f"{KINDS[v.kind]}, {v.layout} layout, {count} {v.rank}, {size(v.size_bytes)}"),
        ("base", f"{v.family or 'unknown'}: {covered}"),
        ("changes", f"{', '.join(v.components)}: {', '.join(v.targets)}".rstrip(": ")),
        ("trigger", _triggers(v, "") or "none: say it with --trigger, or in the card"),
        *(
            (f"  {group}", f"{_triggers(v, group)}, called by {{{v.name}/{group}}}")
            for group in dict.fromkeys(t.group for t in v.triggers if t.group)
        ),
        ("weight", _weight(v.about)),
        ("tags", ", ".join(v.about.tags)),
        *((name, _told(getattr(v.about, field))) for name, field in _TOLD),
        ("aliases", ", ".join(v.aliases)),
        ("not in base", ", ".join(v.coverage.unbound)),
        ("digest", v.digest),
        ("AutoV3", v.body_digest.removeprefix("sha256:")[:12]),
        ("made", v.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC")),
    ]
    if v.recipe_json:
        recipe = json.loads(v.recipe_json)
        parents = " + ".join(_times(p) for p in recipe["parents"])
        told = "".join(f", {key} {value}" for key, value in recipe["parameters"].items())
        rows.insert(1, ("merged", f"{recipe['method']}{told}: {parents}"))
        if met := recipe.get("interference"):
            rows.insert(2, ("its adapters", met.get("left_out") or "; ".join(met["findings"])))
    if v.origin_json:
        rows.insert(-1, ("brought from", _origin(json.loads(v.origin_json))))
    if v.stack_json:
        document = json.loads(v.stack_json)
        members = " + ".join(_times(m) for m in document["members"])
        said = [(key, f"{document[key]}") for key in ("prompt", "steps", "guidance") if key in document]
        rows[0:3] = [("stack", members), *said, rows[1]]
    return rows


def _triggers(v: catalog_pb2.Version, group: str) -> str:
    return ", ".join(f"{t.word} (from {t.source})" for t in v.triggers if t.group == group)


_TOLD = (
    ("title", "title"),
    ("author", "author"),
    ("licence", "licence"),
    ("negative", "negative_prompt"),
    ("rating", "rating"),
)


def _origin(told: dict[str, Any]) -> str:
    """What whoever brought it said, on a line."""
    parts = [f"{key} {value}" for key, value in told.items() if isinstance(value, str | int)]
    recipe = told.get("recipe")
    if isinstance(recipe, dict) and isinstance(recipe.get("parents"), list):
        parents = " + ".join(str(p.get("ref")) for p in recipe["parents"] if isinstance(p, dict))
        parts.append(f"merged from {parents}")
    return "".join(c for c in ", ".join(parts) if c.isprintable())[:300]


def _told(told: catalog_pb2.Told) -> str:
    return f"{told.value} (from {told.source})" if told.value else ""


def _weight(about: catalog_pb2.About) -> str:
    if not about.HasField("weight"):
        return ""
    weight = about.weight
    span = f", {weight.low:g} to {weight.high:g}" if weight.low < weight.high else ""
    return f"{weight.value:g}{span} (from {weight.source})"


def version(answer: catalog_pb2.GetVersionResponse) -> RenderableType:
    """One version on one screen, its pictures and card below."""
    v, card = answer.version, answer.card.decode(errors="replace")
    parts: list[RenderableType] = [Text(f"{v.name}:{v.number}", style="bold"), _facts(v)]
    parts += [Text(f"preview {line}", style="dim") for line in previews(answer.previews)]
    if card:
        parts += [Rule("card", style="dim"), Markdown(_body(card))]
    return Group(*parts)


def previews(found: Sequence[catalog_pb2.PreviewImage]) -> list[str]:
    """The pictures shown with a version, a line each."""
    return [f"{p.digest} {p.width}x{p.height} {p.caption}".rstrip() for p in found]


def cards(found: Sequence[catalog_pb2.CardRevision]) -> Table:
    """Every card a version had, a line each."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("card", "written", "by", "bytes", "digest"):
        grid.add_column(heading)
    for r in found:
        when = r.time.ToDatetime().strftime("%Y-%m-%d %H:%M")
        grid.add_row(str(r.revision), when, r.actor, str(len(r.card)), r.digest or "none")
    return grid


def alike(found: Sequence[catalog_pb2.Similar]) -> Table:
    """Versions that are like another one, with the cosine."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("version", "cosine", "rank", "trigger", "made"):
        grid.add_column(heading, overflow="fold")
    for like in found:
        v = like.version
        made = v.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M")
        grid.add_row(f"{v.name}:{v.number}", f"{like.cosine:.3f}", str(v.rank), Text(_words(v)), made)
    return grid


def _words(v: catalog_pb2.Version) -> str:
    return ", ".join(t.word for t in v.triggers if not t.group)


def _body(card: str) -> str:
    """The card without its front matter, whose values stand above."""
    text = "".join(c for c in card.lstrip("\ufeff \n") if c.isprintable() or c in "\n\t")
    if text.startswith("---\n") and "\n---" in text[4:]:
        return text[4:].split("\n---", 1)[1].lstrip("-\n")
    return text


def checked_in(answer: catalog_pb2.CheckInResponse, families: Collection[str]) -> RenderableType:
    """What became of a file, and what to do next on a server with bases of these families."""
    v = answer.version
    title = f"{v.name}:{v.number}" + (
        "" if answer.created else " holds exactly these bytes already; nothing new was made"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), _facts(v)]
    if answer.same_bytes:
        parts.append(Text(f"the same bytes are also {', '.join(answer.same_bytes)}"))
    if answer.same_tensors:
        parts.append(Text(f"same tensors as {', '.join(answer.same_tensors)}, only metadata differs"))
    parts += [Text(f"note: {warning}") for warning in answer.warnings]
    for like in answer.similar:
        of = f"{like.version.name}:{like.version.number}"
        parts.append(
            Text(f"nearly the same weights as {of}: cosine {like.cosine:.3f} (atelier similar {of})")
        )
    parts.append(Text(f"next: {_next(v, families)}", style="dim"))
    return Group(*parts)


def _next(v: catalog_pb2.Version, families: Collection[str]) -> str:
    """A command that works."""
    if not v.family and not v.coverage.bound:
        if v.kind == catalog_pb2.KIND_TEXTUAL_INVERSION:
            return (
                "no base takes it alone; of half a word for SDXL, atelier convert --second makes a whole one"
            )
        return "it fits no base that is known here, so nothing can render it: is it whole, and for which?"
    if v.family not in {"", *families}:
        return f"to render it, serve a base of {v.family}: atelier serve --base DIR"
    called = f"{{{v.name}}}" if _words(v) else ""
    prompt = f"a photo of {called}" if called and " " not in _words(v) else f"a photo, {called}".rstrip(", ")
    weight = f"{v.about.weight.value:g}" if v.about.HasField("weight") else "1"
    return f'atelier render "{prompt}" --stack {v.name}={weight} -o {v.name}.png'


def event(e: catalog_pb2.WatchEventsResponse) -> Text:
    """A change, on a line."""
    told = json.loads(e.detail_json)
    what = f"{e.name}@{told['alias']} -> {e.name}:{e.number}" if "alias" in told else f"{e.name}:{e.number}"
    when = e.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
    return Text.assemble(
        (f"{e.seq:>6}  {when}  ", "dim"),
        f"{e.action:<9} {what}",
        (f"  by {e.actor}" if e.actor else "", "dim"),
    )


def garbage(answer: catalog_pb2.CollectGarbageResponse, *, dry_run: bool) -> str:
    """What a garbage collection removed."""
    verb = "would purge" if dry_run else "purged"
    names = f": {', '.join(answer.versions)}" if answer.versions else ""
    lines = [
        f"{verb} {len(answer.versions)} deleted versions{names} "
        f"and {len(answer.orphans)} files nobody names, {size(answer.size_bytes)}"
    ]
    kept = "would keep" if dry_run else "kept"
    lines += [f"{kept} {held.ref}: {held.merge} was made of it; delete that first" for held in answer.held]
    return "\n".join(lines)


def difference(answer: compose_pb2.CompareVersionsResponse, card: str, other_card: str) -> RenderableType:
    """Two versions side by side: the facts that differ, the card's lines, the layers that moved most."""
    a, b, whole = answer.before, answer.after, answer.total
    titles = [f"{v.name}:{v.number}" for v in (a, b)]
    facts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", *titles):
        facts.add_column(heading, overflow="fold")
    old, new = dict(_rows(a)), dict(_rows(b))
    for name in dict.fromkeys([*old, *new]):
        pair = old.get(name, ""), new.get(name, "")
        if pair[0] != pair[1] and name not in {"digest", "AutoV3", "made"}:
            facts.add_row(Text(name, style="dim"), *map(Text, pair))
    old_lines, new_lines = card.splitlines(), other_card.splitlines()
    lines = difflib.unified_diff(old_lines, new_lines, titles[0], titles[1], n=1, lineterm="")
    moved = sorted(answer.layers, key=lambda layer: -layer.change)[:LAYERS_SHOWN]
    layers = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "before", "after", "change", "cosine"):
        layers.add_column(heading)
    for layer in (whole, *moved):
        name = layer.layer or f"all {len(answer.layers)} layers"
        numbers = (layer.before, layer.after, layer.change, layer.cosine)
        layers.add_row(name, *(f"{number:.3g}" for number in numbers))
    shown = "" if len(moved) == len(answer.layers) else f"the {len(moved)} that moved most; --json has all"
    return Group(facts, Text("\n".join(lines)), layers, Text(shown, style="dim"))


def stack_saved(answer: compose_pb2.SaveStackResponse) -> RenderableType:
    """A kept stack, and what to do next."""
    v = answer.version
    title = f"{v.name}:{v.number}" + ("" if answer.created else " holds exactly this stack already")
    prompt = "" if "prompt" in json.loads(answer.stack_json) else ' "a photo of …"'
    hint = f"next: atelier render{prompt} --stack {v.name}=1 -o {v.name}.png"
    return Group(Text(title, style="bold"), _facts(v), Text(hint, style="dim"))


def moves(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """How a stack's members differ, a line each."""
    old, new = ([_times(member) for member in members] for members in (before, after))
    if len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return [f"{was} -> {now}" for was, now in pairs if was != now]
    gone = [f"- {member}" for member in old if member not in new]
    return gone + [f"+ {member}" for member in new if member not in old]


def _times(member: Mapping[str, Any]) -> str:
    return f"{member['ref']} × {weight(member['weight'], member.get('parts', {}))}"


def weight(value: float, parts: Mapping[str, float]) -> str:
    """As it is written on the command line."""
    return "/".join((f"{value:g}", *(f"{part}={factor:g}" for part, factor in sorted(parts.items()))))


def headed(*headings: str) -> Table:
    """A table without lines."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        grid.add_column(heading)
    return grid


def methods(found: Sequence[compose_pb2.MethodInfo]) -> RenderableType:
    """The methods with their parameters."""
    grid = headed("method", "what it does", "--set", "notes")
    for info in found:
        notes = ["order is priority"] * info.ordered + ["needs `atelier calibrate`"] * info.calibrated
        grid.add_row(info.name, info.summary, " ".join(info.parameters), ", ".join(notes))
    return grid


def merged(answer: compose_pb2.MergeResponse) -> RenderableType:
    """A merge: what was kept of each, what was lost, and what to do next."""
    v = answer.version
    title = f"{v.name}:{v.number}" + ("" if answer.created else " holds exactly this merge already")
    grid = headed("adapter", "weight", "kept")
    for member in answer.members:
        kept = f"{member.kept:.1%}" if member.HasField("kept") else "–"
        grid.add_row(member.ref, weight(member.weight, member.parts), kept)
    without = [
        Text(
            f"not in it, for no layer of the base takes it: of {m.ref} {', '.join(m.left_out[:3])}"
            + ", …" * (len(m.left_out) > 3)
        )
        for m in answer.members
        if m.left_out
    ]
    lost = f"truncation error {answer.truncation_error:.2%}" if answer.truncation_error else "exact"
    return Group(
        Text(title, style="bold"),
        grid,
        Text(f"{lost}, rank {v.rank}, {size(v.size_bytes)}, {answer.merge_seconds:.2f} s"),
        *without,
        Text(f"next: atelier render … --stack {v.name}=1 -o {v.name}.png", style="dim"),
    )
