"""A replica that goes away first finishes what it holds: under load, stages shrink, grow and get a new config."""

import time
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.chaos.load import Load, answers
from tests.integration.servers import Server
from tests.integration.test_lifecycle import BIN, Cluster, cluster

REQUESTS = 200


class Application:
    """The application on a cluster, deployed again and again, as `serve deploy` does it."""

    def __init__(self, ray: Cluster, folder: Path) -> None:
        self.ray, self.folder = ray, folder
        self.args: dict[str, Any] = {"accelerator": "cpu", "ec": {"storage_path": str(folder / "ec")}}
        log = folder / "no.log"
        log.write_text("")
        self.server = Server(f"http://127.0.0.1:{ray.http_port}", None, log)  # type: ignore[arg-type]

    def deploy(self, counts: dict[str, int], args: dict[str, Any] | None = None) -> None:
        """Returns when as many replicas run as were asked for, all of them of this config."""
        before = self.replicas()
        self.args |= args or {}
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.ray.http_port},
            "applications": [
                {
                    "name": "epd",
                    "import_path": "serve_app.app:build_app",
                    "args": self.args,
                    "deployments": [{"name": name, "num_replicas": count} for name, count in counts.items()],
                }
            ],
        }
        path = self.folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        self.ray.run(BIN / "serve", "deploy", "-a", self.ray.dashboard, path)

        def there() -> bool:
            now = self.replicas()
            settled = all(state == "RUNNING" for states in now.values() for state in states.values())
            as_many = {name: len(states) for name, states in now.items()} == counts
            return settled and as_many and not (args and any(now[name].keys() & before[name].keys() for name in now))

        self.server.wait_until(there, f"{counts} with {args}", 300)

    def replicas(self) -> dict[str, dict[str, str]]:
        """State by replica by deployment."""
        details = requests.get(f"{self.ray.dashboard}/api/serve/applications/", timeout=30).json()
        deployments = details["applications"].get("epd", {}).get("deployments", {})
        return {
            name: {replica["replica_id"]: replica["state"] for replica in deployment["replicas"]}
            for name, deployment in deployments.items()
        }


def test_no_request_fails_while_replicas_go_and_a_new_config_comes(tmp_path: Path) -> None:
    two = {"Ingress": 2, "Encoder": 1, "Prefill": 2, "Decode": 2}
    with cluster(tmp_path) as ray:
        application = Application(ray, tmp_path)
        application.deploy(two)
        server = application.server
        server.wait_until(server.healthy, "the deployed application", 60)
        expected = answers(server)
        began = time.monotonic()
        with Load(server, expected, threads=4) as load:
            application.deploy(two | {"Prefill": 1, "Decode": 1})
            application.deploy(two)
            application.deploy(two, {"retry": {"attempts": 4}})
            server.wait_until(lambda: len(load.outcomes) >= REQUESTS, f"{REQUESTS} answers", 120)
        bad = [outcome for outcome in load.outcomes if outcome.status != 200 or outcome.wrong]
        slowest = max(outcome.seconds for outcome in load.outcomes)
        rungs = [outcome.rungs for outcome in load.outcomes if outcome.rungs]
        print(f"{len(load.outcomes)} in {time.monotonic() - began:.0f} s, slowest {slowest:.1f} s, rungs {rungs}")
        assert not bad
