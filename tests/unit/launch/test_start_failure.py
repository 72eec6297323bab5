"""An engine's processes tell their replica why they end, and the replica raises it."""

import logging
import multiprocessing
import os
import threading

import pytest

from serve_app.handoff.errors import CannotStart, ConfigError
from serve_app.hooks.start_failure import REASON_ENV, tell_replica
from serve_app.launch.start_failure import EngineFailed, hears_engine, says_why

SPAWN = multiprocessing.get_context("spawn")


def core(*failures: tuple[str, str]) -> None:
    """A process of an engine that logs, or in a thread raises, each (message, what was raised)."""
    tell_replica()
    logger = logging.getLogger("vllm.v1.engine.core")
    logger.propagate = True
    for message, raised in failures:
        if message == "thread":
            thread = threading.Thread(target=exec, args=(f"raise OSError({raised!r})",))
            thread.start()
            thread.join()
            continue
        try:
            raise ValueError(raised)
        except ValueError:
            logger.exception(message)


def heard(*failures: tuple[str, str]) -> list[str]:
    with pytest.raises((EngineFailed, RuntimeError)) as caught, hears_engine():
        process = SPAWN.Process(target=core, args=failures)
        process.start()
        process.join(60)
        raise RuntimeError("Engine core initialization failed")
    assert REASON_ENV not in os.environ
    return caught.value.errors if isinstance(caught.value, EngineFailed) else []


WORKER, CORE = "WorkerProc failed to start.", "EngineCore failed to start."


@pytest.mark.parametrize(
    ("failures", "errors"),
    [
        ([(WORKER, "first"), (CORE, "its consequence")], ["ValueError: first"]),
        ([("could not load a plugin", "harmless"), (CORE, "cause")], ["ValueError: cause"]),
        ([("thread", "harmless"), (CORE, "cause")], ["ValueError: cause"]),
        ([("thread", "Address already in use")], ["OSError: Address already in use"]),
        ([], []),
    ],
    ids=str,
)
def test_replica_hears_what_ended_the_start(failures: list[tuple[str, str]], errors: list[str]) -> None:
    assert heard(*failures) == errors


def test_engine_that_starts_keeps_nothing_of_it() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with hears_engine():
        assert os.environ[REASON_ENV].startswith(f"/proc/{os.getpid()}/fd/")
    assert REASON_ENV not in os.environ
    assert set(os.listdir("/proc/self/fd")) == before


def test_replica_itself_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers, hook = list(logging.getLogger("vllm").handlers), threading.excepthook
    monkeypatch.setenv(REASON_ENV, "/dev/null")
    tell_replica()
    assert (logging.getLogger("vllm").handlers, threading.excepthook) == (handlers, hook)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ConfigError("`a` is wrong: use `b`"), "decode cannot start: `a` is wrong: use `b`"),
        (EngineFailed(["ValueError: no good. Sorry."]), "decode cannot start: no good."),
        (OSError("You are trying to access a gated repo."), "decode cannot start: `model: a/b` asks for a login."),
    ],
    ids=str,
)
def test_replica_says_why_in_a_sentence(raised: Exception, words: str) -> None:
    with pytest.raises(CannotStart) as caught, says_why("decode", "a/b"):
        raise raised
    assert str(caught.value).startswith(words)
    assert caught.value.__suppress_context__, "the traceback ends with the sentence"


def test_only_a_port_that_was_taken_is_worth_another_try() -> None:
    assert EngineFailed(["RuntimeError: x", "ZMQError: Address already in use (addr='tcp://…')"]).port_taken
    assert not EngineFailed(["ValueError: no"]).port_taken
