"""What both sides of a hand-off must have in common, in a few hex digits: the ``Version`` of an engine or an ingress.

Token ids mean something to one tokenizer, embeddings and KV blocks to one set of weights. While a deploy replaces replicas
one by one, or where two nodes have other copies of one folder, engines meet that would take each other's and answer 200. So
each process tells what it was started from. Every process can tell ``front``, an ingress without weight files too;
``template`` only where the file is; ``weights`` the engines tell.

Weights of one architecture have one size and one header, whatever is in them. So some content is looked at too: the middle
of each tensor. Weights that differ nowhere there are taken for the same. Times are not looked at: two nodes' copies differ.
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
"""Of what crosses our handles. To be raised with what another release of ours would misread in ``handoff``."""

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
"""Files of a tokenizer, best first. The ones after the first that is there need not be everywhere."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
INDEX_BYTES = 64 << 20
HEADER_BYTES = 100_000_000  # safetensors' own limit
SAMPLE_BYTES = 1024
MOST_SAMPLES = 4096
"""Of all files: 4 MB, and on a network file system some seconds of the minutes that loading takes."""
READERS = 8


def front_of(config: EPDConfig, model_config: Any) -> Version:
    """What an ingress tells of itself, and every engine: all but the weights. ``model_config``: vLLM's."""
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
    """What an engine tells, from what lies there now. How it lays out KV blocks is known once it runs."""
    return front_of(config, vllm_config.model_config)._replace(weights=weights_of(vllm_config))


def template_of(named: str | None) -> str:
    """Of the chat template that the config names, by its file or as it is. Empty: there is none, or not on this node."""
    if named is None:
        return ""
    if os.path.isfile(named):
        return _digest(Path(named).read_text())
    return _digest(named) if any(sign in named for sign in "{}\n") else ""


def commit_of(model_config: Any) -> str | None:
    """The commit of a model that came from a hub; None: it is a folder, or nothing tells."""
    path = Path(model_config.model)
    if path.parent.name == "snapshots":  # a hub's cache, as vLLM names it without a network
        return path.name
    if path.exists():
        return None
    if (commit := getattr(model_config.hf_config, "_commit_hash", None)) is not None:
        return str(commit)
    cached = try_get_local_file(model_config.model, "config.json", model_config.revision)
    return cached.parent.name if isinstance(cached, Path) else None


def files_of(folder: Path) -> dict[str, str]:
    """Digest by name of the files that an ingress reads."""
    tokenizer = next((names for names in TOKENIZERS if (folder / names[0]).is_file()), ())
    names = [name for name in (*FRONT_FILES, *tokenizer) if (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def weights_of(vllm_config: Any) -> str:
    """Names the weights that an engine loads: by the commit of a hub, or by what lies in the folder."""
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
    """Digest by name: of a file's size, its header or the whole index, and samples of what it holds."""
    most = max(MOST_SAMPLES // max(len(files), 1), 1)
    with ThreadPoolExecutor(READERS) as readers:
        digests = readers.map(lambda file: _content(file, most), files)
        return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def _content(path: Path, most: int) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if path.suffix == ".json":
            digest.update(file.read(INDEX_BYTES))
            return digest.hexdigest()
        header = _header(file, size) if path.suffix == ".safetensors" else b""
        digest.update(header)
        for place in _places(header, size, most):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    return digest.hexdigest()


def _header(file: Any, size: int) -> bytes:
    """The JSON of a safetensors file; nothing where it is none."""
    length = file.read(8)
    if len(length) < 8 or (count := struct.unpack("<Q", length)[0]) > min(HEADER_BYTES, size - 8):
        return b""
    return bytes(file.read(count))


def _places(header: bytes, size: int, most: int) -> Iterator[int]:
    """Where samples begin: around the middle of each tensor, or spread evenly where nothing tells of any."""
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
