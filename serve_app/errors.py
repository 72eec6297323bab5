"""Errors that cross a stage, and the one place that maps Ray's failures to them.

::

    EPDError
    ├── ConfigError            at build time: the application is not started
    └── StageError             a stage failed a request; → 503 with the reason
        ├── StageUnavailable   no replica, replica died, queue full
        ├── HandoffLost        embeddings or KV blocks are gone
        └── StageTimeout       → 504

``client.py`` turns them into vLLM's own exceptions, whose HTTP mapping the OpenAI app has already.
"""

from serve_app.config import Stage


class EPDError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(EPDError):
    """A configuration that cannot run; the message names the key and what to do."""


class StageError(EPDError):
    """A stage could not do its part of one request.

    ``request_error`` marks a fault of the request itself (its message goes to the client with status 400).
    """

    status = 503

    def __init__(self, stage: Stage, message: str) -> None:
        super().__init__(stage, message)
        self.stage = stage
        self.message = message

    def __str__(self) -> str:
        return f"The {self.stage} stage {self.message}"


class StageUnavailable(StageError):
    """No replica took the call, or the one that did died."""


class HandoffLost(StageError):
    """What an earlier stage handed over is no longer there. The request can be sent again."""


class StageTimeout(StageError):
    """The stage did not answer in time."""

    status = 504


class BadRequest(EPDError):
    """An engine refused the request itself; status 400, and no retry helps."""
