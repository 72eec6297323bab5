"""benchmarks.targets: whether a figure reached what it was to reach."""

from benchmarks.report import Spread
from benchmarks.targets import Target


def test_a_target_is_met_up_to_its_limit() -> None:
    def line(limit: float, at_least: bool, median: float) -> list[str] | None:
        return Target("rate", limit, at_least, lambda document: Spread(median, median, median)).line({})

    assert line(0.7, False, 0.7) == ["rate", "≤ 0.7", "0.70", "met"]
    assert line(0.7, False, 0.71) == ["rate", "≤ 0.7", "0.71", "**missed**"]
    assert line(30, True, 30.0) == ["rate", "≥ 30", "30.0", "met"]
    assert line(30, True, 29.9) == ["rate", "≥ 30", "29.9", "**missed**"]


def test_what_was_not_measured_has_no_line() -> None:
    assert Target("rate", 1.0, True, lambda document: None).line({"runs": []}) is None
