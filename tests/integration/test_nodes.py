"""Several nodes: each stage on nodes of its own, with addresses of their own, and one of them goes under load.

The nodes are raylets of one machine (`ray.cluster_utils.Cluster`), each on an address of the loopback. The head is on the
machine's own: Ray takes 127.0.0.1 for it when it connects, and a head that listens on the loopback only is not found.
"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
from ray import serve
from ray.cluster_utils import Cluster

from serve_app.launch.connectors import free_ports
from serve_app.routing.handles import StageHandle, is_alive
from serve_app.stage import Stage
from tests.chaos.load import Load, asks
from tools.harness.answers import answered, differences
from tools.harness.cases import CASES
from tools.harness.servers import (
    RAY_ENV,
    Server,
    kill_all,
    marked_environment,
    marked_processes,
    serve_deploy,
    wait_gone,
)

PLACES = {"encoder": "127.0.0.2", "prefill": "127.0.0.3", "decode": "127.0.0.4"}
SECOND_PREFILL = "127.0.0.5"


class Nodes:
    """A head and a node per stage, two for prefill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http_port, dashboard = free_ports(2)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.cluster = Cluster()
        self.head = self.cluster.add_node(num_cpus=4, include_dashboard=True, dashboard_port=dashboard)
        for stage, address in PLACES.items():
            self.add(stage, address)
        self.second_prefill = self.add("prefill", SECOND_PREFILL)

    def add(self, stage: str, address: str) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={f"{stage}_node": 1}, node_ip_address=address)

    def addresses(self, deployment: str) -> list[str]:
        """Of the nodes of those replicas that run."""
        details = requests.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()
        replicas = details["applications"]["epd"]["deployments"][deployment]["replicas"]
        return sorted(each["node_ip"] for each in replicas if each["state"] == "RUNNING")

    def side_channels(self) -> set[str]:
        """Addresses under which engines offer what they hold."""
        found = set()
        for process in marked_processes(str(self.folder)):
            try:
                found.add(process.environ().get("VLLM_NIXL_SIDE_CHANNEL_HOST", ""))
            except psutil.Error:
                continue
        return found - {""}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (marked_environment(str(folder)) | RAY_ENV).items():
            patch.setenv(key, value)
        patch.delenv("RAY_ADDRESS")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it depends on whether this user has a token
        nodes = None
        try:
            nodes = Nodes(folder)
            yield nodes
        finally:
            if nodes:
                nodes.cluster.shutdown()
            left = wait_gone(str(folder))
            kill_all(str(folder))
        assert not left, f"left behind by the nodes: {left}"


@pytest.fixture(scope="module")
def server(nodes: Nodes, baseline: dict[str, Any]) -> Server:
    stages = {stage: {"cpus_per_replica": 0.1, "resources": {f"{stage}_node": 1}} for stage in PLACES}
    args = {"accelerator": "cpu", "ingress_cpus": 2, "ec": {"storage_path": str(nodes.folder / "ec")}} | stages
    environment = marked_environment(str(nodes.folder)) | {"RAY_ADDRESS": nodes.cluster.address}
    replicas = {"Prefill": {"num_replicas": 2}}
    server = serve_deploy(nodes.folder, nodes.dashboard, environment, nodes.http_port, args, replicas)
    server.wait_until(lambda: len(nodes.addresses("Prefill")) == 2, "both replicas of prefill", 120)
    # It listens before Serve's controller has heard that it has started.
    server.wait_until(lambda: nodes.addresses("Ingress"), "Serve to know of the ingress", 30)
    return server


def test_stages_are_on_nodes_of_their_own_with_their_addresses(nodes: Nodes, server: Server) -> None:
    places = {name: nodes.addresses(name) for name in ("Ingress", "Encoder", "Prefill", "Decode")}
    assert places == {
        "Ingress": [nodes.head.node_ip_address],
        "Encoder": [PLACES["encoder"]],
        "Prefill": [PLACES["prefill"], SECOND_PREFILL],
        "Decode": [PLACES["decode"]],
    }
    assert nodes.side_channels() == {*PLACES.values(), SECOND_PREFILL}


@pytest.mark.parametrize("name", ["text of many blocks", "1 image", "4 images", "video"])
def test_nodes_together_answer_as_one_engine(server: Server, baseline: dict[str, Any], name: str) -> None:
    assert differences(answered(server.post(*CASES[name])), baseline[name]) == []


def test_embeddings_and_blocks_crossed_the_nodes(server: Server) -> None:
    assert server.metric("epd:ec_items_total", stage="prefill", event="loaded") > 0
    assert server.metric("epd:ec_items_total", stage="prefill", event="encoded") == 0
    assert server.metric("vllm:nixl_bytes_transferred_count", stage="decode") > 0
    assert server.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_ray_knows_whether_a_replica_of_another_node_lives(nodes: Nodes, server: Server) -> None:
    """What a call that has been silent asks."""
    with ray.init(nodes.cluster.address, log_to_driver=False):
        handle = StageHandle(Stage.DECODE, serve.get_deployment_handle("Decode", "epd"))
        ((_, replica, _),) = asyncio.run(handle.broadcast("metrics"))
        assert is_alive(handle.actor(replica))
        assert not is_alive(handle.actor("gone"))


def test_node_that_goes_under_load_takes_no_request_along(
    nodes: Nodes, server: Server, baseline: dict[str, Any]
) -> None:
    with Load(server, asks(baseline)[0]) as load:
        server.wait_until(lambda: len(load.outcomes) >= 20, "requests before", 60)
        gone = time.monotonic()
        nodes.cluster.remove_node(nodes.second_prefill, allow_graceful=False)
        server.wait_until(lambda: nodes.addresses("Prefill") == [PLACES["prefill"]], "Serve to see that it is gone", 90)
        back = time.monotonic()
        server.wait_until(lambda: len(load.begun_since(back)) >= 20, "requests after", 90)
    during = load.under_way_since(gone)
    failed = [outcome for outcome in during if outcome.status != 200]
    seen = f"{len(during)} requests, {back - gone:.0f} s until Serve saw it, {len(failed)} failed: {failed[:3]}"
    print(seen, {outcome.rungs for outcome in during})
    assert not [outcome for outcome in load.outcomes if outcome.wrong], seen
    assert {outcome.status for outcome in during} <= {200, 503, "error event"}, seen
    assert not [outcome for outcome in failed if outcome.began >= back], seen
    assert server.healthy()
    assert nodes.side_channels() == set(PLACES.values()), "an engine outlived its node"


def test_node_that_comes_takes_the_place_of_the_one_that_went(
    nodes: Nodes, server: Server, baseline: dict[str, Any]
) -> None:
    nodes.add("prefill", "127.0.0.6")
    server.wait_until(lambda: nodes.addresses("Prefill") == [PLACES["prefill"], "127.0.0.6"], "its replica", 120)
    with Load(server, asks(baseline)[0]) as load:
        server.wait_until(lambda: len(load.outcomes) >= 20, "requests", 60)
    assert {outcome.status for outcome in load.outcomes} == {200}
    assert not [outcome for outcome in load.outcomes if outcome.wrong]
