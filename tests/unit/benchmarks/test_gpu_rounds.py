"""Figures over the rounds of a card: ratios of rounds with themselves, and answers held against one engine's."""

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.gpu import rounds
from benchmarks.gpu.rounds import CPU, ONE, RATE
from benchmarks.load import TARGET, TEXT, Cell
from benchmarks.report import Spread


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
        visit("E+P+D", 0, run(TARGET, 20.0)),
        visit(ONE, 0, run(TARGET, 10.0)),
        visit(ONE, 1, run(TARGET, 1.0)),
        visit("E+P+D", 1, run(TARGET, 2.0)),
    )
    assert rounds.ratio(made, RATE, TARGET, "E+P+D", ONE) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_leaves_out_rounds_that_one_of_the_two_lacks() -> None:
    made = document(
        visit("E+P+D", 0, run(TARGET, 30.0)),
        visit(ONE, 0, run(TARGET, 10.0)),
        visit("E+P+D", 1, run(TARGET, 20.0)),
        visit(ONE, 1, lost(TARGET)),
        visit("E+P+D", 2, run(TARGET, 40.0), run(TEXT, 1.0)),
        visit(ONE, 2, run(TARGET, 10.0)),
    )
    assert rounds.ratio(made, RATE, TARGET, "E+P+D", ONE) == Spread(3.5, 3.0, 4.0)
    assert rounds.ratio(made, RATE, TEXT, "E+P+D", ONE) is None


def test_cpu_is_that_of_all_kinds_of_processes_over_answered_requests() -> None:
    made = run(TARGET, 1.0, completed=32, cpu_s={"engines": 3.0, "others": 0.2})
    assert CPU.of(made) == pytest.approx(0.1)
    assert CPU.of(lost(TARGET)) is None


def test_answers_are_compared_with_those_of_one_engine_in_the_same_round() -> None:
    one = {0: run(TARGET, 1.0, answers="a b c"), 1: run(TARGET, 1.0, answers="d e f")}
    ours = {0: run(TARGET, 1.0, answers="a b x"), 2: run(TARGET, 1.0, answers="d e f")}
    assert rounds.same_answers(ours, one) == "2 of 3"
    assert rounds.same_answers({0: lost(TARGET)}, one) == "–"
