"""What becomes of a choice after a failure, without an event loop."""

from typing import Any

import pytest

from serve_app.handoff.errors import EngineDead, HandoffLost, OtherVersion, StageError, StageTimeout, StageUnavailable
from serve_app.ingress.decisions import Attempts, Next
from serve_app.stage import Stage

GONE = StageUnavailable(Stage.DECODE, "is gone")
DEAD = EngineDead(Stage.DECODE, "has a dead engine")
OTHER = OtherVersion(Stage.DECODE, "runs in another version")
OTHER_PREFILL = OtherVersion(Stage.PREFILL, "runs in another version")
NO_PREFILL = StageUnavailable(Stage.PREFILL, "is gone")
BLOCKS_LOST = HandoffLost(Stage.DECODE, "lost the blocks")
EMBEDDINGS_LOST = HandoffLost(Stage.PREFILL, "lost the embeddings")
SLOW = StageTimeout(Stage.DECODE, "did not answer")


def after(
    attempts: Attempts,
    error: StageError,
    encoded: bool = False,
    tokens: bool = False,
    late: bool = False,
    allowed: bool = True,
    missed: bool = False,
) -> Next:
    return attempts.after(error, encoded, tokens, late, lambda resumes: allowed, missed)


@pytest.mark.parametrize(
    ("attempts", "failure", "following"),
    [
        ({}, {}, Next.AGAIN),
        ({}, {"allowed": False}, Next.GIVE_UP),
        ({"resumable": True}, {"tokens": True}, Next.RESUME),
        ({"resumable": True}, {"tokens": True, "late": True}, Next.RESUME),
        ({"resumable": True, "buffered": True}, {"tokens": True}, Next.RESUME),
        ({"resumable": True}, {"tokens": True, "allowed": False}, Next.GIVE_UP),
        ({"buffered": True}, {"tokens": True}, Next.RESTART),
        ({"buffered": True}, {"tokens": True, "late": True}, Next.GIVE_UP),
        ({}, {"tokens": True}, Next.GIVE_UP),
    ],
)
def test_what_follows_a_lost_replica(attempts: dict[str, Any], failure: dict[str, Any], following: Next) -> None:
    assert after(Attempts(**attempts), GONE, **failure) is following


@pytest.mark.parametrize(("buffered", "following"), [(False, Next.GIVE_UP), (True, Next.RESTART)])
def test_nobody_resumes_from_tokens_of_weights_that_are_gone(buffered: bool, following: Next) -> None:
    assert after(Attempts(resumable=True, buffered=buffered), OTHER, tokens=True) is following


@pytest.mark.parametrize(("tokens", "resumes"), [(False, False), (True, True)])
def test_whether_it_resumes_is_told_to_who_allows_retries(tokens: bool, resumes: bool) -> None:
    asked: list[bool] = []

    def allow(what: bool) -> bool:
        asked.append(what)
        return True

    Attempts(resumable=True).after(GONE, False, tokens, False, allow)
    assert asked == [resumes]


@pytest.mark.parametrize("failure", [{"tokens": True}, {"tokens": True, "late": True}])
def test_nobody_is_asked_for_a_retry_that_cannot_be(failure: dict[str, Any]) -> None:
    assert Attempts().after(GONE, False, True, False, pytest.fail) is Next.GIVE_UP


def test_two_engines_that_died_are_enough() -> None:
    attempts = Attempts()
    assert [after(attempts, DEAD), after(attempts, DEAD)] == [Next.AGAIN, Next.GIVE_UP]


@pytest.mark.parametrize(
    ("errors", "encoded", "without_encoders", "without_prefill"),
    [
        ([], False, False, False),
        ([GONE, GONE, SLOW], True, False, False),
        ([EMBEDDINGS_LOST], True, False, False),
        ([EMBEDDINGS_LOST] * 2, True, True, False),
        ([EMBEDDINGS_LOST] * 2, False, False, False),
        ([NO_PREFILL], False, False, False),
        ([NO_PREFILL, BLOCKS_LOST], False, False, True),
        ([BLOCKS_LOST] * 2, True, True, True),
        ([OTHER], False, True, True),
        ([OTHER_PREFILL], True, True, False),
        ([OTHER_PREFILL], False, False, True),
    ],
)
def test_next_attempt_does_without_what_failed(
    errors: list[StageError], encoded: bool, without_encoders: bool, without_prefill: bool
) -> None:
    attempts = Attempts()
    for error in errors:
        after(attempts, error, encoded)
    assert (attempts.without_encoders, attempts.without_prefill) == (without_encoders, without_prefill)


def test_structured_choice_is_decodes_alone_after_one_loss_and_its_grammar_is_at_fault_after_two() -> None:
    attempts = Attempts(structured=True)
    assert after(attempts, BLOCKS_LOST) is Next.AGAIN
    assert attempts.without_encoders and attempts.without_prefill and not attempts.cannot_be_structured
    assert after(attempts, BLOCKS_LOST) is Next.GIVE_UP
    assert attempts.cannot_be_structured


def test_what_a_prefix_cache_did_not_have_tells_nothing_of_the_stages() -> None:
    attempts = Attempts(structured=True)
    assert after(attempts, EMBEDDINGS_LOST, encoded=True, missed=True) is Next.AGAIN
    assert after(attempts, BLOCKS_LOST, missed=True) is Next.AGAIN
    assert attempts == Attempts(structured=True)
