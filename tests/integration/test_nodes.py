"""Several nodes: each stage on nodes of its own, with addresses of their own, and one of them goes under load.

The nodes are raylets of one machine (`ray.cluster_utils.Cluster`), on different addresses of the loopback.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from ray.cluster_utils import Cluster

from serve_app.transfer import free_ports
from tests.chaos.load import Load, asks
from tests.integration.answers import differences, reduce
from tests.integration.cases import CASES
from tests.integration.servers import REPOSITORY, Server, kill_all, marked_environment, marked_processes
from tests.integration.test_lifecycle import BIN

PLACES = {"encoder": "127.0.0.2", "prefill": "127.0.0.3", "decode": "127.0.0.4"}
SECOND_PREFILL = "127.0.0.5"


class Nodes:
    """A head and a node per stage, two for prefill; and the application on them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.http_port, dashboard = free_ports(2)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        head = {"num_cpus": 4, "include_dashboard": True, "dashboard_port": dashboard}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"node_ip_address": "127.0.0.1"})
        self.environment = environment | {"RAY_ADDRESS": self.cluster.address}
        for stage, address in PLACES.items():
            self.add(stage, address)
        self.second_prefill = self.add("prefill", SECOND_PREFILL)

    def add(self, stage: str, address: str) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={f"{stage}_node": 1}, node_ip_address=address)

    def deploy(self) -> Server:
        stages = {stage: {"cpus_per_replica": 0.1, "resources": {f"{stage}_node": 1}} for stage in PLACES}
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http_port},
            "applications": [
                {
                    "name": "epd",
                    "import_path": "serve_app.app:build_app",
                    "args": {"accelerator": "cpu", "ingress_cpus": 2, "ec": {"storage_path": str(self.folder / "ec")}}
                    | stages,
                    "deployments": [{"name": "Prefill", "num_replicas": 2}],
                }
            ],
        }
        path = self.folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(BIN / "serve"), "deploy", "-a", self.dashboard, str(path)]
        subprocess.run(command, env=self.environment, cwd=REPOSITORY, check=True, timeout=120)
        log = self.folder / "no.log"
        log.write_text("")
        server = Server(f"http://127.0.0.1:{self.http_port}", None, log)  # type: ignore[arg-type]
        server.wait_until(lambda: server.healthy() and len(self.replicas("Prefill")) == 2, "the application", 300)
        return server

    def replicas(self, deployment: str) -> dict[str, str]:
        """Address of the node by replica, of those that run."""
        details = requests.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()
        replicas = details["applications"]["epd"]["deployments"][deployment]["replicas"]
        return {each["replica_id"]: each["node_ip"] for each in replicas if each["state"] == "RUNNING"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    environment = marked_environment(str(folder)) | {"RAY_AUTH_MODE": "disabled"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.delenv("RAY_ADDRESS")
        nodes = Nodes(folder, environment)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()
            kill_all(str(folder))


@pytest.fixture(scope="module")
def server(nodes: Nodes, baseline: dict[str, Any]) -> Server:
    return nodes.deploy()


def side_channels(nodes: Nodes) -> set[str]:
    """Addresses under which the engines of the application offer what they hold."""
    found = set()
    for process in marked_processes(str(nodes.folder)):
        try:
            found.add(process.environ().get("VLLM_NIXL_SIDE_CHANNEL_HOST", ""))
        except psutil.Error:
            continue
    return found - {""}


def test_stages_are_on_nodes_of_their_own_with_their_addresses(nodes: Nodes, server: Server) -> None:
    places = {stage: set(nodes.replicas(stage.capitalize()).values()) for stage in PLACES}
    assert places == {stage: {address} for stage, address in PLACES.items()} | {
        "prefill": {PLACES["prefill"], SECOND_PREFILL}
    }
    assert side_channels(nodes) == {*PLACES.values(), SECOND_PREFILL}


@pytest.mark.parametrize("name", ["text of many blocks", "1 image", "4 images", "video"])
def test_nodes_together_answer_as_one_engine(server: Server, baseline: dict[str, Any], name: str) -> None:
    response = server.post(*CASES[name])
    assert response.status_code == 200, response.text
    assert differences(reduce(response.json()), baseline[name]) == []


def test_embeddings_and_blocks_crossed_the_nodes(server: Server) -> None:
    assert server.metric("epd:ec_items_total", stage="prefill", event="loaded") > 0
    assert server.metric("epd:ec_items_total", stage="prefill", event="encoded") == 0
    assert server.metric("vllm:nixl_bytes_transferred_count", stage="decode") > 0
    assert server.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_node_that_goes_under_load_takes_no_request_along(
    nodes: Nodes, server: Server, baseline: dict[str, Any]
) -> None:
    with Load(server, asks(baseline)[0]) as load:
        server.wait_until(lambda: len(load.outcomes) >= 20, "requests before", 60)
        gone = time.monotonic()
        nodes.cluster.remove_node(nodes.second_prefill, allow_graceful=False)
        server.wait_until(lambda: len(nodes.replicas("Prefill")) == 1, "Serve to see that it is gone", 90)
        back = time.monotonic()
        server.wait_until(lambda: len(load.begun_since(back)) >= 20, "requests after", 90)
    during = load.under_way_since(gone)
    assert not [outcome for outcome in load.outcomes if outcome.wrong]
    assert {outcome.status for outcome in during} <= {200, 503, "error event"}
    failed = [outcome for outcome in during if outcome.status != 200]
    assert not [outcome for outcome in failed if outcome.began >= back], failed[:3]
    print(f"{len(during)} requests, {len(failed)} failed, rungs {sorted({o.rungs for o in during if o.rungs})}")
