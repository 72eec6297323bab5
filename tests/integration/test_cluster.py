"""A cluster that is there already: what a deploy claims of it, and what is left after it.

In a file of its own: `ray stop` ends all of Ray on this machine, another test's server too.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve_app.launch.connectors import free_ports
from tools.harness.cases import chat, image, text
from tools.harness.servers import (
    REPOSITORY,
    Server,
    forking,
    kill_all,
    marked_environment,
    marked_processes,
    serve_deploy,
    wait_gone,
)

BIN = Path(sys.executable).parent
ASK = chat(text("Describe."), image(1))


class Cluster:
    """A Ray cluster by `ray start`, with GPUs that are declared only: resources, no devices. Replicas are forked."""

    def __init__(self, folder: Path) -> None:
        self.mark = str(folder)
        self.forks = ExitStack()
        self.http_port, gcs, dashboard = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = marked_environment(self.mark) | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
        self.environment["RAY_AUTH_MODE"] = "disabled"  # else it depends on whether this user has a token
        self.environment |= self.forks.enter_context(forking(folder, {"accelerator": "cpu"}, self.environment))
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=8", "--num-gpus=4"]
        self.run(BIN / "ray", "start", *head)

    def run(self, *command: Any) -> str:
        result = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def deploy(self, folder: Path, args: dict[str, Any]) -> Server:
        return serve_deploy(folder, self.dashboard, self.environment, self.http_port, args)

    def resources(self) -> dict[str, float]:
        """Claimed resources by name."""
        code = (
            "import json, ray; ray.init(logging_level='ERROR'); a = ray.available_resources();"
            "print('##' + json.dumps({k: v - a.get(k, 0) for k, v in ray.cluster_resources().items()}))"
        )
        claimed: dict[str, float] = json.loads(self.run(sys.executable, "-c", code).rpartition("##")[2])
        return claimed

    def names(self) -> list[str]:
        """Of the processes of this cluster."""
        return [(" ".join(process.cmdline()) or process.name()).strip()[:80] for process in marked_processes(self.mark)]

    def engines(self) -> list[str]:
        """Names of the engine processes of this cluster; now and then one keeps that of the program it is spawned as."""
        return [name for name in self.names() if name.startswith("VLLM") or "multiprocessing.spawn" in name]

    def status(self) -> str:
        """Of applications, deployments and replicas."""
        return self.run(BIN / "serve", "status", "-a", self.dashboard)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    try:
        ray = Cluster(folder)
        with ray.forks:
            yield ray
    finally:
        kill_all(str(folder))


def test_deploy_claims_what_it_uses_and_shutdown_and_ray_stop_leave_nothing(tmp_path: Path) -> None:
    args = {
        "accelerator": "cpu",
        "encoder": {"gpus_per_replica": 0.25, "cpus_per_replica": 0.5},
        "prefill": None,
        "decode": {"gpus_per_replica": 2, "cpus_per_replica": 2},
        "ingress_cpus": 1,
        "ec": {"storage_path": str(tmp_path / "ec")},
    }
    with cluster(tmp_path) as ray:
        server = ray.deploy(tmp_path, args)
        answer = server.post(*ASK)
        assert answer.status_code == 200 and "x-epd-rungs" not in answer.headers, f"{answer.headers} {ray.status()}"
        claimed = ray.resources()
        assert claimed["GPU"] == pytest.approx(2.25)
        assert claimed["CPU"] == pytest.approx(3.5, abs=0.1)
        assert len(ray.engines()) == 2, f"{ray.names()} {ray.status()}"

        ray.run(BIN / "serve", "shutdown", "-y", "-a", ray.dashboard)
        server.wait_until(lambda: not ray.engines(), "all engines to end after `serve shutdown`", 60)

        server = ray.deploy(tmp_path, single(args))
        assert server.post(*ASK).status_code == 200
        assert len(ray.engines()) == 1
        ray.run(BIN / "ray", "stop")
        ray.forks.close()
        assert wait_gone(ray.mark) == []


def single(args: dict[str, Any]) -> dict[str, Any]:
    """The same as one engine."""
    return {key: value for key, value in args.items() if key != "ec"} | {"encoder": None}
