"""``python -m serve_app serve``: Ray's `serve run`, which says when every stage can serve, and ends when one cannot start.

`serve run` itself waits for Ctrl-C even if the application fails, then cuts the requests under way. SIGTERM aborts it. If
the note that `ray start` left names a dead cluster, it waits for it forever.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
import ray
from click import Abort
from ray import serve
from ray._common.utils import get_ray_address_file
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS, RAY_ADDRESS_ENVIRONMENT_VARIABLE
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.scripts import run as serve_run

from serve_app.launch.start_reason import sentence

POLL_S = 0.5
ENDS = signal.SIGUSR1
"""The signal by which a thread ends `serve run` in the main thread, as Ctrl-C does."""

CLUSTER_S = 10.0
"""Seconds for a cluster on a slow host to answer. The port of a dead cluster usually refuses at once."""

INGRESS_S = 10.0
"""Seconds for all ingress replicas to count the requests under way."""


class NoCluster(Exception):
    """``RAY_ADDRESS`` names no cluster that can be joined. The message is for the user."""


def answers(address: str, wait: bool) -> bool:
    """Whether a Ray cluster has its GCS at ``host:port``, and not another program. ``wait``: until it has started."""
    with init_grpc_channel(address, GLOBAL_GRPC_OPTIONS) as channel:
        ask = NodeInfoGcsServiceStub(channel).GetClusterId
        try:
            ask(GetClusterIdRequest(), timeout=CLUSTER_S, wait_for_ready=wait)
        except grpc.RpcError as error:  # a cluster may ask for a token
            return error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    return True


def cluster_address() -> str | None:
    """The address for ``ray.init``. With None Ray joins the cluster of ``RAY_ADDRESS``, or of the note that `ray start` left
    and only `ray stop` removes, or starts its own. Raises ``NoCluster``."""
    named = os.environ.get(RAY_ADDRESS_ENVIRONMENT_VARIABLE) or None
    if named is not None and "://" in named:  # Ray's client has a timeout
        return None
    try:
        address = services.canonicalize_bootstrap_address(named)
        if address is None or answers(address, wait=named is not None):
            return None
        why = f"no Ray cluster answers at {address}"
    except (OSError, ValueError) as error:
        why = str(error)
    if named is not None:
        raise NoCluster(f"RAY_ADDRESS={named}: {why}. Start the cluster, or unset RAY_ADDRESS to start one here.")
    note = get_ray_address_file(None)
    print(f"{note}: {why}. A new one is started here; `ray stop` removes this note.", file=sys.stderr, flush=True)
    return "local"


def failure(applications: dict[str, Any]) -> str | None:
    """Why an application will not start, from Ray Serve's status. A deployment with running replicas does not count: Serve
    tries the others again."""
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
    """The error of a traceback."""
    return ([line.strip() for line in message.splitlines() if line.strip()] or ["Ray Serve does not say why"])[-1]


class Watch(threading.Thread):
    """Calls ``ready`` until it is true, and ends `serve run` when an application cannot start.

    ``over`` is set when `serve run` ends, and Ray with it.
    """

    def __init__(self, ready: Callable[[], bool], over: threading.Event) -> None:
        super().__init__(name="epd-start-watch", daemon=True)
        self._ready = ready
        self._over = over
        self.failure: str | None = None

    def run(self) -> None:
        while not self._over.wait(POLL_S):
            if (why := self._failure()) is not None and not self._over.is_set():
                self.failure = why
                return press_for_user()
            if self._ready():
                return

    def _failure(self) -> str | None:
        try:  # without Ray, `serve.status` would start one
            return failure(serve.status().applications) if ray.is_initialized() else None
        except Exception:  # Ray or its controller is starting or ending
            return None

    def end(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join(10 * POLL_S)


class Ending:
    """Ends `serve run` when the requests under way have ended after SIGINT or SIGTERM, or at once after a second one.

    The handlers run in the main thread, which waits in `serve run`; another thread waits for the requests.
    """

    def __init__(self, over: threading.Event) -> None:
        self.pressed = False
        """Whether `serve run` has got its one Ctrl-C. A second would disturb its shutdown."""
        self._over = over
        self._draining: threading.Thread | None = None

    def handle_signals(self) -> None:
        signal.signal(ENDS, self.press)
        signal.signal(signal.SIGTERM, self.ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # background jobs of a script ignore it
            signal.signal(signal.SIGINT, self.ask)

    def press(self, *_: object) -> None:
        if not self.pressed:
            self.pressed = True
            self._over.set()
            raise KeyboardInterrupt

    def ask(self, number: int, _: FrameType | None) -> None:
        if self._draining is not None or not ray.is_initialized():
            self.press()
        elif not self.pressed:
            name = signal.Signals(number).name
            self._draining = threading.Thread(target=self._drain, args=[name], name="epd-drain", daemon=True)
            self._draining.start()

    def _drain(self, asked_by: str) -> None:
        """Have the ingress replicas refuse new requests, and wait up to ``timeouts.drain_s`` for those under way."""
        began = time.monotonic()
        under_way, seconds = close_ingresses() or (0, 0.0)
        if under_way:
            told = (
                f"requests under way: {under_way}. They get {seconds:g} s to end (`timeouts.drain_s`), new ones a 503"
            )
            print(f"\n{asked_by}; {told}. Another {asked_by} ends all at once.", file=sys.stderr, flush=True)
        while under_way and time.monotonic() - began < seconds:
            if self._over.wait(POLL_S):  # also after the last request: its end must still reach the client
                return
            under_way, seconds = close_ingresses() or (under_way, seconds)
        press_for_user()

    def end(self) -> None:
        """Stop asking ingress replicas: without Ray, Serve would start one."""
        self._over.set()
        if self._draining is not None:
            self._draining.join(2 * INGRESS_S)


def press_for_user() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, ENDS)


def close_ingresses() -> tuple[int, float] | None:
    """Have all ingress replicas refuse new requests. Returns how many are under way, and the seconds that they may take, or
    None on an error. Called again and again, it reaches replicas that have started since."""
    told: list[tuple[int, float]] = []
    try:
        for name, application in serve.status().applications.items():
            ingress = application.deployments.get("Ingress")
            if ingress is not None and ingress.replica_states.get("RUNNING", 0):
                closing = serve.get_deployment_handle("Ingress", name).broadcast("close")
                replies = closing.results(timeout_s=INGRESS_S, return_exceptions=True)
                # A replica that has just died has no requests.
                told += [reply for reply in replies if isinstance(reply, tuple)]
    except Exception as error:  # Ray's, if Serve has not started, has ended, or does not answer
        print(f"Ingress replicas cannot be asked for what is under way: {error!r}", file=sys.stderr, flush=True)
        return None
    return sum(count for count, _ in told), max((seconds for _, seconds in told), default=0.0)


def end_what_starts() -> None:
    """End the processes of a Ray that was interrupted while it started: ``ray.shutdown`` does not know them yet."""
    begun = psutil.Process().children(recursive=True)
    for process in begun:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(begun, timeout=5.0)[1]:
        with suppress(psutil.Error):
            # multiprocessing's tracker unlinks the semaphores of the others after they have ended.
            if not any("resource_tracker" in argument for argument in process.cmdline()):
                process.kill()


def run(config: Path, ready: Callable[[], bool]) -> int:
    """Returns the exit status after everything has ended: 0 by Ctrl-C or SIGTERM, 1 if the application did not start."""
    over = threading.Event()
    ending, watch = Ending(over), Watch(ready, over)
    ending.handle_signals()
    try:
        ray.init(cluster_address(), namespace=SERVE_NAMESPACE)
        ending.handle_signals()  # Ray has set its own handlers
        watch.start()
        serve_run.main(["--address", "auto", str(config)], prog_name="serve run", standalone_mode=False)
    except NoCluster as error:
        print(error, file=sys.stderr, flush=True)
    except (KeyboardInterrupt, Abort):
        pass
    except SystemExit as end:  # `serve run` exits after Ctrl-C or an error, and Ray after SIGTERM while it starts
        ending.pressed |= end.code == signal.SIGTERM
    finally:
        watch.end()
        ending.end()
        if not ray.is_initialized():
            end_what_starts()
        ray.shutdown()
    if watch.failure is not None:
        print(f"\n{watch.failure}", file=sys.stderr, flush=True)
    return int(watch.failure is not None or not ending.pressed)
