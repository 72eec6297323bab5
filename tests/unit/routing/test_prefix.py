"""Equal prefixes have equal keys, and what a replica holds is remembered within bounds."""

import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.handoff.types import Item, Prompt
from serve_app.routing.prefix import BLOCK, Held, prefix_of


def item(name: str, offset: int, length: int = 100) -> Item:
    return Item("image", name, offset, length, None, None)


def keys(tokens: list[int], *items: Item, salt: str | None = None, apart: str = "") -> tuple[int, ...]:
    return prefix_of(Prompt(tokens, items, salt), None, apart).keys


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(st.lists(st.integers(0, 200_000), max_size=400), st.integers(0, 400), st.integers(0, 200_000))
def test_prompts_share_the_blocks_before_their_first_difference(tokens: list[int], place: int, other: int) -> None:
    changed = [*tokens[:place], other, *tokens[place:]]
    differs = next((i for i, (a, b) in enumerate(zip(tokens, changed, strict=False)) if a != b), len(tokens))
    assert len(keys(tokens)) == len(tokens) // BLOCK
    assert common(keys(tokens), keys(changed)) == differs // BLOCK


def test_what_is_in_a_picture_counts_and_not_only_its_placeholders() -> None:
    tokens = [7] * 500
    with_a, with_b = (keys(tokens, item(name, 200)) for name in "ab")
    assert common(with_a, with_b) == 200 // BLOCK
    assert common(with_a, keys(tokens)) == 200 // BLOCK
    assert not set(with_a[200 // BLOCK :]) & set(with_b), "what follows depends on it too"


def test_a_picture_is_told_from_itself_one_token_later_and_order_of_items_does_not_count() -> None:
    tokens = [7] * 500
    assert common(keys(tokens, item("a", 200)), keys(tokens, item("a", 201))) == 200 // BLOCK
    first, second = item("a", 100), item("b", 300)
    assert keys(tokens, first, second) == keys(tokens, second, first)


@pytest.mark.parametrize("other", [{"salt": "tenant"}, {"apart": "adapter"}])
def test_salts_and_adapters_share_nothing(other: dict[str, str]) -> None:
    assert not set(keys([7] * 500)) & set(keys([7] * 500, **other))  # type: ignore[arg-type]


def test_a_session_is_a_tenants_own() -> None:
    named = {prefix_of(Prompt([], (), salt), "chat").session for salt in (None, "a", "b")}
    assert len(named) == 3
    assert prefix_of(Prompt([]), None).session == ""
    assert len(prefix_of(Prompt([]), "x" * 10_000).session) == 16
    assert prefix_of(Prompt([]), "\ud800").session


def test_keys_are_the_same_in_every_process() -> None:
    assert keys(list(range(64)), item("a", 3)) == (KEY,)


KEY = 15568725111401289276
"""An ingress replica of another machine has it too."""


def test_a_replica_holds_a_prompt_as_far_as_it_is_unbroken() -> None:
    held = Held()
    held.use([1, 2, 3, 4], most=100)
    assert held.leading([1, 2, 3, 4, 5]) == 4
    held.drop([3, 4])
    assert held.leading([1, 2, 3, 4]) == 2


def test_the_end_of_the_oldest_prompt_is_forgotten_first() -> None:
    held = Held()
    held.use([1, 2, 3], most=5)
    held.use([4, 5, 6], most=5)
    assert len(held) == 5
    assert held.leading([1, 2, 3]) == 2
    assert held.leading([4, 5, 6]) == 3


def test_age_counts_what_was_written_since() -> None:
    held = Held()
    held.use([1, 2], most=10_000)
    assert held.age([1, 2], 2) == 0
    held.use(range(100, 200), most=10_000)
    held.use(range(100, 200), most=10_000)  # they were there
    assert held.age([1, 2], 2) == (100).bit_length()
    assert held.age([1, 2], 0) == 0


def test_the_share_that_is_found_is_learnt_by_age() -> None:
    held = Held()
    for _ in range(30):
        held.learn(7, 0.0)
    assert held.share(7) < 0.1
    assert held.share(3) == 1.0
    held.learn(7, 1.0)
    assert held.share(7) > 0.1, "and learnt again"


def test_a_block_takes_the_memory_that_the_manual_says() -> None:
    number = 1 << 15
    tracemalloc.start()
    held = Held()
    for start in range(0, number, 64):
        held.use([int.from_bytes(i.to_bytes(8)) | 1 << 62 for i in range(start, start + 64)], most=number)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sys.getsizeof(1 << 62) < 40
    assert 50 < size / number < 250
