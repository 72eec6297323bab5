"""benchmarks.questions.faults: what became of requests, and what is told of it."""

import json
from typing import Any

import pytest

from benchmarks.questions import faults
from benchmarks.questions.faults import E_P_D, KILL_S, OVERLOAD_S, QUESTION, REFERENCE, judged, overload, steady


def row(at: float, number: int = 0, took: float = 0.5, text: str = "good", **more: Any) -> dict[str, Any]:
    return {"kind": str(number), "at": at, "took": took, "text": text} | more


def phase(system: str, name: str, round_: int = 0, **changes: Any) -> dict[str, Any]:
    return {"system": system, "round": round_, "phase": name} | judged([row(0.0), row(6.0)], {}, KILL_S) | changes


def test_every_request_has_a_picture_of_its_own() -> None:
    asks = [ask for name in faults.FAULTS for ask in steady(faults.FIRST[name], 10.0)]
    asks += overload(faults.FIRST[faults.TOO_MUCH], 8.0)
    pictures = [json.loads(ask.body)["messages"][0]["content"][0]["image_url"]["url"] for ask in asks]
    assert len(set(pictures)) == len(asks) == len({ask.kind for ask in asks})


def test_an_overload_ends_in_a_low_load() -> None:
    asks = overload(faults.FIRST[faults.TOO_MUCH], 20.0)
    assert sum(ask.at < OVERLOAD_S for ask in asks) == 20 * OVERLOAD_S
    assert max(ask.at for ask in asks) == pytest.approx(OVERLOAD_S + faults.LOW_S - 1 / faults.PER_S)


def test_requests_are_judged_one_by_one() -> None:
    rows = [
        row(0.0, 1),
        row(1.0, 2, text="bad"),
        row(2.0, 3, text="unknown"),
        row(5.0, 4, failed="200 broke off: 0 tokens of 0"),
        row(6.0, 5, failed="503 full", took=0.1),
        row(7.0, 6, failed="503 in the end", took=61.0),
        row(8.0, 7, took=9.0),
        row(9.5, 8),
        row(10.0, 9),
    ]
    told = judged(rows, {"1": "good", "2": "good", "8": "good"}, 5.0)
    counted = {key: told[key] for key in ("requests", "failed", "refused", "wrong", "late", "hanging", "compared")}
    assert counted == {
        "requests": 9,
        "failed": 2,
        "refused": 1,
        "wrong": 1,
        "late": 1,
        "hanging": 1,
        "compared": 3,
    }
    assert told["recovered_s"] == 4.5
    assert [-5, 1, 1] in told["seconds"] and [0, 0, 1] in told["seconds"] and [4, 1, 1] in told["seconds"]
    assert told["why"] == "200 broke off: 0 tokens of 0"


def test_what_never_failed_has_recovered_at_once_and_what_fails_to_the_end_never() -> None:
    assert judged([row(0.0), row(6.0)], {}, 5.0)["recovered_s"] == 0.0
    assert judged([row(0.0), row(6.0, failed="500")], {}, 5.0)["recovered_s"] is None


def test_the_table_tells_the_slowest_recovery_of_all_rounds() -> None:
    runs = [
        phase(E_P_D, "decode", 0, recovered_s=21.0),
        phase(E_P_D, "decode", 1, recovered_s=25.0),
        phase(REFERENCE, "decode", 0, recovered_s=None, failed=1),
    ]
    told = QUESTION.answer({"runs": runs})
    assert "| kill of decode's engine | E+P+D | 4 | 0 | 0 | 0 | 0 | 0 | 25 |" in told
    assert "| kill of decode's engine | reference | 2 | 1 | 0 | 0 | 0 | 0 | never |" in told
    assert "encoder –, prefill –, decode 25; the longest wait" in told


def test_targets_add_up_the_phases_of_a_round() -> None:
    runs = [phase(E_P_D, "decode", 0, failed=2), phase(E_P_D, "encoder", 0, failed=1), phase(E_P_D, "encoder", 1)]
    found = QUESTION.targets[0].found({"runs": runs})
    assert found is not None and (found.least, found.most) == (0.0, 3.0)
    assert QUESTION.targets[0].found({"runs": []}) is None


def test_quick_leaves_it_out() -> None:
    assert list(QUESTION.measure(0, True)) == []
