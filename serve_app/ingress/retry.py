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
from serve_app.handoff.errors import EngineDead, HandoffLost, OtherVersion, StageError, StageUnavailable
from serve_app.stage import Stage


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


@dataclass
class Ladder:
    """What failed for a choice so far, and what its next attempt does without.

    Where embeddings were lost twice, it does without encoders; where prefill was not there or its blocks were lost, twice in
    all, decode prefills. An engine ends a request in the same way whether its KV blocks or embeddings were lost or its
    grammar cannot be compiled or followed; so decode does a structured request alone where that happened, and where it
    happens again it is the grammar.

    Where no replica has the weights that embeddings or blocks were made with, whoever refused them makes its own.
    """

    structured: bool
    embeddings_lost: int = 0
    prefills_lost: int = 0
    blocks_lost: int = 0
    engines_died: int = 0
    other_than_encoders: bool = False
    other_than_prefill: bool = False

    def failed(self, error: StageError, encoded: bool, said: bool = False) -> None:
        """``encoded``: whether encoders had encoded something of the attempt. ``said``: whether it went on from tokens."""
        at_decode, lost = error.stage is Stage.DECODE, isinstance(error, HandoffLost)
        self.embeddings_lost += lost and encoded
        self.blocks_lost += lost and at_decode
        self.prefills_lost += isinstance(error, StageUnavailable) and error.stage is Stage.PREFILL
        self.engines_died += isinstance(error, EngineDead) and at_decode
        if isinstance(error, OtherVersion):
            by_encoders = encoded and not said
            self.other_than_encoders |= at_decode or by_encoders
            self.other_than_prefill |= at_decode or not by_encoders

    @property
    def alone(self) -> bool:
        return self.structured and self.blocks_lost > 0

    @property
    def without_encoders(self) -> bool:
        return self.alone or self.other_than_encoders or self.embeddings_lost >= 2

    @property
    def without_prefill(self) -> bool:
        return self.alone or self.other_than_prefill or self.prefills_lost + self.blocks_lost >= 2

    @property
    def cannot_be_structured(self) -> bool:
        return self.structured and self.blocks_lost >= 2

    @property
    def deadly(self) -> bool:
        """Two engines that died with it are enough."""
        return self.engines_died >= 2


class Retries:
    """What an ingress may try again. One object per ingress replica."""

    def __init__(self, config: RetryConfig, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._config = config
        self._budget = RetryBudget(config.ratio, config.floor_per_s)
        self._jitter = jitter

    def accepted(self) -> None:
        self._budget.earn()

    def allow(self, error: Exception, attempt: int, begun: bool = False) -> bool:
        """Whether attempt number ``attempt`` (from 1) may be followed by another after this failure.

        Only failures that say nothing about the request itself: a replica gone, a hand-off lost. ``begun``: a part of the
        answer is kept. The rest is little more work than was under way, so it needs no budget. Nor does a request that no
        replica took, as it began with another version: next it goes where there are such.
        """
        transient = isinstance(error, StageUnavailable | HandoffLost)
        free = begun or isinstance(error, OtherVersion)
        return transient and attempt < self._config.attempts and (free or self._budget.spend())

    async def pause(self, attempt: int) -> None:
        """Wait before the next attempt: at random up to ``backoff_s``, doubled each time, so that not all come at once."""
        await asyncio.sleep(self._jitter(0, self._config.backoff_s * 2 ** (attempt - 1)))
