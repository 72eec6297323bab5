"""Checks the pixels, frames and seconds that an item declares, before vLLM decodes it.

A small file can decode to any amount of memory, so headers are read first. They can lie, so ``install_limits`` gives the
decoders the same limits.
"""

import copy
import itertools
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
from vllm.multimodal.video_decoders import VideoSourceMetadata
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin
from vllm.utils.mem_constants import MiB_bytes

from serve_app.config import MediaLimits
from serve_app.media.fetch import decode_base64

PROBE_BYTES = 1 << 20
"""Bytes of a file that FFmpeg reads to tell its format (PROBE_BUF_MAX in libavformat/internal.h)."""

MANIFESTS = (b"#extm3u", b"ffconcat version", b"c=in ip", b"dash:profile", b"profile:dash1", b"<compositionplaylist")
"""Signs of HLS, concat scripts, SDP, DASH and IMF for FFmpeg (libavformat's ``*_probe`` functions), in lower case. FFmpeg
opens the files and addresses that these list, past every guard."""


def install_limits(limits: MediaLimits) -> None:
    """Give the decoders of vLLM and Pillow, in this process, the same limits."""
    envs.VLLM_MAX_IMAGE_PIXELS = limits.max_pixels
    envs.VLLM_MAX_AUDIO_DECODE_DURATION_S = limits.max_seconds
    envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB = limits.max_bytes / MiB_bytes
    # Pillow warns above this and refuses above twice this, inside containers (ICO, ICNS) with false headers too.
    Image.MAX_IMAGE_PIXELS = math.ceil(limits.max_pixels / 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check(data: bytes, media_io: MediaIO[Any], limits: MediaLimits) -> MediaIO[Any]:
    """The IO that may decode the item. Raises ``VLLMValidationError`` for one over a limit.

    vLLM's audio loaders themselves compare the header with its limit first.
    """
    if isinstance(media_io, ImageMediaIO):
        check_image(data, limits)
        return media_io
    refuse_playlist(data)
    return check_video(data, media_io, limits) if isinstance(media_io, VideoMediaIO) else media_io


def refuse_playlist(data: bytes) -> None:
    """Raise ``VLLMValidationError`` for what FFmpeg would read other files and addresses of."""
    if any(sign in data[:PROBE_BYTES].lower() for sign in MANIFESTS):
        raise VLLMValidationError("Cannot read the media: it is a playlist. Send the file that it points to.")


def check_image(data: bytes, limits: MediaLimits) -> int:
    """Number of the image's pixels. Raises ``VLLMValidationError`` for one that is broken or over a limit."""
    try:
        with open_image(BytesIO(data)) as image:
            pixels: int = image.width * image.height
            if pixels > limits.max_pixels:
                too_much(f"The image has {image.width}×{image.height} pixels", f"{limits.max_pixels} pixels")
            animated = has_more_frames(image, data, limits.max_frames)
    except Image.DecompressionBombError:
        too_much("The image has too many pixels", f"{limits.max_pixels} pixels")
    except VLLMValidationError:
        raise
    except Exception as error:  # each of Pillow's plugins has its own
        raise VLLMValidationError("Cannot read the image: it is in no known format, or broken.") from error
    if animated:
        too_much("The image has too many frames", f"{limits.max_frames} frames")
    return pixels


def has_more_frames(image: Image.Image, data: bytes, limit: int) -> bool:
    """Whether an image has more than ``limit`` frames, in bounded time: Pillow would read GIF and TIFF to the end."""
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

    def table_bytes(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames, at = 0, 13 + table_bytes(data[10])
    while at < len(data):
        match data[at]:
            case 0x2C:  # image: descriptor, colour table, code size
                frames += 1
                if frames > limit:
                    return True
                at += 10
                at += table_bytes(data[at - 1]) + 1 if at <= len(data) else 0
            case 0x21:  # extension: label
                at += 2
            case _:
                return False
        while at < len(data) and data[at]:  # sub-blocks up to an empty one
            at += data[at] + 1
        at += 1
    return False


MAX_FPS = 240
"""A rate from here on is not believed: without one, as in browsers' recordings, FFmpeg gives the container's time unit."""


def check_video(data: bytes, media_io: VideoMediaIO, limits: MediaLimits) -> VideoMediaIO:
    """Check a video; the result decodes no more frames than the header declares or than are counted here."""
    # Never release() a capture of bytes: OpenCV 5.0.0 crashes the process. It closes with its last reference.
    capture = OpenCVVideoBackendMixin.open_video_capture(data)
    width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    if width * height > limits.max_pixels:
        too_much(f"The video has {width}×{height} pixels", f"{limits.max_pixels} pixels")
    counted = None
    if not (0 < frames <= limits.max_frames and 0 < fps < MAX_FPS):
        counted = counted_frames(data, limits)
        frames, fps, _ = counted
    if frames / fps > limits.max_seconds:
        too_much(f"The video takes {frames / fps:.1f} s", f"{limits.max_seconds:g} s")
    limited = copy.copy(media_io)  # one IO can serve several items at once
    limited.video_loader = _limited(
        type(media_io.video_loader), width * height, limits.max_video_pixels, counted, [capture]
    )()
    return limited


def counted_frames(data: bytes, limits: MediaLimits) -> VideoSourceMetadata:
    """The metadata of a video whose container has none that can be true, such as one that was written to a pipe.

    A recording may break off anywhere, so all frames are decoded, once the packets, which cost little, are not too many.
    """
    packets = OpenCVVideoBackendMixin.open_video_capture(data)
    packets.set(cv2.CAP_PROP_FORMAT, -1)  # undecoded
    if sum(1 for _ in itertools.islice(iter(packets.grab, False), limits.max_frames + 1)) > limits.max_frames:
        too_much("The video has too many frames", f"{limits.max_frames} frames")
    capture = OpenCVVideoBackendMixin.open_video_capture(data)
    frames, first_s, last_s = 0, 0.0, 0.0
    while frames < limits.max_frames and capture.grab():
        last_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        first_s = first_s if frames else last_s
        frames += 1
        if last_s - first_s > limits.max_seconds:
            too_much(f"The video takes {last_s - first_s:.1f} s", f"{limits.max_seconds:g} s")
    if not frames:
        raise _not_decodable()
    fps = capture.get(cv2.CAP_PROP_FPS)
    if not 0 < fps < MAX_FPS:
        fps = 24.0  # as transformers has it
    if last_s > first_s:
        shown = (frames - 1) / (last_s - first_s)
        fps = fps if 0.9 < fps / shown < 1.1 else shown  # times are rounded: the same rate is the same number
    return VideoSourceMetadata(frames, fps, frames / fps)


def _limited(
    loader: Any, frame_pixels: int, max_pixels: int, counted: VideoSourceMetadata | None, unread: list[Any]
) -> Any:
    """vLLM's video loader with a bound on the frames that it samples.

    ``counted`` replaces the container's metadata. ``unread``: a fresh capture of the video to read frames from. The loader's
    own has been at the end, and some files (a single frame, MPEG-TS, IVF) give few or no frames after that.
    """

    class Limited(loader):
        @classmethod
        def load_bytes(cls, data: bytes, **kwargs: Any) -> Any:
            try:
                return super().load_bytes(data, **kwargs)
            finally:
                unread.clear()  # the class is there until the garbage collector comes

        @classmethod
        def _prepare_source(cls, source: VideoSourceMetadata) -> VideoSourceMetadata:
            return super()._prepare_source(counted or source)

        @classmethod
        def compute_frames_index_to_sample(cls, source: VideoSourceMetadata, *args: Any, **kwargs: Any) -> list[int]:
            # Samplers that take pairs of frames take none of a single one.
            indices: list[int] = (
                [0] if source.total_frames_num == 1 else super().compute_frames_index_to_sample(source, *args, **kwargs)
            )
            if len(indices) * frame_pixels > max_pixels:
                too_much(
                    f"{len(indices)} frames of the video have {len(indices) * frame_pixels} pixels",
                    f"{max_pixels} pixels per video",
                )
            return indices

        @classmethod
        def read_frames(cls, _: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[int]]:
            frames, indices = super().read_frames(unread.pop(), *args, **kwargs)
            if not indices:
                raise _not_decodable()
            return frames, indices

    return Limited


def _not_decodable() -> VLLMValidationError:
    return VLLMValidationError("Cannot read the media: none of the video's frames can be decoded.")


def check_jpegs(text: str, limits: MediaLimits) -> None:
    """Check a ``data:video/jpeg`` URL, vLLM's own format: JPEGs in base64, with commas in between."""
    if text.count(",") >= limits.max_frames:
        too_much(f"The video has {text.count(',') + 1} frames", f"{limits.max_frames} frames")
    pixels = 0
    for frame in text.split(","):
        pixels += check_image(decode_base64(frame, limits), limits)
        if pixels > limits.max_video_pixels:
            too_much("The video's frames have too many pixels", f"{limits.max_video_pixels} pixels per video")


def too_much(what: str, limit: str) -> NoReturn:
    raise VLLMValidationError(f"{what}, and this server takes at most {limit}: send less.")
