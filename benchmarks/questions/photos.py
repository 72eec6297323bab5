"""Pictures like photographs, any number of each kind: their pixels differ, and the work to decode them does not.

One of each kind is drawn and encoded, which takes seconds. The others are made of it in a millisecond: a JPEG by another
number in its table of quantization, a PNG by another last row. So no cache of any system knows a picture, and none is drawn
while systems are measured. ``python -m benchmarks.questions.photos PORT`` serves them by HTTP, on loopback.
"""

import base64
import functools
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image, ImageDraw

from serve_app.demo.cache import build_once, default_root, version_of

SIZES = {"1080p JPEG": (1920, 1080), "1080p PNG": (1920, 1080), "12 MP JPEG": (4000, 3000), "12 MP PNG": (4000, 3000)}
"""Kinds of pictures: width and height in pixels."""
QUALITY = 85
GRAIN = 6.0
"""Standard deviation of a pixel's noise, of 255."""
TABLE = b"\xff\xdb\x00\x43\x00"
"""Begin of a JPEG's table of quantization for brightness: 64 numbers of a byte, lowest frequency first."""
FREQUENCIES = range(6, 36)
"""Of the table, those that are changed: such as a photograph has everywhere."""
SIGNATURE = 8
"""Bytes at the begin of a PNG."""


def draw(size: tuple[int, int]) -> Image.Image:
    """Smooth colours, shapes with edges, texture and noise. Width and height in pixels."""
    random, (width, height) = np.random.default_rng(0), size

    def smooth(pixels: int, *channels: int) -> Image.Image:
        blocks = random.integers(0, 256, (height // pixels + 2, width // pixels + 2, *channels), dtype=np.uint8)
        return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)

    image = smooth(120, 3)
    shapes = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, side = (int(random.integers(least, most)) for least, most in ((0, width), (0, height), (8, width // 8)))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        shapes.ellipse((x, y, x + side, y + side * 2 // 3), fill=colour)
    grain = np.rint(random.normal(0, GRAIN, (256, 256, 3))).astype(np.int16)
    grain = np.tile(grain, (height // 256 + 1, width // 256 + 1, 1))[:height, :width]
    texture = (np.asarray(smooth(4)).astype(np.int16)[:, :, None] - 128) // 8
    return Image.fromarray(np.clip(np.asarray(image) + texture + grain, 0, 255).astype(np.uint8))


def codec(kind: str) -> str:
    return kind.rpartition(" ")[2]


@functools.cache
def first(kind: str) -> bytes:
    """The picture that all others of its kind are made of. A machine draws it once."""

    def build(folder: Path) -> None:
        draw(SIZES[kind]).save(folder / "picture", codec(kind), **{"quality": QUALITY} if codec(kind) == "JPEG" else {})

    name = f"photo-{kind.replace(' ', '-')}-{version_of(Path(__file__))}"
    return (build_once(default_root() / name, build) / "picture").read_bytes()


def picture(kind: str, number: int) -> bytes:
    return jpeg(kind, number) if codec(kind) == "JPEG" else png(kind, number)


def jpeg(kind: str, number: int) -> bytes:
    data = bytearray(first(kind))
    at = data.index(TABLE) + len(TABLE) + FREQUENCIES[number % len(FREQUENCIES)]
    data[at] += 1 + number // len(FREQUENCIES)
    return bytes(data)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of a PNG: names and contents."""
    at = SIGNATURE
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


@functools.cache
def all_but_last_row(kind: str) -> tuple[bytes, Any, bytes]:
    """A PNG up to its last row, the compressor that goes on there, and that row."""
    data = first(kind)
    parts = list(chunks(data))
    rows = zlib.decompress(b"".join(content for name, content in parts if name == b"IDAT"))
    row = 1 + 3 * SIZES[kind][0]  # a filter's number, then RGB
    compressor = zlib.compressobj()
    packed = compressor.compress(rows[:-row])
    return data[:SIGNATURE] + chunk(*parts[0]) + chunk(b"IDAT", packed), compressor, rows[-row:]


def png(kind: str, number: int) -> bytes:
    begun, compressor, row = all_but_last_row(kind)
    compressor = compressor.copy()
    changed = row[:1] + number.to_bytes(3) + row[4:]
    return begun + chunk(b"IDAT", compressor.compress(changed) + compressor.flush()) + chunk(b"IEND", b"")


def url(kind: str, number: int) -> str:
    return f"data:image/{codec(kind).lower()};base64,{base64.b64encode(picture(kind, number)).decode()}"


def serve(port: int) -> None:
    async def send(request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        data = picture(kind, int(request.match_info["number"]))
        return web.Response(body=data, content_type=f"image/{codec(kind).lower()}")

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    for kind in SIZES:
        picture(kind, 0)
    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/{kind}/{number}", send)])
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
