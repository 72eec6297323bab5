"""E+PD and E+P+D on one card: they start beside each other, answer as one engine does, and keep to their shares."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import probe, systems
from benchmarks.gpu.answers import PROMPTS, Answer, ask_all, compare
from benchmarks.gpu.card import Card, programs
from benchmarks.gpu.prerequisites import what_fits
from tools.harness.servers import Server

ENCODER_BATCH = 512
"""Tokens: each of the larger images is more than one batch of the encoder."""

PARTS = [part for _, body in PROMPTS.values() for message in body["messages"] for part in message["content"]]
IMAGES = sum(part["type"] == "image_url" for part in PARTS)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    systems.CUDA.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def one(card: Card, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What one engine answers, which is gone when the others start: the card has no room for both."""
    with systems.one_engine(systems.CUDA, model, tmp_path_factory.mktemp("one")) as server:
        return ask_all(server)


@pytest.fixture(scope="module", params=systems.TOPOLOGIES)
def topology(request: pytest.FixtureRequest, card: Card) -> str:
    if "P+D" in request.param and (reason := what_fits(card)) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def server(
    topology: str, one: dict[str, Answer], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    encoder = {"encoder": {"engine_args": {"max_num_batched_tokens": ENCODER_BATCH}}}
    stages = systems.TOPOLOGIES[topology] | encoder
    with systems.disaggregated(systems.CUDA, model, stages, tmp_path_factory.mktemp("ours")) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server) -> dict[str, Answer]:
    return ask_all(server)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_as_one_engine(answers: dict[str, Answer], one: dict[str, Answer], prompt: str) -> None:
    found = compare(answers[prompt], one[prompt])
    assert found.verdict in ("equal", "near-tie"), found


def test_answers_depend_on_the_picture(one: dict[str, Answer]) -> None:
    """Equal tokens would say nothing otherwise."""
    assert one["1 image"].tokens != one["another image"].tokens
    assert len(set(one["1 image"].tokens)) > 1


def test_items_larger_than_the_encoders_batch_are_encoded_there(server: Server, answers: dict[str, Answer]) -> None:
    """And nowhere else: each engine behind the encoder loads what it needs."""
    assert server.metric("epd:ec_items_total", stage="encoder", event="encoded") >= IMAGES
    for stage in ("prefill", "decode"):
        assert server.metric("epd:ec_items_total", stage=stage, event="encoded") == 0
        assert server.metric("epd:ec_items_total", stage=stage, event="missing") == 0


def test_kv_blocks_are_pulled(server: Server, answers: dict[str, Answer], topology: str) -> None:
    if "P+D" not in topology:
        pytest.skip("no KV blocks move in this topology")
    moved = probe.kv_moved(server.get("/metrics").text)
    assert moved is not None and moved["count"] >= len(answers)
    assert moved["failed"] == 0


def test_engines_keep_to_their_shares(server: Server, answers: dict[str, Answer], card: Card) -> None:
    used, shares = probe.memory(server, programs(card)), probe.shares(server)
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    if not used:
        pytest.skip("the driver names no processes of this server here, as in a container")
    over = {stage: mib for stage, mib in used.items() if mib > shares[stage] * card.total_mib * (1 + probe.SLACK)}
    assert not over, f"MiB by stage {used}, shares {shares} of {card.total_mib} MiB"
