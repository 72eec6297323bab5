"""The calls that change vLLM's front end in the ingress process. ``docs/seams.md`` lists them with their reasons."""

import copy
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

from anyio import CapacityLimiter, from_thread, to_thread
from PIL import Image
from vllm import envs
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.chat_utils import AsyncMultiModalContentParser, MultiModalContentParser

from serve_app.config import EPDConfig
from serve_app.handoff.errors import BadRequest, Overloaded
from serve_app.ingress.admission import Admission
from serve_app.ingress.media import EPDMediaConnector, begin_item
from serve_app.ingress.media_names import MediaNames, Named, salt
from serve_app.ingress.peers import Peers
from serve_app.ingress.request import current
from serve_app.ingress.vllm_errors import to_vllm_error
from serve_app.media.check import install_limits, refuse_playlist
from serve_app.media.fetch import Fetcher
from serve_app.media.items import why_not_processed

CONNECTOR = "epd"


def install_renderer_guard(renderer: Any) -> None:
    """Refuse names of items outside chats, tell tenants' names apart, and say why a prompt cannot be processed."""
    process_uuids, process = renderer._process_mm_uuids, renderer._process_multimodal_async
    render_chat = renderer.render_chat_async

    def checked(mm_data: Any, mm_data_items: Any, mm_uuid_items: Mapping[str, Any], mm_req_id: str) -> Any:
        if any(uuid is not None for names in mm_uuid_items.values() for uuid in names or ()):
            raise VLLMValidationError("`uuid` of a media item is taken in the messages of a chat only.")
        return process_uuids(mm_data, mm_data_items, mm_uuid_items, mm_req_id)

    async def processed(*args: Any, **kwargs: Any) -> Any:
        try:  # only the prompt and its items can be wrong
            return await process(*args, **kwargs)
        except (AssertionError, ValueError) as error:
            raise VLLMValidationError(why_not_processed(error)) from error

    async def rendered(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        token = salt.set((prompt_extras or {}).get("cache_salt") or "")
        try:
            return await render_chat(*args, prompt_extras=prompt_extras, **kwargs)
        finally:
            salt.reset(token)

    renderer._process_mm_uuids = checked
    renderer._process_multimodal_async = processed
    renderer.render_chat_async = rendered


def install_rendering(renderer: Any, render: Callable[..., Awaitable[Any]]) -> None:
    """Let ``render`` turn tokenized prompts of all APIs into engine inputs."""
    renderer._process_tokens_async = render


def install_media(
    config: EPDConfig,
    undecoded: Collection[str] = (),
    admission: Admission | None = None,
    peers: Peers | None = None,
) -> Fetcher:
    """Make vLLM load media by the rules of a config, in this process. The caller closes the fetcher at the end.

    ``undecoded``: modalities whose items stay ``Media``, for an encoder to decode. ``admission`` counts the media.
    ``peers`` may remember media by name.
    """
    rules, limits = config.media, config.advanced.media
    fetcher = Fetcher(rules, limits, config.timeouts.media_fetch_s)
    names = MediaNames(limits.remember_uuid_bytes, peers)
    make = partial(EPDMediaConnector, rules.allowed_local_path, limits, fetcher, names, frozenset(undecoded), admission)
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(make)
    envs.VLLM_MEDIA_CONNECTOR = CONNECTOR
    install_limits(limits)
    install_names()
    return fetcher


def install_names() -> None:
    """Make the parser of messages refuse images that would bypass the connector, and pass names to the connector."""
    for parser, parse_image_pil in PARSE_DECODED.items():
        parser.parse_image_pil = decoded(parse_image_pil)
    for name, parse in PARSE.items():
        setattr(AsyncMultiModalContentParser, name, naming(parse))


PARSE = {name: getattr(AsyncMultiModalContentParser, name) for name in ("parse_image", "parse_video", "parse_audio")}
"""vLLM's own methods, through which every part with a URL reaches the connector, `input_audio` too."""

PARSE_DECODED: dict[Any, Any] = {
    parser: parser.parse_image_pil for parser in (AsyncMultiModalContentParser, MultiModalContentParser)
}


def naming(parse: Any) -> Any:
    """A method of the parser that passes an item's ``uuid`` with its URL to the connector, and no further."""

    def named(parser: Any, url: Any, uuid: str | None = None) -> None:
        if uuid is not None and (isinstance(url, str) or not url):
            url = Named(url or "", uuid)
        parse(parser, url)

    return named


def decoded(parse: Any) -> Any:
    """A method of a parser that takes images, and not what JSON can have in their place."""

    def parse_decoded(parser: Any, image_pil: Any, uuid: str | None = None) -> None:
        if not isinstance(image_pil, Image.Image):
            raise VLLMValidationError("`image_pil` cannot be sent in a request: send the image as an `image_url`.")
        parse(parser, image_pil, uuid)

    return parse_decoded


def install_speech(admission: Admission) -> None:
    """Count the sounds of `/v1/audio/…`, and refuse playlists: they reach vLLM's decoder without a connector."""

    async def preprocessed(serving: Any, request: Any, audio_data: bytes, request_id: str) -> Any:
        try:
            begin_item(admission)(len(audio_data))
        except (BadRequest, Overloaded) as error:
            raise to_vllm_error(error) from error
        refuse_playlist(audio_data)
        return await _preprocess_speech(serving, request, audio_data, request_id)

    SpeechToTextBaseServing._preprocess_speech_to_text = preprocessed


_preprocess_speech = SpeechToTextBaseServing._preprocess_speech_to_text


def install_pooling() -> None:
    """Have prompts that are pooled rendered as all others are. vLLM renders them without its event loop, or, the media of
    scores, holds it up."""
    PoolingBaseServing._preprocessing = _preprocessed


RENDERED_AT_ONCE = CapacityLimiter(256)
"""Prompts to pool whose media may be fetched and encoded at a time; each has a thread, which waits."""

_preprocessing = PoolingBaseServing._preprocessing


class InThread:
    """A renderer for code that calls it in a thread."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    def render_chat(self, *args: Any, **kwargs: Any) -> Any:
        return from_thread.run(partial(self._renderer.render_chat_async, *args, **kwargs))

    def render_cmpl(self, *args: Any, **kwargs: Any) -> Any:
        return from_thread.run(partial(self._renderer.render_cmpl_async, *args, **kwargs))

    def process_for_engine(self, *args: Any, **kwargs: Any) -> Any:
        return from_thread.run(partial(self._renderer.process_for_engine_async, *args, **kwargs))


async def _preprocessed(serving: Any, io_processor: Any, ctx: Any) -> None:
    made = await to_thread.run_sync(io_processor.get_request_factory_online, ctx, limiter=RENDERED_AT_ONCE)
    prepared = copy.copy(io_processor)
    prepared.renderer = InThread(io_processor.renderer)
    prepared.get_request_factory_online = lambda _: made
    prepared.render_async = partial(to_thread.run_sync, prepared.render, limiter=RENDERED_AT_ONCE)
    await _preprocessing(serving, prepared, ctx)


def install_priorities() -> None:
    """Note the priority of a request where vLLM looks for its model, which it does first: items are encoded before vLLM
    tells its engine."""
    for serving, check in CHECK_MODEL.items():
        serving._check_model = noting(check)


CHECK_MODEL: dict[Any, Any] = {serving: serving._check_model for serving in (BaseServing, PoolingBaseServing)}


def noting(check: Any) -> Any:
    async def checked(serving: Any, request: Any) -> Any:
        if (asked := current.get()) is not None:
            asked.priority = getattr(request, "priority", 0) or 0
        return await check(serving, request)

    return checked


def install_sessions() -> None:
    """Take OpenAI's ``prompt_cache_key`` and Anthropic's ``metadata.user_id`` for the session, where vLLM knows of none."""
    GenerateBaseServing._get_session_id = staticmethod(_session_of)
    AnthropicServingMessages.to_chat_completion_request = staticmethod(_keyed_by_user)


_get_session_id = GenerateBaseServing._get_session_id
_to_chat = AnthropicServingMessages.to_chat_completion_request


def _session_of(request: Any, raw_request: Any) -> str | None:
    """Chats and completions keep fields that vLLM does not know, unchecked."""
    key = _get_session_id(request, raw_request) or getattr(request, "prompt_cache_key", None)
    # JSON can have half of a surrogate pair, which cannot be encoded.
    return (key.encode(errors="replace").decode() or None) if isinstance(key, str) else None


def _keyed_by_user(request: Any, **options: Any) -> Any:
    """The chat completion that vLLM makes of messages. It drops their metadata."""
    chat = _to_chat(request, **options)
    chat.prompt_cache_key = (getattr(request, "metadata", None) or {}).get("user_id")
    return chat
