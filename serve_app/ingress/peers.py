"""What one ingress replica holds in memory, found by the others: any of them can be asked for it (DESIGN's invariant 8).

A part of a replica that remembers something for clients offers it, by a name of its own; the same part of another replica
asks for it before it tells a client that nobody has it. The question goes over the ingress' own Serve handle::

    peers.offer("response", self._stored)  # async def _stored(key, *args) -> Any | None: what this replica has
    found = await peers.find("response", response_id)  # None: no other replica has it
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

logger = logging.getLogger("ray.serve")

ANSWER_S = 5.0
"""For the others to answer. One that hangs, or is gone and not yet missed, is passed by."""

Answer = Callable[..., Awaitable[Any]]
"""Called with a key, and what else was asked with. None: not here. It looks in its own replica alone: who is asked does not
ask on."""


class Handle(Protocol):
    """Of the ingress: Ray Serve's ``DeploymentHandle``."""

    def broadcast(self, method: str, *args: Any) -> Any: ...


class Peers:
    """The other ingress replicas, as one of them sees them.

    ``replica``: its own id, by which it knows its own question. ``handle``: of the ingress itself; None: there are no
    others.
    """

    def __init__(self, replica: str = "", handle: Handle | None = None) -> None:
        self._replica = replica
        self._handle = handle
        self._offers: dict[str, Answer] = {}

    def offer(self, what: str, answer: Answer) -> None:
        """Have ``answer`` called when another replica asks for ``what``. Its results are pickled, and may have some MB."""
        self._offers[what] = answer

    async def find(self, what: str, key: str, *args: Any, timeout_s: float = ANSWER_S) -> Any | None:
        """The first answer of another replica that is not None; None where none has one within ``timeout_s``.

        It does not fail: a replica that is gone, hangs, or cannot answer has nothing.
        """
        if self._handle is None:
            return None
        asked: list[asyncio.Task[Any]] = []
        try:
            async with asyncio.timeout(timeout_s):
                broadcast = self._handle.broadcast("tell_peer", self._replica, what, key, *args)
                # Not ``results_async``: it waits for all, and one that hangs would take away what another has.
                results = await broadcast._fetch_replica_results_async()
                asked = [asyncio.create_task(self._answer(what, result)) for result in results]
                for earliest in asyncio.as_completed(asked):
                    if (answer := await earliest) is not None:
                        return answer
        except TimeoutError:
            logger.warning(f"Some ingress replica did not say within {timeout_s:g} s whether it has a {what}.")
        except Exception as error:  # Ray's, where no replica runs or Serve is going
            logger.warning(f"The other ingress replicas cannot be asked for a {what}: {error}")
        finally:
            for task in asked:
                task.cancel()
        return None

    @staticmethod
    async def _answer(what: str, result: Any) -> Any | None:
        """Of one replica."""
        try:
            return await result.get_async()
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # Ray says as much where the other's call is cancelled
                raise
            logger.warning(f"An ingress replica that was asked for a {what} failed: {error!r}")
            return None

    async def tell(self, asker: str, what: str, key: str, *args: Any) -> Any | None:
        """What another replica asks this one for. A broadcast comes back to its sender too, who has looked already."""
        answer = self._offers.get(what)
        return None if asker == self._replica or answer is None else await answer(key, *args)
