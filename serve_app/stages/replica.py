"""What the engine replicas of all stages share: start, health, metrics, profile, shutdown."""

import asyncio
import fcntl
import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from serve_app.config import Accelerator, EPDConfig
from serve_app.handoff.errors import CannotStart, EngineDead, OtherVersion
from serve_app.handoff.types import ANY, Version
from serve_app.hooks.vllm_plugin import REPLICA_ENV, SCRATCH_ENV
from serve_app.launch.card_memory import visible_card_gib
from serve_app.launch.connectors import check_shared_memory, side_channel_env, tell_version
from serve_app.launch.ec_folder import make_folder, remove_folder
from serve_app.launch.engine_args import engine_args, model_path, replica_env
from serve_app.launch.placement import check_claims, shared_cards, xpu_affinity
from serve_app.launch.start_failure import EngineFailed, hears_engine, says_why
from serve_app.stage import Stage
from serve_app.stages import fit
from serve_app.stages.workload import Meter, page
from serve_app.transfer.kv_layout import KVLayout

if TYPE_CHECKING:
    from serve_app.stages.engine import StageEngine


logger = logging.getLogger("ray.serve")

DRAIN_POLL_S = 0.1
LAST_WORDS_S = 1.0
"""In which calls of a dead engine tell their callers so, before its replica ends."""
PORT_TRIES = 3
"""Starts of an engine, when other programs take its ports between their choice and its start."""


def end_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def ends_unless_done_in(seconds: float, what: str) -> Iterator[None]:
    """End this process if the block takes longer: Serve would wait for it for ever."""

    def end() -> None:
        logger.error(f"{what} within {seconds:g} s (`timeouts.startup_s`): this replica ends")
        end_process()

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def alone_on(cards: Collection[int | str]) -> Iterator[None]:
    """Wait until no other engine of this node starts on one of these cards, and lock them for the block.

    An engine measures its memory by what is free on a card before and after it has loaded: what another one loads in
    between would count as its own. The locks end with the process.
    """
    with ExitStack() as locks:
        for card in sorted(map(str, cards)):
            path = os.path.join(tempfile.gettempdir(), f"epd-card-{card}.lock")
            try:  # another user's may be opened in a sticky folder, but not with O_CREAT
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
                with suppress(PermissionError):
                    os.fchmod(descriptor, 0o666)
            locks.callback(os.close, descriptor)
            locks.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # forked children have the descriptor too
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def started(*arguments: Any) -> "StageEngine":
    """An engine on ports of its own. Raises ``EngineFailed`` with the errors of its processes."""
    from serve_app.stages.engine import StageEngine

    for tries_left in reversed(range(PORT_TRIES)):
        os.environ.update(side_channel_env(ray.util.get_node_ip_address()))
        try:
            with hears_engine():
                return StageEngine(*arguments)
        except EngineFailed as failed:
            if not (failed.port_taken and tries_left):
                raise
    raise AssertionError("the last try returns or raises")


class EngineReplica:
    """One engine of one stage. Subclasses add the handle methods of their stage."""

    stage: Stage
    engine: "StageEngine"
    work: Meter
    version: Version = ANY
    layout: KVLayout | None = None
    """The layout of its KV blocks, if it hands them over or takes them."""

    def __init__(self, config: EPDConfig) -> None:
        self._config = config
        try:
            with says_why(self.stage, str(config.model)):
                self._start(config)
        except CannotStart:
            self._give_back()  # where the application ends, Serve may kill this replica before it lets it end
            raise

    def _start(self, config: EPDConfig) -> None:
        context, worker = serve.get_replica_context(), ray.get_runtime_context()
        self.replica: str = context.replica_id.unique_id
        self.node: str = worker.get_node_id()
        claims = config.stages[self.stage], config.accelerator
        check_claims(self.stage, *claims, worker.get_assigned_resources(), os.environ)
        self.scratch = tempfile.mkdtemp(prefix="epd-")
        env = {REPLICA_ENV: self.replica, SCRATCH_ENV: self.scratch, "VLLM_RPC_BASE_PATH": self.scratch}
        on_cuda = config.accelerator is Accelerator.CUDA
        card_gib = visible_card_gib(os.environ.get("CUDA_VISIBLE_DEVICES")) if on_cuda else None
        env |= replica_env(config, self.stage, card_gib)
        env |= xpu_affinity(config.accelerator, ray.get_gpu_ids(), os.environ)
        for key, value in env.items():
            os.environ.setdefault(key, value)
        check_shared_memory(config)
        if config.encoder is not None and config.ec.uses_folder:
            make_folder(config)

        began = time.perf_counter()
        # Only now: vLLM reads its environment when it is imported.
        importlib.import_module("serve_app.stages.engine")
        imported = time.perf_counter()
        args = engine_args(config, self.stage, model_path(config), card_gib)
        with (
            alone_on(shared_cards(config.stages[self.stage], ray.get_gpu_ids())),
            ends_unless_done_in(config.timeouts.startup_s, f"{self.stage} does not start"),
        ):
            self.engine = started(self.stage, args, config.metrics.engines_in_ray, config.timeouts.hang_s, self._check)
        self._check_unchanged()
        self._tell_layout()
        engine_s = time.perf_counter() - imported
        logger.info(f"start-up {self.stage}: import={imported - began:.1f}s engine={engine_s:.1f}s")
        self.work = Meter()
        self._gpus = config.stages[self.stage].gpus_per_replica or 0.0

    def _check(self, vllm_config: Any) -> None:
        """Check and tell the version of an engine that is about to load."""
        from serve_app.launch.fingerprint import version_of

        fit.check(self._config, self.stage, vllm_config)
        self.version = version_of(self._config, vllm_config)
        tell_version(self._config, vllm_config, self.version)

    def _check_unchanged(self) -> None:
        """Raises ``CannotStart`` if files were replaced while the engine loaded: it may have parts of both."""
        from serve_app.launch.fingerprint import version_of

        if others := version_of(self._config, self.engine.vllm_config).other_than(self.version):
            self.engine.shutdown()
            raise CannotStart(f"the model's files ({', '.join(others)}) were replaced while it loaded: start it again")

    def _tell_layout(self) -> None:
        """Set the layout of KV blocks, if this engine hands them over or takes them."""
        hands_over = self.stage is not Stage.ENCODER and self._config.prefill is not None
        if hands_over and self._config.kv_has_leases:
            self.layout = self.engine.kv_layout
            self.version = self.version._replace(layout=self.layout.digest[:12])

    def refuse_other(self, asked: Version) -> None:
        """Raises ``OtherVersion`` for a call that goes on from the results of another version."""
        if others := self.version.other_than(asked):
            message = f"runs in another version than the request began with ({', '.join(others)})"
            raise OtherVersion(self.stage, message, self.replica, self.version)

    async def check_health(self) -> None:
        """Raises if the engine hangs. Ends this process if the engine is dead: Serve replaces a replica that is gone with
        its next check, and one that is unhealthy with the third."""
        try:
            await self.engine.check_health()
        except EngineDead as dead:
            logger.error(f"{dead} This replica ends")
            await asyncio.sleep(LAST_WORDS_S)
            self._give_back()
            end_process()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The signals that Ray Serve takes to the autoscaling policies."""
        engine = {"kv_use": self.engine.kv_use, "slots": float(self.engine.slots), "gpus": self._gpus}
        return self.work.stats() | engine

    async def load(self) -> dict[str, Any]:
        """The same signals for ``/status``, with the replica and its version."""
        version = f"{self.version.front}-{self.version.weights}"
        return {"replica": self.replica, "version": version, **await self.record_autoscaling_stats()}

    async def made_of(self) -> tuple[Version, KVLayout | None]:
        """What the ingress asks for: it takes requests once each stage has a replica of its version."""
        return self.version, self.layout

    async def metrics(self) -> tuple[str, str, str]:
        """Stage, replica and metrics in Prometheus' text format."""
        return self.stage, self.replica, self.engine.metrics() + page(await self.record_autoscaling_stats())

    async def start_profile(self, overrides: dict[str, Any]) -> str:
        await self.engine.start_profile(**overrides)
        return self.replica

    async def stop_profile(self) -> str:
        await self.engine.stop_profile()
        return self.replica

    async def add_adapter(self, adapter: Any) -> None:
        await self.engine.add_adapter(adapter)

    async def remove_adapter(self, number: int) -> None:
        await self.engine.remove_adapter(number)

    def holds(self) -> bool:
        """Whether another engine has still to pull something from this one."""
        return False

    async def __del__(self) -> None:
        """End the engine, once others have pulled what it holds. Serve calls this when the replica's last call has ended,
        and kills the replica after ``graceful_shutdown_timeout_s``."""
        if hasattr(self, "engine"):
            # There is no event to wait for: the engine tells what it holds with each of its steps.
            while self.holds():  # noqa: ASYNC110
                await asyncio.sleep(DRAIN_POLL_S)
        self._give_back()

    def _give_back(self) -> None:
        """End the engine's processes, and remove this replica's files."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()
        if (config := getattr(self, "_config", None)) is not None and config.encoder is not None:
            remove_folder(config)  # an engine that had to be killed has not
        if (scratch := getattr(self, "scratch", None)) is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if engine is not None:
            # It unlinks the semaphores of an engine that had to be killed; Ray would kill it with the replica.
            resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
