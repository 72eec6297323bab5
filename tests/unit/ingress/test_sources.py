"""What encoders answered while a prompt was rendered is found again by ``generate``, and goes with the request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from fastapi.testclient import TestClient
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.multimodal.media import ImageMediaIO

from serve_app.handoff.errors import HandoffLost
from serve_app.handoff.types import EncodeReply, Item, Media, MediaRequest, Prompt, Source, StageRequest
from serve_app.ingress import middleware
from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import Request, current
from serve_app.ingress.sources import Sources
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step
from tests.unit.ingress.test_rendering import GONE, IMAGE, Bench, image
from tools.harness.media import data_url, picture, png

Make = Callable[..., Any]
MEDIA = Media("image", b"", ImageMediaIO("RGB"), 1, "digest")


def answered(replica: str) -> Source:
    return Source(MEDIA, EncodeReply({}, replica))


UNANSWERED = Source(MEDIA, None)


def item(pixels: bool, item_hash: str = "h") -> Item:
    grid = MultiModalFieldElem(data=1, field=MultiModalBatchedField(keep_on_cpu=True))
    fields = {"image_grid_thw": grid}
    if pixels:
        fields["pixel_values"] = MultiModalFieldElem(data=2, field=MultiModalBatchedField())
    return Item("image", item_hash, 0, 1, None, MultiModalKwargsItem(fields))


def declared(modality: str) -> frozenset[str]:
    return frozenset({"image_grid_thw"})


def test_each_prompt_takes_an_answer_of_its_own_and_the_last_one_stays() -> None:
    """An answer may serve one prompt alone; a beam search brings one prompt again and again."""
    sources = Sources()
    for replica in ("one", "other"):
        sources.put([("h", answered(replica)), ("h", answered(replica))])
    assert len(sources) == 2
    prompt = Prompt([], (item(False), item(False)))
    taken = [[each.source for each in sources.of(prompt, declared).items] for _ in range(3)]
    assert taken == [[answered(replica)] * 2 for replica in ("other", "one", "one")]


def test_source_fits_the_pixels_of_its_item() -> None:
    """An item without pixels that seemed to have none encoded would reach an engine that has to encode it."""
    sources = Sources()
    sources.put([("h", answered("one"))])
    sources.put([("h", UNANSWERED)])
    prompt = sources.of(Prompt([], (item(True), item(False), item(False))), declared)
    assert [each.source for each in prompt.items] == [UNANSWERED, answered("one"), answered("one")]
    assert [each.bare for each in prompt.items] == [False, True, True]


def test_item_without_pixels_and_without_a_source_is_an_error() -> None:
    sources = Sources()
    sources.put([("another", answered("one"))])
    with pytest.raises(HandoffLost, match="not kept any more"):
        sources.of(Prompt([], (item(False),)), declared)
    whole = Prompt([], (item(True),))
    assert sources.of(whole, declared) == whole


def test_what_is_kept_goes_with_its_last_user() -> None:
    async def main() -> None:
        sources, goes_on = Sources(), asyncio.Event()
        with sources.used():
            sources.put([("h", UNANSWERED)])
            task = asyncio.create_task(goes_on.wait())
            sources.use_until(task)
        assert len(sources) == 1
        goes_on.set()
        await task
        await asyncio.sleep(0)
        assert len(sources) == 0

    asyncio.run(main())


def test_prompt_whose_answer_is_gone_reaches_no_stage(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        rendered = await bench.render(IMAGE, {"image": [image(1)]})
        current.set(Request("another"))
        with pytest.raises(GracefulHTTPError, match="its answer is not kept any more") as failed:
            await bench.tokens(rendered)
        assert failed.value.http_status == 503
        assert bench.pipeline.log == ["encode_media"]

    asyncio.run(main())


def test_prompt_that_is_rendered_outside_of_a_request_keeps_its_pixels(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        current.set(None)
        rendered = await bench.render(IMAGE, {"image": [image(1)]})
        assert bench.pipeline.log == []
        assert await bench.tokens(rendered)
        assert bench.pipeline.log == ["encode", "prefill", "decode"]

    asyncio.run(main())


@pytest.mark.parametrize(("connector", "calls"), [("SharedFolderECConnector", 1), ("Pulled", 2)])
def test_prompts_of_a_request_are_rendered_in_tasks_and_share_only_answers_that_serve_both(
    make_client: Make, connector: str, calls: int
) -> None:
    advanced = {"ec": {"module_path": None if calls == 1 else "somewhere"}}

    async def main() -> None:
        bench = Bench(make_client, ec={"connector": connector}, advanced=advanced)
        encode = bench.encode_media

        async def numbered(request: MediaRequest) -> EncodeReply:
            reply = await encode(request)
            (key, params), *_ = reply.ec_transfer_params.items()
            return msgspec.structs.replace(reply, ec_transfer_params={key: params | {"id": request.request_id}})

        bench.encoder._methods["encode_media"] = numbered
        texts = [IMAGE, f"{IMAGE} or {IMAGE}"]
        data = [{"image": [image(1)]}, {"image": [image(1), image(1)]}]
        rendered = await asyncio.gather(*map(bench.render, texts, data))
        for _ in range(2):  # as each step of a beam search does
            tokens = await asyncio.gather(*map(bench.tokens, rendered))
            assert tokens == [[*A, *B]] * 2
        assert bench.pipeline.log.count("encode_media") == calls
        first = bench.client.pipeline.stages[Stage.PREFILL].requests("prefill")[:2]
        ids = {params["id"] for request in first for params in request.params.extra_args["ec_transfer_params"].values()}
        assert len(ids) == calls

    asyncio.run(main())


def test_item_that_one_prompt_has_with_pixels_and_another_without_is_right_in_both(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client, fails={"encode_media": [GONE, GONE]})
        first = await bench.render(IMAGE, {"image": [image(1)]})
        bench.client.pipeline.encoders.state.down = False
        second = await bench.render(IMAGE, {"image": [image(1)]})
        assert first["mm_hashes"] == second["mm_hashes"]
        for rendered, pixels in ((second, False), (first, True), (second, False)):
            assert await bench.tokens(rendered)
            (sent,) = bench.sent(Stage.PREFILL, "prefill")[-1].items
            assert ("pixel_values" in sent.data) is pixels

    asyncio.run(main())


# ---- through vLLM's whole app


class Noted(Sources):
    """Tells when its HTTP request has ended."""

    made: list["Noted"]

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        self.made.append(self)

    @contextmanager
    def used(self) -> Iterator[None]:
        with super().used():
            yield
        self.ended.set()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Noted]]:
    """All that requests keep, in the order in which they came."""
    Noted.made = all_made = []
    monkeypatch.setattr(middleware, "Request", lambda *args, **more: Request(*args, **more, sources=Noted()))
    yield all_made
    assert all_made and not any(map(len, all_made)), "kept after its request"


async def ab(request: StageRequest) -> AsyncIterator[Step]:
    assert all("pixel_values" not in item.data for item in request.prompt.items)
    yield Step(A)
    yield Step([*B, 1], "stop")


def url(seed: int = 1) -> str:
    return data_url("image/png", png(picture(seed, (84, 84))))


def asked(seed: int = 1) -> list[dict[str, Any]]:
    content = [{"type": "image_url", "image_url": {"url": url(seed)}}, {"type": "text", "text": "?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_answers_are_found_whatever_tasks_vllm_renders_in(
    make_api: Callable[..., TestClient], make_encoder: Make, made: list[Noted], stream: bool, n: int
) -> None:
    pipeline, encoder = FakePipeline(steps=ab), make_encoder()
    api = make_api(pipeline.stages | {Stage.ENCODER: encoder})
    body = {"messages": asked(), "n": n, "temperature": 1, "stream": stream}
    answer = api.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert [method for method, _ in encoder.calls] == ["encode_media"]
    assert pipeline.log.count("prefill") == n


def test_conversations_of_one_request_find_their_answers(
    make_api: Callable[..., TestClient], make_encoder: Make, made: list[Noted]
) -> None:
    pipeline, encoder = FakePipeline(steps=ab), make_encoder()
    api = make_api(pipeline.stages | {Stage.ENCODER: encoder})
    answer = api.post("/v1/chat/completions/batch", json={"messages": [asked(1), asked(2), asked(1)]})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 3
    assert [method for method, _ in encoder.calls] == ["encode_media"] * 2


def test_response_in_the_background_outlives_its_http_request_and_finds_its_answers(
    make_api: Callable[..., TestClient], make_encoder: Make, made: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = EPDClient.generate

    async def once_http_has_ended(self: EPDClient, *args: Any, **more: Any) -> AsyncIterator[Any]:
        await asyncio.wait_for(made[-1].ended.wait(), 5)
        async for output in generate(self, *args, **more):
            yield output

    monkeypatch.setattr(EPDClient, "generate", once_http_has_ended)
    pipeline, encoder = FakePipeline(steps=ab), make_encoder()
    api = make_api(pipeline.stages | {Stage.ENCODER: encoder}, advanced={"answers": {"response_store_bytes": 1 << 20}})
    content = [{"type": "input_image", "image_url": url(), "detail": "auto"}, {"type": "input_text", "text": "?"}]
    body = {"input": [{"role": "user", "content": content}], "background": True}
    response = api.post("/v1/responses", json=body).json()
    until = time.monotonic() + 10
    while response["status"] in ("queued", "in_progress") and time.monotonic() < until:
        time.sleep(0.02)
        response = api.get(f"/v1/responses/{response['id']}").json()
    assert response["status"] == "completed", response
    assert pipeline.log == ["prefill", "decode"]
    assert [method for method, _ in encoder.calls] == ["encode_media"]
