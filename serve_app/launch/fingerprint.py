"""The ``Version`` of an engine or an ingress: a few hex digits that both sides of a hand-off must have in common.

Token ids belong to one tokenizer, embeddings and KV blocks to one set of weights. While a deploy replaces replicas one by
one, or where nodes have different copies of a folder, engines would take each other's and answer 200. So each process tells
what it was started from: ``front`` everywhere, ``template`` where its file is, ``weights`` on engines.

Weights of one architecture have the same size and header. So the middle of each tensor counts too, and weights that are
equal there count as the same. Times of files do not count, because they differ between nodes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm import __version__ as vllm_version
from vllm.transformers_utils.repo_utils import try_get_local_file

from serve_app.config import SHARED_ARGS, EPDConfig
from serve_app.handoff.types import Version
from serve_app.launch.engine_args import engine_args

PROTOCOL = 1
"""Version of the messages between our processes. Raise it with a change in ``handoff`` that older code would misread."""

VERSION_ARGS = (SHARED_ARGS - {"model", "served_model_name"}) | {"quantization", "load_format"}
"""Engine arguments that change token ids, item hashes, embeddings or KV blocks. The model is known by its files."""

FRONT_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
TOKENIZERS = (("tokenizer.json",), ("tekken.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""Files of a tokenizer, best first. Only the first that is there counts."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
SAMPLE_BYTES = 1024
MOST_SAMPLES = 4096
"""Samples of all files: 4 MB, and on a network file system some seconds of the minutes that loading takes."""


def front_of(config: EPDConfig, model_config: Any) -> Version:
    """The version of an ingress, and of an engine without its weights. ``model_config``: vLLM's."""
    stages = {stage: engine_args(config, stage, "") for stage in config.stages}
    front: dict[str, Any] = {
        "protocol": PROTOCOL,
        "vllm": vllm_version.partition("+")[0],  # its builds for CPUs and cards have one version
        "connectors": (config.encoder and config.ec.connector, config.prefill and config.kv.connector),
        "args": {stage: {key: args[key] for key in VERSION_ARGS & args.keys()} for stage, args in stages.items()},
        "model": commit_of(model_config) or files_of(Path(model_config.model)) or config.model,
    }
    if model_config.tokenizer not in (None, model_config.model):
        front["tokenizer"] = files_of(Path(model_config.tokenizer)) or model_config.tokenizer
    return Version(front=_digest(front), template=template_of(config.api.get("chat_template")))


def version_of(config: EPDConfig, vllm_config: Any) -> Version:
    """The version of an engine from the files that are there now."""
    return front_of(config, vllm_config.model_config)._replace(weights=weights_of(vllm_config))


def template_of(named: str | None) -> str:
    """Digest of the config's chat template, by its file or text. Empty: there is none, or not on this node."""
    if named is None:
        return ""
    if os.path.isfile(named):
        return _digest(Path(named).read_text())
    return _digest(named) if any(sign in named for sign in "{}\n") else ""


def commit_of(model_config: Any) -> str | None:
    """The commit of a model from a hub; None: a folder, or unknown."""
    path = Path(model_config.model)
    if path.parent.name == "snapshots":  # vLLM's name of a hub's cache without a network
        return path.name
    if path.exists():
        return None
    if (commit := getattr(model_config.hf_config, "_commit_hash", None)) is not None:
        return str(commit)
    cached = try_get_local_file(model_config.model, "config.json", model_config.revision)
    return cached.parent.name if isinstance(cached, Path) else None


def files_of(folder: Path) -> dict[str, str]:
    """Digests of the files that an ingress reads, by name."""
    tokenizer = next((names for names in TOKENIZERS if (folder / names[0]).is_file()), ())
    names = [name for name in (*FRONT_FILES, *tokenizer) if (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def weights_of(vllm_config: Any) -> str:
    """Digest of the weights that an engine loads, by a hub's commit or the files of the folder."""
    model = vllm_config.model_config
    load_format = str(vllm_config.load_config.load_format)
    named: Any = (getattr(model, "model_weights", "") or model.model, model.revision)
    if load_format == "dummy":
        named = (load_format, model.seed)
    elif (commit := commit_of(model)) is not None:
        named = commit
    elif os.path.isdir(model.model) and not getattr(model, "model_weights", ""):
        named = content_of(sorted({file for pattern in WEIGHT_FILES for file in Path(model.model).glob(pattern)}))
    elif os.path.isfile(model.model):
        named = content_of([Path(model.model)])
    return _digest(named)


def content_of(files: list[Path]) -> dict[str, str]:
    """Digests of files by name, over size, header or index, and samples of the content."""
    most = max(MOST_SAMPLES // max(len(files), 1), 1)
    with ThreadPoolExecutor(8) as readers:
        digests = readers.map(lambda file: _content(file, most), files)
        return dict(zip((file.name for file in files), digests, strict=True))


def _content(path: Path, most: int) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if path.suffix == ".json":
            digest.update(file.read(64 << 20))
            return digest.hexdigest()
        header = _header(file, size) if path.suffix == ".safetensors" else b""
        digest.update(header)
        for place in _places(header, size, most):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    return digest.hexdigest()


def _header(file: Any, size: int) -> bytes:
    """The JSON of a safetensors file, which limits it to 100 MB; empty if it is none."""
    length = file.read(8)
    if len(length) < 8 or (count := struct.unpack("<Q", length)[0]) > min(100_000_000, size - 8):
        return b""
    return bytes(file.read(count))


def _places(header: bytes, size: int, most: int) -> Iterator[int]:
    """Offsets of samples: around the middle of each tensor, or evenly spread where the header names none."""
    try:
        tensors = {name: of for name, of in json.loads(header or b"{}").items() if name != "__metadata__"}
        middles = sorted(8 + len(header) + sum(of["data_offsets"]) // 2 for of in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        middles = []
    if not middles:
        middles = [size * (2 * index + 1) // (2 * most) for index in range(most)]
    step = -(-len(middles) // most)
    return (max(middle - SAMPLE_BYTES // 2, 0) for middle in middles[::step])


def _digest(named: Any) -> str:
    text = json.dumps(named, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
