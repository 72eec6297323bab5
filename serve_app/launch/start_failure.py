"""Raise in a replica why its engine does not start.

vLLM's front end says "Engine core initialization failed. See root cause above", which is in the log of another process. Here
the processes of an engine tell their replica the cause (``hooks.start_failure``), and it raises ``CannotStart``. Ray Serve's
status carries the text to `make serve`, `serve status` and `/health`.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.handoff.errors import CannotStart, EPDError
from serve_app.hooks.start_failure import REASON_ENV, Told, causes
from serve_app.launch.start_reason import reason

logger = logging.getLogger("ray.serve")


class EngineFailed(Exception):
    """An engine did not start. ``errors``: the exceptions that its processes told."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(errors[0])
        self.errors = errors

    @property
    def port_taken(self) -> bool:
        """Whether another program took a port that had been free: with another one the engine starts."""
        return any("Address already in use" in error for error in self.errors)


@contextmanager
def hears_engine() -> Iterator[None]:
    """Wraps the start of an engine. Raises ``EngineFailed`` if its processes tell why it failed."""
    memory = os.memfd_create("epd-start-failure")
    os.environ[REASON_ENV] = f"/proc/{os.getpid()}/fd/{memory}"
    try:
        yield
    except Exception:
        if (errors := _root(memory)) is not None:
            raise EngineFailed(errors) from None
        raise
    finally:
        del os.environ[REASON_ENV]
        os.close(memory)


@contextmanager
def says_why(who: str, model: str) -> Iterator[None]:
    """Raise any error of the block as ``CannotStart``."""
    try:
        yield
    except EPDError as error:
        raise CannotStart(f"{who} cannot start: {error}") from None
    except EngineFailed as error:
        raise CannotStart(f"{who} cannot start: {reason(error.errors, model)}.") from None
    except Exception as error:
        logger.exception(f"{who} cannot start")  # nobody else has logged it
        raise CannotStart(f"{who} cannot start: {reason(causes(error), model)}.") from None


def _root(memory: int) -> list[str] | None:
    """The first error that ended a process, else the first: workers end before the engine core that waits for them."""
    lines = os.pread(memory, os.fstat(memory).st_size, 0).splitlines()
    told = [Told(*json.loads(line)) for line in lines]
    return min(told, key=lambda each: not each.ends).errors if told else None
