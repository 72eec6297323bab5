"""An application that cannot start ends `make serve` at once, with the reason; one that runs goes on, and is mended."""

import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.config import EPDConfig
from serve_app.roles import DEMO_DEFAULTS, model_path
from tests.integration.cases import chat, text
from tests.integration.servers import Server, engine_pids, serve_run, serve_that_fails

ENDS_S = 30
"""From the first word of the failure to the end of the last process: 6 to 12 s on two busy cores."""

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "as it is built": ({"accelerator": "cuda"}, "`accelerator: cuda` needs GPUs and the Ray cluster has none"),
    "in an engine's process": (
        {"prefill": None, "decode": {"engine_args": {"kv_cache_memory_bytes": 1 << 20}}},
        "decode cannot start: a request of `max_model_len: 4096` needs 0.01 GiB of KV cache and 0.0 GiB are left. Set "
        "`max_model_len` to ",
    ),
}


@pytest.mark.parametrize("where", CASES)
def test_engine_that_cannot_start_ends_make_serve_with_its_reason(tmp_path: Path, where: str) -> None:
    args, why = CASES[where]
    failed = serve_that_fails(tmp_path, args | {"ec": {"storage_path": str(tmp_path / "ec")}})
    assert re.match(why, failed.output.rstrip().splitlines()[-1]), failed.output[-4000:]
    assert failed.status == 1
    assert failed.ended_s < ENDS_S
    assert failed.left == []


def engines(server: Server) -> set[str]:
    """Replicas whose engines answer."""
    page = server.get("/metrics").text
    return set(re.findall(r'^vllm:num_requests_running\{.*?replica="(\w+)"', page, re.MULTILINE))


def test_replica_that_cannot_start_beside_one_that_runs_is_tried_again(tmp_path: Path) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(model_path(EPDConfig(model="demo-random")), model)
    one_engine = {"encoder": None, "prefill": None, "model": str(model), "engine_args": DEMO_DEFAULTS}
    with serve_run(tmp_path, one_engine, {"Decode": {"num_replicas": 2, "health_check_period_s": 1}}) as server:
        server.wait_until(lambda: len(engines(server)) == 2, "both engines", 60)
        model.rename(away)
        before = engines(server)
        psutil.Process(engine_pids(server)["Decode"][0]).kill()
        why = f"decode cannot start: `model: {model}` is neither a folder with a model"
        server.wait_until(lambda: f"CannotStart: {why}" in server.log.read_text(errors="replace"), why, 60)
        assert server.post(*chat(text("Hello"))).status_code == 200
        away.rename(model)
        server.wait_until(lambda: len(engines(server) - before) == 1, "the replica to be replaced", 60)
        assert len(engines(server) & before) == 1
        assert server.post(*chat(text("Hello"))).status_code == 200
