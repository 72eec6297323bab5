"""The benchmark's report: ratios of rounds with themselves, targets, and tables that say when a figure is missing."""

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks import report
from benchmarks.load import TARGET, TEXT, Cell
from benchmarks.report import CPU, ONE, PROXY, RATE, TARGETS, Spread


def run(cell: Cell, rate: float, **more: Any) -> dict[str, Any]:
    figures = {"completed": cell.requests, "failed": 0, "request_throughput": rate, "cpu_s": {"engines": 6.4}}
    return {"cell": asdict(cell), "seed": 1, "requests": cell.requests} | figures | more


def lost(cell: Cell) -> dict[str, Any]:
    """A run that was given up."""
    return run(cell, 0.0, completed=0, failed=cell.requests) | {"errors": ["not done"]}


def visit(system: str, round_: int, *runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"system": system, "round": round_, "runs": list(runs)} | more


def document(*visits: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.bench",
        "machine": {"cpus": 2, "processor": "x86_64", "hardware": "without a GPU", "model": "demo"},
        "versions": {"ray": "2.60.0"},
        "workload": {"image_size": 224, "text_tokens": 64, "cells": 1},
        "visits": list(visits),
    }


def test_a_ratio_is_taken_within_each_round() -> None:
    """Ours is twice as fast in both rounds; that the machine was slower in the second does not show."""
    made = document(
        visit("ours E+P+D", 0, run(TARGET, 20.0)),
        visit(PROXY, 0, run(TARGET, 10.0)),
        visit(PROXY, 1, run(TARGET, 1.0)),
        visit("ours E+P+D", 1, run(TARGET, 2.0)),
    )
    assert report.ratio(made, RATE, TARGET, "ours E+P+D", PROXY) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_leaves_out_rounds_that_one_of_the_two_lacks() -> None:
    made = document(
        visit("ours E+P+D", 0, run(TARGET, 30.0)),
        visit(PROXY, 0, run(TARGET, 10.0)),
        visit("ours E+P+D", 1, run(TARGET, 20.0)),
        visit(PROXY, 1, lost(TARGET)),
        visit("ours E+P+D", 2, run(TARGET, 40.0), run(TEXT, 1.0)),
        visit(PROXY, 2, run(TARGET, 10.0)),
    )
    assert report.ratio(made, RATE, TARGET, "ours E+P+D", PROXY) == Spread(3.5, 3.0, 4.0)
    assert report.ratio(made, RATE, TEXT, "ours E+P+D", PROXY) is None


def test_the_spread_is_the_median_with_the_least_and_the_most() -> None:
    assert Spread.of([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    assert Spread.of([]) is None
    assert report.text(Spread(3.0, 1.0, 8.0)) == "3.00 (1.00 – 8.00)"
    assert report.text(Spread(3.0, 3.0, 3.0), 1) == "3.0"
    assert report.text(None) == "–"


def test_cpu_is_that_of_all_kinds_of_processes_over_answered_requests() -> None:
    made = run(TARGET, 1.0, completed=32, cpu_s={"engines": 3.0, "others": 0.2})
    assert CPU.of(made) == pytest.approx(0.1)
    assert CPU.of(lost(TARGET)) is None


@pytest.mark.parametrize(("rate", "said"), [(3.0, "met"), (2.9, "**missed**")])
def test_a_target_that_is_a_least_value_is_met_from_there_on(rate: float, said: str) -> None:
    made = document(visit("ours E+P+D", 0, run(TARGET, rate)), visit(PROXY, 0, run(TARGET, 1.0)))
    (row,) = [row for row in report.target_rows(made) if row[0] == TARGETS[0].title]
    assert row[1:] == ["≥ 3 ×", f"{rate:.2f} {said}", "–", "–"]


@pytest.mark.parametrize(("spent", "said"), [(25.6, "met"), (25.7, "**missed**")])
def test_a_target_that_is_a_largest_value_is_met_up_to_there(spent: float, said: str) -> None:
    made = document(
        visit("ours E+PD", 0, run(TARGET, 1.0, completed=64, cpu_s={"engines": spent})),
        visit(PROXY, 0, run(TARGET, 1.0, completed=64, cpu_s={"engines": 64.0})),
    )
    (row,) = [row for row in report.target_rows(made) if row[0].startswith("CPU-seconds")]
    assert row[2] == "–" and row[-1].endswith(said)


def test_idle_is_said_per_engine_and_apart_from_the_rest() -> None:
    found = {"engines": 2, "cores": {"engines": 0.05, "others": 0.1, "replicas": 0.02}}
    engine, around = report.idle(document(visit("ours E+PD", 0, idle=found)), "ours E+PD")
    assert engine is not None and engine.median == pytest.approx(0.025)
    assert around is not None and around.median == pytest.approx(0.12)


def test_answers_are_compared_with_those_of_one_engine_in_the_same_round() -> None:
    one = {0: run(TARGET, 1.0, answers="a b c"), 1: run(TARGET, 1.0, answers="d e f")}
    ours = {0: run(TARGET, 1.0, answers="a b x"), 2: run(TARGET, 1.0, answers="d e f")}
    assert report.same_answers(ours, one) == "2 of 3"
    assert report.same_answers({0: lost(TARGET)}, one) == "–"


def test_cpu_is_shown_by_kind_of_process() -> None:
    made = document(
        visit("ours E+PD", 0, run(TARGET, 1.0, completed=100, cpu_s={"engines": 2.0, "Ingress replica": 3.0})),
        visit(PROXY, 0, run(TARGET, 1.0, completed=100, cpu_s={"engines": 1.0})),
        visit(ONE, 0, lost(TARGET)),
    )
    rows = report.cpu_table(made, ["ours E+PD", PROXY, ONE], TARGET).splitlines()
    assert [rows[0], *rows[2:]] == [
        "| system | engines | Ingress replica |",
        "| ours E+PD | 20.0 | 30.0 |",
        "| proxy | 10.0 | – |",
        "| one engine | – | – |",
    ]


def test_the_page_names_what_failed_and_shows_what_there_is() -> None:
    made = document(
        visit("ours E+P+D", 0, run(TARGET, 20.0, failed=3)),
        visit(ONE, 0, run(TARGET, 40.0)),
        visit(PROXY, 0, error="AssertionError: the server did not start"),
    )
    page = report.page(made)

    assert f"## {TARGET.name}" in page and f"3 of {TARGET.requests}" in page
    assert "| ours E+P+D / one engine | 0.50 |" in page
    assert "- round 1, proxy: AssertionError: the server did not start" in page
