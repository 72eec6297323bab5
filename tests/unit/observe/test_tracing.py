"""The spans of a request, through the middleware and the client in front of fake stages."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Send

from serve_app.config import TracingConfig
from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import EncodeReply, StageRequest
from serve_app.observe import tracing as module
from serve_app.observe.tracing import OFF, Tracing, tracing
from serve_app.stage import Stage
from tests.fakes import A, FakePipeline, Step, encoded
from tests.unit.asgi import JSON, Client, app_of, body, start
from tests.unit.running import Make, background, run

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Spans:
    """A tracer whose finished spans are kept."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider.get_tracer("test"))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


def span_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def parent_id(span: ReadableSpan) -> str | None:
    return f"{span.parent.span_id:016x}" if span.parent is not None else None


def parent_of_engine(call: StageRequest) -> str:
    """The span below which the engine of a call puts its own."""
    _, _, span, _ = call.options["trace_headers"]["traceparent"].split("-")
    return str(span)


def serve(
    make_client: Make, pipeline: FakePipeline, spans: Spans, *colours: str, traceparent: str | None = None, **more: Any
) -> None:
    """One request through the middleware, whose app runs it through the pipeline."""

    async def main() -> None:
        client = make_client(pipeline.stages, advanced={"retry": {"backoff_s": 0}})

        async def steps(send: Send) -> None:
            try:
                await run(client, *colours, **more)
            finally:
                await background(client)
            await send(start(JSON))
            await send(body(b"{}", more=False))

        headers = [(b"traceparent", traceparent.encode())] if traceparent else []
        exchange = Client(headers=[*headers, (b"x-request-id", b"an-id")], path="/v1/chat/completions")
        exchange.tracing = spans.tracing
        try:
            await exchange.ask(app_of(steps))
        except Exception:
            assert pipeline.log, "failed before a stage was called"

    asyncio.run(main())


def test_request_continues_the_clients_trace_and_each_call_is_a_child(make_client: Make, spans: Spans) -> None:
    pipeline = FakePipeline()
    serve(make_client, pipeline, spans, "red", "blue", traceparent=f"00-{TRACE}-{PARENT}-01")

    root = spans.one("POST /v1/chat/completions")
    assert (root.kind, parent_id(root)) == (SpanKind.SERVER, PARENT)
    calls = [*spans.named("encode"), spans.one("prefill"), spans.one("decode")]
    assert len(calls) == 4
    assert {parent_id(span) for span in calls} == {span_id(root)}
    assert {f"{span.context.trace_id:032x}" for span in [root, *calls] if span.context} == {TRACE}


def test_engines_continue_below_the_span_of_their_call(make_client: Make, spans: Spans) -> None:
    pipeline = FakePipeline()
    serve(make_client, pipeline, spans, "red")

    called = {
        "encode": pipeline.encoder.requests("encode"),
        "prefill": pipeline.prefiller.requests("prefill"),
        "decode": pipeline.decoder.requests("decode"),
    }
    for name, calls in called.items():
        assert [parent_of_engine(call) for call in calls] == [span_id(spans.one(name))]


def test_spans_tell_who_worked_on_what(make_client: Make, spans: Spans) -> None:
    serve(make_client, FakePipeline(), spans, "red")

    def attributes(name: str) -> dict[str, Any]:
        return dict(spans.one(name).attributes or {})

    assert attributes("encode").items() >= {"epd.item": 0, "epd.attempt": 1, "epd.replica": "encoder-0"}.items()
    assert attributes("prefill").items() >= {"epd.replica": "prefill-0", "epd.cached_tokens": 3}.items()
    assert attributes("decode").items() >= {"epd.replica": "decode-0", "epd.choice": 0}.items()
    root = attributes("POST /v1/chat/completions")
    assert root.items() >= {"epd.request_id": "an-id", "epd.status": "200", "epd.items": 1}.items()
    assert (root["epd.cached_tokens"], root["epd.output_tokens"]) == (3, 2)


def test_failed_call_is_an_error_and_the_rung_that_follows_is_told(make_client: Make, spans: Spans) -> None:
    gone = StageUnavailable(Stage.PREFILL, "is gone")
    serve(make_client, FakePipeline(fails={"prefill": [gone]}), spans)

    failed, again = spans.named("prefill")
    assert failed.status.status_code is StatusCode.ERROR and "is gone" in str(failed.status.description)
    assert again.status.status_code is StatusCode.UNSET
    root = spans.one("POST /v1/chat/completions")
    assert [event.name for event in root.events] == ["prefill-again"]
    assert root.status.status_code is StatusCode.UNSET


def test_failure_of_the_request_is_the_error_of_its_span(make_client: Make, spans: Spans) -> None:
    serve(make_client, FakePipeline(fails={"decode": [StageUnavailable(Stage.DECODE, "is gone")] * 9}), spans)
    root = spans.one("POST /v1/chat/completions")
    assert root.status.status_code is StatusCode.ERROR and "is gone" in str(root.status.description)


def test_spans_of_a_client_that_leaves_end(make_client: Make, spans: Spans) -> None:
    async def main() -> None:
        began = asyncio.Event()

        async def decode(request: StageRequest) -> AsyncIterator[Step]:
            yield Step(A)
            began.set()
            await asyncio.Event().wait()

        client = make_client(FakePipeline(steps=decode).stages)

        async def steps(send: Send) -> None:
            await run(client)

        exchange = Client(path="/v1/completions")
        exchange.tracing = spans.tracing
        task = asyncio.create_task(exchange.ask(app_of(steps)))
        await began.wait()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert (spans.one("decode").attributes or {})["epd.cancelled"] is True
    assert (spans.one("POST /v1/completions").attributes or {})["epd.status"] == "cancelled"


def test_item_that_two_requests_want_is_below_the_one_that_asked(make_client: Make, spans: Spans) -> None:
    async def main() -> FakePipeline:
        both = asyncio.Event()

        async def encode(request: StageRequest) -> EncodeReply:
            await both.wait()
            return encoded(request)

        pipeline = FakePipeline(encode=encode)
        client = make_client(pipeline.stages)

        async def steps(send: Send) -> None:
            await run(client, "red")

        async def one(path: str) -> None:
            exchange = Client(path=path)
            exchange.tracing = spans.tracing
            await exchange.ask(app_of(steps))

        assert client.pipeline.encoders is not None
        flights = client.pipeline.encoders._flights
        async with asyncio.TaskGroup() as group:
            for path in ("/a", "/b"):
                group.create_task(one(path))
            while not any(flight.waiting == 2 for flight in flights.values()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            both.set()
        return pipeline

    (call,) = asyncio.run(main()).encoder.requests("encode")
    assert len(spans.named("encode")) == 2
    assert parent_of_engine(call) in {span_id(span) for span in spans.named("encode")}


def test_where_tracing_is_off_stages_get_no_trace(make_client: Make, spans: Spans) -> None:
    pipeline = FakePipeline()
    spans.tracing = tracing(TracingConfig())
    serve(make_client, pipeline, spans, "red", traceparent=f"00-{TRACE}-{PARENT}-01")

    calls = pipeline.encoder.requests("encode") + pipeline.prefiller.requests("prefill")
    assert len(calls) == 2
    assert not any("trace_headers" in call.options for call in calls)
    with OFF.child("prefill", replica="a") as span:
        span.set(more=1)
        span.event("something")
        assert span.headers is None


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:4317"])
def test_vllms_app_is_told_whether_requests_are_traced(make_client: Make, endpoint: str | None) -> None:
    client = make_client({}, tracing={"endpoint": endpoint})
    assert asyncio.run(client.is_tracing_enabled()) is (endpoint is not None)


def test_spans_go_where_the_engines_send_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("vllm.tracing.init_tracer", lambda *args: asked.append(args))
    module.tracing(TracingConfig(endpoint="http://127.0.0.1:4317"))
    assert asked == [("epd.ingress", "http://127.0.0.1:4317")]
