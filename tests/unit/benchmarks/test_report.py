"""RESULTS.md: targets are held against what was found, what is missing is said, and it stays short."""

from typing import Any

import pytest

from benchmarks import report
from benchmarks.questions.question import Question, Target, order, ratio
from benchmarks.report import Spread


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.bench",
        "machine": {"cpus": 2, "processor": "x86_64", "hardware": "without a GPU", "model": "heavy"},
        "versions": {"ray": "2.60.0"},
        "runs": list(runs),
    }


def run(system: str, round_: int, rate: float) -> dict[str, Any]:
    return {"system": system, "round": round_, "rate": rate}


def rate(run: dict[str, Any]) -> float:
    return float(run["rate"])


def question(limit: float, at_least: bool) -> Question:
    return Question(
        name="rates",
        title="How fast?",
        measure=lambda round_, quick: iter(()),
        answer=lambda found: "Ours is faster.",
        plot=lambda found, figure: None,
        targets=(Target("rate", limit, at_least, lambda found: ratio(found, "ours", "theirs", rate)),),
    )


def test_the_spread_is_the_median_with_the_least_and_the_most() -> None:
    assert Spread.of([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    assert Spread.of([]) is None
    assert report.text(Spread(3.0, 1.0, 8.0)) == "3.00 (1.00 – 8.00)"
    assert report.text(Spread(3.0, 3.0, 3.0), 1) == "3.0"
    assert report.text(None) == "–"


def test_a_ratio_is_taken_within_each_round_that_both_ran() -> None:
    """The machine was slower in the second round, and in the third one of the two did not run."""
    made = document(run("ours", 0, 20), run("theirs", 0, 10), run("theirs", 1, 1), run("ours", 1, 3), run("ours", 2, 1))
    made["runs"].append({"system": "theirs", "round": 2, "error": "it did not start"})
    assert ratio(made, "ours", "theirs", rate) == Spread(2.5, 2.0, 3.0)


@pytest.mark.parametrize(
    ("limit", "at_least", "said"),
    [(2.0, True, "met"), (2.1, True, "**missed**"), (2.0, False, "met"), (1.9, False, "**missed**")],
)
def test_a_target_is_met_from_its_limit_on(limit: float, at_least: bool, said: str) -> None:
    asked = question(limit, at_least)
    ((title, wanted, found, verdict),) = report.target_rows({asked: document(run("ours", 0, 20), run("theirs", 0, 10))})
    assert (title, wanted, found, verdict) == ("rate", f"{'≥' if at_least else '≤'} {limit:g}", "2.00", said)


def test_a_target_that_was_not_measured_is_not_met() -> None:
    asked = question(2.0, True)
    assert report.target_rows({asked: document(run("ours", 0, 20))}) == [["rate", "≥ 2", "–", "not measured"]]


def test_the_page_names_what_did_not_run_and_how_to_repeat_the_rest() -> None:
    asked = question(2.0, True)
    page = report.page({asked: document(run("ours", 0, 20), {"system": "theirs", "round": 1, "error": "no memory"})})
    assert "theirs did not run: no memory." in page
    assert "`python -m benchmarks.bench --only rates`, 2 rounds." in page
    assert "](results/rates.png)" in page and "Ours is faster." in page


def test_no_system_always_runs_first() -> None:
    assert [order(["a", "b", "c"], round_) for round_ in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
