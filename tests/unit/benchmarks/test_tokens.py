"""benchmarks.tokens: which system gets which waves, and what its figures say of the targets."""

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.report import Spread
from benchmarks.streams import Wave
from benchmarks.tokens import figures
from benchmarks.tokens.figures import DECODE, INGRESS, RATE, TARGETS, ingress_gain, ratio
from benchmarks.tokens.page import page
from benchmarks.tokens.rows import (
    CARD,
    LONG,
    NULL_E_P_D,
    NULL_E_PD,
    ONE,
    ONE_INGRESS,
    REAL_E_P_D,
    ROWS,
    SCALED,
    SYSTEMS,
    TWO_INGRESSES,
    plan,
)


def run(system: str, wave: Wave, round_: int = 0, **changes: Any) -> dict[str, Any]:
    plain = dict.fromkeys(
        (
            *("took_s", "requests_per_s", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"),
            *("gap_p99_ms", "chunks_per_token", "client_cpu_s", "other_cores", "speed_ms"),
        ),
        1.0,
    ) | {"speed_ms": 1.7}
    return {"system": system, "round": round_, "wave": asdict(wave), "failed": 0, "cpu_s": {}} | plain | changes


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"command": "python -m benchmarks.tokens", "runs": list(runs)}


def line(title: str, made: dict[str, Any]) -> list[str] | None:
    (target,) = [target for target in TARGETS if target.title == title]
    return target.line(made)


def test_every_row_names_systems_and_every_target_a_row() -> None:
    assert {system for row in ROWS.values() for system in row.systems} <= set(SYSTEMS)
    assert {target.row for target in TARGETS} <= set(ROWS)


def test_a_system_starts_once_for_all_rows_that_need_it() -> None:
    waves = plan([ROWS["e"], ROWS["f"]])
    assert set(waves) == {*ROWS["e"].systems, *ROWS["f"].systems}
    assert waves[ONE] == [LONG]
    assert waves[REAL_E_P_D].count(LONG) == 1 and set(waves[REAL_E_P_D]) == set(ROWS["f"].waves)


def test_cpu_is_told_per_token_of_whole_answers() -> None:
    """25,600 tokens, 2.56 s of which one in four is the decode replica's."""
    made = document(run(NULL_E_PD, CARD, cpu_s={DECODE: 0.64, "others": 1.92}))
    assert line(f"CPU µs per token, all processes: {NULL_E_PD}", made) == [
        f"CPU µs per token, all processes: {NULL_E_PD}",
        "≤ 120",
        "100.0",
        "met",
    ]
    assert line(f"– decode replica: {NULL_E_PD}", made) == [
        f"– decode replica: {NULL_E_PD}",
        "≤ 15",
        "25.0",
        "**missed**",
    ]


def test_tokens_are_told_of_those_that_engines_made() -> None:
    made = document(run(NULL_E_PD, CARD, tokens_per_s=128 / 0.025 * 0.95))
    assert (line(f"– tokens delivered of those made: {NULL_E_PD}", made) or [])[2:] == ["0.95", "met"]


def test_a_ratio_is_taken_within_a_round() -> None:
    made = document(
        run(ONE, LONG, 0, tokens_per_s=1000.0),
        run(REAL_E_P_D, LONG, 0, tokens_per_s=900.0),
        run(ONE, LONG, 1, tokens_per_s=10.0),
        run(REAL_E_P_D, LONG, 1, tokens_per_s=8.0),
    )
    found = ratio(made, LONG, RATE, REAL_E_P_D, ONE)
    assert found is not None
    assert (found.least, found.most) == (0.8, 0.9)


def test_only_like_speeds_are_compared() -> None:
    made = document(
        run(ONE, LONG, 0, tokens_per_s=1000.0, speed_ms=1.6),
        run(REAL_E_P_D, LONG, 0, tokens_per_s=900.0, speed_ms=1.7),
        run(ONE, LONG, 1, tokens_per_s=1000.0, speed_ms=1.7),
        run(REAL_E_P_D, LONG, 1, tokens_per_s=500.0, speed_ms=2.5),
    )
    found = ratio(made, LONG, RATE, REAL_E_P_D, ONE)
    assert found is not None and (found.least, found.most) == (0.9, 0.9)


def test_cpu_time_of_a_slow_moment_is_held_against_its_target_as_at_the_machines_pace() -> None:
    made = document(run(NULL_E_PD, CARD, cpu_s={DECODE: 0.768}, speed_ms=3.4))
    assert (line(f"– decode replica: {NULL_E_PD}", made) or [])[2:] == ["15.0", "met"]


def test_a_second_ingress_gains_what_its_tokens_do_not_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def visits(us: float) -> dict[str, float]:
        return {INGRESS: us * 1e-6 * SCALED.requests * SCALED.tokens}

    made = document(
        run(ONE_INGRESS, SCALED, cpu_s=visits(90), tokens_per_s=100.0),
        run(TWO_INGRESSES, SCALED, cpu_s=visits(100), tokens_per_s=170.0),
    )
    monkeypatch.setattr(figures, "MANY_CORES", False)
    assert (ingress_gain(made) or Spread(0, 0, 0)).median == pytest.approx(1.8)
    monkeypatch.setattr(figures, "MANY_CORES", True)
    assert (ingress_gain(made) or Spread(0, 0, 0)).median == pytest.approx(1.7)


def test_a_target_of_which_nothing_was_measured_has_no_line() -> None:
    assert all(target.line(document()) is None for target in TARGETS)
    assert all(target.line(document(run(NULL_E_PD, CARD, failed=CARD.requests))) is None for target in TARGETS)


def test_page_shows_runs_failures_and_what_did_not_start() -> None:
    made = document(
        run(NULL_E_PD, CARD, failed=3, cpu_s={DECODE: 1.0}),
        {"system": NULL_E_P_D, "round": 1, "error": "AssertionError: the server did not start"},
    )
    told = page(made, ROWS)
    assert "| null E+PD | 128 × 200 |" in told and "| 3 of 128 |" in told
    assert "- null E+P+D, round 2: AssertionError: the server did not start" in told
    assert "## e." not in told
