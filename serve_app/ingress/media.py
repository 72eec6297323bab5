"""Media from URLs: vLLM's connector with our fetching, limits and errors.

::

    URL ── data: ── file: ── http(s): ──> bytes      media/fetch.py, with media/address.py
    a name of the client's ─────────────> bytes      media_names.py
    bytes ──> pixels, frames, seconds in bounds?     media/check.py      at the ingress, or on an encoder
    bytes ──> image, frames, samples                 media/decoding.py   likewise (see rendering.py)

vLLM makes a connector per request (``seams.install_media``). Its rules come from our configuration; the folder and domains
that vLLM passes along are not read.
"""

from pathlib import Path
from typing import Any

from anyio import from_thread
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector, MediaIO, VideoMediaIO
from vllm.multimodal.media.connector import MODALITY_IO_MAP

from serve_app.config import MediaLimits
from serve_app.handoff.errors import BadRequest, Overloaded
from serve_app.handoff.types import Media, digest_of
from serve_app.ingress.admission import Admission, Intake
from serve_app.ingress.media_names import Content, MediaNames, Named, key_of
from serve_app.ingress.request import current
from serve_app.ingress.vllm_errors import to_vllm_error
from serve_app.media.check import check_image, check_jpegs
from serve_app.media.decoding import decode, in_thread, to_client_error
from serve_app.media.fetch import Fetcher, Room, decode_base64, read_file, split_data_url, too_large, unlimited

MODALITY_OF: dict[type, str] = {io: modality for modality, io in MODALITY_IO_MAP.items()}


def begin_item(admission: Admission | None) -> Room:
    """Begin an item of the request that is worked on; the result counts the item's bytes until the request ends. Raises
    ``Overloaded``."""
    request = current.get()
    if admission is None or request is None:
        return unlimited
    if request.intake is None:
        request.intake = Intake(admission)
        request.holds.callback(request.intake.close)
    request.intake.begin()
    return request.intake.add


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
            room = begin_item(self._admission)
            if isinstance(url, Named):
                return await self._load_named(url, media_io, room)
            return await in_thread(self._decode, await self._content(url, media_io, room), media_io)
        except (BadRequest, Overloaded) as error:
            raise to_vllm_error(error) from error

    async def _load_named(self, url: Named, media_io: MediaIO[Any], room: Room) -> Any:
        """The remembered item of that name; else the item behind the URL, which is remembered once it is decoded."""
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

    def load_from_url(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: float | None = None) -> Any:
        """As ``load_from_url_async``, for scores: they ask for media in a thread (``seams.install_pooling``). Raises a
        ``RuntimeError`` anywhere else."""
        return from_thread.run(self.load_from_url_async, url, media_io)

    async def _fetch(self, url: str, room: Room) -> bytes:
        """Fetch through vLLM's cache of downloads, where the operator set ``VLLM_MEDIA_CACHE``."""
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
