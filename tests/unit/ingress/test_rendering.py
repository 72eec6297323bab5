"""Prompts rendered around what encoders answer, with vLLM's real processor and the demo model."""

import asyncio
import io
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve_app.config import MediaLimits
from serve_app.handoff.engine_input import from_engine_input
from serve_app.handoff.errors import BadRequest, HandoffLost, StageUnavailable
from serve_app.handoff.types import EncodeReply, Media, MediaRequest, Prompt, digest_of, keyed
from serve_app.ingress.request import Request, current
from serve_app.media.fetch import decode_base64
from serve_app.media.items import ItemProcessor, declared_fields
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, FakeStage
from tools.harness.media import picture, png, recording, video_url

Make = Callable[..., Any]
GONE = StageUnavailable(Stage.ENCODER, "is gone")


def media(modality: str, data: bytes, io: Any, units: int) -> Media:
    return Media(modality, data, io, units, digest_of(data))


def image(seed: int, size: tuple[int, int] = (84, 84)) -> Media:
    return media("image", png(picture(seed, size)), ImageMediaIO("RGB"), size[0] * size[1])


def video(seed: int) -> Media:
    data = decode_base64(video_url(seed).partition(",")[2], MediaLimits())
    return media("video", data, VideoMediaIO(ImageMediaIO("RGB")), len(data))


class Bench:
    """A client whose encoders really process items; what crosses handles goes through pickle, and is counted."""

    def __init__(self, make: Make, fails: dict[str, list[Exception]] | None = None, **config: Any) -> None:
        self.pipeline = FakePipeline(fails=fails)
        self.crossed = 0
        encoder = FakeStage(
            Stage.ENCODER, self.pipeline.log, fails, encode_media=self.encode_media, encode=self.pipeline.encode
        )
        self.client = make(self.pipeline.stages | {Stage.ENCODER: encoder}, **config)
        self.encoder = encoder
        self.processor = ItemProcessor(self.client.renderer, MediaLimits())
        current.set(Request("req"))  # as the middleware does
        for stage in self.client.pipeline.stages.values():
            self._count(stage)

    def _count(self, stage: Any) -> None:
        call = stage.call

        async def counted_call(method: str, *args: Any, **more: Any) -> Any:
            return self.across(await call(method, *self.across(args), **more))

        stage.call = counted_call

    def across(self, value: Any) -> Any:
        data = pickle.dumps(value, protocol=5)
        self.crossed += len(data)
        return pickle.loads(data)

    async def encode_media(self, request: MediaRequest) -> EncodeReply:
        features = await self.processor.features(request.media)
        params = {features.item.hash: {"item_indices": [0], "metadata": features.metadata}}
        return EncodeReply(params, "encoder-0", self.processor.without_pixels(features), ran_s=10.0)

    async def render(self, text: str, data: dict[str, list[Any]], **more: Any) -> Any:
        tokens = self.client.renderer.get_tokenizer().encode(text, add_special_tokens=False)
        prompt = {"prompt_token_ids": tokens, "multi_modal_data": data, "prompt": text, **more}
        return await self.client.renderer.process_for_engine_async(prompt, 0.0)

    async def tokens(self, rendered: Any, **params: Any) -> list[int]:
        whole = SamplingParams(max_tokens=8, output_kind=RequestOutputKind.FINAL_ONLY, **params)
        outputs = self.client.generate(rendered, whole, "req")
        return [token async for output in outputs for choice in output.outputs for token in choice.token_ids]

    def sent(self, stage: Stage, method: str) -> list[Prompt]:
        return [request.prompt for request in self.client.pipeline.stages[stage].requests(method)]


def like_vllm(prompt: Any, fields: Callable[[str], frozenset[str]]) -> dict[str, Any]:
    """What must be equal however a prompt was rendered: for items, the fields that positions need."""
    items = []
    for item in from_engine_input(prompt).items:
        kept = {
            name: field.data.tolist()
            for name, field in item.data.items()
            if name in fields(item.modality) or field.field.keep_on_cpu
        }
        items.append((item.modality, item.hash, item.offset, item.length, item.num_embeds, kept))
    return {"tokens": prompt["prompt_token_ids"], "items": items, "text": prompt.get("prompt")}


IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PROMPTS: dict[str, tuple[str, dict[str, list[Media]], dict[str, Any]]] = {
    "an image": (f"What is {IMAGE} here?", {"image": [image(1)]}, {}),
    "the same twice and another size": (
        f"{IMAGE}{IMAGE} or {IMAGE}",
        {"image": [image(1), image(1), image(2, (280, 140))]},
        {},
    ),
    "a video": (f"See {VIDEO}.", {"video": [video(1)]}, {}),
    "videos and images": (
        f"{VIDEO} {IMAGE} {VIDEO} {IMAGE}",
        {"video": [video(1), video(2)], "image": [image(1), image(2)]},
        {},
    ),
    "arguments of the request": (
        f"{IMAGE} {IMAGE}",
        {"image": [image(1, (280, 280)), image(2)]},
        {"mm_processor_kwargs": {"max_pixels": 28 * 28 * 16}, "media_io_kwargs": {"image": {"image_mode": "RGB"}}},
    ),
}


def test_items_have_the_priority_of_their_request(make_client: Make) -> None:
    """They are encoded before vLLM tells its engine the priority: a batch's would stand before everybody's."""

    async def main() -> None:
        bench = Bench(make_client)
        request = current.get()
        assert request is not None
        request.priority = 100
        await bench.render(f"{IMAGE}{IMAGE}", {"image": [image(1), image(2)]})
        assert [call.options for call in bench.encoder.requests("encode_media")] == [{"priority": 100}] * 2

    asyncio.run(main())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_rendered_as_vllm_renders_it_from_decoded_media(make_client: Make, name: str) -> None:
    text, data, more = PROMPTS[name]

    async def main() -> None:
        bench = Bench(make_client)
        decoded = {m: [each.io.load_bytes(each.data) for each in items] for m, items in data.items()}
        fields = declared_fields(bench.client.renderer)
        by_vllm = like_vllm(await bench.render(text, decoded, **more), fields)
        assert bench.encoder.calls == []
        assert like_vllm(await bench.render(text, data, **more), fields) == by_vllm
        distinct = {each.data for items in data.values() for each in items}
        assert len(bench.encoder.calls) == len(distinct)

    asyncio.run(main())


def photo() -> bytes:
    """A JPEG of 1920×1080 with the detail, and so the size, of a photograph."""
    random = np.random.default_rng(1)
    small = Image.fromarray(random.integers(0, 256, (270, 480, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((1920, 1080), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return out.getvalue()


def test_little_more_than_the_media_itself_crosses_handles(make_client: Make) -> None:
    async def main() -> None:
        data = photo()
        assert 200_000 < len(data) < 1_000_000
        photograph = media("image", data, ImageMediaIO("RGB"), 1920 * 1080)
        bench = Bench(make_client)
        whole = {"max_pixels": 1_500_000}  # as much as fits into the demo model; its default is smaller
        full = (await bench.processor.features(msgspec.structs.replace(photograph, processor_kwargs=whole))).item
        assert sum(field.data.nbytes for field in full.data.values()) > 10 * len(data)
        rendered = await bench.render(f"What is {IMAGE}?", {"image": [photograph]}, mm_processor_kwargs=whole)
        assert await bench.tokens(rendered)
        assert len(data) < bench.crossed <= 1.1 * len(data)

    asyncio.run(main())


def test_stages_behind_get_no_pixels_and_no_media(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        assert await bench.tokens(await bench.render(f"{IMAGE}{VIDEO}", {"image": [image(1)], "video": [video(1)]}))
        for stage, method in ((Stage.PREFILL, "prefill"), (Stage.DECODE, "decode")):
            (prompt,) = bench.sent(stage, method)
            assert [sorted(item.data) for item in prompt.items] == [
                ["image_grid_thw"],
                ["second_per_grid_ts", "video_grid_thw"],  # M-RoPE of a video needs both
            ]
            assert [item.source for item in prompt.items] == [None, None]

    asyncio.run(main())


def test_counting_tokens_asks_no_encoder(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        rendered = await bench.render(f"What is {IMAGE}?", {"image": [image(1)]})
        tokens = bench.client.renderer.get_tokenizer().encode(f"What is {IMAGE}?", add_special_tokens=False)
        calls = len(bench.encoder.calls)
        counted = await bench.client.renderer.process_for_engine_async(
            {"prompt_token_ids": tokens, "multi_modal_data": {"image": [image(1)]}}, 0.0, skip_mm_cache=True
        )
        assert counted["prompt_token_ids"] == rendered["prompt_token_ids"]
        assert len(bench.encoder.calls) == calls == 1

    asyncio.run(main())


def test_item_that_no_encoder_takes_goes_to_prefill_with_its_pixels_under_the_same_name(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client, fails={"encode_media": [GONE, GONE]})
        first = await bench.render(IMAGE, {"image": [image(1)]})
        assert await bench.tokens(first)
        assert bench.pipeline.log == ["encode_media", "encode_media", "prefill", "decode"]
        (prompt,) = bench.sent(Stage.PREFILL, "prefill")
        assert "pixel_values" in prompt.items[0].data
        bench.client.pipeline.encoders.state.down = False
        again = await bench.render(IMAGE, {"image": [image(1)]})
        assert bench.pipeline.log[-1] == "encode_media"
        assert again["mm_hashes"] == first["mm_hashes"]

    asyncio.run(main())


def test_lost_embedding_is_encoded_again_from_the_media_and_lost_twice_at_prefill(make_client: Make) -> None:
    lost = [HandoffLost(Stage.PREFILL, "could not load it")] * 2

    async def main() -> None:
        bench = Bench(make_client, fails={"prefill": lost}, advanced={"retry": {"backoff_s": 0}})
        assert await bench.tokens(await bench.render(f"{IMAGE} {IMAGE}", {"image": [image(1), image(1)]}))
        assert bench.pipeline.log == ["encode_media", "prefill", "encode_media", "prefill", "prefill", "decode"]
        pixels = [
            ["pixel_values" in item.data for item in prompt.items] for prompt in bench.sent(Stage.PREFILL, "prefill")
        ]
        assert pixels == [[False, False], [False, False], [True, True]]

    asyncio.run(main())


@pytest.mark.parametrize("first", [True, False], ids=["media first", "frames first"])
def test_video_beside_one_that_came_as_frames_is_rendered_by_vllm(make_client: Make, first: bool) -> None:
    """`data:video/jpeg` is decoded where it is read."""

    async def main() -> None:
        bench = Bench(make_client)
        sent, frames = video(1), await bench.processor.decoded(video(2))
        mixed, decoded = [sent, frames], [await bench.processor.decoded(sent), frames]
        if not first:
            mixed.reverse()
            decoded.reverse()
        rendered = await bench.render(VIDEO + VIDEO, {"video": mixed})
        assert like_vllm(rendered, bench.processor.declared) == like_vllm(
            await bench.render(VIDEO + VIDEO, {"video": decoded}), bench.processor.declared
        )
        assert await bench.tokens(rendered) == [*A, *B]
        assert bench.pipeline.log == ["encode", "encode", "prefill", "decode"]

    asyncio.run(main())


@pytest.mark.parametrize(("connector", "calls"), [("SharedFolderECConnector", 1), ("Pulled", 3)])
def test_answer_of_a_connector_whose_blocks_are_pulled_once_serves_one_choice(
    make_client: Make, connector: str, calls: int
) -> None:
    own = {} if calls == 1 else {"advanced": {"ec": {"module_path": "somewhere"}}}

    async def main() -> None:
        bench = Bench(make_client, ec={"connector": connector}, **own)
        assert await bench.tokens(await bench.render(IMAGE, {"image": [image(1)]}), n=3)
        assert bench.pipeline.log.count("encode_media") == calls

    asyncio.run(main())


def test_broken_media_is_the_clients_error(make_client: Make) -> None:
    broken = media("image", png(picture(1))[:120], ImageMediaIO("RGB"), 84 * 84)

    async def main() -> None:
        bench = Bench(make_client)
        with pytest.raises(VLLMValidationError, match="truncated"):
            await bench.render(IMAGE, {"image": [broken]})
        assert bench.pipeline.log == ["encode_media"]
        with pytest.raises(BadRequest, match="truncated"):
            await bench.processor.features(broken)

    asyncio.run(main())


def test_media_over_a_limit_is_refused_by_the_encoder_too(make_client: Make) -> None:
    async def main() -> None:
        renderer = Bench(make_client).client.renderer
        with pytest.raises(BadRequest, match="84×84 pixels, and this server takes at most 100 pixels"):
            await ItemProcessor(renderer, MediaLimits(max_pixels=100)).features(image(1))

    asyncio.run(main())


def test_no_client_names_an_item_behind_the_door(make_client: Make) -> None:
    """vLLM takes a name for the item's hash: another client's picture could be put in its place."""

    async def main() -> None:
        bench = Bench(make_client)
        named = {"multi_modal_uuids": {"image": ["mine"]}}
        rendered = await bench.render(IMAGE, {"image": [image(1)]}, **named)
        assert rendered["mm_hashes"] == (await bench.render(IMAGE, {"image": [image(1)]}))["mm_hashes"]
        with pytest.raises(VLLMValidationError, match="in the messages of a chat only"):
            await bench.render(IMAGE, {"image": [await bench.processor.decoded(image(1))]}, **named)

    asyncio.run(main())


def test_video_of_one_frame_is_an_item(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        backend = get_video_loader_backend_for_processor("Qwen2VLVideoProcessor")
        one = media("video", recording("mp4", 1), VideoMediaIO(ImageMediaIO("RGB"), video_backend=backend), 1)
        rendered = await bench.render(VIDEO, {"video": [one]})
        assert (await bench.processor.features(one)).metadata["video_grid_thw"][0] == 1
        assert await bench.tokens(rendered)

    asyncio.run(main())


def test_tenants_with_another_salt_share_no_item(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client, ec={"salt_by_tenant": True})

        async def sent(salt: str | None) -> str:
            rendered = await bench.render(IMAGE, {"image": [image(1)]}, **({"cache_salt": salt} if salt else {}))
            assert await bench.tokens(rendered)
            return bench.sent(Stage.PREFILL, "prefill")[-1].items[0].hash

        names = [await sent(salt) for salt in ("a", "b", None, "a")]
        assert names[0] == names[3]
        assert len(set(names)) == 3
        assert bench.pipeline.log.count("encode_media") == 3

    asyncio.run(main())


def test_prompt_whose_items_depend_on_each_other_is_rendered_by_vllm(make_client: Make) -> None:
    """Models that listen to a video's sound (`use_audio_in_video`) interleave the tokens of two items."""

    async def main() -> None:
        bench = Bench(make_client)
        bench.client.renderer._process_multimodal_async = whole = Whole()
        await bench.render(IMAGE, {"image": [image(1)]}, mm_processor_kwargs={"use_audio_in_video": True})
        assert [type(each).__name__ for each in whole.images] == ["MediaWithBytes"]
        assert bench.encoder.calls == []

    asyncio.run(main())


class Whole:
    """vLLM's processing of a whole prompt."""

    async def __call__(self, tokens: list[int], mm_data: dict[str, Any], **_: Any) -> Any:
        self.images = mm_data["image"]
        return {"type": "multimodal", "prompt_token_ids": tokens}


def test_answer_with_metadata_that_does_not_fit_the_item_is_not_used(
    make_client: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        encode = bench.encode_media

        async def wrong(request: MediaRequest) -> EncodeReply:
            reply = await encode(request)
            assert reply.features is not None
            features = msgspec.structs.replace(reply.features, metadata={"image_grid_thw": [1, 2, 2]})
            return msgspec.structs.replace(reply, features=features)

        bench.encoder._methods["encode_media"] = wrong
        rendered = await bench.render(IMAGE, {"image": [image(1)]})
        assert len(rendered["prompt_token_ids"]) == 9
        assert "pixel_values" in rendered["mm_kwargs"]["image"][0]

    asyncio.run(main())


@pytest.mark.parametrize("metadata", [{}, {"image_grid_thw": [[1, 6, 6]]}])
def test_items_of_a_model_that_does_not_give_what_it_declares_go_as_tensors_from_the_second_on(
    make_client: Make, caplog: pytest.LogCaptureFixture, metadata: dict[str, Any]
) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        encode = bench.encode_media

        async def without(request: MediaRequest) -> EncodeReply:
            reply = await encode(request)
            assert reply.features is not None
            features = msgspec.structs.replace(reply.features, metadata=metadata)
            return msgspec.structs.replace(reply, features=features) if request.media.modality == "image" else reply

        bench.encoder._methods["encode_media"] = without
        for seed in (1, 2):
            rendered = await bench.render(IMAGE, {"image": [image(seed)]})
            assert "pixel_values" in rendered["mm_kwargs"]["image"][0]
        assert len(bench.encoder.calls) == 1
        assert caplog.text.count("['image'] go to encoders as tensors from now on") == 1
        rendered = await bench.render(VIDEO, {"video": [video(1)]})
        assert "pixel_values_videos" not in rendered["mm_kwargs"]["video"][0]

    asyncio.run(main())


def test_key_names_content_and_all_that_its_processing_depends_on() -> None:
    base = image(1)
    others = [
        image(2),
        msgspec.structs.replace(base, modality="video"),
        msgspec.structs.replace(base, processor_kwargs={"max_pixels": 1}),
        msgspec.structs.replace(base, io_kwargs={"image": {"image_mode": "L"}}),
        msgspec.structs.replace(base, salt="tenant"),
    ]
    keys = [keyed(each).key for each in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert keyed(image(1)).key == keys[0]


def test_cost_is_guessed_from_what_encoders_told(make_client: Make) -> None:
    async def main() -> None:
        bench = Bench(make_client)
        costs = bench.client.pipeline.encoders.costs
        assert costs.of(image(1, (280, 280))) == 100
        for seed in range(20):
            await bench.render(VIDEO, {"video": [video(100 + seed)]})
        assert costs.of(video(1)) == pytest.approx(36, rel=0.2)

    asyncio.run(main())


def test_a_prompt_is_rendered_around_what_is_remembered_and_an_encoder_is_asked_only_if_it_is_needed(
    make_client: Make,
) -> None:
    """The embedding may be gone, and the picture's tokens are in prefill's cache, or not."""

    async def main() -> None:
        bench = Bench(make_client, advanced={"encode": {"remember_s": 0}})
        prompts = []
        for holds in ((0, 0.0), (10_000, 1.0), (0, 1.0)):
            bench.pipeline.prefiller.holds = holds
            rendered = await bench.render(IMAGE, {"image": [image(1)]})
            bench.pipeline.log.append("rendered")
            prompts.append(like_vllm(rendered, bench.processor.declared))
            await bench.tokens(rendered)
        assert prompts[0] == prompts[1] == prompts[2]
        first = ["encode_media", "rendered", "prefill", "decode"]
        assert bench.pipeline.log == [*first, "rendered", "prefill", "decode", "rendered", *first[:1], *first[2:]]
        params = [
            call.params.extra_args.get("ec_transfer_params") for call in bench.pipeline.prefiller.requests("prefill")
        ]
        assert params[0] == params[2] and params[0]
        assert not params[1]
        for prompt in bench.sent(Stage.PREFILL, "prefill"):
            assert "pixel_values" not in prompt.items[0].data and prompt.items[0].source is None

    asyncio.run(main())


def test_a_picture_that_no_encoder_takes_after_it_was_remembered_goes_to_prefill_with_its_pixels(
    make_client: Make,
) -> None:
    async def main() -> None:
        bench = Bench(make_client, advanced={"encode": {"remember_s": 0}})
        await bench.tokens(await bench.render(IMAGE, {"image": [image(1)]}))
        bench.encoder._fails["encode_media"] = [GONE, GONE]
        await bench.tokens(await bench.render(IMAGE, {"image": [image(1)]}))
        first, second = bench.sent(Stage.PREFILL, "prefill")
        assert "pixel_values" not in first.items[0].data
        assert "pixel_values" in second.items[0].data
        assert first.items[0].hash == second.items[0].hash

    asyncio.run(main())
