"""Simulated time: actions in the order of their moments, and work on cores.

Work is measured in core-seconds. ``OwnCore`` is a card or core for each worker; ``SharedCores`` are the cores of one
machine, divided equally among those that work (processor sharing).
"""

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

Action = Callable[[], None]


class Timer:
    __slots__ = ("action",)

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class Loop:
    """Actions at the same moment run in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._asked = 0

    def clock(self) -> float:
        return self.now

    def at(self, moment: float, action: Action) -> Timer:
        timer = Timer(action)
        self._asked += 1
        heapq.heappush(self._heap, (max(moment, self.now), self._asked, timer))
        return timer

    def after(self, seconds: float, action: Action) -> Timer:
        return self.at(self.now + seconds, action)

    def every(self, seconds: float, action: Action, until: float) -> None:
        """At 0, ``seconds``, and so on, as long as the moment is before ``until``."""

        def again() -> None:
            action()
            if self.now + seconds < until:
                self.after(seconds, again)

        self.at(self.now, again)

    def run(self, until: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until:
            moment, _, timer = heapq.heappop(self._heap)
            if timer.action is not None:
                self.now = moment
                timer.action()
        if until != float("inf"):
            self.now = max(self.now, until)


class Work:
    """Work under way."""

    __slots__ = ("began", "done", "left", "seconds", "timer")

    def __init__(self, began: float, seconds: float, done: Action) -> None:
        self.began, self.seconds, self.done = began, seconds, done
        self.left = seconds
        self.timer: Timer | None = None


class Cores(Protocol):
    def start(self, seconds: float, done: Action) -> Work: ...

    def stop(self, work: Work) -> float:
        """Stop work before its end; core-seconds that are done of it."""


class OwnCore:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def start(self, seconds: float, done: Action) -> Work:
        work = Work(self._loop.now, seconds, done)
        work.timer = self._loop.after(seconds, done)
        return work

    def stop(self, work: Work) -> float:
        assert work.timer is not None
        work.timer.cancel()
        return self._loop.now - work.began


class SharedCores:
    """``cores`` may be a fraction: what other programs of the machine leave."""

    def __init__(self, loop: Loop, cores: float) -> None:
        self._loop, self._cores = loop, cores
        self._seen_at = 0.0
        self._active: list[Work] = []
        self._timer: Timer | None = None

    def start(self, seconds: float, done: Action) -> Work:
        self._pass_time()
        work = Work(self._loop.now, seconds, done)
        self._active.append(work)
        self._schedule()
        return work

    def stop(self, work: Work) -> float:
        self._pass_time()
        self._active.remove(work)
        self._schedule()
        return work.seconds - work.left

    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._active))

    def _pass_time(self) -> None:
        passed, self._seen_at = self._loop.now - self._seen_at, self._loop.now
        done = passed * self._speed() if self._active else 0.0
        for work in self._active:
            work.left -= done

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._active:
            first = min(self._active, key=lambda work: work.left)
            self._timer = self._loop.after(max(first.left, 0.0) / self._speed(), partial(self._ends, first))

    def _ends(self, work: Work) -> None:
        self._pass_time()
        self._active.remove(work)
        self._schedule()
        work.done()


class Thread:
    """One piece of work after the other."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._queue: deque[tuple[float, Action]] = deque()
        self._busy = False

    def work(self, seconds: float, done: Action) -> None:
        if not seconds and not self._busy:
            done()
            return
        self._queue.append((seconds, done))
        self._next()

    def _next(self) -> None:
        if self._queue and not self._busy:
            self._busy = True
            seconds, done = self._queue.popleft()
            self._cores.start(seconds, partial(self._done, done))

    def _done(self, done: Action) -> None:
        self._busy = False
        self._next()
        done()
