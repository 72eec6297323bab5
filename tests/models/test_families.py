"""Families of models through encode → prefill → decode: each answers as one engine does (`make test-models`).

The models are tiny and random. Families differ in how an item becomes tokens, how wide an embedding is, which layers there
are. None runs in `make test`.
"""

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
from vllm.multimodal.media import AudioMediaIO, ImageMediaIO, VideoMediaIO
from vllm.renderers import renderer_from_config

from serve_app.config import MediaLimits
from serve_app.handoff.types import Media
from serve_app.ingress.server import ingress_vllm_config
from serve_app.launch.engine_args import ingress_args
from serve_app.media.items import ItemProcessor
from tools.harness.answers import LOGPROB_TOLERANCE
from tools.harness.cases import LONG, Case, chat, image, text, video, video_at
from tools.harness.families import FAMILIES, Family
from tools.harness.media import data_url, image_url, sounding, video_url, wav
from tools.harness.models import serving
from tools.harness.servers import API, Server, cpu_config, engine_server, serve_run

pytestmark = pytest.mark.models

FROM_MEDIA: dict[str, set[str]] = {
    "Qwen3-VL": {"image", "video"},
    "InternVL3": set(),
    "Gemma 3": set(),
    "LLaVA-OneVision": set(),
    "MiniCPM-V 4.6": set(),
    "Qwen2.5-Omni": {"image", "video", "audio"},
}
"""Modalities whose items encoders get as the client sent them. Of others, the ingress makes the tensors (docs/models.md)."""

TRUSTING = {"trust_request_mm_kwargs": True}

TIE = {"float32": 0.0, "bfloat16": 0.05}
"""Log-probabilities that rounding does not tell apart: either token is right, and the rest of the answer hangs on it."""


def sound(seed: int) -> dict[str, Any]:
    data = base64.b64encode(wav(seed)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def question(*parts: dict[str, Any]) -> Case:
    return chat(*parts, ignore_eos=True, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)


def heard(film: bytes) -> Case:
    """The tokens of the two items are interleaved."""
    path, body = question(video_at(data_url("video/mp4", film)), text("What do you hear?"))
    return path, body | {"mm_processor_kwargs": {"use_audio_in_video": True}}


CASES: dict[str, dict[str, Case]] = {
    "text": {"text": question(text("Hello")), "a long text": question(text(LONG))},
    "image": {
        "image": question(text("Describe this image."), image(1)),
        "another image": question(text("Describe this image."), image(2)),
        "two images": question(image(1), text("and"), image(3, (140, 70)), text("Compare.")),
        "a large image": question(text(LONG), image(4, (280, 140))),
    },
    "video": {
        "video": question(video(1), text("What happens?")),
        "another video": question(video(2), text("What happens?")),
        "video and image": question(image(5), text("and"), video(3), text("What is in both?")),
    },
    "audio": {
        "audio": question(sound(1), text("What do you hear?")),
        "another audio": question(sound(5), text("What do you hear?")),
        "audio, image and video": question(sound(2), image(6), video(4), text("What is it?")),
    },
}
HEARD: dict[str, Case] = {"a sound": heard(sounding(7, 7)), "another sound": heard(sounding(7, 3))}
"""Videos whose sound the model hears."""


@pytest.fixture(scope="module", params=FROM_MEDIA)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def cases(family: Family) -> dict[str, Case]:
    return {name: case for kind in ("text", *family.media) for name, case in CASES[kind].items()}


@pytest.fixture(scope="module")
def args(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = family.ensure(tmp_path_factory.mktemp("models"))
    return serving(model, dtype=family.dtype) | {"media": {"limits": dict.fromkeys(family.media, 2)}}


def answers(server: Server, cases: dict[str, Case], at_once: int = 1) -> dict[str, Any]:
    def answer(case: Case) -> Any:
        response = server.post(*case)
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(cases, pool.map(answer, cases.values()), strict=True))


@pytest.fixture(scope="module")
def expected(args: dict[str, Any], cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    alone = cpu_config(args | {"encoder": None, "prefill": None})
    with engine_server(tmp_path_factory.mktemp("one"), alone, TRUSTING) as server:
        return answers(server, cases | (HEARD if "audio" in cases else {}))


@pytest.fixture(scope="module")
def server(
    args: dict[str, Any], expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp("family"), args | {"api": API | TRUSTING}) as server:
        yield server


def difference(ours: dict[str, Any], one: dict[str, Any], tie: float) -> str | None:
    """Where an answer differs from that of one engine."""
    if ours["prompt_token_ids"] != one["prompt_token_ids"]:
        return "the prompts"
    steps = (answer["choices"][0]["logprobs"]["content"] for answer in (ours, one))
    for index, (mine, its) in enumerate(zip(*steps, strict=True)):
        if abs(mine["logprob"] - its["logprob"]) > max(tie, LOGPROB_TOLERANCE):
            return f"token {index} is as likely as {mine['logprob']}, not {its['logprob']}"
        if mine["token"] != its["token"]:
            likely = [each["token"] for each in its["top_logprobs"] if each["logprob"] >= its["logprob"] - tie]
            return None if mine["token"] in likely else f"token {index} is {mine['token']}, not {its['token']}"
    return None


def test_another_item_gives_another_answer(family: Family, expected: dict[str, Any]) -> None:
    for kind in family.media:
        differs = difference(expected[kind], expected[f"another {kind}"], TIE[family.dtype])
        assert differs not in (None, "the prompts"), kind


def test_answers_as_one_engine_and_encoders_encode_all_items(
    family: Family, server: Server, cases: dict[str, Case], expected: dict[str, Any]
) -> None:
    for at_once in (1, len(cases)):
        ours = answers(server, cases, at_once)
        different = {case: difference(ours[case], expected[case], TIE[family.dtype]) for case in cases}
        assert different == dict.fromkeys(cases), f"{at_once} at once"
    parts = [part for _, body in cases.values() for message in body["messages"] for part in message["content"]]
    items = {json.dumps(part) for part in parts if part["type"] != "text"}
    assert server.metric("epd:ec_items_total", stage="encoder", event="encoded") >= len(items)
    assert server.metric("epd:ec_items_total", stage="prefill", event="loaded") >= len(items)
    for stage in ("prefill", "decode"):
        assert server.metric("epd:ec_items_total", stage=stage, event="encoded") == 0


def test_videos_with_their_sound_are_answered_as_by_one_engine_and_encoders_live_on(
    family: Family, server: Server, expected: dict[str, Any]
) -> None:
    if "audio" not in family.media:
        pytest.skip("it hears nothing")
    encoded = server.metric("epd:ec_items_total", stage="encoder", event="encoded")
    for name, answer in answers(server, HEARD, 2).items():
        assert difference(answer, expected[name], TIE[family.dtype]) is None, name
    first, second = (expected[name] for name in HEARD)
    assert difference(first, second, TIE[family.dtype]) not in (None, "the prompts"), "the sound counts"
    assert server.metric("epd:ec_items_total", stage="encoder", event="encoded") == encoded > 0


def test_items_go_as_media_where_vllm_can_place_them(name: str, family: Family, args: dict[str, Any]) -> None:
    with patch.dict(os.environ):  # vLLM sets variables that engines of the next family would inherit
        config = ingress_vllm_config(ingress_args(cpu_config(args), args["model"]))
    processor = ItemProcessor(renderer_from_config(config), MediaLimits())
    loaders = {"image": ImageMediaIO(), "video": VideoMediaIO(ImageMediaIO()), "audio": AudioMediaIO()}
    data = {
        kind: base64.b64decode(url(1).partition(",")[2]) for kind, url in (("image", image_url), ("video", video_url))
    }
    data["audio"] = wav(1)

    def goes(kind: str) -> bool:
        item = Media(kind, data[kind], loaders[kind], 1, "")
        return processor.can_place(asyncio.run(processor.features(item)))

    assert {kind for kind in processor.modalities if goes(kind)} == FROM_MEDIA[name]
