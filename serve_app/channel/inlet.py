"""The ingress replica's end of a channel: it listens for decode replicas, and takes those that know its secret."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from typing import Any, Generic

import msgspec

from serve_app.channel.wire import Frame, Hello, Output, ReplyTo, framed, receive, tell_when_gone

logger = logging.getLogger("ray.serve")

FRAME_BYTES = 1 << 30
HELLO_BYTES = 4096
HELLO_S = 5.0


class Link:
    """The connection of one decode replica."""

    def __init__(self, replica: str, writer: asyncio.StreamWriter) -> None:
        self.replica = replica
        self._writer = writer

    def abort(self, keys: list[str]) -> None:
        """Have the replica end calls whose tokens nobody reads any more."""
        if not self._writer.is_closing():
            self._writer.writelines(framed([msgspec.msgpack.encode(keys)]))


class Inlet(Generic[Output]):
    """Receives the tokens of all requests of one ingress replica."""

    def __init__(
        self,
        decode: Callable[[list[bytearray]], Frame[Output]],
        received: Callable[[Link, Frame[Output]], None],
        lost: Callable[[Link], None],
    ) -> None:
        """``decode`` makes a frame of its buffers, ``received`` takes each frame; where either fails, the link ends.
        ``lost`` is called once for each link that ends."""
        self._decode = decode
        self._received = received
        self._lost = lost
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self.reply_to = ReplyTo("", 0, secrets.token_hex(16))
        """The address to put into calls whose tokens are to come here."""

    async def listen(self, host: str) -> None:
        """Listen on a free port of an address of this node."""
        self._server = await asyncio.start_server(self._connected, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self.reply_to = msgspec.structs.replace(self.reply_to, host=host, port=port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        self._connections[task] = writer
        link: Link | None = None
        try:
            tell_when_gone(writer.get_extra_info("socket"))
            async with asyncio.timeout(HELLO_S):
                (words,) = await receive(reader, HELLO_BYTES)
            hello = msgspec.msgpack.decode(words, type=Hello)
            if not hmac.compare_digest(hello.secret.encode(), self.reply_to.secret.encode()):
                logger.warning(f"somebody at {writer.get_extra_info('peername')} brought tokens with a wrong secret")
                return
            link = Link(hello.replica, writer)
            while True:
                self._received(link, self._decode(await receive(reader, FRAME_BYTES)))
        except (OSError, EOFError, TimeoutError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning(f"the channel from {writer.get_extra_info('peername')} says what it cannot: {error}")
        finally:
            del self._connections[task]
            writer.transport.abort()
            if link is not None:
                self._lost(link)
