"""vLLM's ``RequestOutput`` from the chunks of decode: choices merged as they come, or gathered to the end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from serve_app.config import Stage
from serve_app.errors import StageError
from serve_app.handoff import Chunk, PrefillReply, StageRequest


def with_prefill(chunk: Chunk, prefilled: PrefillReply) -> Chunk:
    """The first chunk of a choice with what only prefill knows."""
    return msgspec.structs.replace(
        chunk, prompt_logprobs=prefilled.prompt_logprobs, num_cached_tokens=prefilled.num_cached_tokens
    )


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
    params = request.params
    last_only = params.output_kind is RequestOutputKind.FINAL_ONLY
    unfinished = set(range(params.n))
    done: dict[int, Chunk] = {}
    async with aclosing(chunks):
        async for index, chunk in chunks:
            if chunk.finish_reason is not None:
                unfinished.discard(index)
            if not last_only:
                yield to_output(request, text, {index: chunk}, finished=not unfinished)
            elif chunk.finish_reason is not None:
                done[index] = chunk
    if unfinished:
        raise StageError(Stage.DECODE, "ended its stream without a finish reason")
    if last_only:
        yield to_output(request, text, dict(sorted(done.items())), finished=True)


def to_output(request: StageRequest, text: str | None, chunks: dict[int, Chunk], finished: bool) -> RequestOutput:
    first = next(iter(chunks.values()))
    return RequestOutput(
        request_id=request.request_id,
        prompt=text,
        prompt_token_ids=request.prompt.token_ids,
        prompt_logprobs=first.prompt_logprobs,
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
            for index, chunk in chunks.items()
        ],
        finished=finished,
        num_cached_tokens=first.num_cached_tokens,
    )
