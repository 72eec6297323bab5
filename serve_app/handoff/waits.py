"""``HandOffs`` ends waits for KV blocks that are gone.

Between prefill and the first token a request waits twice: at the ingress for a place at decode (``ingress.pipeline``), then
at decode until its engine has the blocks (``pulls``). The engines' part is in ``transfer.kv_lease``.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.handoff.errors import EPDError, HandoffLost
from serve_app.stage import Stage

T = TypeVar("T")
HandOff = TypeVar("HandOff", bound=Hashable)


@dataclass
class HandOffs(Generic[HandOff]):
    """Waits for hand-offs. One task checks all of them as long as there are any."""

    after_s: float
    """Seconds that a wait takes before it is checked."""
    every_s: float
    """Seconds between checks."""
    lost: Callable[[list[HandOff]], Awaitable[Collection[HandOff]]]
    """Returns those that are known to be lost. May raise an ``EPDError`` where it cannot tell."""
    why: str

    def __post_init__(self) -> None:
        self._waits: dict[HandOff, tuple[float, asyncio.Timeout]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, hand_off: HandOff | None, work: Awaitable[T]) -> T:
        """The result of ``work``. Raises ``HandoffLost`` once the hand-off that it waits for is known to be lost."""
        if hand_off is None:
            return await work
        try:
            async with asyncio.timeout(None) as patience:
                self._waits[hand_off] = time.monotonic(), patience
                if self._looking is None or self._looking.done():
                    # It needs a context of its own: in the request's, Serve would cancel its calls with the request.
                    look = self._look()
                    self._looking = asyncio.get_running_loop().create_task(look, context=contextvars.Context())
                try:
                    return await work
                finally:
                    self.over(hand_off)
        except TimeoutError:
            if not patience.expired():
                raise
            raise HandoffLost(Stage.DECODE, self.why) from None

    def over(self, hand_off: HandOff | None) -> None:
        """End the wait, because the hand-off has come."""
        if hand_off is not None:
            self._waits.pop(hand_off, None)

    async def _look(self) -> None:
        while self._waits:
            await asyncio.sleep(self.every_s)
            since = time.monotonic() - self.after_s
            if long := [hand_off for hand_off, (began, _) in self._waits.items() if began <= since]:
                with suppress(EPDError):
                    for hand_off in await self.lost(long):
                        if hand_off in self._waits:
                            self._waits[hand_off][1].reschedule(0)


def pulls(overdue: Callable[[float], Awaitable[Collection[str]]], lease_s: float) -> HandOffs[str]:
    """The waits of a decode replica for KV blocks. ``overdue(seconds)``: the requests, by prefill's ids, whose blocks its
    engine has been pulling for longer than that. Time in the engine's queue does not count."""

    async def lost(waiting: list[str]) -> Collection[str]:
        return set(waiting) & set(await overdue(lease_s))

    return HandOffs(lease_s, lease_s / 3, lost, "waited for KV blocks that did not come")
