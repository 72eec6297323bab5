"""The decode replica's end of a channel: it sends its engine's outputs in frames to the ingress that asked for them.

While the connection of a slow ingress takes no more, outputs are added up per request: its frames have more tokens, and
nobody else waits.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import msgspec

from serve_app.channel.wire import First, Frame, Hello, Output, ReplyTo, framed, receive, tell_when_gone
from serve_app.handoff.errors import StageUnavailable
from serve_app.stage import Stage

CONNECT_S = 5.0
STUCK_S = 15.0
"""Seconds in which an ingress takes nothing, before its connection ends. The kernel would end it after ``SILENT_S``."""
WAITING_BYTES = 256 << 20
"""Size of outputs that cannot be added up (logprobs) and wait for one ingress, before its connection ends."""
ABORTS_BYTES = 1 << 20


@dataclass(frozen=True)
class Codec(Generic[Output]):
    """What a channel has to know of the outputs that it carries."""

    encode: Callable[[Frame[Output]], Sequence[Any]]
    """Makes the buffers of a frame."""
    add: Callable[[list[Output], Output], int]
    """Adds an output to the waiting ones of its request; returns by how many bytes they grow, 0 if only by tokens."""


class Outlet(Generic[Output]):
    """The connection to one ingress replica. ``keys``: the calls under way whose outputs go there."""

    def __init__(
        self,
        codec: Codec[Output],
        interval_s: float,
        abort: Callable[[list[str]], Awaitable[None]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """``abort`` ends calls by their keys: those that the ingress names and, once it is gone, all that are under way."""
        self._writer = writer
        self._codec = codec
        self._interval_s = interval_s
        self._abort = abort
        self._waiting: dict[str, list[Output]] = {}
        self._firsts: list[First] = []
        self._waiting_bytes = 0
        self._urgent = False
        self._due = 0.0
        self._wake = asyncio.Event()
        self.keys: set[str] = set()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._hear(reader))]

    @property
    def gone(self) -> bool:
        return self._writer.is_closing()

    @contextmanager
    def call(self, key: str) -> Iterator[None]:
        """A call under way, whose outputs may be put. Raises ``StageUnavailable`` if its key is under way already, or the
        ingress is gone."""
        if key in self.keys:
            raise StageUnavailable(Stage.DECODE, "works on the request already: Ray Serve sent it twice")
        if self.gone:
            raise StageUnavailable(Stage.DECODE, "has lost the ingress that asked")
        self.keys.add(key)
        try:
            yield
        finally:
            self.keys.discard(key)

    def put(self, key: str, output: Output, first: First | None = None, last: bool = False) -> None:
        """Keep an output for the next frame. The first and the last of a call make it due with the next ``flush``."""
        if self.gone:
            return
        self._waiting_bytes += self._codec.add(self._waiting.setdefault(key, []), output)
        if first is not None:
            self._firsts.append(first)
        self._urgent |= last or first is not None
        if self._waiting_bytes > WAITING_BYTES:
            self.hang_up()

    def flush(self) -> None:
        """Called after each step of the engine: there is no timer, the first step after the interval sends a frame."""
        if self._waiting and (self._urgent or time.monotonic() >= self._due):
            self._wake.set()

    def hang_up(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        """End the connection once the kernel has everything that was put."""
        with suppress(OSError, TimeoutError):
            if self._waiting and not self.gone:
                await self._send_waiting()
            async with asyncio.timeout(STUCK_S):
                await self._writer.drain()
        self._writer.close()

    async def _send(self) -> None:
        self._writer.transport.set_write_buffer_limits(0)  # `drain` then waits until the kernel has all
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._send_waiting()
        except (OSError, TimeoutError):
            pass
        finally:
            self.hang_up()

    async def _send_waiting(self) -> None:
        frame = Frame(list(itertools.chain.from_iterable(self._waiting.values())), self._firsts)
        self._waiting, self._firsts, self._waiting_bytes, self._urgent = {}, [], 0, False
        self._due = time.monotonic() + self._interval_s
        self._writer.writelines(framed(self._codec.encode(frame)))
        async with asyncio.timeout(STUCK_S):
            await self._writer.drain()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (keys,) = await receive(reader, ABORTS_BYTES)
                await self._abort([key for key in msgspec.msgpack.decode(keys, type=list[str]) if key in self.keys])
        except (OSError, EOFError, ValueError, msgspec.MsgspecError):
            pass
        finally:
            self.hang_up()
            self._tasks[0].cancel()
            if self.keys:
                await self._abort(list(self.keys))


class Outlets(Generic[Output]):
    """The channels of one decode replica, by ingress replica."""

    def __init__(
        self, replica: str, codec: Codec[Output], interval_s: float, abort: Callable[[list[str]], Awaitable[None]]
    ) -> None:
        """``interval_s``: least time between two frames, unless one is urgent."""
        self._replica = replica
        self._outlet = partial(Outlet[Output], codec, interval_s, abort)
        self._made: dict[ReplyTo, Outlet[Output]] = {}
        self._connecting: dict[ReplyTo, asyncio.Task[Outlet[Output]]] = {}

    async def to(self, reply_to: ReplyTo) -> Outlet[Output]:
        """The connection to an ingress, made if need be. Raises ``StageUnavailable`` where nobody listens."""
        if (made := self._made.get(reply_to)) is not None and not made.gone:
            return made
        if (connecting := self._connecting.get(reply_to)) is None:
            connecting = self._connecting[reply_to] = asyncio.create_task(self._connect(reply_to))
            connecting.add_done_callback(lambda _: self._connecting.pop(reply_to, None))
        try:
            return await asyncio.shield(connecting)
        except (OSError, TimeoutError) as error:
            what = f"cannot reach the ingress that asked, at {reply_to.host}:{reply_to.port}: {error!r}"
            raise StageUnavailable(Stage.DECODE, what) from error

    async def _connect(self, reply_to: ReplyTo) -> Outlet[Output]:
        self._made = {key: made for key, made in self._made.items() if not made.gone}
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(reply_to.host, reply_to.port)
        tell_when_gone(writer.get_extra_info("socket"))
        writer.writelines(framed([msgspec.msgpack.encode(Hello(reply_to.secret, self._replica))]))
        made = self._made[reply_to] = self._outlet(reader, writer)
        return made

    def flush(self) -> None:
        for made in self._made.values():
            made.flush()

    async def close(self) -> None:
        """Send the last tokens of calls, before the replica ends."""
        for made in self._made.values():
            await made.close()
