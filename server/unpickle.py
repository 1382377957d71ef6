"""`atelier convert`: a torch pickle (.pt, .bin, .ckpt) -> safetensors, in a limited process.

Unpickling can run code, so it is done in a child process of limited memory, time and disk, and by
torch's weights-only reader, which builds tensors and plain containers and nothing else. On Linux the child
has no network either, where the kernel lets anybody, or this user, take it away from a process; elsewhere it
has, and the command says so. Read are

    {"string_to_param": {"*": [n, width]}, "name"}    A1111's embeddings    -> emb_params
    {"<word>": [width] or [n, width], …}              diffusers' learned_embeds.bin
    {"clip_l": [n, 768], "clip_g": [n, 1280]}         SDXL's embeddings
    {"<layer>.lora_…": [..]}, or under "state_dict"   LoRAs of any layout that `atelier checkin` knows
    [up, down, up, down, …]                           lora_diffusion's .pt -> unet:0:up, unet:0:down, …

Anything else is refused. Two files, pickles or not, are one word for SDXL as diffusers' script leaves it:
learned_embeds [n, 768] and learned_embeds_2 [n, 1280] -> bundle_emb.<word>.clip_l and .clip_g.
"""

import argparse
import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.arguments import Parser, while_read

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_NEW_NETWORK, _NEW_USERS = 0x40000000, 0x10000000  # of linux/sched.h; os.unshare comes with Python 3.12
SECONDS, MEMORY, DISK = 120, 12 << 30, 4 << 30
INVALID, NOT_FOUND = 4, 3
WORDS, NARROW = 64, 64
"""Words of a file, and numbers in a vector: no text encoder has fewer."""


class Refused(Exception):
    """What cannot be converted, and why."""


def main() -> int:
    """The parent: starts the limited child, and turns how it ends into one line and an exit status."""
    parser = Parser(prog="atelier convert")
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--outside", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments.file, arguments.second, arguments.output, arguments.outside)
    try:
        return _convert(arguments.file, arguments.second, arguments.output)
    except OSError as error:
        return _refuse(f"{error.filename2 or error.filename or arguments.output}: {error.strerror}", INVALID)


def _convert(file: Path, second: Path | None, output: Path) -> int:
    for one in (file, second):
        if one and not one.is_file():
            return _refuse(f"there is no {one}", NOT_FOUND)
    if not output.absolute().parent.is_dir():
        return _refuse(f"there is no directory {output.parent}", NOT_FOUND)
    if output.exists() and not output.is_file():  # a directory, a device
        return _refuse(f"{output} is no file; choose another --output", INVALID)
    if not second and is_safetensors(file):
        return _refuse(f"{file} is safetensors already; check it in as it is", INVALID)
    fresh = output.with_name(f".atelier-{os.getpid()}")
    command = [sys.executable, "-m", "server.unpickle", "--child", f"--outside={network()}"]
    command += [*([f"--second={second}"] if second else []), "--", str(file), str(fresh)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, preexec_fn=_limit, check=False
        )
        if done.returncode == 0:
            os.replace(fresh, output)
            print(f"{output}: {done.stdout.strip()}")
            return 0
        told = done.stderr.strip().splitlines()
        known = done.returncode == INVALID and told
        return _refuse(
            told[-1] if known else "it takes more memory, time or disk than an adapter needs", INVALID
        )
    except subprocess.TimeoutExpired:
        return _refuse(f"it takes longer than {SECONDS} seconds, which no adapter does", INVALID)
    finally:
        fresh.unlink(missing_ok=True)


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as they do."""
    with file.open("rb") as opened:
        start = opened.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size - 8


def network() -> str:
    """Which network this process has; "" where that cannot be told."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def _limit() -> None:
    if (unshare := getattr(_LIBC, "unshare", None)) and unshare(_NEW_NETWORK) != 0:
        unshare(_NEW_NETWORK | _NEW_USERS)  # the first is root's; this is whose kernel allows it
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, DISK),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _refuse(why: str, code: int) -> int:
    print(f"atelier: {why}", file=sys.stderr)
    return code


def _child(file: Path, second: Path | None, output: Path, outside: str) -> int:
    import torch
    from safetensors.torch import save_file

    reading = file

    torch.set_num_threads(1)
    try:
        tensors = _read(file)
        if second:
            reading = second
            tensors = joined(tensors, _read(second))
        save_file(tensors, output, metadata={"format": "pt"})
    except Refused as error:
        print(error, file=sys.stderr)
        return INVALID
    except MemoryError:
        print("it needs more memory than an adapter does", file=sys.stderr)
        return INVALID
    except Exception as error:  # whatever a hostile file makes the reader raise
        # torch begins with how to read it unsafely, and ends with where its documentation is
        told = [text.strip() for text in str(error).split("\n\n") if not text.startswith("Check the doc")]
        first = (told[-1] if told and told[-1] else type(error).__name__).splitlines()[0].split(". ")[0][:200]
        print(f"{reading.name} is not a pickle of tensors that can be read safely: {first}", file=sys.stderr)
        return INVALID
    cut = outside and network() not in {"", outside}
    note = "" if cut else " (read in a process with network: this system takes it from none)"
    print(f"{len(tensors)} tensors, {output.stat().st_size} bytes{note}")
    return 0


def _read(file: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    if is_safetensors(file):
        return dict(load_file(file))
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    return named(found, file.name, file.stat().st_size)


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The words of SDXL whose vectors are in two files, whichever comes first. Raises Refused."""
    halves = sorted((first, second), key=lambda half: max(tensor.shape[-1:] for tensor in half.values()))
    found = {}
    for width, kind, half in zip((768, 1280), ("clip_l", "clip_g"), halves, strict=True):
        for word, tensor in half.items():
            if tensor.dim() not in {1, 2} or tensor.shape[-1] != width:
                raise Refused(
                    f"{word[:80]!r} is {list(tensor.shape)}: the two files of a word for SDXL "
                    "hold vectors of 768 and of 1280 numbers"
                )
            found[f"bundle_emb.{word}.{kind}"] = tensor
    if first.keys() != second.keys():
        raise Refused(f"the files hold different words: {', '.join([*first, *second])[:200]}")
    return found


def named(found: Any, file_name: str, size: int) -> dict[str, Any]:
    """The tensors of an unpickled file of `size` bytes, under the names their safetensors layout has. Raises
    Refused.
    """
    import torch

    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if isinstance(found, Mapping) and "string_to_param" in found:
        words = dict(found["string_to_param"])
        if len(words) != 1:
            raise Refused(f"{file_name} holds {len(words)} words, an embedding holds one")
        found = {"emb_params": next(iter(words.values()))}
    elif isinstance(found, list) and found and len(found) % 2 == 0:
        part = "text_encoder" if "text_encoder" in file_name else "unet"
        found = {f"{part}:{i // 2}:{('up', 'down')[i % 2]}": tensor for i, tensor in enumerate(found)}
    if not isinstance(found, Mapping) or not found:
        raise Refused(f"{file_name} holds {type(found).__name__}, not the tensors of an embedding or a LoRA")
    tensors, numbers = {}, 0
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"{file_name}: {str(name)[:80]!r} is {type(tensor).__name__}, not a tensor")
        numbers += tensor.numel() * tensor.element_size()
        if numbers > size:  # a view that repeats its numbers, or a compressed file: torch writes neither
            raise Refused(f"{file_name}: {name[:80]!r} claims more numbers than the file holds")
        tensors[name] = tensor.detach().clone().contiguous()
    lora = any(part in name for name in tensors for part in ("lora", ":up", "lokr_", "hada_"))
    widths = {tensor.shape[-1] if tensor.dim() in {1, 2} else 0 for tensor in tensors.values()}
    several = len(widths) == 1 and min(widths) >= NARROW and len(tensors) <= WORDS
    embedding = len(tensors) == 1 or several or tensors.keys() <= {"clip_l", "clip_g", "t5"}
    if not lora and not (embedding and 0 not in widths):
        raise Refused(f"{file_name} holds {len(tensors)} tensors, neither an embedding nor a LoRA")
    return tensors


if __name__ == "__main__":
    with while_read():
        sys.exit(main())
