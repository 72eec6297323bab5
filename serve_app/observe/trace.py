"""A request's trace: which replicas worked on it and for how long, for the log line, headers and metrics.

Whatever works on a request writes to its trace; no control flow reads it. All times are seconds on ``time.perf_counter``.
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
    """Seconds that it waited, in queues and on the way."""
    ran_s: float


@dataclass
class Trace:
    request_id: str
    span: tracing.Span = tracing.OFF
    """The span of the whole request. Each call of a stage makes a child."""
    began: float = field(default_factory=time.perf_counter)
    rendered: float | None = None
    """End of rendering (fetch, template, processor), when the first call of an engine began."""
    encoded_in_render: float = 0.0
    """Seconds of rendering in which encoders worked on items that went as media."""
    first_token: float | None = None
    last_token: float | None = None
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds by step (``encode``, ``prefill``, …): the longest of calls that run at the same time or again."""
    by_item: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Seconds that an encoder worked on an item, 0 if its answer was remembered, and the encoder's replica."""
    calls: list[Call] = field(default_factory=list)
    items: Counter[str] = field(default_factory=Counter)
    """Media items by modality."""
    remembered_items: int = 0
    """Items for which an encoder's earlier answer was remembered."""
    media_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the first prefill of each prompt found in its cache."""
    expected: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Stage → tokens of prompts that its replicas were expected to have in their caches, and those that they had."""
    unencoded_items: int = 0
    """Items that were not encoded, as their tokens were expected in a cache."""
    choices: int = 0
    output_tokens: int = 0
    rungs: list[str] = field(default_factory=list)
    """Rungs of the failure ladder that ran, in order."""
    replicas: dict[str, list[str]] = field(default_factory=dict)
    """Stage → replicas that worked on the request."""
    error: Exception | None = None
    """The first failure of the pipeline."""

    def saw(self, stage: str, replica: str) -> None:
        seen = self.replicas.setdefault(stage, [])
        if replica not in seen:
            seen.append(replica)

    def rung(self, name: str) -> None:
        self.rungs.append(name)
        self.span.event(name)

    def rungs_told(self) -> str:
        """Each rung with how often it ran: ``encode-again,prefill-again*2``. A request can have a thousand choices."""
        counted = Counter(self.rungs).items()
        return ",".join(f"{rung}*{count}" if count > 1 else rung for rung, count in counted)

    def generates(self, prompt: Prompt, choices: int) -> None:
        """One of the request's prompts is rendered, and ``choices`` of its answer begin."""
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
        """Embeddings or KV blocks were transferred; 0 or None if there were none, or the time is unknown."""
        if seconds:
            self.took(step, seconds)

    def found(self, stage: str, expected: int, got: int) -> None:
        """A replica has told how many tokens of a prompt it had in its cache."""
        before = self.expected.get(stage, (0, 0))
        self.expected[stage] = before[0] + expected, before[1] + got

    def encoded(self, item: int, ran_s: float, replica: str) -> None:
        self.by_item[item] = (ran_s, replica)

    def called(self, stage: str, took_s: float, ran_s: float) -> None:
        """A call of a stage has answered: its replica worked on it for ``ran_s``, and the rest it waited."""
        self.calls.append(Call(stage, max(took_s - ran_s, 0.0), ran_s))
        self.took(f"{stage} queue", self.calls[-1].queue_s)

    def token(self, count: int) -> None:
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        self.output_tokens += count

    def dropped(self, count: int) -> None:
        """Output tokens that were counted will not be sent."""
        self.output_tokens -= count

    def per_output_token(self) -> float | None:
        """Seconds per token of a choice after its first; None where no choice has a second."""
        more = self.output_tokens - self.choices
        if self.first_token is None or self.last_token is None or more <= 0:
            return None
        return (self.last_token - self.first_token) * max(self.choices, 1) / more

    def stage_times(self) -> dict[str, float]:
        """Seconds of the steps so far: render, queue, encode, EC transfer, prefill, KV transfer, first token.

        ``queue`` is what calls of the stages waited, in queues and on the way; no other step includes it. ``render`` leaves
        out encodes of media meanwhile, and ``prefill`` its read of embeddings. Decode's engine pulls KV blocks while the
        request is in its queue, as vLLM counts, so ``queue`` leaves out their transfer.
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
        left = f" unencoded_items={self.unencoded_items}" if self.unencoded_items else ""
        rungs = f" rungs={self.rungs_told()}" if self.rungs else ""
        error = f' error="{self.error}"' if self.error is not None else ""
        line = (
            f"request={self.request_id} status={status} items={self.items.total()} prompt_tokens={self.prompt_tokens} "
            f"cached_tokens={self.cached_tokens} output_tokens={self.output_tokens} {times} total={total:.1f}ms {who}"
        )
        return line.rstrip() + left + rungs + error
