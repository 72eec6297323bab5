"""vLLM's ``RequestOutput`` from the chunks of decode: choices merged as they come, or gathered to the end."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from serve_app import handoff
from serve_app.config import Stage
from serve_app.errors import StageError
from serve_app.handoff import Chunk, PrefillReply, StageRequest


def with_prefill(chunk: Chunk, prefilled: PrefillReply) -> Chunk:
    """The first chunk of a choice with what only prefill knows."""
    return msgspec.structs.replace(
        chunk, prompt_logprobs=prefilled.prompt_logprobs, num_cached_tokens=prefilled.num_cached_tokens
    )


def words_after(tokenizer: Any, request: StageRequest, said: list[int]) -> Callable[[Chunk], Chunk]:
    """Gives the chunks that come after the tokens ``said`` of an answer the text that one engine would have given them.

    The engine that makes them takes these tokens for the end of its prompt, and where they end within a character its
    detokenizer begins with the whole of it.
    """
    prompt, params = request.prompt.token_ids, request.params
    detokenizer = IncrementalDetokenizer.from_new_request(
        tokenizer if params.detokenize else None,
        EngineCoreRequest(request.request_id, prompt, None, params, None, 0.0, None, None, None),
    )
    detokenizer.update(said, stop_terminated=False)
    detokenizer.get_next_output_text(finished=False, delta=True)

    def with_text(chunk: Chunk) -> Chunk:
        detokenizer.update(chunk.token_ids, stop_terminated=chunk.finish_reason == "stop")
        text = detokenizer.get_next_output_text(finished=chunk.finish_reason is not None, delta=True)
        return msgspec.structs.replace(chunk, text=text)

    return with_text


async def merge(sources: list[AsyncGenerator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk]]:
    """Chunks of all choices with their index, as they come. The first failure ends all; so does closing."""
    if len(sources) == 1:
        async with aclosing(sources[0]):
            async for chunk in sources[0]:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

    async def pump(index: int, source: AsyncGenerator[Chunk]) -> None:
        try:
            async with aclosing(source):
                async for chunk in source:
                    queue.put_nowait((index, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case pair:
                    yield pair
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def assemble(
    request: StageRequest, text: str | None, chunks: AsyncGenerator[tuple[int, Chunk]]
) -> AsyncGenerator[RequestOutput]:
    """vLLM's outputs from the chunks of all choices, by the request's output kind as ``ParentRequest`` has it:
    streamed, each chunk as it comes; otherwise one output with all choices at the end."""
    streamed = handoff.is_streamed(request.params)
    unfinished = set(range(request.params.n))
    whole: dict[int, RequestOutput] = {}
    async with aclosing(chunks):
        async for index, chunk in chunks:
            if chunk.finish_reason is not None:
                unfinished.discard(index)
            output = to_output(request, text, index, chunk, finished=not unfinished)
            if streamed:
                yield output
            elif index in whole:
                whole[index].add(output, aggregate=True)
            else:
                whole[index] = output
    if unfinished:
        raise StageError(Stage.DECODE, "ended its stream without a finish reason")
    if not streamed:
        first, *others = (whole[index] for index in sorted(whole))
        for other in others:
            first.add(other, aggregate=False)
        yield first


def to_output(request: StageRequest, text: str | None, index: int, chunk: Chunk, finished: bool) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        prompt=text,
        prompt_token_ids=request.prompt.token_ids,
        prompt_logprobs=chunk.prompt_logprobs,
        outputs=[
            CompletionOutput(
                index=index,
                text=chunk.text,
                token_ids=chunk.token_ids,
                cumulative_logprob=chunk.cumulative_logprob,
                logprobs=chunk.logprobs,
                finish_reason=chunk.finish_reason,
                stop_reason=chunk.stop_reason,
                lora_request=request.options.get("lora_request"),
            )
        ],
        finished=finished,
        num_cached_tokens=chunk.num_cached_tokens,
    )
