"""Whole simulations: counts against what came in, and production's code in their decisions."""

from collections import Counter
from typing import Any

import pytest

from serve_app.config import EncodeConfig, QueueConfig, Timeouts
from serve_app.ingress import encode_rule
from serve_app.routing import rules
from serve_app.stage import Stage
from serve_app.stages.workload import Meter
from tests.unit.tools.sim.parts import ONE_IMAGE, TIMES
from tools.sim.app import Shape
from tools.sim.run import SLO, Result, Strategy, simulate
from tools.sim.traffic import Traffic, steady


def run(seed: int = 1, strategy: Strategy | None = None, rate: float = 30.0, **shape: Any) -> tuple[Traffic, Result]:
    traffic = steady("test", rate, 60.0, ONE_IMAGE)
    strategy = strategy or Strategy("static", dict.fromkeys(Stage, 2))
    return traffic, simulate(TIMES, traffic, strategy, Shape(**shape), SLO(2.0, 0.05), seed)


def test_every_request_ends_once() -> None:
    traffic, result = run(queue=QueueConfig(max_queued_requests=5, max_ongoing_requests=2))

    assert sum(result.outcomes.values()) == result.requests == len(list(traffic.requests(1)))
    assert set(result.outcomes) > {"ok"}  # some were refused


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    assert run(seed=5)[1] == run(seed=5)[1]
    assert run(seed=5)[1] != run(seed=6)[1]


def test_fixed_replicas_cost_their_number() -> None:
    _, result = run()

    assert result.gpu_s_per_request * result.requests == pytest.approx(6 * 60.0)


def test_decisions_are_productions(monkeypatch: pytest.MonkeyPatch) -> None:
    called: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            called[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(rules, "rank")
    counting(encode_rule, "encode_at_prefill")
    counting(Meter, "call")
    _, result = run()

    assert called["rank"] == called["encode_at_prefill"] == result.requests
    assert called["call"] == 3 * result.requests


def test_items_that_the_rule_leaves_to_prefill_never_reach_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "rank", lambda *_: pytest.fail("no encoder is asked"))
    _, result = run(rate=8.0, encode=EncodeConfig(min_embeds=10**6))

    assert result.at_prefill == 1.0 and result.outcomes == {"ok": result.requests}


def test_without_encoders_items_are_encoded_by_prefill_when_the_attempts_are_over() -> None:
    strategy = Strategy("none", {Stage.PREFILL: 2, Stage.DECODE: 2})
    _, result = run(rate=8.0, strategy=strategy, timeouts=Timeouts(encode_s=1.0))

    assert result.at_prefill == 1.0 and result.outcomes == {"ok": result.requests}
    assert result.ttft_p99_s > 2.0
