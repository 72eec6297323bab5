"""An item that has a name can be sent by its name alone, by its tenant, while it is remembered."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import AudioMediaIO, ImageMediaIO, VideoMediaIO

from serve_app.config import MediaLimits
from serve_app.handoff.errors import BadRequest
from serve_app.ingress import media_names, seams
from serve_app.ingress.media import EPDMediaConnector
from serve_app.ingress.media_names import ENTRY_BYTES, Content, MediaNames, Named, key_of
from serve_app.stage import Stage
from tests.fakes import FakePeers, FakePipeline
from tests.unit.ingress.test_media import jpegs, process  # noqa: F401  (fixture)
from tests.unit.web import Web, response
from tools.harness.media import data_url, image_url, picture, png, recording, video_url, wav

CHAT = "/v1/chat/completions"
NOT_KNOWN = "No media is remembered under the uuid 'cat'"


class Ingress:
    """An ingress replica's app before stages that answer at once."""

    def __init__(self, make_api: Callable[..., TestClient], pipeline: FakePipeline, stages: Any, **config: Any) -> None:
        self.pipeline = pipeline
        self.api = make_api(stages, **config)

    def ask(self, part: Any, path: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, str]:
        """Status, and the name by which the item went to decode, or what was wrong."""
        messages = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]}
        before = len(self.pipeline.decoder.calls)
        answer = self.api.post(path, json=messages | body, headers=headers)
        if len(self.pipeline.decoder.calls) == before:
            return answer.status_code, answer.text
        (item,) = self.pipeline.decoder.requests("decode")[-1].prompt.items
        return answer.status_code, item.hash


@pytest.fixture
def ingress(
    request: pytest.FixtureRequest,
    make_api: Callable[..., TestClient],
    make_encoder: Callable[..., Any],
    tmp_path: Path,
) -> Ingress:
    """By default items go to encoders as media."""
    way, media = getattr(request, "param", "from media"), {"allowed_local_path": str(tmp_path)}
    if way == "no encoder":
        pipeline = FakePipeline(without=(Stage.ENCODER,))
        return Ingress(make_api, pipeline, pipeline.stages, media=media, encoder=None)
    pipeline = FakePipeline()
    if way == "from features":
        return Ingress(make_api, pipeline, pipeline.stages, media=media, advanced={"encode": {"from_media": False}})
    return Ingress(make_api, pipeline, pipeline.stages | {Stage.ENCODER: make_encoder()}, media=media)


def image(url: str | None, uuid: Any = None, key: str = "image_url") -> dict[str, Any]:
    part: dict[str, Any] = {"type": key, key: None if url is None else {"url": url}}
    return part if uuid is None else part | {"uuid": uuid}


@pytest.mark.parametrize("ingress", ["from media", "from features", "no encoder"], indirect=True)
def test_item_is_the_same_by_its_name_alone(ingress: Ingress) -> None:
    status, content = ingress.ask(image(image_url(1)))
    assert status == 200
    assert ingress.ask(image(image_url(1), "cat")) == (200, content), "known by its content all the same"
    other = ingress.ask(image(image_url(2), 7))
    assert other != (200, content)
    for streamed in (False, True):
        assert ingress.ask(image(None, "cat"), stream=streamed) == (200, content)
        assert ingress.ask(image("", "cat"), stream=streamed) == (200, content)
    assert ingress.ask(image(None, "7")) == other
    video = ingress.ask(image(video_url(1), "cat", "video_url"))
    assert video[0] == 200, "items of another kind have names of their own"
    assert ingress.ask(image(None, "cat", "video_url")) == video
    assert ingress.ask(image(None, "cat")) == (200, content)


def test_name_that_is_not_known_is_told_to_the_client(ingress: Ingress) -> None:
    for part in (image(None, "cat"), image(None, "cat", "video_url"), {"image_url": None, "uuid": "cat"}):
        status, message = ingress.ask(part)
        assert status == 400 and NOT_KNOWN in message and "send it with its URL or data" in message
    assert ingress.ask({"type": "image_pil", "image_pil": None, "uuid": "cat"})[0] == 400
    assert ingress.pipeline.log == []


def test_url_of_a_known_item_is_not_read_again(ingress: Ingress, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(png(picture(1)))
    first = ingress.ask(image(file.as_uri(), "cat"))
    assert first[0] == 200
    file.unlink()
    assert ingress.ask(image(file.as_uri(), "cat")) == first
    assert ingress.ask(image(None, "cat")) == first


def test_name_of_other_media_is_refused_and_changes_nothing(ingress: Ingress) -> None:
    first = ingress.ask(image(image_url(1), "cat"))
    status, message = ingress.ask(image(image_url(2), "cat"))
    assert status == 400 and "is the name of other media" in message
    assert ingress.ask(image(None, "cat")) == first


def test_names_are_a_tenants_own(ingress: Ingress) -> None:
    """By the salt of the request's caches, and the key it came with."""
    tenants: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"headers": {"authorization": "Bearer x"}},
        {"headers": {"authorization": "Bearer y"}},
        {"headers": {"authorization": "Bearer y"}, "cache_salt": "a"},
    ]
    mine = []
    for number, tenant in enumerate(tenants):
        status, message = ingress.ask(image(None, "cat"), **tenant)
        assert status == 400 and NOT_KNOWN in message
        mine.append(ingress.ask(image(image_url(number), "cat"), **tenant))
    assert [ingress.ask(image(None, "cat"), **tenant) for tenant in tenants] == mine
    assert ingress.ask(image(None, "cat"), headers={"x-api-key": "y"}) == mine[4]


def test_broken_item_gets_no_name(ingress: Ingress) -> None:
    assert ingress.ask(image("data:image/png;base64,AAAA", "cat"))[0] == 400
    assert ingress.ask(image(image_url(1), "cat"))[0] == 200


def test_names_are_taken_wherever_a_chat_is(ingress: Ingress) -> None:
    assert ingress.ask(image(image_url(1), "cat"))[0] == 200
    counts = [ingress.ask(image(None, uuid), "/tokenize") for uuid in ("cat", "dog")]
    assert [status for status, _ in counts] == [200, 400]
    part = {"type": "input_image", "image_url": None, "detail": "auto", "uuid": "cat"}
    messages = {"input": [{"role": "user", "content": [part]}], "model": "demo"}
    answer = ingress.api.post("/v1/responses", json=messages)
    assert answer.status_code == 200, answer.text


def test_nothing_is_remembered_where_that_is_turned_off(make_api: Callable[..., TestClient]) -> None:
    pipeline = FakePipeline(without=(Stage.ENCODER,))
    ingress = Ingress(make_api, pipeline, pipeline.stages, encoder=None, advanced={"media": {"remember_uuid_bytes": 0}})
    assert ingress.ask(image(image_url(1), "cat"))[0] == 200
    assert ingress.ask(image(image_url(2), "cat"))[0] == 200
    status, message = ingress.ask(image(None, "cat"))
    assert status == 400 and NOT_KNOWN in message


# ---- one connector, without an app


def connector(names: MediaNames) -> EPDMediaConnector:
    return EPDMediaConnector(None, MediaLimits(), Web({}).fetcher(), names)


def test_sounds_and_lists_of_frames_are_remembered_as_they_are() -> None:
    async def main() -> None:
        names = MediaNames(1 << 20)
        sound, frames, film = AudioMediaIO(), VideoMediaIO(ImageMediaIO("RGB")), VideoMediaIO(ImageMediaIO("RGB"))
        for io, url in ((sound, data_url("audio/wav", wav(1))), (frames, jpegs(3))):
            first = await connector(names).load_from_url_async(Named(url, "it"), io)
            again = await connector(names).load_from_url_async(Named("", "it"), io)
            assert str(first) == str(again)
        await connector(names).load_from_url_async(Named(data_url("video/mp4", recording("mp4", 3)), "film"), film)
        with pytest.raises(VLLMValidationError, match="is the name of other media"):
            await connector(names).load_from_url_async(Named(jpegs(2), "film"), film)

    asyncio.run(main())


def test_what_another_replica_remembers_is_used_and_remembered_here() -> None:
    async def main() -> None:
        async with Web({"/cat.png": response(png(picture(1)))}) as web:
            one, another, third = (MediaNames(1 << 20, peers) for peers in FakePeers(3))
            io, fetcher = ImageMediaIO("RGB"), web.fetcher()
            fetching = EPDMediaConnector(None, MediaLimits(), fetcher, one)
            await fetching.load_from_url_async(Named("http://example.org/cat.png", "cat"), io)
            await fetcher.close()
            found = await connector(another).load_from_url_async(Named("", "cat"), io)
            assert found.original_bytes == png(picture(1))
            assert another.size_bytes == one.size_bytes > 0 == third.size_bytes
            assert len(web.requests) == 1
            with pytest.raises(VLLMValidationError, match=NOT_KNOWN):
                await connector(another).load_from_url_async(Named("", "cat"), VideoMediaIO(io))

    asyncio.run(main())


def test_least_recently_used_goes_first_and_all_stays_within_the_bound() -> None:
    size = 1000
    names = MediaNames(3 * (size + ENTRY_BYTES))

    def remember(key: str, size_bytes: int = size) -> None:
        names.remember(Named("", key), key, Content(key.encode() * size_bytes))

    for key in "abc":
        remember(key)
    assert names.get("a") is not None
    remember("d")
    assert [key for key in "abcd" if names.get(key)] == ["a", "c", "d"]
    remember("e", 4 * size + 3 * ENTRY_BYTES)  # more than all that may be kept
    assert [key for key in "acde" if names.get(key)] == ["a", "c", "d"]
    remember("f", 2 * size)
    assert [key for key in "acdf" if names.get(key)] == ["d", "f"]
    assert names.size_bytes == 3 * size + 2 * ENTRY_BYTES
    for number in range(10_000):
        names.remember(Named("", "x"), str(number), Content(b""))
    assert names.size_bytes <= 3 * (size + ENTRY_BYTES)


def test_item_outlives_its_name_for_the_request_that_uses_it() -> None:
    names = MediaNames(2 * ENTRY_BYTES)
    names.remember(Named("", "a"), "a", Content(b"a"))
    held = names.get("a")
    names.remember(Named("", "b"), "b", Content(b"b"))
    names.remember(Named("", "c"), "c", Content(b"c"))
    assert names.get("a") is None and held == Content(b"a")


def test_key_tells_neither_the_name_nor_the_tenant() -> None:
    def key(uuid: str, salt: str, modality: str = "image") -> str:
        token = media_names.salt.set(salt)
        try:
            return key_of(Named("", uuid), modality)
        finally:
            media_names.salt.reset(token)

    keys = [key("cat", "tenant"), key("cat", "other"), key("dog", "tenant"), key("cat", "tenant", "video")]
    assert len(set(keys)) == len(keys)
    assert all("cat" not in each and "tenant" not in each and len(each) == 64 for each in keys)
    assert key("cat", "tenant") == keys[0], "the same on every ingress replica"
    assert key("\ud800", "\ud800")


def test_forgotten_name_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="or not any more"):
        asyncio.run(MediaNames(0).find(Named("", "cat"), "key"))


def test_name_of_an_input_audio_part_without_data() -> None:
    """vLLM makes a URL of it, or none."""
    from vllm.renderers.chat_utils import AsyncMultiModalContentParser

    seen: list[Any] = []
    parse = seams.naming(lambda parser, url: seen.append(url))

    class Parser(AsyncMultiModalContentParser):
        parse_audio = parse

        def __init__(self) -> None: ...

    data = base64.b64encode(wav(1)).decode()
    Parser().parse_input_audio({"data": data, "format": "wav"}, "cat")
    Parser().parse_input_audio(None, "cat")
    Parser().parse_input_audio({"data": data, "format": "wav"}, None)
    assert [(type(url).__name__, getattr(url, "uuid", None)) for url in seen] == [
        ("Named", "cat"),
        ("Named", "cat"),
        ("str", None),
    ]
    assert seen[0] == seen[2] and seen[1] == "" and bool(seen[1])
