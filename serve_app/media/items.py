"""Turns an item's bytes into the tensors that an encoder takes, with vLLM's multimodal processor.

Encoders call it for items that come as media, and an ingress for those that no encoder takes.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.exceptions import VLLMClientError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs
from vllm.multimodal.processing.context import TimingContext
from vllm.utils.collection_utils import is_list_of_numbers
from vllm.utils.torch_utils import set_default_torch_num_threads

from serve_app.config import MediaLimits
from serve_app.handoff import shaping
from serve_app.handoff.engine_input import from_engine_input
from serve_app.handoff.errors import BadRequest
from serve_app.handoff.types import Features, Media, Prompt
from serve_app.media.decoding import decode, in_thread

MODALITIES = ("image", "video", "audio")


def declared_fields(renderer: Any) -> Callable[[str], frozenset[str]]:
    """The fields that the model declares as placeholder metadata, by modality."""

    @functools.cache
    def declared(modality: str) -> frozenset[str]:
        processor = renderer.mm_processor
        return frozenset(processor.info.data_parser.placeholder_metadata_fields(modality) if processor else ())

    return declared


class ItemProcessor:
    """vLLM's multimodal processor for items one by one."""

    def __init__(self, renderer: Any, limits: MediaLimits) -> None:
        self.renderer = renderer
        self.declared = declared_fields(renderer)
        self._limits = limits
        self._resolver = PlaceholderMetadataResolver(renderer.model_config)

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities whose items can go as media, by what the model declares (see ``can_place``)."""
        return frozenset(modality for modality in MODALITIES if self.declared(modality))

    async def features(self, media: Media) -> Features:
        """Decode and transform an item. Raises ``BadRequest`` for one that is broken or over a limit."""
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
        """Call a function in the renderer's single thread for multimodal processing.

        vLLM's processors and their tokenizer take one caller at a time, and some call numba, which ends a process that
        enters it from two threads. A 1080p image takes about 20 ms here (``benchmarks.prepare``).
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
        """vLLM's engine input of a prompt, with placeholders expanded. Items without a hash get that of their content."""
        processor = self.renderer.get_mm_processor()
        # Validation would refuse metadata unless clients may send embeddings. Items were counted before.
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

    def can_place(self, features: Features) -> bool:
        """Whether vLLM can render a prompt around the item by its metadata: all that is declared is there, as vLLM reads it
        back. Of MiniCPM-V 4.6, images lack the declared size, and a video has a list of lists."""
        metadata = features.metadata
        complete = self.declared(features.item.modality) <= metadata.keys()
        return complete and all(map(is_list_of_numbers, metadata.values()))

    def without_pixels(self, features: Features) -> Features:
        item = shaping.metadata_only(features.item, self.declared(features.item.modality))
        return msgspec.structs.replace(features, prompt=Prompt([], (item,)))


def why_not_processed(error: Exception) -> str:
    """Text for the client about a prompt or item that vLLM cannot process, such as a truncated prompt.

    Where the model's processor fails, only the error's cause says why: its message lists the data.
    """
    return f"The prompt and its media cannot be processed: {error.__cause__ or error}"
