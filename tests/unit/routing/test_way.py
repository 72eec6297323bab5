"""Which way requests take while replicas of several weights run."""

import itertools

import pytest

from serve_app.routing.rules import Way, way
from serve_app.stage import Stage

BOTH = ("new", "old")


def told(encode: str, prefill: str, decode: str) -> dict[Stage, list[str]]:
    return {Stage.ENCODER: encode.split(), Stage.PREFILL: prefill.split(), Stage.DECODE: decode.split()}


@pytest.mark.parametrize("of", ["", "old", "old new"])
def test_where_all_stages_have_the_same_whatever_comes_first_fits(of: str) -> None:
    assert way(told(of, of, of)) == Way()


@pytest.mark.parametrize(
    ("encode", "prefill", "decode", "weights", "without"),
    [
        ("old new", "old new", "new", "new", ""),
        ("old new", "old", "old new", "old", ""),
        ("old", "old new", "old new", "", ""),
        ("old", "old", "old new", "", ""),
        ("old", "new", "new", "", "encoder"),
        ("old", "old", "new", "", "encoder prefill"),
        ("old new", "old", "new", "new", "prefill"),
        ("old", "old new", "new", "new", "encoder"),
        ("", "old new", "new", "new", ""),
        ("old", "", "new", "", "encoder"),
        ("old", "old", "", "", ""),
        ("old new", "old", "", "old", ""),
    ],
)
def test_stages_go_on_from_each_other_or_are_left_out(
    encode: str, prefill: str, decode: str, weights: str, without: str
) -> None:
    assert way(told(encode, prefill, decode)) == Way(weights, frozenset(map(Stage, without.split())))


def test_what_was_said_binds() -> None:
    assert way(told("old new", "old new", "old new"), "old") == Way("old")
    assert way(told("new", "new", "old new"), "old") == Way("old", frozenset({Stage.ENCODER, Stage.PREFILL}))
    assert way({}, "old") == Way("old")


def test_load_is_spread_over_what_several_stages_have() -> None:
    chosen: list[list[str]] = []
    way(told("", "old new older", "old new"), choose=lambda common: chosen.append(list(common)) or common[0])  # type: ignore[func-returns-value]
    assert chosen == [["new", "old"]]


def test_no_stage_is_asked_to_go_on_from_other_weights() -> None:
    kinds = ["", "old", "new", "old new"]
    for encode, prefill, decode in itertools.product(kinds, repeat=3):
        stages = told(encode, prefill, decode)
        weights, without = way(stages, choose=min)
        serving = [stages[stage] for stage in Stage if stage not in without and stages[stage]]
        if weights:
            assert all(weights in of for of in serving)
        for giver, taker in itertools.pairwise(serving):
            assert weights or set(giver) <= set(taker)
