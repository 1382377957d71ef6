"""Pictures shown with a version: harmless whatever was sent, few, and gone with their version."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from PIL import Image, PngImagePlugin

from atelier.client import AtelierError, Client
from compose.warm import WarmPipeline
from registry import keeping
from registry.previews import PREVIEWS_LIMIT
from tests.conftest import serving


def picture(size: tuple[int, int] = (8, 8), *, colour: int = 200, kind: str = "PNG", **more: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (colour, 40, 40)).save(out, kind, **more)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AtelierError, match=message) as caught:
        call()
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_kept_as_a_png(client: Client, lora: Path, kind: str) -> None:
    name = f"shown-{kind.lower()}"
    client.check_in(lora, name=name)
    kept = client.add_preview(name, picture((300, 100), kind=kind), caption="on a beach\x1b[2J")
    assert (kept.width, kept.height, kept.caption) == (300, 100, "on a beach[2J")
    with Image.open(io.BytesIO(client.preview(name))) as opened:
        assert (opened.format, opened.size) == ("PNG", (300, 100))
        assert abs(opened.getpixel((5, 5))[0] - 200) < 8
    assert [p.digest for p in client.get(name).previews] == [kept.digest]


def test_a_large_picture_is_made_smaller(client: Client, lora: Path) -> None:
    client.check_in(lora, name="large-picture")
    kept = client.add_preview("large-picture", picture((4000, 1000)))
    assert (kept.width, kept.height) == (1024, 256)


# Threat 20: bombs, SVG, EXIF with GPS, another program's prompt.
def test_image_bomb(client: Client, lora: Path) -> None:
    client.check_in(lora, name="bombed")
    size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000))
    refused(
        lambda: client.add_preview("bombed", bomb + chunk(b"IEND", b"")), "pixels are more than the limit"
    )
    size = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000))
    refused(lambda: client.add_preview("bombed", bomb), "9000x9000 pixels, the limit is 50000000")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 200_000_000))
    small = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", small) + text + chunk(b"IDAT", zlib.compress(b"\0" * 4))
    refused(lambda: client.add_preview("bombed", png + chunk(b"IEND", b"")), "the image is damaged")
    refused(lambda: client.add_preview("bombed", b"x" * (21 << 20)), "the limit is 20971520")
    refused(lambda: client.add_preview("bombed", picture((64, 64))[:90]), "the image is damaged")


def test_pictures_that_cost_more_than_they_show_are_refused(client: Client, lora: Path) -> None:
    client.check_in(lora, name="costly")
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    last = whole.rindex(b"\xff\xda")
    scans = whole[:-2] + whole[last:-2] * 60 + whole[-2:]
    refused(lambda: client.add_preview("costly", scans), "more than 40 scans")
    refused(lambda: client.add_preview("costly", picture((1, 40_000))), "30000 a side")
    client.add_preview("costly", whole)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x0c\0\x01\0\0\0\xff\xff\xff\xff", b"Exif\0\0MM"]
)
def test_odd_exif_is_read_past_or_refused(client: Client, lora: Path, exif: bytes) -> None:
    client.check_in(lora, name="odd-exif")
    with suppress(AtelierError):
        assert client.add_preview("odd-exif", picture((40, 20), kind="JPEG", exif=exif)).width in {20, 40}
        return
    refused(lambda: client.add_preview("odd-exif", picture(kind="JPEG", exif=exif)), "the image is damaged")


def test_sixteen_bits_keep_their_brightness(client: Client, lora: Path) -> None:
    client.check_in(lora, name="deep")
    out = io.BytesIO()
    Image.new("I;16", (4, 4), 30_000).save(out, "PNG")
    client.add_preview("deep", out.getvalue())
    with Image.open(io.BytesIO(client.preview("deep"))) as opened:
        assert abs(opened.getpixel((1, 1))[0] - 117) <= 1


def test_what_is_transparent_is_shown_white(client: Client, lora: Path) -> None:
    client.check_in(lora, name="clear")
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (9, 90, 200, 0)).save(out, "PNG")
    client.add_preview("clear", out.getvalue())
    with Image.open(io.BytesIO(client.preview("clear"))) as opened:
        assert (opened.mode, opened.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_svg_refused(client: Client, lora: Path) -> None:
    client.check_in(lora, name="svg")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    refused(lambda: client.add_preview("svg", svg), "no PNG, JPEG or WebP")
    refused(lambda: client.add_preview("svg", picture(kind="GIF")), "no PNG, JPEG or WebP")
    refused(lambda: client.add_preview("svg", b""), "no PNG, JPEG or WebP")
    assert list(client.get("svg").previews) == []


def test_exif_gone(client: Client, lora: Path) -> None:
    client.check_in(lora, name="exif")
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "at home, 48.2N 16.4E", 6  # a description; turned by 90 degrees
    kept = client.add_preview("exif", picture((40, 20), kind="JPEG", exif=exif, comment=b"secret"))
    assert (kept.width, kept.height) == (20, 40)
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "a secret prompt")
    client.add_preview("exif", picture(colour=10, pnginfo=told))
    for preview in client.get("exif").previews:
        data = client.preview("exif", preview.digest)
        with Image.open(io.BytesIO(data)) as opened:
            assert (opened.info, len(opened.getexif())) == ({}, 0)
        assert b"secret" not in data
        assert b"48.2N" not in data


def test_the_same_picture_is_shown_once_and_there_is_an_end(client: Client, lora: Path) -> None:
    client.check_in(lora, name="many")
    for _ in range(2):
        client.add_preview("many", picture(colour=1), caption="twice")
    for colour in range(2, PREVIEWS_LIMIT + 1):
        client.add_preview("many", picture(colour=colour))
    with pytest.raises(AtelierError, match=f"has {PREVIEWS_LIMIT} previews already") as caught:
        client.add_preview("many", picture(colour=99))
    assert caught.value.code is grpc.StatusCode.ABORTED
    first = client.get("many").previews[0]
    assert first.caption == "twice"
    assert first.digest not in {p.digest for p in client.remove_preview("many", first.digest)}
    with pytest.raises(AtelierError, match="has no preview"):
        client.remove_preview("many", first.digest)
    with pytest.raises(AtelierError, match="has no such preview"):
        client.preview("many", first.digest)


def test_pictures_are_verified_backed_up_and_purged_with_their_version(
    tmp_path: Path, warm: WarmPipeline, lora: Path
) -> None:
    now = timedelta(0)
    with serving(tmp_path / "data", warm) as running, Client(running.address) as client:
        client.check_in(lora, name="hero")
        digest = client.add_preview("hero", picture()).digest
        assert client.collect_garbage(retention=now, grace=now).size_bytes == 0
        assert keeping.backup(tmp_path / "data", tmp_path / "copy").files == 2
        blob = running.catalog.blobs.path(digest)
        blob.rename(tmp_path / "hidden")
        (missing,) = keeping.verify(tmp_path / "data").missing
        assert missing.startswith("preview of hero:1 (")
        (tmp_path / "hidden").rename(blob)
        client.delete("hero")
        went = client.collect_garbage(retention=now, grace=now)
        assert (list(went.versions), list(went.orphans)) == (["hero:1"], [])
        assert not blob.exists()
        client.check_in(lora, name="hero")  # it is back, without what is gone
        assert list(client.get("hero").previews) == []
    assert keeping.verify(tmp_path / "data").sound
