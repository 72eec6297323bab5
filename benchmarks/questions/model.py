"""A model whose parts cost on one core what they cost in the wild on a card, so that stages can be worth something.

A Qwen2.5-VL of random weights: 0.1 s for a picture of 448×448 (256 tokens), 0.3 s for a thousand tokens of prefill, 5 ms for
a step of decode, each on a core of its own. A picture costs about as much to encode as its tokens to prefill, as with a
language model of seven billion parameters.
"""

from pathlib import Path
from typing import Any

from serve_app.demo.build import VISION_CONFIG, preprocessor_config, write_json, write_qwen, write_weights
from serve_app.demo.cache import build_once, default_root, version_of
from serve_app.demo.weights import speakable_tokens, text_weights, vision_weights

SIDE = 448
"""Pixels of a picture's side. Larger ones are made so large."""
PICTURE_TOKENS = 256
VISION: dict[str, Any] = VISION_CONFIG | {
    "depth": 3,
    "hidden_size": 320,
    "intermediate_size": 1408,
    "num_heads": 5,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [0, 2],
}
LANGUAGE = {"hidden_size": 256, "intermediate_size": 9216, "num_attention_heads": 4, "num_key_value_heads": 4}
"""Wide and flat: attention over a long prompt must not outweigh everything else, as it would in a small deep one."""
TOKEN_BYTES = 4096
"""Of the KV cache: two layers of keys and values, 256 numbers of four bytes."""


def ensure_model() -> Path:
    """The model's folder, made where it is not there: a second, 70 MB."""
    return build_once(default_root() / f"heavy-{version_of(Path(__file__))}", build)


def build(folder: Path) -> None:
    text, tokenizer = write_qwen(folder, VISION, preprocessor_config(PICTURE_TOKENS), LANGUAGE)
    frames = preprocessor_config(PICTURE_TOKENS) | {"video_processor_type": "Qwen2VLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", frames | {"cap_pixels_per_frame": False})
    write_weights(folder, vision_weights(VISION) | text_weights(text, speakable_tokens(tokenizer, also=["<|im_end|>"])))
