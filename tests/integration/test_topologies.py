"""Every topology answers as one engine does, and its embeddings and KV blocks really come from where they should."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MEDIA_RULES, stream
from tests.integration.conftest import TOPOLOGIES, all_at_once
from tools.harness.answers import answered, differences
from tools.harness.cases import CASES, LIKE, MANY, STREAMED
from tools.harness.servers import Server, serve_run


@pytest.fixture(scope="module", params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(baseline: dict[str, Any], topology: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp(topology.lower()), {"media": MEDIA_RULES} | TOPOLOGIES[topology]) as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_answers_as_one_engine(server: Server, baseline: dict[str, Any], name: str) -> None:
    assert differences(answered(server.post(*CASES[name])), baseline[name]) == []


@pytest.mark.parametrize("name", LIKE)
def test_answers_as_one_engine_where_that_takes_another_form(
    server: Server, baseline: dict[str, Any], name: str
) -> None:
    answers = [answered(server.post(*case)) for case in LIKE[name][0]]
    assert differences(answers[-1], baseline[name]) == []


@pytest.mark.parametrize("name", STREAMED)
def test_streams_as_one_engine(server: Server, baseline: dict[str, Any], name: str) -> None:
    assert differences(stream(server, name), baseline[f"{name}/stream"]) == []


def test_many_at_once_are_not_mixed_up(server: Server, baseline: dict[str, Any]) -> None:
    for index, answer in enumerate(all_at_once(server)):
        assert differences(answer, baseline[f"many/{index}"]) == [], index


def test_another_image_gives_other_tokens(baseline: dict[str, Any]) -> None:
    first, second = (baseline[name]["choices"][0]["token_ids"] for name in ("1 image", "another image"))
    assert first != second
    assert len({str(baseline[f"many/{index}"]["choices"][0]["token_ids"]) for index in range(MANY)}) == MANY


def test_embeddings_came_through_the_ec_connector(server: Server, topology: str) -> None:
    """Engines behind an encoder load every item and encode none; nothing was quietly computed again."""
    if "E+" not in topology:
        pytest.skip("no encoder in this topology")
    first_consumer = "prefill" if "P+D" in topology else "decode"
    assert server.metric("epd:ec_items_total", stage="encoder", event="encoded") > MANY
    assert server.metric("epd:ec_items_total", stage=first_consumer, event="loaded") > MANY
    for stage in ("prefill", "decode"):
        assert server.metric("epd:ec_items_total", stage=stage, event="encoded") == 0
        assert server.metric("epd:ec_items_total", stage=stage, event="missing") == 0


def test_kv_blocks_came_through_nixl(server: Server, topology: str) -> None:
    """Decode pulls the prompt's blocks and computes at most the last token of each prompt itself."""
    if "P+D" not in topology:
        pytest.skip("no prefill stage in this topology")
    moved = server.metric("vllm:nixl_bytes_transferred_count", stage="decode")
    assert server.metric("epd:kv_transfer_mb_per_s_count", stage="decode") == moved > MANY
    assert "First KV blocks moved, between here and engine" in server.log.read_text(errors="replace")
    assert server.metric("vllm:nixl_num_failed_transfers_total") == 0
    requests = server.metric("vllm:request_success_total", stage="decode")
    computed = server.metric("vllm:prompt_tokens_by_source_total", stage="decode", source="local_compute")
    assert 0 < computed <= requests


def test_blocks_are_given_back(server: Server, topology: str) -> None:
    """Once all requests are answered no engine holds KV blocks."""
    server.wait_until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, "KV blocks to be freed", 20)
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
