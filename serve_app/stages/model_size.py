"""The memory that a model needs on a card, from what vLLM and transformers know before they load it.

Sizes that are unknown without the weights count as 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.launch.card_memory import GIB

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
