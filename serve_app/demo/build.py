"""The recipes of the built-in models: Qwen2.5-VL in every respect but the size.

Written as plain JSON and arrays, without torch or transformers: it takes a tenth of a second instead of ten, and
gives the same bytes with every version of them. The weights have the names of Qwen's own checkpoints.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save
from tokenizers import Tokenizer

from serve_app.demo.template import chat_template
from serve_app.demo.tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer
from serve_app.demo.weights import Weights, speakable_tokens, text_weights, vision_weights

CONTEXT = 32768
PIXELS_PER_TOKEN = 28 * 28
MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def text_config(model_type: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A Qwen2 of two layers, 128 wide: two heads of 64, so that every attention backend takes it."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "dtype": "float32",
    }


VISION_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,  # pixels: 4 × 4 tokens; the first block looks inside a window, the second everywhere
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "dtype": "float32",
}


def preprocessor_config(max_tokens: int) -> dict[str, Any]:
    """How pixels become patches, for images and for the frames of videos: 4 to `max_tokens` tokens each."""
    return {
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 4 * PIXELS_PER_TOKEN,
        "max_pixels": max_tokens * PIXELS_PER_TOKEN,
        "patch_size": VISION_CONFIG["patch_size"],
        "temporal_patch_size": VISION_CONFIG["temporal_patch_size"],
        "merge_size": VISION_CONFIG["spatial_merge_size"],
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


TRAINED = Path(__file__).with_name("weights.safetensors")
"""What `tools.demo.train` has learnt, in bfloat16."""


def build_demo_model(folder: Path) -> None:
    """Write the model that sees into `folder`, which exists and is empty."""
    write_demo_files(folder)
    shutil.copyfile(TRAINED, folder / "model.safetensors")


def write_demo_files(folder: Path) -> None:
    """Everything of the model that sees but its weights. It sees every picture as about 16 tokens, a square as 4 x 4."""
    vision = VISION_CONFIG | {"depth": 3, "hidden_size": 128, "intermediate_size": 256}
    vision |= {"window_size": 224, "fullatt_block_indexes": [2]}  # the whole picture is one window
    # A little below 15 and above 16 tokens, so that rounding does not decide.
    pixels = {"min_pixels": 15 * PIXELS_PER_TOKEN, "max_pixels": 33 * PIXELS_PER_TOKEN // 2}
    write_qwen(folder, vision, preprocessor_config(16) | pixels, {"num_hidden_layers": 3})


def build_random_model(folder: Path) -> None:
    """Write the model of random weights into `folder`, which exists and is empty."""
    text, tokenizer = write_qwen(folder, VISION_CONFIG, preprocessor_config(256), {})
    weights = vision_weights(VISION_CONFIG) | text_weights(text, speakable_tokens(tokenizer, also=["<|im_end|>"]))
    write_weights(folder, weights)


def write_qwen(
    folder: Path, vision: Mapping[str, Any], image: Mapping[str, Any], language: Mapping[str, Any]
) -> tuple[dict[str, Any], Tokenizer]:
    """Everything but the weights, with what ``language`` changes of the language model's configuration; return that and
    the tokenizer."""
    tokenizer = train_tokenizer(MEDIA_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    text = text_config("qwen2_5_vl_text", tokenizer) | {"rope_parameters": rope, **language}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": text["dtype"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "text_config": text,
        "vision_config": vision,
    }
    media = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
    write_model(folder, config, tokenizer, chat_template(media))
    video = preprocessor_config(64) | {"video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": False}
    write_json(folder / "preprocessor_config.json", {**image, "image_processor_type": "Qwen2VLImageProcessor"})
    write_json(folder / "video_preprocessor_config.json", video)
    return text, tokenizer


def write_model(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, template: str) -> None:
    """Write what every model has but its weights: configuration, tokenizer, chat template, defaults for generation."""
    write_json(folder / "config.json", config)
    write_tokenizer(folder, tokenizer, CONTEXT)
    (folder / "chat_template.jinja").write_text(template)
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1]})


def write_weights(folder: Path, weights: Weights) -> None:
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
