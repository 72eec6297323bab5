"""One running application per module that asks for one. Slow parts are awaited, never
slept for; every application ends with Ctrl-C and must leave nothing behind."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import MEDIA_RULES
from tests.integration.answers import reduce
from tests.integration.cases import MANY, one_of_many
from tests.integration.servers import Server, serve_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("engine")


def all_at_once(server: Server) -> list[Any]:
    with ThreadPoolExecutor(MANY) as pool:
        responses = list(pool.map(lambda index: server.post(*one_of_many(index)), range(MANY)))
    assert [response.status_code for response in responses] == [200] * MANY
    return [reduce(response.json()) for response in responses]


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "E+P+D": {},
    "E+PD": {"prefill": None},
    "P+D": {"encoder": None},
    "PD": {"encoder": None, "prefill": None},
}


@pytest.fixture(scope="module")
def epd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """E+P+D with two replicas of each stage, engine log lines, a profiler, and small bodies only."""
    folder = tmp_path_factory.mktemp("epd")
    two = {name: {"num_replicas": 2} for name in ("Ingress", "Encoder", "Prefill", "Decode")}
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder / "profile"),
        "torch_profiler_with_stack": False,
    }
    args = {
        "media": MEDIA_RULES | {"max_body_bytes": 4 << 20},
        "engine_args": {"enable_log_requests": True, "profiler_config": profiler},
    }
    with serve_run(folder, args, two) as server:
        yield server
