"""What runs on the one card, one after the other: one engine, E+PD, E+P+D. Shares of the card are our own defaults."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu.model import RANDOM_WEIGHTS, write_qwen_3b, write_small
from benchmarks.gpu.prerequisites import THREE_ENGINES_MIB
from benchmarks.gpu.rounds import ONE
from benchmarks.systems import System, ours
from serve_app.config import EPDConfig
from serve_app.launch.placement import Cluster, resolve
from tools.harness.servers import Server, engine_server

TOPOLOGIES: dict[str, dict[str, Any]] = {"ours E+PD": {"prefill": None}, "ours E+P+D": {}}

UCX_SAYS_HOW = {"UCX_PROTO_INFO": "*remote memory*(multi)*"}
"""UCX then prints, once for each pair of ends, by which transport it moves KV blocks."""


@dataclass(frozen=True)
class Platform:
    """Where the systems run: on a card, or in small on the CPU, which shows that this program runs to its end."""

    accelerator: str
    engine_args: dict[str, Any]
    write_model: Callable[[Path], None]
    model: str


# Few sequences: an engine captures a CUDA graph for each of fewer sizes, and starts sooner.
CUDA = Platform("cuda", {"max_model_len": 8192, "max_num_seqs": 64}, write_qwen_3b, "Qwen2.5-VL-3B, random weights")
CPU = Platform(
    "cpu",
    {
        "dtype": "float32",
        "max_model_len": 8192,
        "max_num_seqs": 32,
        "block_size": 32,
        "kv_cache_memory_bytes": 128 << 20,
        "max_num_batched_tokens": 8192,
    },
    write_small,
    "Qwen2.5-VL in small, random weights",
)


def config_of(platform: Platform, model: Path, topology: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the application."""
    args = {
        "model": str(model),
        "served_model_name": "demo",
        "accelerator": platform.accelerator,
        "engine_args": RANDOM_WEIGHTS | platform.engine_args,
    }
    return args | topology


def one_engine(platform: Platform, model: Path, folder: Path) -> AbstractContextManager[Server]:
    """vLLM's server with the whole card."""
    args = config_of(platform, model, {"encoder": None, "prefill": None})
    cluster = Cluster(float(platform is CUDA), os.cpu_count() or 1)
    return engine_server(folder, resolve(EPDConfig.model_validate(args), cluster).config)


@contextmanager
def disaggregated(platform: Platform, model: Path, topology: dict[str, Any], folder: Path) -> Iterator[Server]:
    """Embeddings go through memory, as by default, in a folder of their own: none is there from a run before."""
    if "prefill" not in topology:
        topology = topology | {"decode": {"env": UCX_SAYS_HOW}}
    with tempfile.TemporaryDirectory(prefix="epd-gpu-", dir="/dev/shm") as embeddings:
        args = config_of(platform, model, topology) | {"ec": {"storage_path": embeddings}}
        with ours(folder, args) as server:
            yield server


def systems(platform: Platform, model: Path, card: Card | None) -> dict[str, System]:
    """Those that fit on the card. The one engine comes first: the others' answers are compared with its."""
    found: dict[str, System] = {ONE: lambda folder: one_engine(platform, model, folder)}
    for name, topology in TOPOLOGIES.items():
        if "prefill" in topology or card is None or card.total_mib >= THREE_ENGINES_MIB:
            found[name] = lambda folder, topology=topology: disaggregated(platform, model, topology, folder)
    return found
