"""The graph: encode → prefill → decode behind one ingress.

::

    client ── HTTP ──> Ingress ─ handle ─> Encoder   one call per item      ══ EC connector ══> Prefill, Decode
                               ─ handle ─> Prefill   one call per choice    ══ KV connector ══> Decode
                               ─ handle ─> Decode    one call per choice
                               <═ channel ═ Decode   tokens: a frame per engine step

``serve run serve_config.yaml`` calls ``build_app`` with the mapping under ``args:``.
"""

import logging
import os
from typing import Any

import ray
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.decode import Decode
from deployments.encoder import Encoder
from deployments.ingress import Ingress
from deployments.prefill import Prefill
from serve_app.config import EPDConfig, Http
from serve_app.handoff.errors import ConfigError
from serve_app.hooks.forked_worker import ADDRESS_ENV
from serve_app.launch.card_memory import smallest_card_gib
from serve_app.launch.fork_server import forks, worker_command
from serve_app.launch.placement import Cluster, actor_options, is_elastic, resolve
from serve_app.launch.vllm_args import check_api_args, check_engine_args, check_speculation
from serve_app.stage import Stage

logger = logging.getLogger("ray.serve")

DEPLOYMENTS: dict[Stage, Any] = {Stage.ENCODER: Encoder, Stage.PREFILL: Prefill, Stage.DECODE: Decode}

NO_ACCESS_LOG = {"enable_access_log": False}
"""Ray's five log lines per request cost as much CPU as an engine step. The ingress logs each request, and so does
Ray's proxy if there is one."""

ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""An ingress has one loop for Ray, its router and the app. Passing each chunk between threads would cost a fifth of its CPU,
and our code does not block the loop."""


def build_app(args: dict[str, Any]) -> Application:
    """Raises ``ConfigError`` with one sentence per mistake, before anything is started."""
    on = cluster()
    resolved = resolve(parse(args), on)
    config = resolved.config
    check_vllm_args(config)
    logger.info(f"EPD {config.topology}: {resolved.reason}")

    # Ray Serve would start a deployment that has never run three times per replica, minutes each. In an elastic cluster a
    # retry may get a better node. Once a replica has run, Serve retries forever.
    starts = {} if on.elastic else {"max_constructor_retry_count": 1}
    handles = {
        stage.value: DEPLOYMENTS[stage].options(**starts, **stage_options(stage, config)).bind(config)
        for stage in config.stages
    }
    ingress: Any = Ingress  # the decorator made a deployment of the class
    ingress = ingress.options(
        **starts,
        ray_actor_options=forked(
            {"num_cpus": config.ingress_cpus, "runtime_env": {"env_vars": ONE_LOOP}}, config, None
        ),
        logging_config=NO_ACCESS_LOG,
        max_ongoing_requests=1024,
        # The replica of a new config listens before the old one ends. With Serve's proxy requests wait for it instead.
        max_surge_percent=100 if config.http is Http.REPLICAS else 0,
        graceful_shutdown_timeout_s=config.timeouts.drain_s,
    )
    application: Application = ingress.bind(config, **handles)
    return application


def stage_options(stage: Stage, config: EPDConfig) -> dict[str, Any]:
    """Ray Serve's options for a stage; ``deployments:`` can set others."""
    queue = config.queues[stage]
    if stage is Stage.ENCODER:
        router = RequestRouterConfig(
            request_router_class="serve_app.routing.routers:LeastCostRouter",
            request_router_kwargs={"headroom": config.advanced.encode.affinity_headroom},
        )
    else:
        router = RequestRouterConfig(
            request_router_class="serve_app.routing.routers:PrefixRouter",
            # Decode can do the work of prefill; nobody can do that of decode.
            request_router_kwargs={"waits": stage is Stage.DECODE},
        )
    return {
        "ray_actor_options": forked(actor_options(config.stages[stage], config.accelerator), config, stage),
        "logging_config": NO_ACCESS_LOG,
        "max_ongoing_requests": queue.max_ongoing_requests,
        "max_queued_requests": queue.max_queued_requests,
        "graceful_shutdown_timeout_s": config.timeouts.drain_s,
        "request_router_config": router,
    }


def forked(options: dict[str, Any], config: EPDConfig, stage: Stage | None) -> dict[str, Any]:
    """Ray's options with which `make serve` has the replicas forked from its server, if it has one for them."""
    if (
        ADDRESS_ENV not in os.environ
        or not forks(config, stage)
        or ray.get_runtime_context().runtime_env.keys() - {"env_vars"}
    ):
        return options
    return options | {"runtime_env": options.get("runtime_env", {}) | {"py_executable": worker_command(stage)}}


def parse(args: dict[str, Any]) -> EPDConfig:
    try:
        return EPDConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError.of(error) from None


def cluster() -> Cluster:
    """The resources of the connected Ray cluster."""
    resources = ray.cluster_resources()
    types = tuple(sorted(name.removeprefix("accelerator_type:") for name in resources if "accelerator_type:" in name))
    with_gpus = sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    card_gib = smallest_card_gib(types) if gpus else None
    return Cluster(gpus, cpus, types, is_elastic(), max(with_gpus, 1), card_gib)


def check_vllm_args(config: EPDConfig) -> None:
    """Refuse arguments that vLLM does not know."""
    check_engine_args(config.engine_args, "engine_args")
    for stage, stage_config in config.stages.items():
        check_engine_args(stage_config.engine_args, f"{stage}.engine_args")
    check_speculation(config)
    check_api_args(config.api, bool(config.engine_args.get("enable_lora")))
