"""A node that loses its power or its network under load: no connection is closed, nothing answers.

The node is a raylet in a network namespace of its own, on a bridge with the head. Its cable is pulled. Needs a machine where
a network namespace can be made.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from serve_app.launch.connectors import free_ports
from serve_app.stage import Stage
from tests.chaos.load import Load, asks
from tests.integration.test_cluster import BIN
from tools.harness.servers import (
    DEPLOYMENTS,
    RAY_ENV,
    Server,
    forking,
    kill_all,
    marked_environment,
    serve_deploy,
    wait_for_replicas,
    wait_gone,
)

HEAD, NODE = "10.77.0.1", "10.77.0.2"
NET, BRIDGE, HEAD_CABLE, NODE_CABLE, NAMESPACE = "epd-net", "epd-bridge", "epd-head", "epd-node", "epd-node"
STAGES = tuple(stage.value for stage in Stage)
RAY = {
    "UCX_NET_DEVICES": NET,  # the same name in both places; the machine's other network does not reach the node
    "RAY_AUTH_MODE": "disabled",  # else it depends on whether this user has a token
    # Ray takes a node that does not answer for dead after 15 s, not after 50.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
SOON_S = 40.0
"""15 s until Ray knows, 15 s until a silent call asks, and the next attempt."""

pytestmark = pytest.mark.engine


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove_network() -> None:
    for what in (["netns", NAMESPACE], *(["link", name] for name in (NODE_CABLE, HEAD_CABLE, BRIDGE))):
        with suppress(subprocess.CalledProcessError):  # it is not there
            ip(what[0], "delete", what[1])


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Two addresses on interfaces of one name, the second in a namespace of its own, each with a cable to a bridge."""
    remove_network()
    inside = ("-n", NAMESPACE)
    try:
        ip("netns", "add", NAMESPACE)
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "add", HEAD_CABLE, "type", "veth", "peer", "name", NET)
        ip("link", "add", NODE_CABLE, "type", "veth", "peer", "name", NET, "netns", NAMESPACE)
        ip("link", "set", HEAD_CABLE, "master", BRIDGE)
        ip("link", "set", NODE_CABLE, "master", BRIDGE)
        ip("address", "add", f"{HEAD}/24", "dev", NET)
        ip(*inside, "address", "add", f"{NODE}/24", "dev", NET)
        for name in (BRIDGE, HEAD_CABLE, NODE_CABLE, NET):
            ip("link", "set", name, "up")
        for name in ("lo", NET):
            ip(*inside, "link", "set", name, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove_network()
        pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', '') or error}")
    yield
    remove_network()


@pytest.fixture(scope="module")
def server(network: None, baseline: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A replica of each stage on the head, and one of each on the node. Both ingresses on the head."""
    folder = tmp_path_factory.mktemp("power")
    http_port, gcs, dashboard = free_ports(3)
    mark = str(folder / "no.log")
    environment = marked_environment(mark) | RAY_ENV | RAY | {"RAY_ADDRESS": f"{HEAD}:{gcs}"}
    places = "--resources=" + json.dumps({f"{stage}_node": 1 for stage in STAGES})
    stages: dict[str, Any] = {stage: {"cpus_per_replica": 0.1, "resources": {f"{stage}_node": 1}} for stage in STAGES}
    args = {"accelerator": "cpu", "ingress_cpus": 2, "ec": {"storage_path": str(folder / "ec")}} | stages

    def ray_start(env: dict[str, str], *options: str, within: tuple[str, ...] = ()) -> None:
        command = [*within, str(BIN / "ray"), "start", places, *options]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr

    try:
        with forking(folder, args, environment) as forks:
            address = (f"--node-ip-address={HEAD}", f"--port={gcs}", f"--dashboard-port={dashboard}")
            ray_start(environment | forks, "--head", "--num-cpus=8", *address)
            address = (f"--node-ip-address={NODE}", f"--address={HEAD}:{gcs}")
            # What the head's server forks would be in the head's network.
            ray_start(environment, "--num-cpus=1", *address, within=("ip", "netns", "exec", NAMESPACE))
            two = {name: {"num_replicas": 2} for name in DEPLOYMENTS}
            server = serve_deploy(folder, f"http://127.0.0.1:{dashboard}", environment, http_port, args, two)
            wait_for_replicas(server, 2)
        yield server
    finally:
        kill_all(mark)
        assert not wait_gone(mark)


def test_every_request_is_answered_soon(server: Server, baseline: dict[str, Any]) -> None:
    with Load(server, asks(baseline)[0], threads=8) as load:
        server.wait_until(lambda: len(load.outcomes) >= 100, "requests before", 60)
        pulled = time.monotonic()
        ip("link", "set", NODE_CABLE, "nomaster")
        server.wait_until(lambda: len(load.begun_since(pulled + SOON_S)) >= 40, "requests after", 120)
    during = load.under_way_since(pulled)
    waited = sorted((round(each.seconds), each.status, each.rungs) for each in during if each.seconds > 5)
    print(f"{len(during)} requests, these waited: {waited}")
    assert {outcome.status for outcome in load.outcomes} == {200}, waited
    assert not [outcome for outcome in load.outcomes if outcome.wrong]
    assert waited, "nothing was under way on that node"
    assert max(outcome.seconds for outcome in during) < SOON_S
