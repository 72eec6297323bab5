"""Prompts go to the replica that has their prefix, at prefill or at decode that prefills. Pictures that are there are not
encoded again."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tools.harness.answers import answered, differences
from tools.harness.cases import LONG, chat, conversation, image, text
from tools.harness.servers import Server, serve_run

NAME = "a conversation about two pictures"
BLOCK = 64
CACHE = 20 << 20
"""Bytes: 10,240 tokens."""


TOPOLOGIES = {"E+P+D": "prefill", "E+PD": "decode"}
"""Which stage prefills."""


@pytest.fixture(scope="module", params=TOPOLOGIES)
def prefilling(request: pytest.FixtureRequest) -> str:
    return TOPOLOGIES[request.param]


@pytest.fixture(scope="module")
def folder(prefilling: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(prefilling)


@pytest.fixture(scope="module")
def server(prefilling: str, folder: Path) -> Iterator[Server]:
    """Two replicas that prefill, with small caches. Answers of encoders are not remembered."""
    args: dict[str, Any] = {"prefill": None, "advanced": {"encode": {"remember_s": 0}}}
    args[prefilling] = {"engine_args": {"kv_cache_memory_bytes": CACHE}}
    with serve_run(folder, args, {prefilling.capitalize(): {"num_replicas": 2}}) as server:
        yield server


def cached(response: requests.Response) -> tuple[int, int]:
    """Tokens of the prompt that were in a cache, and all."""
    assert response.status_code == 200, response.text
    found, whole = response.headers["x-epd-cached-tokens"].split("/")
    return int(found), int(whole)


def prefilled_by(response: requests.Response) -> str:
    """Decode's replica is told with the first token."""
    told = re.findall(r'(?:prefill|first_token);[^,]*desc="([^"]*)"', response.headers["server-timing"])
    return str(told[0])


def was_encoded(response: requests.Response) -> bool:
    return "encode;" in response.headers["server-timing"]


def test_turns_of_a_conversation_go_where_the_ones_before_are(server: Server) -> None:
    """By turns, so that each conversation has the others in between."""
    before = dict.fromkeys(range(100, 120, 2), 0)
    replicas: dict[int, set[str]] = {seed: set() for seed in before}
    for turns in range(1, 4):
        for seed in before:
            response = server.post(*conversation(seed, turns))
            found, whole = cached(response)
            assert found > before[seed] - 2 * BLOCK, (seed, turns)
            replicas[seed].add(prefilled_by(response))
            before[seed] = whole
    assert all(len(those) == 1 for those in replicas.values()), replicas
    assert len(set.union(*replicas.values())) == 2, "both have something to do"


def test_pictures_in_the_prefix_cache_are_not_encoded_and_the_answer_is_that_of_one_engine(
    server: Server, baseline: dict[str, Any]
) -> None:
    path, body = conversation(50, 2)
    encoded = [True]
    while any(encoded[-3:]):
        response = server.post(path, body)
        assert differences(answered(response), baseline[NAME]) == []
        assert "x-epd-rungs" not in response.headers
        encoded.append(was_encoded(response))
        assert len(encoded) < 60, encoded
    assert encoded[1]
    assert "unencoded_items=2" in server.log.read_text(errors="replace")


def test_pictures_that_are_not_there_after_all_are_encoded(
    server: Server, folder: Path, baseline: dict[str, Any]
) -> None:
    """Other prompts and pictures have filled the caches of both replicas, and the folder of embeddings is emptied."""
    path, body = conversation(50, 2)
    server.wait_until(lambda: not was_encoded(server.post(path, body)), "the pictures to be left to the cache")
    for number in range(30):
        others = chat(image(200 + number, (448, 448)), text(f"{number} {LONG * 5}"))
        assert cached(server.post(*others))[0] < BLOCK
    for each in (folder / "ec").glob("**/*.safetensors"):
        each.unlink()
    response = server.post(path, body)
    assert differences(answered(response), baseline[NAME]) == []
    assert response.headers["x-epd-rungs"] == "encode-after-all"
    assert was_encoded(response)
    again = server.post(path, body)
    assert cached(again)[0] > 0.9 * cached(again)[1]
    assert differences(answered(again), baseline[NAME]) == []
