"""An answer that breaks off resumes from its output tokens, or does not."""

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind

from serve_app.handoff.types import PrefillReply, StageRequest
from serve_app.ingress.assembly import assemble
from serve_app.ingress.request import Request, current
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step
from tests.unit.ingress.pipeline.failing import (
    DECODE_GONE,
    PREFILL_GONE,
    SAYS,
    STRUCTURE,
    BreaksOff,
    spoken,
    streamed_or_whole,
    texts,
    traced,
)
from tests.unit.running import Make, background, generate, params, render, run


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


def test_greedy_answer_with_a_seed_goes_on(make_client: Make) -> None:
    async def main() -> None:
        decode = BreaksOff()
        client = decode.speak_as(make_client(FakePipeline(steps=decode).stages))
        assert "".join(texts(await run(client, max_tokens=99, seed=7, temperature=0))) == SAYS

    asyncio.run(main())
