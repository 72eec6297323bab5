"""What an ingress replica tells Ray of its requests, each stage's share apart: ``ray_epd_*`` on Ray's metrics port.

Fed from a request's ``Trace`` when it ends, so nothing is counted per token. Ray adds ``application``, ``deployment`` (here:
the ingress) and ``replica``. What engines count by themselves reaches Ray through ``engine_metrics.py``.
"""

from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.admission import Admission
from serve_app.gauges import Gauges
from serve_app.trace import Trace

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0]


class IngressMetrics:
    """One object per ingress replica."""

    def __init__(self) -> None:
        def seconds(name: str, what: str, *tags: str) -> Histogram:
            return Histogram(name, f"Seconds {what}", SECONDS, tags)

        self._queue = seconds("epd_queue_seconds", "that a call of a stage waited, in queues and on the way.", "stage")
        self._run = seconds(
            "epd_run_seconds", "of work on a call: an item, a prefill, decode to its first token.", "stage"
        )
        self._first_token = seconds("epd_time_to_first_token_seconds", "from a request's arrival to its first token.")
        self._per_token = seconds("epd_time_per_output_token_seconds", "per token of a choice after its first.")
        self._requests = Counter("epd_requests", "Requests that asked for tokens, by HTTP status.", ("status",))
        self._items = Counter("epd_items", "Media items of requests.", ("modality",))
        self._remembered = Counter("epd_remembered_items", "Items whose encoding was remembered.")
        self._media_bytes = Counter("epd_media_bytes", "Bytes of these, as media or as the tensors made of it.")
        self._prompt_tokens = Counter("epd_prompt_tokens", "Tokens of prompts, placeholders of items included.")
        self._cached_tokens = Counter("epd_cached_tokens", "Tokens of prompts that prefill had in its cache.")
        self._output_tokens = Counter("epd_output_tokens", "Tokens that were sent.")
        self._rungs = Counter("epd_rungs", "Rungs of the failure ladder that ran.", ("rung",))
        self._outstanding = Gauge("epd_outstanding", "What admission has under way, by what it limits.", ("of",))
        self.gauges = Gauges()

    def finished(self, record: Trace, status: int | str) -> None:
        """A request has ended, with an HTTP status or ``cancelled``."""
        if record.rendered is None and status == 200:
            return  # asked for no tokens: /tokenize and the like
        self._requests.inc(1, {"status": str(status)})
        for call in record.calls:
            self._queue.observe(call.queue_s, {"stage": call.stage})
            self._run.observe(call.ran_s, {"stage": call.stage})
        for modality, count in record.items.items():
            self._items.inc(count, {"modality": modality})
        for rung in record.rungs:
            self._rungs.inc(1, {"rung": rung})
        for counter, count in (
            (self._remembered, record.remembered_items),
            (self._media_bytes, record.media_bytes),
            (self._prompt_tokens, record.prompt_tokens),
            (self._cached_tokens, record.cached_tokens),
            (self._output_tokens, record.output_tokens),
        ):
            if count:
                counter.inc(count)
        if record.first_token is not None:
            self._first_token.observe(record.first_token - record.began)
        if (per_token := record.per_output_token()) is not None:
            self._per_token.observe(per_token)

    def outstanding(self, admission: Admission) -> None:
        for name in ("requests", "items", "media_bytes", "embed_bytes"):
            self.gauges.set(self._outstanding, getattr(admission, name), {"of": name})
