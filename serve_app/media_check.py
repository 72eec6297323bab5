"""What an item declares about itself, checked before vLLM decodes it: pixels, frames, seconds.

A small file can decode to any amount of memory. Headers are read here, without decoding, and refused in words of ours; the
limits that vLLM keeps while it decodes are set to the same numbers, for headers that lie (``set_vllm_limits``).
"""

import copy
import math
import warnings
from io import BytesIO
from typing import Any, NoReturn

import cv2
from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import ImageMediaIO, MediaIO, VideoMediaIO
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin
from vllm.utils.mem_constants import MiB_bytes

from serve_app.config import MediaConfig
from serve_app.media_fetch import decode_base64

PROBE_BYTES = 1 << 20
"""How much of a file FFmpeg looks at to tell its format (PROBE_BUF_MAX in libavformat/internal.h)."""

MANIFESTS = (b"#extm3u", b"ffconcat version", b"c=in ip", b"dash:profile", b"profile:dash1", b"<compositionplaylist")
"""What makes FFmpeg take a file for HLS, a concat script, SDP, DASH or IMF: lists of other files and addresses, which it
then opens itself, past every guard (libavformat's ``*_probe`` functions). In lower case."""


def set_vllm_limits(rules: MediaConfig) -> None:
    """Make vLLM and Pillow, in this process, keep to the same limits while they decode."""
    envs.VLLM_MAX_IMAGE_PIXELS = rules.max_pixels
    envs.VLLM_MAX_AUDIO_DECODE_DURATION_S = rules.max_seconds
    envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB = rules.max_bytes / MiB_bytes
    # Pillow refuses from twice this on. It looks inside containers (ICO, ICNS) whose own header can lie; it would warn
    # from half of our limit on.
    Image.MAX_IMAGE_PIXELS = math.ceil(rules.max_pixels / 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check(data: bytes, media_io: MediaIO[Any], rules: MediaConfig) -> MediaIO[Any]:
    """Raise ``VLLMValidationError`` for what is over a limit; else return the IO that may decode it.

    Sounds are not opened here: each of vLLM's audio loaders compares the header with its limit first.
    """
    if isinstance(media_io, ImageMediaIO):
        check_image(data, rules)
        return media_io
    if any(sign in data[:PROBE_BYTES].lower() for sign in MANIFESTS):
        raise VLLMValidationError("Cannot read the media: it is a playlist. Send the file that it points to.")
    return check_video(data, media_io, rules) if isinstance(media_io, VideoMediaIO) else media_io


def check_image(data: bytes, rules: MediaConfig) -> int:
    """Number of the image's pixels."""
    try:
        with open_image(BytesIO(data)) as image:
            pixels: int = image.width * image.height
            if pixels > rules.max_pixels:
                too_much(f"The image has {image.width}×{image.height} pixels", f"{rules.max_pixels} pixels")
            animated = has_more_frames(image, data, rules.max_frames)
    except Image.DecompressionBombError:
        too_much("The image has too many pixels", f"{rules.max_pixels} pixels")
    except VLLMValidationError:
        raise
    except Exception as error:  # each of Pillow's plugins has its own
        raise VLLMValidationError("Cannot read the image: it is in no known format, or broken.") from error
    if animated:
        too_much("The image has too many frames", f"{rules.max_frames} frames")
    return pixels


def has_more_frames(image: Image.Image, data: bytes, limit: int) -> bool:
    """Whether an image has more than ``limit`` frames, in time that a hostile file cannot stretch.

    Pillow has the number from the header, except for GIF and TIFF, which it would read to the end.
    """
    if image.format == "GIF":
        return gif_has_more_frames(data, limit)
    if image.format == "TIFF":
        try:
            image.seek(limit)
        except EOFError:
            return False
        return True
    return bool(getattr(image, "n_frames", 1) > limit)


def gif_has_more_frames(data: bytes, limit: int) -> bool:
    """Counts the image blocks of a GIF (89a specification), up to the limit."""

    def colours(flags: int) -> int:
        """Bytes of a colour table."""
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames, at = 0, 13 + colours(data[10])
    while at < len(data):
        match data[at]:
            case 0x2C:  # image: descriptor, colour table, code size
                frames += 1
                if frames > limit:
                    return True
                at += 10
                at += colours(data[at - 1]) + 1 if at <= len(data) else 0
            case 0x21:  # extension: label
                at += 2
            case _:
                return False
        while at < len(data) and data[at]:  # sub-blocks up to an empty one
            at += data[at] + 1
        at += 1
    return False


def check_video(data: bytes, media_io: VideoMediaIO, rules: MediaConfig) -> VideoMediaIO:
    """Opens the video as vLLM's default backend does, which decodes no more frames than the header declares."""
    # Never release() a capture of bytes: OpenCV 5.0.0 crashes the process. It closes with its last reference.
    capture = OpenCVVideoBackendMixin.open_video_capture(data)
    width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    if width * height > rules.max_pixels:
        too_much(f"The video has {width}×{height} pixels", f"{rules.max_pixels} pixels")
    if frames > rules.max_frames:
        too_much(f"The video has {frames:.0f} frames", f"{rules.max_frames} frames")
    if fps > 0 and frames / fps > rules.max_seconds:
        too_much(f"The video takes {frames / fps:.1f} s", f"{rules.max_seconds:g} s")
    limited = copy.copy(media_io)  # one IO can serve several items at once
    limited.video_loader = _limited(type(media_io.video_loader), width * height, rules.max_video_pixels)()
    return limited


def _limited(loader: Any, frame_pixels: int, max_pixels: int) -> Any:
    """A video loader of vLLM's that refuses to take more frames than fit: only it knows how many it samples."""

    class Limited(loader):
        @classmethod
        def compute_frames_index_to_sample(cls, *args: Any, **kwargs: Any) -> list[int]:
            indices: list[int] = super().compute_frames_index_to_sample(*args, **kwargs)
            if len(indices) * frame_pixels > max_pixels:
                too_much(
                    f"{len(indices)} frames of the video have {len(indices) * frame_pixels} pixels",
                    f"{max_pixels} pixels per video",
                )
            return indices

    return Limited


def check_jpegs(text: str, rules: MediaConfig) -> None:
    """A ``data:video/jpeg`` URL: frames as JPEGs, each in base64, with commas in between (vLLM's own format)."""
    if text.count(",") >= rules.max_frames:
        too_much(f"The video has {text.count(',') + 1} frames", f"{rules.max_frames} frames")
    pixels = 0
    for frame in text.split(","):
        pixels += check_image(decode_base64(frame, rules), rules)
        if pixels > rules.max_video_pixels:
            too_much("The video's frames have too many pixels", f"{rules.max_video_pixels} pixels per video")


def too_much(what: str, limit: str) -> NoReturn:
    raise VLLMValidationError(f"{what}, and this server takes at most {limit}: send less.")
