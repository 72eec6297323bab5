"""The answers of decode, as they come over the channels, on their way into vLLM's ``OutputProcessor``."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder

from serve_app.channel.inlet import Inlet, Link
from serve_app.channel.wire import First, Frame
from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import DecodeReply, PrefillReply
from serve_app.stage import Stage

JOIN_S = 5.0
"""The last tokens and the end of a call come by two ways: how much later than the call they may come."""


@dataclass(eq=False)
class Answer:
    """Of one decode call: part of a choice, or the whole of it."""

    key: str
    """The call's id, by which its outputs come."""
    choice_id: str
    """By which vLLM's OutputProcessor knows the choice."""
    prefilled: PrefillReply | None
    accept: Callable[[First], None]
    """Called before the first tokens are taken; they are not where it raises a ``StageError``."""
    came: Callable[[EngineCoreOutput], None]
    """Called with each output that was taken."""
    heard: bool = False
    """Whether its decode has begun, and so has pulled the blocks of its prefill."""
    link: Link | None = None

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[First] = loop.create_future()
        self.whole: asyncio.Future[None] = loop.create_future()
        """All of it has come."""
        for future in (self.first, self.whole):  # a failure is told once, by whichever is waited for
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def complete(self) -> bool:
        return self.whole.done() and not self.whole.cancelled() and self.whole.exception() is None

    def begin(self, link: Link, first: First) -> None:
        """Raises ``StageError`` where it cannot be taken."""
        self.heard = True
        self.accept(first)
        self.link = link
        if not self.first.done():
            self.first.set_result(first)

    def fail(self, error: Exception) -> None:
        for future in (self.first, self.whole):
            if not future.done():
                future.set_exception(error)

    def ended(self, call: "asyncio.Task[DecodeReply]") -> None:
        """Its call has. Where that failed, so did the answer, unless it was whole."""
        if call.cancelled() or self.whole.done():
            return
        if (error := call.exception()) is not None:
            return self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        reply = call.result()
        if self.link is not None and self.link.replica != reply.replica:
            return  # Ray Serve sent the call twice, and this is the end of the other one
        missing = StageUnavailable(Stage.DECODE, f"sent {reply.tokens} tokens of an answer, and not all of them came")
        asyncio.get_running_loop().call_later(JOIN_S, self.fail, missing)


class Answers:
    """All that are under way at one ingress replica."""

    def __init__(self, processor: OutputProcessor) -> None:
        decoder: Any = MsgpackDecoder(Frame[EngineCoreOutput])
        self._processor = processor
        self._by_key: dict[str, Answer] = {}
        self._by_choice: dict[str, Answer] = {}
        self.inlet: Inlet[EngineCoreOutput] = Inlet(decoder.decode, self.received, self.lost)

    def expect(self, answer: Answer) -> None:
        self._by_key[answer.key] = self._by_choice[answer.choice_id] = answer

    def forget(self, answer: Answer) -> None:
        """What may still come of it is dropped, and decode is told to make no more."""
        del self._by_key[answer.key]
        if self._by_choice.get(answer.choice_id) is answer:
            del self._by_choice[answer.choice_id]
        if answer.link is not None and not answer.complete:
            answer.link.abort([answer.key])

    def received(self, link: Link, frame: Frame[EngineCoreOutput]) -> None:
        """From one decode replica, in the order in which it made them."""
        unwanted = [first.key for first in frame.firsts if not self._begins(link, first)]
        for step in steps(frame.outputs):
            outputs = [output for output in step if self._taken(link, output)]
            processed = self._processor.process_outputs(outputs)
            for output in outputs:
                answer = self._by_choice[output.request_id]
                answer.came(output)
                if output.finish_reason is not None:
                    _done(answer)
            for choice_id in processed.reqs_to_abort:  # a stop string: its engine knows of none
                unwanted.append(self._by_choice[choice_id].key)
                _done(self._by_choice[choice_id])
        if unwanted:
            link.abort(unwanted)

    def lost(self, link: Link) -> None:
        for answer in list(self._by_key.values()):
            if answer.link is link:
                answer.fail(StageUnavailable(Stage.DECODE, "lost the replica that worked on the request"))

    def _begins(self, link: Link, first: First) -> bool:
        """Whether somebody wants the tokens of this call from this replica. Ray Serve may send a call twice: then the one
        counts that was heard first."""
        answer = self._by_key.get(first.key)
        if answer is None or answer.link is not None:
            return False
        try:
            answer.begin(link, first)
        except Exception as error:
            answer.fail(error)
            return False
        return True

    def _taken(self, link: Link, output: EngineCoreOutput) -> bool:
        """Whether an output is awaited; then it bears the name of its choice, and what only prefill knows of it."""
        answer = self._by_key.get(output.request_id)
        if answer is None or answer.link is not link or answer.whole.done():
            return False
        output.request_id = answer.choice_id
        if (prefilled := answer.prefilled) is not None:
            output.new_prompt_logprobs_tensors = prefilled.prompt_logprobs
            stats = output.prefill_stats or PrefillStats()
            stats.num_cached_tokens = prefilled.num_cached_tokens or 0
            output.prefill_stats, answer.prefilled = stats, None
        return True


def steps(outputs: list[EngineCoreOutput]) -> Iterator[list[EngineCoreOutput]]:
    """One after another, as an engine makes them: at most one output of each request. Nearly always there is one step."""
    while outputs:
        step = {output.request_id: output for output in reversed(outputs)}
        more = (
            [output for output in outputs if step[output.request_id] is not output] if len(step) < len(outputs) else []
        )
        yield list(step.values())
        outputs = more


def _done(answer: Answer) -> None:
    if not answer.whole.done():
        answer.whole.set_result(None)
