"""Ingress replicas find in each other's memory what they hold for clients, so that any can serve any request.

A module that remembers something offers it by name. The same module of another replica asks for it over the ingress' own
Serve handle, before it tells a client that it is not found::

    peers.offer("response", self._stored)  # async def _stored(key, *args) -> Any | None
    found = await peers.find("response", response_id)
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger("ray.serve")

ANSWER_S = 5.0
"""Seconds for the others to answer. A replica that hangs or has died is passed over."""

Answer = Callable[..., Awaitable[Any]]
"""Takes a key and the other arguments of ``find``; looks in its own replica only. Returns None if it is not there."""


class Peers:
    """The other ingress replicas.

    ``replica``: the id of this one, by which it ignores its own broadcasts. ``handle``: Ray Serve's ``DeploymentHandle``
    of the ingress; without one there are no others.
    """

    def __init__(self, replica: str = "", handle: Any = None) -> None:
        self._replica = replica
        self._handle = handle
        self._offers: dict[str, Answer] = {}

    def offer(self, what: str, answer: Answer) -> None:
        """Have ``answer`` called when another replica asks for ``what``. Its results are pickled and may have some MB."""
        self._offers[what] = answer

    async def find(self, what: str, key: str, *args: Any, timeout_s: float = ANSWER_S) -> Any | None:
        """The first answer of another replica that is not None, or None after ``timeout_s``. It raises nothing."""
        if self._handle is None:
            return None
        asked: list[asyncio.Task[Any]] = []
        try:
            async with asyncio.timeout(timeout_s):
                broadcast = self._handle.broadcast("tell_peer", self._replica, what, key, *args)
                # ``results_async`` waits for all replicas, also for one that hangs.
                results = await broadcast._fetch_replica_results_async()
                asked = [asyncio.create_task(self._answer(what, result)) for result in results]
                for earliest in asyncio.as_completed(asked):
                    if (answer := await earliest) is not None:
                        return answer
        except TimeoutError:
            logger.warning(f"Some ingress replica did not say within {timeout_s:g} s whether it has a {what}.")
        except Exception as error:  # Ray's, if no replica runs or Serve shuts down
            logger.warning(f"The other ingress replicas cannot be asked for a {what}: {error}")
        finally:
            for task in asked:
                task.cancel()
        return None

    @staticmethod
    async def _answer(what: str, result: Any) -> Any | None:
        try:
            return await result.get_async()
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # else the other's call was cancelled, which Ray raises here too
                raise
            logger.warning(f"An ingress replica that was asked for a {what} failed: {error!r}")
            return None

    async def tell(self, asker: str, what: str, key: str, *args: Any) -> Any | None:
        """Answer another replica. A broadcast also reaches its sender, which has looked already."""
        answer = self._offers.get(what)
        return None if asker == self._replica or answer is None else await answer(key, *args)
