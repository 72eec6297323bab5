"""serve_app.run: `serve run` that ends when a stage cannot start; no Ray is started."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import ray
from ray import serve

from serve_app import run
from serve_app.errors import CannotStart

WHY = "encoder cannot start: no."


def told(why: str = WHY) -> str:
    return f"Error:\nTraceback\n{CannotStart.__module__}.{CannotStart.__name__}: {why}\n"


def deployment(status: str = "UPDATING", message: str = "", running: int = 0) -> Any:
    return SimpleNamespace(status=status, message=message, replica_states={"RUNNING": running})


def application(status: str = "DEPLOYING", message: str = "", **deployments: Any) -> dict[str, Any]:
    return {"epd": SimpleNamespace(status=status, message=message, deployments=deployments)}


@pytest.mark.parametrize(
    ("applications", "why"),
    [
        ({}, None),
        (application(Encoder=deployment()), None),
        (application(Decode=deployment("HEALTHY", running=1), Encoder=deployment("DEPLOY_FAILED", told())), WHY),
        (application(Encoder=deployment("UPDATING", told())), WHY),
        (application(Encoder=deployment("UPDATING", told(), running=1)), None),
        (application(Encoder=deployment("UPDATING", "Error:\nNodeDied: x")), None),
        (
            application(Encoder=deployment("DEPLOY_FAILED", "Error:\nNodeDied: x\n")),
            "encoder cannot start: NodeDied: x",
        ),
        (application("DEPLOY_FAILED", told().replace("CannotStart", "ConfigError")), WHY),
        (application("DEPLOY_FAILED", "Traceback\nKeyError: 'x'\n"), "KeyError: 'x'"),
        (application("DEPLOY_FAILED", ""), "Ray Serve does not say why"),
    ],
    ids=str,
)
def test_stage_of_which_no_replica_runs_fails_the_start_with_its_reason(applications: Any, why: str | None) -> None:
    assert run.failure(applications) == why


class ServeRun:
    """Ray's `serve run`, which waits until Ctrl-C or an error, and ends with 0."""

    def __init__(self) -> None:
        self.interrupted = False
        self.breaks = threading.Event()

    def main(self, args: list[str], **kwargs: Any) -> None:
        assert Path(args[0]).name == "serve_config.yaml" and not kwargs["standalone_mode"]
        try:
            while not self.breaks.wait(0.01):
                pass
            raise ConnectionError
        except KeyboardInterrupt:
            self.interrupted = True
            sys.exit()
        except Exception:
            sys.exit()


@pytest.fixture
def serve_run(monkeypatch: pytest.MonkeyPatch) -> ServeRun:
    command = ServeRun()
    monkeypatch.setattr(run, "serve_run", command)
    monkeypatch.setattr(run, "POLL_S", 0.01)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    return command


CONFIG = Path("serve_config.yaml")


@pytest.mark.parametrize("in_background", [False, True])
def test_start_that_fails_ends_serve_run_and_its_reason_is_the_last_line(
    serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], in_background: bool
) -> None:
    failed = application(Encoder=deployment("DEPLOY_FAILED", told()))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=failed))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        assert run.run(CONFIG, lambda: False) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert serve_run.interrupted
    assert capfd.readouterr().err.splitlines()[-1] == WHY


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def sigint() -> Iterator[None]:
    """As in a terminal, whoever started pytest."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_failures_after_the_start_are_ray_serves_to_retry(serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def status() -> Any:
        asked.append("status")
        return SimpleNamespace(applications=application(Encoder=deployment(message=told())) if len(asked) > 1 else {})

    monkeypatch.setattr(serve, "status", status)

    def ready() -> bool:
        threading.Timer(0.1, press_ctrl_c).start()
        return True

    assert run.run(CONFIG, ready) == 0
    assert asked == ["status"]


@pytest.mark.usefixtures("sigint")
def test_ray_that_does_not_answer_is_asked_again(serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def status() -> Any:
        asked.append("status")
        if len(asked) == 3:
            press_ctrl_c()
        raise ConnectionError

    monkeypatch.setattr(serve, "status", status)
    assert run.run(CONFIG, lambda: False) == 0
    assert len(asked) >= 3 and serve_run.interrupted


def test_serve_run_that_breaks_is_no_success(serve_run: ServeRun) -> None:
    serve_run.breaks.set()
    assert run.run(CONFIG, lambda: False) == 1


def test_ctrl_c_before_ray_runs_is_no_traceback(monkeypatch: pytest.MonkeyPatch, serve_run: ServeRun) -> None:
    def aborted(*args: Any, **kwargs: Any) -> None:
        raise click.Abort

    monkeypatch.setattr(serve_run, "main", aborted)
    began = time.monotonic()
    assert run.run(CONFIG, lambda: False) == 0
    assert time.monotonic() - began < 5
