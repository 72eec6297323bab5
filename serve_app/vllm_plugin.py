"""What every vLLM process of ours does first (entry point group ``vllm.general_plugins``).

vLLM calls ``register`` in the replica, in its engine process and in each worker. Outside a replica of ours (no
``EPD_REPLICA`` in the environment) it does nothing, so a `vllm serve` beside us is as it always was.
"""

import importlib
import multiprocessing
import os
import select
import signal
import threading
from typing import Any

REPLICA_ENV = "EPD_REPLICA"
"""Set by each stage replica to its id before it starts its engine; engine and worker processes inherit it."""

STILL_NIXL_ENV = "EPD_STILL_NIXL"
"""Set by replicas on the CPU that move KV blocks with NIXL."""

_watching = False


def register() -> None:
    if REPLICA_ENV not in os.environ:
        return
    _die_with_parent()
    if STILL_NIXL_ENV in os.environ:
        _still_nixl_progress_thread()


def _die_with_parent() -> None:
    """End this engine or worker process as soon as the process that started it is gone, however it went.

    vLLM's engine processes survive a SIGKILL of their parent (`kill -9` of a replica, `ray stop`) and keep the card's
    memory. The parent's pidfd becomes readable when it dies: no polling, and unlike PR_SET_PDEATHSIG it does not fire when
    just the thread that forked us ends. The replica itself is Ray's child and Ray's to end.
    """
    global _watching
    parent = multiprocessing.parent_process()
    if _watching or parent is None or parent.pid is None:
        return
    try:
        pidfd = os.pidfd_open(parent.pid)
    except ProcessLookupError:  # gone already
        os.kill(os.getpid(), signal.SIGKILL)
        return
    _watching = True

    def wait() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="epd-parent-watch", daemon=True).start()


def _still_nixl_progress_thread() -> None:
    """Turn NIXL's progress thread off for engines on the CPU.

    Its Python API hard-codes a delay of 0 µs, so an idle engine burns a core or two. Transfers still complete: vLLM polls.
    Can go when nixl_agent_config takes the delay (nixl 1.5.1 does not).
    """
    config = importlib.import_module("nixl._api").nixl_agent_config
    if getattr(config, "_epd_still", False):
        return
    original = config.__init__

    def __init__(self: Any, enable_prog_thread: bool = False, *args: Any, **kwargs: Any) -> None:
        original(self, False, *args, **kwargs)

    config.__init__ = __init__
    config._epd_still = True
