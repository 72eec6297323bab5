"""One running application per module, or package, that asks for one. Slow parts are awaited, never slept for; every
application ends with Ctrl-C and must leave nothing behind."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tools.harness.answers import reduce
from tools.harness.cases import MANY, one_of_many
from tools.harness.servers import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts and "page" not in item.path.parts:
            item.add_marker("engine")


def all_at_once(server: Server) -> list[Any]:
    with ThreadPoolExecutor(MANY) as pool:
        responses = list(pool.map(lambda index: server.post(*one_of_many(index)), range(MANY)))
    assert [response.status_code for response in responses] == [200] * MANY
    return [reduce(response.json()) for response in responses]


TOPOLOGIES: dict[str, dict[str, Any]] = {
    # Every item is longer than one step of the encoder, and than the batch that it is asked for.
    "E+P+D": {"encoder": {"engine_args": {"max_num_batched_tokens": 8, "max_num_seqs": 8}}},
    "E+PD": {"prefill": None, "advanced": {"encode": {"from_media": False}}},  # the other way to the encoder
    "P+D": {"encoder": None},
    "PD": {"encoder": None, "prefill": None},
}
