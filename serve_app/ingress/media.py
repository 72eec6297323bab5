"""Media from URLs: vLLM's connector with our fetching, limits and errors.

::

    URL ── data: ── file: ── http(s): ──> bytes      media_fetch.py, with media_address.py
    a name of the client's ─────────────> bytes      media_names.py
    bytes ──> pixels, frames, seconds in bounds?     media_check.py      at the ingress, or on an encoder
    bytes ──> image, frames, samples                 vLLM's own MediaIO classes      (see from_media.py)

Registered with vLLM under the name ``epd`` and chosen through ``VLLM_MEDIA_CONNECTOR``; vLLM makes a connector per request.
The rules are those of the configuration that it is installed with; what vLLM passes along of them (``roles.shared_args``
gives it the same folder and domains) is not read.
"""

import asyncio
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO, VideoMediaIO
from vllm.multimodal.media.connector import MODALITY_IO_MAP, global_thread_pool
from vllm.renderers.chat_utils import AsyncMultiModalContentParser

from serve_app.config import EPDConfig, MediaLimits
from serve_app.handoff.errors import BadRequest, Overloaded
from serve_app.handoff.types import Media, digest_of
from serve_app.ingress.admission import Admission, Intake
from serve_app.ingress.media_names import Content, MediaNames, Named, key_of, naming
from serve_app.ingress.peers import Peers
from serve_app.ingress.request import current
from serve_app.ingress.vllm_errors import to_vllm_error
from serve_app.media.check import check, check_image, check_jpegs, set_vllm_limits
from serve_app.media.fetch import Fetcher, Room, decode_base64, read_file, split_data_url, too_large, unlimited

CONNECTOR = "epd"
MODALITY_OF: dict[type, str] = {io: modality for modality, io in MODALITY_IO_MAP.items()}


def install(
    config: EPDConfig,
    undecoded: Collection[str] = (),
    admission: Admission | None = None,
    peers: Peers | None = None,
) -> Fetcher:
    """Make vLLM load media by the rules of a config, in this process. The caller closes the fetcher at the end.

    ``undecoded``: modalities whose items are left as ``Media``, for an encoder to decode. ``admission`` counts what comes.
    ``peers`` may remember media by the names that clients gave it.
    """
    rules, limits = config.media, config.advanced.media
    fetcher = Fetcher(rules, limits, config.timeouts.media_fetch_s)
    names = MediaNames(limits.remember_uuid_bytes, peers)
    make = partial(EPDMediaConnector, rules.allowed_local_path, limits, fetcher, names, frozenset(undecoded), admission)
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(make)
    envs.VLLM_MEDIA_CONNECTOR = CONNECTOR
    set_vllm_limits(limits)
    AsyncMultiModalContentParser.parse_image_pil = _parse_decoded
    for name, parse in _PARSE.items():
        setattr(AsyncMultiModalContentParser, name, naming(parse))
    return fetcher


_parse_image_pil = AsyncMultiModalContentParser.parse_image_pil
_PARSE = {name: getattr(AsyncMultiModalContentParser, name) for name in ("parse_image", "parse_video", "parse_audio")}
"""Of these every part with a URL comes to the connector, `input_audio` too."""


def _parse_decoded(parser: Any, image_pil: Any, uuid: str | None = None) -> None:
    """A part of type ``image_pil``, which vLLM hands to the model's processor as it is. A client can only write a text
    there, and a processor of transformers takes a text for a path or a URL and opens it itself, past every guard."""
    if not isinstance(image_pil, Image.Image):
        raise VLLMValidationError("`image_pil` cannot be sent in a request: send the image as an `image_url`.")
    _parse_image_pil(parser, image_pil, uuid)


class EPDMediaConnector(MediaConnector):
    """Loads media for one request. Failures are the client's: 400 or 422, in one sentence."""

    def __init__(
        self,
        folder: Path | None,
        limits: MediaLimits,
        fetcher: Fetcher,
        names: MediaNames,
        undecoded: frozenset[str] = frozenset(),
        admission: Admission | None = None,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        **of_vllm: Any,
    ) -> None:
        super().__init__(media_io_kwargs)
        self._folder = folder
        self._limits = limits
        self._fetcher = fetcher
        self._names = names
        self._undecoded = undecoded
        self._admission = admission

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: float | None = None) -> Any:
        """The media behind a URL. ``timeouts.media_fetch_s`` counts, not vLLM's ``fetch_timeout``."""
        if not isinstance(url, str):
            raise VLLMValidationError("A media URL must be a text.")
        try:
            room = self._room()
            if isinstance(url, Named):
                return await self._load_named(url, media_io, room)
            return await in_thread(self._decode, await self._content(url, media_io, room), media_io)
        except (BadRequest, Overloaded) as error:
            raise to_vllm_error(error) from error

    async def _load_named(self, url: Named, media_io: MediaIO[Any], room: Room) -> Any:
        """The item of that name: what is remembered; else what the URL gives, which is remembered once it could be read."""
        key = key_of(url, MODALITY_OF.get(type(media_io)))
        content = None if url.inline else self._names.get(key)
        if content is None and not len(url):
            content = await self._names.find(url, key)
        if content is None:
            content = await self._content(url, media_io, room)
        else:
            room(len(content.data))
        media = await in_thread(self._decode, content, media_io)
        self._names.remember(url, key, content)
        return media

    async def _content(self, url: str, media_io: MediaIO[Any], room: Room) -> Content:
        match url.partition(":")[0].lower():
            case "data":
                content: Content = await in_thread(self._read_data, url, media_io, room)
                return content
            case "file":
                return Content(await in_thread(read_file, url, self._folder, self._limits, room))
            case "http" | "https":
                return Content(await self._fetch(url, room))
            case _:
                raise VLLMValidationError("A media URL must begin with https:, http:, data: or file:.")

    def _room(self) -> Room:
        """Asks for room for bytes of an item, until its request has ended."""
        request = current.get()
        if self._admission is None or request is None:
            return unlimited
        if request.intake is None:
            request.intake = Intake(self._admission)
            request.holds.callback(request.intake.close)
        request.intake.begin()
        return request.intake.add

    def load_from_url(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: float | None = None) -> Any:
        """vLLM's offline API. No server calls it, and without a fetch of ours it would be a way around the guard."""
        raise NotImplementedError

    async def _fetch(self, url: str, room: Room) -> bytes:
        """Through vLLM's cache of downloads, where the operator set ``VLLM_MEDIA_CACHE``."""
        self._fetcher.check_url(url)
        cached: bytes | None = await in_thread(self._get_cached_bytes, url)
        if cached is not None:
            room(len(cached))
            return cached
        data = await self._fetcher.fetch(url, room)
        await in_thread(self._put_cached_bytes, url, data)
        return data

    def _read_data(self, url: str, media_io: MediaIO[Any], room: Room) -> Content:
        media_type, text = split_data_url(url)
        room(len(text) * 3 // 4)
        if media_type == "video/jpeg" and isinstance(media_io, VideoMediaIO):
            return Content(text.encode(errors="replace"), jpegs=True)
        return Content(decode_base64(text, self._limits))

    def _decode(self, content: Content, media_io: MediaIO[Any]) -> Any:
        data = content.data
        if content.jpegs:
            return self._decode_jpegs(data.decode(), media_io)
        if len(data) > self._limits.max_bytes:
            raise too_large("The media", self._limits)
        modality = MODALITY_OF.get(type(media_io))
        if modality not in self._undecoded:
            return decode(data, media_io, self._limits)
        units = check_image(data, self._limits) if modality == "image" else len(data)
        return Media(modality, data, media_io, units, digest_of(data))

    def _decode_jpegs(self, text: str, media_io: MediaIO[Any]) -> Any:
        check_jpegs(text, self._limits)
        try:
            return media_io.load_base64("video/jpeg", text)
        except Exception as error:
            raise to_client_error(error) from error


def decode(data: bytes, media_io: MediaIO[Any], limits: MediaLimits) -> Any:
    """Raises ``VLLMValidationError`` for media that is broken or over a limit."""
    try:
        return check(data, media_io, limits).load_bytes(data)
    except Exception as error:
        raise to_client_error(error) from error


async def in_thread(function: Any, *args: Any) -> Any:
    """In vLLM's pool for media (``VLLM_MEDIA_LOADING_THREAD_COUNT``)."""
    return await asyncio.get_running_loop().run_in_executor(global_thread_pool, function, *args)


VLLM_LIMITS = {
    "VLLM_MAX_IMAGE_PIXELS": "`advanced.media.max_pixels`",
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": "`advanced.media.max_seconds`",
}
"""vLLM's names for limits of ours."""


def to_client_error(error: Exception) -> VLLMError:
    """Whatever decoding raises is about the client's bytes: nothing else went in."""
    if isinstance(error, VLLMError):
        return error
    # vLLM's ValueErrors are sentences; other libraries' texts may be about this process.
    text = re.sub(r" ?<[^<>]* object at 0x[0-9a-f]+>", "", str(error)) if isinstance(error, ValueError) else ""
    for theirs, ours in VLLM_LIMITS.items():
        text = text.replace(theirs, ours)
    return VLLMValidationError(text or "Cannot read the media: it is in no known format, or broken.")
