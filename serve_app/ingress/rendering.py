"""The way from media: an item goes to an encoder as the bytes that the client sent, not as processed tensors.

A 1080p image is 0.3 MB as media and 13 MB as tensors, and making those is work. So the ingress only fetches the bytes (one
guard, one fetch however often an item is tried). An encoder decodes, transforms and encodes them; it answers with the
item's name and the few fields that size its placeholder range, and vLLM renders the prompt around those, as it does on any
consumer of embeddings.

::

    media.py ── Media ──> FromMedia.render ── MediaRequest ──> encoder: ItemProcessor.features, engine
                                           <── EncodeReply ──
                          vLLM's processor: placeholders from metadata ──> EPDClient.generate

For models that declare such fields (``MultiModalDataParser.embedding_fields``); items of others are processed here, by vLLM.
"""

import asyncio
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.exceptions import VLLMClientError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs
from vllm.multimodal.processing.context import TimingContext
from vllm.renderers.chat_utils import _get_embeds_data
from vllm.utils.torch_utils import set_default_torch_num_threads

from serve_app.config import MediaLimits
from serve_app.handoff import shaping
from serve_app.handoff.engine_input import SourcedItem, from_engine_input
from serve_app.handoff.errors import BadRequest
from serve_app.handoff.types import Features, Media, Prompt, Source, keyed
from serve_app.ingress.encoding import Replies
from serve_app.ingress.guard import why_not_processed
from serve_app.ingress.media import decode, in_thread

logger = logging.getLogger("ray.serve")

MODALITIES = ("image", "video", "audio")


def declared_fields(renderer: Any) -> Callable[[str], frozenset[str]]:
    """By modality: the fields that the model declares as placeholder metadata; none for models that declare none."""

    @functools.cache
    def declared(modality: str) -> frozenset[str]:
        processor = renderer.mm_processor
        return frozenset(processor.info.data_parser.placeholder_metadata_fields(modality) if processor else ())

    return declared


class ItemProcessor:
    """vLLM's multimodal processor for items one by one; on an encoder, and on the ingress for those no encoder takes."""

    def __init__(self, renderer: Any, limits: MediaLimits) -> None:
        self.renderer = renderer
        self.declared = declared_fields(renderer)
        self._limits = limits
        self._resolver = PlaceholderMetadataResolver(renderer.model_config)

    @property
    def modalities(self) -> frozenset[str]:
        """Those whose items can go as media."""
        return frozenset(modality for modality in MODALITIES if self.declared(modality))

    async def features(self, media: Media) -> Features:
        """Decode and transform an item. Raises ``BadRequest`` where it is broken or over a limit."""
        try:
            features: Features = await self.in_turn(self._process, media, await self.decoded(media))
            return features
        except VLLMClientError as error:
            raise BadRequest(str(error)) from error
        except (AssertionError, ValueError, TypeError, OverflowError) as error:
            raise BadRequest(why_not_processed(error)) from error

    async def decoded(self, media: Media) -> Any:
        return await in_thread(decode, media.data, media.io, self._limits)

    async def in_turn(self, function: Callable[..., Any], *args: Any) -> Any:
        """In the renderer's single thread for multimodal processing: vLLM's processors take one caller at a time.

        vLLM warms them up there; some call numba, which ends a process that two threads enter it from; and the tokenizer
        inside is lent to one caller. A 1080p image spends about 20 ms here (``benchmarks.prepare``): more images a second
        want more replicas.
        """
        return await asyncio.get_running_loop().run_in_executor(self.renderer._mm_executor, function, *args)

    def apply(
        self,
        token_ids: list[int],
        mm_data: Mapping[str, Any],
        hashes: dict[str, list[str]],
        processor_kwargs: dict[str, Any],
        io_kwargs: dict[str, Any],
    ) -> Any:
        """vLLM's engine input of a prompt, its placeholders expanded. Items without a hash get that of their content."""
        processor = self.renderer.get_mm_processor()
        # Not validated: that would refuse metadata unless clients may send embeddings, and items were counted before.
        items = processor.info.parse_mm_data(mm_data, validate=False)
        inputs = ProcessorInputs(
            token_ids, items, hashes, hf_processor_mm_kwargs=processor_kwargs, media_io_kwargs=io_kwargs
        )
        with set_default_torch_num_threads():
            return processor.apply(inputs, TimingContext(enabled=False))

    def _process(self, media: Media, decoded: Any) -> Features:
        processor = self.renderer.get_mm_processor()
        text = processor.dummy_inputs.get_dummy_text({media.modality: 1})
        tokens = self.renderer.get_tokenizer().encode(text, add_special_tokens=False)
        prompt = from_engine_input(
            self.apply(tokens, {media.modality: [decoded]}, {}, media.processor_kwargs, media.io_kwargs)
        )
        alone = shaping.salted(shaping.for_encoder(prompt, 0), media.salt)
        (item,) = alone.items
        feature = MultiModalFeatureSpec(
            data=item.data,
            modality=item.modality,
            identifier=item.hash,
            mm_position=PlaceholderRange(0, item.length, item.is_embed),
        )
        metadata = collect_ec_item_metadata([feature], self._resolver)[item.hash]["metadata"]
        return Features(alone, metadata)

    def without_pixels(self, features: Features) -> Features:
        item = shaping.metadata_only(features.item, self.declared(features.item.modality))
        return msgspec.structs.replace(features, prompt=Prompt([], (item,)))

    def place(self, prompt: Mapping[str, Any], items: dict[str, list[tuple[Media, Features]]]) -> Any:
        """The engine input of a prompt, rendered around items by their metadata."""
        processor = self.renderer.get_mm_processor()
        data = dict(prompt["multi_modal_data"])
        hashes: dict[str, list[str]] = {}
        for modality, those in items.items():
            data[modality] = _get_embeds_data(modality, [features.metadata for _, features in those], processor)
            hashes[modality] = [features.item.hash for _, features in those]
        placed = self.apply(
            prompt["prompt_token_ids"],
            data,
            hashes,
            dict(prompt.get("mm_processor_kwargs") or {}),
            dict(prompt.get("media_io_kwargs") or {}),
        )
        for modality, those in items.items():
            lengths = [where.length for where in placed["mm_placeholders"][modality]]
            if lengths != [features.item.length for _, features in those]:
                raise RuntimeError(
                    f"{modality} items of {lengths} placeholders by their metadata differ from the items"
                )
            placed["mm_hashes"][modality] = hashes[modality]  # arguments of the request are in them already
        return placed


class FromMedia:
    """Renders the prompts of an ingress replica around the encoders' answers.

    ``encode``: asks encoders for distinct items. ``salted``: items of tenants are kept apart by their ``cache_salt``.
    """

    def __init__(
        self, processor: ItemProcessor, encode: Callable[[list[Media]], Awaitable[Replies]], salted: bool
    ) -> None:
        self._processor = processor
        self._encode = encode
        self._salted = salted
        # The seam of every API: vLLM's renderer calls it for each prompt of a request.
        self._by_vllm = processor.renderer._process_tokens_async
        processor.renderer._process_tokens_async = self.render

    async def render(self, prompt: dict[str, Any], *, skip_mm_cache: bool = False) -> Any:
        """The engine input of a tokenized prompt. ``skip_mm_cache``: vLLM only counts its tokens; no encoder is asked."""
        data = {modality: items for modality, items in (prompt.get("multi_modal_data") or {}).items() if items}
        raw = {m: items for m, items in data.items() if isinstance(items, list) and any(map(is_media, items))}
        if not raw:
            return await self._by_vllm(prompt, skip_mm_cache=skip_mm_cache)
        kwargs = dict(prompt.get("mm_processor_kwargs") or {})
        # A video that came as JPEGs (`data:video/jpeg`) is decoded already, whatever stands beside it.
        mixed = not all(map(is_media, itertools.chain(*raw.values())))
        if mixed or skip_mm_cache or kwargs.get("use_audio_in_video") or prompt.get("_prompt_embeds"):
            return await self._processed_here(prompt, raw, skip_mm_cache)

        salt = prompt.get("cache_salt") if self._salted else None
        io_kwargs = dict(prompt.get("media_io_kwargs") or {})
        media = {
            modality: [
                keyed(msgspec.structs.replace(each, processor_kwargs=kwargs, io_kwargs=io_kwargs, salt=salt))
                for each in items
            ]
            for modality, items in raw.items()
        }
        distinct = {each.key: each for items in media.values() for each in items}
        replies = await self._encode(list(distinct.values()))
        features = {key: reply.features for key, reply in replies.items() if reply.features is not None}
        for key in distinct.keys() - features.keys():
            features[key] = await self._processor.features(distinct[key])
        items = {m: [(each, features[each.key]) for each in those] for m, those in media.items()}
        try:
            placed = await self._processor.in_turn(self._processor.place, prompt, items)
        except Exception as error:
            # vLLM says what is wrong, or does better. The encoders' work is not lost: items keep their names.
            logger.warning(f"a prompt is rendered from its media, for its metadata did not do: {error!r}")
            return await self._processed_here(prompt, raw, skip_mm_cache)
        for modality, those in items.items():
            placed["mm_kwargs"][modality] = [
                SourcedItem(of.item.data, Source(each, replies.get(each.key))) for each, of in those
            ]
        for key in ("prompt", "cache_salt"):
            if prompt.get(key):
                placed[key] = prompt[key]
        return placed

    async def _processed_here(self, prompt: dict[str, Any], raw: dict[str, list[Any]], skip_mm_cache: bool) -> Any:
        """By vLLM, from decoded media, as if no encoder took any."""

        async def decoded_of(item: Any) -> Any:
            return await self._processor.decoded(item) if is_media(item) else item

        decoded = {modality: [await decoded_of(item) for item in items] for modality, items in raw.items()}
        whole = {**prompt, "multi_modal_data": {**prompt["multi_modal_data"], **decoded}}
        return await self._by_vllm(whole, skip_mm_cache=skip_mm_cache)


def is_media(item: Any) -> bool:
    return isinstance(item, Media)
