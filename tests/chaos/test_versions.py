"""Under load, stages grow, get a new config and other weights, and shrink. A replica that goes away first finishes what it
holds, and no answer is made with two versions of the weights."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.numpy import load_file, save_file

from serve_app.config import EPDConfig
from serve_app.launch.engine_args import DEMO_DEFAULTS, model_path
from serve_app.launch.placement import Cluster as Cpu
from serve_app.launch.placement import resolve
from tests.chaos.conftest import Row
from tests.chaos.load import Ask, Load, Outcome, ask, asks, failed, of_choices, wrong
from tests.integration.test_cluster import BIN, Cluster, cluster
from tools.harness.servers import Server, serve_config

REQUESTS = 200

pytestmark = pytest.mark.engine


class Application:
    """The application on a cluster, deployed again and again, as `serve deploy` does it."""

    def __init__(self, ray: Cluster, folder: Path) -> None:
        self.ray, self.folder = ray, folder
        demo = resolve(EPDConfig(accelerator="cpu", model="demo-random"), Cpu(0, 2)).config
        self.model = Path(shutil.copytree(model_path(demo), folder / "model"))
        self.args: dict[str, Any] = {"accelerator": "cpu", "ec": {"storage_path": str(folder / "ec")}}
        self.args |= {"model": str(self.model), "engine_args": DEMO_DEFAULTS}
        log = folder / "no.log"
        log.write_text("")
        self.server = Server(f"http://127.0.0.1:{ray.http_port}", None, log, dashboard=ray.dashboard)  # type: ignore[arg-type]

    def replace_weights(self) -> None:
        """By others of the same names and shapes, in the folder that the engines were started from."""
        file = self.model / "model.safetensors"
        tensors = {name: tensor[..., ::-1] if tensor.ndim > 1 else tensor for name, tensor in load_file(file).items()}
        save_file({name: tensor.copy() for name, tensor in tensors.items()}, file.with_suffix(".new"), {"format": "pt"})
        os.replace(file.with_suffix(".new"), file)

    def deploy(
        self, counts: dict[str, int], args: dict[str, Any] | None = None, look: Callable[[], None] = lambda: None
    ) -> None:
        """Returns when as many replicas run as were asked for, all of them of this config. ``look``: called meanwhile."""
        before = self.replicas()
        self.args |= args or {}
        replicas = {name: {"num_replicas": count} for name, count in counts.items()}
        path = serve_config(self.folder, self.ray.http_port, self.args, replicas)
        self.ray.run(BIN / "serve", "deploy", "-a", self.ray.dashboard, path)

        def there() -> bool:
            look()
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


SLOW_START = """
import multiprocessing, time
def register():
    if multiprocessing.parent_process() is not None:  # an engine of a replica
        time.sleep(10)
"""


def slow_start(folder: Path) -> dict[str, str]:
    """Environment of a stage whose engines take their time to start: a plugin of vLLM that waits."""
    plugin = folder / "slow"
    metadata = plugin / "slow_start-1.dist-info"
    metadata.mkdir(parents=True)
    (plugin / "slow_start.py").write_text(SLOW_START)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-start\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nslow = slow_start:register\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(plugin), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).strip(":")
    }


def versions(server: Server) -> dict[str, set[str]]:
    """Of the replicas that run, by stage; nothing while no ingress answers."""
    try:
        stages = server.get("/status").json()
    except (requests.RequestException, ValueError):
        return {}
    return {stage["stage"]: {load["version"] for load in stage["loads"] if "version" in load} for stage in stages}


def overlap(told: dict[str, set[str]]) -> bool:
    """Whether prefill and decode have replicas that cannot go on from each other."""
    return len(told.get("prefill", set()) | told.get("decode", set())) > 1


def test_every_answer_is_of_one_version_while_replicas_come_and_go_and_weights_are_replaced(
    tmp_path: Path, baseline: dict[str, Any], row: Row
) -> None:
    one = {"Ingress": 1, "Encoder": 1, "Prefill": 1, "Decode": 1}
    two = one | {"Prefill": 2, "Decode": 2}
    seen: list[dict[str, set[str]]] = []
    with cluster(tmp_path) as ray:
        application = Application(ray, tmp_path)
        application.deploy(two)
        server = application.server
        server.wait_until(server.healthy, "the deployed application", 60)
        with Load(server, asks(baseline)[0], pause_s=0.5) as load:  # the cores are for engines that start
            server.wait_until(lambda: len(load.outcomes) >= REQUESTS / 2, f"{REQUESTS // 2} answers", 120)
            application.replace_weights()
            replaced = time.monotonic()
            changed = {"advanced": {"retry": {"attempts": 4}}, "prefill": {"env": slow_start(tmp_path)}}
            application.deploy(two | {"Ingress": 2}, changed, lambda: seen.append(versions(server)))
            everywhere = time.monotonic()
            application.deploy(one)
            server.wait_until(lambda: len(load.outcomes) >= REQUESTS, f"{REQUESTS} answers", 120)
        with requests.Session() as session:
            new = {id(each): ask(session, server, each, streaming=False).choices for each in load.asks}

    def version(outcome: Outcome) -> str:
        told = outcome.choices
        if told == of_choices(outcome.asked.answer["choices"]):
            return "old"
        return "new" if told == new[id(outcome.asked)] else "neither"

    def tells_apart(each: Ask) -> bool:
        return new[id(each)] not in (None, of_choices(each.answer["choices"]))

    for outcome in load.outcomes:  # what the baseline says is the old version's answer
        outcome.wrong = "of no version" if outcome.status == 200 and version(outcome) == "neither" else ""
    row("weights replaced in a deploy", load.under_way_since(replaced), replaced, everywhere)
    print(f"{Counter(map(version, load.outcomes))}, seen {[versions for versions, _ in groupby(seen)]}")
    assert all(map(tells_apart, load.asks))
    assert not failed(load.outcomes)
    assert not wrong(load.outcomes)
    assert any(map(overlap, seen)), seen
    before = [outcome for outcome in load.outcomes if outcome.began + outcome.seconds < replaced]
    assert {version(outcome) for outcome in before} == {"old"}
    assert {version(outcome) for outcome in load.begun_since(everywhere)} == {"new"}
