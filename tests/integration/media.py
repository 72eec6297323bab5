"""Pictures, a video and sounds for the tests, made on the spot, as data URLs."""

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def picture(seed: int, size: tuple[int, int] = (84, 84)) -> Image.Image:
    """A picture that no other seed gives: noise blocks and a shape. ``size``: width, height in pixels."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in random.integers(0, 256, 3))
    draw.ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=colour)
    return image


def image_url(seed: int, size: tuple[int, int] = (84, 84)) -> str:
    return data_url("image/png", png(picture(seed, size)))


def video_url(seed: int, frames: int = 8, size: tuple[int, int] = (84, 84)) -> str:
    import cv2

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 4.0, size)
        for frame in range(frames):
            writer.write(np.asarray(picture(seed * 1000 + frame, size))[:, :, ::-1])
        writer.release()
        return data_url("video/mp4", path.read_bytes())


def wav(seed: int, seconds: float = 1.0, rate: int = 16000) -> bytes:
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (220 + 110 * seed) * time)
    out = io.BytesIO()
    soundfile.write(out, tone.astype(np.float32), rate, format="WAV")
    return out.getvalue()
