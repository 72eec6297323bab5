"""How often a request may be tried again: per request, and for all requests of an ingress together.

The shared budget is that of Finagle's ``RetryBudget``: every request earns a fraction of a retry, so when everything fails
the stages get at most that fraction more work, and not a multiple of it.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.config import RetryConfig
from serve_app.handoff.errors import HandoffLost, OtherVersion, StageUnavailable


@dataclass
class RetryBudget:
    """A bucket of retries: fills by ``ratio`` per request and ``floor_per_s`` per second, up to ten seconds' worth."""

    ratio: float
    floor_per_s: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._limit = max(10 * self.floor_per_s, 1.0)
        self._tokens, self._filled = self._limit, self.clock()

    def earn(self) -> None:
        """A request was accepted."""
        self._tokens = min(self._tokens + self.ratio, self._limit)

    def spend(self) -> bool:
        """Take a retry; False when there is none."""
        now = self.clock()
        self._tokens = min(self._tokens + (now - self._filled) * self.floor_per_s, self._limit)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Retries:
    """What an ingress may try again. One object per ingress replica."""

    def __init__(self, config: RetryConfig, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._config = config
        self._budget = RetryBudget(config.ratio, config.floor_per_s)
        self._jitter = jitter

    def accepted(self) -> None:
        self._budget.earn()

    def allow(self, error: Exception, attempt: int, resumes: bool = False) -> bool:
        """Whether attempt number ``attempt`` (from 1) may be followed by another after this failure.

        Only failures that say nothing about the request itself: a replica gone, a hand-off lost. What resumes needs no
        budget: the rest is little more work than was under way. Nor does a request that no replica took, as it began with
        another version: next it goes where there are such.
        """
        transient = isinstance(error, StageUnavailable | HandoffLost)
        free = resumes or isinstance(error, OtherVersion)
        return transient and attempt < self._config.attempts and (free or self._budget.spend())

    async def pause(self, attempt: int) -> None:
        """Wait before the next attempt: at random up to ``backoff_s``, doubled each time, so that not all come at once."""
        await asyncio.sleep(self._jitter(0, self._config.backoff_s * 2 ** (attempt - 1)))
