"""Policies as Ray Serve's controller runs them, on contexts made here."""

import logging
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config, _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.scaling.policies import DecodePolicy, IngressPolicy, SharedGPUs, WorkPolicy

WORK, DECODE = "serve_app.autoscaling:WorkPolicy", "serve_app.autoscaling:DecodePolicy"
INGRESS = "serve_app.autoscaling:IngressPolicy"

Report = dict[str, float]
BUSY: Report = {"outstanding": 4000, "calls": 40, "mean_work": 100, "rate": 1000, "gpus": 1}


def context(
    *reports: Report,
    name: str = "Encoder",
    policy: str = WORK,
    kwargs: dict[str, Any] | None = None,
    target: int | None = None,
    done: tuple[float, float] = (0, 0),
    queued: float = 0,
    requests: float = 0,
    now: float = 1000.0,
    **config: Any,
) -> AutoscalingContext:
    """Replicas that reported the same numbers over the whole window, and ``done`` work at its ends, 10 s apart."""
    bounds: dict[str, Any] = {"min_replicas": 1, "max_replicas": 10, "upscale_delay_s": 0, "downscale_delay_s": 0}
    settings = AutoscalingConfig(
        **bounds | config, policy=AutoscalingPolicy(policy_function=policy, policy_kwargs=kwargs or {})
    )
    replicas = [f"{name}-{index}" for index in range(len(reports))]
    names = {key for report in reports for key in report}

    def series(before: float, after: float) -> list[SimpleNamespace]:
        return [SimpleNamespace(timestamp=now - 10, value=before), SimpleNamespace(timestamp=now, value=after)]

    reported = dict(zip(replicas, reports, strict=True))
    return AutoscalingContext(
        deployment_id=DeploymentID(name, "epd"),
        deployment_name=name,
        app_name="epd",
        current_num_replicas=len(reports),
        target_num_replicas=len(reports) if target is None else target,
        running_replicas=replicas,  # type: ignore[arg-type]
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics={
            key: {replica: report[key] for replica, report in zip(replicas, reports, strict=True) if key in report}
            for key in names
        },
        raw_metrics={
            "done": {replica: series(*done) for replica in replicas},  # type: ignore[dict-item]
            "rate": {key: series(1, report["rate"]) for key, report in reported.items() if "rate" in report},  # type: ignore[dict-item]
        },
        capacity_adjusted_min_replicas=settings.min_replicas,
        capacity_adjusted_max_replicas=settings.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=settings,
    )


def decide(ctx: AutoscalingContext) -> int:
    """As the controller does: the policy of the config, with Ray's bounds and delays around it."""
    policy = ctx.config.policy
    made = policy.get_policy()(**policy.policy_kwargs)
    decided, _ = _apply_autoscaling_config(made)(ctx)
    return min(max(ceil(decided), ctx.capacity_adjusted_min_replicas), ctx.capacity_adjusted_max_replicas)


def test_work_of_all_replicas_is_held_against_the_rate_of_one() -> None:
    assert decide(context(BUSY, BUSY)) == 8
    assert decide(context(BUSY, BUSY, kwargs={"target_queue_s": 4.0})) == 2


def test_calls_that_wait_at_the_ingress_count_with_the_mean_work_of_a_call() -> None:
    assert decide(context({**BUSY, "outstanding": 0, "calls": 0}, queued=20)) == 2


def test_a_replica_that_has_not_measured_yet_takes_the_rate_of_the_others() -> None:
    assert decide(context(BUSY, {**BUSY, "rate": 0, "outstanding": 0, "mean_work": 0})) == 4


def test_what_is_done_per_second_keeps_replicas_that_have_no_queue() -> None:
    idle = {**BUSY, "outstanding": 0, "calls": 0}
    assert decide(context(idle, idle, done=(0, 6000))) == 2
    assert decide(context(idle, idle, done=(0, 2000))) == 1


def test_without_a_rate_the_calls_decide_by_rays_rule() -> None:
    unknown = {**BUSY, "rate": 0}
    assert decide(context(unknown, requests=30, target_ongoing_requests=10)) == 3
    assert decide(context(requests=30, target=1, target_ongoing_requests=10)) == 1  # none is running: wait for it


def test_a_stage_without_work_goes_to_zero_and_comes_back_for_one_call() -> None:
    idle = {**BUSY, "outstanding": 0, "calls": 0}
    assert decide(context(idle, min_replicas=0)) == 0
    assert decide(context(idle, min_replicas=0, done=(0, 1))) == 1
    assert decide(context(target=0, min_replicas=0, requests=1, queued=1)) == 1


def test_decode_goes_by_sequences_and_cache() -> None:
    full = {"calls": 12, "mean_work": 1, "rate": 0, "slots": 32, "kv_use": 0.3}
    assert decide(context(full, name="Decode", policy=DECODE)) == 2
    assert decide(context({**full, "calls": 3, "kv_use": 0.95}, name="Decode", policy=DECODE)) == 2
    assert decide(context({**full, "calls": 3}, name="Decode", policy=DECODE)) == 1


def test_ingress_goes_by_its_own_requests_which_ray_does_not_see() -> None:
    busy = {"requests": 40.0}
    options: dict[str, Any] = {"name": "Ingress", "policy": INGRESS, "target_ongoing_requests": 16, "requests": 0}
    assert decide(context(busy, busy, **options)) == 5
    assert decide(context({"requests": 0.0}, {"requests": 9.0}, **options)) == 1
    assert decide(context(**options | {"requests": 30, "target": 1})) == 1, "nothing reported yet"


@pytest.mark.parametrize("kwargs", [{"target_queue": 1}, {"target_queue_s": 0}])
def test_a_mistake_is_logged_and_never_raised_in_the_controller(
    kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    policy = WorkPolicy(**kwargs)
    ctx = context(BUSY, requests=30, target_ongoing_requests=10)
    assert [policy(ctx)[0] for _ in range(3)] == [3, 3, 3]
    assert len({record.created for record in caplog.records}) == 1
    assert next(iter(kwargs)) in caplog.text


def test_rays_pickles_of_the_policies_work_in_another_process() -> None:
    """Ray pickles the module by value, from the process that builds the application to the controller."""
    for name in (WORK, DECODE, INGRESS, "serve_app.autoscaling:SharedGPUs"):
        made = AutoscalingPolicy(policy_function=name)
        assert cloudpickle.loads(made.get_serialized_policy_def()).__name__ == name.partition(":")[2]


# ---- the application


def decide_all(policy: SharedGPUs, *contexts: AutoscalingContext) -> dict[str, int]:
    decided, _ = _apply_app_level_autoscaling_config(policy)({ctx.deployment_id: ctx for ctx in contexts})
    return {key.name: count for key, count in decided.items()}


def three(**encoder: float) -> list[AutoscalingContext]:
    return [
        context(BUSY | encoder, name="Encoder"),
        context(BUSY | {"outstanding": 2000}, name="Prefill"),
        context({"calls": 8, "mean_work": 1, "rate": 1, "slots": 32, "gpus": 1}, name="Decode", policy=DECODE),
    ]


def test_with_enough_gpus_every_deployment_gets_what_its_own_policy_says() -> None:
    assert decide_all(SharedGPUs(gpus=8), *three()) == {"Encoder": 4, "Prefill": 2, "Decode": 1}


def test_ingress_has_no_part_in_the_cards() -> None:
    ingress = context({"requests": 200.0}, name="Ingress", policy=INGRESS, target_ongoing_requests=50)
    decided = decide_all(SharedGPUs(gpus=4), ingress, *three())
    assert decided == {"Ingress": 4, "Encoder": 2, "Prefill": 1, "Decode": 1}
    assert IngressPolicy().mistake is None


def test_short_gpus_go_where_work_waits_longest() -> None:
    assert decide_all(SharedGPUs(gpus=4), *three()) == {"Encoder": 2, "Prefill": 1, "Decode": 1}
    assert decide_all(SharedGPUs(gpus=5), *three()) == {"Encoder": 3, "Prefill": 1, "Decode": 1}


def test_the_gpus_of_the_cluster_are_asked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    policy = SharedGPUs()
    monkeypatch.setattr("serve_app.scaling.policies.is_elastic", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: asked.append(1) or {"GPU": 4.0})
    for _ in range(3):
        assert decide_all(policy, *three()) == {"Encoder": 2, "Prefill": 1, "Decode": 1}
    assert asked == [1]


def test_without_a_claim_the_deployments_own_policies_decide() -> None:
    nothing_known = context(name="Encoder", target=1, requests=3)
    assert decide_all(SharedGPUs(gpus=1), nothing_known, *three()[1:]) == {"Encoder": 1, "Prefill": 2, "Decode": 1}


def test_a_stage_at_zero_keeps_the_claim_it_reported() -> None:
    policy = SharedGPUs(gpus=3)
    _, prefill, decode = three()
    decide_all(policy, *three())
    at_zero = context(name="Encoder", target=0, min_replicas=0)
    assert decide_all(policy, at_zero, prefill, decode) == {"Encoder": 0, "Prefill": 2, "Decode": 1}


def test_a_deployment_that_is_no_stage_is_left_to_its_policy() -> None:
    by_calls = "ray.serve.autoscaling_policy:default_autoscaling_policy"
    ingress = context({}, name="Ingress", policy=by_calls, requests=130, target_ongoing_requests=64)
    assert decide_all(SharedGPUs(gpus=3), ingress, *three()) == {"Ingress": 3, "Encoder": 1, "Prefill": 1, "Decode": 1}


def test_the_own_policies_are_made_once_and_again_after_a_new_config() -> None:
    policy, ctx = SharedGPUs(gpus=8), context(BUSY)
    first = policy._policy("Encoder", ctx)
    assert policy._policy("Encoder", ctx) is first
    assert policy._policy("Encoder", context(BUSY)) is not first


def test_decode_policy_knows_targets_that_the_others_do_not() -> None:
    assert DecodePolicy(target_running=8).mistake is None
    assert WorkPolicy(target_running=8).mistake is not None
