"""Ray Serve's autoscaling policies of the stages: what replicas report in, numbers of replicas out.

::

    deployments:                                        # one policy per stage, or
      - name: Encoder
        autoscaling_config:
          policy: {policy_function: serve_app.autoscaling:WorkPolicy, policy_kwargs: {target_queue_s: 0.5}}
    autoscaling_policy:                                 # above them one for the application, where GPUs are short
      {policy_function: serve_app.autoscaling:SharedGPUs}

Bounds, delays and factors are Ray's, from ``autoscaling_config``; its window (``look_back_period_s``) is the one that
signals are averaged over. The arithmetic is in ``scaling.rules``.

These run in Serve's controller, for all applications: whatever they raise would stop its control loop. So a mistake in
``policy_kwargs`` is an error in the controller's log, again every minute, and Ray's rule for calls decides. Ray pickles this
module by value: nothing here may depend on the identity of its classes.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from math import ceil, inf
from typing import Any, ClassVar

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy as by_calls
from ray.serve.config import AutoscalingContext

from serve_app.launch.placement import is_elastic
from serve_app.scaling.rules import (
    DecodeLoad,
    DecodeTargets,
    Load,
    Targets,
    Wish,
    replicas_for_requests,
    replicas_for_sequences,
    replicas_for_work,
    share,
)

Decision = tuple[float, dict[str, Any]]

CLUSTER_EVERY_S = 10.0
COMPLAIN_EVERY_S = 60.0


class WorkPolicy:
    """Encoder and Prefill: replicas by outstanding work and the rate at which a replica does it."""

    TARGETS: ClassVar[type[BaseModel]] = Targets
    takes_cards: ClassVar[bool] = True

    def __init__(self, **targets: Any) -> None:
        self.mistake: ValidationError | None = None
        self._complained_at = -inf
        try:
            self._targets = self.TARGETS.model_validate(targets)
        except ValidationError as mistake:
            self.mistake = mistake

    def __call__(self, ctx: AutoscalingContext) -> Decision:
        if self.mistake is not None:
            if ctx.current_time - self._complained_at >= COMPLAIN_EVERY_S:
                self._complained_at = ctx.current_time
                logging.getLogger("ray.serve").error(
                    f"{ctx.deployment_name} is scaled by calls: its `policy_kwargs` cannot be used. {self.mistake}"
                )
            wished = None
        else:
            wished = self._wished(ctx)
        by_ray: Decision = by_calls(ctx)
        return by_ray if wished is None else (wished, {})

    def _wished(self, ctx: AutoscalingContext) -> float | None:
        assert isinstance(self._targets, Targets)
        return replicas_for_work(Load(**signals(ctx)), ctx.target_num_replicas, self._targets)


class DecodePolicy(WorkPolicy):
    """Decode: replicas by sequences that run or wait, and by how full the KV caches are."""

    TARGETS = DecodeTargets

    def _wished(self, ctx: AutoscalingContext) -> float | None:
        assert isinstance(self._targets, DecodeTargets)
        metrics = ctx.aggregated_metrics or {}
        load = DecodeLoad(
            **signals(ctx),
            slots=mean(metrics.get("slots", {}).values()) or 0.0,
            kv_use=sum(metrics.get("kv_use", {}).values()),
        )
        return replicas_for_sequences(load, ctx.target_num_replicas, self._targets)


class NoTargets(BaseModel):
    """``policy_kwargs`` of ``IngressPolicy``: none. Its target is Ray's ``target_ongoing_requests``."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IngressPolicy(WorkPolicy):
    """Ingress: replicas by the requests that they have under way. With ``http: replicas`` these do not pass through Ray
    Serve, which would count none."""

    TARGETS = NoTargets
    takes_cards = False

    def _wished(self, ctx: AutoscalingContext) -> float | None:
        under_way = (ctx.aggregated_metrics or {}).get("requests")
        if not under_way:
            return None
        return replicas_for_requests(
            sum(under_way.values()), ctx.target_num_replicas, ctx.config.get_target_ongoing_requests()
        )


def signals(ctx: AutoscalingContext) -> dict[str, Any]:
    """What the replicas of a stage reported (``stages.workload.Meter.stats``), together, as arguments of ``Load``."""
    metrics = ctx.aggregated_metrics or {}
    series = ctx.raw_metrics or {}
    return {
        "outstanding": sum(metrics.get("outstanding", {}).values()),
        "calls": sum(metrics.get("calls", {}).values()),
        "queued_calls": ctx.total_queued_requests or 0.0,
        "mean_work": mean(value for value in metrics.get("mean_work", {}).values() if value) or 0.0,
        "carried": sum(per_second(points) for points in series.get("done", {}).values()),
        # The latest, no mean: 0 stands for a rate that is not known, of calls like those of that moment.
        "rate": mean(points[-1].value for points in series.get("rate", {}).values() if points and points[-1].value),
    }


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def per_second(points: Any) -> float:
    """By how much a count went up per second, over the window that Ray keeps of it."""
    if len(points) < 2:
        return 0.0
    first, last = points[0], points[-1]
    return float(max(last.value - first.value, 0.0) / max(last.timestamp - first.timestamp, 1e-3))


class Budget(BaseModel):
    """``policy_kwargs`` of ``SharedGPUs``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of the stages that are scaled. None: those of the cluster; no limit where it can grow.",
    )


class SharedGPUs:
    """All deployments of an application: each as its own policy says, and where that takes more GPUs than there are, each
    next card goes to the stage that waits longest for its target.

    Where a stage has not reported what its replicas claim, no card can be counted: then their own policies decide alone.
    Of a stage without ``autoscaling_config`` Ray tells it nothing: its cards are to be left out of ``gpus``.
    """

    def __init__(self, **budget: Any) -> None:
        self._own: dict[Any, tuple[Any, Callable[[AutoscalingContext], Decision]]] = {}
        self._claims: dict[Any, float] = {}
        self._asked: tuple[float, float] = (-inf, inf)
        self.mistake: ValidationError | None = None
        try:
            self._budget = Budget.model_validate(budget)
        except ValidationError as mistake:
            self._budget, self.mistake = Budget(), mistake
            logging.getLogger("ray.serve").error(f"`policy_kwargs` of SharedGPUs are left out: {mistake}")

    def __call__(
        self, contexts: Mapping[Any, AutoscalingContext]
    ) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
        answers = {key: self._policy(key, ctx)(ctx) for key, ctx in contexts.items()}
        decisions = {key: decided for key, (decided, _) in answers.items()}
        states = {key: state for key, (_, state) in answers.items()}
        wishes = self._wishes(contexts, decisions)
        if wishes:
            gpus = self._gpus(next(iter(contexts.values())).current_time)
            wanted = sum(wish.gpus * ceil(wish.replicas) for wish in wishes.values())
            if wanted > gpus + 1e-6:
                decisions |= {key: float(count) for key, count in share(wishes, gpus).items()}
        return decisions, states

    def _policy(self, key: Any, ctx: AutoscalingContext) -> Callable[[AutoscalingContext], Decision]:
        """The deployment's own policy, as Ray would make it (``_resolve_policy_callable``)."""
        configured = ctx.config.policy
        known = self._own.get(key)
        if known is None or known[0] is not configured:
            policy = configured.get_policy()
            known = configured, policy(**configured.policy_kwargs) if isinstance(policy, type) else policy
            self._own[key] = known
        return known[1]

    def _wishes(self, contexts: Mapping[Any, AutoscalingContext], decisions: Mapping[Any, float]) -> dict[Any, Wish]:
        """Of the stages, within their bounds; none where a claim is not known."""
        wishes: dict[Any, Wish] = {}
        for key, ctx in contexts.items():
            if not getattr(self._policy(key, ctx), "takes_cards", False):
                continue  # the ingress needs no GPU
            if reported := (ctx.aggregated_metrics or {}).get("gpus"):
                self._claims[key] = max(reported.values())
            if key not in self._claims:
                return {}
            low, high = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
            wished = min(max(decisions[key], low), high)
            wishes[key] = Wish(wished, ctx.target_num_replicas, low, self._claims[key])
        return wishes

    def _gpus(self, now: float) -> float:
        if self._budget.gpus is not None:
            return self._budget.gpus
        asked, gpus = self._asked
        if now - asked >= CLUSTER_EVERY_S:
            gpus = self._gpus_of_cluster()
            self._asked = (now, gpus)
        return gpus

    def _gpus_of_cluster(self) -> float:
        return inf if is_elastic() else float(ray.cluster_resources().get("GPU", 0.0))
