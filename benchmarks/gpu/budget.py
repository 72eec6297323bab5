"""The time of the whole run. Whatever hangs ends in time for a report."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ENDING_S = 20.0
"""What a system takes to end."""


class OutOfTime(Exception):
    """Not a TimeoutError: what waits for a socket would take that for its own."""


@dataclass
class Budget:
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def fair(self, to_come: int) -> float:
        """Seconds of a system that ``to_come`` more follow: rounds are repeated within it."""
        return self.left / (to_come + 1)

    def most(self, to_come: int) -> float:
        """Seconds after which a system is given up, so that something is left for those that follow."""
        return (self.left if not to_come else 1.5 * self.fair(to_come)) - ENDING_S


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in this program's main thread, wherever that waits, once ``seconds`` are over."""

    def end(*_: Any) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s: there is more time with --minutes")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
