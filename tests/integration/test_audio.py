"""Audio through encode → prefill → decode, with a tiny Qwen2-Audio: `audio_url` and `input_audio`.

Its application also has what is configured rarely: a reasoning parser (this model's whole answer is reasoning to it),
prefill that pushes its blocks and leaves short prompts to decode, and tracing.
"""

import base64
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools.harness.answers import answered, differences, events, gather
from tools.harness.cases import Case, chat, text
from tools.harness.media import data_url, wav
from tools.harness.models import ensure_audio_model, serving
from tools.harness.observe import SpanCollector, ray_metrics
from tools.harness.servers import Server, serve_run, vllm_server


def audio_url(seed: int, rate: int = 16000) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": data_url("audio/wav", wav(seed, rate=rate))}}


def input_audio(seed: int) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(seed)).decode(), "format": "wav"}}


CITY = {"type": "object", "properties": {"capital": {"type": "boolean"}}, "required": ["capital"]}


def structured(*parts: dict[str, Any], **options: Any) -> Case:
    """A question to a model that thinks, whose answer is to follow a schema."""
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    path, body = chat(*parts, response_format=schema, max_tokens=40, **options)
    messages = [*body["messages"], {"role": "assistant", "content": "<think>"}]
    return path, body | {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}


CASES: dict[str, Case] = {
    "text": chat(text("Hello")),
    "audio_url": chat(audio_url(1), text("What do you hear?")),
    "another sound": chat(audio_url(5), text("What do you hear?")),
    "another rate": chat(audio_url(1, 8000), text("What do you hear?")),
    "input_audio": chat(text("Listen."), input_audio(2)),
    "two sounds": chat(audio_url(3), text("and"), input_audio(4), text("Compare.")),
    "structured after reasoning": structured(
        audio_url(6), text("and"), input_audio(7), text("A city?"), thinking_token_budget=6
    ),
    "structured after reasoning, by decode alone": structured(text("A city?"), thinking_token_budget=6),
    "reasoning without an end": structured(audio_url(6), text("A city?")),
}
STREAMED = "two sounds"
LONG_CASES = {"two sounds", "structured after reasoning"}
LONG = 80
"""Tokens of a prompt that prefill is called for: those with two sounds have as many."""


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = ensure_audio_model(tmp_path_factory.mktemp("models"))
    media = {"limits": {"audio": 2}, "allow_private_addresses": True, "allowed_domains": ["127.0.0.1"]}
    return serving(model, reasoning_parser="deepseek_r1") | {"media": media}


@pytest.fixture(scope="module")
def audio_baseline(args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with vllm_server(tmp_path_factory.mktemp("audio-baseline"), args) as server:
        answers: dict[str, Any] = {}
        for name, (path, body) in CASES.items():
            answers[name] = answered(server.post(path, body))
        return answers | {"stream": gather(events(server.post(*stream_case())))}


def stream_case() -> Case:
    path, body = CASES[STREAMED]
    return path, body | {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def collector() -> Iterator[SpanCollector]:
    with SpanCollector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(
    args: dict[str, Any],
    audio_baseline: dict[str, Any],
    collector: SpanCollector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    args = args | {
        "kv": {"connector": "NixlPushConnector"},
        "advanced": {"kv": {"min_prompt_tokens": LONG}},
    }
    args = args | {"tracing": {"endpoint": collector.endpoint}}
    env = collector.env | {"RAY_metrics_report_interval_ms": "1000"}
    with serve_run(tmp_path_factory.mktemp("audio"), args, env=env) as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_answers_as_one_engine(server: Server, audio_baseline: dict[str, Any], name: str) -> None:
    assert differences(answered(server.post(*CASES[name])), audio_baseline[name]) == []


def test_streams_as_one_engine(server: Server, audio_baseline: dict[str, Any]) -> None:
    assert differences(gather(events(server.post(*stream_case()))), audio_baseline["stream"]) == []


@pytest.fixture
def folder_by_http(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its URL."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_sound_from_the_web_is_known_by_its_content(
    server: Server, audio_baseline: dict[str, Any], folder_by_http: tuple[Path, str]
) -> None:
    folder, url = folder_by_http
    for seed, name in ((1, "audio_url"), (5, "another sound")):
        (folder / "sound.wav").write_bytes(wav(seed))  # the same URL with another content
        part = {"type": "audio_url", "audio_url": {"url": f"{url}/sound.wav"}}
        assert differences(answered(server.post(*chat(part, text("What do you hear?")))), audio_baseline[name]) == []


def test_sound_is_known_by_its_name(server: Server, audio_baseline: dict[str, Any]) -> None:
    for part in (input_audio(2), {"type": "input_audio", "input_audio": None}):
        answer = answered(server.post(*chat(text("Listen."), part | {"uuid": "sound"})))
        assert differences(answer, audio_baseline["input_audio"]) == []


def test_reasoning_is_told_apart(server: Server) -> None:
    message = server.post(*CASES["audio_url"]).json()["choices"][0]["message"]
    assert message["reasoning"] and not message["content"]


def test_structure_begins_where_reasoning_ends(server: Server) -> None:
    message = server.post(*CASES["structured after reasoning"]).json()["choices"][0]["message"]
    assert message["reasoning"] and isinstance(json.loads(message["content"])["capital"], bool)


def test_another_sound_gives_other_tokens(audio_baseline: dict[str, Any]) -> None:
    first, second = (audio_baseline[name]["choices"][0]["token_ids"] for name in ("audio_url", "another sound"))
    assert first != second


def test_sounds_came_through_the_ec_connector(server: Server) -> None:
    for name in CASES:
        assert server.post(*CASES[name]).status_code == 200
    assert server.metric("epd:ec_items_total", stage="encoder", event="encoded") > 0
    for stage in ("prefill", "decode"):  # of long prompts, of short ones
        assert server.metric("epd:ec_items_total", stage=stage, event="loaded") > 0
        assert server.metric("epd:ec_items_total", stage=stage, event="encoded") == 0


@pytest.mark.parametrize("name", CASES)
def test_short_prompts_are_prefilled_by_decode(server: Server, name: str) -> None:
    response = server.post(*CASES[name])
    short = response.json()["usage"]["prompt_tokens"] < LONG
    assert short == (name not in LONG_CASES)
    assert response.headers.get("x-epd-rungs") == ("prefill-at-decode(short)" if short else None)
    assert ("prefill" in response.headers["server-timing"]) != short


# ---- what can be seen of a request


def test_a_request_is_one_trace_across_ingress_and_engines(server: Server, collector: SpanCollector) -> None:
    """The client's trace goes on: ingress, below it a span per call of a stage, below that the engine's own."""
    parent = "00f067aa0ba902b7"
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    path, body = chat(audio_url(11), input_audio(12), text("Traced."))
    response = server.post(path, body, headers={"traceparent": f"00-{trace_id}-{parent}-01", "x-request-id": "traced"})
    assert response.status_code == 200, response.text

    stages = ["encode", "encode", "prefill", "decode"]
    server.wait_until(lambda: len(collector.spans(trace_id)) >= 1 + 2 * len(stages), "all spans of the request")
    spans = collector.spans(trace_id)
    (root,) = [span for span in spans if span.parent == parent]
    assert (root.name, root.service) == (f"POST {path}", "epd-ingress")
    assert root.attributes.items() >= {"epd.request_id": "traced", "epd.status": "200", "epd.items": 2}.items()
    calls = [span for span in spans if span.parent == root.id]
    assert sorted(span.name for span in calls) == sorted(stages)
    services = {"encode": "epd-encoder", "prefill": "epd-prefill", "decode": "epd-decode"}
    for call in calls:
        (engine,) = [span for span in spans if span.parent == call.id]
        assert (engine.name, engine.service) == ("llm_request", services[call.name])
        assert "traced" in engine.attributes["gen_ai.request.id"]
        assert call.attributes["epd.replica"]
    assert len(spans) == 1 + 2 * len(stages)


def test_rays_metrics_have_what_stages_and_engines_count(server: Server) -> None:
    path, body = CASES["two sounds"]
    assert server.post(path, body).status_code == 200

    wanted = {
        "ray_epd_requests_total",
        "ray_epd_queue_seconds_bucket",
        "ray_epd_outstanding",
        "ray_epd_ec_items_total",
        "ray_epd_ec_load_seconds_count",
        "ray_vllm_num_requests_running",
        "ray_vllm_generation_tokens_total",
        "ray_vllm_time_to_first_token_seconds_bucket",
        "ray_serve_autoscaling_target_replicas",
    }

    def values(name: str, label: str) -> set[str]:
        return {labels[label] for labels in ray_metrics(server).get(name, [])}

    server.wait_until(
        lambda: wanted <= ray_metrics(server).keys(), lambda: f"{wanted - ray_metrics(server).keys()}", 90
    )
    # Each process reports in its own time.
    queues, engines = ("ray_epd_queue_seconds_bucket", "stage"), ("ray_vllm_num_requests_running", "deployment")
    server.wait_until(lambda: values(*queues) == {"encoder", "prefill", "decode"}, lambda: f"{values(*queues)} all", 90)
    server.wait_until(
        lambda: values(*engines) == {"Encoder", "Prefill", "Decode"}, lambda: f"{values(*engines)} all", 90
    )
    assert values("ray_epd_requests_total", "deployment") == {"Ingress"}
    assert values("ray_vllm_num_requests_running", "application") == {"epd"}


def test_gauges_of_an_idle_server_stay_where_ray_shows_them(server: Server) -> None:
    """Ray forgets one that it has not been told for two of its report intervals, which are a second here."""
    gauges = {"ray_epd_outstanding": 1, "ray_vllm_num_requests_running": 3}

    def replicas() -> dict[str, int]:
        page = ray_metrics(server)
        return {name: len({labels["replica"] for labels in page.get(name, [])}) for name in gauges}

    server.wait_until(lambda: replicas() == gauges, lambda: f"{replicas()} to be {gauges}", 90)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        assert replicas() == gauges
        time.sleep(0.5)


def test_what_ray_is_told_takes_nothing_from_the_servers_own_page(server: Server) -> None:
    for stage in ("encoder", "prefill", "decode"):
        assert server.metric("vllm:request_success_total", stage=stage) > 0
    page = server.get("/metrics").text
    assert page.count("# TYPE vllm:num_requests_running ") == page.count("# TYPE epd:ec_items_total ") == 1
