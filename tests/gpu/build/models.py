"""Models as people serve them, without their weights: the configuration with the real sizes, and a small tokenizer."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.model import LANGUAGE, MAX_IMAGE_TOKENS, VISION
from serve_app.demo.build import MEDIA_TOKENS, preprocessor_config, write_model, write_qwen
from serve_app.demo.tokenizer import train_tokenizer

CONTEXT: dict[str, Any] = {
    "max_position_embeddings": 128000,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 70,
}
LANGUAGE_7B: dict[str, Any] = LANGUAGE | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def qwen25_vl(folder: Path, language: dict[str, Any], vision: dict[str, Any]) -> None:
    write_qwen(folder, vision, preprocessor_config(MAX_IMAGE_TOKENS), language | CONTEXT)
    video = folder / "video_preprocessor_config.json"
    video.write_text(json.dumps(json.loads(video.read_text()) | {"max_pixels": 12845056}))


def qwen2_audio(folder: Path) -> None:
    tokenizer = train_tokenizer(MEDIA_TOKENS)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "dtype": "bfloat16",
        "audio_token_index": 5,
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 156032,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "dtype": "bfloat16",
        },
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "max_source_positions": 1500,
            "dtype": "bfloat16",
        },
    }
    write_model(folder, config, tokenizer, "")
    audio = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "processor_class": "Qwen2AudioProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(audio))


def qwen3_vl(folder: Path) -> None:
    """The sizes of Qwen3-VL-Embedding-2B."""
    tokenizer = train_tokenizer(MEDIA_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        **{f"{name}_token_id": tokenizer.token_to_id(token) for name, token in tokens.items()},
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": rope,
            "dtype": "bfloat16",
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    }
    write_model(folder, config, tokenizer, "")
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    image = patches | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    image |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    video = patches | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    video |= {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def write_models(root: Path) -> dict[str, str]:
    """A folder for each model that a file of this repository names, by its name there."""
    write = {
        "Qwen/Qwen2.5-VL-3B-Instruct": lambda folder: qwen25_vl(folder, LANGUAGE, VISION),
        "Qwen/Qwen2.5-VL-7B-Instruct": lambda folder: qwen25_vl(
            folder, LANGUAGE_7B, VISION | {"out_hidden_size": 3584}
        ),
        "Qwen/Qwen2-Audio-7B-Instruct": qwen2_audio,
        "Qwen/Qwen3-VL-Embedding-2B": qwen3_vl,
    }
    folders = {}
    for name, make in write.items():
        folder = root / name.rpartition("/")[2]
        folder.mkdir()
        make(folder)
        folders[name] = str(folder)
    return folders
