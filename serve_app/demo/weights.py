"""Random weights whose greedy answers are worth comparing.

Three things a plain initialisation does not give. Attention is sharp and loud (gains of 1.5), so the next token depends
on the whole context and not on the last token alone; much louder, and answers circle in a few tokens. The scale is kept
near 1 throughout, so rounding does not grow from layer to layer: float32 logits are right to about 2e-5, and one step in
a hundred has the second best token within 1e-2 of the best. And tokens that would spoil an answer can never win.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Weights = dict[str, NDArray[np.float32]]


def normal(name: str, *shape: int, std: float) -> NDArray[np.float32]:
    """A float32 array of N(0, std²), the same for the same name wherever and in whatever order it is made."""
    draws = np.random.Generator(np.random.PCG64(crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    return draws * np.float32(std)


def linear(name: str, inputs: int, outputs: int, gain: float = 1.0, bias: float | None = None) -> Weights:
    """A layer that multiplies the scale of its input by `gain`; with a bias of standard deviation `bias`, if given."""
    weights = {f"{name}.weight": normal(f"{name}.weight", outputs, inputs, std=gain * inputs**-0.5)}
    if bias is not None:
        weights[f"{name}.bias"] = normal(f"{name}.bias", outputs, std=bias)
    return weights


def norm(name: str, size: int, bias: bool = False) -> Weights:
    """A normalisation that changes nothing but the scale."""
    weights = {f"{name}.weight": np.ones(size, np.float32)}
    return weights | ({f"{name}.bias": np.zeros(size, np.float32)} if bias else {})


def text_weights(config: Mapping[str, Any], speakable: Iterable[int], prefix: str = "") -> Weights:
    """The language model of a Qwen2 by its `config`. Tokens outside `speakable` get the logit 0, far below the best."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_hidden = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    embed, head = f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"
    weights = {embed: normal(embed, vocab, hidden, std=1.0), head: normal(head, vocab, hidden, std=2 * hidden**-0.5)}
    silent = np.ones(vocab, bool)
    silent[list(speakable)] = False
    weights[head][silent] = 0
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{index}"
        weights |= norm(f"{layer}.input_layernorm", hidden) | norm(f"{layer}.post_attention_layernorm", hidden)
        weights |= linear(f"{layer}.self_attn.q_proj", hidden, hidden, gain=1.5, bias=0.3)
        weights |= linear(f"{layer}.self_attn.k_proj", hidden, kv_hidden, gain=1.5, bias=0.3)
        weights |= linear(f"{layer}.self_attn.v_proj", hidden, kv_hidden, bias=0.1)
        weights |= linear(f"{layer}.self_attn.o_proj", hidden, hidden, gain=1.5)
        weights |= linear(f"{layer}.mlp.gate_proj", hidden, ffn)
        weights |= linear(f"{layer}.mlp.up_proj", hidden, ffn)
        weights |= linear(f"{layer}.mlp.down_proj", ffn, hidden)
    return weights | norm(f"{prefix}model.norm", hidden)


def vision_weights(config: Mapping[str, Any]) -> Weights:
    """The vision tower of a Qwen2.5-VL by its `vision_config`."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    patch = (config["in_channels"], config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    embed = "visual.patch_embed.proj.weight"
    weights = {embed: normal(embed, hidden, *patch, std=float(np.prod(patch)) ** -0.5)}
    for index in range(config["depth"]):
        block = f"visual.blocks.{index}"
        weights |= norm(f"{block}.norm1", hidden) | norm(f"{block}.norm2", hidden)
        weights |= linear(f"{block}.attn.qkv", hidden, 3 * hidden, bias=0.1)
        weights |= linear(f"{block}.attn.proj", hidden, hidden, bias=0.1)
        weights |= linear(f"{block}.mlp.gate_proj", hidden, ffn, bias=0.1)
        weights |= linear(f"{block}.mlp.up_proj", hidden, ffn, bias=0.1)
        weights |= linear(f"{block}.mlp.down_proj", ffn, hidden, bias=0.1)
    merged = hidden * config["spatial_merge_size"] ** 2
    weights |= norm("visual.merger.ln_q", hidden)
    weights |= linear("visual.merger.mlp.0", merged, merged, bias=0.1)
    return weights | linear("visual.merger.mlp.2", merged, config["out_hidden_size"], gain=2.0, bias=0.1)


_READABLE = re.compile(r" [a-zA-Z]{2,}|[.,;:!?]")


def speakable_tokens(tokenizer: Tokenizer, also: Iterable[str] = ()) -> list[int]:
    """The ids of the tokens that are whole words or punctuation, and of the special tokens named in `also`."""
    vocab = tokenizer.get_vocab()
    readable = (index for index in vocab.values() if _READABLE.fullmatch(tokenizer.decode([index])))
    return sorted({*readable, *(vocab[token] for token in also)})
