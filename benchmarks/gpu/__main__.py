"""E+P+D and E+PD side by side with one engine, all on one GPU.

``python -m benchmarks.gpu`` serves Qwen2.5-VL-3B with random weights (``model.py``), one system after the other in another
order every round, with the load of ``benchmarks.bench``, and writes ``benchmarks/results/gpu.json`` and
``benchmarks/gpu/RESULTS.md``. Where there is no GPU it says so and ends.
"""

import argparse
import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks import load, report
from benchmarks.bench import head, visit_all
from benchmarks.gpu.model import write_qwen_3b
from benchmarks.systems import System, ours
from serve_app.config import EPDConfig
from serve_app.placement import Cluster, resolve
from tests.integration.servers import Server, engine_server

RESULT = Path(__file__).parents[1] / "results" / "gpu.json"
PAGE = Path(__file__).parent / "RESULTS.md"
TOPOLOGIES: dict[str, dict[str, Any]] = {"ours E+P+D": {}, "ours E+PD": {"prefill": None}}


def config_of(model: Path, topology: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the application: shares of the card are our own defaults for one card."""
    engine = {"load_format": "dummy", "max_model_len": 8192, "max_num_seqs": 64}
    return {"model": str(model), "served_model_name": "demo", "accelerator": "cuda", "engine_args": engine} | topology


def one_engine(folder: Path, model: Path) -> AbstractContextManager[Server]:
    """vLLM's server with the whole card."""
    args = config_of(model, {"encoder": None, "prefill": None})
    return engine_server(folder, resolve(EPDConfig.model_validate(args), Cluster(1, os.cpu_count() or 1)).config)


def systems(model: Path) -> dict[str, System]:
    def disaggregated(topology: dict[str, Any]) -> System:
        def start(folder: Path) -> AbstractContextManager[Server]:
            return ours(folder, config_of(model, topology))

        return start

    found = {name: disaggregated(topology) for name, topology in TOPOLOGIES.items()}
    return found | {report.ONE: lambda folder: one_engine(folder, model)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all loads, not only the target's and text")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here that PyTorch can use, so nothing was measured: run this on a machine with one NVIDIA GPU.")
        return
    cells = load.ALL if options.full else load.QUICK
    card = f"with one {torch.cuda.get_device_name()}"
    document = head("benchmarks.gpu", cells, card, "Qwen2.5-VL-3B, random weights")
    with tempfile.TemporaryDirectory(prefix="qwen-") as folder:
        model = Path(folder)
        write_qwen_3b(model)
        visit_all(document, RESULT, systems(model), range(options.rounds), cells, str(model))
    PAGE.write_text(report.page(document))


if __name__ == "__main__":
    main()
