"""Qwen2.5-VL-3B without a download: its real configuration, a small tokenizer, and weights that vLLM makes up.

Sizes: ``config.json`` of Qwen/Qwen2.5-VL-3B-Instruct. The tokenizer has 1,024 tokens and answers say nothing; what is
computed is what the real model computes.
"""

from pathlib import Path
from typing import Any

from serve_app.demo.build import VISION_CONFIG, preprocessor_config, write_qwen

LANGUAGE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "dtype": "bfloat16",
}
VISION: dict[str, Any] = VISION_CONFIG | {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "dtype": "bfloat16",
}
MAX_IMAGE_TOKENS = 16384


def write_qwen_3b(folder: Path) -> None:
    """Everything but the weights into ``folder``, which exists and is empty."""
    write_qwen(folder, VISION, preprocessor_config(MAX_IMAGE_TOKENS), LANGUAGE)
