"""Answers of decode replicas come over the channels and go into vLLM's ``OutputProcessor``."""

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
"""The last tokens come by the channel, the end of the call by its handle: so much later than the call they may come."""


@dataclass(eq=False)
class Answer:
    """What one decode call answers: a choice, or the rest of one that resumed."""

    key: str
    """The id of the call. Its outputs bear it."""
    choice_id: str
    """The id by which vLLM's ``OutputProcessor`` knows the choice."""
    prefilled: PrefillReply | None
    accept: Callable[[First], None]
    """It is called before the first tokens are taken. They are not taken where it raises a ``StageError``."""
    came: Callable[[EngineCoreOutput], None]
    """It is called with each output that was taken."""
    heard: bool = False
    """Whether decode has begun. It has pulled the blocks of the prefill then."""
    link: Link | None = None

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[First] = loop.create_future()
        self.whole: asyncio.Future[None] = loop.create_future()
        """It is done when all tokens have come."""
        for future in (self.first, self.whole):  # a failure is raised once, by the one that is awaited
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def complete(self) -> bool:
        return self.whole.done() and not self.whole.cancelled() and self.whole.exception() is None

    def begin(self, link: Link, first: First) -> None:
        """The first token has come. Raises ``StageError`` where the answer cannot be taken."""
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
        """The call has ended. Where it failed, the answer failed too, unless it was whole."""
        if call.cancelled() or self.whole.done():
            return
        if (error := call.exception()) is not None:
            return self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        reply = call.result()
        if self.link is not None and self.link.replica != reply.replica:
            return  # Ray Serve sent the call twice, and the other one has ended
        missing = StageUnavailable(Stage.DECODE, f"sent {reply.tokens} tokens of an answer, and not all of them came")
        asyncio.get_running_loop().call_later(JOIN_S, self.fail, missing)


class Answers:
    """The answers that are under way at one ingress replica."""

    def __init__(self, processor: OutputProcessor) -> None:
        decoder: Any = MsgpackDecoder(Frame[EngineCoreOutput])
        self._processor = processor
        self._by_key: dict[str, Answer] = {}
        self._by_choice: dict[str, Answer] = {}
        self.inlet: Inlet[EngineCoreOutput] = Inlet(decoder.decode, self.received, self.lost)

    def expect(self, answer: Answer) -> None:
        self._by_key[answer.key] = self._by_choice[answer.choice_id] = answer

    def forget(self, answer: Answer) -> None:
        """Drop what may still come of it, and tell decode to make no more."""
        del self._by_key[answer.key]
        if self._by_choice.get(answer.choice_id) is answer:
            del self._by_choice[answer.choice_id]
        if answer.link is not None and not answer.complete:
            answer.link.abort([answer.key])

    def received(self, link: Link, frame: Frame[EngineCoreOutput]) -> None:
        """Take the outputs of one decode replica, which come in the order in which it made them."""
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
        """Whether somebody wants the tokens of this call from this replica. Where Ray Serve sent the call twice, the replica
        that was heard first counts."""
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
        """Whether an output is awaited. Then it gets the id of its choice, and what only prefill knows of it."""
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
    """The steps of the engine one after another, each with at most one output of a request. Nearly always there is one."""
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
