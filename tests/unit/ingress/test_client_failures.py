"""Stages that fail or hang, what is tried again, and clients that leave. Blocks nobody pulled are given
back, once."""

import asyncio
import copy
import functools
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

import numpy as np
import pytest
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from serve_app.channel.wire import First, Frame, ReplyTo
from serve_app.config import RetryConfig
from serve_app.handoff import shaping
from serve_app.handoff.errors import BadRequest, ConfigError, EngineDead, HandoffLost, StageTimeout, StageUnavailable
from serve_app.handoff.types import DecodeReply, EncodeReply, PrefillReply, StageRequest
from serve_app.ingress.assembly import assemble
from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import Request, current
from serve_app.ingress.retry import Retries
from serve_app.observe.trace import Trace
from serve_app.routing.handles import Call
from serve_app.stage import Stage
from tests.fakes import A, B, FakeLink, FakePipeline, Step, encoded
from tests.unit.running import Make, background, generate, params, render, run


@pytest.fixture
def make_client(make_client: Make) -> Iterator[Make]:
    """Clients that, however their requests end, keep nothing of them."""
    made: list[EPDClient] = []

    def make(*args: Any, **config: Any) -> EPDClient:
        made.append(make_client(*args, **config))
        return made[-1]

    yield make
    for client in made:
        processor, answers = client.pipeline._processor, client.pipeline.answers
        for kept in (processor.request_states, processor.parent_requests, processor.external_req_ids):
            assert not kept
        assert not answers._by_key and not answers._by_choice


def once(make: Make) -> Make:
    """Clients that try nothing again."""
    return functools.partial(make, advanced={"retry": {"attempts": 1}})


def traced(make: Make, pipeline: FakePipeline, *colours: str, **more: Any) -> tuple[list[RequestOutput], Trace]:
    """A request, and its trace."""
    request = Request("req")
    token = current.set(request)
    try:
        return generate(make, pipeline, *colours, **more), request.trace
    finally:
        current.reset(token)


def texts(outputs: list[RequestOutput]) -> list[str]:
    """What a client of one choice sees."""
    return [output.outputs[0].text for output in outputs]


def given_back(pipeline: FakePipeline) -> list[Any]:
    """The blocks that were released."""
    names = [name for name, _ in pipeline.released()]
    assert len(set(names)) == len(names) and all(name.startswith("release-") for name in names)
    return [kv_transfer_params["remote_block_ids"] for _, kv_transfer_params in pipeline.released()]


def pixels(request: StageRequest) -> list[bool]:
    return ["pixel_values" in item.data for item in request.prompt.items]


def blocks(request: StageRequest) -> Any:
    return request.params.extra_args["kv_transfer_params"]["remote_block_ids"]


WHOLE = RequestOutputKind.FINAL_ONLY
streamed_or_whole = pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, WHOLE], ids=["streamed", "whole"])

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
    assert pipeline.log == ["encode", "encode", "encode", "prefill", "decode"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("decode"):
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
    assert pipeline.log == ["encode", "encode", "prefill", "decode"]
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("decode"):
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
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9, "decode": [DECODE_GONE] * 9})
    with pytest.raises(GracefulHTTPError) as caught:
        generate(make_client, pipeline, "red")
    assert str(caught.value) == str(DECODE_GONE)
    assert pipeline.log == ["encode", "prefill", "prefill", "decode"]


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
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise error
        yield Step(A)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(kind) as caught:
        generate(once(make_client), pipeline, "red")
    assert given_back(pipeline) == [[1]]
    assert status is None or caught.value.http_status == status  # type: ignore[attr-defined]


def test_decode_that_fails_after_its_first_token_has_pulled_the_blocks(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A)
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError, match="is gone"):
        generate(once(make_client), pipeline, "red")
    assert pipeline.released() == []
    assert pipeline.log == ["encode", "prefill", "decode"]


def test_call_that_ends_without_tokens_is_an_error(make_client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        return
        yield Step(A)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError, match="sent 0 tokens of an answer, and not all of them came"):
        generate(once(make_client), pipeline)
    assert given_back(pipeline) == [[1]]


def test_failing_release_changes_nothing(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise BadRequest("no")
        yield Step(A)

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        raise StageUnavailable(Stage.DECODE, "is gone")

    pipeline = FakePipeline(steps=steps, release=release)
    with pytest.raises(VLLMValidationError):
        generate(make_client, pipeline)
    assert len(pipeline.released()) == 1


def test_release_runs_outside_the_context_of_the_request(make_client: Make) -> None:
    """Serve would cancel it with the request that it cleans up after."""
    seen: list[Trace | None] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        raise BadRequest("no")
        yield Step(A)

    async def release(request_id: str, kv: dict[str, Any], version: Any) -> None:
        seen.append(current.get())

    token = current.set(Request("req"))
    try:
        with pytest.raises(VLLMValidationError):
            generate(make_client, FakePipeline(steps=steps, release=release))
    finally:
        current.reset(token)
    assert seen == [None]


def test_failing_choice_ends_the_others_and_gives_their_blocks_back(make_client: Make) -> None:
    both = asyncio.Barrier(2)
    closed: list[int] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        (block,) = request.params.extra_args["kv_transfer_params"]["remote_block_ids"]
        try:
            await both.wait()
            if block == 1:
                raise StageUnavailable(Stage.DECODE, "is gone")
            await asyncio.Event().wait()
            yield Step(A)
        finally:
            closed.append(block)

    pipeline = FakePipeline(steps=steps)
    with pytest.raises(GracefulHTTPError):
        generate(once(make_client), pipeline, n=2)
    assert sorted(closed) == [1, 2]
    assert sorted(given_back(pipeline)) == [[1], [2]]


# ---- the ladder: a choice is tried again


def test_lost_prefill_is_made_again_and_the_client_sees_nothing_of_it(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "prefill", "prefill", "decode"]  # its item is encoded already
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
    assert pipeline.log == ["encode"] * (not without) + ["prefill", "prefill", "decode"]
    assert record.rungs == ["prefill-again", "prefill-again", "prefill-at-decode(failed)"]
    (decode,) = pipeline.decoder.requests("decode")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [bool(without)]
    assert (pipeline.released(), record.error) == ([], None)


@pytest.mark.parametrize("error", [DECODE_GONE, DECODE_LOST], ids=lambda error: type(error).__name__)
def test_decode_lost_before_its_first_token_gives_the_blocks_back_and_begins_again(
    make_client: Make, error: Exception
) -> None:
    pipeline = FakePipeline(fails={"decode": [error]})
    outputs, record = traced(make_client, pipeline)
    assert texts(outputs) == ["a", "b"]
    assert [output.finished for output in outputs] == [False, True]
    assert given_back(pipeline) == [[1]]
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2]]
    assert sorted(pipeline.log) == ["decode", "decode", "prefill", "prefill", "release"]
    assert record.rungs == ["decode-again"]
    assert (record.output_tokens, record.error) == (2, None)


@pytest.mark.parametrize("without", [(), (Stage.ENCODER,)])
def test_prompt_whose_blocks_were_lost_twice_is_prefilled_by_decode(
    make_client: Make, without: tuple[Stage, ...]
) -> None:
    """Where no blocks get across at all, answers still do: a network between two nodes that UCX cannot use."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST, DECODE_LOST]})
    outputs, record = traced(make_client, pipeline, "red")
    assert texts(outputs) == ["a", "b"]
    assert record.rungs == ["decode-again", "decode-again", "prefill-at-decode(failed)"]
    *_, decode = pipeline.decoder.requests("decode")
    assert "kv_transfer_params" not in (decode.params.extra_args or {})
    assert pixels(decode) == [True]
    assert len(pipeline.prefiller.requests("prefill")) == len(pipeline.released()) == 2


STRUCTURE = {"structured_outputs": StructuredOutputsParams(regex="a+")}


SAYS = "h\u00e9llo \U0001f389 \u4e16\u754c"
"""Characters of two, three and four tokens too."""


class BreaksOff:
    """A decode that says ``SAYS``, a token per step, and breaks off after each ``said`` of them."""

    def __init__(self, said: int = 1, times: int = 1) -> None:
        self.said, self.times = said, times
        self.calls: list[StageRequest] = []

    def speak_as(self, client: EPDClient) -> EPDClient:
        self.tokens = client.renderer.get_tokenizer().encode(SAYS)
        return client

    async def __call__(self, request: StageRequest) -> AsyncIterator[Step]:
        self.calls.append(request)
        prompt = self.calls[0].prompt.token_ids
        before = len(request.prompt.token_ids) - len(prompt)
        assert request.prompt.token_ids == prompt + self.tokens[:before]
        for count, token in enumerate(self.tokens[before:], 1):
            more: dict[str, Any] = {}
            if count == 1:
                more["prefill_stats"] = PrefillStats(num_cached_tokens=before)
            if request.params.num_logprobs is not None:
                more["new_logprobs"] = logprobs_of(token)
            yield Step([token], "length" if before + count == len(self.tokens) else None, more=more)
            if count == self.said and len(self.calls) <= self.times:
                raise DECODE_GONE


def logprobs_of(*tokens: int) -> LogprobsLists:
    """Of tokens that were sampled, and each time of one that was likely too."""
    pairs = [[token, token + 1] for token in tokens]
    logprobs = [[-0.5, -1.0 - token] for token in tokens]
    return LogprobsLists(np.array(pairs), np.array(logprobs), np.ones(len(tokens), dtype=int))


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
@streamed_or_whole
def test_answer_that_breaks_off_goes_on_where_it_was(
    make_client: Make, without: tuple[Stage, ...], kind: RequestOutputKind
) -> None:
    async def main() -> None:
        decode, request = BreaksOff(said=2, times=2), Request("req")
        pipeline = FakePipeline(without, steps=decode)
        client = decode.speak_as(make_client(pipeline.stages))
        length = len(decode.tokens)
        token = current.set(request)
        outputs = await run(client, "red", max_tokens=length, min_tokens=3, prompt_logprobs=1, output_kind=kind)
        current.reset(token)
        await background(client)
        said = [token for output in outputs for token in output.outputs[0].token_ids]
        assert ("".join(texts(outputs)), said) == (SAYS, decode.tokens)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        asked = [(call.params.max_tokens, call.params.min_tokens) for call in decode.calls]
        assert asked == [(length, 3), (length - 2, 1), (length - 4, 0)]
        prefills = decode.calls if Stage.PREFILL in without else pipeline.prefiller.requests("prefill")
        assert [call.params.prompt_logprobs for call in prefills] == [1, None, None]
        assert {output.num_cached_tokens for output in outputs} == {request.trace.cached_tokens}, (
            "of the client's own prompt"
        )
        assert request.trace.cached_tokens == (0 if Stage.PREFILL in without else 3)
        assert (request.trace.rungs, request.trace.output_tokens) == (["decode-again"] * 2, length)
        assert pipeline.released() == []

    asyncio.run(main())


@pytest.mark.parametrize("said", range(1, 17))
def test_text_is_whole_wherever_the_answer_breaks_off(make_client: Make, said: int) -> None:
    """Within a character too: the next engine then takes the first bytes of it for the end of its prompt."""

    async def main() -> None:
        decode = BreaksOff(said)
        client = decode.speak_as(make_client(FakePipeline(steps=decode).stages))
        assert "".join(texts(await run(client, max_tokens=99))) == SAYS
        assert said < len(decode.tokens) and len(decode.calls) == 2

    asyncio.run(main())


def test_answer_that_goes_on_has_a_deadline_of_its_own(make_client: Make) -> None:
    async def main() -> None:
        decode, late = BreaksOff(), asyncio.Event()

        async def slow(request: StageRequest) -> AsyncIterator[Step]:
            async for each in decode(request):
                yield each
                await late.wait()

        client = decode.speak_as(make_client(FakePipeline(steps=slow).stages, timeouts={"request_s": 0.2}))
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
        client = decode.speak_as(make_client(FakePipeline(steps=decode, prefill=prefill).stages))
        assert "".join(texts(await run(client, max_tokens=99))) == SAYS
        assert prefills == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 7},
        {"bad_words": ["x"]},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        STRUCTURE,
        {"extra_args": {"mine": 1}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_answer_whose_tokens_do_not_tell_all_ends_where_it_breaks_off(make_client: Make, more: dict[str, Any]) -> None:
    seen: list[str] = []

    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(steps=decode).stages))
        prompt = await render(client, "red")
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            async for output in client.generate(prompt, params(**more), "req"):
                seen.append(output.outputs[0].text)
        assert len(decode.calls) == 1
        await background(client)

    asyncio.run(main())
    assert seen == ["h"]


class Said(NamedTuple):
    """All outputs of one choice together."""

    text: str
    token_ids: list[int]
    logprobs: list[Any]
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


def together(outputs: list[RequestOutput]) -> Said:
    choices = [output.outputs[0] for output in outputs]
    token_ids = [token for choice in choices for token in choice.token_ids]
    logprobs = [position for choice in choices for position in choice.logprobs or ()]
    last = choices[-1]
    return Said(
        "".join(texts(outputs)), token_ids, logprobs, last.cumulative_logprob, last.finish_reason, last.stop_reason
    )


def spoken(make: Make, decode: BreaksOff, **more: Any) -> Said:
    """What a client hears of it."""

    async def main() -> Said:
        client = decode.speak_as(make(FakePipeline(steps=decode).stages))
        outputs = await run(client, **{"max_tokens": 99} | more)
        await background(client)
        return together(outputs)

    return asyncio.run(main())


@streamed_or_whole
@pytest.mark.parametrize("said", range(1, 5))
@pytest.mark.parametrize(
    ("more", "text", "stop"),
    [
        ({"stop": ["llo"]}, "h\u00e9", "llo"),
        ({"stop": ["llo"], "include_stop_str_in_output": True}, "h\u00e9llo", "llo"),
        ({"stop": ["llo", "\U0001f389"], "min_tokens": 6}, "h\u00e9llo ", "\U0001f389"),
    ],
    ids=["without", "with", "later"],
)
def test_stop_string_ends_an_answer_that_went_on_within_it_or_before(
    make_client: Make, said: int, more: dict[str, Any], text: str, stop: str, kind: RequestOutputKind
) -> None:
    decode = BreaksOff(said)
    answer = spoken(make_client, decode, output_kind=kind, **more)
    assert len(decode.calls) == 2
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text, "stop", stop)
    assert answer == spoken(make_client, BreaksOff(times=0), output_kind=kind, **more)


def test_decode_can_be_asked_for_an_answer_with_stop_strings(make_client: Make) -> None:
    """Their end is told here: vLLM's parameters with both these and no text cannot be made anew, as a handle does."""
    pipeline = FakePipeline()
    generate(make_client, pipeline, stop=["x"])
    (call,) = pipeline.decoder.requests("decode")
    assert not pickle.loads(pickle.dumps(call)).params.detokenize


@streamed_or_whole
@pytest.mark.parametrize("said", [1, 2, 9])
@pytest.mark.parametrize(
    "more",
    [{}, {"flat_logprobs": True}, {"logprobs": None, "logprob_token_ids": [1]}],
    ids=["of the likeliest", "flat", "of given tokens"],
)
def test_logprobs_of_an_answer_that_goes_on_are_all_there(
    make_client: Make, said: int, more: dict[str, Any], kind: RequestOutputKind
) -> None:
    decode = BreaksOff(said, times=2)
    asked = {"logprobs": 1, "output_kind": kind} | more
    answer = spoken(make_client, decode, **asked)
    assert len(decode.calls) == (3 if 2 * said < len(decode.tokens) else 2)
    assert [
        (token, position[token].logprob) for token, position in zip(answer.token_ids, answer.logprobs, strict=True)
    ] == [(token, -0.5) for token in decode.tokens]
    assert answer.cumulative_logprob == -0.5 * len(decode.tokens)
    assert answer == spoken(make_client, BreaksOff(times=0), **asked)


@pytest.mark.parametrize("of", ["marks", "processors"])
def test_answer_goes_on_only_where_its_engines_look_at_the_prompt_too(make_client: Make, of: str) -> None:
    async def main() -> None:
        decode = BreaksOff()
        given: dict[str, Any] = (
            {"decode": {"engine_args": {"logits_processors": ["a:B"]}}} if of == "processors" else {}
        )
        pipeline = FakePipeline(steps=decode)
        client = decode.speak_as(make_client(pipeline.stages, **given))
        if of == "marks":
            vllm_config = copy.copy(client.vllm_config)
            vllm_config.watermark_config = object()  # type: ignore[assignment]
            client = assemble(client._config, vllm_config, client.pipeline.stages).client
            pipeline.decodes.answers = client.pipeline.answers
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client)
        assert len(decode.calls) == 1

    asyncio.run(main())


@streamed_or_whole
def test_answer_whose_replica_goes_after_its_last_word_is_whole(make_client: Make, kind: RequestOutputKind) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A)
        yield Step(B, "length")
        raise DECODE_GONE

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    assert (record.rungs, record.error, len(pipeline.decoder.requests("decode"))) == ([], None, 1)


@streamed_or_whole
def test_all_answers_of_a_lost_replica_go_on(make_client: Make, kind: RequestOutputKind) -> None:
    """More of them than the budget of retries has: they are no more work than there was."""

    async def main() -> None:
        decodes = {f"req{index}": BreaksOff(said=2) for index in range(40)}
        all_said = asyncio.Barrier(len(decodes))

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            decode, said = decodes[request.request_id.rpartition("-")[0]], 0
            async for each in decode(request):
                yield each
                said += 1
                if len(decode.calls) == 1 and said == decode.said:
                    await all_said.wait()

        client = make_client(FakePipeline(steps=steps).stages)
        prompt = await render(client)

        async def one(request_id: str) -> None:
            decodes[request_id].speak_as(client)
            asked = params(max_tokens=99, output_kind=kind)
            outputs = [output async for output in client.generate(prompt, asked, request_id)]
            assert "".join(texts(outputs)) == SAYS

        await asyncio.gather(*map(one, decodes))

    asyncio.run(main())


@streamed_or_whole
def test_answer_that_goes_on_costs_no_retry(make_client: Make, kind: RequestOutputKind) -> None:
    """Even where its first token is all that there is of it."""

    async def main() -> None:
        decode = BreaksOff(said=1)
        retry = {"ratio": 0, "floor_per_s": 0, "backoff_s": 0}  # one, and never another
        client = decode.speak_as(make_client(FakePipeline(steps=decode).stages, advanced={"retry": retry}))
        for _ in range(3):
            decode.calls.clear()
            assert "".join(texts(await run(client, max_tokens=99, output_kind=kind))) == SAYS
            first, rest = decode.calls
            assert rest.prompt.token_ids == first.prompt.token_ids + decode.tokens[:1]

    asyncio.run(main())


def test_request_that_two_engines_died_of_is_not_given_to_a_third(make_client: Make) -> None:
    dead = EngineDead(Stage.DECODE, "failed: its engine is dead")
    pipeline = FakePipeline(fails={"decode": [dead] * 9})
    with pytest.raises(GracefulHTTPError, match="engine is dead"):
        generate(make_client, pipeline)
    assert len(pipeline.decoder.requests("decode")) == 2


def test_greedy_answer_with_a_seed_goes_on(make_client: Make) -> None:
    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(steps=decode).stages))
        assert "".join(texts(await run(client, max_tokens=99, seed=7, temperature=0))) == SAYS

    asyncio.run(main())


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_that_decode_alone_gives_up_is_the_clients_mistake(make_client: Make, without: Any) -> None:
    """vLLM ends a request whose grammar does not compile as it ends one whose blocks or embeddings are lost."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST] * 9})
    with pytest.raises(VLLMValidationError, match="grammar"):
        generate(make_client, pipeline, "red", **STRUCTURE)
    assert pipeline.log.count("decode") == 2


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
def test_structure_is_not_blamed_for_what_decode_did_not_find(make_client: Make, without: Any) -> None:
    """Decode then has nothing to find: the items have their pixels, and no blocks are to be pulled."""
    pipeline = FakePipeline(without, fails={"decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red", **STRUCTURE)) == ["a", "b"]
    ((alone,),) = [args for method, args in pipeline.decoder.calls if method == "decode"][1:]
    assert pixels(alone) == [True]
    assert shaping.pulled_blocks(alone.params) is None and "ec_transfer_params" not in (alone.params.extra_args or {})


def test_items_whose_embeddings_were_lost_are_encoded_again(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill", "encode", "encode", "prefill", "decode"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[False, False]] * 2
    assert record.rungs == ["prefill-again"]


def test_decode_that_prefills_asks_for_lost_embeddings_again(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.PREFILL,), fails={"decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert pipeline.log == ["encode", "decode", "encode", "decode"]


def test_lost_items_are_encoded_again_for_the_next_request_too(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST]})
        client = make_client(pipeline.stages, advanced={"retry": {"attempts": 1}})
        with pytest.raises(GracefulHTTPError):
            await run(client, "red")
        await run(client, "red")
        await run(client, "red")
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "encode", "prefill", "decode", "prefill", "decode"]


def test_embeddings_lost_twice_are_made_by_prefill(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"prefill": [PREFILL_LOST, PREFILL_LOST]})
    outputs, record = traced(make_client, pipeline, "red", "blue")
    assert texts(outputs) == ["a", "b"]
    assert pipeline.log == ["encode", "encode", "prefill"] * 2 + ["prefill", "decode"]
    *_, third = pipeline.prefiller.requests("prefill")
    (decode,) = pipeline.decoder.requests("decode")
    for call in (third, decode):
        assert pixels(call) == [True, True]
        assert "ec_transfer_params" not in call.params.extra_args
    assert record.rungs == ["prefill-again", "prefill-again"]


def test_pipeline_without_an_encoder_climbs_the_same_ladder(make_client: Make) -> None:
    pipeline = FakePipeline((Stage.ENCODER,), fails={"prefill": [PREFILL_GONE], "decode": [DECODE_LOST]})
    assert texts(generate(make_client, pipeline, "red")) == ["a", "b"]
    assert [pixels(call) for call in pipeline.prefiller.requests("prefill")] == [[True]] * 2
    assert given_back(pipeline) == [[1]]


def test_hand_off_is_never_used_twice(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE, DECODE_LOST]})
    generate(make_client, pipeline, "red")
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2], [3]]
    assert given_back(pipeline) == [[1], [2]]


def test_hand_off_that_outwaits_its_lease_is_prefilled_again(make_client: Make) -> None:
    calls = 0

    async def prefill(request: StageRequest) -> PrefillReply:
        return PrefillReply(
            {"remote_request_id": f"hand-off {len(pipeline.prefiller.requests('prefill'))}"}, None, 3, "p"
        )

    async def renew(waiting: list[str]) -> list[set[str]]:
        return [{"hand-off 1"}]

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal calls
        calls += 1
        if calls == 1:  # as one that waits for a place in Serve's router
            await asyncio.Event().wait()
        yield Step(A, "length")

    pipeline = FakePipeline(prefill=prefill, steps=steps, renew=renew)

    def make(stages: Any) -> EPDClient:
        client = make_client(stages)
        assert client.pipeline._leases is not None
        client.pipeline._leases.after_s, client.pipeline._leases.every_s = 0.0, 0.01
        return client

    outputs, record = traced(make, pipeline)
    assert texts(outputs) == ["a"]
    assert record.rungs == ["decode-again"]
    taken = [shaping.hand_off_id(shaping.pulled_blocks(call.params)) for call in pipeline.decoder.requests("decode")]
    assert taken == ["hand-off 1", "hand-off 2"]


def test_decode_waits_no_longer_for_blocks_than_their_node_lives(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red")
    assert pipeline.decoder.sources == ["node-0"]


@pytest.mark.parametrize("attempts", [1, 3, 4])
def test_request_is_tried_so_many_times_and_then_fails_as_it_did(make_client: Make, attempts: int) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE] * 9})
    make = functools.partial(make_client, advanced={"retry": {"attempts": attempts, "backoff_s": 0}})
    with pytest.raises(GracefulHTTPError, match="The decode stage is gone") as caught:
        generate(make, pipeline, "red")
    assert caught.value.http_status == 503
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[i + 1] for i in range(attempts)]
    assert given_back(pipeline) == [[i + 1] for i in range(attempts)]


def test_requests_share_a_budget_of_retries(make_client: Make) -> None:
    async def main() -> list[int]:
        pipeline = FakePipeline(fails={"prefill": [PREFILL_GONE] * 9})
        client = make_client(
            pipeline.stages, advanced={"retry": {"attempts": 9, "ratio": 0.5, "floor_per_s": 0, "backoff_s": 0}}
        )
        prefills = []
        for _ in range(3):
            before = len(pipeline.prefiller.calls)
            with pytest.raises(GracefulHTTPError, match="is gone"):
                await run(client)
            prefills.append(len(pipeline.prefiller.calls) - before)
        return prefills

    assert asyncio.run(main()) == [2, 1, 2]  # one retry at first, and one more for two requests


def test_lost_choice_is_tried_again_by_itself(make_client: Make) -> None:
    pipeline = FakePipeline(fails={"decode": [DECODE_GONE]})
    outputs, record = traced(make_client, pipeline, "red", n=2, seed=7)
    said = dict.fromkeys(range(2), "")
    for choice in (choice for output in outputs for choice in output.outputs):
        said[choice.index] += choice.text
    assert said == {0: "ab", 1: "ab"}
    assert outputs[-1].finished
    decodes = pipeline.decoder.requests("decode")
    assert sorted(blocks(call) for call in decodes) == [[1], [2], [3]]
    failed, *others = decodes
    assert given_back(pipeline) == [blocks(failed)]
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
        client = make_client(pipeline.stages, timeouts={"request_s": 0.5}, advanced={"retry": retry})
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
        client = make_client(pipeline.stages, timeouts={"request_s": 0.1})
        client.pipeline.retries = Retries(RetryConfig(), lambda low, high: 60.0)
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
        current.set(Request("req", timeout_s=of_the_client))
        client = make_client(FakePipeline(prefill=hang).stages, timeouts={"request_s": of_the_server})
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
        current.set(Request("req", began=time.perf_counter() - 2, timeout_s=2.1))
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


async def two_ways(request: StageRequest) -> AsyncIterator[Step]:
    yield Step([5], "length", more={"new_logprobs": logprobs_of(5)})


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,)], ids=["E+P+D", "E+PD"])
def test_each_step_of_a_beam_search_has_a_deadline_of_its_own(make_client: Make, without: tuple[Stage, ...]) -> None:
    async def main() -> None:
        current.set(asked := Request("req"))

        async def slow(request: StageRequest) -> AsyncIterator[Step]:
            asked.began -= 200  # so many seconds pass
            async for each in two_ways(request):
                yield each

        pipeline = FakePipeline(without, steps=slow)
        output = await Beams(make_client(pipeline.stages, timeouts={"request_s": 300})).search("red", steps=5)
        assert [len(beam.token_ids) for beam in output.outputs] == [5, 5]
        assert len(pipeline.decoder.requests("decode")) == 1 + 4 * 2

    asyncio.run(main())


def test_step_of_a_beam_search_that_makes_no_progress_is_a_504(make_client: Make) -> None:
    async def main() -> None:
        current.set(Request("req"))
        steps = 0

        async def hangs(request: StageRequest) -> AsyncIterator[Step]:
            nonlocal steps
            steps += 1
            if steps > 3:
                await asyncio.Event().wait()
            async for each in two_ways(request):
                yield each

        stages = FakePipeline(steps=hangs).stages
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.3 s") as caught:
            await Beams(make_client(stages, timeouts={"request_s": 0.3})).search(steps=5)
        assert caught.value.http_status == 504

    asyncio.run(main())


@pytest.mark.parametrize("slow", ["encode", "prefill", "decode"])
def test_stage_that_does_not_answer_in_time_is_a_504(make_client: Make, slow: str) -> None:
    cancelled: list[str] = []

    async def hang(request: StageRequest) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(slow)

    async def hang_streaming(request: StageRequest) -> AsyncIterator[Step]:
        yield await hang(request)

    async def main() -> FakePipeline:
        pipeline = FakePipeline(**{"steps": hang_streaming} if slow == "decode" else {slow: hang})
        client = make_client(pipeline.stages, timeouts={"request_s": 0.2})
        with pytest.raises(GracefulHTTPError, match=r"did not answer within 0\.2 s") as caught:
            await run(client, "red")
        assert caught.value.http_status == 504
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert cancelled == [slow]
    assert pipeline.log[-1] == ("release" if slow == "decode" else slow)


def test_answer_that_is_whole_in_the_moment_of_its_deadline_is_one(make_client: Make) -> None:
    def be_busy(until: float) -> None:
        """The event loop then gets to all that is due, in its order."""
        while asyncio.get_running_loop().time() < until:
            pass

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, now = pipeline.decodes.answers, request.request_id, asyncio.get_running_loop().time()
        assert answers is not None
        frame = Frame([Step(A, "length").output(key)], [First(key, "decode-0")])
        asyncio.get_running_loop().call_at(now + 1, answers.received, FakeLink("decode-0"), frame)
        be_busy(now + 1.1)
        return DecodeReply("decode-0", 1)

    async def main() -> None:
        client = make_client(pipeline.stages, timeouts={"request_s": 0.9})
        prompt = await render(client)
        current.set(request := Request("req"))
        outputs = [output async for output in client.generate(prompt, params(), "req")]
        assert (texts(outputs), request.trace.rungs, request.error) == (["a"], [], None)

    pipeline = FakePipeline(decode=decode)
    asyncio.run(main())


@pytest.mark.parametrize(("kind", "expected"), [("DELTA", ["a", "b"]), ("FINAL_ONLY", ["ab"])])
def test_deadline_is_only_for_the_first_token(make_client: Make, kind: str, expected: list[str]) -> None:
    """Not for an answer that is not streamed, which would have to be whole by then."""

    async def main() -> list[RequestOutput]:
        over = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            yield Step(A)
            await over.wait()
            yield Step(B, "length")

        client = make_client(FakePipeline(steps=steps).stages, timeouts={"request_s": 0.2})
        asyncio.get_running_loop().call_later(0.3, over.set)
        return await run(client, output_kind=RequestOutputKind[kind])

    assert texts(asyncio.run(main())) == expected


def test_answer_that_is_not_streamed_is_made_anew_where_it_cannot_go_on(make_client: Make) -> None:
    attempts = 0

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal attempts
        attempts += 1
        yield Step(A, more={"new_logprobs": logprobs_of(*A)})
        if attempts == 1:
            raise DECODE_GONE
        yield Step(B, "length", more={"new_logprobs": logprobs_of(*B)})

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, output_kind=WHOLE, seed=7, logprobs=1)
    answer = together(outputs)
    assert (answer.text, len(answer.logprobs), answer.cumulative_logprob) == ("ab", 2, -1.0)
    assert (record.rungs, record.output_tokens, record.cached_tokens) == (["decode-again"], 2, 3)
    first, second = pipeline.decoder.requests("decode")
    assert first.prompt == second.prompt


def test_answer_is_not_made_anew_after_its_deadline(make_client: Make) -> None:
    async def main() -> None:
        over = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            yield Step(A)
            await over.wait()
            raise DECODE_GONE

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages, timeouts={"request_s": 0.5})
        asyncio.get_running_loop().call_later(0.8, over.set)
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client, output_kind=WHOLE, seed=7)
        assert pipeline.log.count("decode") == 1

    asyncio.run(main())


def test_tokens_of_an_answer_that_nobody_got_are_not_counted(make_client: Make) -> None:
    async def main() -> None:
        current.set(request := Request("req"))
        decode = BreaksOff(said=2)
        client = decode.speak_as(once(make_client)(FakePipeline(steps=decode).stages))
        with pytest.raises(GracefulHTTPError, match=str(DECODE_GONE)):
            await run(client, output_kind=WHOLE)
        assert request.trace.output_tokens == 0

    asyncio.run(main())


# ---- the channel, by which tokens come, and the call, which says when it has ended


@streamed_or_whole
def test_answer_goes_on_elsewhere_where_the_channel_of_its_replica_breaks(
    make_client: Make, kind: RequestOutputKind
) -> None:
    ended: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        if len(pipeline.decoder.requests("decode")) > 1:
            yield Step(B, "length", replica="decode-1")
            return
        yield Step(A)
        assert pipeline.decodes.answers is not None
        pipeline.decodes.answers.lost(pipeline.decodes.links["decode-0"])  # type: ignore[arg-type]
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.request_id)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    first, rest = pipeline.decoder.requests("decode")
    assert rest.prompt.token_ids == first.prompt.token_ids + A
    assert ended == [first.request_id]
    assert record.rungs == ["decode-again"]
    assert record.replicas["decode"] == ["decode-0", "decode-1"]
    assert pipeline.released() == []


def test_channel_that_breaks_is_no_matter_to_answers_of_other_replicas(make_client: Make) -> None:
    both, broken = asyncio.Barrier(2), asyncio.Event()

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        again = len(pipeline.decoder.requests("decode")) > 2
        (number,) = blocks(request)
        yield Step(B if again else A, "length" if again else None, replica=f"decode-{number}")
        if again:
            return
        await both.wait()
        if number == 1:
            assert pipeline.decodes.answers is not None
            pipeline.decodes.answers.lost(pipeline.decodes.links["decode-1"])  # type: ignore[arg-type]
            broken.set()
            await asyncio.Event().wait()
        await broken.wait()
        yield Step(B, "length", replica=f"decode-{number}")

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, n=2, output_kind=WHOLE)
    assert [choice.text for choice in outputs[-1].outputs] == ["ab", "ab"]
    assert [blocks(call) for call in pipeline.decoder.requests("decode")] == [[1], [2], [3]]
    assert record.rungs == ["decode-again"]


def test_last_tokens_may_come_after_the_end_of_their_call(make_client: Make) -> None:
    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, link = pipeline.decodes.answers, request.request_id, FakeLink("decode-0")
        assert answers is not None
        answers.received(link, Frame([Step(A).output(key)], [First(key, "decode-0")]))  # type: ignore[arg-type]
        last = Frame([Step(B, "length").output(key)])
        asyncio.get_running_loop().call_later(0.05, answers.received, link, last)
        return DecodeReply("decode-0", 2)

    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline)
    assert "".join(texts(outputs)) == "ab"
    assert (record.rungs, pipeline.log.count("decode")) == ([], 1)


def test_answer_whose_last_tokens_never_come_goes_on(make_client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        again = len(pipeline.decoder.requests("decode")) > 1
        yield Step(B if again else A, "length" if again else None)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline)
    assert "".join(texts(outputs)) == "ab"
    first, rest = pipeline.decoder.requests("decode")
    assert rest.prompt.token_ids == first.prompt.token_ids + A
    assert record.rungs == ["decode-again"]


def test_call_that_does_not_end_after_its_last_token_is_ended(
    make_client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.ingress.pipeline.JOIN_S", 0.01)
    ended: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        yield Step(A, "length")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.request_id)

    pipeline = FakePipeline(steps=steps)
    assert texts(generate(make_client, pipeline)) == ["a"]
    assert ended == [call.request_id for call in pipeline.decoder.requests("decode")]


@streamed_or_whole
def test_call_that_serve_sends_twice_is_one_answer(
    make_client: Make, monkeypatch: pytest.MonkeyPatch, kind: RequestOutputKind
) -> None:
    """That of whichever replica was heard first. The other one is told to make no more, and its end is no end."""
    monkeypatch.setattr("serve_app.ingress.answers.JOIN_S", 0.01)
    one, other = FakeLink("decode-0"), FakeLink("decode-1")

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key = pipeline.decodes.answers, request.request_id
        assert answers is not None

        def came(link: FakeLink, step: Step, *firsts: First) -> None:
            answers.received(link, Frame([step.output(key)], list(firsts)))  # type: ignore[arg-type]

        came(one, Step(A), First(key, "decode-0"))
        came(other, Step([1]), First(key, "decode-1"))
        came(other, Step([2], "length"))
        asyncio.get_running_loop().call_later(0.1, came, one, Step(B, "length"))
        return DecodeReply("decode-1", 2)

    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline, output_kind=kind)
    assert "".join(texts(outputs)) == "ab"
    (call,) = pipeline.decoder.requests("decode")
    assert (one.aborted, other.aborted) == ([], [call.request_id])
    assert (record.replicas["decode"], record.output_tokens, record.rungs) == (["decode-0"], 2, [])


@streamed_or_whole
def test_decode_is_told_to_end_an_answer_at_its_stop_string(make_client: Make, kind: RequestOutputKind) -> None:
    made = 0

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        nonlocal made
        while True:
            made += 1
            yield Step(A if made < 3 else B)

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline, stop=["ab"], output_kind=kind)
    answer = together(outputs)
    assert (answer.text, answer.token_ids) == ("a", [*A, *A, *B])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "ab")
    (call,) = pipeline.decoder.requests("decode")
    assert pipeline.decodes.links["decode-0"].aborted == [call.request_id]
    assert (made, record.output_tokens, record.rungs) == (3, 3, [])


@pytest.mark.parametrize("come", ["in one output", "in one frame", "in several frames"])
def test_tokens_that_came_with_those_of_a_stop_string_and_after_it_are_dropped(make_client: Make, come: str) -> None:
    """Outputs with logprobs are not added up (``tap.add``): there may be several of a request in a frame."""

    async def decode(request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        answers, key, link = pipeline.decodes.answers, request.request_id, FakeLink("decode-0")
        assert answers is not None
        firsts = [First(key, "decode-0")]
        if come == "in one output":
            outputs = [Step(tokens, more={"new_logprobs": logprobs_of(*tokens)}).output(key)]
        else:
            outputs = [Step([token], more={"new_logprobs": logprobs_of(token)}).output(key) for token in tokens]
        for frame in [[output] for output in outputs] if come == "in several frames" else [outputs]:
            answers.received(link, Frame(frame, firsts))  # type: ignore[arg-type]
            firsts = []
        return DecodeReply("decode-0", len(tokens))

    tokens = [*A, *B, *A, *A]
    pipeline = FakePipeline(decode=decode)
    outputs, record = traced(make_client, pipeline, stop=["b"], logprobs=1)
    answer = together(outputs)
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("a", [*A, *B], "b")
    assert (len(answer.logprobs), answer.cumulative_logprob) == (2, -1.0)
    assert record.output_tokens == 2


def test_what_comes_of_a_call_that_failed_does_not_get_among_the_rest(make_client: Make) -> None:
    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        first, *rest = pipeline.decoder.requests("decode")
        if rest:
            answers = pipeline.decodes.answers
            assert answers is not None
            late = Frame([Step([1], "length").output(first.request_id)])
            answers.received(pipeline.decodes.links["decode-0"], late)  # type: ignore[arg-type]
            yield Step(B)
            answers.received(pipeline.decodes.links["decode-0"], late)  # type: ignore[arg-type]
            yield Step(A, "length")
            return
        yield Step(A)
        raise DECODE_GONE

    pipeline = FakePipeline(steps=steps)
    outputs, record = traced(make_client, pipeline)
    assert ("".join(texts(outputs)), record.output_tokens) == ("aba", 3)


def test_call_that_was_heard_of_waits_for_no_blocks_any_more(make_client: Make, monkeypatch: Any) -> None:
    calls: list[Call] = []
    sources: list[str] = []

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        for step in (Step(A), Step(B, "length")):
            sources.append(calls[-1].source)
            yield step

    pipeline = FakePipeline(steps=steps)
    stage_call = pipeline.decoder.call

    async def call(method: str, *args: Any, call: Call | None = None) -> Any:
        if call is not None:
            calls.append(call)
        return await stage_call(method, *args, call=call)

    monkeypatch.setattr(pipeline.decoder, "call", call)
    generate(make_client, pipeline)
    assert sources == ["node-0", ""]


# ---- clients that leave


@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_after_a_token_ends_the_streams_and_releases_nothing(make_client: Make, n: int) -> None:
    closed: list[str] = []

    async def main() -> FakePipeline:
        started = asyncio.Barrier(n)

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            try:
                await started.wait()
                yield Step(A)
                await asyncio.Event().wait()
            finally:
                closed.append("decode")

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(n=n), "req")) as stream:
            begun: set[int] = set()
            while len(begun) < n:
                begun |= {choice.index for choice in (await anext(stream)).outputs}
        await background(client)
        return pipeline

    pipeline = asyncio.run(main())
    assert closed == ["decode"] * n
    assert pipeline.released() == []
    asked = [call.request_id for call in pipeline.decoder.requests("decode")]
    assert sorted(pipeline.decodes.links["decode-0"].aborted) == sorted(asked)


async def leave(client: EPDClient, moment: asyncio.Event) -> None:
    """Ask, and go away at ``moment``; returns when what that set off in the background is done."""
    request = asyncio.create_task(run(client, "red"))
    await moment.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await background(client)


@pytest.mark.parametrize("where", ["encode", "prefill", "decode"])
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

        async def hang_streaming(request: StageRequest) -> AsyncIterator[Step]:
            yield await hang(request)

        pipeline = FakePipeline(**{"steps": hang_streaming} if where == "decode" else {where: hang})
        client = make_client(pipeline.stages)
        await leave(client, reached)
        return pipeline

    pipeline = asyncio.run(main())
    assert ended == [where]
    assert given_back(pipeline) == ([[1]] if where == "decode" else [])


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
        while client.pipeline.background:
            await background(client)
        return pipeline

    assert given_back(asyncio.run(main())) == [[1]]


def test_client_that_leaves_between_two_attempts_leaves_nothing_behind(make_client: Make) -> None:
    async def main() -> FakePipeline:
        pausing = asyncio.Event()

        def jitter(low: float, high: float) -> float:
            pausing.set()
            return 60.0

        pipeline = FakePipeline(fails={"decode": [DECODE_GONE]})
        client = make_client(pipeline.stages)
        client.pipeline.retries = Retries(RetryConfig(), jitter)
        await leave(client, pausing)
        return pipeline

    pipeline = asyncio.run(main())
    assert pipeline.log == ["encode", "prefill", "decode", "release"]
    assert given_back(pipeline) == [[1]]


def test_tokens_that_come_after_their_client_left_are_dropped(make_client: Make) -> None:
    """And are not taken for those of another request with the same id."""

    async def main() -> None:
        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            keys.append(request.request_id)
            if len(keys) == 1:
                yield Step(A)
                await asyncio.Event().wait()
            client.pipeline.answers.received(link(), Frame([Step([1], "length").output(keys[0])]))
            yield Step(A)
            client.pipeline.answers.received(link(), Frame([Step([1], "length").output(keys[0])]))
            yield Step(B, "length")

        def link() -> Any:
            return pipeline.decodes.links["decode-0"]

        keys: list[str] = []
        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        prompt = await render(client)
        async with aclosing(client.generate(prompt, params(), "req")) as stream:
            await anext(stream)
        assert link().aborted == keys
        outputs = [output async for output in client.generate(prompt, params(), "req")]
        assert "".join(texts(outputs)) == "ab"
        assert link().aborted == keys[:1]
        await background(client)

    asyncio.run(main())


def test_decode_that_begins_after_its_client_left_is_told_to_end(make_client: Make) -> None:
    async def main() -> None:
        reached = asyncio.Event()

        async def steps(request: StageRequest) -> AsyncIterator[Step]:
            reached.set()
            await asyncio.Event().wait()
            yield Step(A)

        pipeline = FakePipeline(steps=steps)
        client = make_client(pipeline.stages)
        await leave(client, reached)
        ((call,), link) = pipeline.decoder.requests("decode"), FakeLink("decode-0")
        begins = Frame([Step(A).output(call.request_id)], [First(call.request_id, "decode-0")])
        client.pipeline.answers.received(link, begins)  # type: ignore[arg-type]
        assert link.aborted == [call.request_id]

    asyncio.run(main())
