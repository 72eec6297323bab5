"""Small models for the tests, beside the demo model: made on the spot, from random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.demo.build import text_config, write_json, write_model, write_weights
from serve_app.demo.cache import build_once, version_of
from serve_app.demo.template import chat_template
from serve_app.demo.tokenizer import train_tokenizer
from serve_app.demo.weights import Weights, linear, norm, normal, speakable_tokens, text_weights


def serving(model: Path, **engine_args: Any) -> dict[str, Any]:
    """Arguments of an application, or of one engine, that serves one of these models on the CPU."""
    engine = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 16, "block_size": 32}
    return {
        "model": str(model),
        "served_model_name": "demo",
        "accelerator": "cpu",
        "engine_args": engine | {"kv_cache_memory_bytes": 1 << 27} | engine_args,
    }


AUDIO_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "d_model": 64,
    "max_source_positions": 1500,  # after the second convolution: 30 s, which Qwen2-Audio pads every sound to
    "activation_function": "gelu",
    "dtype": "float32",
}
AUDIO_TOKENS = ("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")


def ensure_audio_model(root: Path) -> Path:
    """Return the folder of a tiny Qwen2-Audio, `<root>/audio-<version>`, building it first if it is not there.

    It takes sounds of up to 30 s and turns each second into 25 tokens. Sounds of 16 kHz need nothing more, raw arrays
    handed to an engine included; to decode a WAV, vLLM needs `soundfile`, and for other rates its `audio` extra.
    """
    return build_once(root / f"audio-{version_of(Path(__file__))}", _build_audio_model)


def _build_audio_model(folder: Path) -> None:
    tokenizer = train_tokenizer(AUDIO_TOKENS)
    text = text_config("qwen2", tokenizer) | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "dtype": "float32",
        "audio_token_index": tokenizer.token_to_id("<|AUDIO|>"),
        "text_config": text,
        "audio_config": AUDIO_CONFIG,
    }
    weights = _audio_weights(AUDIO_CONFIG, text["hidden_size"])
    weights |= text_weights(text, speakable_tokens(tokenizer, also=["<|im_end|>"]), prefix="language_model.")
    template = chat_template({"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"})
    write_model(folder, config, tokenizer, template)
    write_weights(folder, weights)
    write_json(
        folder / "preprocessor_config.json",
        mel_features("Qwen2AudioProcessor", "WhisperFeatureExtractor", AUDIO_CONFIG),
    )


def mel_features(processor: str, extractor: str, config: dict[str, Any]) -> dict[str, Any]:
    """How up to 30 s of sound become features, for a tower of this `config`."""
    return {
        "processor_class": processor,
        "feature_extractor_type": extractor,
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "return_attention_mask": True,
    }


def _audio_weights(config: dict[str, Any], text_hidden: int) -> Weights:
    """A Whisper-like encoder and its projection to `text_hidden`."""
    hidden, ffn, mels = config["d_model"], config["encoder_ffn_dim"], config["num_mel_bins"]
    positions = "audio_tower.embed_positions.weight"
    weights = {positions: normal(positions, config["max_source_positions"], hidden, std=0.3)}
    for name, channels in (("audio_tower.conv1", mels), ("audio_tower.conv2", hidden)):
        weights[f"{name}.weight"] = normal(name, hidden, channels, 3, std=2 * (3 * channels) ** -0.5)
        weights[f"{name}.bias"] = np.zeros(hidden, np.float32)
    for index in range(config["encoder_layers"]):
        layer = f"audio_tower.layers.{index}"
        weights |= norm(f"{layer}.self_attn_layer_norm", hidden, bias=True)
        weights |= linear(f"{layer}.self_attn.q_proj", hidden, hidden, bias=0.1)
        weights |= linear(f"{layer}.self_attn.k_proj", hidden, hidden)
        weights |= linear(f"{layer}.self_attn.v_proj", hidden, hidden, bias=0.1)
        weights |= linear(f"{layer}.self_attn.out_proj", hidden, hidden, bias=0.1)
        weights |= norm(f"{layer}.final_layer_norm", hidden, bias=True)
        weights |= linear(f"{layer}.fc1", hidden, ffn, bias=0.1)
        weights |= linear(f"{layer}.fc2", ffn, hidden, bias=0.1)
    weights |= norm("audio_tower.layer_norm", hidden, bias=True)
    return weights | linear("multi_modal_projector.linear", hidden, text_hidden, bias=0.1)


SPEECH_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_asr_audio_encoder",
    "num_mel_bins": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "d_model": 64,
    "downsample_hidden_size": 16,
    "max_source_positions": 1500,
    "n_window": 50,
    "n_window_infer": 800,
    "conv_chunksize": 500,
    "output_dim": 128,
    "activation_function": "gelu",
    "dtype": "float32",
}
SPEECH_TOKENS = ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<asr_text>")


def ensure_speech_model(root: Path) -> Path:
    """Return the folder of a tiny Qwen3-ASR, `<root>/speech-<version>`, building it first if it is not there: it writes down
    speech, 13 tokens of a second."""
    return build_once(root / f"speech-{version_of(Path(__file__))}", _build_speech_model)


def _build_speech_model(folder: Path) -> None:
    tokenizer = train_tokenizer(SPEECH_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = text_config("qwen3_asr_text", tokenizer) | {"head_dim": 64, "attention_bias": True, "rope_scaling": rope}
    thinker = {
        "model_type": "qwen3_asr_thinker",
        "audio_config": SPEECH_CONFIG,
        "text_config": text,
        "audio_token_id": tokenizer.token_to_id("<|audio_pad|>"),
        "audio_start_token_id": tokenizer.token_to_id("<|audio_start|>"),
        "audio_end_token_id": tokenizer.token_to_id("<|audio_end|>"),
        "dtype": "float32",
    }
    architecture = ["Qwen3ASRForConditionalGeneration"]
    config = {"architectures": architecture, "model_type": "qwen3_asr", "dtype": "float32", "thinker_config": thinker}
    weights = _speech_weights(SPEECH_CONFIG)
    weights |= text_weights(text, speakable_tokens(tokenizer, also=["<|im_end|>"]), prefix="thinker.")
    for layer in range(text["num_hidden_layers"]):
        for name in ("q_norm", "k_norm"):
            weights |= norm(f"thinker.model.layers.{layer}.self_attn.{name}", text["head_dim"])
        output = f"thinker.model.layers.{layer}.self_attn.o_proj.bias"
        weights[output] = np.zeros(text["hidden_size"], np.float32)
    write_model(folder, config, tokenizer, chat_template({"audio": "<|audio_start|><|audio_pad|><|audio_end|>"}))
    write_weights(folder, weights)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    write_json(folder / "tokenizer_config.json", known | names)
    write_json(
        folder / "preprocessor_config.json",
        mel_features("Qwen3ASRProcessor", "Qwen3ASRFeatureExtractor", SPEECH_CONFIG),
    )


def _speech_weights(config: dict[str, Any]) -> Weights:
    """Three convolutions, a transformer, and its projection to the language model."""
    hidden, ffn, channels = config["d_model"], config["encoder_ffn_dim"], config["downsample_hidden_size"]
    tower, weights = "thinker.audio_tower", Weights()
    for index in (1, 2, 3):
        name, inputs = f"{tower}.conv2d{index}", 1 if index == 1 else channels
        weights[f"{name}.weight"] = normal(name, channels, inputs, 3, 3, std=2 * (9 * inputs) ** -0.5)
        weights[f"{name}.bias"] = np.zeros(channels, np.float32)
    weights |= linear(f"{tower}.conv_out", channels * config["num_mel_bins"] // 8, hidden)
    for index in range(config["encoder_layers"]):
        layer = f"{tower}.layers.{index}"
        weights |= norm(f"{layer}.self_attn_layer_norm", hidden, bias=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= linear(f"{layer}.self_attn.{name}", hidden, hidden, bias=0.1)
        weights |= norm(f"{layer}.final_layer_norm", hidden, bias=True)
        weights |= linear(f"{layer}.fc1", hidden, ffn, bias=0.1)
        weights |= linear(f"{layer}.fc2", ffn, hidden, bias=0.1)
    weights |= norm(f"{tower}.ln_post", hidden, bias=True)
    weights |= linear(f"{tower}.proj1", hidden, hidden, bias=0.1)
    return weights | linear(f"{tower}.proj2", hidden, config["output_dim"], bias=0.1)
