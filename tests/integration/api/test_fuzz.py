"""Good requests of every route, broken at random: each is answered in time and below 500, and the engines go on.

``EPD_FUZZ_EXAMPLES=n`` tries n of them, others each time; by default the same ones, to fit into CI.
"""

import base64
import copy
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tools.harness.cases import CITY, WEATHER, chat, completion, image, text, video
from tools.harness.media import data_url, image_url, wav
from tools.harness.servers import Server

EXAMPLES = os.environ.get("EPD_FUZZ_EXAMPLES")
ANSWER_WITHIN_S = 30
KNOWN = chat(text("Describe."), image(1))
TURN = {"role": "user", "content": [{"type": "text", "text": "Describe."}]}
SOURCE = {"type": "base64", "media_type": "image/png", "data": image_url(2).partition(",")[2]}
GOOD: list[tuple[str, dict[str, Any]]] = [
    chat(text("Describe."), image(2), logprobs=True, top_logprobs=2, stop=["the"], logit_bias={"900": 1}),
    chat(video(1), text("What happens?"), stream=True, stream_options={"include_usage": True}),
    chat(text("Hi"), {"type": "audio_url", "audio_url": {"url": data_url("audio/wav", wav(1, 0.1))}}),
    chat(text("Weather?"), tools=[WEATHER], tool_choice="required", temperature=1, seed=7, n=2, top_p=0.9, top_k=5),
    chat(text("Which?"), response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}),
    chat(text("Which?"), structured_outputs={"regex": "(red|blue)+"}, bad_words=["x"], allowed_token_ids=[900, 901]),
    chat(text("Hi"), use_beam_search=True, n=2, length_penalty=1.0, presence_penalty=0.5, truncate_prompt_tokens=50),
    completion("Once upon a time", logprobs=2, echo=True, min_tokens=1, stop_token_ids=[5], cache_salt="s"),
    completion([[300, 301], [302]], prompt_logprobs=1, repetition_penalty=1.1, vllm_xargs={"x": ["y", 1.5]}),
    (
        "/v1/responses",
        {
            "model": "demo",
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": image_url(3), "detail": "auto"}]}
            ],
            "max_output_tokens": 4,
            "stream": True,
            "text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}},
        },
    ),
    (
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 4,
            "system": "Be brief.",
            "messages": [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}],
            "tools": [{"name": "weather", "input_schema": CITY}],
        },
    ),
    ("/v1/messages/count_tokens", {"model": "demo", "messages": [TURN]}),
    ("/tokenize", {"model": "demo", "messages": [TURN], "add_generation_prompt": True}),
    ("/detokenize", {"model": "demo", "tokens": [300, 301]}),
]
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")

junk = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, -1e308, 5e-324]),
    st.sampled_from(
        [float("nan"), float("inf"), "", "\0", "\ud800", "{{ 7 * 7 }}", "x" * 10_000, "file:///etc/passwd"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"type": "text"}, {"url": "http://127.0.0.1:1/"}, ["a"] * 300]),
    st.integers(-5, 1100),
    st.floats(-5, 5),
    st.text(max_size=20),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document but the whole."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def break_bytes(draw: st.DrawFn, value: str) -> str:
    """A ``data:`` URL, or bare base64, with bytes of its media overwritten, or without the last of them."""
    head, comma, encoded = value.rpartition(",")
    media = bytearray(base64.b64decode(encoded))
    for _ in range(draw(st.integers(0, 4))):
        media[draw(st.integers(0, len(media) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del media[draw(st.integers(0, len(media))) :]
    return head + comma + base64.b64encode(media).decode()


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route, and a body that was good before one to three changes."""
    path, good = draw(st.sampled_from(GOOD))
    body = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        if not (ways := list(places(body))):
            break
        way = draw(st.sampled_from(ways))
        parent = body
        for key in way[:-1]:
            parent = parent[key]
        key, value = way[-1], parent[way[-1]]
        is_media = isinstance(value, str) and len(value) > 100 and (value.startswith("data:") or key == "data")
        match draw(
            st.sampled_from(["bytes"] * 3 if is_media else ["drop", "junk", "junk", "list", "object", "twice", "add"])
        ):
            case "bytes":
                parent[key] = break_bytes(draw, value)
            case "drop":
                del parent[key]
            case "junk":
                parent[key] = copy.deepcopy(draw(junk))
            case "list":
                parent[key] = [value]
            case "object":
                parent[key] = {str(key): value}
            case "twice" if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(value))
            case _ if isinstance(parent, dict):
                parent[draw(st.sampled_from(["kv_transfer_params", "uuid", "type", "x"]))] = copy.deepcopy(draw(junk))
    for name in LENGTHS:  # what is to be done stays little
        if name in good and (body.get(name) is None or (type(body[name]) is int and 4 < body[name] < 5000)):
            body[name] = min(good[name], 4)
    content = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    return path, content


def check(server: Server, path: str, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = server.session.post(server.url + path, data=content, headers=headers, timeout=ANSWER_WITHIN_S)
    note(f"{response.status_code} {response.text[:2000]}")
    assert response.status_code < 500
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines
        assert all(isinstance(json.loads(line), dict) for line in lines if line != "[DONE]")
    elif response.status_code == 200:
        assert isinstance(response.json(), dict)
    else:
        assert response.json()["error"]["message"]


def test_broken_requests_are_answered_and_good_ones_stay_right(epd: Server) -> None:
    def known() -> list[int]:
        tokens: list[int] = epd.post(*KNOWN, timeout=ANSWER_WITHIN_S).json()["choices"][0]["token_ids"]
        return tokens

    expected = known()
    count = itertools.count(1)

    @settings(
        max_examples=int(EXAMPLES or 400),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(broken())
    def each(request: tuple[str, bytes]) -> None:
        check(epd, *request)
        if next(count) % 20 == 0:
            assert known() == expected

    each()
    assert known() == expected
    assert epd.healthy()
