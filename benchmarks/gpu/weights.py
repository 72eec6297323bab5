"""Weights that vLLM makes up, with answers that are worth comparing: what ``serve_app.demo.weights`` does for small models.

vLLM's own ``load_format: dummy`` draws everything from ±0.001, norms too. All logits are then within one step of rounding:
the small model answers 195 168 195 168 … to every prompt and picture, each token 0.00 nats ahead of the next best. Here the
scale stays near 1 throughout, so the next token depends on the whole context, and equal tokens say that embeddings and KV
blocks arrived.

An engine imports this module by its argument ``worker_extension_cls``, in every process that loads weights.
"""

from fnmatch import fnmatch
from typing import Any
from zlib import crc32

import torch
from torch import nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from benchmarks.gpu.model import RANDOM_FORMAT
from serve_app.demo.tokenizer import VOCAB_SIZE

GAINS = {
    "*qkv_proj.weight": 1.5,
    "*self_attn.o_proj.weight": 0.3,
    "language_model*down_proj.weight": 0.2,
    "*merger.mlp.2.weight": 2.0,
}
"""By name, where a layer does not keep the scale. Loud queries and keys make attention sharp; 72 quiet sums leave about a
third of the last layer's input to the last token itself, without which answers repeat one token for ever."""

BIAS = 0.1
VOCABULARY = "embed_tokens.weight"
LAST_NORM = "model.norm.weight"


def spread(name: str, shape: torch.Size) -> float | None:
    """Standard deviation of a parameter's values; None for the weight of a normalisation, which is 1.

    The embedding of a token is also the row of its logit. Signs of the last normalisation part the two: without them the
    last token's own logit would be the best for ever. They also give logits a spread of 2.
    """
    if name.endswith(".bias"):
        return BIAS
    if name.endswith(VOCABULARY):
        return 1.0
    if name.endswith(LAST_NORM):
        return float(2 * shape.numel() ** -0.5)
    if len(shape) < 2:
        return None
    gain = next((gain for names, gain in GAINS.items() if fnmatch(name, names)), 1.0)
    return float(gain * shape[1:].numel() ** -0.5)


def fill(name: str, values: torch.Tensor) -> None:
    """The same values for the same name, in whatever stage: seeds are of the name. ``values``: on any device."""
    std = spread(name, values.shape)
    if std is None:
        values.fill_(1.0)
        return
    values.normal_(0.0, std, generator=torch.Generator(values.device).manual_seed(crc32(name.encode())))
    if name.endswith(VOCABULARY):
        values[VOCAB_SIZE:] = 0.0  # what the small tokenizer lacks is never the best token


@register_model_loader(RANDOM_FORMAT)
class RandomLoader(BaseModelLoader):
    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:  # a stage leaves out what it does not run
                fill(name, parameter.data)


class Imported:
    """What ``worker_extension_cls`` names. Workers take nothing from it."""
