"""Conversions between vLLM's objects and ours: from its renderer, over handles, and to its engine core."""

import copyreg
import threading
import time
from pickle import PickleBuffer
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from serve_app.handoff.errors import BadRequest
from serve_app.handoff.shaping import generates
from serve_app.handoff.types import Item, Prompt, Source, StageRequest


def from_engine_input(engine_input: Any) -> Prompt:
    """The prompt that vLLM's renderer made. Raises ``BadRequest`` for inputs that no stage can hand on."""
    if engine_input["type"] == "token":
        return Prompt(list(engine_input["prompt_token_ids"]), cache_salt=engine_input.get("cache_salt"))
    if engine_input["type"] != "multimodal" or "encoder_prompt_token_ids" in engine_input:
        raise BadRequest(
            f"Prompts of type {engine_input['type']!r} cannot be served disaggregated: only token and multimodal prompts of "
            "decoder-only models can be handed from stage to stage."
        )

    items = [
        Item(modality, item_hash, where.offset, where.length, where.is_embed, data)
        for modality, places in engine_input["mm_placeholders"].items()  # vLLM's order of items that begin at one place
        for item_hash, where, data in zip(
            engine_input["mm_hashes"][modality], places, engine_input["mm_kwargs"][modality], strict=True
        )
    ]
    return Prompt(
        list(engine_input["prompt_token_ids"]),
        tuple(sorted(items, key=lambda item: item.offset)),
        engine_input.get("cache_salt"),
    )


class _Codec(threading.local):
    """vLLM's codec for an item's tensors. It is not thread-safe, so each thread has one."""

    def __init__(self) -> None:
        self.encode = MsgpackEncoder().encode
        self.decode = MsgpackDecoder(tuple[MultiModalKwargsItem | None, torch.Tensor | None]).decode


_codec = _Codec()


def _pack(item: Item) -> tuple[Any, ...]:
    """Pickles an item's tensors as vLLM sends them to an engine's core. PyTorch's own way takes 0.1 ms at either end."""
    frames = [PickleBuffer(frame) for frame in _codec.encode((item.data, item.is_embed))]
    return _unpack, (item.modality, item.hash, item.offset, item.length, frames, item.source)


def _unpack(modality: str, item_hash: str, offset: int, length: int, frames: list[Any], source: Source | None) -> Item:
    # Copies, because PyTorch warns of tensors in read-only memory such as Ray's object store.
    data, is_embed = _codec.decode([frame if isinstance(frame, bytearray) else bytearray(frame) for frame in frames])
    return Item(modality, item_hash, offset, length, is_embed, data, source)


copyreg.pickle(Item, _pack)


def to_core_request(request: StageRequest, processor: Any) -> EngineCoreRequest:
    """The request for an engine core. The ingress has checked and completed its parameters; this adds what only the
    engine's own ``InputProcessor`` (``processor``) knows."""
    options: dict[str, Any] = {"lora_request": None} | request.options
    features = [
        MultiModalFeatureSpec(
            data=item.data,
            modality=item.modality,
            identifier=processor._get_mm_identifier(item.hash, options["lora_request"]),
            mm_position=PlaceholderRange(item.offset, item.length, item.is_embed),
            mm_hash=item.hash,
        )
        for item in request.prompt.items
    ]
    params, samples = request.params, generates(request.params)
    if samples:
        processor.apply_watermarking(params, processor.resolve_watermarking(params))
    return EngineCoreRequest(
        request_id=request.request_id,
        external_req_id=request.request_id,
        prompt_token_ids=request.prompt.token_ids,
        mm_features=features or None,
        sampling_params=params if samples else None,
        pooling_params=None if samples else params,
        arrival_time=time.time(),
        cache_salt=request.prompt.cache_salt,
        data_parallel_rank=None,
        **options,
    )


ENCODE_PARAMS = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
"""An encoder-only engine emits no token: the request ends when its items are encoded."""
