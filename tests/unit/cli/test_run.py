"""The cluster of `serve run`, its end by signals and when a stage cannot start; no Ray is started."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray import serve

from serve_app.cli import run
from serve_app.handoff.errors import CannotStart

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
        self.runs = threading.Event()
        self.ends: Callable[[], None] = lambda: None

    def main(self, args: list[str], **kwargs: Any) -> None:
        assert Path(args[-1]).name == "serve_config.yaml" and not kwargs["standalone_mode"]
        try:
            self.runs.set()
            while not self.breaks.wait(0.01):
                pass
            raise ConnectionError
        except KeyboardInterrupt:
            self.interrupted = True
            self.ends()
            sys.exit()
        except Exception:
            sys.exit()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As in a terminal, whoever started pytest; and as before when the test is over."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, run.ENDS)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def serve_run(monkeypatch: pytest.MonkeyPatch) -> ServeRun:
    command = ServeRun()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
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
    if in_background:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run.run(CONFIG, lambda: False) == 1
    assert serve_run.interrupted
    assert capfd.readouterr().err.splitlines()[-1] == WHY


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_failures_after_the_start_are_ray_serves_to_retry(serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def status() -> Any:
        asked.append("status")
        return SimpleNamespace(applications=application(Encoder=deployment(message=told())) if len(asked) > 1 else {})

    monkeypatch.setattr(serve, "status", status)

    def ready() -> bool:
        threading.Timer(0.1, press).start()
        return True

    assert run.run(CONFIG, ready) == 0
    assert asked == ["status"] * 2, "once by the watch, once for what is under way at the end"


def test_ray_that_does_not_answer_is_asked_again(serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def status() -> Any:
        asked.append("status")
        if len(asked) == 3:
            press()
        raise ConnectionError

    monkeypatch.setattr(serve, "status", status)
    assert run.run(CONFIG, lambda: False) == 0
    assert len(asked) >= 3 and serve_run.interrupted


def test_serve_run_that_breaks_is_no_success(serve_run: ServeRun) -> None:
    serve_run.breaks.set()
    assert run.run(CONFIG, lambda: False) == 1


# ---- signals


class Ingress:
    """Two replicas of the ingress, by the handle of an application."""

    def __init__(self, serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> None:
        self.under_way = [0, 0]
        self.seconds = 60.0
        self.busy = False
        self.closed = threading.Event()
        monkeypatch.setattr(
            serve, "status", lambda: SimpleNamespace(applications=application(Ingress=deployment(running=2)))
        )
        monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: self)

    def broadcast(self, method: str) -> Any:
        assert method == "close"
        return self

    def results(self, **kwargs: Any) -> list[Any]:
        self.closed.set()
        if self.busy:
            raise TimeoutError
        return [*((count, self.seconds) for count in self.under_way), ConnectionError("a replica that has just died")]


@pytest.fixture
def ingress(serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch) -> Ingress:
    return Ingress(serve_run, monkeypatch)


@contextmanager
def meanwhile(do: Callable[[], None]) -> Iterator[None]:
    """In another thread, while the main one runs `serve run`; what fails there fails the test."""
    with ThreadPoolExecutor() as pool:
        doing = pool.submit(do)
        yield
    doing.result()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def terminated() -> bool:
    """Once all is ready."""
    press(signal.SIGTERM)
    return True


BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_signal_ends_serve_run_when_the_requests_under_way_have_ended(
    serve_run: ServeRun, ingress: Ingress, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    ingress.under_way = [2, 1]

    def user() -> None:
        serve_run.runs.wait()
        press(number)
        wait_until(ingress.closed.is_set)
        ingress.under_way = [0, 1]
        for ingress.busy in (False, True):
            ingress.closed.clear()
            wait_until(ingress.closed.is_set)  # it is asked again
        assert not serve_run.interrupted
        ingress.busy, ingress.under_way = False, [0, 0]

    with meanwhile(user):
        assert run.run(CONFIG, lambda: True) == 0
    assert serve_run.interrupted
    assert f"{number.name}; requests under way: 3. They get 60 s" in capfd.readouterr().err


@BOTH
def test_second_signal_ends_at_once_and_those_after_it_do_not_disturb_the_end(
    serve_run: ServeRun, ingress: Ingress, number: signal.Signals
) -> None:
    ingress.under_way = [1, 0]
    ended: list[str] = []

    def ends() -> None:
        press(number)
        press(run.ENDS)
        ended.append("in order")

    serve_run.ends = ends

    def user() -> None:
        serve_run.runs.wait()
        press(number)
        wait_until(ingress.closed.is_set)
        press(number)

    with meanwhile(user):
        assert run.run(CONFIG, lambda: True) == 0
    assert ended == ["in order"]


def test_requests_get_no_longer_than_the_time_to_drain(serve_run: ServeRun, ingress: Ingress) -> None:
    ingress.under_way, ingress.seconds = [1, 0], 0.2
    began = time.monotonic()
    assert run.run(CONFIG, terminated) == 0
    assert 0.2 <= time.monotonic() - began < 5


def test_application_that_cannot_be_asked_is_ended(
    serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def status() -> Any:
        raise ConnectionError("no controller")

    monkeypatch.setattr(serve, "status", status)
    assert run.run(CONFIG, terminated) == 0
    assert "Ingress replicas cannot be asked for what is under way: ConnectionError" in capfd.readouterr().err


@BOTH
def test_signal_while_ray_starts_is_no_traceback(
    serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def init(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        press(number)
        time.sleep(10)

    ended: list[str] = []
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(run, "end_what_starts", lambda: ended.append("what has begun to start"))
    began = time.monotonic()
    assert run.run(CONFIG, lambda: False) == 0
    assert time.monotonic() - began < 5
    assert ended == ["what has begun to start"]


# ---- the cluster


class Gcs(grpc.GenericRpcHandler):
    """Of a Ray cluster, or what else has its port."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self.code = code

    def service(self, call: Any) -> Any:
        def answer(request: bytes, context: Any) -> bytes:
            if self.code is not grpc.StatusCode.OK:
                context.abort(self.code, "")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer) if call.method.endswith("/GetClusterId") else None


@contextmanager
def listening(gcs: Gcs | None, port: int = 0) -> Iterator[int]:
    """On a port of every address, as Ray asks at the node's; None: something that says nothing."""
    if gcs is None:
        with socket.create_server(("", 0)) as silent:
            yield silent.getsockname()[1]
        return
    server = grpc.server(ThreadPoolExecutor(1), handlers=[gcs])
    port = server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` leaves the address of its cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray/ray_current_cluster"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_without_a_note_ray_starts_a_cluster(note: Path) -> None:
    assert run.cluster_address() is None


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED])
def test_cluster_of_the_note_that_answers_is_joined(note: Path, code: grpc.StatusCode) -> None:
    with listening(Gcs(code)) as port:
        note.write_text(f"127.0.0.1:{port}")
        assert run.cluster_address() is None


def test_note_of_a_cluster_that_is_gone_is_passed_by_with_a_sentence(
    note: Path, free_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    note.write_text(f"127.0.0.1:{free_port}")
    began = time.monotonic()
    assert run.cluster_address() == "local"
    assert time.monotonic() - began < run.CLUSTER_S / 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"{note}: no Ray cluster answers at \S+:{free_port}\. A new one is started here", line)
    assert note.exists(), "another program may want it"


@pytest.mark.parametrize("other", [None, Gcs(grpc.StatusCode.UNIMPLEMENTED)], ids=["silent", "another service"])
def test_another_program_on_the_port_of_the_note_is_no_cluster(
    note: Path, monkeypatch: pytest.MonkeyPatch, other: Gcs | None
) -> None:
    monkeypatch.setattr(run, "CLUSTER_S", 0.5)
    with listening(other) as port:
        note.write_text(f"127.0.0.1:{port}")
        assert run.cluster_address() == "local"


def test_note_that_power_loss_left_empty_is_passed_by(note: Path) -> None:
    note.touch()
    assert run.cluster_address() == "local"


def test_cluster_that_the_user_names_may_be_starting(
    note: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    refused, joined = threading.Event(), threading.Event()

    def head() -> None:
        refused.wait()
        with listening(Gcs(), free_port):
            joined.wait()

    def answers(*args: Any, **kwargs: Any) -> bool:
        threading.Timer(0.1, refused.set).start()
        return ask(*args, **kwargs)

    ask = run.answers
    monkeypatch.setattr(run, "answers", answers)
    with meanwhile(head):
        address = run.cluster_address()
        joined.set()
    assert address is None


def test_cluster_that_the_user_names_is_not_replaced(
    serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch, free_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CLUSTER_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    assert run.run(CONFIG, lambda: False) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"RAY_ADDRESS=127.0.0.1:{free_port}: no Ray cluster answers at \S+:{free_port}\. Start the", line)


def test_address_that_is_none_is_named(
    serve_run: ServeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head")
    assert run.run(CONFIG, lambda: False) == 1
    assert capfd.readouterr().err.splitlines() == [
        "RAY_ADDRESS=head: Invalid address format: head. Start the cluster, or unset RAY_ADDRESS to start one here."
    ]


@pytest.mark.parametrize("named", ["local", "ray://head:10001"])
def test_what_needs_no_cluster_that_listens_is_left_to_ray(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    assert run.cluster_address() is None
