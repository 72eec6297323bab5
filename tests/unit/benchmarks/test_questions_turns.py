"""benchmarks.questions.turns: what is asked, and what its runs say."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.conversations.loads import session
from benchmarks.questions import turns
from benchmarks.questions.systems import E_PD, ONE, REFERENCE
from benchmarks.questions.turns import LOAD, QUESTION, cached, calls, per_minute


def run(system: str, round_: int = 0, **changes: Any) -> dict[str, Any]:
    figures = ("ttft_first_p50_ms", "ttft_first_p99_ms", "ttft_later_p50_ms", "ttft_later_p99_ms")
    plain = dict.fromkeys(figures, 100.0) | {"failed": 0, "requests": 64, "requests_meanwhile": 80, "took_s": 40.0}
    engines = [["encoder", 500.0, 30.0], ["decode", 12_000.0, 80.0]]
    by_turn = [{"prompt": 1500.0, "cached": 0.0, "ttft_p50_ms": 100.0 / (1 + turn)} for turn in range(LOAD.turns)]
    made = {"prompt_tokens_meanwhile": 120_000, "engines": engines, "by_turn": by_turn}
    return {"system": system, "round": round_} | plain | made | changes


def test_every_turn_sends_the_pictures_of_the_first_again() -> None:
    talk = [turn.messages for turn in session(LOAD, seed=1, user=0, number=1)]
    parts = [
        [part for message in messages if message["role"] == "user" for part in message["content"]] for messages in talk
    ]
    pictures = [[part for part in each if part["type"] == "image_url"] for each in parts]
    assert len(talk) == LOAD.turns and len(pictures[0]) == LOAD.kept
    assert all(each == pictures[0] for each in pictures)


def test_what_was_computed_counts_where_prompts_are_prefilled_and_calls_where_items_are_encoded() -> None:
    made = run(E_PD)
    assert cached(made) == pytest.approx(0.9)
    assert calls(made) == pytest.approx(30 / 10)
    assert per_minute(made) == pytest.approx(10 / 40 * 60)


def test_behind_the_proxy_each_stage_has_its_own_metrics() -> None:
    proxy = ["python", "-m", "proxy", "--encode", "http://a:1", "--prefill", "http://b:2", "--decode", "http://c:3"]
    server: Any = SimpleNamespace(url="http://p:4", process=SimpleNamespace(args=proxy))
    assert turns.pages(server) == {
        "encoder": "http://a:1/metrics",
        "prefill": "http://b:2/metrics",
        "decode": "http://c:3/metrics",
    }
    server.process.args = ["python", "-m", "serve_app"]
    assert turns.pages(server) == {"": "http://p:4/metrics"}


def test_an_answer_has_its_figures_from_the_runs() -> None:
    document = {
        "runs": [
            run(E_PD, ttft_later_p50_ms=60.0),
            run(
                REFERENCE,
                ttft_later_p50_ms=150.0,
                failed=2,
                engines=[["encoder", 0.0, 240.0], ["prefill", 12_000.0, 80.0]],
            ),
            run(E_PD, 1, ttft_later_p50_ms=70.0),
            {"system": REFERENCE, "round": 1, "error": "AssertionError: no"},
        ]
    }
    told = QUESTION.answer(document)
    assert f"{E_PD} after 65 (100)" in told and f"{E_PD} to the reference 0.40 ×" in told
    assert "24 times per conversation" in told
    (row,) = [line for line in told.splitlines() if line.startswith(f"| {REFERENCE} |")]
    assert row.endswith("| 24.0 | 2 of 66 |")
    assert not [line for line in told.splitlines() if line.startswith(f"| {ONE} |")]
    assert [target.line(document) for target in QUESTION.targets] == [
        [f"TTFT p50 of later turns, {E_PD} against the reference", "≤ 0.7", "0.40", "met"]
    ]


def test_a_failed_start_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(turns, "SYSTEMS", {E_PD: start, ONE: start})
    assert list(QUESTION.measure(1, False)) == [
        {"system": ONE, "round": 1, "error": "RuntimeError: no memory"},
        {"system": E_PD, "round": 1, "error": "RuntimeError: no memory"},
    ]
    assert not list(QUESTION.measure(0, True))
