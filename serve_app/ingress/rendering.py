"""Renders prompts around items that go to an encoder as the bytes that the client sent, not as processed tensors.

A 1080p image is 0.3 MB as media and 13 MB as tensors, which are costly to make. So the ingress only fetches the bytes, once.
An encoder decodes, transforms and encodes them. It answers with the item's hash and the few fields that size its placeholder
range, and vLLM renders the prompt around those, as it does on any consumer of embeddings.

::

    media.py ── Media ──> FromMedia.render ── MediaRequest ──> encoder: ItemProcessor.features, engine
                                           <── EncodeReply ──
                          vLLM's processor: placeholders from metadata ──> EPDClient.generate

It takes a model that declares such fields (``MultiModalDataParser.embedding_fields``); vLLM processes items of others here.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from vllm.renderers.chat_utils import _get_embeds_data

from serve_app.handoff.types import Features, Media, Source, keyed
from serve_app.ingress.encoding import Replies
from serve_app.ingress.request import Request, current
from serve_app.media.items import ItemProcessor

logger = logging.getLogger("ray.serve")


class FromMedia:
    """Renders the prompts of an ingress replica around the encoders' answers.

    ``render`` replaces a method of vLLM's renderer (``seams.install_rendering``). ``encode`` asks encoders for distinct
    items. ``salted``: the ``cache_salt`` keeps items of tenants apart.
    """

    def __init__(
        self, processor: ItemProcessor, encode: Callable[[Request, list[Media]], Awaitable[Replies]], salted: bool
    ) -> None:
        self._processor = processor
        self._encode = encode
        self._salted = salted
        self._by_vllm = processor.renderer._process_tokens_async
        self._unplaced = set[str]()
        """Modalities of which an item could not be placed by its metadata."""

    async def render(self, prompt: dict[str, Any], *, skip_mm_cache: bool = False) -> Any:
        """The engine input of a tokenized prompt. ``skip_mm_cache``: vLLM only counts its tokens; no encoder is asked."""
        given = (prompt.get("multi_modal_data") or {}).items()
        data = {modality: each for modality, of in given if (each := listed(of))}
        raw = {m: items for m, items in data.items() if any(map(is_media, items))}
        if not raw:
            return await self._by_vllm(prompt, skip_mm_cache=skip_mm_cache)
        request = current.get()  # without one nothing could keep what encoders answer
        if request is None or skip_mm_cache or not stand_alone(prompt, raw) or self._unplaced & raw.keys():
            return await self._processed_here(prompt, raw, skip_mm_cache)
        media = {modality: [self._keyed(each, prompt) for each in items] for modality, items in raw.items()}
        distinct = {each.key: each for items in media.values() for each in items}
        replies = await self._encode(request, list(distinct.values()))
        features = {key: reply.features for key, reply in replies.items() if reply.features is not None}
        for key in distinct.keys() - features.keys():
            features[key] = await self._processor.features(distinct[key])
        items = {m: [(each, features[each.key]) for each in those] for m, those in media.items()}
        if unplaced := {m for m, those in items.items() if not all(self._processor.can_place(of) for _, of in those)}:
            logger.warning(
                f"{sorted(unplaced)} go to encoders as tensors from now on, for vLLM cannot place such items"
            )
            self._unplaced |= unplaced
            return await self._processed_here(prompt, raw, skip_mm_cache)
        try:
            placed = await self._processor.in_turn(self._place, prompt, items)
        except Exception as error:
            # vLLM succeeds, or says what is wrong. The encoders' work is not lost, for items keep their hashes.
            logger.warning(f"a prompt is rendered from its media, for its metadata did not do: {error!r}")
            return await self._processed_here(prompt, raw, skip_mm_cache)
        for modality, those in items.items():
            placed["mm_kwargs"][modality] = [of.item.data for _, of in those]
            request.sources.put((of.item.hash, Source(each, replies.get(each.key))) for each, of in those)
        for key in ("prompt", "cache_salt"):
            if prompt.get(key):
                placed[key] = prompt[key]
        return placed

    def _keyed(self, media: Media, prompt: Mapping[str, Any]) -> Media:
        kwargs, io_kwargs = (dict(prompt.get(name) or {}) for name in ("mm_processor_kwargs", "media_io_kwargs"))
        salt = prompt.get("cache_salt") if self._salted else None
        return keyed(msgspec.structs.replace(media, processor_kwargs=kwargs, io_kwargs=io_kwargs, salt=salt))

    def _place(self, prompt: Mapping[str, Any], items: dict[str, list[tuple[Media, Features]]]) -> Any:
        """The engine input of a prompt, rendered around items by their metadata."""
        processor = self._processor.renderer.get_mm_processor()
        data = dict(prompt["multi_modal_data"])
        hashes: dict[str, list[str]] = {}
        for modality, those in items.items():
            data[modality] = _get_embeds_data(modality, [features.metadata for _, features in those], processor)
            hashes[modality] = [features.item.hash for _, features in those]
        placed = self._processor.apply(
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
            placed["mm_hashes"][modality] = hashes[modality]  # they cover the request's arguments already
        return placed

    async def _processed_here(self, prompt: dict[str, Any], raw: dict[str, list[Any]], skip_mm_cache: bool) -> Any:
        """The engine input that vLLM makes from decoded media, as if no encoder took any."""
        decoded = {
            modality: [await self._processor.decoded(item) if is_media(item) else item for item in items]
            for modality, items in raw.items()
        }
        whole = prompt | {"multi_modal_data": prompt["multi_modal_data"] | decoded}
        return await self._by_vllm(whole, skip_mm_cache=skip_mm_cache)


def listed(items: Any) -> list[Any]:
    """The items of a modality, of which vLLM's speech routes pass one by itself."""
    return items if isinstance(items, list) else [] if items is None else [items]


def is_media(item: Any) -> bool:
    return isinstance(item, Media)


def stand_alone(prompt: Mapping[str, Any], items: Mapping[str, list[Any]]) -> bool:
    """Whether a prompt can be rendered around its items: each came as media (a `data:video/jpeg` URL does not), and none is
    interleaved with another."""
    together = (prompt.get("mm_processor_kwargs") or {}).get("use_audio_in_video") or prompt.get("_prompt_embeds")
    return not together and all(map(is_media, itertools.chain(*items.values())))
