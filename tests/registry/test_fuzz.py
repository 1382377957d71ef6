"""Tens of thousands of hostile names, headers, cards and searches: each is taken, or refused by a
RegistryError, soon. The generators are seeded, so a failure comes again.
"""

import json
import math
import random
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from registry import finding, keeping
from registry.about import about
from registry.cards import front_matter
from registry.catalog import Catalog
from registry.errors import InvalidFile, RegistryError
from registry.finding import Query
from registry.headers import ITEM_BYTES, Header, read_header
from registry.triggers import find

SECONDS = 5.0
"""Of the processor, for one call: ten times what the slowest takes, a thousandth of an explosion."""


@contextmanager
def soon() -> Iterator[None]:
    start = time.thread_time()
    try:
        yield
    finally:
        assert time.thread_time() - start < SECONDS


def characters(rng: random.Random, limit: int) -> str:
    """Random text, of one script or of all: control characters, marks, lone halves of pairs."""
    top = rng.choice([0x20, 0x7F, 0x100, 0x500, 0x3000, 0x10000, 0x110000])
    return "".join(chr(rng.randrange(top)) for _ in range(rng.randrange(limit)))


def pieces(rng: random.Random, atoms: list[str], limit: int) -> str:
    return "".join(rng.choice(atoms) for _ in range(rng.randrange(1, limit)))


# --- names ---------------------------------------------------------------------------------------------

NAME_ATOMS = [
    "..", ".", "/", "\\", "//", "../../", "..\\..\\", "%2e%2e%2f", "\0", "\n", "\r", "\t", " ", "~", "$HOME",
    "C:", "\\\\server\\share", "file://", "/etc/passwd", "/tmp/", "con", "nul", "aux.txt", "COM1", "lpt1",
    "prn", "hero", "Hero", "hеro", "ｈｅｒｏ", "ﬁ", "ı", "ß", "\u212a", "é", "e\u0301", "．．", "／", "∕",
    "：", "＠",
    "①", "٣", "²", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\x1b[2J", "\x7f", "\x85", "\u2028",
    "\ud800", "🦊", "'", '"', "`", ";", "--", "*", "?", "%", "_", "-", "|", "<", ">", "&", "{}", "[0]",
    "$(id)", "' or 1=1 --", ":", "@", "sha256:", "sha256", "0" * 64, "ab" * 32, "0", "1", ":1", ":2", ":-1",
    ":0", ":01", ":1e3", "@stable", "9" * 10, "9" * 30, "blobs", "tmp", "catalog.db", "catalog.db-wal",
    "lock", "x" * 127, "x" * 128, "x" * 4000,
]  # fmt: skip
INSIDE = re.compile(
    r"blobs(/sha256(/[0-9a-f]{2}(/[0-9a-f]{62})?)?)?|tmp|lock|catalog\.db(-wal|-shm)?", re.ASCII
)


def hostile(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return characters(rng, 200)
    return pieces(rng, NAME_ATOMS, 5)


def tree(root: Path, apart: Path) -> dict[Path, int]:
    """Every path below, with when it was changed, but for one directory."""
    return {path: path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_relative_to(apart)}


def test_names_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, data = random.Random(1), tmp_path / "some" / "where" / "data"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    catalog = Catalog(data)

    def add(name: str, alias: str) -> None:
        with catalog.blobs.upload() as upload:
            upload.write(rng.randbytes(16))
            catalog.add(upload, name=name, kind="lora", facts={}, alias=alias)

    calls: list[Callable[[str], object]] = [
        lambda text: add(text, ""),
        lambda text: add("hero", text),
        lambda text: catalog.set_alias(text, hostile(rng), 1),
        lambda text: catalog.set_alias("hero", text, rng.choice([1, 2, 0, -1, 10**30])),
        lambda text: catalog.resolve(text),
        lambda text: catalog.resolve(f"hero@{text}"),
        lambda text: catalog.delete(text),
        lambda text: catalog.undelete(text),
        lambda text: catalog.history(text),
    ]
    add("hero", "stable")
    before, taken, refused = tree(tmp_path, data), 0, 0
    for text in dict.fromkeys(hostile(rng) for _ in range(14_000)):  # 10,000 that differ
        for call in calls:
            try:
                with soon():
                    call(text)
                taken += 1
            except RegistryError:
                refused += 1
    assert tree(tmp_path, data) == before
    assert [path for path in data.rglob("*") if not INSIDE.fullmatch(f"{path.relative_to(data)}")] == []
    names = {event.name for event in catalog.events(limit=1_000_000)}
    aliases = {alias for version in catalog.history("hero") for alias in version.aliases}
    catalog.close()
    assert all(re.fullmatch(r"[a-z0-9]+([._-]+[a-z0-9]+)*", name, re.ASCII) for name in names)
    assert all(re.fullmatch(r"\w[\w.-]*", alias, re.ASCII) for alias in aliases)
    assert max(map(len, names | aliases)) == 128
    assert len(names) > 20
    assert len(aliases) > 20
    assert (taken > 500, refused > 50_000) == (True, True)
    assert keeping.verify(data).sound


# --- headers -------------------------------------------------------------------------------------------

JSON_ATOMS = [
    "0", "-0", "1", "-1", "2", "0.5", "2.0", "1e1", "1e400", "-1e400", "9" * 19, "9" * 30, "9" * 5000,
    "1" + "e" * 3, str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64), "NaN", "Infinity", "null",
    "true", "false", "", "[]", "{}", "[1]", "[0,8]", "[8,0]", "[[0,8]]", '{"a":1}', '{"a":1,"a":2}', '"x"',
    '""', '"F32"', '"I8"', '"f32"', '"\\u0000"', '"\\ud800"', '"\x07"', '"\\u202e"', '"..\\/x"',
    "[" * 40 + "]" * 40, "[" * 3000, '{"a":' * 3000, '"' + "x" * 300 + '"', "__metadata__", "\ufeff", "/**/",
    "'a'", ",", ":", "\\",
]  # fmt: skip
NAMES = ['"a"', '"b"', '"c.d"', '"lora_unet_x.alpha"', '"é"']


Members = list[tuple[str, str]]
"""Of a JSON object, as text: a name may come twice, and a value be anything."""


def tensor(rng: random.Random, start: int) -> tuple[Members, int]:
    """The members of a good entry, and where it stops."""
    dtype, shape = rng.choice(list(ITEM_BYTES)), [rng.randrange(4) for _ in range(rng.randrange(4))]
    stop = start + math.prod(shape) * ITEM_BYTES[dtype]
    return [
        ('"dtype"', f'"{dtype}"'),
        ('"shape"', json.dumps(shape)),
        ('"data_offsets"', f"[{start},{stop}]"),
    ], stop


def joined(members: Members) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in members) + "}"


def header_file(rng: random.Random) -> bytes:
    """A small good file, with up to three things wrong in it."""
    wrong, stop = rng.choice([0, 1, 1, 1, 2, 3]), 0
    entries: list[tuple[str, Members]] = []
    for name in rng.sample(NAMES, rng.randrange(1, 5)):
        members, stop = tensor(rng, stop)
        entries.append((name, members))
    if rng.random() < 0.3:
        entries.append(('"__metadata__"', [('"format"', '"pt"')]))
    body = stop
    for _ in range(wrong):
        name, members = rng.choice(entries)
        at, atom = rng.randrange(len(members) + 1), rng.choice(JSON_ATOMS)
        key, value = members[at - 1] if members else ('"dtype"', "1")
        match rng.randrange(8):
            case 0 if members:  # a value
                members[at - 1] = (key, atom)
            case 1 if members:  # a number in one
                members[at - 1] = (key, re.sub(r"\d+", atom.replace("\\", r"\\"), value, count=1))
            case 2:  # a member too many, perhaps one that is there already
                members.insert(at, (rng.choice([key, '"x"', '""', "x"]), atom))
            case 3 if members:  # one too few
                del members[at - 1]
            case 4:  # a tensor twice, or by a strange name
                entries.append((rng.choice([name, *JSON_ATOMS]), members))
            case 5:
                entries.insert(0, ('"__metadata__"', [(rng.choice(JSON_ATOMS), atom)]))
            case _:
                body = max(0, body + rng.choice([-9, -1, 1, 8, 640]))
    text = bytearray(joined([(name, joined(members)) for name, members in entries]).encode())
    if wrong and rng.random() < 0.4:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            put = rng.randbytes(rng.randrange(3)) or rng.choice([b"{", b"}", b"[", b'"', b",", b"\\"])
            text[at : at + rng.randrange(3)] = put
    length = len(text)
    if wrong and rng.random() < 0.2:
        near = [0, 1, 640, length - 1, length + 1, length + body]
        length = rng.choice([*near, 2**31, 2**63, rng.getrandbits(64), 0x04034B50])  # the last: a zip
    return struct.pack("<Q", length) + text + bytes(body)


def large_headers() -> Iterator[bytes]:
    """What is not small: nested, numerous, long; all but the last within the limit of 8 MiB."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield b'{"a":' * 200_000
    yield b'{"a":' + b"[" * 1_000_000
    yield b"{" + b'"a":{' * 900 + b"}" * 901
    yield b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
    yield b'{"a":' + b"1" * 8_000_000 + b"}"
    yield b'{"a":[' + b"9" * 4000 + (b"," + b"9" * 4000) * 2000 + b"]}"
    yield b'{"__metadata__":{"a":"' + b"\\u0041" * 1_000_000 + b'"},"a":' + entry.encode() + b"}"
    yield ("{" + ",".join(f'"{n}":{entry}' for n in range(20_000)) + "}").encode()
    yield ("{" + ",".join(f'"{n}":{entry}' for n in range(20_001)) + "}").encode()
    yield ("{" + ",".join(['"a":1'] * 500_000) + "}").encode()
    yield b"{" + b" " * 8_000_000 + b"}"
    yield b"{" * 8_000_000
    yield b'{"a":1}' + b" " * (8 << 20)


def whole(header: Header, size: int) -> bool:
    """Whether the tensors describe every byte of the file, once."""
    infos = sorted(header.tensors.values(), key=lambda info: (info.start, info.stop))
    ends = [0, *(info.stop for info in infos)]
    return (
        [info.start for info in infos] == ends[:-1]
        and header.data_offset + ends[-1] == size
        and all(i.stop - i.start == math.prod(i.shape) * ITEM_BYTES[i.dtype] for i in infos)
        and all(name.isprintable() for name in header.tensors)
        and all(isinstance(value, str) for value in header.metadata.values())
    )


def test_header_fuzz(tmp_path: Path) -> None:
    rng, path, taken, refused = random.Random(2), tmp_path / "x", 0, 0

    def read(data: bytes) -> bool:
        path.unlink(missing_ok=True)  # ext4 waits for the disk when a file is written over
        path.write_bytes(data)
        try:
            with soon():
                header = read_header(path)
        except InvalidFile:
            return False
        assert whole(header, len(data))
        return True

    for _ in range(20_000):
        good = read(header_file(rng))
        taken, refused = taken + good, refused + (not good)
    assert (taken > 2_000, refused > 10_000) == (True, True)
    large = [read(struct.pack("<Q", len(text)) + text) for text in large_headers()]
    assert [n for n, good in enumerate(large) if good] == [6, 7]


# --- cards ---------------------------------------------------------------------------------------------

KEYS = [
    "title", "author", "license", "license_name", "tags", "negative_prompt", "recommended_weight",
    "instance_prompt", "trigger_words", "base_model",
]  # fmt: skip
ODD_KEYS = ["<<", "=", "é", '"a"', "'a'", "[a]", "? a\n", "!!str a", "&k a", "*a", "", "x" * 2000]
VALUES = [
    "a", "no", "Aria", "apache-2.0", "0.8 (0.6 to 1.0)", "[a, b]", "[Fox, not-for-all-audiences]",
    "{a: [b], c: d}", "'it''s'", '"\\u00e9"', '"\\ud800"', "1.10", "日本", "", "|\n  a\n  b", "\n- a\n- b",
    "\n  a: b\n  c: [d]",
]  # fmt: skip
YAML_ATOMS = [
    "a", "no", "~", "1.10", "1e999", "0x1F", "2026-01-01", "0.8 (0.6 to 1.0)", "-1", "é", "🦊", "日本", "ａ",
    "&a ", "*a", "&a [*a, *a]", "<<: *a", "!!python/object/apply:os.system [id]", "!!binary aGk=",
    "!!set {a}", "!a ", "!<tag:yaml.org,2002:int> 3", "!<%FF>", "!%zz ", "|", ">", "|-9\n", "|+0\n", "- ",
    "? ", ": ", ":", ",", "#", " #", "[", "]", "{", "}", "[a, b]", "{a: b}", "{a: 1, a: 2}",
    "[" * 11 + "]" * 11, "[" * 13 + "]" * 13, "[" * 500, "{" * 500, "{a: " * 500, "- " * 500, "? " * 500,
    "'", '"', "''", '"\\', '"\\x4', '"\\x00"', '"\\ud800"', '"\\U0001F98A"', '"\\U00110000"',
    '"\\UFFFFFFFF"', '"\\/"', "%YAML 1.1\n", "%YAML 9.9\n", "%YAML 1." + "1" * 5000, "%TAG ! x\n", "---",
    "---\n", "...\n", "\n", "\n  ", "\n    ", "\r", "\r\n", "\t", " ", "\0", "\x07", "\x1b", "\x7f", "\x85",
    "\u2028", "\u202e", "\ufeff", "\ufffe", "@", "`", "<b>", "{{x}}", "\\", "9" * 400,
]  # fmt: skip
BODY_ATOMS = [
    "Recommended weight: ", "recommended strength ", "**", "0.8", "1", "-", "to", " and ", "(0.6 to 1.0)",
    "1e9", "٣", "9" * 400, "\n", "…", " ", "\0", "é", "---\n", "---", "fox", "\u2028",
]  # fmt: skip
FREQUENCIES = [
    "", "{", "{}", "[]", '{"a": 1}', '{"a": {"b": 2}}', '{"a": {"b": "x"}}', '{"a": {"b": NaN}}',
    '{"a": {"b": 1e999}}', '{"a": {"b": ' + "9" * 5000 + "}}", '{"a": {"\\ud800": 2}}', "[" * 5000,
    '{"a": {"b": [1]}}', '{"a": {"b": true, "c": null}}', '{"a": {"b": "' + "1" * 5000 + '"}}',
]  # fmt: skip


def card(rng: random.Random) -> bytes:
    """A card whose front matter is YAML, or nearly."""
    lines = []
    for _ in range(rng.randrange(5)):
        key = rng.choice(KEYS if rng.random() < 0.9 else ODD_KEYS)
        colon = ": " if rng.random() < 0.9 else rng.choice(["", ":", " : "])
        value = rng.choice(VALUES) if rng.random() < 0.8 else pieces(rng, YAML_ATOMS, 5)
        lines.append(key + colon + (value if rng.random() < 0.95 else characters(rng, 20)))
    block = rng.choice(["\n"] * 8 + ["\n  ", "\r\n", " "]).join(lines)
    text = f"---\n{block}\n---\n" + pieces(rng, BODY_ATOMS, 8)
    data = bytearray(text.encode(errors="surrogatepass"))
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
    return bytes(data)


def large_cards() -> Iterator[bytes]:
    """Each just within the limits, of what costs most."""
    for line in (
        "a: " + "x " * 15_000, "a: [" + "a," * 15_000 + "]", "a: [" + "{}," * 10_000 + "]", "[" * 32_000,
        "{" * 32_000, "- " * 16_000, "? " * 16_000, "!" * 32_000, "a: '" + "''" * 15_000,
        "a: '" + "\n" * 30_000, "a: |\n" + " \n" * 15_000, "a:" + " " * 30_000 + "b", "a: " + ":" * 30_000,
        "#\n" * 15_000, "\n" * 32_000, "a: \"" + "\\x41" * 7_000 + '"',
        "\n".join(f"k{n}: &a{n} x" for n in range(2_000)), "\n".join(" " * n + "a:" for n in range(240)),
        "a: !<" + "%41" * 10_000 + "> b", "%TAG " + "!" * 30_000, "a: |" + "1" * 30_000,
        "tags: [" + "a," * 15_000 + "]",
    ):  # fmt: skip
        yield f"---\n{line}\n---\n".encode()
    for text in (
        "1" * 30_000,
        "1." * 15_000,
        "1 " * 15_000,
        "1" + " " * 30_000,
        "- " * 15_000,
        "1 to " * 6_000,
    ):
        yield f"---\nrecommended_weight: 1 {text}\n---\nRecommended weight: 1 {text}".encode()
    yield b"Recommended weight: 1 " * 10_000
    yield b"recommended weight" + b"1" * 20_000
    yield b"-" * (256 << 10)
    yield b"---\n" + b"-- \n" * 60_000


def plain(value: object) -> bool:
    """Whether it is made of text, lists and objects only."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str)


def test_yaml_fuzz() -> None:
    rng, taken = random.Random(3), 0

    def read(data: bytes, metadata: dict[str, str], said: list[str]) -> bool:
        good = False
        with suppress(RegistryError), soon():
            front = front_matter(data)
            good = bool(front)
            assert plain(front)
        with suppress(RegistryError), soon():
            told = about(data, metadata)
            json.dumps(told, ensure_ascii=False).encode()  # what is kept can be sent
            finding.words("hero", {"about": told}, data).encode()
            assert all(word.isprintable() for _, word in finding.labels("lora", {"about": told}))
        with suppress(RegistryError), soon():
            for trigger in find(said=said, card=data, metadata=metadata):
                assert trigger.word.isprintable()
                trigger.word.encode()
        return good

    for _ in range(10_000):
        metadata = {
            "ss_tag_frequency": rng.choice(FREQUENCIES),
            "modelspec.trigger_phrase": characters(rng, 8),
            "modelspec.tags": characters(rng, 8),
            "modelspec.title": characters(rng, 8),
        }
        said = [characters(rng, 8)] if rng.random() < 0.2 else []
        taken += read(card(rng), metadata, said)
    assert taken > 1_000
    for data in large_cards():
        read(data, {}, [])


# --- searches ------------------------------------------------------------------------------------------

CARDS = {
    "fox": b"a clever fox near the river and not afraid",
    "bear": b"the bear or the fox, words:ann",
    "owl": "une chouette très sage, 梟, Straße, NOT NEAR AND OR".encode(),
}
SEARCH_ATOMS = [
    '"', '""', "'", "NEAR", "NEAR(", "NEAR/2", "AND", "OR", "NOT", " AND NOT ", "*", "^", "-", "+", ":",
    "words:", "(", ")", "{", "}", "[", "]", ",", ";", "--", "/*", "%", "\\", "?", "?1", "$a", "\0", "\n",
    "\t", "\r", " ", " ", " ", "\x85", "\u2028", "\ufeff", "\u202e", "\u0301", "\ud800", "🦊", "梟", "ß", "İ",
    "ﬁ", "²", "٣", "é", "fox", "FOX", "be", "bear", "river", "not", "and", "or", "near", "ann", "words",
    "rank", "rowid", "search", "a", "the", "x" * 500, "0", "1e9",
]  # fmt: skip


def expected(text: str) -> set[str]:
    """What a search for ASCII text finds: every word, the last of them as a beginning."""
    wanted = re.findall("[a-z0-9]+", text.lower())
    if not wanted:
        return set() if text.strip() else set(CARDS)
    found = set()
    for name, told in CARDS.items():
        have = [name, *re.findall(r"\w+", told.decode().lower())]
        if set(wanted[:-1]) <= set(have) and any(word.startswith(wanted[-1]) for word in have):
            found.add(name)
    return found


def test_search_never_errors_at_scale(tmp_path: Path) -> None:
    rng, nonempty, catalog = random.Random(4), 0, Catalog(tmp_path / "data")
    for name, told in CARDS.items():
        with catalog.blobs.upload() as upload:
            upload.write(name.encode())
            catalog.add(upload, name=name, kind="lora", facts={}, card=told)
    for _ in range(40_000):
        text = characters(rng, 40) if rng.random() < 0.1 else pieces(rng, SEARCH_ATOMS, 7)
        with soon():
            found = {version.name for version in catalog.newest(query=Query(text=text))}
        assert found == expected(text) if text.isascii() else found <= CARDS.keys()
        nonempty += bool(found and text.strip())
    assert nonempty > 1_000
    for atom in SEARCH_ATOMS:
        with soon():
            catalog.newest(query=Query(text=f"{atom} " * (8_000 // len(atom))))
    catalog.close()
