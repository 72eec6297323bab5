"""What replicas and engines that are forked rely on in vLLM, Ray and multiprocessing."""

import inspect
import subprocess
import sys
from multiprocessing import forkserver, spawn
from typing import Any

import pytest

LOADS = """
import os, sys
from serve_app.launch.fork_server import load
load()
print(len(os.listdir("/proc/self/task")), "ray" in sys.modules)
from multiprocessing import resource_tracker
print(resource_tracker._resource_tracker._fd)
"""


@pytest.mark.usefixtures("cpu_torch")  # no other build is loaded by the fork server
def test_vllm_is_loaded_without_a_thread_and_without_ray() -> None:
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", LOADS], env=env, capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["1", "False", "None"], done.stderr


def test_core_of_an_engine_is_started_by_a_context_that_can_be_another() -> None:
    from vllm.v1.engine import utils

    source = inspect.getsource(utils.CoreEngineProcManager.__init__)
    assert "context = get_mp_context()" in source
    assert "context.Process(" in source


def test_ray_runs_a_worker_with_the_command_that_takes_the_place_of_python() -> None:
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.workers import default_worker

    source = inspect.getsource(RuntimeEnvContext.exec_worker)
    assert '["exec", self.py_executable]' in source
    assert "shlex.quote" in source, "the command itself is not quoted: it may have arguments"
    assert 'if __name__ == "__main__":' in inspect.getsource(default_worker)


def test_pythons_fork_server_gives_a_child_these_files() -> None:
    """``hooks.forked_worker`` sends them, and takes them back in the child."""
    serve_one = inspect.getsource(forkserver._serve_one)  # type: ignore[attr-defined]
    assert "(_forkserver._forkserver_alive_fd," in serve_one
    assert "resource_tracker._resource_tracker._fd," in serve_one
    assert "*_forkserver._inherited_fds) = fds" in serve_one
    assert "child_r, child_w, *fds = fds" in inspect.getsource(forkserver.main)
    main: Any = spawn._main
    assert "self._bootstrap(parent_sentinel)" in inspect.getsource(main)
