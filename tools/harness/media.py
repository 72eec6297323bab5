"""Pictures, a video and sounds for the tests, made on the spot, as data URLs."""

import base64
import io
import tempfile
from fractions import Fraction
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


class Pipe(bytearray):
    """A file that is written from its beginning to its end, as a pipe or a connection is."""

    def write(self, data: bytes) -> int:
        self += data
        return len(data)


CODECS = {
    "mp4": "mpeg4",
    "matroska": "mpeg4",
    "webm": "libvpx",
    "mpegts": "mpeg2video",
    "ivf": "libvpx",
    "avi": "mpeg4",
}


def recording(
    container: str, frames: int, seed: int = 1, rate: int = 4, piped: bool = False, at_ms: list[int] | None = None
) -> bytes:
    """A video of 84×84 pixels; ``piped``: its container does not tell its length, which is known at the end only.

    ``rate``: frames a second; ``at_ms``: when each is shown, in place of that.
    """
    import av

    out = Pipe() if piped else io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(CODECS[container], rate=rate, width=84, height=84, pix_fmt="yuv420p")
        if at_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture(seed * 1000 + index)))
            if at_ms:
                frame.pts, frame.time_base = at_ms[index], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return bytes(out) if isinstance(out, Pipe) else out.getvalue()


def sounding(seed: int, tone: int) -> bytes:
    """A video of two seconds with a sound."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        pictures = file.add_stream("mpeg4", rate=4, width=84, height=84, pix_fmt="yuv420p")
        sound = file.add_stream("aac", rate=16000, layout="mono")
        for index in range(8):
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(np.asarray(picture(seed * 1000 + index)))))
        file.mux(pictures.encode())
        wave = 0.4 * np.sin(2 * np.pi * (220 + 110 * tone) * np.arange(32000) / 16000)
        for start in range(0, len(wave), 1024):
            samples = wave[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            file.mux(sound.encode(frame))
        file.mux(sound.encode())
    return out.getvalue()


def cut(video: bytes) -> bytes:
    """A recording that broke off."""
    return video[: len(video) * 2 // 3]


def frames_of(video: bytes) -> list[Image.Image]:
    """What can be decoded of a video."""
    import cv2

    capture = cv2.VideoCapture(io.BytesIO(video), cv2.CAP_FFMPEG, [])
    return [Image.fromarray(frame[:, :, ::-1]) for _, frame in iter(capture.read, (False, None))]


def frames_url(frames: list[Image.Image]) -> str:
    """A video as vLLM takes it frame by frame. It says JPEG, and PNG loses nothing."""
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(png(frame)).decode() for frame in frames)


def wav(seed: int, seconds: float = 1.0, rate: int = 16000) -> bytes:
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (220 + 110 * seed) * time)
    out = io.BytesIO()
    soundfile.write(out, tone.astype(np.float32), rate, format="WAV")
    return out.getvalue()
