"""Decode that guesses several tokens at a time gives the tokens that it would give one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.harness.answers import answered, differences
from tools.harness.cases import Case, chat, image, text
from tools.harness.servers import Server, serve_run, vllm_server

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES: dict[str, Case] = {
    "text": chat(text("Again and again and again and again."), max_tokens=200, ignore_eos=True),
    "a picture": chat(image(1), text("What is it?"), max_tokens=200, ignore_eos=True),
    "a structure": chat(
        text("Say."),
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 5}},
                    "required": ["a"],
                },
            },
        },
    ),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one engine that makes one token at a time."""
    with vllm_server(tmp_path_factory.mktemp("one"), {}) as server:
        return {name: answered(server.post(*case)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=["E+P+D", "E+PD"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args: dict[str, Any] = {"engine_args": {"speculative_config": NGRAM}}
    args |= {"prefill": None} if request.param == "E+PD" else {}
    folder: Path = tmp_path_factory.mktemp("speculation")
    with serve_run(folder, args) as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_an_engine_that_does_not_guess(
    server: Server, expected: dict[str, Any], name: str
) -> None:
    assert differences(answered(server.post(*CASES[name])), expected[name]) == []


def test_tokens_were_guessed_and_right(server: Server) -> None:
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total", stage="decode") > 0
