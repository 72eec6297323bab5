"""Calls of a stage over its Ray Serve handle: cancelled with their caller, and failing only with errors of ours.

Which replica takes a call is Ray's power-of-two choice: fewest calls in flight of two at random.
"""

import asyncio
import contextvars
import pickle
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from serve_app.admission import size_of
from serve_app.config import Stage
from serve_app.errors import EPDError, StageUnavailable
from serve_app.handoff import MediaRequest, StageRequest

encoder_routers: WeakValueDictionary[str, RequestRouter] = WeakValueDictionary()
"""The routers of this process' Encoder handles, by application."""


LIGHT_BYTES = 1 << 20
"""Ray Serve's gRPC transport takes messages of 4 MiB (``RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH``)."""


def is_light(argument: Any) -> bool:
    """Whether a call may go straight to the replica by gRPC, which costs half of a call through Ray's object store.

    Pixels, media and logprobs, whose answers can be large, go through the object store.
    """
    match argument:
        case StageRequest(prompt=prompt, params=params):
            if params.logprobs is not None or params.prompt_logprobs is not None:
                return False
            size = 8 * len(prompt.token_ids) + sum(map(size_of, prompt.items))
            return size <= LIGHT_BYTES and size + len(pickle.dumps(params)) <= LIGHT_BYTES
        case MediaRequest(media=media):
            return len(media.data) <= LIGHT_BYTES
    return True


SILENT_S = 30.0
"""After so long without an item a stream asks Ray whether its replica still lives."""


@dataclass(eq=False)
class _Stream:
    response: Any
    replica: str = ""
    seen: float = 0.0
    lost: bool = False


class StageHandle:
    """The replicas of one stage, as the ingress sees them."""

    def __init__(self, stage: Stage, handle: DeploymentHandle[Any]) -> None:
        self.stage = stage
        self._unary = handle
        self._stream = handle.options(stream=True)
        self._light = handle.options(_by_reference=False)
        self._light_stream = handle.options(stream=True, _by_reference=False)
        self._streams: set[_Stream] = set()
        self._watching: asyncio.Task[None] | None = None

    @property
    def absent(self) -> bool:
        """Whether no replica takes calls now, so that a call would wait for one to start. Known of encoders only."""
        router = encoder_routers.get(self._unary.app_name) if self.stage is Stage.ENCODER else None
        return router is not None and not router.curr_replicas

    async def call(self, method: str, *args: Any) -> Any:
        """Call one replica. Cancelling the caller cancels the call, and with it the replica's engine request."""
        response = None
        try:
            handle = self._light if all(map(is_light, args)) else self._unary
            response = getattr(handle, method).remote(*args)
            return await response
        except asyncio.CancelledError:
            if response is not None:
                response.cancel()
            raise
        except Exception as error:
            raise to_stage_error(self.stage, error) from error

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[tuple[Any, str]]:
        """Stream from one replica, whose id comes with each item; closing the iterator early cancels the call."""
        stream = None
        finished = False
        try:
            handle = self._light_stream if all(map(is_light, args)) else self._stream
            stream = _Stream(getattr(handle, method).remote(*args))
            async for item in stream.response:
                stream.replica, stream.seen = item[1], time.monotonic()
                self._watch(stream)
                yield item
            finished = True
        except (Exception, asyncio.CancelledError) as error:
            if stream is not None and stream.lost:
                failure: Exception = RayActorError()
            elif isinstance(error, Exception):
                failure = error
            else:
                raise
            finished = True
            raise to_stage_error(self.stage, failure) from error
        finally:
            if stream is not None:
                self._streams.discard(stream)
                if not finished:  # a stream from a handle has no aclose()
                    stream.response.cancel()

    def _watch(self, stream: "_Stream") -> None:
        """Notice when the replica of a stream is gone without a word.

        Where a process ends, its connection says so. Where a node loses power or its network nothing does for minutes (the
        keepalive of Ray's gRPC clients: 300 s and 120 s). Ray knows earlier, so a stream that has been silent asks Ray.
        """
        self._streams.add(stream)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._ask_ray(), context=contextvars.Context())

    async def _ask_ray(self) -> None:
        while self._streams:
            await asyncio.sleep(SILENT_S / 2)
            since = time.monotonic() - SILENT_S
            for stream in [stream for stream in self._streams if stream.seen < since and not stream.lost]:
                if not await asyncio.to_thread(self._is_alive, stream.replica):
                    stream.lost = True
                    stream.response.cancel()

    def _is_alive(self, replica: str) -> bool:
        actor = ReplicaID(replica, DeploymentID(self._unary.deployment_name, self._unary.app_name)).to_full_id_str()
        try:
            ray.get_actor(actor, namespace=SERVE_NAMESPACE)
        except ValueError:
            return False
        return True

    async def broadcast(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[Any]:
        """Call every replica; one result or exception of each."""
        response = self._unary.broadcast(method, *args)
        try:
            results = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except Exception as error:
            raise to_stage_error(self.stage, error) from error
        return [to_stage_error(self.stage, r) if isinstance(r, Exception) else r for r in results]


def to_stage_error(stage: Stage, error: Exception) -> EPDError:
    """The error of ours for whatever a handle raised."""
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        return (
            cause
            if isinstance(cause, EPDError)
            else StageUnavailable(stage, f"failed: {type(cause).__name__}: {cause}")
        )
    match error:
        case EPDError():
            return error
        case BackPressureError():
            return StageUnavailable(stage, "is full: its queue takes no more requests now")
        case DeploymentUnavailableError():
            return StageUnavailable(stage, "could not be deployed: see `serve status`")
        case TaskCancelledError():
            return StageUnavailable(stage, "cancelled the request")
        case RayActorError():
            return StageUnavailable(stage, "lost the replica that worked on the request")
        case RayError() | RayServeException() | TimeoutError():
            return StageUnavailable(stage, f"did not answer: {type(error).__name__}")
        case _:
            return StageUnavailable(stage, f"failed: {type(error).__name__}: {error}")
