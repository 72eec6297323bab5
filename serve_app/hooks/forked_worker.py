"""What Ray runs in the place of Python to start a replica's process: it asks a server that has vLLM loaded to fork one.

``launch.fork_server`` starts that server, on the CPU only. Ray's raylet runs this file with the command of a worker::

    raylet ── exec ──> this file ── its files, environment, command ──> fork server ── fork ──> replica ── fork ──> core

The replica runs Ray's own worker from there on. Before that, while it has one thread, it forks the process that will be its
engine's core, which waits for what to run (``Core``). Where no server answers, or its environment is another one, Python
starts as ever. Imports stay light: the file itself runs before each replica.
"""

import atexit
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, reduction, resource_tracker, spawn
from typing import Any, NamedTuple, cast

ADDRESS_ENV = "EPD_FORK_SERVER"
"""Set by `make serve` to the socket of its fork server."""

ENGINE = "engine"
"""The first argument for a replica that starts an engine."""

ANSWER_S = 40.0
"""Seconds in which the server forks; it may still be loading. Ray gives a worker 60 s to report."""

RAYS_OWN = ("RAY_", "SPT_NOENV", "PYTHONBREAKPOINT", "EPD_", "OLDPWD", "PWD", "SHLVL", "_")
"""Beginnings of names whose values may differ between the server and a worker: nothing that the server has loaded reads
them. It has not loaded Ray."""

loaded_with: Mapping[str, str] | None = None
"""In the server and what it forks: the environment in which it has loaded its modules, before what it set itself."""

core: "Core | None" = None
"""In a replica that the server has forked: the process that waits to become its engine's core."""


def differences(given: Mapping[str, str], loaded: Mapping[str, str]) -> set[str]:
    """Names of variables that a forked process would have to have seen before its modules were loaded."""
    names = {name for name in given.keys() | loaded.keys() if given.get(name) != loaded.get(name)}
    return {name for name in names if not name.startswith(RAYS_OWN)}


class Place(NamedTuple):
    """What a process has from the one that starts it, besides its files."""

    environ: dict[str, str]
    folder: str
    nice: int
    blocked: set[signal.Signals]

    @classmethod
    def here(cls) -> "Place":
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return cls(dict(os.environ), os.getcwd(), nice, {signal.Signals(each) for each in blocked})

    def take(self, files: list[int]) -> None:
        """Make it this process's. ``files`` become its standard streams."""
        for stream, file in enumerate(files):
            os.dup2(file, stream)
            os.close(file)
        # What is equal stays where it is: setproctitle finds a process's title before its first variable.
        for name in os.environ.keys() - self.environ.keys():
            del os.environ[name]
        for name, value in self.environ.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        os.chdir(self.folder)
        os.setpriority(os.PRIO_PROCESS, 0, self.nice)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)


class RayWorker:
    """A worker of Ray: what the fork server's child runs, in the place of a process of ``multiprocessing``."""

    def __init__(self, argv: list[str], place: Place, has_engine: bool) -> None:
        self.argv = argv
        self.place = place
        self.has_engine = has_engine

    def _bootstrap(self, parent_sentinel: int) -> int:
        """Called by ``multiprocessing``'s fork server in the child. Returns the exit status."""
        global core
        server: Any = forkserver._forkserver
        files, tracker = server._inherited_fds, cast(Any, resource_tracker._resource_tracker)
        for file in (parent_sentinel, server._forkserver_alive_fd, tracker._fd):
            os.close(file)
        # This process is nobody's of multiprocessing.
        server._forkserver_address = server._forkserver_alive_fd = server._inherited_fds = tracker._fd = None
        self.place.take(files)
        os.setpgid(0, 0)
        if (names := differences(self.place.environ, loaded_with or {})) or loaded_with is None:
            print(f"this worker is not forked: {', '.join(sorted(names))} differ", file=sys.stderr, flush=True)
            os.execv(sys.executable, [sys.executable, *self.argv])
        if self.has_engine:
            core = Core()
        sys.argv = list(self.argv)
        sys.path[0] = os.path.dirname(self.argv[0])
        return status_of(lambda: runpy.run_path(self.argv[0], run_name="__main__"))


class Core:
    """A child process that waits to run what its parent starts as a process of ``multiprocessing``. For one such."""

    def __init__(self) -> None:
        self._parent, child = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._parent.close()
                code = run_core(child)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        child.close()

    def run(self, data: bytes, sentinels: list[int], tracker: int, files: list[int]) -> None:
        """``data``: pickled as by ``multiprocessing``. ``sentinels``: a pipe that ends with the parent, and the end of one
        that ends with the child. ``files``: the standard streams, then what the pickle names by its place in here."""
        reduction.sendfds(self._parent, [*sentinels, tracker, *files])
        self._parent.sendall(data)
        self._parent.close()


def run_core(parent: socket.socket) -> int:
    """The child of ``Core``: returns the exit status."""
    try:
        files = reduction.recvfds(parent, forkserver.MAXFDS_TO_SEND)
    except (EOFError, RuntimeError):  # the replica has ended
        return 0
    sentinel, _, tracker, *given = files
    server: Any = forkserver._forkserver
    cast(Any, resource_tracker._resource_tracker)._fd = tracker
    server._inherited_fds = given
    code: int = spawn._main(parent.detach(), sentinel)
    return code


class Prepared:
    """What ``multiprocessing`` sends ahead of a process, for which ``Place`` is taken before the process is read."""

    def __init__(self, place: Place, data: dict[str, Any]) -> None:
        self._place = place
        self._data = data

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return prepare, (self._place, self._data)


def prepare(place: Place, data: dict[str, Any]) -> dict[str, Any]:
    server: Any = forkserver._forkserver
    place.take(server._inherited_fds[:3])
    return data


def status_of(program: Callable[[], Any]) -> int:
    """The exit status of a program, after what Python does at its end."""
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def ask(address: str, process: Any, files: list[int], seconds: float = ANSWER_S) -> tuple[int, int] | None:
    """Have the server fork a process. Returns its id and a file from which its exit status can be read, or None."""
    status, status_w = os.pipe()
    data, data_w = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(seconds)
            server.connect(address)
            reduction.sendfds(server, [data, status_w, nothing, nothing, *files])
        for file in (data, status_w, nothing):
            os.close(file)
        with open(data_w, "wb") as pipe:
            pipe.write(reduction.ForkingPickler.dumps({}))
            pipe.write(reduction.ForkingPickler.dumps(process))
        if select.select([status], [], [], seconds)[0]:
            return forkserver.read_signed(status), status
    except (OSError, EOFError):
        pass
    os.close(status)
    return None


def main() -> int:
    kind, *argv = sys.argv[1:]
    address = os.environ.get(ADDRESS_ENV)
    worker = RayWorker(argv, Place.here(), kind == ENGINE)
    forked = ask(address, worker, [0, 1, 2]) if address else None
    if forked is None:
        os.execv(sys.executable, [sys.executable, *argv])
    pid, status = forked
    try:
        return int(forkserver.read_signed(status)) & 0xFF
    except EOFError:  # the server has ended, and the replica may go on
        os.close(status)
    try:
        end = select.poll()
        end.register(os.pidfd_open(pid), select.POLLIN)
        end.poll()
    except ProcessLookupError:
        pass
    return 1


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from serve_app.hooks import forked_worker  # the server has its classes under this name

    sys.exit(forked_worker.main())
