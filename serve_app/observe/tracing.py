"""Spans of a request with OpenTelemetry: one at the ingress, below it one per call of a stage, below those vLLM's own.

Without ``tracing.endpoint`` every span does nothing. Spans are passed on by hand and never made current: the pipeline is
made of generators, and encode calls run in contexts of their own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve_app.config import TracingConfig

W3C = TraceContextTextMapPropagator()


class Span:
    """A span while tracing is off: it does nothing."""

    @property
    def headers(self) -> dict[str, str] | None:
        """``traceparent`` and ``tracestate`` for spans below this one."""
        return None

    def set(self, **attributes: Any) -> None:
        """Set attributes ``epd.<name>``; None is left out."""

    def event(self, name: str) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    @contextmanager
    def child(self, name: str, **attributes: Any) -> Iterator["Span"]:
        """The span of one call of a stage. A failure becomes its status, a cancelled call has ``epd.cancelled``."""
        yield self


OFF = Span()


class SeenSpan(Span):
    def __init__(self, tracer: Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        W3C.inject(carrier, set_span_in_context(self._span))
        return carrier

    def set(self, **attributes: Any) -> None:
        self._span.set_attributes({f"epd.{name}": value for name, value in attributes.items() if value is not None})

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def fail(self, error: BaseException) -> None:
        self._span.record_exception(error)
        self._span.set_status(StatusCode.ERROR, str(error))

    @contextmanager
    def child(self, name: str, **attributes: Any) -> Iterator[Span]:
        started = self._tracer.start_span(name, set_span_in_context(self._span), SpanKind.CLIENT)
        span = SeenSpan(self._tracer, started)
        span.set(**attributes)
        try:
            yield span
        except Exception as error:
            span.fail(error)
            raise
        except BaseException:
            span.set(cancelled=True)
            raise
        finally:
            started.end()


class Tracing:
    """Makes the spans of an ingress replica; without a tracer, all are ``OFF``."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of one HTTP request, in the trace that the client's ``traceparent`` names, or in a new one."""
        if self._tracer is None:
            yield OFF
            return
        started = self._tracer.start_span(name, W3C.extract(headers), SpanKind.SERVER)
        try:
            yield SeenSpan(self._tracer, started)
        finally:
            started.end()


def tracing(config: TracingConfig) -> Tracing:
    """Tracing through vLLM's exporter, which takes the protocol and all else from OpenTelemetry's variables."""
    if config.endpoint is None:
        return Tracing()
    from vllm.tracing import init_tracer

    return Tracing(init_tracer("epd.ingress", config.endpoint))
