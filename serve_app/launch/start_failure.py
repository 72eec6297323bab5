"""Why an engine does not start, from its processes to its replica.

vLLM's front end says "Engine core initialization failed. See root cause above": the cause is in the log of another process.
Here the processes of an engine tell it to their replica, which raises ``CannotStart``; Ray Serve's status carries its text
to `make serve`, `serve status` and `/health`.
"""

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from serve_app.handoff.errors import CannotStart, EPDError
from serve_app.launch.start_reason import causes, reason

logger = logging.getLogger("ray.serve")

REASON_ENV = "EPD_START_FAILURE"
"""Set by a replica while its engine starts, to a file in memory: no file on a disk outlives a replica that is killed."""

STARTING = "failed to start"
"""What vLLM's log says of an exception that ends an engine core or a worker (``tests/contracts/test_vllm.py``)."""


class Told(NamedTuple):
    """An exception of an engine's process: itself and its causes, outermost first, as ``Type: message``."""

    ends: bool
    """Whether it ended the start. Of others, a thread's, one cannot know."""
    errors: list[str]


# ---- in the replica


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


# ---- in the processes of its engine


class Teller(logging.Handler):
    """Tells the replica of the exceptions that vLLM logs when a process of an engine does not start."""

    def __init__(self, memory: int) -> None:
        super().__init__(logging.ERROR)
        self._memory = memory

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and STARTING in record.getMessage():
            self._tell(True, record.exc_info[1])

    def of_threads(self, hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
        """A ``threading.excepthook`` that tells too, before ``hook``: that may end this process."""

        def told(args: threading.ExceptHookArgs) -> None:
            self._tell(False, args.exc_value)
            hook(args)

        return told

    def _tell(self, ends: bool, error: BaseException | None) -> None:
        with suppress(OSError):
            os.write(self._memory, json.dumps(Told(ends, causes(error))).encode() + b"\n")


def tell_replica() -> None:
    """Tell the replica that started this process of the exception that ends it, should it not start."""
    if REASON_ENV not in os.environ or multiprocessing.parent_process() is None:
        return
    with suppress(OSError):  # opened now: once the engine runs, the replica has given the number to another file
        teller = Teller(os.open(os.environ[REASON_ENV], os.O_WRONLY | os.O_APPEND))
        logging.getLogger("vllm").addHandler(teller)
        threading.excepthook = teller.of_threads(threading.excepthook)
