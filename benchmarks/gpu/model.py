"""Qwen2.5-VL-3B without a download: its real configuration, a small tokenizer, and weights made up in the engine.

Sizes: ``config.json`` of Qwen/Qwen2.5-VL-3B-Instruct. The tokenizer has 1,024 tokens and answers say nothing; what is
computed is what the real model computes. ``weights.py`` makes the weights.
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

RANDOM_FORMAT = "random-by-name"
RANDOM_WEIGHTS: dict[str, Any] = {
    "load_format": RANDOM_FORMAT,
    "worker_extension_cls": "benchmarks.gpu.weights.Imported",
}
"""Engine arguments with which ``weights.py`` makes the weights."""


def write_qwen_3b(folder: Path) -> None:
    """Everything but the weights into ``folder``, which exists and is empty."""
    write_qwen(folder, VISION, preprocessor_config(MAX_IMAGE_TOKENS), LANGUAGE)


def write_small(folder: Path) -> None:
    """The same model in small, which runs on a CPU: for a run of this program without a card."""
    write_qwen(folder, VISION_CONFIG, preprocessor_config(1024), {"tie_word_embeddings": True})
