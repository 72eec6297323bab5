"""The end of a channel at a decode replica: what its engine puts out goes on in frames, to the ingress that asked for it.

An ingress that reads slowly gets more tokens per frame, and holds up nobody: while its connection takes no more, outputs
are added up per request.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic

import msgspec

from serve_app.channel.wire import First, Frame, Hello, Output, ReplyTo, framed, receive, tell_when_gone
from serve_app.handoff.errors import StageUnavailable
from serve_app.stage import Stage

CONNECT_S = 5.0
STUCK_S = 15.0
"""An ingress that has taken nothing for so long is hung up on. Less than ``SILENT_S``, by which the kernel would."""
WAITING_BYTES = 256 << 20
"""Of outputs that cannot be added up (logprobs), for one ingress. With more it is hung up on."""
ABORTS_BYTES = 1 << 20


@dataclass(frozen=True)
class Codec(Generic[Output]):
    """What a channel has to know of the outputs that it carries."""

    encode: Callable[[Frame[Output]], Sequence[Any]]
    """The buffers of a frame."""
    add: Callable[[list[Output], Output], int]
    """Adds an output to those of its request that wait; returns the bytes that these take more, 0 where it was added to the
    last one's tokens."""


class Outlet(Generic[Output]):
    """The connection to one ingress replica. ``keys``: the calls under way whose outputs go there."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        codec: Codec[Output],
        interval_s: float,
        abort: Callable[[list[str]], Awaitable[None]],
    ) -> None:
        """``abort`` ends calls by their keys: those that the ingress names and, where it is gone, all that are under way."""
        self._reader = reader
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
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._hear())]

    @property
    def gone(self) -> bool:
        return self._writer.is_closing()

    @contextmanager
    def call(self, key: str) -> Iterator[None]:
        """While it is under way its outputs may be put. Raises ``StageUnavailable`` where the key is under way already, or
        the ingress is gone."""
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
        """Outputs go with ``flush``. The first and the last of a call make it due."""
        if self.gone:
            return
        self._waiting_bytes += self._codec.add(self._waiting.setdefault(key, []), output)
        if first is not None:
            self._firsts.append(first)
        self._urgent |= last or first is not None
        if self._waiting_bytes > WAITING_BYTES:
            self.hang_up()

    def flush(self) -> None:
        """After each step of the engine. There is no timer: what waits goes on with the first step after the interval."""
        if self._waiting and (self._urgent or time.monotonic() >= self._due):
            self._wake.set()

    def hang_up(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        """Hang up once the kernel has everything that was put."""
        with suppress(OSError, TimeoutError):
            if self._waiting and not self.gone:
                await self._send_waiting()
            async with asyncio.timeout(STUCK_S):
                await self._writer.drain()
        self._writer.close()

    async def _send(self) -> None:
        self._writer.transport.set_write_buffer_limits(0)  # drained is what the kernel has
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
        outputs = [output for waiting in self._waiting.values() for output in waiting]
        frame = Frame(outputs, self._firsts)
        self._waiting, self._firsts, self._waiting_bytes, self._urgent = {}, [], 0, False
        self._due = time.monotonic() + self._interval_s
        self._writer.writelines(framed(self._codec.encode(frame)))
        async with asyncio.timeout(STUCK_S):
            await self._writer.drain()

    async def _hear(self) -> None:
        try:
            while True:
                (keys,) = await receive(self._reader, ABORTS_BYTES)
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
        """``interval_s``: between two frames, unless one is urgent."""
        self._replica = replica
        self._codec = codec
        self._interval_s = interval_s
        self._abort = abort
        self._made: dict[ReplyTo, Outlet[Output]] = {}
        self._connecting: dict[ReplyTo, asyncio.Task[Outlet[Output]]] = {}

    async def to(self, reply_to: ReplyTo) -> Outlet[Output]:
        """Raises ``StageUnavailable`` where nobody listens."""
        made = self._made.get(reply_to)
        if made is not None and not made.gone:
            return made
        connecting = self._connecting.get(reply_to)
        if connecting is None:
            connecting = self._connecting[reply_to] = asyncio.create_task(self._connect(reply_to))
            connecting.add_done_callback(lambda _: self._connecting.pop(reply_to, None))
        try:
            return await asyncio.shield(connecting)
        except (OSError, TimeoutError) as error:
            where = f"{reply_to.host}:{reply_to.port}"
            raise StageUnavailable(
                Stage.DECODE, f"cannot reach the ingress that asked, at {where}: {error!r}"
            ) from error

    async def _connect(self, reply_to: ReplyTo) -> Outlet[Output]:
        self._made = {key: made for key, made in self._made.items() if not made.gone}
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(reply_to.host, reply_to.port)
        tell_when_gone(writer.get_extra_info("socket"))
        writer.writelines(framed([msgspec.msgpack.encode(Hello(reply_to.secret, self._replica))]))
        made = self._made[reply_to] = Outlet(reader, writer, self._codec, self._interval_s, self._abort)
        return made

    def flush(self) -> None:
        for made in self._made.values():
            made.flush()

    async def close(self) -> None:
        """Before the replica ends: the last tokens of its calls are on their way."""
        for made in self._made.values():
            await made.close()
