"""Has vLLM start the core of an engine in the process that was forked for it before its replica had threads.

vLLM spawns it otherwise: another Python, which loads vLLM again. The process is the replica's own child either way.
"""

import io
import os
from multiprocessing import context, popen_fork, reduction, resource_tracker, spawn, util
from multiprocessing.popen_forkserver import _DupFd
from typing import Any

from serve_app.hooks import forked_worker
from serve_app.hooks.forked_worker import Place, Prepared


class Popen(popen_fork.Popen):
    """A process of ``multiprocessing`` in the child that waits for one."""

    method = "epd"
    DupFd = _DupFd

    def __init__(self, process_obj: Any) -> None:
        self._fds = [0, 1, 2]
        super().__init__(process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process_obj: Any) -> None:
        core, forked_worker.core = forked_worker.core, None
        assert core is not None
        tracker = resource_tracker.getfd()
        assert tracker is not None
        data = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(Prepared(Place.here(), spawn.get_preparation_data(process_obj._name)), data)
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        parent_r, parent_w = os.pipe()
        self.sentinel, child_w = os.pipe()
        core.run(data.getvalue(), [parent_r, child_w], tracker, self._fds)
        os.close(parent_r)
        os.close(child_w)
        self.pid = core.pid
        self.finalizer = util.Finalize(self, util.close_fds, (parent_w, self.sentinel))  # type: ignore[attr-defined]


class Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return context.SpawnProcess._Popen(process_obj) if forked_worker.core is None else Popen(process_obj)


class Context(context.SpawnContext):
    Process = Process


def install_forked_core() -> None:
    """Start the next core of an engine in the waiting process, if this replica has one; all others are spawned."""
    if forked_worker.core is not None:
        from vllm.v1.engine import utils as engine_utils

        engine_utils.get_mp_context = Context
