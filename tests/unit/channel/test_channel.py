"""Its two ends over real sockets, with vLLM's outputs and serialization, on both kinds of event loop."""

import asyncio
import contextlib
import logging
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.serial_utils import MsgpackDecoder

from serve_app.channel import inlet, outlet
from serve_app.channel.inlet import Inlet, Link
from serve_app.channel.outlet import Codec, Outlet, Outlets
from serve_app.channel.wire import COUNT, First, Frame, Hello, ReplyTo, framed, receive
from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import Version
from serve_app.stages.tap import codec
from tests.fakes import FakeClock

Output = EngineCoreOutput
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
LONG_S = 1000.0
"""An interval that does not pass."""
HOST = "127.0.0.1"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test on a loop of its own: Ray's workers have uvloop. Errors that nobody has handled fail it."""

    def run_it(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        unhandled: list[Any] = []
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            runner.run(main())
        cancelled = asyncio.CancelledError  # with its inlet, as asyncio tells
        assert not [each for each in unhandled if not isinstance(each.get("exception"), cancelled)]

    return run_it


class News:
    """Something has happened: look again."""

    def __init__(self) -> None:
        self._come = asyncio.Event()

    def tell(self) -> None:
        self._come.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._come.clear()
                await self._come.wait()


class Ingress:
    """An inlet, and what it got."""

    def __init__(self, news: News) -> None:
        self._news = news
        self.frames: list[Frame[Output]] = []
        self.links: list[Link] = []
        self.lost: list[Link] = []
        self.fails: Exception | None = None
        self.inlet: Inlet[Output] = Inlet(MsgpackDecoder(Frame[Output]).decode, self._received, self._lost)

    @property
    def reply_to(self) -> ReplyTo:
        return self.inlet.reply_to

    @property
    def outputs(self) -> list[Output]:
        return [output for frame in self.frames for output in frame.outputs]

    def tokens(self, key: str) -> list[int]:
        return [token for output in self.outputs if output.request_id == key for token in output.new_token_ids]

    def pause(self) -> None:
        """Read no more, as a process that is busy."""
        self.links[-1]._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        self.links[-1]._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def _received(self, link: Link, frame: Frame[Output]) -> None:
        self._news.tell()
        if self.fails is not None:
            raise self.fails
        self.frames.append(frame)
        if link not in self.links:
            self.links.append(link)

    def _lost(self, link: Link) -> None:
        self._news.tell()
        self.lost.append(link)


class Replica:
    """The outlets of a decode replica, and what they asked of its engine."""

    def __init__(self, news: News, interval_s: float = 0.0) -> None:
        self._news = news
        self._vllms = codec()
        self.sent: list[Frame[Output]] = []
        self.aborts: list[list[str]] = []
        self.outlets: Outlets[Output] = Outlets(
            "decode-0", Codec(self._encode, self._vllms.add), interval_s, self._abort
        )

    @property
    def aborted(self) -> list[str]:
        return sorted(key for keys in self.aborts for key in keys)

    def _encode(self, frame: Frame[Output]) -> Any:
        self._news.tell()
        self.sent.append(frame)
        return self._vllms.encode(frame)

    async def _abort(self, keys: list[str]) -> None:
        self._news.tell()
        self.aborts.append(keys)


class Bench:
    """An ingress and a decode replica; more of either where a test wants them."""

    def __init__(self, interval_s: float) -> None:
        self.news = News()
        self.ingress = Ingress(self.news)
        self.replica = Replica(self.news, interval_s)

    async def connected(self) -> Outlet[Output]:
        """The outlet to the ingress, once a first frame has gone through."""
        made = await self.replica.outlets.to(self.ingress.reply_to)
        made.put("hello", said("hello", 0), First("hello", "decode-0"))
        self.replica.outlets.flush()
        await self.news.until(lambda: self.ingress.tokens("hello"))
        self.ingress.frames.clear()
        self.replica.sent.clear()
        return made


@contextlib.asynccontextmanager
async def bench(interval_s: float = 0.0) -> AsyncIterator[Bench]:
    made = Bench(interval_s)
    await made.ingress.inlet.listen(HOST)
    try:
        yield made
    finally:
        await made.replica.outlets.close()
        await made.ingress.inlet.close()


def said(key: str, *tokens: int, **more: Any) -> Output:
    return EngineCoreOutput(key, list(tokens), **more)


def large(key: str, token: int, megabytes: int, **more: Any) -> Output:
    """An output with so much logprobs."""
    numbers = np.arange(megabytes << 17, dtype=np.int32).reshape(1, -1)
    return said(key, token, new_logprobs=LogprobsLists(numbers, numbers.astype(np.float32), np.array([1])), **more)


# ---- what is brought


def test_tokens_come_in_order_and_what_is_told_of_a_call_with_the_first_ones(run: Run) -> None:
    first = First("a", "decode-0", 0.5, 0.25, Version("front", "template", "weights", "layout"))

    async def main() -> None:
        async with bench() as made:
            outlet = await made.replica.outlets.to(made.ingress.reply_to)
            with outlet.call("a"):
                for number in range(100):
                    last = number == 99
                    reason = FinishReason.LENGTH if last else None
                    outlet.put("a", said("a", number, finish_reason=reason), None if number else first, last)
                    made.replica.outlets.flush()
                    await asyncio.sleep(0)
                await made.news.until(lambda: len(made.ingress.tokens("a")) == 100)
            assert made.ingress.tokens("a") == list(range(100))
            assert [output.finish_reason for output in made.ingress.outputs][-1] is FinishReason.LENGTH
            assert made.ingress.frames[0].firsts == [first]
            assert not any(frame.firsts for frame in made.ingress.frames[1:])
            assert [link.replica for link in made.ingress.links] == ["decode-0"]

    run(main)


def test_logprobs_of_many_mib_come_as_they_are(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            outlet = await made.connected()
            output = large("a", 7, 24)
            assert output.new_logprobs is not None
            outlet.put("a", output)
            made.replica.outlets.flush()
            await made.news.until(lambda: made.ingress.tokens("a"))
            (come,) = made.ingress.outputs
            assert isinstance(come.new_logprobs, LogprobsLists)
            for ours, theirs in zip(output.new_logprobs[:3], come.new_logprobs[:3], strict=True):
                assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)

    run(main)


@pytest.mark.parametrize("tokens", [1, 1000], ids=["within the message", "beside it"])
def test_tensors_come_writable_and_pytorch_does_not_warn(run: Run, tokens: int) -> None:
    ids = torch.arange(tokens * 3).view(tokens, 3)
    sent = LogprobsTensors(ids, -ids.to(torch.float32), torch.ones(tokens, dtype=torch.int64))
    torch.set_warn_always(True)  # else it warns once per process

    async def main() -> None:
        async with bench() as made:
            outlet = await made.connected()
            outlet.put("a", said("a", 1, new_prompt_logprobs_tensors=sent))
            made.replica.outlets.flush()
            await made.news.until(lambda: made.ingress.tokens("a"))
            (come,) = made.ingress.outputs
            assert isinstance(come.new_prompt_logprobs_tensors, LogprobsTensors)
            for ours, theirs in zip(sent[:3], come.new_prompt_logprobs_tensors[:3], strict=True):
                assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
                theirs.zero_()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(main)
    finally:
        torch.set_warn_always(False)


def test_requests_of_one_step_share_a_frame(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            outlet = await made.connected()
            for key in ("a", "b", "c"):
                outlet.put(key, said(key, 1), First(key, "decode-0"))
            made.replica.outlets.flush()
            await made.news.until(lambda: made.ingress.frames)
            (frame,) = made.ingress.frames
            assert [output.request_id for output in frame.outputs] == ["a", "b", "c"]
            assert [first.key for first in frame.firsts] == ["a", "b", "c"]

    run(main)


def test_a_step_without_tokens_for_an_ingress_sends_it_nothing(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            await made.connected()
            other = Ingress(made.news)
            await other.inlet.listen(HOST)
            outlet = await made.replica.outlets.to(other.reply_to)
            outlet.put("a", said("a", 1), last=True)
            made.replica.outlets.flush()
            await made.news.until(lambda: other.tokens("a"))
            assert len(made.replica.sent) == 1
            await other.inlet.close()

    run(main)


def test_frames_go_once_per_interval_and_first_and_last_tokens_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(outlet, "time", SimpleNamespace(monotonic=clock))

    async def main() -> None:
        async with bench(interval_s=0.02) as made:
            to = await made.replica.outlets.to(made.ingress.reply_to)
            number = 0

            async def step(wait_s: float = 0.0, **how: Any) -> list[int]:
                """Put the next token; returns the tokens of the frame that goes on with it."""
                nonlocal number
                clock.now += wait_s
                frames = len(made.replica.sent)
                to.put("a", said("a", number), **how)
                number += 1
                made.replica.outlets.flush()
                await asyncio.sleep(0)
                await asyncio.sleep(0)  # what was to go has gone
                sent = made.replica.sent[frames:]
                assert len(sent) <= 1
                return [token for frame in sent for output in frame.outputs for token in output.new_token_ids]

            assert await step(first=First("a", "decode-0")) == [0]
            assert await step() == []
            assert await step(0.019) == []
            assert await step(0.002) == [1, 2, 3]
            assert await step(0.01) == []
            assert await step(first=First("a", "decode-0")) == [4, 5]
            assert await step(0.019) == [], "each frame begins an interval"
            assert await step(last=True) == [6, 7]
            assert await step(0.03) == [8]
            await made.news.until(lambda: made.ingress.tokens("a") == list(range(9)))

    run(main)


def test_what_was_put_comes_before_the_replica_ends(run: Run) -> None:
    async def main() -> None:
        async with bench(LONG_S) as made:
            outlet = await made.connected()
            outlet.put("a", large("a", 1, 24))
            outlet.put("a", said("a", 2))
            await made.replica.outlets.close()
            await made.news.until(lambda: made.ingress.lost)
            assert made.ingress.tokens("a") == [1, 2]

    run(main)


@pytest.mark.parametrize("more", [True, False], ids=["and more waits", "and nothing else"])
def test_what_is_on_its_way_when_the_replica_ends_comes_too(run: Run, more: bool) -> None:
    """Its process may end as soon as it is closed."""

    async def main() -> None:
        async with bench() as made:
            outlet = await made.connected()
            made.ingress.pause()
            outlet.put("a", large("a", 1, 24))
            made.replica.outlets.flush()
            await made.news.until(lambda: made.replica.sent)
            if more:
                outlet.put("a", said("a", 2, finish_reason=FinishReason.STOP), last=True)
            closing = asyncio.create_task(made.replica.outlets.close())
            done, _ = await asyncio.wait([closing], timeout=0.1)
            assert not done, "the kernel has not taken all of it"
            made.ingress.resume()
            await closing
            await made.news.until(lambda: made.ingress.lost)
            assert made.ingress.tokens("a") == [1, 2][: 1 + more]

    run(main)


# ---- slow and stuck readers


def test_reader_that_does_not_read_costs_its_replica_nothing_and_gets_the_rest_in_one(run: Run) -> None:
    """What it missed is one output per request, with the prefill of the first and the end of the last."""
    steps, keys = 5000, ("a", "b", "c")

    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            made.ingress.pause()
            to.put("large", large("large", 1, 32))
            made.replica.outlets.flush()
            await made.news.until(lambda: made.replica.sent)  # more than the kernel takes
            for number in range(steps):
                for key in keys:
                    output = said(key, number)
                    if number == 0:
                        output.prefill_stats = PrefillStats(10, num_cached_tokens=4)
                    if number == steps - 1:
                        output.finish_reason, output.stop_reason = FinishReason.STOP, 9
                    to.put(key, output, First(key, "decode-0") if not number else None, last=number == steps - 1)
                made.replica.outlets.flush()
                await asyncio.sleep(0)
            assert len(made.replica.sent) == 1, "nothing is queued"
            assert {key: len(outputs) for key, outputs in to._waiting.items()} == dict.fromkeys(keys, 1)
            assert to._waiting_bytes == 0
            made.ingress.resume()
            await made.news.until(lambda: len(made.ingress.outputs) == 1 + len(keys))
            rest = made.ingress.frames[1]
            assert [output.request_id for output in rest.outputs] == list(keys)
            assert [first.key for first in rest.firsts] == list(keys)
            for output in rest.outputs:
                assert output.new_token_ids == list(range(steps))
                assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, 9)
                assert output.prefill_stats == PrefillStats(10, num_cached_tokens=4)
            assert not made.replica.aborts

    run(main)


def test_outputs_with_logprobs_wait_one_by_one_and_in_order(run: Run) -> None:
    async def main() -> None:
        async with bench(LONG_S) as made:
            to = await made.connected()
            for number in range(6):
                to.put("a", large("a", number, 1) if number in (2, 3) else said("a", number), last=number == 5)
            made.replica.outlets.flush()
            await made.news.until(lambda: made.ingress.frames)
            assert [output.new_token_ids for output in made.ingress.outputs] == [[0, 1], [2], [3], [4, 5]]

    run(main)


def test_stuck_reader_is_hung_up_on_and_only_its_calls_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "STUCK_S", 0.05)

    async def main() -> None:
        async with bench() as made:
            other = Ingress(made.news)
            await other.inlet.listen(HOST)
            stuck, well = await made.connected(), await made.replica.outlets.to(other.reply_to)
            with stuck.call("a"), stuck.call("b"), well.call("c"):
                made.ingress.pause()
                stuck.put("a", large("a", 1, 32))
                made.replica.outlets.flush()
                await made.news.until(lambda: made.replica.aborts)
                assert made.replica.aborted == ["a", "b"]
                assert stuck.gone and not well.gone
                well.put("c", said("c", 1), last=True)
                stuck.put("b", said("b", 1), last=True)  # as its engine may still do
                made.replica.outlets.flush()
                await made.news.until(lambda: other.tokens("c"))
                assert not stuck._waiting
            made.ingress.resume()
            await made.news.until(lambda: made.ingress.lost)
            await other.inlet.close()

    run(main)


def test_ingress_for_which_too_much_waits_is_hung_up_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "WAITING_BYTES", 3 << 20)

    async def main() -> None:
        async with bench(LONG_S) as made:
            to = await made.connected()
            with to.call("a"), to.call("b"):
                for number in range(2):
                    to.put("a", large("a", number, 1))
                assert not to.gone
                to.put("b", large("b", 0, 1))
                assert to.gone
                await made.news.until(lambda: made.replica.aborts and made.ingress.lost)
                assert made.replica.aborted == ["a", "b"]
            assert not made.ingress.frames

    run(main)


def test_bytes_that_have_gone_do_not_count_as_waiting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "WAITING_BYTES", 3 << 20)

    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            for number in range(8):
                to.put("a", large("a", number, 1))
                made.replica.outlets.flush()
                await made.news.until(lambda number=number: len(made.ingress.frames) == number + 1)  # type: ignore[misc]
            assert not to.gone

    run(main)


# ---- one of the two is gone


def test_ingress_that_is_gone_ends_its_calls_at_once_and_no_others(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            other = Ingress(made.news)
            await other.inlet.listen(HOST)
            to, well = await made.connected(), await made.replica.outlets.to(other.reply_to)
            with well.call("c"):
                with to.call("over"):
                    pass
                with to.call("a"), to.call("b"):
                    await made.ingress.inlet.close()
                    await made.news.until(lambda: made.replica.aborts)
                    assert made.replica.aborts == [["a", "b"]] or made.replica.aborts == [["b", "a"]]
                    assert to.gone and not well.gone
            assert len(made.ingress.lost) == 1
            await other.inlet.close()

    run(main)


def test_ingress_that_is_gone_with_nothing_under_way_asks_nothing_of_the_engine(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            await made.ingress.inlet.close()
            await asyncio.gather(*to._tasks, return_exceptions=True)
            assert to.gone
            assert not made.replica.aborts

    run(main)


@pytest.mark.parametrize("how", ["ends", "dies"])
def test_replica_that_is_gone_is_told_once(run: Run, how: str) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            if how == "ends":
                await made.replica.outlets.close()
            else:
                to._writer.transport.abort()
            await made.news.until(lambda: made.ingress.lost)
            assert made.ingress.lost == made.ingress.links
            await made.ingress.inlet.close()
            assert made.ingress.lost == made.ingress.links, "once"

    run(main)


def test_connection_that_broke_is_made_anew_by_the_next_call(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            to.hang_up()
            await made.news.until(lambda: made.ingress.lost)
            again = await made.connected()
            assert again is not to
            assert len(made.ingress.links) == 2 and made.ingress.lost == made.ingress.links[:1]
            assert list(made.replica.outlets._made.values()) == [again]

    run(main)


def test_outlets_that_are_gone_are_forgotten_with_the_next_connection(run: Run) -> None:
    """Ingress replicas come and go for as long as a decode replica lives."""

    async def main() -> None:
        async with bench() as made:
            for _ in range(3):
                other = Ingress(made.news)
                await other.inlet.listen(HOST)
                to = await made.replica.outlets.to(other.reply_to)
                await other.inlet.close()
                await asyncio.gather(*to._tasks, return_exceptions=True)
            await made.replica.outlets.to(made.ingress.reply_to)
            assert list(made.replica.outlets._made) == [made.ingress.reply_to]

    run(main)


@pytest.mark.parametrize("error", [ValueError("what is this?"), KeyError("a")], ids=lambda error: type(error).__name__)
def test_link_whose_frame_cannot_be_taken_ends(run: Run, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        loop, unhandled = asyncio.get_running_loop(), []
        async with bench() as made:
            to = await made.connected()
            with to.call("a"):
                loop.set_exception_handler(lambda _, context: unhandled.append(context["exception"]))
                made.ingress.fails = error
                to.put("a", said("a", 1), last=True)
                made.replica.outlets.flush()
                await made.news.until(lambda: made.ingress.lost and made.replica.aborts)
                assert made.ingress.lost == made.ingress.links
                assert made.replica.aborts == [["a"]]
            # A bug of ours is told with its traceback, by asyncio.
            assert bool(unhandled) != ("what is this?" in caplog.text)

    with caplog.at_level(logging.WARNING, "ray.serve"):
        run(main)


def test_frame_over_the_limit_ends_its_link_before_it_is_in_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            monkeypatch.setattr(inlet, "FRAME_BYTES", 1 << 20)
            to.put("a", large("a", 1, 1))
            made.replica.outlets.flush()
            await made.news.until(lambda: len(made.ingress.frames) == 1)  # read with the limit of before
            to.put("a", large("a", 2, 2))
            made.replica.outlets.flush()
            await made.news.until(lambda: made.ingress.lost)
            assert made.ingress.tokens("a") == [1]

    with caplog.at_level(logging.WARNING, "ray.serve"):
        run(main)
    assert "a frame of " in caplog.text


@pytest.mark.parametrize("words", [b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"])
def test_what_an_ingress_cannot_have_meant_ends_its_calls(run: Run, words: bytes) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            with to.call("a"):
                made.ingress.links[0]._writer.write(words)
                await made.news.until(lambda: made.replica.aborts and made.ingress.lost)
                assert to.gone
                assert made.replica.aborts == [["a"]]

    run(main)


def test_ingress_that_ends_says_nothing_of_its_connections(run: Run) -> None:
    async def main() -> None:
        unhandled: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        async with bench() as made:
            await made.connected()
            await made.ingress.inlet.close()
            assert len(made.ingress.lost) == 1
        assert not unhandled

    run(main)


# ---- who may connect


async def hung_up_on(reply_to: ReplyTo, *words: Any) -> None:
    """Connect, say words, and wait for the end."""
    reader, writer = await asyncio.open_connection(reply_to.host, reply_to.port)
    writer.write(b"".join(words))
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.transport.abort()


def hello(secret: str) -> list[Any]:
    return framed([msgspec.msgpack.encode(Hello(secret, "stranger"))])


TOKENS = framed([msgspec.msgpack.encode(([], []))])
STRANGERS: dict[str, Callable[[ReplyTo], list[Any]]] = {
    "no secret": lambda to: hello(""),
    "a wrong one": lambda to: hello("0" * len(to.secret)),
    "a part of it": lambda to: hello(to.secret[:-1]),
    "one of other letters": lambda to: hello("ß" * len(to.secret)),
    "a web browser": lambda to: [b"GET / HTTP/1.1\r\n\r\n"],
    "noise": lambda to: [b"\x01\0\0\0\x05\0\0\0noise"],
    "no buffer": lambda to: [COUNT.pack(0)],
    "two buffers": lambda to: [*framed([msgspec.msgpack.encode(Hello(to.secret, "stranger")), b""])],
    "a large frame": lambda to: [COUNT.pack(1), COUNT.pack(1 << 30)],
    "many buffers": lambda to: [COUNT.pack((1 << 32) - 1)],
    "half a hello": lambda to: [b"".join(hello(to.secret))[:-3]],
    "silence": lambda to: [],
}


@pytest.mark.parametrize("who", STRANGERS)
def test_stranger_is_hung_up_on_and_brings_no_tokens(run: Run, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inlet, "HELLO_S", 0.1)

    async def main() -> None:
        async with bench() as made:
            words = STRANGERS[who](made.ingress.reply_to)
            silent = who in ("half a hello", "silence")
            await hung_up_on(made.ingress.reply_to, *words, *([] if silent else TOKENS))
            await made.connected()  # who knows the secret is heard
            assert [link.replica for link in made.ingress.links] == ["decode-0"]
            assert not made.ingress.frames and not made.ingress.lost

    run(main)


def test_wrong_secret_is_logged(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench() as made:
            await hung_up_on(made.ingress.reply_to, *hello("wrong"))

    with caplog.at_level(logging.WARNING, "ray.serve"):
        run(main)
    assert "brought tokens with a wrong secret" in caplog.text
    assert "127.0.0.1" in caplog.text


def test_secrets_of_two_ingresses_have_128_bits_and_differ(run: Run) -> None:
    async def main() -> None:
        one, other = Ingress(News()).reply_to.secret, Ingress(News()).reply_to.secret
        assert one != other
        assert len(bytes.fromhex(one)) == 16

    run(main)


# ---- calls


@pytest.mark.parametrize("why", ["nobody listens", "nobody answers"])
def test_call_that_nobody_listens_for_is_told_soon(run: Run, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind((HOST, 0))
            nowhere = ReplyTo(HOST, taken.getsockname()[1], "secret")
            if why == "nobody answers":
                monkeypatch.setattr(outlet, "CONNECT_S", 0.05)
                monkeypatch.setattr(asyncio, "open_connection", never)
            replica, began = Replica(News()), time.monotonic()
            both = await asyncio.gather(*(replica.outlets.to(nowhere) for _ in range(2)), return_exceptions=True)
            assert time.monotonic() - began < 5
        for error in both:
            assert isinstance(error, StageUnavailable)
            assert f"The decode stage cannot reach the ingress that asked, at {HOST}:{nowhere.port}" in str(error)
        assert not replica.outlets._made and not replica.outlets._connecting

    run(main)


def test_calls_at_once_share_a_connection(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            outlets = await asyncio.gather(*(made.replica.outlets.to(made.ingress.reply_to) for _ in range(5)))
            outlets.append(await made.replica.outlets.to(made.ingress.reply_to))
            assert len(set(map(id, outlets))) == 1
            for number, to in enumerate(outlets):
                to.put(str(number), said(str(number), number), last=True)
            made.replica.outlets.flush()
            await made.news.until(lambda: len(made.ingress.outputs) == len(outlets))
            assert len(made.ingress.links) == 1

    run(main)


def test_call_that_is_cancelled_while_it_connects_leaves_the_connection_to_others(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            one, other = (asyncio.create_task(made.replica.outlets.to(made.ingress.reply_to)) for _ in range(2))
            await asyncio.sleep(0)
            one.cancel()
            with pytest.raises(asyncio.CancelledError):
                await one
            assert not (await other).gone

    run(main)


def test_call_that_ray_serve_sends_twice_to_a_replica_is_refused_while_it_is_under_way(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            with to.call("a"):
                with pytest.raises(StageUnavailable, match="works on the request already"), to.call("a"):
                    pytest.fail("twice")
                with to.call("b"):
                    pass
                assert to.keys == {"a"}, "the first goes on"
            with to.call("a"):
                assert to.keys == {"a"}

    run(main)


def test_ingress_ends_calls_that_are_under_way_and_no_others(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            to = await made.connected()
            with to.call("over"):
                pass
            with to.call("a"), to.call("b"), to.call("c"):
                made.ingress.links[0].abort(["a", "over", "unknown"])
                made.ingress.links[0].abort(["c"])
                await made.news.until(lambda: len(made.replica.aborted) == 2)
                assert made.replica.aborted == ["a", "c"]
                assert not to.gone

    run(main)


def test_telling_a_replica_that_is_gone_to_end_calls_does_nothing(run: Run) -> None:
    async def main() -> None:
        async with bench() as made:
            (await made.connected()).hang_up()
            await made.news.until(lambda: made.ingress.lost)
            made.ingress.links[0].abort(["a"])

    run(main)


# ---- the wire


def test_kernel_tells_both_ends_of_a_node_that_is_silent(run: Run) -> None:
    """Within ``SILENT_S``."""

    async def main() -> None:
        async with bench() as made:
            ours, theirs = (await made.connected())._writer, made.ingress.links[0]._writer
            for writer in (ours, theirs):
                sock = writer.get_extra_info("socket")

                def of_tcp(name: str, sock: Any = sock) -> int:
                    return int(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)))

                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle_s, every_s, count = map(of_tcp, ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"))
                assert idle_s + every_s * count <= 20
                assert of_tcp("TCP_USER_TIMEOUT") == 20_000

    run(main)


def read(data: bytes, limit_bytes: int = 1 << 20) -> list[bytearray]:
    async def main() -> list[bytearray]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await receive(reader, limit_bytes)

    return asyncio.run(main())


@given(st.lists(st.binary(max_size=300), max_size=10), st.binary(max_size=20))
@settings(deadline=None)
def test_buffers_are_read_as_they_were_framed(buffers: list[bytes], more: bytes) -> None:
    assert read(b"".join(framed(buffers)) + more) == buffers


def test_arrays_of_any_shape_are_framed_by_their_bytes() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    (come,) = read(b"".join(framed([array])))
    assert np.array_equal(np.frombuffer(come, np.float64).reshape(3, 4), array)


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_frame_that_breaks_off_is_the_end(buffers: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(framed(buffers))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(EOFError):
        read(whole[:cut])


@pytest.mark.parametrize(
    ("data", "limit_bytes", "refused"),
    [
        (COUNT.pack(2) + COUNT.pack(60) + COUNT.pack(41), 100, "a frame of 101 bytes"),
        (COUNT.pack(1) + COUNT.pack((1 << 32) - 1), 1 << 30, "a frame of 4294967295 bytes"),
        (COUNT.pack((1 << 20) + 1), 1 << 30, "a frame of 1048577 buffers"),
    ],
)
def test_frame_over_a_limit_is_refused_by_its_head(data: bytes, limit_bytes: int, refused: str) -> None:
    with pytest.raises(ValueError, match=refused):
        read(data, limit_bytes)
    assert read(b"".join(framed([b"x" * 60, b"y" * 40])), 100) == [b"x" * 60, b"y" * 40]
