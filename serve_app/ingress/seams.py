"""All changes that the ingress process makes to vLLM 0.32.0, FastAPI and Pillow.

Functions ``install_…`` stand here unless the table names another place. Each row has a test in ``tests/contracts``
(``test_seams.py`` says which). The table of the engines' processes and of Serve's proxy is in ``serve_app/hooks``.

==============================================  =========================================  ============================
What, and by what                               Why                                        Until
==============================================  =========================================  ============================
BaseRenderer._process_mm_uuids                  A client's `uuid` would be the item's      vLLM can refuse `uuid`.
  install_renderer_guard                        hash, the key of a cache that all clients
                                                share: one picture in the place of
                                                another's.
BaseRenderer._process_multimodal_async          A prompt that does not fit its media is    vLLM answers 400 and says
  install_renderer_guard                        the client's mistake, and the client is    why.
                                                told which.
BaseRenderer.render_chat_async                  Names of media are a tenant's own, told    Media connectors are told
  install_renderer_guard                        apart by the `cache_salt` of the request.  it.
BaseRenderer._process_tokens_async              A prompt is rendered around what encoders  vLLM's renderer has a hook
  install_rendering                             answer, whichever API it comes through.    for items that it does not
                                                                                           process.
MEDIA_CONNECTOR_REGISTRY                        Media are fetched behind our guard,        Stays: vLLM's extension
  install_media                                 counted, and left undecoded for encoders.  point.
AsyncMultiModalContentParser.parse_image        A `uuid` goes to the connector as a name,  vLLM gives it to connectors.
  install_names; parse_video, parse_audio       and is no item's hash.
AsyncMultiModalContentParser.parse_image_pil    A client can only write a text there. A    vLLM takes none from a
  install_names                                 processor of transformers takes it for a   request.
                                                path or a URL and opens it, past every
                                                guard.
vllm.envs.VLLM_MAX_…, Image.MAX_IMAGE_PIXELS    Headers can lie: decoders keep the limits  Stays: settings.
  media/check.py install_limits                 of `media:` too. On encoders as well.
InputProcessor.resolve_watermarking             A beam search asks nothing else of its     vLLM bounds
  guard.py GuardedInputProcessor                engine before its scores can overflow.     `length_penalty`.
MultiModalConfig, CPU_KVCACHE_SPACE             Prompts are rendered around metadata,      Stays: settings.
  server.py ingress_vllm_config                 which clients still cannot send; there is
                                                no device.
FastAPI.router.routes, .user_middleware         Some routes answer for all stages, some    Stays: vLLM's app has one
  server.py make_app                            would reach past them; vLLM's page of      engine.
                                                metrics is not read.
FastAPI.exception_handlers                      Each API has errors in its own shape, and  vLLM does it for all errors.
  server.py _shape_errors                       a body that cannot be read is a 400.
OpenAIServingResponses                          What it stores has a bound, and all        vLLM takes a store from
  responses.py Responses                        ingress replicas find it.                  outside.
==============================================  =========================================  ============================
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.chat_utils import AsyncMultiModalContentParser

from serve_app.config import EPDConfig
from serve_app.ingress.admission import Admission
from serve_app.ingress.media import EPDMediaConnector
from serve_app.ingress.media_names import MediaNames, Named, salt
from serve_app.ingress.peers import Peers
from serve_app.media.check import install_limits
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
    AsyncMultiModalContentParser.parse_image_pil = _parse_decoded
    for name, parse in PARSE.items():
        setattr(AsyncMultiModalContentParser, name, naming(parse))


PARSE = {name: getattr(AsyncMultiModalContentParser, name) for name in ("parse_image", "parse_video", "parse_audio")}
"""vLLM's own methods, through which every part with a URL reaches the connector, `input_audio` too."""

_parse_image_pil = AsyncMultiModalContentParser.parse_image_pil


def naming(parse: Any) -> Any:
    """A method of the parser that passes an item's ``uuid`` with its URL to the connector, and no further."""

    def named(parser: Any, url: Any, uuid: str | None = None) -> None:
        if uuid is not None and (isinstance(url, str) or not url):
            url = Named(url or "", uuid)
        parse(parser, url)

    return named


def _parse_decoded(parser: Any, image_pil: Any, uuid: str | None = None) -> None:
    if not isinstance(image_pil, Image.Image):
        raise VLLMValidationError("`image_pil` cannot be sent in a request: send the image as an `image_url`.")
    _parse_image_pil(parser, image_pil, uuid)
