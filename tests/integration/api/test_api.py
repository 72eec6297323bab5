"""The API of a running E+P+D application with two replicas of each stage, through the clients that people use."""

import base64
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import requests

from tools.harness.answers import arriving, events, gather
from tools.harness.cases import CITY, LONG, WEATHER, chat, image, one_of_many, text
from tools.harness.media import data_url, image_url
from tools.harness.servers import REPOSITORY, Server

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": [text("Describe."), image(1)]}]


@pytest.fixture(scope="module")
def client(epd: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=epd.url + "/v1", api_key="none", max_retries=0)


# ---- clients


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert answer.choices[0].message.content == streamed != ""
    assert answer.usage and answer.usage.completion_tokens == 8


def test_openai_tools(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": named, "max_tokens": 200, "temperature": 0}
    answer = client.chat.completions.create(model="demo", messages=QUESTION, **options)
    assert answer.choices[0].message.tool_calls, answer
    call = answer.choices[0].message.tool_calls[0].function  # type: ignore[index, union-attr]
    stream = client.chat.completions.create(model="demo", messages=QUESTION, stream=True, **options)
    deltas = [d for chunk in stream for d in chunk.choices[0].delta.tool_calls or []]
    assert call.name == deltas[0].function.name == "weather"
    streamed = "".join(d.function.arguments or "" for d in deltas)
    assert json.loads(call.arguments) == json.loads(streamed) == {"city": "London", "days": 1}


def test_openai_structured_output(client: openai.OpenAI) -> None:
    import pydantic

    class City(pydantic.BaseModel):
        city: str
        days: int

    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, response_format=schema, max_tokens=60, temperature=0
    )
    assert City.model_validate_json(answer.choices[0].message.content or "").city in ("Paris", "London")


def test_openai_responses(client: openai.OpenAI) -> None:
    content = [{"type": "input_text", "text": "Describe."}, {"type": "input_image", "image_url": image_url(1)}]
    options: dict[str, Any] = {
        "model": "demo",
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": 8,
        "temperature": 0,
    }
    answer = client.responses.create(**options)
    streamed = "".join(e.delta for e in client.responses.create(stream=True, **options) if "text.delta" in e.type)
    assert answer.output_text == streamed != ""


def test_response_is_found_gone_on_from_and_cancelled_by_whichever_ingress_is_asked(epd: Server) -> None:
    """There are two. Each call has a connection of its own, so it is either's."""
    path = f"{epd.url}/v1/responses"

    def post(path: str, **body: Any) -> Any:
        answer = requests.post(path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(response_id: str) -> Any:
        answer = requests.get(f"{path}/{response_id}", timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    ask = {"model": "demo", "max_output_tokens": 8, "temperature": 0}
    content = [{"type": "input_text", "text": "Describe."}, {"type": "input_image", "image_url": image_url(1)}]
    first = post(path, input=[{"role": "user", "content": content}], **ask)
    assert [get(first["id"]) for _ in range(8)] == [first] * 8
    seconds = [post(path, input="And then?", previous_response_id=first["id"], **ask) for _ in range(8)]
    assert len({str(each["output"][0]["content"]) for each in seconds}) == 1
    assert all(each["usage"]["input_tokens"] > first["usage"]["input_tokens"] for each in seconds)

    long = ask | {"max_output_tokens": 3500, "ignore_eos": True}
    for _ in range(4):
        made = post(path, input="Go on.", background=True, **long)
        assert {get(made["id"])["status"] for _ in range(4)} <= {"queued", "in_progress"}
        assert post(f"{path}/{made['id']}/cancel")["status"] == "cancelled"
        assert {get(made["id"])["status"] for _ in range(4)} == {"cancelled"}
    epd.wait_until(lambda: holds_nothing(epd), "the cancelled responses to be aborted", 20)
    missing = requests.get(f"{path}/resp_none", timeout=60)
    assert missing.status_code == 404 and "no ingress replica has it" in missing.json()["error"]["message"]


def test_stream_of_a_background_response_is_joined_at_either_ingress(epd: Server) -> None:
    path = f"{epd.url}/v1/responses"
    body = {"model": "demo", "input": "Go on.", "max_output_tokens": 300, "ignore_eos": True, "temperature": 0}
    with requests.post(path, json=body | {"background": True, "stream": True}, stream=True, timeout=60) as made:
        coming = arriving(made)
        first = next(coming)
        where = f"{path}/{first['response']['id']}"

        def join(after: int) -> list[Any]:
            return events(requests.get(where, params={"stream": "true", "starting_after": after}, timeout=60))

        with ThreadPoolExecutor(6) as pool:
            joined = list(pool.map(join, range(6)))
        told = [first, *coming]
    assert told[-1]["type"] == "response.completed" and len(told) > 20
    for after, seen in enumerate(joined):
        assert seen == told[after + 1 :]


def test_anthropic_messages(epd: Server) -> None:
    claude = anthropic.Anthropic(base_url=epd.url, api_key="none", max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": image_url(1).partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "Describe."}]
    messages = [{"role": "user", "content": content}]
    options: dict[str, Any] = {"max_tokens": 8, "messages": messages, "extra_body": {"temperature": 0}}
    answer = claude.messages.create(model="demo", **options)
    with claude.messages.stream(model="demo", **options) as stream:
        streamed = "".join(stream.text_stream)
    assert answer.content[0].text == streamed != ""
    assert answer.usage.output_tokens == 8


def test_anthropic_tools(epd: Server) -> None:
    claude = anthropic.Anthropic(base_url=epd.url, api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Weather in London?"}],
        "tools": [{"name": "weather", "description": "The weather", "input_schema": CITY, "strict": True}],
        "tool_choice": {"type": "tool", "name": "weather"},
        "extra_body": {"temperature": 0},
    }
    answer = claude.messages.create(model="demo", **options)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    with claude.messages.stream(model="demo", **options) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert call.name == streamed.name == "weather"
    assert call.input == streamed.input
    assert call.input["city"] in ("Paris", "London")


def test_anthropic_structured_output(epd: Server) -> None:
    claude = anthropic.Anthropic(base_url=epd.url, api_key="none", max_retries=0)
    answer = claude.messages.create(
        model="demo",
        max_tokens=200,
        messages=[{"role": "user", "content": "Which city?"}],
        extra_body={"temperature": 0, "output_config": {"format": {"type": "json_schema", "schema": CITY}}},
    )
    assert json.loads(answer.content[0].text)["city"] in ("Paris", "London")


def test_response_says_where_the_time_to_the_first_token_went(epd: Server) -> None:
    path, body = chat(text("Describe."), image(5001))
    for streaming in (False, True):
        answer = epd.post(path, body | {"stream": streaming, "messages": chat(image(5001 + streaming))[1]["messages"]})
        steps = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
        assert list(steps) == ["render", "queue", "encode", "ec_transfer", "prefill", "kv_transfer", "first_token"]
        assert re.findall(r'(\w+);dur=[\d.]+;desc="\w+"', answer.headers["server-timing"]) == list(steps)[2:]
        assert float(steps["encode"]) > 0 and float(steps["prefill"]) > 0


def test_response_says_how_many_tokens_of_the_prompt_were_in_a_cache(epd: Server) -> None:
    path, body = chat(text("How far is it from here to the sea? " * 20), prompt_cache_key="the sea")
    told = []
    for stream in (False, True, False):  # of two prefill replicas one is asked again
        answer = epd.post(path, body | {"stream": stream})
        told.append([int(count) for count in answer.headers["x-epd-cached-tokens"].split("/")])
    cached, prompt = zip(*told, strict=True)
    assert cached[0] < max(cached) < prompt[0] and len(set(prompt)) == 1, told


def test_command_line_streams_an_answer_with_its_timing_and_shows_the_stages(epd: Server, tmp_path: Path) -> None:
    def run(*command: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "serve_app", *command, "--url", epd.url], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    picture = tmp_path / "picture.png"
    picture.write_bytes(base64.b64decode(image(5003)["image_url"]["url"].partition(",")[2]))
    path, body = chat(image(5003), text("Describe."), max_tokens=12)
    answer = epd.post(path, body).json()["choices"][0]["message"]["content"]
    told = run("ask", "Describe.", picture, "--max-tokens", "12", "--timing")
    assert "".join(told.split()).startswith("".join(answer.split()))
    assert [step for step in ("render", "encode", "prefill", "first token") if step not in told] == []
    status = run("status")
    assert all(stage in status for stage in ("ingress", "encoder", "prefill", "decode")) and "unhealthy" not in status


def test_beam_search_has_the_whole_time_for_each_of_its_steps(epd: Server) -> None:
    limit_s = 2.0
    path, body = chat(text("Hello"), use_beam_search=True, n=2, max_tokens=100)
    response = epd.post(path, body, headers={"x-request-timeout-s": str(limit_s)})
    assert response.status_code == 200, response.text
    assert response.elapsed.total_seconds() > limit_s


def test_models_version_ping_docs(epd: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert epd.get("/version").json()["version"].startswith("0.32.0")
    assert epd.get("/ping").status_code == epd.get("/docs").status_code == 200
    assert "/v1/chat/completions" in epd.get("/openapi.json").json()["paths"]


def image_at(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


# ---- media


def test_local_file_in_the_allowed_folder(epd: Server) -> None:
    path = REPOSITORY / "examples" / "shapes.png"
    local = epd.post(*chat(text("Describe."), image_at(f"file://{path}")))
    inline = epd.post(*chat(text("Describe."), image_at(data_url("image/png", path.read_bytes()))))
    assert local.status_code == 200, local.text
    assert local.json()["choices"][0]["token_ids"] == inline.json()["choices"][0]["token_ids"]


def test_item_is_known_by_its_name_at_whichever_ingress_is_asked(epd: Server) -> None:
    """There are two. Each call has a connection of its own, so it is either's."""

    def ask(url: str | None, **body: Any) -> requests.Response:
        part = {"type": "image_url", "image_url": url and {"url": url}, "uuid": "picture-1"}
        path, body = chat(text("Describe."), part, **body)
        return requests.post(epd.url + path, json=body, timeout=60)

    def tokens(answer: requests.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    expected = tokens(epd.post(*chat(text("Describe."), image(1))))
    for tenant in ({}, {"cache_salt": "a"}):
        for missing in (ask(None, **tenant) for _ in range(4)):
            assert missing.status_code == 400 and "picture-1" in missing.json()["error"]["message"]
        assert tokens(ask(image_url(1), **tenant)) == expected
        assert [tokens(ask(None, **tenant)) for _ in range(8)] == [expected] * 8
    streamed = gather(events(ask(None, stream=True)))
    assert streamed["choices"][0]["token_ids"] == expected
    other = [ask(image_url(2)).status_code for _ in range(4)]
    assert other == [400] * 4, "both replicas know the name by now"


def test_text_touches_no_encoder(epd: Server) -> None:
    before = epd.metric("vllm:request_success_total", stage="encoder")
    assert epd.post(*chat(text("Only words."))).status_code == 200
    assert epd.metric("vllm:request_success_total", stage="encoder") == before


def test_items_are_encoded_one_call_each_over_all_encoders(epd: Server) -> None:
    def encoded() -> list[float]:
        pattern = r'^vllm:request_success_total\{.*?replica="(\w+)",stage="encoder"\} ([\d.]+)$'
        found: dict[str, float] = {}
        for replica, value in re.findall(pattern, epd.get("/metrics").text, re.MULTILINE):
            found[replica] = found.get(replica, 0) + float(value)
        return sorted(found.values())

    before = encoded()
    for request in range(6):
        answer = epd.post(*chat(*[image(1000 + 4 * request + i) for i in range(4)], text("Which?")))
        assert answer.status_code == 200
    after = encoded()
    assert len(after) == 2
    assert sum(after) - sum(before) == 24
    assert all(value > 0 for value in after)


def test_item_that_is_encoded_is_not_sent_again(epd: Server) -> None:
    """Two ingress replicas: each may send it once."""
    before = epd.metric("vllm:request_success_total", stage="encoder")
    answers = {str(epd.post(*chat(text("Describe."), image(4001))).json()["choices"]) for _ in range(8)}
    assert len(answers) == 1
    assert 1 <= epd.metric("vllm:request_success_total", stage="encoder") - before <= 2


def test_both_replicas_of_each_stage_work(epd: Server) -> None:
    for index in range(12):
        assert epd.post(*one_of_many(index)).status_code == 200
    page = epd.get("/metrics").text
    for stage in ("encoder", "prefill", "decode"):
        busy = {
            replica
            for replica, value in re.findall(
                rf'^vllm:request_success_total\{{.*?replica="(\w+)",stage="{stage}"\}} ([\d.]+)$', page, re.MULTILINE
            )
            if float(value)
        }
        assert len(busy) == 2, f"{stage}: {busy}"


# ---- operations


def test_health_has_a_state_per_stage(epd: Server) -> None:
    response = epd.get("/health")
    assert response.status_code == 200
    assert response.json() == {"ingress": "healthy", "encoder": "healthy", "prefill": "healthy", "decode": "healthy"}


def test_request_ids_reach_the_engines_and_the_log(epd: Server) -> None:
    request_id = "who-am-i-7"
    # Pictures of its own: what this ingress knows to be encoded is not sent again.
    response = epd.post(*chat(text("Describe."), image(3001), image(3002)), headers={"x-request-id": request_id})
    assert response.headers["x-request-id"] == request_id
    expected = [
        rf"Encoder.*Added request {request_id}:0:\w{{6}}\.",
        rf"Encoder.*Added request {request_id}:1:\w{{6}}\.",
        rf"Prefill.*Added request chatcmpl-{request_id}-",
        rf"Decode.*Added request chatcmpl-{request_id}-",
        rf"Ingress.*request={request_id} status=200 items=2 prompt_tokens=\d+ cached_tokens=\d+ output_tokens=16 "
        r"render=.* queue=.* encode=.* prefill=.* first_token=.* total=.* encoder=\w+.* prefill=\w+ decode=\w+",
    ]
    epd.wait_until(
        lambda: all(re.search(pattern, epd.log.read_text(errors="replace")) for pattern in expected),
        "the log lines",
        15,
    )


def test_profile_reaches_every_replica(epd: Server) -> None:
    started = epd.post("/start_profile", {})
    assert started.status_code == 200, started.text
    assert {stage: len(replicas) for stage, replicas in started.json().items()} == {
        "encoder": 2,
        "prefill": 2,
        "decode": 2,
    }
    assert epd.post(*chat(text("Describe."), image(1), max_tokens=2)).status_code == 200
    stopped = epd.post("/stop_profile")
    assert stopped.json() == started.json() or {k: sorted(v) for k, v in stopped.json().items()} == {
        k: sorted(v) for k, v in started.json().items()
    }
    traces = list((epd.log.parent / "profile").rglob("*.json*"))
    assert len(traces) >= 6


# ---- clients that go away


def holds_nothing(server: Server) -> bool:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(server.metric(name) == 0 for name in names)


def test_client_gone_in_the_stream_frees_all(epd: Server) -> None:
    epd.wait_until(lambda: holds_nothing(epd), "the engines to be idle", 40)
    path, body = chat(text("Describe."), image(1), max_tokens=3500, ignore_eos=True, stream=True)
    response = epd.session.post(epd.url + path, json=body, stream=True, timeout=60)
    chunks = response.iter_content(64)  # kept: requests closes the connection when it is gone
    next(chunks)
    epd.wait_until(lambda: epd.metric("vllm:num_requests_running", stage="decode") == 1, "decode to run", 10)
    response.close()
    epd.wait_until(lambda: holds_nothing(epd), "the request to be aborted and its blocks freed", 10)


def test_client_gone_before_the_first_token_frees_all(epd: Server) -> None:
    epd.wait_until(lambda: holds_nothing(epd), "the engines to be idle", 40)
    path, body = chat(text(LONG * 4), *[image(i, (448, 448)) for i in range(2000, 2006)], stream=False, max_tokens=1)
    left = 0
    for step in range(12):
        try:
            epd.session.post(epd.url + path, json=body, timeout=0.04 * (step + 1))
        except requests.Timeout:
            left += 1
    assert left >= 3, "the client was too patient to leave before the first token"
    # Well below the 30 s after which prefill would free its blocks by itself.
    epd.wait_until(lambda: holds_nothing(epd), "the requests to be aborted and their blocks freed", 20)
    assert events(epd.post(*chat(text("Hi"), stream=True)))
