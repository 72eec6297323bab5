"""Tiny LoRA adapters of random weights for the built-in models, as PEFT saves them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from serve_app.demo import ensure_demo_model

RANK = 8


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter of all linear layers of the language model, strong enough to change most tokens."""
    config = json.loads((ensure_demo_model(name="demo-random") / "config.json").read_text())
    config = config.get("text_config", config)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    layers = {f"self_attn.{name}": shape for name, shape in attention.items()}
    layers |= {"mlp.gate_proj": (hidden, wide), "mlp.up_proj": (hidden, wide), "mlp.down_proj": (wide, hidden)}
    chance, weights = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (size_in, size_out) in layers.items():
            key = f"base_model.model.model.language_model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = chance.normal(0, size_in**-0.5, (RANK, size_in)).astype(np.float32)
            weights[f"{key}.lora_B.weight"] = chance.normal(0, 0.3, (size_out, RANK)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in layers),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
