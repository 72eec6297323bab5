"""Small models for the tests, beside the demo model: made on the spot, from random weights."""

from pathlib import Path
from typing import Any

import numpy as np

from serve_app.demo.build import text_config, write_json, write_model, write_weights
from serve_app.demo.cache import build_once, version_of
from serve_app.demo.template import chat_template
from serve_app.demo.tokenizer import train_tokenizer
from serve_app.demo.weights import Weights, linear, norm, normal, speakable_tokens, text_weights

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
    features = {
        "processor_class": "Qwen2AudioProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": AUDIO_CONFIG["num_mel_bins"],
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "return_attention_mask": True,
    }
    write_json(folder / "preprocessor_config.json", features)


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
