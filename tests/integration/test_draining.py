"""A replica that goes away first finishes what it holds: under load, stages shrink, grow and get a new config."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import REGISTRY

from serve_app.config import EPDConfig, Stage
from serve_app.handoff import Prompt, StageRequest, prefill_params
from serve_app.placement import Cluster as Cpu
from serve_app.placement import resolve
from serve_app.roles import engine_args, model_path, replica_env
from serve_app.transfer import side_channel_env
from serve_app.vllm_plugin import REPLICA_ENV
from tests.chaos.load import Load, asks
from tests.integration.servers import Server, serve_config
from tests.integration.test_lifecycle import BIN, Cluster, cluster

REQUESTS = 200
LEASE_S = 6


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
        replicas = {name: {"num_replicas": count} for name, count in counts.items()}
        path = serve_config(self.folder, self.ray.http_port, self.args, replicas)
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


def test_a_prefill_engine_says_what_it_holds_until_the_lease_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(EPDConfig.model_validate({"accelerator": "cpu", "kv": {"lease_s": LEASE_S}}), Cpu(0, 2)).config
    folder = model_path(config)
    for key, value in (replica_env(config, Stage.PREFILL) | side_channel_env("127.0.0.1")).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(REPLICA_ENV, "test")
    args = {key: value for key, value in engine_args(config, Stage.PREFILL, folder).items() if key[:3] != "ec_"}

    async def main() -> None:
        from vllm import SamplingParams

        from serve_app.engine import StageEngine

        before = set(REGISTRY._collector_to_names)
        engine = StageEngine(Stage.PREFILL, args)
        try:
            assert not engine.holds_blocks
            params = prefill_params(SamplingParams(max_tokens=4), None)
            output = await engine.final(StageRequest("r", Prompt(list(range(300, 400))), params))
            assert output.kv_transfer_params is not None
            began = time.monotonic()
            await asyncio.sleep(1)  # nothing to wait for: it has to stay so
            assert engine.holds_blocks and engine.kv_use < 0.1
            async with asyncio.timeout(3 * LEASE_S):
                while engine.holds_blocks:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert time.monotonic() - began > LEASE_S / 2
        finally:
            engine.shutdown()
            for collector in set(REGISTRY._collector_to_names) - before:  # of this process, which goes on
                REGISTRY.unregister(collector)

    asyncio.run(main())


def test_no_request_fails_while_replicas_go_and_a_new_config_comes(tmp_path: Path, baseline: dict[str, Any]) -> None:
    one = {"Ingress": 1, "Encoder": 1, "Prefill": 1, "Decode": 1}
    two = one | {"Prefill": 2, "Decode": 2}
    with cluster(tmp_path) as ray:
        application = Application(ray, tmp_path)
        application.deploy(two)
        server = application.server
        server.wait_until(server.healthy, "the deployed application", 60)
        began = time.monotonic()
        with Load(server, asks(baseline)[0]) as load:
            application.deploy(one)
            application.deploy(two | {"Ingress": 2}, {"retry": {"attempts": 4}})
            application.deploy(one)
            server.wait_until(lambda: len(load.outcomes) >= REQUESTS, f"{REQUESTS} answers", 120)
        bad = [outcome for outcome in load.outcomes if outcome.status != 200 or outcome.wrong]
        slowest = max(outcome.seconds for outcome in load.outcomes)
        rungs = [outcome.rungs for outcome in load.outcomes if outcome.rungs]
        print(f"{len(load.outcomes)} in {time.monotonic() - began:.0f} s, slowest {slowest:.1f} s, rungs {rungs}")
        assert not bad
