"""What the ingress deployment hands on: Serve's word of its own application, and the end of what it serves."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from deployments.ingress import Ingress

pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited"
)  # Serve awaits an ASGI replica's __del__


def made(**state: Any) -> Any:
    one = object.__new__(Ingress.func_or_class)  # type: ignore[attr-defined]
    one.__dict__.update(state)
    return one


def test_it_asks_serve_of_its_own_application_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    applications = {name: SimpleNamespace(deployments={"Decode": name}) for name in ("epd", "other")}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    assert made(_app_name="epd")._deployments() == {"Decode": "epd"}


def test_close_and_the_requests_inside_are_told_by_what_it_serves() -> None:
    config = SimpleNamespace(timeouts=SimpleNamespace(drain_s=30.0))
    one = made(_app=SimpleNamespace(close=lambda: 2, inside=2), _config=config)
    assert asyncio.run(one.close()) == (2, 30.0)
    assert asyncio.run(one.record_autoscaling_stats()) == {"requests": 2.0}
