"""benchmarks.questions.fanout: what is asked, and what its runs say."""

import json
from typing import Any

import pytest

from benchmarks.questions.fanout import NULL, PICTURES, QUESTION, REAL, asks, besides, busiest, compact, cost, ideal_ms


def run(
    kind: str, encoders: int, ttft_ms: list[float], round_: int = 0, at_a_time: int = 1, **more: Any
) -> dict[str, Any]:
    where = {"system": kind, "round": round_, "encoders": encoders, "at_a_time": at_a_time}
    return where | {"ttft_ms": ttft_ms, "busiest": [4] * len(ttft_ms), "failed": 0} | more


def test_no_two_requests_have_a_picture_in_common() -> None:
    urls = [
        part["image_url"]["url"]
        for ask in [*asks(1, 2), *asks(2, 2)]
        for part in json.loads(ask.body)["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert len(set(urls)) == len(urls) == 4 * PICTURES


def test_encoders_need_the_time_of_the_busiest_at_least() -> None:
    assert [ideal_ms(count) for count in (1, 2, 3, 4, 8)] == [800, 400, 300, 200, 100]
    assert cost(run(NULL, 4, [250.0, 230.0, 900.0])) == pytest.approx(50.0)


def test_what_an_encoder_had_is_told_by_the_servers_header() -> None:
    timing = 'render;dur=20.0, encode;dur=300.0;desc="a b", encode.1;dur=100.0;desc="a", encode.2;dur=100.0;desc="b"'
    timing += ', encode.3;dur=100.0;desc="b"'
    rows = [{"ttft": 0.4, "timing": timing}, {"ttft": 0.0, "timing": "", "failed": "500 no"}]
    around = {"cpu_s": {}, "took_s": 1.0, "other_cores": 0.0, "speed_ms": 1.0}
    found = compact({"requests": rows} | around)
    assert (found["failed"], found["errors"], found["ttft_ms"], found["busiest"]) == (1, ["500 no"], [400.0], [2])
    assert found["steps_ms"] == {"render": 20.0, "encode": 300.0}
    assert busiest([]) == 0
    assert besides(run(NULL, 2, [470.0, 560.0, 450.0], busiest=[4, 5, 4])) == pytest.approx(60.0)


def test_an_answer_has_its_figures_from_the_runs() -> None:
    document = {
        "runs": [
            run(NULL, 1, [860.0], busiest=[8]),
            run(NULL, 2, [450.0, 470.0, 460.0]),
            run(NULL, 2, [500.0, 520.0], round_=1, busiest=[5, 5]),
            run(NULL, 2, [900.0], at_a_time=2, failed=1),
            {"system": NULL, "round": 0, "encoders": 4, "error": "AssertionError: no"},
            run(REAL, 1, [1400.0]),
        ]
    }
    told = QUESTION.answer(document)
    assert "pictures comes after 860, 480, – ms: 60, 80, – ms later" in told
    assert "had 8.0, 4.5, – of the pictures on average, where even is 8, 4, 2" in told
    assert "all that is not its work takes 60, 30, – ms" in told
    assert "the first token comes after 1400, – ms, prefill included" in told
    lines = told.splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {NULL}, 2 |")]
    assert row == f"| {NULL}, 2 | 400 | 480 (460 – 500) | 495 (470 – 520) | 900 | 900 | 1 |"
    assert not [line for line in lines if line.startswith(f"| {NULL}, 4 |")]


def test_nothing_runs_where_it_is_to_be_quick() -> None:
    assert not list(QUESTION.measure(0, True))
