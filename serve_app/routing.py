"""Calls of a stage over its Ray Serve handle: cancelled with their caller, and failing only with errors of ours.

Which replica takes a call is Ray's power-of-two choice: fewest calls in flight of two at random.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from weakref import WeakValueDictionary

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from serve_app.config import Stage
from serve_app.errors import EPDError, StageUnavailable

encoder_routers: WeakValueDictionary[str, RequestRouter] = WeakValueDictionary()
"""The routers of this process' Encoder handles, by application."""


class StageHandle:
    """The replicas of one stage, as the ingress sees them."""

    def __init__(self, stage: Stage, handle: DeploymentHandle[Any]) -> None:
        self.stage = stage
        self._unary = handle
        self._stream = handle.options(stream=True)

    @property
    def absent(self) -> bool:
        """Whether no replica takes calls now, so that a call would wait for one to start. Known of encoders only."""
        router = encoder_routers.get(self._unary.app_name) if self.stage is Stage.ENCODER else None
        return router is not None and not router.curr_replicas

    async def call(self, method: str, *args: Any) -> Any:
        """Call one replica. Cancelling the caller cancels the call, and with it the replica's engine request."""
        response = None
        try:
            response = getattr(self._unary, method).remote(*args)
            return await response
        except asyncio.CancelledError:
            if response is not None:
                response.cancel()
            raise
        except Exception as error:
            raise to_stage_error(self.stage, error) from error

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """Stream from one replica; closing the iterator early cancels the call."""
        response = None
        finished = False
        try:
            response = getattr(self._stream, method).remote(*args)
            async for item in response:
                yield item
            finished = True
        except Exception as error:
            finished = True
            raise to_stage_error(self.stage, error) from error
        finally:
            if response is not None and not finished:  # a stream from a handle has no aclose()
                response.cancel()

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
