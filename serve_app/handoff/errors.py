"""Errors that cross a stage, and the one place that maps Ray's failures to them.

::

    EPDError
    ├── ConfigError            at build time: the application is not started
    ├── CannotStart            a replica does not start; the message says why
    ├── BadRequest             an engine refused the request itself → 400
    ├── Overloaded             the ingress has enough to do → 503
    └── StageError             a stage failed a request; → 503 with the reason
        ├── StageUnavailable   no replica, replica died, queue full
        │   ├── EngineDead     the replica is there, its engine is not
        │   └── OtherVersion   the replica has other weights, or another configuration, than the request began with
        ├── HandoffLost        embeddings or KV blocks are gone
        └── StageTimeout       → 504

``ingress.vllm_errors`` turns them into vLLM's own exceptions, whose HTTP mapping the OpenAI app has already.
"""

from pydantic import ValidationError

from serve_app.stage import Stage


class EPDError(Exception):
    """Base of everything this package raises on purpose."""

    status = 500
    """The HTTP status of a request that ends with it."""


class ConfigError(EPDError):
    """A configuration that cannot run; the message names the key and what to do."""

    @classmethod
    def of(cls, error: ValidationError) -> "ConfigError":
        """One line per mistake: the key, and what is wrong with it."""
        mistakes = [
            f"{'.'.join(map(str, mistake['loc'])) or 'args'}: {mistake['msg'].removeprefix('Value error, ')}"
            for mistake in error.errors()
        ]
        return cls("The configuration under `args:` cannot be used.\n  " + "\n  ".join(mistakes))


class CannotStart(EPDError):
    """A replica does not start and would not at a second try; the message is a sentence that says why."""


class StageError(EPDError):
    """A stage could not do its part of one request."""

    status = 503

    def __init__(self, stage: Stage, message: str) -> None:
        super().__init__(stage, message)
        self.stage = stage
        self.message = message

    def __str__(self) -> str:
        return f"The {self.stage} stage {self.message}"


class StageUnavailable(StageError):
    """No replica took the call, or the one that did died."""


class EngineDead(StageUnavailable):
    """The engine of the replica is dead; Serve will replace the replica."""


class OtherVersion(StageUnavailable):
    """The replica refuses a request that began with another version, whose work it cannot continue."""

    def __init__(self, stage: Stage, message: str, replica: str = "", version: tuple[str, ...] = ()) -> None:
        super().__init__(stage, message)
        self.args = (stage, message, replica, version)  # what is pickled
        self.replica = replica
        self.version = version  # of the replica, as a ``handoff.types.Version``


class HandoffLost(StageError):
    """The embeddings or KV blocks of an earlier stage are gone. The request can be sent again."""


class StageTimeout(StageError):
    """The stage did not answer in time."""

    status = 504


class Overloaded(EPDError):
    """The ingress has as much under way as it takes. The answer has Retry-After."""

    status = 503


class BadRequest(EPDError):
    """An engine refused the request itself, and no retry helps."""

    status = 400
