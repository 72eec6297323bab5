"""``python -m serve_app serve``: Ray's `serve run`, which says when every stage can serve, and ends when one cannot start.

`serve run` of a config file waits for Ctrl-C, whatever becomes of the application.
"""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from click import Abort
from ray import serve
from ray.serve.scripts import run as serve_run

from serve_app.start_reason import sentence

POLL_S = 0.5
ENDS = signal.SIGUSR1
"""Does here what SIGINT does. That one is ignored in the background jobs of a script."""


def failure(applications: dict[str, Any]) -> str | None:
    """Why an application will not start, as Ray Serve's status tells it. Where replicas of a deployment run, those that
    fail beside them are tried again."""
    for application in applications.values():
        if application.status == "DEPLOY_FAILED" and not application.deployments:
            return sentence(application.message) or last_line(application.message)
        for name, deployment in application.deployments.items():
            if deployment.replica_states.get("RUNNING", 0):
                continue
            if (why := sentence(deployment.message)) is not None:
                return why
            if deployment.status == "DEPLOY_FAILED":
                return f"{name.lower()} cannot start: {last_line(deployment.message)}"
    return None


def last_line(message: str) -> str:
    """Of a traceback, its error."""
    return ([line.strip() for line in message.splitlines() if line.strip()] or ["Ray Serve does not say why"])[-1]


class Watch(threading.Thread):
    """Of a start: calls ``ready`` until it is true, and presses Ctrl-C for the user when an application cannot start."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        super().__init__(name="epd-start-watch", daemon=True)
        self._ready = ready
        self._over = threading.Event()
        self.failure: str | None = None

    def run(self) -> None:
        while not self._over.wait(POLL_S):
            if (why := self._failure()) is not None and not self._over.is_set():
                self.failure = why
                signal.pthread_kill(threading.main_thread().ident or 0, ENDS)
                return
            if self._ready():
                return

    def _failure(self) -> str | None:
        try:  # asked before `serve run` has started Ray, or while it ends it, Serve would start another
            return failure(serve.status().applications) if ray.is_initialized() else None
        except Exception:  # Ray and its controller come and go
            return None

    def end(self) -> None:
        self._over.set()
        self.join(10 * POLL_S)


def run(config: Path, ready: Callable[[], bool]) -> int:
    """The exit status, once everything has ended: 0 after Ctrl-C, 1 where the application did not start."""
    signal.signal(ENDS, signal.default_int_handler)
    watch = Watch(ready)
    watch.start()
    pressed = False
    try:
        serve_run.main([str(config)], prog_name="serve run", standalone_mode=False)
    except SystemExit as end:  # of `serve run`, which does so with 0 after Ctrl-C, and after errors of its own too
        pressed = isinstance(end.__context__, KeyboardInterrupt)
    except Abort:
        pressed = True
    finally:
        watch.end()
        ray.shutdown()
    if watch.failure is not None:
        print(f"\n{watch.failure}", file=sys.stderr, flush=True)
    return int(watch.failure is not None or not pressed)
