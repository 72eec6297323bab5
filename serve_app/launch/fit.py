"""Whether an engine fits its part of a card, told before it loads: in one sentence, with what would fit.

vLLM finds out by loading the weights and running its largest batch, after minutes. What decides is arithmetic::

    weights + activations of the largest vision batch + encoder cache + one whole sequence of KV  <=  share of the card

Everything unknown counts as nothing, so that what would run is never refused; vLLM's own check comes after this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import Accelerator, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.card_memory import GIB, share_of, shares_of_one
from serve_app.stage import Stage

GRAPHS_GIB = 0.4
"""CUDA graphs, the sampler's buffers and workspaces of an engine that has a language model: an estimate."""

CARDS_GIB = {16: 14.7, 24: 22.0, 32: 31.3, 40: 39.4, 48: 44.4, 80: 79.1, 96: 94.5, 141: 139.8, 180: 178.4}
"""Cards as they are sold, and the GiB that CUDA gives of each."""

MIN_MODEL_LEN = 2048

WHOLE = 0.92
"""vLLM's default share of a card that an engine has for itself."""


@dataclass(frozen=True)
class Demand:
    """What one engine wants of each of its cards, in bytes; item sizes in tokens of the language model."""

    weights: int
    tokens_per_item: Mapping[str, int]
    """The largest item of each modality that takes part, whatever the context."""
    max_model_len: int
    batch_tokens: int
    """The least that vLLM makes of the vision batch and of the encoder cache (``max_num_batched_tokens``)."""
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
        # An encoder's batch is as large as its budget; others are profiled with one largest item, or as many as fill it.
        need = self.weights + cache * (self.bytes_per_vision_token + self.bytes_per_embedding)
        if self.bytes_per_kv_token:
            need += self.max_model_len * self.bytes_per_kv_token + int(GRAPHS_GIB * GIB)
        return need

    def at(self, max_model_len: int) -> "Demand":
        return replace(self, max_model_len=min(max_model_len, self.max_model_len))

    def without(self, modality: str) -> "Demand":
        kept = {name: tokens for name, tokens in self.tokens_per_item.items() if name != modality}
        return replace(self, tokens_per_item=kept)


def check(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    """Raise ``ConfigError`` where an engine cannot do its part, or does not fit the card of this replica."""
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

    from serve_app.launch.model_size import demand_of

    card_gib = current_platform.get_device_total_memory() / GIB
    if vllm_config.cache_config.kv_cache_memory_bytes is None:  # else the user has done the arithmetic
        check_fit(config, stage, demand_of(vllm_config), card_gib, vllm_config.cache_config.gpu_memory_utilization)
    if config.engine_args.get("dtype", "auto") == "auto":
        check_precision(vllm_config.model_config, current_platform.get_device_name())


def check_fit(config: EPDConfig, stage: Stage, demand: Demand, card_gib: float, utilization: float) -> None:
    """``utilization``: the engine's ``gpu_memory_utilization``, which is no bound of an encoder's."""
    claimed = config.stages[stage].gpus_per_replica or 1.0
    room = room_of(stage, claimed, card_gib, utilization)
    if demand.bytes <= room * card_gib * GIB:
        return
    of = f"{claimed:g} of {card_gib:.1f} GiB of this card" if claimed < 1 else f"{card_gib:.1f} GiB of this card"
    fits = "; ".join(alternatives(config, stage, demand, card_gib, room)) or "a smaller model or more cards"
    raise ConfigError(
        f"{stage} of {config.model} needs about {demand.bytes / GIB:.1f} GiB (weights {demand.weights / GIB:.1f}, "
        f"`max_model_len` {demand.max_model_len}) and may use {room * card_gib:.1f} GiB ({of}). What would fit: {fits}."
    )


def room_of(stage: Stage, claimed: float, card_gib: float, utilization: float | None = None) -> float:
    """The fraction of its card that an engine may use. ``utilization``: its own, or None for what it gets by itself."""
    share = share_of(stage, claimed, card_gib)
    if stage is Stage.ENCODER:
        return share.cap if claimed < 1 else WHOLE
    return utilization or (share.utilization if claimed < 1 else WHOLE)


def alternatives(config: EPDConfig, stage: Stage, demand: Demand, card_gib: float, room: float) -> list[str]:
    """Changes of the config of which each makes it fit by the same arithmetic; last, the card that would hold it."""
    claimed = config.stages[stage].gpus_per_replica or 1.0
    found = []
    if config.prefill is not None and claimed < 1 and stage is not Stage.ENCODER:
        left = [each for each in config.stages if each is not Stage.PREFILL]
        alone = shares_of_one(left, card_gib)[Stage.DECODE]
        if demand.bytes <= room_of(Stage.DECODE, alone, card_gib) * card_gib * GIB:
            found.append("`prefill: null` (decode prefills)")
    limit = room * card_gib * GIB
    length = 1 << (demand.max_model_len - 1).bit_length() - 1
    while length >= MIN_MODEL_LEN and demand.at(length).bytes > limit:
        length //= 2
    if length >= MIN_MODEL_LEN:
        found.append(f"`engine_args: {{max_model_len: {length}}}`")
    if "video" in demand.tokens_per_item and demand.without("video").bytes <= limit:
        found.append("`media: {limits: {video: 0}}`")
    for name, gib in CARDS_GIB.items():
        of_that = room_of(stage, claimed, gib) if claimed < 1 else room
        if gib > card_gib and demand.bytes <= of_that * gib * GIB:
            found.append(f"a card of {name} GB")
            break
    return found


def check_precision(model_config: Any, card: str) -> None:
    """Refuse a card that has no bfloat16 where nobody has chosen another precision. vLLM would take float16 on this card
    alone, and no other engine would find this one's embeddings, or take its KV blocks."""
    import torch

    if getattr(model_config.hf_config, "dtype", None) is torch.bfloat16 and model_config.dtype is torch.float16:
        raise ConfigError(
            f"{card} has no bfloat16, so that this engine alone would run in float16: set "
            "`engine_args: {dtype: float16}` for all stages, or keep this stage off such cards (`label_selector`)."
        )


def check_encoder_options(config: EPDConfig, stage: Stage, vllm_config: Any) -> None:
    """Refuse what vLLM would leave out with a line in its log: the model has to bring it."""
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
