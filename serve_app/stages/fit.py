"""Whether an engine fits its part of a card: checked before it loads, with an error that says what would fit.

vLLM would find out after minutes, by loading the weights and running its largest batch. The rule is::

    weights + activations of the largest vision batch + encoder cache + one whole sequence of KV  <=  share of the card

What nobody knows before the weights are read counts as 0, so that an engine that fits is never refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.config import Accelerator, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.card_memory import GIB, Share, share_of, shares_of_one
from serve_app.stage import Stage

CARDS_GIB = {16: 14.7, 24: 22.0, 32: 31.3, 40: 39.4, 48: 44.4, 80: 79.1, 96: 94.5, 141: 139.8, 180: 178.4}
"""Cards by the GB that they are sold with, and the GiB that CUDA gives of each."""

MIN_MODEL_LEN = 2048

WHOLE = 0.92
"""vLLM's default share of a card for an engine that is alone on it."""

GRAPHS_GIB = 0.4
"""An estimate of the CUDA graphs, sampler's buffers and workspaces of an engine with a language model."""


@dataclass(frozen=True)
class Demand:
    """What one engine needs on each of its cards, in bytes; sizes of items are in tokens of the language model."""

    weights: int
    tokens_per_item: Mapping[str, int]
    """Tokens of the largest item of each modality, not limited by ``max_model_len``."""
    max_model_len: int
    batch_tokens: int
    """Least size of the vision batch and of the encoder cache (``max_num_batched_tokens``)."""
    bytes_per_vision_token: int
    """Activations of the tower; 0: unknown."""
    bytes_per_embedding: int
    bytes_per_kv_token: int
    """0: an encoder."""

    @property
    def largest_item(self) -> int:
        return min(max(self.tokens_per_item.values(), default=0), self.max_model_len)

    @property
    def bytes(self) -> int:
        cache = max(self.largest_item, self.batch_tokens) if self.tokens_per_item else 0
        # An encoder's batch is as large as its budget; other engines are profiled with at least one largest item.
        need = self.weights + cache * (self.bytes_per_vision_token + self.bytes_per_embedding)
        if self.bytes_per_kv_token:
            need += self.max_model_len * self.bytes_per_kv_token + int(GRAPHS_GIB * GIB)
        return need

    def at(self, max_model_len: int) -> "Demand":
        return replace(self, max_model_len=min(max_model_len, self.max_model_len))

    def without(self, modality: str) -> "Demand":
        kept = {name: tokens for name, tokens in self.tokens_per_item.items() if name != modality}
        return replace(self, tokens_per_item=kept)


def demand_of(vllm_config: Any) -> Demand:
    """The demand of an engine's config, by vLLM's own budget of items. Takes a second of CPU."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    items: dict[str, int] = {}
    if model.is_multimodal_model:
        items = dict(MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False).mm_max_toks_per_item)
    is_encoder = vllm_config.is_mm_encoder_only
    whole, tower = weights_bytes(model)
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    return Demand(
        weights=(tower if is_encoder else whole) // ranks,
        tokens_per_item=items,
        max_model_len=model.max_model_len,
        batch_tokens=vllm_config.scheduler_config.max_num_batched_tokens if is_encoder else 0,
        bytes_per_vision_token=bytes_per_vision_token(model.hf_config, parallel.tensor_parallel_size),
        bytes_per_embedding=model.get_inputs_embeds_size() * 2,
        bytes_per_kv_token=0 if is_encoder else kv_bytes_per_token(vllm_config),
    )


def bytes_per_vision_token(hf_config: Any, tensor_parallel_size: int) -> int:
    """Live activations of one vision block per output token, for towers that merge patches (Qwen-VL); else 0.

    Three rows of the hidden size (the residual, attention's input and output) and three of the gated MLP's, in bf16, and the
    patch's own pixels; counted allocation by allocation on vLLM's CUDA path: 29,376 bytes per patch for Qwen2.5-VL-3B.
    """
    vision: Any = getattr(hf_config, "vision_config", None)
    if not getattr(vision, "spatial_merge_size", 0) or not getattr(vision, "hidden_size", 0):
        return 0
    channels: int = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    pixels = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    rows = 6 * vision.hidden_size + 6 * vision.intermediate_size // tensor_parallel_size
    return int(vision.spatial_merge_size**2 * (rows + pixels))


def kv_bytes_per_token(vllm_config: Any) -> int:
    """KV cache of the layers with full attention. Layers with a window or a state hold less and are left out."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    kinds = getattr(model.hf_text_config, "layer_types", None) or []
    layers = model.get_num_layers(vllm_config.parallel_config)
    if kinds:
        layers = layers * sum(kind == "full_attention" for kind in kinds) // len(kinds)
    elif model.get_sliding_window() is not None:
        layers = 0
    size = 1 if "8" in str(cache.cache_dtype) else model.dtype.itemsize
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    return int(layers * heads * model.get_head_size() * size * (1 if model.use_mla else 2))


def weights_bytes(model_config: Any) -> tuple[int, int]:
    """Bytes of the whole model and of its towers; 0: unknown. They come from the files on this node, if any, else from the
    model's class in transformers, made without memory."""
    params, tower = parameters(model_config.hf_config)
    size = model_config.dtype.itemsize
    folder = Path(model_config.model)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if files:
        return files, tower * size
    quantized = model_config.quantization is not None or getattr(model_config.hf_config, "quantization_config", None)
    return (0 if quantized else params * size), tower * size


def parameters(hf_config: Any) -> tuple[int, int]:
    """Numbers of parameters: all, and those outside the language model; (0, 0) where transformers lacks the model."""
    import torch
    import transformers

    made = getattr(transformers, (hf_config.architectures or [""])[0], None)
    if made is None:
        return 0, 0
    try:
        with torch.device("meta"):
            model = made(hf_config)
        model.tie_weights()
        text = [model.get_decoder(), model.get_output_embeddings()]
    except Exception:  # a config that only vLLM understands, a model without a decoder
        return 0, 0
    language = {id(weight) for part in text if part is not None for weight in part.parameters()}
    counts = {id(weight): weight.numel() for weight in model.parameters()}
    return sum(counts.values()), sum(count for key, count in counts.items() if key not in language)


def check(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    """Raise ``ConfigError`` if an engine cannot do its part, or does not fit the card of this replica."""
    if vllm_config.model_config.is_encoder_decoder:
        raise ConfigError(
            f"{config.model} is an encoder-decoder model, whose cross-attention no stage can hand on: serve it with "
            "`vllm serve`, or use a decoder-only model (of speech: Qwen3-ASR, Qwen2-Audio)."
        )
    if stage is Stage.ENCODER and not vllm_config.model_config.supports_multimodal_inputs:
        raise ConfigError(
            f"nothing is left to encode: `media.limits` allows no item of {config.model}, or it is a model of text alone. "
            "Raise a limit, or set `encoder: null`."
        )
    check_encoder_options(config, stage, vllm_config)
    if config.accelerator is Accelerator.CUDA:
        check_card(config, stage, vllm_config)


def check_card(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    from vllm.platforms import current_platform

    card_gib = current_platform.get_device_total_memory() / GIB
    if vllm_config.cache_config.kv_cache_memory_bytes is None:  # else the user has done the arithmetic
        check_fit(config, stage, demand_of(vllm_config), card_gib, vllm_config.cache_config.gpu_memory_utilization)
    if config.engine_args.get("dtype", "auto") == "auto":
        check_precision(vllm_config.model_config, current_platform.get_device_name())


def check_fit(config: EPDConfig, stage: Stage, demand: Demand, card_gib: float, utilization: float) -> None:
    """``utilization``: the engine's ``gpu_memory_utilization``."""
    claimed = config.stages[stage].gpus_per_replica or 1.0
    room = room_gib(stage, claimed, card_gib, utilization)
    if demand.bytes <= room * GIB:
        return
    of = f"{claimed:g} of {card_gib:.1f} GiB of this card" if claimed < 1 else f"{card_gib:.1f} GiB of this card"
    fits = "; ".join(alternatives(config, stage, demand, card_gib, utilization)) or "a smaller model or more cards"
    raise ConfigError(
        f"{stage} of {config.model} needs about {demand.bytes / GIB:.1f} GiB (weights {demand.weights / GIB:.1f}, "
        f"`max_model_len` {demand.max_model_len}) and may use {room:.1f} GiB ({of}). What would fit: {fits}."
    )


def room_gib(stage: Stage, claimed: float, card_gib: float, utilization: float | None = None) -> float:
    """What an engine may use of its card. ``utilization``: its ``gpu_memory_utilization``, which an encoder does not heed;
    None: the default."""
    share = share_of(stage, claimed, card_gib) if claimed < 1 else Share(WHOLE, WHOLE)
    return card_gib * (share.cap if stage is Stage.ENCODER else utilization or share.utilization)


def alternatives(config: EPDConfig, stage: Stage, demand: Demand, card_gib: float, utilization: float) -> list[str]:
    """Changes of the config each of which would make the engine fit; last, the smallest card that it fits."""
    claimed = config.stages[stage].gpus_per_replica or 1.0
    found = []
    if config.prefill is not None and claimed < 1 and stage is not Stage.ENCODER:
        left = [each for each in config.stages if each is not Stage.PREFILL]
        alone = shares_of_one(left, card_gib)[Stage.DECODE]
        if demand.bytes <= room_gib(Stage.DECODE, alone, card_gib) * GIB:
            found.append("`prefill: null` (decode prefills)")
    limit = room_gib(stage, claimed, card_gib, utilization) * GIB
    length = 1 << (demand.max_model_len - 1).bit_length() - 1
    while length >= MIN_MODEL_LEN and demand.at(length).bytes > limit:
        length //= 2
    if length >= MIN_MODEL_LEN:
        found.append(f"`engine_args: {{max_model_len: {length}}}`")
    if "video" in demand.tokens_per_item and demand.without("video").bytes <= limit:
        found.append("`media: {limits: {video: 0}}`")
    for name, gib in CARDS_GIB.items():
        room = room_gib(stage, claimed, gib, None if claimed < 1 else utilization)
        if gib > card_gib and demand.bytes <= room * GIB:
            found.append(f"a card of {name} GB")
            break
    return found


def check_precision(model_config: Any, card: str) -> None:
    """Refuse a card without bfloat16 unless a precision is configured: vLLM would take float16 on this card alone, and no
    other engine would find this one's embeddings, or take its KV blocks."""
    import torch

    if getattr(model_config.hf_config, "dtype", None) is torch.bfloat16 and model_config.dtype is torch.float16:
        raise ConfigError(
            f"{card} has no bfloat16, so that this engine alone would run in float16: set "
            "`engine_args: {dtype: float16}` for all stages, or keep this stage off such cards (`label_selector`)."
        )


def check_encoder_options(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    """Refuse options that the model does not support, which vLLM would leave out with a line in its log."""
    model = vllm_config.model_config
    asked = config.engine_args | config.stages[stage].engine_args
    if asked.get("mm_encoder_tp_mode") == "data" and model.multimodal_config.mm_encoder_tp_mode != "data":
        raise ConfigError(
            f"`mm_encoder_tp_mode: data` of {stage}: vLLM cannot spread the items of {config.model}; leave it out."
        )
    if not vllm_config.compilation_config.cudagraph_mm_encoder:
        return
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.model_executor.models.interfaces import supports_encoder_cudagraph

    if not supports_encoder_cudagraph(get_model_cls(model)):
        raise ConfigError(
            f"`cudagraph_mm_encoder` of {stage}: vLLM has no CUDA graphs for the encoder of {config.model}; leave it out."
        )
