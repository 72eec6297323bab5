"""The messages of a channel, and its frames: a count, that many lengths, that many buffers.

TCP keeps order and shows the end of a process at once; keep-alive shows the loss of a node within ``SILENT_S``.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from serve_app.handoff.types import ANY, Version

Output = TypeVar("Output")

COUNT = struct.Struct("<I")
MAX_BUFFERS = 1 << 20
SILENT_S = 20


class ReplyTo(msgspec.Struct, frozen=True):
    """Where an ingress replica takes the tokens of its requests, from whoever knows the secret."""

    host: str
    port: int
    secret: str


class Hello(msgspec.Struct):
    """The first frame of a decode replica."""

    secret: str
    replica: str


class First(msgspec.Struct, array_like=True, frozen=True):
    """What comes with the first tokens of a call."""

    key: str
    replica: str
    ran_s: float = 0.0
    """Seconds in the replica before them, less those in its engine's queue."""
    kv_s: float | None = None
    """Seconds until prefill's KV blocks were there; None if that cannot be told from the wait for a place in the engine."""
    version: Version = ANY
    """The version of the engine that makes them."""


class Frame(msgspec.Struct, Generic[Output], array_like=True):
    """The outputs of an engine's step, or of several, for one ingress replica."""

    outputs: list[Output]
    firsts: list[First] = []


def framed(buffers: Sequence[Any]) -> list[Any]:
    """The buffers as they go over the wire."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    return [struct.pack(f"<{len(views) + 1}I", len(views), *(view.nbytes for view in views)), *views]


async def receive(reader: asyncio.StreamReader, limit_bytes: int) -> list[bytearray]:
    """The buffers of the next frame. They are writable, as PyTorch warns of tensors over buffers that are not.

    Raises ``ValueError`` for a frame larger than the limit, before it is read, and ``IncompleteReadError`` at the end.
    """
    (count,) = COUNT.unpack(await reader.readexactly(COUNT.size))
    if count > MAX_BUFFERS:
        raise ValueError(f"a frame of {count} buffers")
    lengths = struct.unpack(f"<{count}I", await reader.readexactly(COUNT.size * count))
    if sum(lengths) > limit_bytes:
        raise ValueError(f"a frame of {sum(lengths)} bytes")
    return [bytearray(await reader.readexactly(length)) for length in lengths]


def tell_when_gone(sock: socket.socket, silent_s: int = SILENT_S) -> None:
    """Have the kernel end a connection whose other end, such as a node without power, has been silent for so long. The
    connections of a listening socket inherit this."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": silent_s // 4, "TCP_KEEPINTVL": silent_s // 4, "TCP_KEEPCNT": 3}
    for name, value in (options | {"TCP_USER_TIMEOUT": silent_s * 1000}).items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
