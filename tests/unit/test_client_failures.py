"""serve_app.client: stages that fail or hang, what is tried again, and clients that leave. Blocks nobody pulled are given
back, once."""

import asyncio
import copy
import functools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

from serve_app import handoff, trace
from serve_app.client import EPDClient
from serve_app.config import RetryConfig, Stage
from serve_app.errors import BadRequest, ConfigError, EngineDead, HandoffLost, StageTimeout, StageUnavailable
from serve_app.handoff import Chunk, EncodeReply, PrefillReply, StageRequest
from serve_app.retry import Retries
from serve_app.trace import Trace
from tests.fakes import FakePipeline, encoded
from tests.unit.running import Make, background, generate, params, render, run


def once(make: Make) -> Make:
    """Clients that try nothing again."""
    return functools.partial(make, retry={"attempts": 1})


def traced(make: Make, pipeline: FakePipeline, *colours: str, **more: Any) -> tuple[list[RequestOutput], Trace]:
    """A request, and its trace."""
    record = Trace("req")
    token = trace.current.set(record)
    try:
        return generate(make, pipeline, *colours, **more), record
    finally:
        trace.current.reset(token)


def texts(outputs: list[RequestOutput]) -> list[str]:
    """What a client of one choice sees."""
    return [output.outputs[0].text for output in outputs]


def pixels(request: StageRequest) -> list[bool]:
    return ["pixel_values" in item.data for item in request.prompt.items]


def blocks(request: StageRequest) -> Any:
    return request.params.extra_args["kv_transfer_params"]["remote_block_ids"]


PREFILL_GONE = StageUnavailable(Stage.PREFILL, "is gone")
DECODE_GONE = StageUnavailable(Stage.DECODE, "is gone")
PREFILL_LOST = HandoffLost(Stage.PREFILL, "lost the embeddings")
DECODE_LOST = HandoffLost(Stage.DECODE, "lost the blocks")


def test_item_that_no_encoder_encodes_goes_to_prefill_with_its_pixels_and_the_others_without(make_client: Make) -> None:
    async def encode(request: StageRequest) -> EncodeReply:
        if ":0:" in request.request_id:
            raise StageUnavailable(Stage.ENCODER, "is full")
        return encoded(request)

    pipeline = FakePipeline(encode=encode)
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "encode", "prefill", "generate"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("generate"):
        assert pixels(call) == [True, False]
        assert list(call.params.extra_args["ec_transfer_params"]) == [call.prompt.items[1].hash]
    assert record.rungs == ["encode-again", "encode-at-prefill(failed)"]


def test_item_that_an_encoder_refuses_cancels_the_others_and_no_prefill_is_called(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    cancelled: list[str] = []

    async def encode(request: StageRequest) -> EncodeReply:
        await both.wait()
        if ":0:" in request.request_id:
            raise BadRequest("this picture cannot be encoded")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.request_id.split(":")[1])
            raise
        raise AssertionError

    pipeline = FakePipeline(encode=encode)
    with pytest.raises(VLLMValidationError, match="this picture cannot be encoded"):
        generate(make_client, pipeline, "red", "blue")
    assert cancelled == ["1"]
    assert pipeline.log == ["encode", "encode"]


def test_encoder_that_names_another_item_is_not_believed(make_client: Make) -> None:
    async def encode(request: StageRequest) -> EncodeReply:
        return EncodeReply({"another": {"item_indices": [0]}}, "e")

    pipeline = FakePipeline(encode=encode)
    generate(make_client, pipeline, "red")
    assert pipeline.log == ["encode", "encode", "prefill", "generate"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("generate"):
        assert pixels(call) == [True]
        assert "ec_transfer_params" not in call.params.extra_args


@pytest.mark.parametrize(
    ("error", "kind", "log"),
    [
        (PREFILL_LOST, GracefulHTTPError, ["encode", "prefill", "encode", "prefill", "prefill"]),
        (StageTimeout(Stage.PREFILL, "did not answer"), GracefulHTTPError, ["encode", "prefill"]),
        (BadRequest("no such thing"), VLLMValidationError, ["encode", "prefill"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failing_prefill_leaves_nothing_to_release(
    make_client: Make, error: Exception, kind: type[Exception], log: list[str]
) -> None:
    pipeline = FakePipeline(fails={"prefill": [error] * 9})
    with pytest.raises(kind) as caught:
        generate(make_client, pipeline, "red")
    assert str(caught.value) == str(error)
    assert pipeline.log == log


def test_prefill_and_decode_that_are_both_gone_are_an_error(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9, "generate": [DECODE_GONE] * 9})
    with pytest.raises(GracefulHTTPError) as caught:
        generate(make_client, pipeline, "red")
    assert str(caught.value) == str(DECODE_GONE)
    assert pipeline.log == ["encode", "prefill", "prefill", "generate"]


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (StageUnavailable(Stage.DECODE, "is gone"), GracefulHTTPError, 503),
        (BadRequest("no such thing"), VLLMValidationError, None),
        (ConfigError("broken"), GracefulHTTPError, 500),
        (KeyError("ours"), KeyError, None),
    ],
)
def test_decode_that_fails_before_its_first_token_gives_the_blocks_back_once(
    make_client: Make, error: Exception, kind: type[Exception], status: int | None
) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise error
        yield

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(kind) as caught:
        generate(once(make_client), pipeline, "red")
    assert pipeline.released() == [("req", {"remote_block_ids": [1]})]
    assert status is None or caught.value.http_status == status  # type: ignore[attr-defined]


def test_decode_that_fails_after_its_first_token_has_pulled_the_blocks(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        yield Chunk("a", [1]), "decode-0"
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError, match="is gone"):
        generate(once(make_client), pipeline, "red")
    assert pipeline.released() == []
    assert pipeline.log == ["encode", "prefill", "generate"]


def test_stream_that_ends_without_a_reason_is_an_error(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        return
        yield

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError, match="without a finish reason"):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_failing_release_changes_nothing(make_client: Make) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise BadRequest("no")
        yield

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(generate=decode, release=release)
    with pytest.raises(VLLMValidationError):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_release_runs_outside_the_context_of_the_request(make_client: Make) -> None:
    """Serve would cancel it with the request that it cleans up after."""
    seen: list[Trace | None] = []

    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        raise BadRequest("no")
        yield

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        seen.append(trace.current.get())

    token = trace.current.set(Trace("req"))
    try:
        with pytest.raises(VLLMValidationError):
            generate(make_client, FakePipeline(generate=decode, release=release))
    finally:
        trace.current.reset(token)
    assert seen == [None]


def test_failing_choice_ends_the_others_and_gives_their_blocks_back(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    closed: list[int] = []

    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        (block,) = request.params.extra_args["kv_transfer_params"]["remote_block_ids"]
        try:
            await both.wait()
            if block == 1:
                raise StageUnavailable(Stage.DECODE, "is gone")
            await asyncio.Event().wait()
            yield
        finally:
            closed.append(block)

    pipeline = FakePipeline(generate=decode)
    with pytest.raises(GracefulHTTPError):
        generate(once(make_client), pipeline, n=2)
    assert sorted(closed) == [1, 2]
    assert sorted(args[1]["remote_block_ids"] for args in pipeline.released()) == [[1], [2]]


# ---- the ladder: a choice is tried again


def test_lost_prefill_is_made_again_and_the_client_sees_nothing_of_it(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "prefill", "prefill", "generate"]  # its item is encoded already
    first, second = pipeline.prefiller.requests("prefill")
    assert pixels(first) == pixels(second) == [False]
    assert first.params.extra_args == second.params.extra_args
    assert record.rungs == ["prefill-again"]
    assert record.error is None
    assert " rungs=prefill-again" in record.line(200)


@pytest.mark.parametrize("without", [(), (Stage.ENCODER,)])
def test_prompt_that_prefill_lost_twice_is_prefilled_by_decode(make_client: Make, without: tuple[Stage, ...]) -> None:
    pipeline = FakePipeline(without, fails={"prefill": [PREFILL_GONE] * 9})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode"] * (not without) + ["prefill", "prefill", "generate"]
    assert record.rungs == ["prefill-again", "prefill-again", "prefill-at-decode(failed)"]
    (decode,) = pipeline.decoder.requests("generate")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [bool(without)]
    assert (pipeline.released(), record.error) == ([], None)


@pytest.mark.parametrize("error", [DECODE_GONE, DECODE_LOST], ids=lambda error: type(error).__name__)
def test_decode_lost_before_its_first_token_gives_the_blocks_back_and_begins_again(
    make_client: Make, error: Exception
) -> None:
    pipeline = FakePipeline(fails={"generate": [error]})
    outputs, record = traced(make_client, pipeline)
    assert texts(outputs) == ["a", "b"]
    assert [output.finished for output in outputs] == [False, True]
    assert pipeline.released() == [("req", {"remote_block_ids": [1]})]
    assert [blocks(call) for call in pipeline.decoder.requests("generate")] == [[1], [2]]
    assert sorted(pipeline.log) == ["generate", "generate", "prefill", "prefill", "release"]
    assert record.rungs == ["decode-again"]
    assert (record.output_tokens, record.error) == (2, None)


@pytest.mark.parametrize("without", [(), (Stage.ENCODER,)])
def test_prompt_whose_blocks_were_lost_twice_is_prefilled_by_decode(
    make_client: Make, without: tuple[Stage, ...]
) -> None:
    """Where no blocks get across at all, answers still do: a network between two nodes that UCX cannot use."""
    pipeline = FakePipeline(without, fails={"generate": [DECODE_LOST, DECODE_LOST]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert record.rungs == ["decode-again", "decode-again", "prefill-at-decode(failed)"]
    *_, decode = pipeline.decoder.requests("generate")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [True]
    assert len(pipeline.prefiller.requests("prefill")) == len(pipeline.released()) == 2


STRUCTURE = {"structured_outputs": StructuredOutputsParams(regex="a+")}


SAYS = "h\u00e9llo \U0001f389 \u4e16\u754c"
"""Characters of two, three and four tokens too."""


class BreaksOff:
    """A decode that says ``SAYS``, a token per chunk, and breaks off after each ``said`` of them."""

    def __init__(self, said: int = 1, times: int = 1) -> None:
        self.said, self.times = said, times
        self.calls: list[StageRequest] = []

    def speak_as(self, client: EPDClient) -> EPDClient:
        self.tokenizer = client.renderer.get_tokenizer()
        self.tokens = self.tokenizer.encode(SAYS)
        return client

    async def __call__(self, request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        self.calls.append(request)
        prompt = self.calls[0].prompt.token_ids
        before = len(request.prompt.token_ids) - len(prompt)
        assert request.prompt.token_ids == prompt + self.tokens[:before]
        stream = DecodeStream(ids=request.prompt.token_ids)  # as vLLM's detokenizer
        for count, token in enumerate(self.tokens[before:], 1):
            text = stream.step(self.tokenizer._tokenizer, token) or ""
            reason = "length" if before + count == len(self.tokens) else None
            yield Chunk(text, [token], num_cached_tokens=before, finish_reason=reason), "decode-0"
            if count == self.said and len(self.calls) <= self.times:
                raise DECODE_GONE


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=["streamed", "whole"])
def test_answer_that_breaks_off_goes_on_where_it_was(
    make_client: Make, without: tuple[Stage, ...], kind: RequestOutputKind
) -> None:
    async def main() -> None:
        decode, record = BreaksOff(said=2, times=2), Trace("req")
        pipeline = FakePipeline(without, generate=decode)
        client = decode.speak_as(make_client(pipeline.stages))
        length = len(decode.tokens)
        token = trace.current.set(record)
        outputs = await run(client, "red", max_tokens=length, min_tokens=3, prompt_logprobs=1, output_kind=kind)
        trace.current.reset(token)
        await background(client)
        said = [token for output in outputs for token in output.outputs[0].token_ids]
        assert ("".join(texts(outputs)), said) == (SAYS, decode.tokens)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        asked = [(call.params.max_tokens, call.params.min_tokens) for call in decode.calls]
        assert asked == [(length, 3), (length - 2, 1), (length - 4, 0)]
        prefills = decode.calls if Stage.PREFILL in without else pipeline.prefiller.requests("prefill")
        assert [call.params.prompt_logprobs for call in prefills] == [1, None, None]
        assert outputs[-1].num_cached_tokens == outputs[0].num_cached_tokens, "of the client's own prompt"
        assert (record.rungs, record.output_tokens) == (["decode-again"] * 2, length)
        assert pipeline.released() == []

    asyncio.run(main())


@pytest.mark.parametrize("said", range(1, 15))
def test_text_is_whole_wherever_the_answer_breaks_off(make_client: Make, said: int) -> None:
    """Within a character too: the next engine then takes the first bytes of it for the end of its prompt."""

    async def main() -> None:
        decode = BreaksOff(said)
        client = decode.speak_as(make_client(FakePipeline(generate=decode).stages))
        assert "".join(texts(await run(client, max_tokens=99))) == SAYS
        assert said < len(decode.tokens) and len(decode.calls) == 2

    asyncio.run(main())


def test_answer_that_goes_on_has_a_deadline_of_its_own(make_client: Make) -> None:
    async def main() -> None:
        decode, late = BreaksOff(), asyncio.Event()

        async def slow(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            async for each in decode(request):
                yield each
                await late.wait()

        client = decode.speak_as(make_client(FakePipeline(generate=slow).stages, request_timeout_s=0.2))
        asyncio.get_running_loop().call_later(0.3, late.set)
        assert "".join(texts(await run(client, max_tokens=99))) == SAYS

    asyncio.run(main())


def test_what_fails_while_an_answer_goes_on_is_tried_again_too(make_client: Make) -> None:
    prefills = 0

    async def prefill(request: StageRequest) -> PrefillReply:
        nonlocal prefills
        prefills += 1
        if prefills == 2:
            raise PREFILL_GONE
        return PrefillReply({"remote_block_ids": [prefills]}, None, 0, "prefill-0")

    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(generate=decode, prefill=prefill).stages))
        assert "".join(texts(await run(client, max_tokens=99))) == SAYS
        assert prefills == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 7},
        {"stop": ["x"]},
        {"bad_words": ["x"]},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        STRUCTURE,
        {"logprobs": 0},
        {"logprob_token_ids": [1]},
        {"extra_args": {"mine": 1}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_answer_whose_tokens_do_not_tell_all_ends_where_it_breaks_off(make_client: Make, more: dict[str, Any]) -> None:
    seen: list[str] = []

    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(generate=decode).stages))
        prompt = await render(client, "red")
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            async for output in client.generate(prompt, params(**more), "req"):
                seen.append(output.outputs[0].text)
        assert len(decode.calls) == 1
        await background(client)

    asyncio.run(main())
    assert seen == ["h"]


@pytest.mark.parametrize("of", ["marks", "processors"])
def test_answer_goes_on_only_where_its_engines_look_at_the_prompt_too(make_client: Make, of: str) -> None:
    async def main() -> None:
        decode = BreaksOff()
        given: dict[str, Any] = (
            {"decode": {"engine_args": {"logits_processors": ["a:B"]}}} if of == "processors" else {}
        )
        client = decode.speak_as(make_client(FakePipeline(generate=decode).stages, **given))
        if of == "marks":
            vllm_config = copy.copy(client.vllm_config)
            vllm_config.watermark_config = object()  # type: ignore[assignment]
            client = EPDClient(client._config, vllm_config, client.stages)
        with pytest.raises(GracefulHTTPError):
            await run(client)

    asyncio.run(main())


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=["streamed", "whole"])
def test_answer_whose_replica_goes_after_its_last_word_is_whole(make_client: Make, kind: RequestOutputKind) -> None:
    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        yield Chunk("a", [1]), "decode-0"
        yield Chunk("b", [2], finish_reason="stop"), "decode-0"
        raise DECODE_GONE

    pipeline = FakePipeline(generate=decode)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    assert (record.rungs, record.error, len(pipeline.decoder.requests("generate"))) == ([], None, 1)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=["streamed", "whole"])
def test_all_answers_of_a_lost_replica_go_on(make_client: Make, kind: RequestOutputKind) -> None:
    """More of them than the budget of retries has: they are no more work than there was."""

    async def main() -> None:
        decodes = {f"req{index}": BreaksOff(said=2) for index in range(40)}
        all_said = asyncio.Barrier(len(decodes))

        async def generate(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            decode, said = decodes[request.request_id], 0
            async for each in decode(request):
                yield each
                said += 1
                if len(decode.calls) == 1 and said == decode.said:
                    await all_said.wait()

        client = make_client(FakePipeline(generate=generate).stages)
        prompt = await render(client)

        async def one(request_id: str) -> None:
            decodes[request_id].speak_as(client)
            asked = params(max_tokens=99, output_kind=kind)
            outputs = [output async for output in client.generate(prompt, asked, request_id)]
            assert "".join(texts(outputs)) == SAYS

        await asyncio.gather(*map(one, decodes))

    asyncio.run(main())


def test_answer_that_is_not_streamed_and_has_its_first_token_alone_costs_a_retry(make_client: Make) -> None:
    """That comes ahead of what is made of the rest: a run that begins with it is a whole run."""

    async def main() -> None:
        whole: dict[str, Any] = {"max_tokens": 99, "output_kind": RequestOutputKind.FINAL_ONLY}
        decode = BreaksOff(said=1)
        pipeline = FakePipeline(generate=decode)
        retry = {"ratio": 0, "floor_per_s": 0, "backoff_s": 0}  # one, and never another
        client = decode.speak_as(make_client(pipeline.stages, retry=retry))
        assert texts(await run(client, **whole)) == [SAYS]
        first, anew = decode.calls
        assert anew.prompt == first.prompt
        decode.calls.clear()
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client, **whole)

    asyncio.run(main())


def test_request_that_two_engines_died_of_is_not_given_to_a_third(make_client: Make) -> None:
    dead = EngineDead(Stage.DECODE, "failed: its engine is dead")
    pipeline = FakePipeline(fails={"generate": [dead] * 9})
    with pytest.raises(GracefulHTTPError, match="engine is dead"):
        generate(make_client, pipeline)
    assert len(pipeline.decoder.requests("generate")) == 2


def test_greedy_answer_with_a_seed_goes_on(make_client: Make) -> None:
    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(generate=decode).stages))
        assert "".join(texts(await run(client, max_tokens=99, seed=7, temperature=0))) == SAYS

    asyncio.run(main())


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_that_decode_alone_gives_up_is_the_clients_mistake(make_client: Make, without: Any) -> None:
    """vLLM ends a request whose grammar does not compile as it ends one whose blocks or embeddings are lost."""
    pipeline = FakePipeline(without, fails={"generate": [DECODE_LOST] * 9})
    with pytest.raises(VLLMValidationError, match="grammar"):
        generate(make_client, pipeline, "red", **STRUCTURE)
    assert pipeline.log.count("generate") == 2


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_is_not_blamed_for_what_decode_did_not_find(make_client: Make, without: Any) -> None:
    """Decode then has nothing to find: the items have their pixels, and no blocks are to be pulled."""
    pipeline = FakePipeline(without, fails={"generate": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red", **STRUCTURE)) == ["a", "b"]
    ((alone,),) = [args for method, args in pipeline.decoder.calls if method == "generate"][1:]
    assert pixels(alone) == [True]
    assert handoff.pulled_blocks(alone.params) is None and "ec_transfer_params" not in (alone.params.extra_args or {})


def test_items_whose_embeddings_were_lost_are_encoded_again(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill", "encode", "encode", "prefill", "generate"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[False, False]] * 2
    assert record.rungs == ["prefill-again"]


def test_decode_that_prefills_asks_for_lost_embeddings_again(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.PREFILL,), fails={"generate": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert pipeline.log == ["encode", "generate", "encode", "generate"]


def test_lost_items_are_encoded_again_for_the_next_request_too(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
        client = make_client(pipeline.stages, retry={"attempts": 1})
        with pytest.raises(GracefulHTTPError):
            await run(client, "red")
        await run(client, "red")
        await run(client, "red")
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "encode", "prefill", "generate", "prefill", "generate"]


def test_embeddings_lost_twice_are_made_by_prefill(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST, PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill"] * 2 + ["prefill", "generate"]
    *_, third = pipeline.prefiller.requests("prefill")
    (decode,) = pipeline.decoder.requests("generate")
    for call in (third, decode):
        assert pixels(call) == [True, True]
        assert "ec_transfer_params" not in call.params.extra_args
    assert record.rungs == ["prefill-again", "prefill-again"]


def test_pipeline_without_an_encoder_climbs_the_same_ladder(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.ENCODER,), fails={"prefill": [PREFILL_GONE], "generate": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[True]] * 2
    assert pipeline.released() == [("req", {"remote_block_ids": [1]})]


def test_hand_off_is_never_used_twice(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"generate": [DECODE_GONE, DECODE_LOST]})
    generate(make_client, pipeline, "red")
    assert [blocks(call) for call in pipeline.decoder.requests("generate")] == [[1], [2], [3]]
    assert [args[1]["remote_block_ids"] for args in pipeline.released()] == [[1], [2]]


def test_hand_off_that_outwaits_its_lease_is_prefilled_again(make_client: Make) -> None:
    calls = 0

    async def prefill(request: StageRequest) -> PrefillReply:
        return PrefillReply(
            {"remote_request_id": f"hand-off {len(pipeline.prefiller.requests('prefill'))}"}, None, 3, "p"
        )

    async def renew(waiting: list[str]) -> list[set[str]]:
        return [{"hand-off 1"}]

    async def generate_(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        nonlocal calls
        calls += 1
        if calls == 1:  # as one that waits for a place in Serve's router
            await asyncio.Event().wait()
        yield Chunk("a", [1], finish_reason="stop"), "decode-0"

    pipeline = FakePipeline(prefill=prefill, generate=generate_, renew=renew)

    def make(stages: Any) -> EPDClient:
        client = make_client(stages)
        assert client._leases is not None
        client._leases.after_s, client._leases.every_s = 0.0, 0.01
        return client

    outputs, record = traced(make, pipeline)
    assert texts(outputs) == ["a"]
    assert record.rungs == ["decode-again"]
    taken = [handoff.hand_off_id(handoff.pulled_blocks(call.params)) for call in pipeline.decoder.requests("generate")]
    assert taken == ["hand-off 1", "hand-off 2"]


def test_decode_waits_no_longer_for_blocks_than_their_node_lives(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red")
    assert pipeline.decoder.sources == ["node-0"]


@pytest.mark.parametrize("attempts", [1, 3, 4])
def test_request_is_tried_so_many_times_and_then_fails_as_it_did(make_client: Make, attempts: int) -> None:
    pipeline = FakePipeline(fails={"generate": [DECODE_GONE] * 9})
    make = functools.partial(make_client, retry={"attempts": attempts, "backoff_s": 0})
    with pytest.raises(GracefulHTTPError, match="The decode stage is gone") as caught:
        generate(make, pipeline, "red")
    assert caught.value.http_status == 503
    assert [blocks(call) for call in pipeline.decoder.requests("generate")] == [[i + 1] for i in range(attempts)]
    assert [args[1]["remote_block_ids"] for args in pipeline.released()] == [[i + 1] for i in range(attempts)]


def test_requests_share_a_budget_of_retries(make_client: Make) -> None:
    async def main() -> list[int]:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9})
        client = make_client(pipeline.stages, retry={"attempts": 9, "ratio": 0.5, "floor_per_s": 0, "backoff_s": 0})
        prefills = []
        for _ in range(3):
            before = len(pipeline.prefiller.calls)
            with pytest.raises(GracefulHTTPError, match="is gone"):
                await run(client)
            prefills.append(len(pipeline.prefiller.calls) - before)
        return prefills

    assert asyncio.run(main()) == [2, 1, 2]  # one retry at first, and one more for two requests


def test_lost_choice_is_tried_again_by_itself(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"generate": [DECODE_GONE]})
    outputs, record = traced(make_client, pipeline, "red", n=2, seed=7)
    said = dict.fromkeys(range(2), "")
    for output in outputs:
        said[output.outputs[0].index] += output.outputs[0].text
    assert said == {0: "ab", 1: "ab"}
    assert outputs[-1].finished
    decodes = pipeline.decoder.requests("generate")
    assert sorted(blocks(call) for call in decodes) == [[1], [2], [3]]
    failed, *others = decodes
    assert [args[1]["remote_block_ids"] for args in pipeline.released()] == [blocks(failed)]
    assert sorted(call.params.seed for call in others) == [7, 8]
    assert record.rungs == ["decode-again"]


# ---- deadlines


def test_deadline_is_for_all_attempts_together(make_client: Make) -> None:
    async def main() -> tuple[float, int]:
        async def prefill(request: StageRequest) -> PrefillReply:
            await asyncio.sleep(0.1)
            raise PREFILL_LOST

        pipeline = FakePipeline(prefill=prefill)
        retry = {"attempts": 100, "floor_per_s": 1000, "backoff_s": 0}
        client = make_client(pipeline.stages, request_timeout_s=0.5, retry=retry)
        loop = asyncio.get_running_loop()
        prompt = await render(client)
        began = loop.time()
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.5 s") as caught:
            async for _ in client.generate(prompt, params(), "req"):
                pass
        assert caught.value.http_status == 504
        return loop.time() - began, len(pipeline.prefiller.calls)

    seconds, prefills = asyncio.run(main())
    assert 0.5 <= seconds < 5
    assert prefills >= 2


def test_pause_before_a_retry_ends_with_the_deadline(make_client: Make) -> None:
    async def main() -> None:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE]})
        client = make_client(pipeline.stages, request_timeout_s=0.1)
        client._retries = Retries(RetryConfig(), lambda low, high: 60.0)
        with pytest.raises(GracefulHTTPError, match=r"The prefill stage did not answer within 0\.1 s"):
            await run(client)
        assert pipeline.log == ["prefill"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("of_the_client", "of_the_server", "seconds"), [(0.1, 600, "0.1"), (600, 0.1, "0.1"), (None, 0.1, "0.1")]
)
def test_shorter_deadline_of_client_and_server_holds(
    make_client: Make, of_the_client: float | None, of_the_server: float, seconds: str
) -> None:
    async def hang(request: StageRequest) -> PrefillReply:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        trace.current.set(Trace("req", timeout_s=of_the_client))
        client = make_client(FakePipeline(prefill=hang).stages, request_timeout_s=of_the_server)
        with pytest.raises(GracefulHTTPError, match=f"did not answer within {seconds} s"):
            await run(client)

    asyncio.run(main())


def test_deadline_of_the_client_counts_from_the_beginning_of_its_request(make_client: Make) -> None:
    async def hang(request: StageRequest) -> PrefillReply:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> float:
        loop = asyncio.get_running_loop()
        client = make_client(FakePipeline(prefill=hang).stages)
        prompt = await render(client)
        trace.current.set(Trace("req", began=time.perf_counter() - 2, timeout_s=2.1))
        began = loop.time()
        with pytest.raises(GracefulHTTPError, match="did not answer within"):
            async for _ in client.generate(prompt, params(), "req"):
                pass
        return loop.time() - began

    assert asyncio.run(main()) < 1.9


class Beams(BeamSearchOnlineMixin):
    """vLLM's beam search in front of a client."""

    def __init__(self, client: EPDClient) -> None:
        self.engine_client, self.renderer = client, client.renderer

    async def search(self, *colours: str, steps: int) -> RequestOutput:
        prompt = await render(self.engine_client, *colours)  # type: ignore[arg-type]
        (output,) = [each async for each in self.beam_search(prompt, "req", BeamSearchParams(2, steps))]
        return output


async def two_ways(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
    logprobs = [{token: Logprob(-float(token)) for token in (5, 6)}]
    yield Chunk("", [5], logprobs, -5.0, finish_reason="length"), "decode-0"


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["E+P+D", "E+PD"])
def test_each_step_of_a_beam_search_has_a_deadline_of_its_own(make_client: Make, without: tuple[Stage, ...]) -> None:
    async def main() -> None:
        trace.current.set(record := Trace("req"))

        async def slow(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            record.began -= 200  # so many seconds pass
            async for each in two_ways(request):
                yield each

        pipeline = FakePipeline(without, generate=slow)
        output = await Beams(make_client(pipeline.stages, request_timeout_s=300)).search("red", steps=5)
        assert [len(beam.token_ids) for beam in output.outputs] == [5, 5]
        assert len(pipeline.decoder.requests("generate")) == 1 + 4 * 2

    asyncio.run(main())


def test_step_of_a_beam_search_that_makes_no_progress_is_a_504(make_client: Make) -> None:
    async def main() -> None:
        trace.current.set(Trace("req"))
        steps = 0

        async def hangs(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            nonlocal steps
            steps += 1
            if steps > 3:
                await asyncio.Event().wait()
            async for each in two_ways(request):
                yield each

        stages = FakePipeline(generate=hangs).stages
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.3 s") as caught:
            await Beams(make_client(stages, request_timeout_s=0.3)).search(steps=5)
        assert caught.value.http_status == 504

    asyncio.run(main())


@pytest.mark.parametrize("slow", ["encode", "prefill", "generate"])
def test_stage_that_does_not_answer_in_time_is_a_504(make_client: Make, slow: str) -> None:
    cancelled: list[str] = []

    async def hang(request: StageRequest) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(slow)

    async def hang_streaming(request: StageRequest) -> AsyncIterator[Any]:
        yield await hang(request)

    async def main() -> FakePipeline:
        pipeline = FakePipeline(**{slow: hang_streaming if slow == "generate" else hang})
        client = make_client(pipeline.stages, request_timeout_s=0.2)
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.2 s") as caught:
            await run(client, "red")
        assert caught.value.http_status == 504
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert cancelled == [slow]
    assert pipeline.log[-1] == ("release" if slow == "generate" else slow)


@pytest.mark.parametrize(("kind", "expected"), [("DELTA", ["a", "b"]), ("FINAL_ONLY", ["ab"])])
def test_deadline_is_only_for_the_first_token(make_client: Make, kind: str, expected: list[str]) -> None:
    """Not for an answer that is not streamed, which would have to be whole by then."""

    async def main() -> list[RequestOutput]:
        over = asyncio.Event()

        async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            if request.params.output_kind is RequestOutputKind.DELTA:  # otherwise an engine is silent up to the end
                yield Chunk("a", [1]), "decode-0"
            await over.wait()
            yield Chunk("b", [2], finish_reason="stop"), "decode-0"

        client = make_client(FakePipeline(generate=decode).stages, request_timeout_s=0.2)
        asyncio.get_running_loop().call_later(0.3, over.set)
        return await run(client, output_kind=RequestOutputKind[kind])

    assert texts(asyncio.run(main())) == expected


def test_answer_that_is_not_streamed_is_made_anew_where_it_cannot_go_on(make_client: Make) -> None:
    attempts = 0

    async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
        nonlocal attempts
        attempts += 1
        assert not request.streamed
        yield Chunk("a", [1]), "decode-0"
        if attempts == 1:
            raise DECODE_GONE
        yield Chunk("b", [2, 3], finish_reason="stop"), "decode-0"

    pipeline = FakePipeline(generate=decode)
    outputs, record = traced(make_client, pipeline, output_kind=RequestOutputKind.FINAL_ONLY, stop=["x"])
    assert texts(outputs) == ["ab"]
    assert (record.rungs, record.output_tokens) == (["decode-again"], 3)
    first, second = pipeline.decoder.requests("generate")
    assert first.prompt == second.prompt


# ---- clients that leave


@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_after_a_token_ends_the_streams_and_releases_nothing(make_client: Make, n: int) -> None:
    closed: list[str] = []

    async def main() -> FakePipeline:
        started = asyncio.Barrier(n)

        async def decode(request: StageRequest) -> AsyncIterator[tuple[Chunk, str]]:
            try:
                await started.wait()
                yield Chunk("a", [1]), "decode-0"
                await asyncio.Event().wait()
            finally:
                closed.append("decode")

        pipeline = FakePipeline(generate=decode)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(n=n), "req")) as stream:
            for _ in range(n):
                await anext(stream)
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert closed == ["decode"] * n
    assert pipeline.released() == []


async def leave(client: EPDClient, moment: asyncio.Event) -> None:
    """Ask, and go away at ``moment``; returns when what that set off in the background is done."""
    request = asyncio.create_task(run(client, "red"))
    await moment.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await background(client)


@pytest.mark.parametrize("where", ["encode", "prefill", "generate"])
def test_client_that_leaves_before_a_token_ends_the_work_and_frees_the_blocks(make_client: Make, where: str) -> None:
    ended: list[str] = []

    async def main() -> FakePipeline:
        reached = asyncio.Event()

        async def hang(request: StageRequest) -> Any:
            reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(where)
                raise

        async def hang_streaming(request: StageRequest) -> AsyncIterator[Any]:
            yield await hang(request)

        pipeline = FakePipeline(**{where: hang_streaming if where == "generate" else hang})
        client = make_client(pipeline.stages)
        await leave(client, reached)
        return pipeline

    pipeline = asyncio.run(main())
    assert ended == [where]
    assert pipeline.released() == ([("req", {"remote_block_ids": [1]})] if where == "generate" else [])


def test_prefill_that_ends_just_when_its_client_leaves_frees_its_blocks(make_client: Make) -> None:
    async def main() -> FakePipeline:
        reached, left = asyncio.Event(), asyncio.Event()

        async def prefill(request: StageRequest) -> PrefillReply:
            reached.set()
            await left.wait()
            return PrefillReply({"remote_block_ids": [1]}, None, 0, "prefill-0")

        pipeline = FakePipeline(prefill=prefill)
        client = make_client(pipeline.stages)
        request = asyncio.create_task(run(client, "red"))
        await reached.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        left.set()
        while client._background:
            await background(client)
        return pipeline

    assert asyncio.run(main()).released() == [("req", {"remote_block_ids": [1]})]


def test_client_that_leaves_between_two_attempts_leaves_nothing_behind(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pausing = asyncio.Event()

        def jitter(low: float, high: float) -> float:
            pausing.set()
            return 60.0

        pipeline = FakePipeline(fails={"generate": [DECODE_GONE]})
        client = make_client(pipeline.stages)
        client._retries = Retries(RetryConfig(), jitter)
        await leave(client, pausing)
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "generate", "release"]
    assert pipeline.released() == [("req", {"remote_block_ids": [1]})]
