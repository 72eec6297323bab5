"""Plugin of vLLM for the processes of stage replicas (entry point group ``vllm.general_plugins``).

vLLM calls ``register`` in the replica, in its engine process and in each worker. Elsewhere ``EPD_REPLICA`` is not set, and
it changes nothing.
"""

import importlib
import multiprocessing
import os
import select
import shutil
import signal
import threading
from multiprocessing import util
from types import SimpleNamespace
from typing import Any

REPLICA_ENV = "EPD_REPLICA"
"""Set by each stage replica to its id before it starts its engine; engine and worker processes inherit it."""

SCRATCH_ENV = "EPD_SCRATCH"
"""Set by each stage replica to the folder of the sockets and PyTorch's file through which it meets its engine; nobody else
removes what a killed engine leaves there."""

STILL_NIXL_ENV = "EPD_STILL_NIXL"
"""Set by replicas on the CPU that move KV blocks with NIXL."""

NIXL_LISTENER = "nixl_handshake_listener"
"""vLLM's name of the thread that tells others how to pull KV blocks from this engine."""

_watching = False


def register() -> None:
    if REPLICA_ENV not in os.environ:
        return
    from serve_app.hooks.start_failure import tell_replica  # only in a replica of ours

    tell_replica()
    _die_with_parent()
    if STILL_NIXL_ENV in os.environ:
        _still_nixl_progress_thread()


def _die_with_parent() -> None:
    """End this engine or worker process when the process that started it ends in any way.

    vLLM's engine processes survive a SIGKILL of their parent (`kill -9` of a replica, `ray stop`) and keep the card's
    memory. The parent's pidfd becomes readable when it dies; PR_SET_PDEATHSIG would also fire when only the thread that
    forked this process ends. Ray ends the replica itself.
    """
    global _watching
    parent = multiprocessing.parent_process()
    if _watching or parent is None or parent.pid is None:
        return
    try:
        pidfd = os.pidfd_open(parent.pid)
    except ProcessLookupError:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
        return
    _watching = True
    os.setpgid(0, 0)  # Ray kills the process group of a dead replica after 0.2 s, and cleaning may take longer
    if SCRATCH_ENV in os.environ:
        _process_group_meets_in(os.environ[SCRATCH_ENV])
        util.Finalize(None, shutil.rmtree, args=(os.environ[SCRATCH_ENV], True), exitpriority=0)

    def wait() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll():
            pass
        _die()

    threading.Thread(target=wait, name="epd-parent-watch", daemon=True).start()
    _die_with_nixl_listener()


def _die_with_nixl_listener() -> None:
    """End this engine process when NIXL cannot listen at its port: vLLM and Serve would wait for ever. Serve starts the
    replica again, with another port."""
    told = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        told(args)
        if args.thread is not None and args.thread.name == NIXL_LISTENER:
            _die()

    threading.excepthook = hook


def _die() -> None:
    """End this process after removing what SIGKILL would leave: the replica's scratch folder and semaphores."""
    cleaning = threading.Thread(target=util._run_finalizers, args=(0,), daemon=True)  # type: ignore[attr-defined]
    cleaning.start()
    cleaning.join(2.0)  # a finalizer may hang
    os.kill(os.getpid(), signal.SIGKILL)


def _process_group_meets_in(folder: str) -> None:
    """Have vLLM put the file of PyTorch's process group into this folder instead of the temporary one."""
    network = importlib.import_module("vllm.utils.network_utils")
    network.tempfile = SimpleNamespace(gettempdir=lambda: folder)  # type: ignore[attr-defined]


def _still_nixl_progress_thread() -> None:
    """Turn NIXL's progress thread off for engines on the CPU: its fixed delay of 0 µs takes a core or two of an idle engine.

    Transfers still complete, because vLLM polls. Can go when nixl_agent_config takes the delay (nixl 1.5.1 does not).
    """
    config = importlib.import_module("nixl._api").nixl_agent_config
    if getattr(config, "_epd_still", False):
        return
    original = config.__init__

    def __init__(self: Any, enable_prog_thread: bool = False, *args: Any, **kwargs: Any) -> None:
        original(self, False, *args, **kwargs)

    config.__init__ = __init__
    config._epd_still = True
