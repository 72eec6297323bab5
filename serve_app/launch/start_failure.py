"""Why an engine does not start, from its processes to its replica.

vLLM's front end says "Engine core initialization failed. See root cause above": the cause is in the log of another process.
Here the processes of an engine tell it (``hooks.start_failure``) to their replica, which raises ``CannotStart``; Ray
Serve's status carries its text to `make serve`, `serve status` and `/health`.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve_app.handoff.errors import CannotStart, EPDError
from serve_app.hooks.start_failure import REASON_ENV, Told, causes
from serve_app.launch.start_reason import reason

logger = logging.getLogger("ray.serve")


class EngineFailed(Exception):
    """An engine did not start; ``errors`` is what its processes told of it."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(errors[0])
        self.errors = errors

    @property
    def port_taken(self) -> bool:
        """Another program was faster at a port that had been free: with another one the engine starts."""
        return any("Address already in use" in error for error in self.errors)


@contextmanager
def hears_engine() -> Iterator[None]:
    """Around the start of an engine. Raises ``EngineFailed`` where its processes tell why it failed."""
    memory = os.memfd_create("epd-start-failure")
    os.environ[REASON_ENV] = f"/proc/{os.getpid()}/fd/{memory}"
    try:
        yield
    except Exception:
        if (errors := _root(_read(memory))) is not None:
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


def _read(memory: int) -> list[Told]:
    lines = os.pread(memory, os.fstat(memory).st_size, 0).decode().splitlines()
    return [Told(*json.loads(line)) for line in lines]


def _root(told: Sequence[Told]) -> list[str] | None:
    """Workers end before the engine core that waits for them: the first is the cause of the others."""
    return next((each.errors for each in sorted(told, key=lambda each: not each.ends)), None)
