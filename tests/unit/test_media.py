"""serve_app.media: whatever is wrong with a URL is the client's to hear, as 400 or 422."""

import asyncio
import base64
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from PIL import Image, UnidentifiedImageError
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.media.image import ImageMediaIO

from serve_app.media import CONNECTOR, EPDMediaConnector, to_client_error

URL = "http://example.org/a.png"


def answered(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(Mock(real_url=URL), (), status=status)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answered(503), VLLMUnprocessableEntityError, f"Could not fetch {URL}: the server answered 503."),
        (TimeoutError(), VLLMUnprocessableEntityError, f"Could not fetch {URL}: it took too long."),
        (aiohttp.ServerTimeoutError(), VLLMUnprocessableEntityError, "it took too long"),
        (aiohttp.ClientPayloadError(), VLLMUnprocessableEntityError, "ClientPayloadError"),
        (aiohttp.InvalidURL(URL), VLLMUnprocessableEntityError, "InvalidURL"),
        (
            RuntimeError("Cannot load local files without `--allowed-local-media-path`."),
            VLLMValidationError,
            "set `media.allowed_local_path`",
        ),
        (FileNotFoundError("x"), VLLMValidationError, "no such file in the allowed folder"),
        (IsADirectoryError("x"), VLLMValidationError, "no such file in the allowed folder"),
        (PermissionError("x"), VLLMValidationError, "no such file in the allowed folder"),
        (UnidentifiedImageError("cannot identify <BytesIO>"), VLLMValidationError, "in no known format, or broken"),
        (
            ValueError("must be a subpath of `--allowed-local-media-path /x`."),
            VLLMValidationError,
            "is not in the folder that this server may read",
        ),
        (ValueError("The URL must be either a HTTP, data or file URL."), VLLMValidationError, "HTTP, data or file"),
        (NotImplementedError("Only base64"), VLLMValidationError, "Only base64"),
        (OSError("image file is truncated"), VLLMValidationError, "Cannot read the media: image file is truncated"),
        (KeyError(), VLLMValidationError, "Cannot read the media."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failure_is_an_error_of_the_clients_in_words(error: Exception, kind: type, words: str) -> None:
    mapped = to_client_error(URL, error)
    assert type(mapped) is kind
    assert words in str(mapped)


def test_long_url_is_cut_and_paths_of_the_server_are_not_told() -> None:
    message = str(to_client_error("data:" + "x" * 1000, TimeoutError()))
    assert len(message) < 150 and "…" in message
    assert "/x" not in str(to_client_error(URL, ValueError("subpath of `--allowed-local-media-path /x`")))


def load(url: str, **options: Any) -> Any:
    """What vLLM does with a URL, through our connector as vLLM makes it."""

    async def main() -> Any:
        connector = MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR, **options)
        assert type(connector) is EPDMediaConnector
        return await connector.load_from_url_async(url, ImageMediaIO())

    return asyncio.run(main())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    folder.mkdir()
    path = folder / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_good_media_is_loaded(picture: Path) -> None:
    for loaded in (
        load(data_url(picture.read_bytes())),
        load(picture.as_uri(), allowed_local_media_path=str(picture.parent)),
    ):
        assert loaded.media.size == (4, 4)
        assert loaded.media.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (data_url(b"no image"), "cannot identify"),
        ("data:image/png;base64", "missing ','"),
        ("data:image/png,abc", "base64"),
        ("ftp://example.org/a.png", "HTTP, data or file"),
        ("file:///etc/passwd", "set `media.allowed_local_path`"),
    ],
)
def test_what_cannot_be_read_is_a_400(url: str, words: str) -> None:
    with pytest.raises(VLLMValidationError, match=words):
        load(url)


def test_broken_picture_is_a_400(picture: Path) -> None:
    with pytest.raises(VLLMError) as caught:
        load(data_url(picture.read_bytes()[:-20]))
    assert isinstance(caught.value, VLLMValidationError)


def test_file_outside_the_folder_is_refused_even_through_dots_and_links(picture: Path) -> None:
    outside = picture.parent.parent / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    link = picture.parent / "link.png"
    link.symlink_to(outside)
    dots = f"{picture.parent.as_uri()}/../secret.png"
    for url in (outside.as_uri(), link.as_uri(), dots):
        with pytest.raises(VLLMValidationError, match="is not in the folder"):
            load(url, allowed_local_media_path=str(picture.parent))


def test_missing_file_in_the_folder_is_a_400(picture: Path) -> None:
    with pytest.raises(VLLMValidationError, match="no such file"):
        load((picture.parent / "gone.png").as_uri(), allowed_local_media_path=str(picture.parent))


def test_host_that_is_not_allowed_is_a_400() -> None:
    with pytest.raises(VLLMValidationError, match="allowed domains"):
        load("http://elsewhere.test/a.png", allowed_media_domains=["example.org"])


class Offline:
    """A connection on which every fetch ends in ``error``."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def async_get_bytes(self, url: str, **options: Any) -> bytes:
        raise self.error


@pytest.mark.parametrize("error", [aiohttp.ClientConnectionError(), answered(404), answered(503), TimeoutError()])
def test_url_that_cannot_be_fetched_is_a_422(error: Exception) -> None:
    with pytest.raises(VLLMUnprocessableEntityError):
        load(URL, connection=Offline(error))
