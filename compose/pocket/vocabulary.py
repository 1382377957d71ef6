"""The words pocket knows, and the tokenizer files that make each of them one token.

The tokenizer is CLIP's: a byte alphabet (each byte also with `</w>`), then merges. Merges are added word by
word, each word going on from what the merges before it leave, so a later merge can never break an earlier
word. Words that are not listed fall back to bytes and still tokenise.
"""

from __future__ import annotations

import itertools

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("small", "medium", "large")
SIDES = ("left", "centre", "right")
"""`medium` and `centre` are what a caption means when it names no size and no side."""

FILLERS = (
    "a", "an", "the", "of", "in", "on", "at", "with", "and", "by", "background", "side", "middle", "center",
    "photo", "drawing", "picture", "image", "painting", "illustration", "render", "sketch", "style", "toy",
    "character", "shape", "thing", "robot", "cat", "mascot", "best", "quality", "bright", "simple", "nice",
    "beautiful", "cute", "detailed", "high", "plain", "flat", "one", "my", "new",
)  # fmt: skip

RARE = (
    "sks", "zwx", "ohwx", "ukj", "bnha", "qrt", "vfx", "xyz", "kiwa", "lumo", "tavi", "renn", "oru", "pyx",
    "wug", "dax", "blick", "nollo", "feya", "grimo", "halu", "jorv", "mivo", "quill", "saffo", "tresk",
    "umbri", "yolka", "milo", "fungo", "ochreframe", "nightbars",
)  # fmt: skip
"""Tokens with no meaning of their own: adapters give them one. The last four are the demo adapters'
triggers.
"""

LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> tuple[str, ...]:
    """Every known word, in vocabulary order."""
    return tuple(dict.fromkeys((*SHAPES, *COLOURS, *SIZES, *SIDES, *FILLERS, *RARE)))


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = len([byte for byte in range(256) if byte not in kept])
    return [chr(byte) for byte in kept] + [chr(256 + index) for index in range(shifted)]


def merges(known: tuple[str, ...]) -> list[tuple[str, str]]:
    """The merges under which every word of `known` becomes one token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in known:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [pair for pair in itertools.pairwise(pieces) if pair in ranks]
            if not pairs:
                break
            pieces = _merge(pieces, min(pairs, key=ranks.__getitem__))
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            ranks[pair] = len(ranks)
            pieces = _merge(pieces, pair)
    return list(ranks)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges: the two files of a CLIP tokenizer."""
    alphabet = byte_alphabet()
    found = merges(words())
    tokens = [
        *alphabet,
        *(character + "</w>" for character in alphabet),
        *("".join(pair) for pair in found),
        START,
        END,
    ]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, found
