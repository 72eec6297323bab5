"""Tests on a card, with the model and the systems of ``benchmarks.gpu``: ``python -m pytest tests/gpu``, or with all others.

Without a card, or with one that does not do, they are skipped, and the reason says what is missing.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import card as cards
from benchmarks.gpu.prerequisites import lacks_of_card


def lack() -> str | None:
    """Why nothing can be tested here, in one sentence."""
    try:
        return next(iter(lacks_of_card(cards.chosen(cards.cards()))), None)
    except cards.NoCard as none:
        return str(none)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = lack() if mine else None
    for item in mine:
        item.add_marker("gpu")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def card() -> Iterator[cards.Card]:
    """The card that all tests use, and no other: what they start sees no other."""
    chosen = cards.chosen(cards.cards())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cards.environment(chosen).items():
            patch.setenv(name, value)
        yield chosen
