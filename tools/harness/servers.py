"""Real servers for the integration tests: ours as by `make serve`, and vLLM's own as the baseline. All on loopback."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from serve_app.config import EPDConfig
from serve_app.hooks.forked_worker import ADDRESS_ENV
from serve_app.launch.connectors import free_ports
from serve_app.launch.engine_args import engine_args, model_path, replica_env
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage

REPOSITORY = Path(__file__).parents[2]
API = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
MODEL = {"model": "demo-random", "served_model_name": "demo"}
"""Unless a test names another: the model whose answers depend on every token and pixel, in the place of the default."""

START_TIMEOUT_S = 420
APP = "serve_app.app:build_app"
SERVE = [sys.executable, "-m", "serve_app", "serve"]
"""What `make serve` runs."""
DEPLOYMENTS = ("Encoder", "Prefill", "Decode", "Ingress")
RAY_ENV = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy:middlewares",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30),
}
"""What `make serve` sets."""
OTHERS = re.compile("ray$|pymp-|torchinductor_|epd-card-")
"""In the temporary folder: the logs of Ray's sessions, a socket of its dashboard, PyTorch's cache, the lock of a card."""


@dataclass
class Server:
    """A running server and the processes behind it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    session: requests.Session = field(default_factory=requests.Session)
    dashboard: str = ""
    """Of the cluster that it was deployed on."""

    def post(self, path: str, body: Any = None, **kwargs: Any) -> requests.Response:
        return self.session.post(self.url + path, json=body, timeout=kwargs.pop("timeout", 120), **kwargs)

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=kwargs.pop("timeout", 30), **kwargs)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples whose labels include ``labels``."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def processes(self) -> list[psutil.Process]:
        """All processes of this server: those that carry its mark in their environment."""
        return marked_processes(self.mark)

    @property
    def mark(self) -> str:
        return str(self.log)

    def wait_until(
        self, condition: Any, what: str | Callable[[], str], timeout_s: float = 60, every_s: float = 0.1
    ) -> None:
        """Await a condition of the server. Fails with ``what`` was waited for and the end of the server's log."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                awaited = what if isinstance(what, str) else what()
                free = psutil.virtual_memory().available >> 20
                raise AssertionError(f"waited {timeout_s} s for {awaited}; {free} MiB of memory free\n{self.tail()}")
            time.sleep(every_s)

    def healthy(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except requests.RequestException:
            return False

    def statuses(self) -> dict[str, str]:
        """What Serve says of each deployment, where there is a dashboard."""
        if not self.dashboard:
            return {}
        told = requests.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()["applications"]["epd"]
        states = {name: each["status"] + f": {each['message']}" for name, each in told["deployments"].items()}
        return {"epd": told["status"] + f": {told['message']}"} | states

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def marked_environment(mark: str) -> dict[str, str]:
    """The environment of a server that shares nothing with others of this machine and whose processes can be found."""
    own = {"EPD_TEST_MARK": mark, "RAY_ADDRESS": "local"}
    # setproctitle writes the titles of engine processes over their environment, and with it over the mark.
    return dict(os.environ) | own | {"SPT_NOENV": "1"}


def marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("EPD_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_gone(mark: str, timeout_s: float = 30) -> list[str]:
    """What is left of a server after ``timeout_s``: command lines, empty when all is well."""
    end = time.monotonic() + timeout_s
    while (left := marked_processes(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return [" ".join(process.cmdline())[:200] or process.name() for process in left]


def shared_memory(mark: str) -> set[str]:
    """Names of the shared memory and semaphores of a server. By inode: glibc maps a semaphore under another name."""
    inodes = set()
    for process in marked_processes(mark):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            inodes |= {int(line.split()[4]) for line in maps.splitlines() if "/dev/shm/" in line}
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


def kill_all(mark: str) -> None:
    for process in marked_processes(mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


def default_sigint() -> None:
    """A shell that started pytest in the background made it, and all below it, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def start(
    command: list[str], port: int, log: Path, env: dict[str, str] | None = None, prefix: str = ""
) -> Iterator[Server]:
    environment = marked_environment(str(log)) | {"PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"} | (env or {})
    environment.pop("PYTEST_CURRENT_TEST", None)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
            preexec_fn=default_sigint,
        )
    server = Server(f"http://127.0.0.1:{port}{prefix}", process, log)
    try:

        def up() -> bool:
            text = log.read_text(errors="replace")
            if process.poll() is not None or "DEPLOY_FAILED" in text or "RayTaskError" in text:
                raise AssertionError(f"the server did not start\n{server.tail()}")
            return server.healthy()

        server.wait_until(up, "the server to be ready", START_TIMEOUT_S)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)


def serve_config(
    folder: Path,
    port: int,
    args: dict[str, Any],
    deployments: dict[str, dict[str, Any]] | None,
    import_path: str = APP,
    application: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A Serve config of our application; ``deployments``: Ray's options by name, ``application``: its own besides these,
    ``more``: those of Serve itself."""
    application = {
        "route_prefix": "/",
        **(application or {}),
        "name": "epd",
        "import_path": import_path,
        "args": MODEL | args,
        "deployments": [{"name": name} | options for name, options in (deployments or {}).items()],
    }
    # Nodes of the tests share a machine, and its ports.
    location = "HeadOnly" if args.get("http") == "proxy" else "Disabled"
    config = {"proxy_location": location, "http_options": {"host": "127.0.0.1", "port": port}}
    config |= {"applications": [application]} | more
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def serve_run(
    folder: Path,
    args: dict[str, Any],
    deployments: dict[str, dict[str, Any]] | None = None,
    env: dict[str, str] | None = None,
    import_path: str = APP,
    application: dict[str, Any] | None = None,
) -> Iterator[Server]:
    """Our application as `make serve` runs it; Ctrl-C at the end, and then no process, temporary file or
    shared memory of it may be left."""
    (port,) = free_ports(1)
    args = {"api": API, "ec": {"storage_path": str(folder / "ec")}} | args
    if args.get("encoder", True) is None:
        del args["ec"]
    path = serve_config(folder, port, args, deployments, import_path, application)
    log = folder / "serve.log"
    temp = tempfile.mkdtemp(prefix="epd-")  # a short path: sockets allow 107 bytes
    env = RAY_ENV | {"TMPDIR": temp} | (env or {})
    try:
        prefix = (application or {}).get("route_prefix", "")
        with start([*SERVE, str(path)], port, log, env, prefix) as server:
            yield server
            shared = shared_memory(str(log))
        left = wait_gone(str(log))
        left += [name for name in os.listdir(temp) if not OTHERS.match(name)]
        left += shared & set(os.listdir("/dev/shm"))
        assert not left, f"left behind after Ctrl-C: {left}"
    finally:
        kill_all(str(log))
        shutil.rmtree(temp, ignore_errors=True)


@dataclass
class Failed:
    """A start that failed."""

    status: int
    output: str
    ended_s: float
    """From the first line that tells of the failure to the end."""
    left: list[str]
    """Processes and temporary files."""


def serve_that_fails(folder: Path, args: dict[str, Any], within_s: float = 120) -> Failed:
    """Our application as `make serve` runs it, until that ends by itself."""
    (port,) = free_ports(1)
    path, mark, temp = serve_config(folder, port, args, None), str(folder), tempfile.mkdtemp(prefix="epd-")
    env = marked_environment(mark) | RAY_ENV | {"TMPDIR": temp, "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}
    process = subprocess.Popen(
        [*SERVE, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=REPOSITORY, text=True
    )
    watchdog = threading.Timer(within_s, kill_all, [mark])
    watchdog.start()
    try:
        lines, failed = [], math.inf
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if any(word in line for word in ("failed to start", "CannotStart", "ConfigError")):
                failed = min(failed, time.monotonic())
        status = process.wait()
        ended_s = time.monotonic() - failed
        left = wait_gone(mark, 10) + [name for name in os.listdir(temp) if not OTHERS.match(name)]
        return Failed(status, "".join(lines), ended_s, left)
    finally:
        watchdog.cancel()
        kill_all(mark)
        shutil.rmtree(temp, ignore_errors=True)


FORKS = """
import os, sys
from pathlib import Path
from serve_app.launch import fork_server

server = fork_server.start(Path(sys.argv[1]))
print(os.environ[fork_server.ADDRESS_ENV], flush=True)
sys.stdin.read()
server.end()
"""


@contextlib.contextmanager
def forking(folder: Path, args: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """What to add to ``environment`` for a cluster whose replicas of an application with ``args`` are forked, as those of
    `make serve` are: else each loads vLLM by itself. Replicas live on afterwards."""
    path = serve_config(folder, 0, args, None)
    env = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", FORKS, str(path)]
    with subprocess.Popen(command, env=env, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        address = server.stdout.readline().decode().strip()
        assert address, "no server that forks"
        yield {ADDRESS_ENV: address}
    assert server.returncode == 0


def serve_deploy(
    folder: Path,
    dashboard: str,
    environment: dict[str, str],
    port: int,
    args: dict[str, Any],
    deployments: dict[str, dict[str, Any]] | None = None,
) -> Server:
    """Our application by `serve deploy` on a cluster that runs, ready. Whoever started the cluster ends it."""
    path = serve_config(folder, port, args, deployments)
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    log = folder / "no.log"
    log.write_text("")
    server = Server(f"http://127.0.0.1:{port}", None, log, dashboard=dashboard)  # type: ignore[arg-type]
    server.wait_until(server.healthy, lambda: f"the deployed application: {server.statuses()}", 240)
    return server


@contextlib.contextmanager
def vllm_server(folder: Path, args: dict[str, Any]) -> Iterator[Server]:
    """One `AsyncLLM` behind vLLM's own API server, with the engine arguments of our decode stage."""
    with engine_server(folder, cpu_config(args | {"encoder": None, "prefill": None})) as server:
        yield server


@contextlib.contextmanager
def engine_server(folder: Path, config: EPDConfig, more: dict[str, Any] | None = None) -> Iterator[Server]:
    """The decode engine of a resolved config behind vLLM's own API server; ``more``: engine arguments besides."""
    engine = engine_args(config, Stage.DECODE, model_path(config)) | API | (more or {})
    log = folder / "vllm.log"
    try:
        env = replica_env(config, Stage.DECODE) | {"VLLM_RPC_BASE_PATH": str(folder)}  # its sockets go with the folder
        with api_server(log, engine, env) as server:
            yield server
    finally:
        kill_all(str(log))


def cpu_config(args: dict[str, Any]) -> EPDConfig:
    return resolve(EPDConfig.model_validate(MODEL | args | {"accelerator": "cpu"}), Cluster(0, 64)).config


def api_server(log: Path, engine: dict[str, Any], env: dict[str, str]) -> contextlib.AbstractContextManager[Server]:
    """vLLM's own API server around an engine. The caller ends what Ctrl-C leaves of it (`kill_all`)."""
    (port,) = free_ports(1)
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    for key, value in engine.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [name, *map(str, value)]
        else:
            flags += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return start([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags], port, log, env)


def engine_pids(server: Server) -> dict[str, list[int]]:
    """Process ids by kind: replica name (`Encoder`, …), `EngineCore`, `Worker`."""
    found: dict[str, list[int]] = {}
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline()) or process.name()
            if match := re.search(r"ServeReplica:epd:(\w+)|VLLM::(\w+)", name):
                found.setdefault(match[1] or match[2], []).append(process.pid)
    return found


def listeners(server: Server) -> dict[str, set[str]]:
    """Addresses on which the processes of a server listen on its port, by what they are."""
    port, found = int(server.url.rpartition(":")[2]), {}
    for process in server.processes():
        name = " ".join(process.cmdline()) or process.name()
        addresses = {
            c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == port
        }
        if addresses:
            found[name.strip()] = addresses
    return found


def wait_until_free(server: Server) -> float:
    """Seconds until its engines run nothing any more."""
    began = time.monotonic()
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 0, "the engine to be free", 10)
    return time.monotonic() - began


def missing(server: Server, replicas: int) -> str:
    """What does not serve yet of an E+P+D application with so many replicas of each; a server is ready with one of each.
    Empty when every engine shows on the metrics page and all ingresses run."""
    processes = engine_pids(server)
    counts = {name: len(processes.get(name, [])) for name in DEPLOYMENTS}
    if set(counts.values()) != {replicas}:
        return f"{replicas} replicas of each deployment, not {counts}; engines: {len(processes.get('EngineCore', []))}"
    try:
        page = server.get("/metrics").text
    except requests.RequestException as error:
        return f"the metrics page: {type(error).__name__}"
    engines = set(re.findall(r'^vllm:num_requests_running\{.*?replica="(\w+)",stage="(\w+)"', page, re.MULTILINE))
    if len(engines) != 3 * replicas:
        return f"{3 * replicas} engines on the metrics page, not {sorted(engines)}"
    return "" if server.healthy() else "/health"


def wait_for_replicas(server: Server, replicas: int) -> None:
    def what() -> str:
        return f"{missing(server, replicas)}; {server.statuses()}"

    server.wait_until(lambda: not missing(server, replicas), what, 240, every_s=1.0)
