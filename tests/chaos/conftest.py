"""The table that `make chaos` prints: what became of the requests, fault by fault."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.chaos.load import Outcome, failed, wrong

ROUNDS = int(os.environ.get("EPD_CHAOS_ROUNDS", "1"))

Row = Callable[[str, list[Outcome], float, float], None]
"""Of a fault, the requests that were under way or began during it, when it set in, and when all replicas were back."""


@pytest.fixture(scope="session")
def row() -> Iterator[Row]:
    columns = ("fault", "requests", "failed", "wrong", "retried", "recovered after s", "all replicas after s")
    rows = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def add(fault: str, outcomes: list[Outcome], began: float, back: float) -> None:
        errors = failed(outcomes)
        recovered = max((outcome.began + outcome.seconds - began for outcome in errors), default=0.0)
        retried = sum(bool(outcome.rungs) for outcome in outcomes)
        cells = (
            fault,
            len(outcomes),
            len(errors),
            len(wrong(outcomes)),
            retried,
            f"{recovered:.1f}",
            f"{back - began:.0f}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")

    yield add
    print("\n".join(rows))
