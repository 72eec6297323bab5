"""Engines die with their replica, and NIXL's thread is still. Real processes, no waiting."""

import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from serve_app.hooks.vllm_plugin import REPLICA_ENV, SCRATCH_ENV, STILL_NIXL_ENV

LIMIT_S = 60.0


def engine(pipe: Connection) -> None:
    """An engine process: does what vLLM does first, then waits for ever."""
    from serve_app.hooks import vllm_plugin

    vllm_plugin.register()
    vllm_plugin.register()
    lock = multiprocessing.Lock()  # a file in /dev/shm, as vLLM's executor has one
    pipe.send((os.getpid(), [thread.name for thread in threading.enumerate()], lock._semlock.name))
    with contextlib.suppress(EOFError):
        pipe.recv()
        return
    threading.Event().wait()  # vLLM's engine does not see that its replica is gone


def replica() -> None:
    """A replica: starts an engine as vLLM does, prints what it says and waits until its own input ends."""
    multiprocessing.set_start_method("spawn")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=engine, args=(theirs,))
    child.start()
    pid, threads, semaphore = ours.recv()
    print(pid, ",".join(threads), semaphore, flush=True)
    sys.stdin.read()
    ours.send("end")
    child.join()


def start_replica(**env: str) -> tuple[subprocess.Popen[str], int, list[str], str]:
    """A replica process, the pid of its engine, the engine's threads and the name of its semaphore."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import replica; replica()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != REPLICA_ENV}, **env},
        process_group=0,
    )
    assert process.stdout is not None
    pid, threads, semaphore = process.stdout.readline().split()
    return process, int(pid), threads.split(","), semaphore


def ends(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], LIMIT_S)[0])


def test_engine_ends_when_its_replica_is_killed() -> None:
    process, pid, threads, _ = start_replica(**{REPLICA_ENV: "r1"})
    pidfd = os.pidfd_open(pid)
    try:
        assert threads.count("epd-parent-watch") == 1  # registered twice
        process.send_signal(signal.SIGKILL)
        assert ends(pidfd)
    finally:
        os.close(pidfd)
        process.communicate()


def test_engine_of_a_killed_replica_leaves_no_files(tmp_path: Path) -> None:
    """Though Ray kills the replica's process group, with multiprocessing's resource tracker in it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "socket").touch()
    process, pid, _, semaphore = start_replica(**{REPLICA_ENV: "r1", SCRATCH_ENV: str(scratch)})
    pidfd = os.pidfd_open(pid)
    file = Path(f"/dev/shm/sem.{semaphore.removeprefix('/')}")
    try:
        assert file.exists()
        os.killpg(process.pid, signal.SIGKILL)
        assert ends(pidfd)
        assert not scratch.exists() and not file.exists()
    finally:
        os.close(pidfd)
        process.communicate()


MEETING = """
import multiprocessing

def engine():
    from serve_app.hooks import vllm_plugin
    vllm_plugin.register()
    from vllm.v1.executor import multiproc_executor, uniproc_executor
    for executor in (multiproc_executor, uniproc_executor):
        print(executor.get_file_store_init_method().rpartition("/")[0], flush=True)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=engine)
    child.start()
    child.join()
"""


def test_process_group_of_an_engine_meets_in_the_folder_that_its_replica_removes(tmp_path: Path) -> None:
    """An engine that is killed, by its replica too, cannot remove the file."""
    script = tmp_path / "replica.py"
    script.write_text(MEETING)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = os.environ | {REPLICA_ENV: "r1", SCRATCH_ENV: str(scratch)}
    out = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True).stdout
    assert [line for line in out.splitlines() if line.startswith("file:")] == [f"file://{scratch}"] * 2


def test_process_that_is_not_ours_is_not_watched() -> None:
    process, pid, threads, _ = start_replica()
    assert "epd-parent-watch" not in threads
    assert os.path.exists(f"/proc/{pid}")
    process.communicate()
    assert process.returncode == 0


def test_the_replica_itself_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.hooks import vllm_plugin

    monkeypatch.setenv(REPLICA_ENV, "r1")
    assert multiprocessing.parent_process() is None
    vllm_plugin.register()
    assert "epd-parent-watch" not in [thread.name for thread in threading.enumerate()]


LISTENING = """
import multiprocessing, socket, threading

def engine(port):
    from serve_app.hooks import vllm_plugin
    vllm_plugin.register()
    import vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler as nixl
    scheduler = object.__new__(nixl.NixlBaseConnectorScheduler)
    scheduler._nixl_handshake_listener_t, scheduler._stop_event = None, threading.Event()
    scheduler.side_channel_host, scheduler.side_channel_port = "127.0.0.1", port
    scheduler.set_xfer_handshake_metadata({})
    print("listens", flush=True)

if __name__ == "__main__":
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    if FREE:
        taken.close()
    child = multiprocessing.get_context("spawn").Process(target=engine, args=(port,), daemon=True)
    child.start()
    child.join(LIMIT_S)
    print(child.exitcode)
"""


@pytest.mark.parametrize("free", [False, True])
def test_engine_whose_nixl_port_was_taken_meanwhile_ends_instead_of_waiting_for_ever(
    tmp_path: Path, free: bool
) -> None:
    script = tmp_path / "replica.py"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script.write_text(LISTENING.replace("FREE", str(free)).replace("LIMIT_S", str(LIMIT_S)))
    env = os.environ | {REPLICA_ENV: "r1", SCRATCH_ENV: str(scratch)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    if free:
        assert said == ["listens", "0"]
    else:
        assert said == [str(-signal.SIGKILL)] and "Address already in use" in done.stderr
        assert not scratch.exists()


NIXL = """
import os
{env}
from serve_app.hooks import vllm_plugin
vllm_plugin.register()
from nixl._api import nixl_agent_config
once = nixl_agent_config.__init__
vllm_plugin.register()
configs = [nixl_agent_config(), nixl_agent_config(True), nixl_agent_config(enable_prog_thread=True)]
more = nixl_agent_config(True, True, 123, num_threads=4, backends=["X"])
print([c.enable_pthread for c in configs], more.enable_listen, more.port, more.num_threads, more.backends,
      nixl_agent_config.__init__ is once)
"""


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({REPLICA_ENV: "r", STILL_NIXL_ENV: "1"}, [False, False, False]),
        ({REPLICA_ENV: "r"}, [True, True, True]),
        ({STILL_NIXL_ENV: "1"}, [True, True, True]),
    ],
    ids=["on the CPU", "on a GPU", "not ours"],
)
def test_nixls_progress_thread_is_off_only_in_replicas_on_the_cpu(env: dict[str, str], threads: list[bool]) -> None:
    clean = f"[os.environ.pop(k, None) for k in ({REPLICA_ENV!r}, {STILL_NIXL_ENV!r})]; os.environ.update({env!r})"
    result = subprocess.run([sys.executable, "-c", NIXL.format(env=clean)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Everything else is passed on, and registering again wraps nothing twice.
    assert result.stdout.splitlines()[-1] == f"{threads} True 123 4 ['X'] True"


def test_replica_can_end_its_resource_tracker() -> None:
    from multiprocessing import resource_tracker

    assert callable(resource_tracker._resource_tracker._stop), "serve_app/stages/replica.py __del__"  # type: ignore[attr-defined]


def test_plugin_imports_nothing_heavy() -> None:
    code = "import serve_app.hooks.vllm_plugin, sys; print({'torch', 'vllm', 'ray', 'nixl'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
