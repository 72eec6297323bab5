"""What is compared: ours and the reference's way, with the engine arguments of ``serve_app.launch.engine_args``, on the CPU,
on loopback.

One engine more is 2 to 4 GB, so only one system runs at a time.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import EPDConfig
from serve_app.hooks.vllm_plugin import REPLICA_ENV
from serve_app.launch.connectors import free_ports, side_channel_env
from serve_app.launch.engine_args import engine_args, model_path, replica_env
from serve_app.stage import Stage
from tools.harness.servers import APP, Server, api_server, cpu_config, kill_all, serve_run, start

System = Callable[[Path], AbstractContextManager[Server]]
"""Starts a system, in a folder of its own."""

PROXY_OPTION = {Stage.ENCODER: "--encode", Stage.PREFILL: "--prefill", Stage.DECODE: "--decode"}


@dataclass(frozen=True)
class Engine:
    """An engine of a system behind the proxy: which of its lists it is in, and how it is started."""

    stage: Stage
    args: dict[str, Any]
    env: dict[str, str]


def ours(
    folder: Path, topology: dict[str, Any], import_path: str = APP, ingresses: int = 1
) -> AbstractContextManager[Server]:
    names = ["Ingress", *(stage.capitalize() for stage in Stage if topology.get(stage, {}) is not None)]
    one_each: dict[str, dict[str, Any]] = {name: {"num_replicas": 1, "autoscaling_config": None} for name in names}
    one_each["Ingress"]["num_replicas"] = ingresses
    return serve_run(folder, {"accelerator": "cpu"} | topology, one_each, import_path=import_path)


@contextmanager
def reference(folder: Path, args: dict[str, Any] | None = None) -> Iterator[Server]:
    """An OpenAI server per stage with the flags of the reference's scripts, behind the proxy."""
    storage = folder / "ec"
    storage.mkdir()
    config = cpu_config((args or {}) | {"ec": {"connector": "ECExampleConnector", "storage_path": str(storage)}})
    with behind_proxy(folder, [reference_engine(config, stage) for stage in Stage]) as server:
        yield server
    if lacking := sum(not any(item.iterdir()) for item in storage.iterdir()):  # looking one up makes its folder
        raise RuntimeError(f"the reference's prefill did not find {lacking} embeddings, and encoded by itself")


def reference_engine(config: EPDConfig, stage: Stage) -> Engine:
    args = engine_args(config, stage, model_path(config)) | {"enable_request_id_headers": True}
    # The reference leaves vLLM's cache on. Without it, and without prefix caching, vLLM names the encoder's items by
    # chance, and prefill would encode everything again. 4 GiB by default, three times.
    args["mm_processor_cache_gb"] = 1
    if stage is Stage.DECODE:
        del args["ec_transfer_config"]  # the reference gives it to encoder and prefill only
    # The plugin works for "replicas" only: NIXL's thread must not spin here either, or the servers starve.
    env = replica_env(config, stage) | side_channel_env("127.0.0.1") | {REPLICA_ENV: f"benchmark-{stage}"}
    return Engine(stage, args, env)


@contextmanager
def behind_proxy(folder: Path, behind: list[Engine]) -> Iterator[Server]:
    log = folder / "proxy.log"
    mark = {"EPD_TEST_MARK": str(log)}  # one for all processes of the system
    try:
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            starts = [
                api_server(folder / f"{number}-{engine.stage}.log", engine.args, engine.env | mark)
                for number, engine in enumerate(behind)
            ]
            servers = list(pool.map(stack.enter_context, starts))
            (port,) = free_ports(1)
            command = [sys.executable, "-m", "benchmarks.baselines.proxy", "--port", str(port)]
            for stage, option in PROXY_OPTION.items():
                command += [option, *(s.url for e, s in zip(behind, servers, strict=True) if e.stage is stage)]
            yield stack.enter_context(start(command, port, log, mark))
    finally:
        kill_all(str(log))
