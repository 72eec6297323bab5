"""Replicas of the stages: calls wait, are worked on, and end. Each counts its work with production's ``Meter``."""

import heapq
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from serve_app.stages.workload import Meter
from tools.sim.caches import BlockCache
from tools.sim.loop import Action, Cores, Loop, Thread, Work
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Request


class Call:
    """One call of a stage, for one request (and one item of it, for an encoder)."""

    __slots__ = ("answer", "asked_at", "cached", "first", "key", "metered", "replica", "request", "tokens", "work")

    def __init__(
        self,
        request: Request,
        work: int,
        answer: Callable[["Call"], None],
        tokens: int = 0,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.request, self.work, self.answer, self.tokens, self.first = request, work, answer, tokens, first
        self.key = ""
        """Of an encode call: names the item. Of a prefill: the request."""
        self.cached = 0
        """Tokens of a prompt that prefill had in its cache."""
        self.asked_at: float | None = None
        self.replica: Replica | None = None
        self.metered: AbstractContextManager[Any] | None = None


class Replica:
    """What all stages' replicas share."""

    def __init__(self, name: str, loop: Loop, cores: Cores, times: ServiceTimes, gpus: float) -> None:
        self.name, self.loop, self.cores, self.times, self.gpus = name, loop, cores, times, gpus
        self.ongoing = 0
        self.held = 0
        """Calls that are answered, and whose result another replica has still to pull."""
        self.leased_until = 0.0
        self.begun = 0
        self.waited_s = 0.0
        """What calls waited until their work began, all together."""
        self.ended: Callable[[], None] = lambda: None
        self.meter = Meter(loop.clock)
        self._beside = Thread(cores)
        """The replica's own process, beside its engine."""

    def take(self, call: Call) -> None:
        call.replica = self
        call.asked_at = self.loop.now if call.asked_at is None else call.asked_at
        self.ongoing += 1
        call.metered = self.meter.call(call.work)
        call.metered.__enter__()
        self._beside.work(self._before_s(call), partial(self._take, call))

    def stats(self) -> dict[str, float]:
        """As ``record_autoscaling_stats`` of the deployments."""
        return self.meter.stats() | {"kv_use": self.kv_use, "slots": float(self.times.slots), "gpus": self.gpus}

    kv_use = 0.0

    def _before_s(self, call: Call) -> float:
        """What the replica does for a call before its engine gets it."""
        return 0.0

    @abstractmethod
    def _take(self, call: Call) -> None: ...

    def _begins(self, call: Call) -> None:
        assert call.asked_at is not None
        self.begun += 1
        self.waited_s += self.loop.now - call.asked_at

    def _answer(self, call: Call) -> None:
        assert call.metered is not None
        call.metered.__exit__(None, None, None)
        self.ongoing -= 1
        call.answer(call)
        self.ended()


class Encoder(Replica):
    """Items are prepared one after the other. The engine encodes those that wait in steps of at most ``encode_embeds``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._queue: deque[Call] = deque()
        self._busy = False

    def _before_s(self, call: Call) -> float:
        return self.times.prepare(call.work)

    def _take(self, call: Call) -> None:
        self._queue.append(call)
        self._next()

    def _next(self) -> None:
        if not self._queue or self._busy:
            return
        self._busy = True
        step = [self._queue.popleft()]
        room = self.times.encode_embeds - step[0].work
        while self._queue and self._queue[0].work <= room:
            room -= self._queue[0].work
            step.append(self._queue.popleft())
        for call in step:
            self._begins(call)
        seconds = self.times.encode_step([call.work for call in step])
        self.cores.start(seconds, partial(self._done, step))

    def _done(self, step: list[Call]) -> None:
        self._busy = False
        self._next()
        for call in step:
            self._answer(call)


class Prefill(Replica):
    """Steps of at most ``batch_tokens`` tokens, first come first served; a prompt that does not fit goes on in the next."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._queue: deque[list[Any]] = deque()  # [call, tokens left]; None: it has not begun
        self._busy = False
        self._cache = BlockCache(self.times.cache_tokens)
        self._pulls: list[tuple[int, Action]] = []  # ends of steps to wait for

    def _before_s(self, call: Call) -> float:
        return self.times.prefill_call_s

    def _take(self, call: Call) -> None:
        self._queue.append([call, None])
        self._next()

    def _next(self) -> None:
        if not self._queue or self._busy:
            return
        self._busy = True
        room, ending, encode_s, embeds = self.times.batch_tokens, [], 0.0, 0.0
        while self._queue and room:
            call, left = self._queue[0]
            if left is None:
                left = self._queue[0][1] = self._begin(call)
                encode_s += sum(self.times.encode(embeds) for embeds in own_items(call.request))
            part = min(left, room)
            room -= part
            embeds += part * call.request.embeds_share
            self._queue[0][1] -= part
            if part == left:
                self._queue.popleft()
                ending.append(call)
        seconds = encode_s + self.times.prefill(self.times.batch_tokens - room, embeds)
        self.cores.start(seconds, partial(self._done, ending))

    def _begin(self, call: Call) -> int:
        """Tokens of a prompt to compute: what the cache has when its first step begins is left out."""
        self._begins(call)
        if call.request.prefix is not None:
            call.cached = self._cache.begin(call.request.prefix)
        return call.work - call.cached

    def pull(self, done: Action) -> None:
        """Hand over KV blocks. On a CPU the engine does that between its steps."""
        if self._busy and self.times.pull_steps:
            self._pulls.append((self.times.pull_steps, done))
        else:
            done()

    def _done(self, ending: list[Call]) -> None:
        for call in ending:
            if call.request.prefix is not None:
                self._cache.end(call.request.prefix.keys)
        self._busy = False
        waiting, self._pulls = self._pulls, []
        for steps, done in waiting:
            if steps > 1 and self._queue:
                self._pulls.append((steps - 1, done))
            else:
                done()
        self._next()
        for call in ending:
            self._end(call)

    def _end(self, call: Call) -> None:
        self.held += 1
        self._answer(call)


def own_items(request: Request) -> tuple[int, ...]:
    """Embeddings of the items that prefill encodes itself: the smallest, as production sends the largest first."""
    return tuple(sorted(request.embeds)[: request.at_prefill]) if request.at_prefill else ()


class Decodes(Replica):
    """What decodes, by itself or beside prompts: it has calls that wait for room, and a KV cache."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._queue: deque[Call] = deque()
        self._kv_tokens = 0.0

    @property
    def kv_use(self) -> float:  # type: ignore[override]
        return min(self._kv_tokens / self.times.kv_tokens, 1.0)

    def _before_s(self, call: Call) -> float:
        return self.times.decode_call_s


class Decode(Decodes):
    """All sequences that run get a token per step; the others wait, first come first served.

    Steps are not played one by one. While nobody joins or leaves, a step takes the same time, so what is played is the
    stretch up to the next sequence that has its first or its last token. ``_steps`` counts steps since the start, with
    fractions; a sequence that joins now has its last token when it has gone up by the length of its answer.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._steps = 0.0
        self._marks: list[tuple[float, int, Call, bool]] = []  # steps at which a sequence has its first or last token
        self._joined = 0
        self._running = 0
        self._stretch: tuple[Work, float] | None = None  # work, seconds per step

    def _take(self, call: Call) -> None:
        self._queue.append(call)
        if len(self._queue) == 1 and self._fits(call):
            self._play()

    def _fits(self, call: Call) -> bool:
        room = self._kv_tokens + held_tokens(call) <= self.times.kv_tokens or not self._running
        return room and self._running < self.times.slots

    def _play(self) -> None:
        """Admit whom there is room for, and go on to the next mark."""
        self._pass_time()
        while self._queue and self._fits(self._queue[0]):
            call = self._queue.popleft()
            self._begins(call)
            self._running += 1
            self._kv_tokens += held_tokens(call)
            self._joined += 1
            heapq.heappush(self._marks, (self._steps + 1, self._joined, call, call.tokens == 1))
        if self._marks:
            step_s = self.times.decode(self._running, self._kv_tokens)
            seconds = max(self._marks[0][0] - self._steps, 0.0) * step_s
            self._stretch = self.cores.start(seconds, self._mark), step_s

    def _pass_time(self) -> None:
        if self._stretch is not None:
            work, step_s = self._stretch
            self._steps += self.cores.stop(work) / step_s
            self._stretch = None

    def _mark(self) -> None:
        self._stretch = None
        self._steps, _, call, last = heapq.heappop(self._marks)
        if call.first is not None:
            call.first()
            call.first = None
        if not last:
            self._joined += 1
            heapq.heappush(self._marks, (self._steps + call.tokens - 1, self._joined, call, True))
        else:
            self._running -= 1
            self._kv_tokens -= held_tokens(call)
        self._play()
        if last:
            self._answer(call)


def held_tokens(call: Call) -> float:
    """KV tokens of a sequence, over its life: its prompt, and half of what it will say."""
    return call.request.prompt_tokens + call.tokens / 2


class PrefillDecode(Decodes):
    """Decode that prefills: in each step a token for all that run, and of prompts as many tokens as there is room for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prompts: deque[list[Any]] = deque()  # [call, tokens left]
        self._answers: list[list[Any]] = []  # [call, tokens left]
        self._busy = False

    def _take(self, call: Call) -> None:
        self._queue.append(call)
        self._next()

    def _next(self) -> None:
        if self._busy:
            return
        room = max(self.times.batch_tokens - len(self._answers), 1)
        encode_s, tokens, embeds, ended = 0.0, 0, 0.0, []
        while room:
            if not self._prompts and not self._admit():
                break
            call, left = entry = self._prompts[0]
            if left == call.request.prompt_tokens:
                encode_s += sum(self.times.encode(embeds) for embeds in own_items(call.request))
            part = min(left, room)
            entry[1], room, tokens = left - part, room - part, tokens + part
            embeds += part * call.request.embeds_share
            if not entry[1]:
                ended.append(self._prompts.popleft()[0])
        if not tokens and not self._answers:
            return
        self._busy = True
        seconds = encode_s
        if self._answers:
            seconds += self.times.decode(len(self._answers), self._kv_tokens)
        if tokens:
            seconds += self.times.prefill(tokens, embeds)
        self.cores.start(seconds, partial(self._done, ended))

    def _admit(self) -> bool:
        """The next call, if there is room for it."""
        running = len(self._answers) + len(self._prompts)
        if not self._queue or running >= self.times.slots:
            return False
        if running and self._kv_tokens + held_tokens(self._queue[0]) > self.times.kv_tokens:
            return False
        call = self._queue.popleft()
        self._begins(call)
        self._kv_tokens += held_tokens(call)
        self._prompts.append([call, call.request.prompt_tokens])
        return True

    def _done(self, prefilled: list[Call]) -> None:
        self._busy = False
        self._answers = [[call, left - 1] for call, left in self._answers]
        self._answers += [[call, call.tokens - 1] for call in prefilled]
        ended = [call for call, left in self._answers if not left]
        self._answers = [entry for entry in self._answers if entry[1]]
        self._kv_tokens -= sum(map(held_tokens, ended))
        self._next()
        for call in prefilled:
            if call.first is not None:
                call.first()
        for call in ended:
            self._answer(call)
