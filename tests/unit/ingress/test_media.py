"""From a URL to media, and what is refused on the way, as vLLM calls it."""

import asyncio
import base64
import contextlib
import gc
import io
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anyio import to_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from serve_app.config import MediaLimits
from serve_app.ingress.media import EPDMediaConnector
from serve_app.ingress.media_names import MediaNames
from serve_app.ingress.seams import install_media
from serve_app.media.check import gif_has_more_frames
from serve_app.media.decoding import decode, to_client_error
from tests.unit.web import Web, media_config, redirect, response
from tools.harness.media import cut, data_url, picture, png, recording, video_url, wav

SETTINGS = (
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_MAX_IMAGE_PIXELS",
    "VLLM_MAX_AUDIO_DECODE_DURATION_S",
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB",
)


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``install_media`` sets in this process is as before afterwards."""
    for name in SETTINGS:
        monkeypatch.setattr(envs, name, getattr(envs, name), raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    registered = dict(MEDIA_CONNECTOR_REGISTRY.name2class)
    yield
    MEDIA_CONNECTOR_REGISTRY.name2class = registered


def load(
    url: str, kind: str = "image", io_kwargs: dict[str, Any] | None = None, web: Web | None = None, **rules: Any
) -> Any:
    """What vLLM does with a URL: a connector by name, then the fetch method of the modality."""

    async def main() -> Any:
        config = media_config(**rules)
        fetcher = install_media(config)
        connector = MEDIA_CONNECTOR_REGISTRY.load(
            envs.VLLM_MEDIA_CONNECTOR,
            media_io_kwargs={kind: io_kwargs or {}},
            allowed_local_media_path="",
            allowed_media_domains=None,
        )
        assert type(connector) is EPDMediaConnector
        if web is None:
            return await getattr(connector, f"fetch_{kind}_async")(url)
        async with web:
            connector._fetcher = fetcher = web.fetcher(config)
            try:
                return await getattr(connector, f"fetch_{kind}_async")(url)
            finally:
                await fetcher.close()

    return asyncio.run(main())


def refusal(url: str, kind: str = "image", **rules: Any) -> str:
    with pytest.raises(VLLMValidationError) as caught:
        load(url, kind, **rules)
    return str(caught.value)


# ---- what is loaded, from everywhere


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_picture_is_loaded_from_every_kind_of_url(red: Path) -> None:
    data = red.read_bytes()
    for loaded in (
        load(data_url("image/png", data)),
        load(red.as_uri(), allowed_local_path=red.parent),
        load("http://example.org/red.png", web=Web({"/red.png": response(data)})),
        load("http://example.org/a", web=Web({"/a": redirect("/red.png"), "/red.png": response(data)})),
    ):
        assert loaded.media.size == (4, 4)
        assert loaded.media.getpixel((0, 0)) == (255, 0, 0)
        assert loaded.original_bytes == data


def test_video_and_sound_are_loaded() -> None:
    frames, metadata = load(video_url(1), "video").media
    assert frames.shape == (8, 84, 84, 3)
    assert metadata["total_num_frames"] == 8
    samples, rate = load(data_url("audio/wav", wav(1)), "audio")
    assert (len(samples), rate) == (16000, 16000)


def test_sound_of_a_video_file_goes_the_same_way() -> None:
    assert "No audio" in refusal(video_url(1), "audio") or "Cannot read" in refusal(video_url(1), "audio")


def jpegs(count: int, size: tuple[int, int] = (8, 8)) -> str:
    out = io.BytesIO()
    picture(1, size).save(out, "JPEG")
    return "data:video/jpeg;base64," + ",".join([base64.b64encode(out.getvalue()).decode()] * count)


def test_video_as_jpegs_is_loaded_and_counted() -> None:
    assert load(jpegs(3), "video").media[0].shape == (3, 8, 8, 3)
    assert "3 frames" in refusal(jpegs(3), "video", max_frames=2)
    assert "pixels per video" in refusal(jpegs(3), "video", max_video_pixels=3 * 64 - 1)
    assert "pixels" in refusal(jpegs(3), "video", max_pixels=63)
    assert "base64" in refusal(jpegs(2) + ",@@@@", "video")
    assert "no known format" in refusal(jpegs(2) + ",AAAA", "video")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.png",
        "/etc/passwd",
        "ftp://example.org/a",
        "gopher://x",
        "javascript:1",
        "ldap://x",
        "s3://b/k",
        " http://x",
    ],
)
def test_other_schemes_are_refused(url: str) -> None:
    async def main() -> None:
        connector = EPDMediaConnector(None, MediaLimits(), Web({}).fetcher(), MediaNames(0))
        with pytest.raises(VLLMValidationError, match="must begin with https:, http:, data: or file:"):
            await connector.fetch_image_async(url)

    asyncio.run(main())


def test_refusals_of_fetching_reach_the_client_as_they_are() -> None:
    """What may not be fetched, and what could not be: 400 and 422."""
    assert "open to this server" in refusal("http://private.test/a.png", web=Web({}))
    assert "`media.allowed_local_path`" in refusal("file:///etc/passwd")
    with pytest.raises(VLLMUnprocessableEntityError, match="answered 404"):
        load("http://example.org/a.png", web=Web({}))


def test_threads_load_media_through_the_same_guard_and_vllms_offline_way_is_closed(red: Path) -> None:
    connector = EPDMediaConnector(None, MediaLimits(), Web({}).fetcher(), MediaNames(0))
    url = data_url("image/png", red.read_bytes())

    async def in_thread(url: str) -> Any:
        return await to_thread.run_sync(connector.fetch_image, url)

    assert asyncio.run(in_thread(url)) is not None
    with pytest.raises(VLLMValidationError, match="open to this server"):
        asyncio.run(in_thread("http://127.0.0.1/a.png"))
    with pytest.raises(RuntimeError):
        connector.fetch_image(url)


def test_vllms_cache_of_downloads_is_used_and_guarded(
    red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envs, "VLLM_MEDIA_CACHE", str(tmp_path / "cache"), raising=False)
    url = "http://example.org/red.png"
    web = Web({"/red.png": response(red.read_bytes())})
    load(url, web=web)
    assert load(url, web=Web({})).media.size == (4, 4)
    assert len(web.requests) == 1
    assert "`media.allowed_domains`" in refusal(url, web=Web({}), allowed_domains=["other.test"])
    assert "pixels" in refusal(url, web=Web({}), max_pixels=1)


# ---- bytes


def test_bytes_are_limited_for_every_kind_of_url(tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(big)
    data = big.read_bytes()
    words = "larger than the 1024 bytes"
    assert words in refusal(data_url("image/png", data), max_bytes=1024)
    assert words in refusal(big.as_uri(), allowed_local_path=tmp_path, max_bytes=1024)
    assert words in refusal("http://example.org/a", web=Web({"/a": response(data)}), max_bytes=1024)
    assert words in refusal(data_url("audio/wav", wav(1)), "audio", max_bytes=1024)
    assert words in refusal(video_url(1), "video", max_bytes=1024)


def test_limit_of_bytes_holds_for_sounds_too() -> None:
    """vLLM's own limit for sounds is lower: 25 MiB."""
    long = wav(1, seconds=850)  # 27 MB
    assert len(load(data_url("audio/wav", long), "audio", max_seconds=900)[0]) == 850 * 16000


# ---- pixels and frames of images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def animated(kind: str, frames: int) -> bytes:
    out = io.BytesIO()
    first, *rest = [picture(n, (8, 8)) for n in range(frames)]
    first.save(out, kind, save_all=True, append_images=rest)
    return out.getvalue()


def ico(inner: bytes) -> bytes:
    """An icon that says 16×16, around a PNG of any size."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def gif_bomb(frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame * frames + b"\x3b"


@pytest.mark.parametrize(
    ("data", "rules", "words"),
    [
        (png_header(50_000, 50_000), {}, "too many pixels, and this server takes at most 89478485 pixels"),
        (png_header(10_000, 9_000), {}, "pixels, and this server takes at most 89478485 pixels"),
        (png_header(2**31 - 1, 2**31 - 1), {}, "pixels"),
        (png_header(100, 1), {"max_pixels": 99}, "100×1 pixels, and this server takes at most 99 pixels"),
        (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30000, 30000, 1, 24, *[0] * 6), {}, "pixels"),
        (ico(png_header(5000, 5000)), {"max_pixels": 1_000_000}, ""),
        (animated("GIF", 5), {"max_frames": 4}, "too many frames, and this server takes at most 4 frames"),
        (animated("PNG", 5), {"max_frames": 4}, "too many frames"),
        (animated("WEBP", 5), {"max_frames": 4}, "too many frames"),
        (animated("TIFF", 5), {"max_frames": 4}, "too many frames"),
        (gif_bomb(40_000), {}, "too many frames, and this server takes at most 36000 frames"),
    ],
    ids=["bomb", "large", "largest", "small limit", "bmp", "ico", "gif", "apng", "webp", "tiff", "gif bomb"],
)
def test_image_over_a_limit_is_refused(data: bytes, rules: dict[str, Any], words: str) -> None:
    assert words in refusal(data_url("image/png", data), **rules)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_image_within_the_limit_gives_its_first_frame(kind: str) -> None:
    assert load(data_url("image/x", animated(kind, 5)), max_frames=5).media.size == (8, 8)


def test_image_at_the_limit_is_loaded() -> None:
    assert load(data_url("image/png", png(picture(1, (20, 10)))), max_pixels=200).media.size == (20, 10)


def test_frames_of_a_gif_are_counted_over_every_kind_of_block() -> None:
    data = animated("GIF", 7)  # with colour tables, extensions and a loop count
    assert gif_has_more_frames(data, 6) and not gif_has_more_frames(data, 7)
    for end in range(13, len(data)):
        assert not gif_has_more_frames(data[:end], 7)


PICTURE = png(picture(1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        PICTURE[: len(PICTURE) // 2],
        PICTURE[:20],
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"GIF89a" + bytes(7),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        wav(1),
    ],
    ids=["empty", "text", "cut", "cut early", "magic", "gif magic", "gif of nothing", "eps", "svg", "wav"],
)
def test_broken_image_is_a_400_that_tells_nothing_of_the_process(data: bytes) -> None:
    message = refusal(data_url("image/png", data))
    assert "image" in message
    assert "object at" not in message and "0x" not in message


# ---- videos and sounds

VIDEO = video_url(1, frames=8)  # 4 frames per second, 84×84


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"max_frames": 7}, "has too many frames, and this server takes at most 7 frames"),
        ({"max_seconds": 1.9}, "takes 2.0 s, and this server takes at most 1.9 s"),
        ({"max_pixels": 84 * 84 - 1}, "84×84 pixels"),
        ({"max_video_pixels": 8 * 84 * 84 - 1}, "8 frames of the video have 56448 pixels"),
        ({"max_video_pixels": 4 * 84 * 84 - 1, "io_kwargs_": {"num_frames": 4}}, "4 frames of the video"),
    ],
)
def test_video_over_a_limit_is_refused(rules: dict[str, Any], words: str) -> None:
    io_kwargs = rules.pop("io_kwargs_", None)
    with pytest.raises(VLLMValidationError, match=words):
        load(VIDEO, "video", io_kwargs, **rules)


def test_video_at_the_limits_is_loaded() -> None:
    limits = {"max_frames": 8, "max_seconds": 2, "max_pixels": 84 * 84, "max_video_pixels": 4 * 84 * 84}
    assert load(VIDEO, "video", {"num_frames": 4}, **limits).media[0].shape == (4, 84, 84, 3)


def test_pixels_of_a_video_are_counted_with_the_models_own_sampling() -> None:
    backend = {"video_backend": get_video_loader_backend_for_processor("Qwen2VLVideoProcessor")}
    assert backend["video_backend"] is not None
    assert load(VIDEO, "video", backend).media[0].shape[0] == 4
    with pytest.raises(VLLMValidationError, match="4 frames of the video"):
        load(VIDEO, "video", backend, max_video_pixels=4 * 84 * 84 - 1)


QWEN = {"video_backend": get_video_loader_backend_for_processor("Qwen2VLVideoProcessor")}


def frames_of(data: bytes, io_kwargs: dict[str, Any] | None = None, **rules: Any) -> tuple[np.ndarray, dict[str, Any]]:
    frames, metadata = load(data_url("video/x", data), "video", io_kwargs, **rules).media
    assert len(frames) == len(metadata["frames_indices"])
    return frames, metadata


@pytest.mark.parametrize("io_kwargs", [{}, QWEN], ids=["uniform sampling", "the model's own"])
@pytest.mark.parametrize("container", ["mp4", "matroska", "webm", "mpegts"])
@pytest.mark.parametrize("piped", [False, True])
def test_video_of_one_frame_is_that_frame(container: str, piped: bool, io_kwargs: dict[str, Any]) -> None:
    frames, metadata = frames_of(recording(container, 1, piped=piped and container != "mp4"), io_kwargs)
    assert frames.shape == (1, 84, 84, 3)
    assert abs(frames[0].astype(int) - np.asarray(picture(1000))).mean() < 16
    assert (metadata["total_num_frames"], metadata["frames_indices"]) == (1, [0])


@pytest.mark.parametrize("io_kwargs", [{"num_frames": 32}, QWEN], ids=["uniform sampling", "the model's own"])
@pytest.mark.parametrize("container", ["matroska", "webm", "avi"])
@pytest.mark.parametrize("rate", [4, 30])
def test_video_whose_container_tells_no_length_is_as_one_that_does(
    container: str, rate: int, io_kwargs: dict[str, Any]
) -> None:
    told, metadata = frames_of(recording(container, 60, rate=rate), io_kwargs)
    counted, ours = frames_of(recording(container, 60, rate=rate, piped=True), io_kwargs)
    assert metadata["total_num_frames"] == 60
    assert ours == metadata
    assert np.array_equal(counted, told)


def test_recording_that_broke_off_is_what_can_be_decoded_of_it() -> None:
    whole, _ = frames_of(recording("webm", 24), {"num_frames": 32})
    frames, metadata = frames_of(cut(recording("webm", 24, piped=True)), {"num_frames": 32})
    assert 8 < len(frames) == metadata["total_num_frames"] < 24
    assert np.array_equal(frames, whole[: len(frames)])


@pytest.mark.parametrize("data", [recording("mpegts", 24, piped=True), recording("ivf", 24, piped=True)], ids=len)
def test_stream_that_cannot_be_rewound_is_read_from_its_beginning(data: bytes) -> None:
    """vLLM's loader looks for its end first, and gets no or few frames after that."""
    frames, metadata = frames_of(data, {"num_frames": 32})
    assert len(frames) == metadata["total_num_frames"] == 24
    assert abs(frames[0].astype(int) - np.asarray(picture(1000))).mean() < 16


def without_rate(webm: bytes) -> bytes:
    """Without the frames a second of its track (DefaultDuration), as browsers record: Void stands in its place."""
    at = webm.index(b"\x23\xe3\x83")
    size = 4 + (webm[at + 3] & 0x7F)
    return webm[:at] + bytes([0xEC, 0x80 | (size - 2)]) + bytes(size - 2) + webm[at + size :]


@pytest.mark.parametrize("piped", [True, False])
def test_rate_of_a_recording_that_tells_none_is_that_of_its_frames(piped: bool) -> None:
    """FFmpeg takes the container's unit of time for it: a thousand frames a second."""
    at_ms = [index * 17 + index % 3 for index in range(60)]
    data = without_rate(recording("webm", 60, piped=piped, at_ms=at_ms))
    _, metadata = frames_of(data, QWEN)
    assert metadata["total_num_frames"] == 60
    assert metadata["fps"] == pytest.approx(58.6, rel=0.02)
    assert metadata["duration"] == pytest.approx(1.02, rel=0.03)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"max_frames": 7}, "has too many frames, and this server takes at most 7 frames"),
        ({"max_seconds": 1.9}, "s, and this server takes at most 1.9 s"),
        ({"max_pixels": 84 * 84 - 1}, "84×84 pixels"),
        ({"max_video_pixels": 8 * 84 * 84 - 1}, "8 frames of the video have 56448 pixels"),
    ],
)
def test_counted_video_over_a_limit_is_refused(rules: dict[str, Any], words: str) -> None:
    assert words in refusal(data_url("video/webm", recording("webm", 8, piped=True)), "video", **rules)


def test_frames_over_the_limit_are_counted_without_decoding_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    open_again = OpenCVVideoBackendMixin.open_video_capture

    def counting(data: bytes) -> Any:
        opened.append(open_again(data))
        return opened[-1]

    monkeypatch.setattr(OpenCVVideoBackendMixin, "open_video_capture", counting)
    refusal(data_url("video/webm", recording("webm", 30, piped=True)), "video", max_frames=7)
    assert [capture.get(cv2.CAP_PROP_FORMAT) for capture in opened][1:] == [-1]


def test_video_none_of_whose_frames_can_be_decoded_is_refused() -> None:
    data = bytearray(recording("mp4", 8))
    start = data.index(b"mdat") + 4
    end = data.index(b"moov", start) - 4
    data[start:end] = bytes(end - start)
    assert "none of the video's frames can be decoded" in refusal(data_url("video/mp4", bytes(data)), "video")


def test_what_a_video_needed_is_not_kept() -> None:
    """Classes wait for the garbage collector: one per video must not hold its bytes."""
    io_ = VideoMediaIO(ImageMediaIO("RGB"))
    data = recording("webm", 8, piped=True)
    before = sys.getrefcount(data)
    decode(data, io_, MediaLimits())
    gc.collect(0)
    assert sys.getrefcount(data) == before


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile 'examples/clip.mp4'\n"
SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
DASH = b'<?xml version="1.0"?><MPD profiles="urn:mpeg:DASH:profile:isoff-on-demand:2011"></MPD>'
IMF = b"<?xml version='1.0'?><CompositionPlaylist xmlns='http://www.smpte-ra.org/schemas/2067-3/2013'>"
ID3 = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)


@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize(
    "data",
    [HLS, CONCAT, SDP, DASH, IMF, ID3 + CONCAT, b"\xff\xfb\x90\x44\n" + SDP, b" \n" + HLS],
    ids=["hls", "concat", "sdp", "dash", "imf", "concat behind id3", "sdp behind mp3", "hls behind space"],
)
def test_list_of_other_files_never_reaches_ffmpeg(kind: str, data: bytes) -> None:
    """FFmpeg would open what it names: files of the server, addresses in its network (SDP: for ten seconds)."""
    assert "it is a playlist" in refusal(data_url(f"{kind}/x", data), kind)


@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize("data", [b"", b"text", bytes(1000), random.Random(1).randbytes(64) * 50], ids=len)
def test_broken_video_or_sound_is_a_400(kind: str, data: bytes) -> None:
    message = refusal(data_url(f"{kind}/x", data), kind)
    assert message and "object at" not in message


def test_truncated_video_is_a_400() -> None:
    data = base64.b64decode(VIDEO.partition(",")[2])
    refusal(data_url("video/mp4", data[: len(data) // 2]), "video")


def test_sound_over_the_limit_is_refused_in_words_of_ours() -> None:
    assert len(load(data_url("audio/wav", wav(1, 2.0)), "audio", max_seconds=2)[0]) == 32000
    message = refusal(data_url("audio/wav", wav(1, 2.0)), "audio", max_seconds=1.5)
    assert "1.5s" in message and "`advanced.media.max_seconds`" in message and "VLLM_" not in message


def test_sound_whose_header_lies_decodes_to_no_more_than_the_limit() -> None:
    data = bytearray(wav(1, 2.0))
    data[40:44] = struct.pack("<I", 16000)  # half a second, it says
    assert len(load(data_url("audio/wav", bytes(data)), "audio", max_seconds=1)[0]) <= 16000
    data[24:28] = struct.pack("<I", 1)  # one sample a second: hours
    assert "`advanced.media.max_seconds`" in refusal(data_url("audio/wav", bytes(data)), "audio", max_seconds=1)


# ---- the rest


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("Failed to load image: cannot identify image file <_io.BytesIO object at 0x7f12>"), "image file"),
        (ValueError("frames_indices must be a list of integers"), "list of integers"),
        (ValueError("… Set VLLM_MAX_IMAGE_PIXELS to increase this limit."), "Set `advanced.media.max_pixels` to"),
        (ValueError(), "Cannot read the media"),
        (OSError(2, "No such file", "/srv/secret"), "Cannot read the media"),
        (RuntimeError("<_io.BytesIO object at 0x7f12>: File contains data in an unknown format."), "no known format"),
        (MemoryError(), "Cannot read the media"),
        (AssertionError("Invalid video frame size"), "Cannot read the media"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failure_of_decoding_is_a_sentence_for_the_client(error: Exception, words: str) -> None:
    mapped = to_client_error(error)
    assert type(mapped) is VLLMValidationError
    assert words in str(mapped)
    assert "0x7f12" not in str(mapped) and "/srv" not in str(mapped)


def test_errors_of_vllms_own_pass() -> None:
    error = VLLMUnprocessableEntityError("as it is")
    assert to_client_error(error) is error


def test_limits_of_vllm_follow_the_config() -> None:
    install_media(media_config(max_pixels=1001, max_seconds=7.5, max_bytes=2 << 20))
    assert envs.VLLM_MAX_IMAGE_PIXELS == 1001
    assert envs.VLLM_MAX_AUDIO_DECODE_DURATION_S == 7.5
    assert envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB == 2.0
    assert Image.MAX_IMAGE_PIXELS == 501


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, str]:
    """A kind of media and a URL of one whose bytes were overwritten here and there, or are not all there."""
    kind, name, good = draw(st.sampled_from(GOOD))
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return kind, data_url(name, bytes(data[: draw(st.integers(len(data) // 2, len(data)))]))


GOOD = [
    ("image", "image/png", png(picture(1))),
    ("video", "video/mp4", base64.b64decode(video_url(1).partition(",")[2])),
    ("audio", "audio/wav", wav(1, 0.2)),
]


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(broken())
def test_broken_bytes_are_read_or_refused(case: tuple[str, str]) -> None:
    kind, url = case
    with contextlib.suppress(VLLMValidationError):
        assert load(url, kind) is not None
