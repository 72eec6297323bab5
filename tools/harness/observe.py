"""What a server lets one see of itself, as those who watch it get it: spans by OTLP, and the metrics of its Ray node."""

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import psutil
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tools.harness.servers import Server


@dataclass(frozen=True)
class Seen:
    """A span as it was received."""

    trace: str
    id: str
    parent: str
    name: str
    service: str
    attributes: dict[str, Any]


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


class SpanCollector:
    """An OTLP receiver over HTTP, on loopback."""

    def __init__(self) -> None:
        self._spans: list[Seen] = []
        receive = self._receive

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receive(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self.env = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1/traces"

    def spans(self, trace: str) -> list[Seen]:
        return [span for span in self._spans if span.trace == trace]

    def _receive(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self._spans += [
                    Seen(
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.name,
                        service,
                        values(span.attributes),
                    )
                    for span in scope.spans
                ]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def ray_metrics(server: Server) -> dict[str, list[dict[str, str]]]:
    """Labels of all samples by name, from the metrics port of the server's Ray node: what Prometheus would scrape."""
    folder = next(
        Path(argument.partition("=")[2])
        for process in server.processes()
        for argument in command(process)
        if argument.startswith("--session_dir=")
    )
    (port,) = {file.read_text() for file in folder.glob("metrics_export_port*")}
    page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
