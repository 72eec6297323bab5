"""What an ingress replica tells Ray of its requests, by stage: ``ray_epd_*`` on Ray's metrics port.

It is counted from a request's ``Trace`` when it ends, not per token. Samples have the labels ``application``,
``deployment`` (the ingress) and ``replica``. Metrics of engines reach Ray through ``observe/engine_metrics.py``.
"""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serve_app.observe.ray_metrics import Teller, serve_labels
from serve_app.observe.trace import Trace

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0]


class Outstanding(Protocol):
    requests: int
    items: int
    media_bytes: int
    embed_bytes: int


class IngressMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def seconds(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(name, f"Seconds {what}", labels, buckets=SECONDS, registry=self.registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        self._queue = seconds("epd_queue_seconds", "that a call of a stage waited, in queues and on the way.", "stage")
        self._run = seconds(
            "epd_run_seconds", "of work on a call: an item, a prefill, decode to its first token.", "stage"
        )
        self._first_token = seconds("epd_time_to_first_token_seconds", "from a request's arrival to its first token.")
        self._per_token = seconds("epd_time_per_output_token_seconds", "per token of a choice after its first.")
        self._requests = counter("epd_requests", "Requests that asked for tokens, by HTTP status.", "status")
        self._items = counter("epd_items", "Media items of requests.", "modality")
        self._remembered = counter("epd_remembered_items", "Items whose encoding was remembered.")
        self._media_bytes = counter("epd_media_bytes", "Bytes of these, as media or as the tensors made of it.")
        self._prompt_tokens = counter("epd_prompt_tokens", "Tokens of prompts, placeholders of items included.")
        self._cached_tokens = counter("epd_cached_tokens", "Tokens of prompts that prefill had in its cache.")
        self._prefix_expected = counter(
            "epd_prefix_expected_tokens", "Tokens of prompts that a replica was chosen for.", "stage"
        )
        self._prefix_found = counter(
            "epd_prefix_found_tokens", "Tokens of the same prompts that the replica had in its cache.", "stage"
        )
        self._unencoded = counter("epd_unencoded_items", "Items that were left to prefix caches.")
        self._output_tokens = counter("epd_output_tokens", "Tokens that were sent.")
        self._rungs = counter("epd_rungs", "Rungs of the failure ladder that ran.", "rung")
        outstanding = Gauge(
            "epd_outstanding", "What admission has under way, by what it limits.", ["of"], registry=self.registry
        )
        self._outstanding = {of: outstanding.labels(of) for of in ("requests", "items", "media_bytes", "embed_bytes")}

    def tell_ray(self) -> None:
        Teller(self.registry, serve_labels()).start()

    def finished(self, record: Trace, status: int | str) -> None:
        """A request has ended, with an HTTP status or ``cancelled``."""
        if record.rendered is None and status == 200:
            return  # asked for no tokens: /tokenize and the like
        self._requests.labels(str(status)).inc()
        for call in record.calls:
            self._queue.labels(call.stage).observe(call.queue_s)
            self._run.labels(call.stage).observe(call.ran_s)
        for modality, count in record.items.items():
            self._items.labels(modality).inc(count)
        for rung in record.rungs:
            self._rungs.labels(rung).inc()
        for stage, (expected, found) in record.expected.items():
            self._prefix_expected.labels(stage).inc(expected)
            self._prefix_found.labels(stage).inc(found)
        self._unencoded.inc(record.unencoded_items)
        self._remembered.inc(record.remembered_items)
        self._media_bytes.inc(record.media_bytes)
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens)
        self._output_tokens.inc(record.output_tokens)
        if record.first_token is not None:
            self._first_token.observe(record.first_token - record.began)
        if (per_token := record.per_output_token()) is not None:
            self._per_token.observe(per_token)

    def outstanding(self, admission: Outstanding) -> None:
        for name, gauge in self._outstanding.items():
            gauge.set(getattr(admission, name))
