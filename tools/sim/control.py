"""Ray Serve's autoscaling loop in simulated time: who reports what, when, and what the policies make of it.

The policies are those that Ray would call, made from an ``autoscaling_config`` as it stands in a Serve config: production's
(``scaling/policies.py``) or Ray's own count of requests. Bounds, factors and delays are Ray's functions too. Only the
transport of the signals is modelled, with the intervals of that config.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from math import ceil
from types import SimpleNamespace
from typing import Any

from ray.serve import autoscaling_policy
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.scaling.policies import SharedGPUs
from serve_app.stage import Stage
from tools.sim.loop import Loop
from tools.sim.pools import Pool

RECORD_SHARE = 0.2
"""Ray: RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR, of the window that signals are averaged over."""
DECIDE_S = 1.0
"""Ray decides ten times a second (CONTROL_LOOP_INTERVAL_S); its delays are seconds, so this is enough here."""


def record_s(config: AutoscalingConfig) -> float:
    return min(RECORD_SHARE * config.look_back_period_s, config.metrics_interval_s)


class Report:
    """What the controller knows of a stage between two pushes."""

    def __init__(self, series: Mapping[str, list[tuple[float, dict[str, float]]]], total: float, queued: float) -> None:
        self._series, self.total, self.queued = series, total, queued

    @cached_property
    def aggregated(self) -> dict[str, dict[str, float]]:
        """Metric → replica → mean over the window."""
        found: dict[str, dict[str, float]] = {}
        for replica, points in self._series.items():
            for metric in points[0][1]:
                found.setdefault(metric, {})[replica] = sum(stats[metric] for _, stats in points) / len(points)
        return found

    @cached_property
    def raw(self) -> dict[str, dict[str, list[TimeStampedValue]]]:
        found: dict[str, dict[str, list[TimeStampedValue]]] = {}
        for replica, points in self._series.items():
            for metric in points[0][1]:
                values = [TimeStampedValue(at, stats[metric]) for at, stats in points]
                found.setdefault(metric, {})[replica] = values
        return found


class Signals:
    """Samples of one stage, as its replicas and handles keep them over the window."""

    def __init__(self, pool: Pool, config: AutoscalingConfig) -> None:
        self._pool = pool
        length = max(int(config.look_back_period_s / record_s(config)), 1)
        self._length = length
        self._counts: deque[tuple[float, float]] = deque(maxlen=length)  # calls under way or waiting, calls waiting
        self._series: dict[str, deque[tuple[float, dict[str, float]]]] = {}

    def record(self, now: float, with_stats: bool) -> None:
        pool = self._pool
        waiting = len(pool.waiting)
        self._counts.append((waiting + sum(replica.ongoing for replica in pool.running), waiting))
        if with_stats:
            for replica in pool.running:
                points = self._series.setdefault(replica.name, deque(maxlen=self._length))
                points.append((now, replica.stats()))

    def report(self) -> Report:
        self._series = {name: points for name, points in self._series.items() if name in self._pool.by_name}
        total, queued = (sum(column) / len(self._counts) for column in zip(*self._counts, strict=True))
        return Report({name: list(points) for name, points in self._series.items()}, total, queued)


class Controller:
    """Decides for the stages that have an ``autoscaling_config``; ``gpus``: by the application's policy above them."""

    def __init__(
        self, loop: Loop, pools: Mapping[Stage, Pool], configs: Mapping[Stage, AutoscalingConfig], gpus: float | None
    ) -> None:
        self._loop, self._pools, self._configs = loop, pools, configs
        self._ids = {stage: DeploymentID(stage.value, "epd") for stage in configs}
        self._states: dict[Any, dict[str, Any]] = {}
        self._signals = {stage: Signals(pools[stage], config) for stage, config in configs.items()}
        self._reports: dict[Stage, Report] = {}
        self._own = {
            stage: autoscaling_policy._apply_autoscaling_config(_resolve_policy_callable(config.policy))
            for stage, config in configs.items()
        }
        shared = None if gpus is None else SharedGPUs(gpus=gpus)
        self._shared = None if shared is None else autoscaling_policy._apply_app_level_autoscaling_config(shared)

    def start(self, until: float) -> None:
        for stage, config in self._configs.items():
            self._loop.every(record_s(config), partial(self._record, stage), until)
            self._loop.every(config.metrics_interval_s, partial(self._push, stage), until)
        if self._configs:
            self._loop.every(DECIDE_S, self._decide, until)

    def _record(self, stage: Stage) -> None:
        with_stats = not self._configs[stage].policy.is_default_policy_function()
        self._signals[stage].record(self._loop.now, with_stats)

    def _push(self, stage: Stage) -> None:
        self._reports[stage] = self._signals[stage].report()

    def _decide(self) -> None:
        contexts = {self._ids[stage]: self._context(stage) for stage in self._configs}
        with ray_time(self._loop):
            if self._shared is not None:
                decisions, states = self._shared(contexts)
                self._states.update(states)
            else:
                decisions = {}
                for stage, name in self._ids.items():
                    decisions[name], self._states[name] = self._own[stage](contexts[name])
        for stage, config in self._configs.items():
            wanted = ceil(decisions.get(self._ids[stage], self._pools[stage].target))
            wanted = max(config.min_replicas, min(config.max_replicas, wanted))
            if wanted != self._pools[stage].target:
                self._pools[stage].scale(wanted)

    def _context(self, stage: Stage) -> AutoscalingContext:
        pool, config, report, name = self._pools[stage], self._configs[stage], self._reports[stage], self._ids[stage]
        # A handle without replicas tells the controller of its first call at once.
        cold = not pool.running
        return AutoscalingContext(
            deployment_id=name,
            deployment_name=stage.value,
            app_name="epd",
            current_num_replicas=len(pool.running),
            target_num_replicas=pool.target,
            running_replicas=[ReplicaID(replica, name) for replica in pool.names],
            total_num_requests=float(len(pool.waiting)) if cold else report.total,
            total_queued_requests=float(len(pool.waiting)) if cold else report.queued,
            aggregated_metrics=lambda: report.aggregated,
            raw_metrics=lambda: report.raw,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state=dict(self._states.get(name, {})),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self._loop.now,
            config=config,
        )


@contextmanager
def ray_time(loop: Loop) -> Iterator[None]:
    """Ray's delays ask ``time.time()``: here that is simulated."""
    real = autoscaling_policy.time
    autoscaling_policy.time = SimpleNamespace(time=loop.clock, monotonic=loop.clock)
    try:
        yield
    finally:
        autoscaling_policy.time = real
