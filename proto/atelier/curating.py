"""Commands that look after what is checked in: cards, previews, likes, bundles."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from atelier import bundles, views
from atelier.client import Client
from atelier.console import (
    INVALID,
    USAGE,
    AsJson,
    Out,
    check_place,
    command,
    fail,
    out,
    picture,
    print_json,
    progress,
)


@command
def card(
    ref: str,
    set_: Annotated[
        Path | None, typer.Option("--set", help="A file that becomes its card; - reads stdin.")
    ] = None,
    edit: Annotated[bool, typer.Option("--edit", help="Open its card in $EDITOR.")] = False,
    expect: Annotated[
        str | None, typer.Option(help="Change it only if this is its card's digest now (empty: no card).")
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="List every card it had.")] = False,
    revision: Annotated[int, typer.Option(help="Print the card it had then.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print a version's card, or give it another: its bytes and number stay, every card is kept."""
    if bool(set_) + edit + history + bool(revision) > 1:
        raise fail("choose one of --set, --edit, --history and --revision", USAGE)
    with Client() as client:
        if set_ or edit:
            seen = client.get(ref)
            if set_:
                fresh = sys.stdin.buffer.read() if str(set_) == "-" else set_.read_bytes()
            else:
                expect = seen.version.card_digest if expect is None else expect
                fresh = _edited(seen.card)
            answer = client.set_card(ref, fresh, expected_card_digest=expect)
            if as_json:
                print_json(answer)
            else:
                v = answer.version
                same = " is its card already" if seen.version.card_digest == v.card_digest else ""
                print(f"{v.name}:{v.number} has card {answer.revision}{same}")
        elif history or revision:
            revisions = client.cards(ref)
            chosen = [r for r in revisions if revision in {0, r.revision}]
            if not chosen:
                raise fail(f"{ref} has no card {revision}; it has 1 to {len(revisions)}", INVALID)
            if as_json:
                print_json(*chosen, many=True)
            elif revision:
                sys.stdout.write(chosen[0].card.decode(errors="replace"))
            else:
                out.print(views.cards(chosen))
        else:
            answer_card = client.get(ref).card
            sys.stdout.write(answer_card.decode(errors="replace"))


def _edited(card: bytes) -> bytes:
    """What the user's editor made of a card. Raises Exit when the editor fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.md"
        path.write_bytes(card)
        if status := subprocess.call([*shlex.split(editor), str(path)]):
            raise fail(f"{editor} ended with status {status}; the card stays as it is", INVALID)
        return path.read_bytes()


@command
def preview(
    ref: str,
    add: Annotated[
        list[Path] | None, typer.Option("--add", help="A PNG, JPEG or WebP to show with it; may be repeated.")
    ] = None,
    caption: Annotated[str, typer.Option(help="What the added picture shows.")] = "",
    remove: Annotated[str, typer.Option("--remove", help="The digest of one to show no more.")] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the first one to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List, add, take away or fetch the pictures shown with a version; all metadata is stripped."""
    with Client() as client:
        for path in add or ():
            client.add_preview(ref, picture(path), caption=caption)
        if remove:
            client.remove_preview(ref, remove)
        if output:
            output.write_bytes(client.preview(ref))
        answer = client.get(ref)
    if as_json:
        print_json(*answer.previews, many=True)
    else:
        for line in views.previews(answer.previews) or [f"{ref} has no previews; --add FILE adds one"]:
            print(line)


@command
def similar(
    ref: str,
    at_least: Annotated[float | None, typer.Option(help="The smallest cosine that counts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find versions whose weights point the same way: earlier checkpoints, copies, resized ones."""
    with Client() as client:
        found = client.similar(ref, at_least=at_least)
    if as_json:
        print_json(*found, many=True)
    elif found:
        out.print(views.alike(found))
    else:
        print(f"nothing in the catalog is like {ref}")


@command
def export(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="A bare name means all its versions.")],
    output: Out,
) -> None:
    """Write versions, with cards, pictures and aliases, into one file for another catalog."""
    check_place(output)
    part = output.with_name(f".{output.name}.part")
    try:
        with Client() as client, part.open("wb") as file, progress(output.name, unit="bytes") as told:
            written = bundles.export(client, refs, file, told)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    print(f"{output}: {', '.join(written)}; `atelier import {output}` checks them in elsewhere")


@command
def import_(bundle: Annotated[Path, typer.Argument(help="What `atelier export` wrote.")]) -> None:
    """Check everything in a bundle in; what is here already stays as it is."""
    with Client() as client, progress(bundle.name, unit="versions") as told:
        try:
            for there, here, created in bundles.bring_in(client, bundle, told):
                print(f"{there} is {here}" + ("" if created else ", which was here already"))
        except bundles.BundleError as error:
            raise fail(str(error), INVALID) from None
