"""Errors cross from replica to ingress with stage, message and status."""

import cloudpickle
import pytest

from serve_app.handoff.errors import (
    BadRequest,
    CannotStart,
    ConfigError,
    EngineDead,
    EPDError,
    HandoffLost,
    OtherVersion,
    Overloaded,
    StageError,
    StageTimeout,
    StageUnavailable,
)
from serve_app.stage import Stage


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


STAGE_ERRORS = sorted((c for c in subclasses(StageError)), key=lambda c: c.__name__)
PLAIN = sorted(
    (c for c in subclasses(EPDError) - subclasses(StageError) if c.__module__ == EPDError.__module__),
    key=lambda c: c.__name__,
)


def test_all_errors_are_here() -> None:
    assert {StageError, HandoffLost, StageTimeout, StageUnavailable} <= set(STAGE_ERRORS)
    assert {EPDError, ConfigError, CannotStart, BadRequest, Overloaded} == set(PLAIN)


@pytest.mark.parametrize("cls", STAGE_ERRORS)
def test_stage_error_keeps_stage_message_and_status_across_processes(cls: type[StageError]) -> None:
    error = cls(Stage.PREFILL, "ran out of patience")
    there = cloudpickle.loads(cloudpickle.dumps(error))
    assert type(there) is cls
    assert (there.stage, there.message, there.status) == (Stage.PREFILL, "ran out of patience", cls.status)
    assert str(there) == "The prefill stage ran out of patience" == str(error)


@pytest.mark.parametrize("cls", PLAIN)
def test_plain_error_keeps_its_message_across_processes(cls: type[EPDError]) -> None:
    there = cloudpickle.loads(cloudpickle.dumps(cls("what and why")))
    assert type(there) is cls
    assert str(there) == "what and why"


def test_only_a_timeout_is_a_gateway_timeout() -> None:
    assert {cls: cls.status for cls in STAGE_ERRORS if cls.__module__ == StageError.__module__} == {
        StageError: 503,
        HandoffLost: 503,
        StageUnavailable: 503,
        EngineDead: 503,
        OtherVersion: 503,
        StageTimeout: 504,
    }


def test_mistake_of_a_client_is_not_a_failure_of_a_stage() -> None:
    assert not issubclass(BadRequest, StageError)
