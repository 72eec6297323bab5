"""Ray Serve's autoscaling policies of the stages: what replicas report in, numbers of replicas out.

::

    deployments:                                        # one policy per stage, or
      - name: Encoder
        autoscaling_config:
          policy: {policy_function: serve_app.autoscaling:WorkPolicy, policy_kwargs: {target_queue_s: 0.5}}
    autoscaling_policy:                                 # above them one for the application, where GPUs are short
      {policy_function: serve_app.autoscaling:SharedGPUs}

Bounds, delays, factors and the window that signals are averaged over (``look_back_period_s``) are Ray's. The arithmetic is
in ``scaling.rules``.

Policies run in Serve's controller, and an exception would stop its control loop for all applications. So a mistake in
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
    """Scales Encoder and Prefill by outstanding work and the rate at which a replica does it."""

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
        if self.mistake is None and (wished := self._wished(ctx)) is not None:
            return wished, {}
        if self.mistake is not None and ctx.current_time - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = ctx.current_time
            logging.getLogger("ray.serve").error(
                f"{ctx.deployment_name} is scaled by calls: its `policy_kwargs` cannot be used. {self.mistake}"
            )
        by_ray: Decision = by_calls(ctx)
        return by_ray

    def _wished(self, ctx: AutoscalingContext) -> float | None:
        assert isinstance(self._targets, Targets)
        return replicas_for_work(Load(**signals(ctx)), ctx.target_num_replicas, self._targets)


class DecodePolicy(WorkPolicy):
    """Scales Decode by the sequences that run or wait, and by how full the KV caches are."""

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
    """``IngressPolicy`` takes no ``policy_kwargs``. Its target is Ray's ``target_ongoing_requests``."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IngressPolicy(WorkPolicy):
    """Scales the ingress by its requests under way, which Ray Serve does not see with ``http: replicas``."""

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
    """Arguments of ``Load``, from the reports of a stage's replicas (``stages.workload.Meter.stats``)."""
    metrics = ctx.aggregated_metrics or {}
    series = ctx.raw_metrics or {}
    return {
        "outstanding": sum(metrics.get("outstanding", {}).values()),
        "calls": sum(metrics.get("calls", {}).values()),
        "queued_calls": ctx.total_queued_requests or 0.0,
        "mean_work": mean(value for value in metrics.get("mean_work", {}).values() if value) or 0.0,
        "carried": sum(per_second(points) for points in series.get("done", {}).values()),
        # The latest only: it is the rate for calls like those of this moment, and 0 while it is not known.
        "rate": mean(points[-1].value for points in series.get("rate", {}).values() if points and points[-1].value),
    }


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def per_second(points: Any) -> float:
    """Growth of a count per second, over the window that Ray keeps of it."""
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
    """Scales all deployments of an application by their own policies, and shares the GPUs where these want too many: each
    next one goes to the stage that would wait longest, by its own target.

    While a stage has not reported what its replicas claim, its GPUs cannot be counted, and the own policies decide alone.
    Ray tells nothing of stages without ``autoscaling_config``: ``gpus`` must not include theirs.
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
        if wishes := self._wishes(contexts, decisions):
            gpus = self._gpus(next(iter(contexts.values())).current_time)
            wanted = sum(wish.gpus * ceil(wish.replicas) for wish in wishes.values())
            if wanted > gpus + 1e-6:
                decisions |= {key: float(count) for key, count in share(wishes, gpus).items()}
        return decisions, states

    def _policy(self, key: Any, ctx: AutoscalingContext) -> Callable[[AutoscalingContext], Decision]:
        """The deployment's own policy, as Ray would make it (``_resolve_policy_callable``)."""
        configured = ctx.config.policy
        if key not in self._own or self._own[key][0] is not configured:
            policy = configured.get_policy()
            made = policy(**configured.policy_kwargs) if isinstance(policy, type) else policy
            self._own[key] = configured, made
        return self._own[key][1]

    def _wishes(self, contexts: Mapping[Any, AutoscalingContext], decisions: Mapping[Any, float]) -> dict[Any, Wish]:
        """The wishes of the stages, within their bounds; none while a claim is not known."""
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
            gpus = inf if is_elastic() else float(ray.cluster_resources().get("GPU", 0.0))
            self._asked = (now, gpus)
        return gpus
