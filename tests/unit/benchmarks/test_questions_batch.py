"""benchmarks.questions.batch: what people ask, and what its runs say."""

from typing import Any

import pytest

from benchmarks.questions.batch import ARRIVAL, BESIDE, PRIORITY, QUESTION, asks, longer


def run(system: str, beside: float, **changes: Any) -> dict[str, Any]:
    ttft_s = {"alone": [0.5, 1.0], BESIDE: [0.5, beside]}
    return {
        "system": system,
        "round": 0,
        "ttft_s": ttft_s,
        "failed": 0,
        "batch_failed": 0,
        "batch_per_s": 2.0,
    } | changes


def test_people_come_at_the_same_times_with_other_pictures() -> None:
    alone, beside = asks(1, 20.0), asks(1, 20.0, salt=1)
    assert [each.at for each in alone] == [each.at for each in beside] and len(alone) > 5
    assert not {each.body for each in alone} & {each.body for each in beside}


def test_an_answer_says_how_much_longer_people_wait() -> None:
    document = {"runs": [run(PRIORITY, 1.1), run(ARRIVAL, 9.0, failed=2), run(PRIORITY, 1.2, round=1)]}
    found = longer(document, PRIORITY, 99)
    assert found is not None and (found.least, found.most) == pytest.approx((1.1, 1.2))
    assert "1.15 (1.10 – 1.20) × at p99" in QUESTION.answer(document) and "9.00 × at p99" in QUESTION.answer(document)
    (target,) = QUESTION.targets
    assert target.line(document)[-1] == "met"  # type: ignore[index]
