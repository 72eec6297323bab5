"""One running application for all files of this package, ended before the next module starts its own."""

from collections.abc import Iterator

import pytest

from tests.conftest import MEDIA_RULES
from tools.harness.servers import DEPLOYMENTS, Server, serve_run, wait_for_replicas


@pytest.fixture(scope="package")
def epd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """E+P+D with two replicas of each stage, engine log lines, a profiler, small bodies only, and a store of responses."""
    folder = tmp_path_factory.mktemp("epd")
    two = {name: {"num_replicas": 2} for name in DEPLOYMENTS}
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder / "profile"),
        "torch_profiler_with_stack": False,
    }
    args = {
        "media": MEDIA_RULES | {"max_body_bytes": 4 << 20},
        "advanced": {"answers": {"response_store_bytes": 1 << 20}},
        "engine_args": {"enable_log_requests": True, "profiler_config": profiler},
    }
    with serve_run(folder, args, two) as server:
        wait_for_replicas(server, 2)
        yield server
