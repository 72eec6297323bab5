"""Whether an engine fits its part of a card: checked before it loads, with an error that says what would fit.

vLLM would find out after minutes, by loading the weights and running its largest batch. The rule is::

    weights + activations of the largest vision batch + encoder cache + one whole sequence of KV  <=  share of the card

What is unknown counts as 0, so that an engine that fits is never refused; vLLM's own check comes after this one.
"""

from typing import Any

from serve_app.config import Accelerator, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.card_memory import GIB, Share, share_of, shares_of_one
from serve_app.stage import Stage
from serve_app.stages.model_size import Demand, demand_of

CARDS_GIB = {16: 14.7, 24: 22.0, 32: 31.3, 40: 39.4, 48: 44.4, 80: 79.1, 96: 94.5, 141: 139.8, 180: 178.4}
"""Cards by the GB that they are sold with, and the GiB that CUDA gives of each."""

MIN_MODEL_LEN = 2048

WHOLE = 0.92
"""vLLM's default share of a card for an engine that is alone on it."""


def check(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    """Raise ``ConfigError`` if an engine cannot do its part, or does not fit the card of this replica."""
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
