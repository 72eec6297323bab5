"""One request's way through the stages: who worked on it and for how long. Feeds the log line and the metrics.

Whatever works on a request writes to its trace. Nothing but what tells of it reads it. All times are seconds on
``time.perf_counter``.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

from serve_app.handoff.types import Prompt
from serve_app.observe import tracing


@dataclass(frozen=True)
class Call:
    """One call of a stage that answered."""

    stage: str
    queue_s: float
    """That it waited, in queues and on the way."""
    ran_s: float


@dataclass
class Trace:
    request_id: str
    span: tracing.Span = tracing.OFF
    """Of the whole request; its children are made at each call of a stage."""
    began: float = field(default_factory=time.perf_counter)
    rendered: float | None = None
    """When the first engine call began; until then the ingress rendered: fetch, template, processor."""
    encoded_in_render: float = 0.0
    """Seconds of that for which encoders worked on items that went as media."""
    first_token: float | None = None
    last_token: float | None = None
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds by step (``encode``, ``prefill``, …): the longest of what runs at the same time or again."""
    by_item: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Seconds that an encoder worked on an item, 0 where its answer was remembered, and which replica gave it."""
    calls: list[Call] = field(default_factory=list)
    items: Counter[str] = field(default_factory=Counter)
    """Media items by modality."""
    remembered_items: int = 0
    """Of these, those that no encoder was asked for: its answer was remembered."""
    media_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that the first prefill of each prompt found in its cache."""
    choices: int = 0
    output_tokens: int = 0
    rungs: list[str] = field(default_factory=list)
    """Rungs of the failure ladder that ran, in order."""
    replicas: dict[str, list[str]] = field(default_factory=dict)
    """Stage → replicas that worked on the request."""
    error: Exception | None = None
    """The first failure of the pipeline, if any."""

    def saw(self, stage: str, replica: str) -> None:
        seen = self.replicas.setdefault(stage, [])
        if replica not in seen:
            seen.append(replica)

    def rung(self, name: str) -> None:
        self.rungs.append(name)
        self.span.event(name)

    def rungs_told(self) -> str:
        """Each rung once, as often as it ran: ``encode-again,prefill-again*2``. A request can have a thousand choices."""
        counted = Counter(self.rungs).items()
        return ",".join(f"{rung}*{count}" if count > 1 else rung for rung, count in counted)

    def generates(self, prompt: Prompt, choices: int) -> None:
        """A prompt is rendered, and ``choices`` of its answer are begun. A request may have several prompts."""
        self.items.update(item.modality for item in prompt.items)
        self.media_bytes += sum(item.size_bytes for item in prompt.items)
        self.prompt_tokens += len(prompt.token_ids)
        self.choices += choices
        if self.rendered is None:
            self.rendered = time.perf_counter()
            self.encoded_in_render = self.longest.get("encode", 0.0)

    def took(self, step: str, seconds: float) -> None:
        self.longest[step] = max(self.longest.get(step, 0.0), seconds)

    def moved(self, step: str, seconds: float | None) -> None:
        """What embeddings or KV blocks took on their way; nothing where none were, or nobody can tell."""
        if seconds:
            self.took(step, seconds)

    def encoded(self, item: int, ran_s: float, replica: str) -> None:
        self.by_item[item] = (ran_s, replica)

    def called(self, stage: str, took_s: float, ran_s: float) -> None:
        """A call of a stage answered; its replica worked on it for ``ran_s``, the rest it waited."""
        self.calls.append(Call(stage, max(took_s - ran_s, 0.0), ran_s))
        self.took(f"{stage} queue", self.calls[-1].queue_s)

    def token(self, count: int) -> None:
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        self.output_tokens += count

    def dropped(self, count: int) -> None:
        """So many output tokens will not be sent."""
        self.output_tokens -= count

    def per_output_token(self) -> float | None:
        """Seconds per token of a choice after its first; None where no choice has a second."""
        more = self.output_tokens - self.choices
        if self.first_token is None or self.last_token is None or more <= 0:
            return None
        return (self.last_token - self.first_token) * max(self.choices, 1) / more

    def stage_times(self) -> dict[str, float]:
        """Seconds of what has happened so far, one after the other: render, queue, encode, EC transfer, prefill, KV
        transfer, first token.

        ``queue`` is what calls of the stages waited, in queues and on the way; the other steps are without it. Items that
        go as media are encoded while the prompt is rendered, which ``render`` does not count. Prefill reads embeddings
        within its call. Decode's engine pulls KV blocks before it schedules a request, in its queue as vLLM counts.
        """
        waits = {stage: self.longest.get(f"{stage} queue", 0.0) for stage in ("encoder", "prefill", "decode")}
        ec, kv = (self.longest.get(step, 0.0) for step in ("ec_transfer", "kv_transfer"))
        times: dict[str, float] = {}
        if self.rendered is not None:
            times["render"] = max(self.rendered - self.began - self.encoded_in_render, 0.0)
        if any(waits.values()):
            times["queue"] = max(sum(waits.values()) - kv, 0.0)
        less = {"encode": waits["encoder"], "ec_transfer": 0.0, "prefill": waits["prefill"] + ec, "kv_transfer": 0.0}
        for step, counted in less.items():
            if step in self.longest:
                times[step] = max(self.longest[step] - counted, 0.0)
        if self.first_token is not None:
            times["first_token"] = max(self.first_token - self.began - sum(times.values()), 0.0)
        return times

    def line(self, status: int | str) -> str:
        """The log line of the finished request."""
        times = " ".join(f"{name}={seconds * 1000:.1f}ms" for name, seconds in self.stage_times().items())
        who = " ".join(f"{stage}={','.join(replicas)}" for stage, replicas in self.replicas.items())
        total = (time.perf_counter() - self.began) * 1000
        rungs = f" rungs={self.rungs_told()}" if self.rungs else ""
        error = f' error="{self.error}"' if self.error is not None else ""
        return (
            (
                f"request={self.request_id} status={status} items={self.items.total()} prompt_tokens={self.prompt_tokens} "
                f"output_tokens={self.output_tokens} {times} total={total:.1f}ms {who}"
            ).rstrip()
            + rungs
            + error
        )
