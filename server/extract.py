"""`atelier extract`: a full checkpoint against its base -> a LoRA file, on the machine that has both."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compose import bases
from compose.errors import ComposeError
from compose.extract import ENERGY, RANK, extract
from compose.formats.export import to_diffusers
from server.arguments import Parser, while_read

INVALID, NOT_FOUND = 4, 3


def main() -> int:
    """The exit status."""
    parser = Parser(prog="atelier extract")
    parser.add_argument("tuned", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--energy", type=float, default=ENERGY)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.output.absolute().parent.is_dir():
        print(f"atelier: there is no directory {arguments.output.parent}", file=sys.stderr)
        return NOT_FOUND
    try:
        base = bases.find(arguments.base)
        columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            found = extract(
                arguments.tuned,
                base.path,
                base.family,
                rank=arguments.rank,
                energy=arguments.energy,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        arguments.output.write_bytes(to_diffusers(found.layers, base.family))
    except ComposeError as error:
        print(f"atelier: {error}", file=sys.stderr)
        return INVALID
    except OSError as error:
        print(f"atelier: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return INVALID
    ranks = sorted(factors.rank for factors in found.layers.values())
    told = {
        "output": str(arguments.output),
        "layers": len(ranks),
        "rank": {"least": ranks[0], "median": ranks[len(ranks) // 2], "most": ranks[-1]},
        "relative_error": found.error,
        "left_behind": list(found.left_behind),
        "left_behind_share": found.left_share,
    }
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    print(
        f"{arguments.output}: {len(ranks)} layers, rank {ranks[0]} to {ranks[-1]}, "
        f"relative error {found.error:.2%}"
    )
    if found.left_behind:
        print(
            f"left behind, because no LoRA can hold it: {len(found.left_behind)} tensors "
            f"({found.left_behind[0]}, …), {found.left_share:.1%} of the change"
        )
    print(f"next: atelier checkin {arguments.output} --name NAME")
    return 0


if __name__ == "__main__":
    with while_read():
        sys.exit(main())
