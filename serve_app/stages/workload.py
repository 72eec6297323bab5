"""How much work a replica has, and how fast it does it: the signals of the autoscaling policies.

Work is counted in the unit of the stage: visual or audio tokens of an encoder, prompt tokens of prefill and of what pools
(less those in its prefix cache), sequences of decode.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

WARM_UP_CALLS = 4
"""First calls of an engine, which load kernels and fill allocators: they do not count for the rate."""

SAMPLE_CALLS = 4
SAMPLE_BUSY_S = 1.0
SAMPLES = 8
"""The rate is that of the last 8 samples of like calls, each of at least 4 calls and a second with work."""

REMEMBERED_SAMPLES = 32
ALIKE = 4.0
"""Calls are alike if their work differs by at most this factor: small calls have a far lower rate than large ones, because
of the fixed cost of a call."""

REMEMBERED_CALLS = 64


@dataclass
class Sample:
    work: float = 0.0
    busy_s: float = 0.0
    calls: int = 0

    def like(self, mean_work: float) -> bool:
        mine = self.work / self.calls
        return mine <= ALIKE * mean_work and mean_work <= ALIKE * mine


@dataclass
class Call:
    """One call under way. ``asked`` is a guess of its work, ``done`` its true work once that is known."""

    asked: float
    done: float | None = None


class Meter:
    """Counts the calls of one replica. For one thread, the replica's event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[int, Call] = {}
        self._ended: deque[Call] = deque(maxlen=REMEMBERED_CALLS)
        self._samples: deque[Sample] = deque(maxlen=REMEMBERED_SAMPLES)
        self._sample = Sample()
        self._warm_up = WARM_UP_CALLS
        self._total = 0.0
        self._seen_at = clock()

    @contextmanager
    def call(self, asked: float) -> Iterator[Call]:
        """Count a call. One that raises has done no work, but its time counts for the rate."""
        call = Call(asked)
        self._pass_time()
        self._calls[id(call)] = call
        try:
            yield call
            self._end(call)
        finally:
            self._pass_time()
            del self._calls[id(call)]

    def _pass_time(self) -> None:
        now = self._clock()
        if self._calls:
            self._sample.busy_s += now - self._seen_at
        self._seen_at = now

    def _end(self, call: Call) -> None:
        self._pass_time()
        call.done = call.asked if call.done is None else call.done
        self._ended.append(call)
        self._total += call.done
        if self._warm_up:
            self._warm_up -= 1
            self._sample = Sample()
            return
        self._sample.work += call.done
        self._sample.calls += 1
        if self._sample.calls >= SAMPLE_CALLS and self._sample.busy_s >= SAMPLE_BUSY_S:
            self._samples.append(self._sample)
            self._sample = Sample()

    @property
    def under_way(self) -> int:
        return len(self._calls)

    @property
    def outstanding(self) -> float:
        asked, done = sum(call.asked for call in self._ended), sum(call.done or 0.0 for call in self._ended)
        share = done / asked if asked else 1.0  # cache hits, and guesses that were too high
        return share * sum(call.asked for call in self._calls.values())

    @property
    def rate(self) -> float | None:
        """Work per second with work, of calls like those under way or else the latest; None until it is measured."""
        if not self._samples:
            return None
        latest = self._samples[-1]
        mean_work = self.outstanding / len(self._calls) if self._calls else latest.work / latest.calls
        alike = [sample for sample in self._samples if sample.like(mean_work)][-SAMPLES:]
        return sum(sample.work for sample in alike) / sum(sample.busy_s for sample in alike) if alike else None

    def stats(self) -> dict[str, float]:
        """``outstanding`` work and ``calls`` under way, the ``mean_work`` of a call, all work ``done`` since the start,
        and the ``rate`` of work per second, 0 while it is not known."""
        return {
            "outstanding": self.outstanding,
            "calls": float(len(self._calls)),
            "mean_work": sum(call.done or 0.0 for call in self._ended) / len(self._ended) if self._ended else 0.0,
            "done": self._total,
            "rate": self.rate or 0.0,
        }


HELP = {
    "outstanding": "Work of calls under way, in the unit of the stage.",
    "calls": "Calls under way.",
    "mean_work": "Work of a call.",
    "done": "Work done since the replica started.",
    "rate": "Work per second while there is any; 0 while it is not measured.",
    "kv_use": "Share of the KV cache that is in use.",
    "slots": "Sequences that the engine runs at a time.",
    "gpus": "GPUs that the replica claims.",
}


def page(stats: Mapping[str, float]) -> str:
    """The signals in Prometheus' text format, as ``epd:work_<name>``."""
    return "".join(
        f"# HELP epd:work_{name} {HELP[name]}\n# TYPE epd:work_{name} gauge\nepd:work_{name} {value}\n"
        for name, value in stats.items()
    )
