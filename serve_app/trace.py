"""One request's way through the stages: who worked on it and for how long. Feeds the log line.

The middleware in ``openai_app.py`` opens a trace for each HTTP request; ``client.py`` finds it in the context and writes to
it. All times are seconds on ``time.perf_counter``.
"""

import asyncio
import contextvars
import time
from dataclasses import dataclass, field


@dataclass
class Trace:
    request_id: str
    began: float = field(default_factory=time.perf_counter)
    rendered: float | None = None
    """When the first engine call began; until then the ingress rendered: fetch, template, processor."""
    encoded: float | None = None
    prefilled: float | None = None
    first_token: float | None = None
    items: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    timeout_s: float | None = None
    """Deadline of this request from its beginning, where the client set one."""
    rungs: list[str] = field(default_factory=list)
    """Rungs of the failure ladder that ran, in order."""
    replicas: dict[str, list[str]] = field(default_factory=dict)
    """Stage → replicas that worked on the request."""
    error: Exception | None = None
    """The first failure of the pipeline, if any; it decides the HTTP status when nothing was sent yet."""
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first token or the first failure: from then on the status line is known."""

    def saw(self, stage: str, replica: str) -> None:
        seen = self.replicas.setdefault(stage, [])
        if replica not in seen:
            seen.append(replica)

    def rung(self, name: str) -> None:
        self.rungs.append(name)

    def token(self, count: int) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter()
            self.decided.set()
        self.output_tokens += count

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self.decided.set()

    def stage_times(self) -> dict[str, float]:
        """Seconds per stage of what has happened so far: render, encode, prefill, decode's first token."""
        marks = {
            "render": self.rendered,
            "encode": self.encoded,
            "prefill": self.prefilled,
            "first_token": self.first_token,
        }
        times, last = {}, self.began
        for name, mark in marks.items():
            if mark is not None:
                times[name], last = mark - last, mark
        return times

    def line(self, status: int | str) -> str:
        """The log line of the finished request."""
        times = " ".join(f"{name}={seconds * 1000:.1f}ms" for name, seconds in self.stage_times().items())
        who = " ".join(f"{stage}={','.join(replicas)}" for stage, replicas in self.replicas.items())
        total = (time.perf_counter() - self.began) * 1000
        rungs = f" rungs={','.join(self.rungs)}" if self.rungs else ""
        error = f' error="{self.error}"' if self.error is not None else ""
        return (
            (
                f"request={self.request_id} status={status} items={self.items} prompt_tokens={self.prompt_tokens} "
                f"output_tokens={self.output_tokens} {times} total={total:.1f}ms {who}"
            ).rstrip()
            + rungs
            + error
        )


current: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("epd_trace", default=None)
