"""What a request is to its ingress replica: who sent it, by when it wants a token, what it holds, and how it went.

The middleware makes one for each HTTP request, and whatever works on the request finds it in the context. What was
measured on the way is its ``Trace``, which is only written to: nothing is decided by it.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from typing import TypeVar

from serve_app.handoff.errors import OtherVersion, StageTimeout
from serve_app.ingress.admission import Intake
from serve_app.ingress.sources import Sources
from serve_app.observe.trace import Trace
from serve_app.observe.tracing import OFF, Span
from serve_app.stage import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Deadline:
    """By when a request has its first token: a time of the event loop, and the seconds it had from the start."""

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float, spent: float = 0.0) -> "Deadline":
        """In so many seconds, of which some are spent."""
        return cls(asyncio.get_running_loop().time() + seconds - spent, seconds)

    @property
    def is_over(self) -> bool:
        return asyncio.get_running_loop().time() > self.at

    async def within(self, stage: Stage, work: Awaitable[T]) -> T:
        """The result of a stage's work. Raises ``StageTimeout`` where there is none by then."""
        try:
            async with asyncio.timeout_at(self.at):
                return await work
        except TimeoutError:
            raise StageTimeout(stage, f"did not answer within {self.seconds:g} s") from None

    def anew(self) -> "Deadline":
        return Deadline.after(self.seconds)


@dataclass
class Request:
    id: str
    span: InitVar[Span] = OFF
    """The span of the whole request. Each call of a stage makes a child of it."""
    trace: Trace = field(init=False)
    began: float = field(default_factory=time.perf_counter)
    timeout_s: float | None = None
    """Seconds from its beginning to its first token, where the client set a bound."""
    credentials: str = field(default="", repr=False)
    """The header `Authorization` that it came with: whose names of media are meant."""
    session: str | None = None
    """What its client calls the conversation."""
    priority: int = 0
    """vLLM's: a lower one is served earlier, by engines with ``scheduling_policy: priority``."""
    choices: int = 0
    """The number of choices that its prompts asked for so far."""
    weights: str = ""
    """The weights that made the output tokens. All choices need the same."""
    holds: ExitStack = field(default_factory=ExitStack)
    """What is given back at its end."""
    intake: Intake | None = None
    """The media that have arrived."""
    sources: Sources = field(default_factory=Sources)
    """The media that items of its prompts came from, from their rendering to its last token."""
    answered: bool = False
    """Whether there is an output token."""
    error: Exception | None = None
    """The first failure of the pipeline. It decides the HTTP status where nothing was sent yet."""
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first token or the first failure: from then on the status line is known."""

    def __post_init__(self, span: Span) -> None:
        self.trace = Trace(self.id, span, self.began)

    def deadline(self, limit_s: float) -> Deadline:
        """The deadline counts from the beginning, or from now where there are output tokens already: beam search calls
        ``generate`` for each beam of each step."""
        seconds = min(self.timeout_s or limit_s, limit_s)
        return Deadline.after(seconds, 0.0 if self.answered else time.perf_counter() - self.began)

    def token(self, count: int) -> None:
        """Count ``count`` more output tokens."""
        self.trace.token(count)
        if not self.answered:
            self.answered = True
            self.decided.set()

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = self.trace.error = error
        self.decided.set()

    def goes_on_with(self, weights: str) -> None:
        """More output tokens were made with these weights. Raises ``OtherVersion`` where others made those of a choice."""
        if self.weights and weights and self.weights != weights:
            raise OtherVersion(Stage.DECODE, "has other weights than what answered the rest of the request")
        self.weights = self.weights or weights


current: contextvars.ContextVar[Request | None] = contextvars.ContextVar("epd_request", default=None)
"""The request that is worked on."""
