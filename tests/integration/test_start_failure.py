"""An application that cannot start ends `make serve` at once, with the reason. One that runs goes on: `tests/chaos`."""

import re
from pathlib import Path
from typing import Any

import pytest

from tools.harness.servers import serve_that_fails

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
