"""Decode that has a draft model guess gives the tokens that it would give one by one. The built-in models have M-RoPE, for
which vLLM 0.32.0 has no drafts; LLaVA-OneVision has none."""

from collections.abc import Iterator
from typing import Any

import pytest

from tools.harness.answers import answered, differences
from tools.harness.cases import Case, chat, image, text
from tools.harness.families import LLAVA_ONEVISION
from tools.harness.models import serving
from tools.harness.servers import Server, serve_run, vllm_server

pytestmark = pytest.mark.models

GUESSES = 3
CASES: dict[str, Case] = {
    "text": chat(text("Hello there."), max_tokens=100, ignore_eos=True),
    "a picture": chat(image(1), text("What is it?"), max_tokens=100, ignore_eos=True),
    "two pictures": chat(image(2), text("and"), image(3), max_tokens=100, ignore_eos=True),
}


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = LLAVA_ONEVISION.ensure(tmp_path_factory.mktemp("models"))
    return serving(model) | {"media": {"limits": {"image": 2, "video": 0}}}


@pytest.fixture(scope="module")
def expected(args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one engine that makes one token at a time."""
    with vllm_server(tmp_path_factory.mktemp("one"), args) as server:
        return {name: answered(server.post(*case)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=["E+P+D", "E+PD"])
def server(
    request: pytest.FixtureRequest, args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    draft = LLAVA_ONEVISION.ensure_draft(tmp_path_factory.mktemp("models"))
    guessing = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": GUESSES}
    args = args | {"engine_args": args["engine_args"] | {"speculative_config": guessing}}
    args |= {"prefill": None} if request.param == "E+PD" else {}
    with serve_run(tmp_path_factory.mktemp("draft"), args) as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_an_engine_that_does_not_guess(
    server: Server, expected: dict[str, Any], name: str
) -> None:
    assert differences(answered(server.post(*CASES[name])), expected[name]) == []


def test_decode_alone_guesses(server: Server) -> None:
    assert server.metric("vllm:spec_decode_num_draft_tokens_total", stage="decode") > 0
