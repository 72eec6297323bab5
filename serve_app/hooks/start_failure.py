"""The processes of an engine tell their replica why they do not start. ``launch.start_failure`` reads it there."""

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

REASON_ENV = "EPD_START_FAILURE"
"""Set by a replica while its engine starts, to a file in memory, which does not outlive a killed replica."""

STARTING = "failed to start"
"""Words of vLLM's log for an exception that ends an engine core or a worker (``tests/contracts/test_seams.py``)."""


class Told(NamedTuple):
    """An exception of an engine's process, with its ``causes``."""

    ends: bool
    """Whether it surely ended the start; a thread's exception may not."""
    errors: list[str]


class Teller(logging.Handler):
    """Tells the replica the exceptions that vLLM logs when a process of an engine does not start."""

    def __init__(self, memory: int) -> None:
        super().__init__(logging.ERROR)
        self._memory = memory

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and STARTING in record.getMessage():
            self._tell(True, record.exc_info[1])

    def of_threads(self, hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
        """A ``threading.excepthook`` that tells the replica before it calls ``hook``, which may end this process."""

        def told(args: threading.ExceptHookArgs) -> None:
            self._tell(False, args.exc_value)
            hook(args)

        return told

    def _tell(self, ends: bool, error: BaseException | None) -> None:
        with suppress(OSError):
            os.write(self._memory, json.dumps(Told(ends, causes(error))).encode() + b"\n")


def tell_replica() -> None:
    """Tell the replica the exception that ends this process if it does not start."""
    if REASON_ENV not in os.environ or multiprocessing.parent_process() is None:
        return
    with suppress(OSError):  # opened now: once the engine runs, the replica has given the number to another file
        teller = Teller(os.open(os.environ[REASON_ENV], os.O_WRONLY | os.O_APPEND))
        logging.getLogger("vllm").addHandler(teller)
        threading.excepthook = teller.of_threads(threading.excepthook)


def causes(error: BaseException | None) -> list[str]:
    """An exception and its causes, outermost first, as ``Type: message``."""
    found: list[str] = []
    while error is not None and len(found) < 8:
        found.append(f"{type(error).__name__}: {message(error)}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def message(error: BaseException) -> str:
    """Text of an exception; of pydantic's only the key and the mistake."""
    if not isinstance(error, ValidationError):
        return str(error)
    mistake = error.errors(include_url=False)[0]  # the others are mostly the other types that a value might have had
    text = mistake["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not mistake["loc"]:
        return text
    return f"`{mistake['loc'][0]}: {str(mistake['input'])[:80]}`: {text[:1].lower()}{text[1:]}"
