"""What a figure was to reach, and whether it did."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Spread, text


@dataclass(frozen=True)
class Target:
    """``found``: the figure over the rounds of a document; None where it was not measured."""

    title: str
    limit: float
    at_least: bool
    found: Callable[[dict[str, Any]], Spread | None]

    @property
    def limits(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def line(self, document: dict[str, Any]) -> list[str] | None:
        """A row of a table: title, limit, what was found, and whether that will do."""
        if (found := self.found(document)) is None:
            return None
        met = found.median >= self.limit if self.at_least else found.median <= self.limit
        return [self.title, self.limits, text(found, 2 if self.limit < 5 else 1), "met" if met else "**missed**"]
