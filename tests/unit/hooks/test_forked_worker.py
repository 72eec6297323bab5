"""Processes that are forked from a server: what they get from the one that asked, and where Python starts instead."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.hooks import forked_worker
from serve_app.hooks.forked_worker import ADDRESS_ENV, differences

SERVER = """
import os, socket, sys
from multiprocessing import forkserver
from serve_app.hooks import forked_worker
forked_worker.loaded_with = dict(os.environ)
import colorsys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("listens", flush=True)
    forkserver.main(os.dup(listener.fileno()), 0, [])
"""

TELL = """
import atexit, os, sys
print(sys.argv[1:], "colorsys" in sys.modules, os.environ.get("RAY_JOB_ID"), os.getcwd())
atexit.register(print, "at exit")
sys.exit(3)
"""

STARTS = """
import os, sys
from serve_app.hooks import forked_worker
from serve_app.stages.forked_core import Context
import told

if __name__ == "__main__":
    os.environ["SET_LATER"] = "yes"
    waiting = forked_worker.core.pid
    for _ in range(2):
        process = Context().Process(target=told.tell)
        process.start()
        process.join()
        print(process.pid == waiting, process.exitcode, flush=True)
"""

TOLD = """
import multiprocessing, os, sys
def tell():
    is_child = multiprocessing.parent_process().pid == os.getppid()
    print(is_child, "colorsys" in sys.modules, os.environ["SET_LATER"], flush=True)
    sys.exit(5)
"""

WAITS = """
import signal
from serve_app.hooks import forked_worker
print(forked_worker.core.pid, flush=True)
signal.pause()
"""


ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(forked_worker.__file__).parents[2])}
"""Of servers and workers; pytest changes its own."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The socket of a server that has loaded ``colorsys``."""
    address = tmp_path / "forks"
    command = [sys.executable, "-c", SERVER, str(address)]
    with subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        yield address
        process.stdin.close()  # type: ignore[union-attr]  # it ends with whoever started it
        assert process.wait(10) == 0


def command(tmp_path: Path, program: str, *args: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(program)
    (tmp_path / "told.py").write_text(TOLD)
    return [sys.executable, "-S", "-E", forked_worker.__file__, args[0], str(path), *args[1:]]


def run(tmp_path: Path, program: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tmp_path, program, *args),
        env=ENV | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_worker_has_what_is_loaded_and_the_files_command_and_folder_of_the_one_that_asks(
    server: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, TELL, "ingress", "a b", RAY_JOB_ID="7", EPD_FORK_SERVER=str(server))
    assert done.stdout.splitlines() == [f"['a b'] True 7 {tmp_path}", "at exit"], done.stderr
    assert done.returncode == 3


def test_worker_of_another_environment_is_a_python_of_its_own(server: Path, tmp_path: Path) -> None:
    done = run(tmp_path, TELL, "ingress", OMP_NUM_THREADS="4", EPD_FORK_SERVER=str(server))
    assert done.stdout.splitlines() == [f"[] False None {tmp_path}", "at exit"]
    assert "OMP_NUM_THREADS" in done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize("address", ["", "nobody"])
def test_without_a_server_python_starts(tmp_path: Path, address: str) -> None:
    done = run(tmp_path, TELL, "ingress", **{ADDRESS_ENV: address and str(tmp_path / address)})
    assert (done.stdout.splitlines()[0], done.returncode) == (f"[] False None {tmp_path}", 3)


def test_first_process_of_a_replica_runs_in_the_child_that_waits_and_the_next_is_spawned(
    server: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, STARTS, "engine", EPD_FORK_SERVER=str(server))
    lines = ["True True yes", "True 5", "True False yes", "False 5"]
    assert done.stdout.splitlines() == lines, done.stderr


def test_child_that_waits_ends_with_its_replica(server: Path, tmp_path: Path) -> None:
    env = ENV | {ADDRESS_ENV: str(server)}
    asks = command(tmp_path, WAITS, "engine")
    with subprocess.Popen(asks, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        waiting = int(worker.stdout.readline())
        watched = os.pidfd_open(waiting)
        replica = int(Path(f"/proc/{waiting}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(replica, signal.SIGKILL)
        assert worker.wait(10) == 256 - signal.SIGKILL
        ends_by = time.monotonic() + 10
        while signal_zero(watched) and time.monotonic() < ends_by:
            time.sleep(0.01)
        assert not signal_zero(watched), "the child outlived its replica"


def signal_zero(pidfd: int) -> bool:
    """Whether a process lives."""
    try:
        signal.pidfd_send_signal(pidfd, 0)  # type: ignore[arg-type]
    except ProcessLookupError:
        return False
    return True


def test_only_variables_that_nothing_loaded_reads_may_differ() -> None:
    loaded = {"HOME": "/root", "RAY_JOB_ID": "1", "EPD_A": "1"}
    assert differences({"HOME": "/root", "RAY_JOB_ID": "2", "RAY_SERVE_X": "0"}, loaded) == set()
    assert differences({"HOME": "/", "OMP_NUM_THREADS": "2"}, loaded) == {"HOME", "OMP_NUM_THREADS"}
    assert differences({}, {"VLLM_X": "1"}) == {"VLLM_X"}
