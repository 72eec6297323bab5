"""Vectors and scores through E+pool: those of one pooling engine, within the noise of a float."""

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import requests

from tools.harness.cases import Case, chat, image, text, turn, video
from tools.harness.servers import Server, engine_pids, serve_run, vllm_server

CLASSES = {
    "architectures": ["Qwen2_5_VLForSequenceClassification"],
    "classifier_from_token": ["Ġis", "Ġof"],
    "method": "from_2_way_softmax",
}
ENGINES: dict[str, dict[str, Any]] = {
    "embed": {"runner": "pooling", "convert": "embed"},
    "classify": {"runner": "pooling", "convert": "classify", "hf_overrides": CLASSES},
}


def embeddings(*parts: dict[str, Any]) -> Case:
    return "/v1/embeddings", {"messages": [turn("user", *parts)]}


def score(query: Any, *documents: Any) -> Case:
    return "/v1/score", {"queries": query, "documents": list(documents)}


def of(*parts: dict[str, Any]) -> dict[str, Any]:
    """A query or document with media."""
    return {"content": list(parts)}


NO_IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
SCORES: dict[str, Case] = {
    "texts": score("A fox", "A dog", "A fox runs", "Nothing"),
    "a text and images": score("A fox", of(image(7)), of(image(8))),
    "an image and texts": score(of(image(9)), "A dog", "A fox"),
    "images": score(of(image(9), text("red")), of(image(10)), of(image(11), text("blue"))),
    "rerank": ("/v1/rerank", {"query": "A fox", "documents": ["A dog", of(image(10)), "A fox runs"]}),
    "rerank, the best": ("/v1/rerank", {"query": "A fox", "documents": ["A dog", "A fox runs", "It"], "top_n": 1}),
}
CASES: dict[str, dict[str, Case]] = {
    "embed": {
        "a text": ("/v1/embeddings", {"input": "Hello there"}),
        "some texts": ("/v1/embeddings", {"input": ["Hello there", "What is it?", "Describe."]}),
        "tokens": ("/v1/embeddings", {"input": [5, 6, 7, 8]}),
        "a chat": embeddings(text("Describe.")),
        "an image": embeddings(text("Describe."), image(1)),
        "another image": embeddings(text("Describe."), image(2)),
        "an image twice": embeddings(image(1), text("and"), image(1)),
        "some images": embeddings(text("Compare."), image(3), image(4), image(5)),
        "a video": embeddings(video(6), text("What happens?")),
    }
    | SCORES,
    "classify": {"classes": ("/classify", {"input": ["Hello there", "Describe."]})} | SCORES,
}
REFUSED: dict[str, Case] = {
    "a vector of another size": ("/v1/embeddings", {"input": "Hello", "dimensions": 7}),
    "too long": ("/v1/embeddings", {"input": [5] * 5000}),
    "nothing": ("/v1/embeddings", {"input": []}),
    "a chat": chat(text("Hello")),
}
NO_IMAGES: dict[str, Case] = {"to embed": embeddings(NO_IMAGE), "to score": score("A fox", of(NO_IMAGE))}


class Pool(NamedTuple):
    kind: str
    server: Server
    expected: dict[str, Any]
    refused: dict[str, int]
    folder: Path


def ask(server: Server, case: Case) -> requests.Response:
    path, body = case
    return requests.post(server.url + path, json={"model": "demo"} | body, timeout=120)


def numbers(response: requests.Response) -> np.ndarray:
    """The vectors or scores of an answer, in the order of what was asked."""
    assert response.status_code == 200, response.text
    told = response.json()
    found = sorted(told.get("data") or told["results"], key=lambda each: int(each["index"]))
    names = ("embedding", "score", "relevance_score", "probs")
    return np.array([next(each[name] for name in names if name in each) for each in found])


def answers(server: Server, kind: str) -> dict[str, Any]:
    return {name: numbers(ask(server, case)) for name, case in CASES[kind].items()}


def alike(found: Any, expected: Any) -> bool:
    return found.shape == expected.shape and bool(np.allclose(found, expected, atol=1e-5))


@pytest.fixture(scope="module", params=ENGINES)
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    kind, folder = request.param, tmp_path_factory.mktemp("pool")
    args = {"prefill": None, "engine_args": ENGINES[kind]}
    with vllm_server(folder, args) as one:
        expected = answers(one, kind)
        refused = {name: ask(one, case).status_code for name, case in REFUSED.items()}
    with serve_run(folder, args | {"ec": {"storage_path": str(folder / "ec")}}) as server:
        yield Pool(kind, server, expected, refused, folder / "ec")


def test_answers_are_one_engines_and_encoders_encode(pool: Pool) -> None:
    of_images = pool.expected["a text and images"]
    assert not np.allclose(of_images[0], of_images[1], atol=1e-3), "images change answers"

    for name, found in answers(pool.server, pool.kind).items():
        assert alike(found, pool.expected[name]), name

    assert pool.server.metric("vllm:prompt_tokens_total", stage="encoder") > 0


def test_many_at_once_get_their_own(pool: Pool) -> None:
    names = [*CASES[pool.kind]] * 4
    with ThreadPoolExecutor(12) as clients:
        found = clients.map(lambda name: numbers(ask(pool.server, CASES[pool.kind][name])), names)
        for name, each in zip(names, found, strict=True):
            assert alike(each, pool.expected[name]), name


def test_what_one_engine_refuses_is_refused(pool: Pool) -> None:
    assert {name: ask(pool.server, case).status_code for name, case in REFUSED.items()} == pool.refused
    assert all(400 <= status < 500 for status in pool.refused.values())
    for case in NO_IMAGES.values():
        refused = ask(pool.server, case)
        expected = 404 if pool.kind == "classify" and "embeddings" in case[0] else 400
        assert refused.status_code == expected, refused.text


def test_vectors_come_in_the_format_asked_for(pool: Pool) -> None:
    if pool.kind != "embed":
        pytest.skip("no vectors")
    path, body = CASES["embed"]["an image"]
    (item,) = ask(pool.server, (path, body | {"encoding_format": "base64"})).json()["data"]

    found = np.frombuffer(base64.b64decode(item["embedding"]), np.float32)
    assert alike(found[None], pool.expected["an image"])


def test_embeddings_that_are_lost_are_made_again(pool: Pool) -> None:
    """Somebody removes the files of embeddings all the time, while they are on their way."""
    over, rungs = threading.Event(), []

    def remove() -> None:
        while not over.wait(0.001):
            for file in pool.folder.rglob("*.safetensors"):
                file.unlink(missing_ok=True)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for seed in range(100, 115):
            response = ask(pool.server, score("A fox", of(image(seed)), of(image(7)), of(image(8))))
            assert alike(numbers(response)[1:], pool.expected["a text and images"]), response.headers
            rungs.append(response.headers.get("x-epd-rungs", ""))
    finally:
        over.set()
        remover.join()
    assert any("again" in each for each in rungs)


@pytest.mark.parametrize("deployment", ["Encoder", "Decode"])
def test_a_killed_replica_fails_no_request(pool: Pool, deployment: str) -> None:
    (pid,) = engine_pids(pool.server)[deployment]
    case = CASES[pool.kind]["images"]
    with ThreadPoolExecutor(4) as clients:
        found = [clients.submit(ask, pool.server, case) for _ in range(8)]
        psutil.Process(pid).kill()
        for each in found:
            assert alike(numbers(each.result()), pool.expected["images"])
    pool.server.wait_until(lambda: engine_pids(pool.server).get(deployment, [pid]) != [pid], "another replica", 180)
    for name, again in answers(pool.server, pool.kind).items():
        assert alike(again, pool.expected[name]), name
