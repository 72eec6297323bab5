"""Tiny models of other families for `make test-models`: made by transformers, from random weights.

A family is here what differs from one to the next: class, configuration, special tokens, processor. They share the tokenizer
and the chat template of the demo model, a language model of two layers, 128 wide, and towers half as wide.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve_app.demo.build import VISION_CONFIG, text_config, write_json, write_model
from serve_app.demo.cache import build_once, version_of
from serve_app.demo.template import chat_template
from serve_app.demo.tokenizer import train_tokenizer
from tools.harness.models import SPEECH_CONFIG, mel_features


@dataclass(frozen=True)
class Family:
    """A family of models as transformers has it."""

    architecture: str
    model_type: str
    tokens: Mapping[str, str]
    """Special tokens, by the names that the processor knows them by."""
    media: Mapping[str, str]
    """What the chat template writes for an item, by modality."""
    config: Callable[[Tokenizer], dict[str, Any]]
    processor: Mapping[str, Any]
    dtype: str = "float32"
    tower: str = "vision_tower."
    """What the names of the tower's weights begin with, where vLLM expects others than transformers writes."""

    def ensure(self, root: Path) -> Path:
        """Return the folder of the model, `<root>/<model type>-<version>`, building it first if it is not there."""
        return build_once(root / f"{self.model_type}-{version_of(Path(__file__))}", self._build)

    def ensure_draft(self, root: Path) -> Path:
        """Return the folder of a model of text with the same tokens, which can guess for this one."""
        return build_once(root / f"{self.model_type}-draft-{version_of(Path(__file__))}", self._build_draft)

    def _build_draft(self, folder: Path) -> None:
        tokenizer = train_tokenizer(tuple(self.tokens.values()))
        model = made("Qwen2ForCausalLM", text_config("qwen2", tokenizer))
        model.save_pretrained(folder)
        write_model(folder, model.config.to_dict(), tokenizer, "")

    def _build(self, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tokenizer = train_tokenizer(tuple(self.tokens.values()))
        model = made(self.architecture, {"model_type": self.model_type, "dtype": "float32", **self.config(tokenizer)})
        model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        named = {re.sub(r"^vision_tower\.", self.tower, name): weight for name, weight in weights.items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        write_model(folder, model.config.to_dict(), tokenizer, chat_template(self.media))
        known = json.loads((folder / "tokenizer_config.json").read_text())
        write_json(folder / "tokenizer_config.json", known | dict(self.tokens))
        write_json(folder / "processor_config.json", self.processor)


def made(architecture: str, config: dict[str, Any]) -> Any:
    """A model of transformers with random weights, always the same."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # loud enough that every token and every pixel changes the answer
                weight.normal_(std=weight[0].numel() ** -0.5)
    return model


TILE = 56
"""Pixels of a square that a tower sees at once: 4 × 4 patches."""
SIZE = {"height": TILE, "width": TILE}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
SIGLIP_NAMES = "vision_tower.vision_model."
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": TILE, "vision_use_head": False}
QWEN_PATCHES = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28},
}


def rope(*mrope_section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section), **more}


# ---- Qwen3-VL: deepstack, so that an embedding is three times as wide as a token's

VISION_TOKENS = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}


def qwen3_vl_config(tokenizer: Tokenizer) -> dict[str, Any]:
    vision = {name: VISION_CONFIG[name] for name in ("hidden_size", "intermediate_size", "num_heads", "patch_size")}
    text = text_config("qwen3_vl_text", tokenizer) | {"head_dim": 64}
    return {
        "text_config": text | {"rope_parameters": rope(12, 10, 10, mrope_interleaved=True)},
        "vision_config": vision
        | {"depth": 3, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 128, "num_position_embeddings": 64},
        **{f"{name}_id": tokenizer.token_to_id(token) for name, token in VISION_TOKENS.items()},
    }


QWEN3_VL = Family(
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    tokens=VISION_TOKENS,
    media={kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")},
    config=qwen3_vl_config,
    processor={
        "processor_class": "Qwen3VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PATCHES},
        "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor", **QWEN_PATCHES},
    },
)


# ---- InternVL3: an image is cut into tiles


def internvl_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "text_config": text_config("qwen2", tokenizer),
        "vision_config": TOWER | {"image_size": [TILE, TILE], "patch_size": [14, 14]},
        "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }


INTERNVL3 = Family(
    architecture="InternVLForConditionalGeneration",
    model_type="internvl",
    tokens={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    media={"image": "<IMG_CONTEXT>\n", "video": "<video>\n"},
    config=internvl_config,
    processor={
        "processor_class": "InternVLProcessor",
        "image_seq_length": 4,
        "image_processor": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": SIZE,
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", "size": SIZE},
    },
)


# ---- Gemma 3: a layer with a sliding window before one that attends to all


def gemma3_config(tokenizer: Tokenizer) -> dict[str, Any]:
    text = text_config("gemma3_text", tokenizer) | {"head_dim": 64, "query_pre_attn_scalar": 64}
    return {
        "text_config": text | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
        "vision_config": SIGLIP,
        "tie_word_embeddings": False,  # else a random model repeats its last token
        "mm_tokens_per_image": 4,
        "boi_token_index": tokenizer.token_to_id("<start_of_image>"),
        "eoi_token_index": tokenizer.token_to_id("<end_of_image>"),
        "image_token_index": tokenizer.token_to_id("<image_soft_token>"),
    }


GEMMA3 = Family(
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    tokens={
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        **{f"newlines_{count}": "\n" * count for count in (1, 2, 3, 4)},  # vLLM looks for these beside images
    },
    media={"image": "<start_of_image>"},
    config=gemma3_config,
    processor={
        "processor_class": "Gemma3Processor",
        "image_seq_length": 4,
        "image_processor": {"image_processor_type": "Gemma3ImageProcessor", "size": SIZE},
    },
    tower=SIGLIP_NAMES,
)


# ---- LLaVA-OneVision: tiles beside the whole image, with a learnt token at the end of each row

PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def llava_onevision_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "text_config": text_config("qwen2", tokenizer),
        "vision_config": SIGLIP,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "video_token_index": tokenizer.token_to_id("<video>"),
        "image_grid_pinpoints": PINPOINTS,
    }


LLAVA_ONEVISION = Family(
    architecture="LlavaOnevisionForConditionalGeneration",
    model_type="llava_onevision",
    tokens={"image_token": "<image>", "video_token": "<video>"},
    media={"image": "<image>", "video": "<video>"},
    config=llava_onevision_config,
    processor={
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "image_processor": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": SIZE,
            "image_grid_pinpoints": PINPOINTS,
        },
        "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": SIZE},
    },
    tower=SIGLIP_NAMES,
)


# ---- MiniCPM-V 4.6: slices, and a language model whose first layer has a state in place of a KV cache


def minicpm_config(tokenizer: Tokenizer) -> dict[str, Any]:
    linear = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    text = text_config("qwen3_5_text", tokenizer) | linear | {"head_dim": 64}
    return {
        "text_config": text
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": rope(3, 3, 2, mrope_interleaved=True, partial_rotary_factor=0.25),
        },
        "vision_config": TOWER | {"num_hidden_layers": 3, "image_size": 2 * TILE},
        "insert_layer_id": 1,
        "image_size": 2 * TILE,
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
    }


SLICES = {"scale_resolution": 2 * TILE, "patch_size": 14, "max_slice_nums": 4}
MINICPM_V = Family(
    architecture="MiniCPMV4_6ForConditionalGeneration",
    model_type="minicpmv4_6",
    tokens={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        **{f"{name}_start_token": f"<{name}>" for name in ("image", "slice", "image_id")},
        **{f"{name}_end_token": f"</{name}>" for name in ("image", "slice", "image_id")},
    },
    media={"image": "<|image_pad|>", "video": "<|video_pad|>"},
    config=minicpm_config,
    processor={
        "processor_class": "MiniCPMV4_6Processor",
        "image_processor": {"image_processor_type": "MiniCPMV4_6ImageProcessor", **SLICES},
        "video_processor": {"video_processor_type": "MiniCPMV4_6VideoProcessor", **SLICES},
    },
    dtype="bfloat16",  # the only one that vLLM takes for such a layer on a CPU
)


# ---- Qwen2.5-Omni: the part that reads, looks and listens; it does not speak


def omni_config(tokenizer: Tokenizer) -> dict[str, Any]:
    kinds = ("audio", "image", "video")
    return {
        "enable_audio_output": False,
        "thinker_config": {
            "text_config": text_config("qwen2_5_omni_text", tokenizer) | {"rope_parameters": rope(8, 12, 12)},
            "vision_config": VISION_CONFIG | {"model_type": "qwen2_5_omni_vision_encoder"},
            "audio_config": SPEECH_CONFIG | {"model_type": "qwen2_5_omni_audio_encoder"},
            **{f"{kind}_token_index": tokenizer.token_to_id(f"<|{kind.upper()}|>") for kind in kinds},
            "audio_start_token_id": tokenizer.token_to_id("<|audio_bos|>"),
            "audio_end_token_id": tokenizer.token_to_id("<|audio_eos|>"),
        },
    }


QWEN2_5_OMNI = Family(
    architecture="Qwen2_5OmniForConditionalGeneration",
    model_type="qwen2_5_omni",
    tokens={
        **{f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("audio", "image", "video")},
        **{f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("audio", "vision") for end in ("bos", "eos")},
    },
    media={
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    },
    config=omni_config,
    processor={
        "processor_class": "Qwen2_5OmniProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PATCHES},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", **QWEN_PATCHES},
        "feature_extractor": mel_features("Qwen2_5OmniProcessor", "WhisperFeatureExtractor", SPEECH_CONFIG),
    },
)


# ---- Whisper: an encoder-decoder model, which is refused


def whisper_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "num_mel_bins": SPEECH_CONFIG["num_mel_bins"],
        "d_model": 64,
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")},
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "decoder_start_token_id": tokenizer.token_to_id("<|startoftranscript|>"),
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }


WHISPER = Family(
    architecture="WhisperForConditionalGeneration",
    model_type="whisper",
    tokens={"start_token": "<|startoftranscript|>"},
    media={},
    config=whisper_config,
    processor={
        "processor_class": "WhisperProcessor",
        "feature_extractor": mel_features("WhisperProcessor", "WhisperFeatureExtractor", SPEECH_CONFIG),
    },
)

FAMILIES = {
    "Qwen3-VL": QWEN3_VL,
    "InternVL3": INTERNVL3,
    "Gemma 3": GEMMA3,
    "LLaVA-OneVision": LLAVA_ONEVISION,
    "MiniCPM-V 4.6": MINICPM_V,
    "Qwen2.5-Omni": QWEN2_5_OMNI,
}
