"""Choose the device of the stages and each replica's claims from Ray: pure functions of the config and the cluster."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from serve_app.config import DEMO_MODEL, GPU_MODEL, Accelerator, EPDConfig, StageConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.card_memory import shares_of_one
from serve_app.stage import Stage

AFFINITY_ENV = {Accelerator.CUDA: "CUDA_VISIBLE_DEVICES", Accelerator.XPU: "ZE_AFFINITY_MASK"}

NO_OVERRIDE_ENV = {
    # Ray then leaves the affinity variable as we set it.
    Accelerator.CUDA: "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    Accelerator.XPU: "RAY_EXPERIMENTAL_NOSET_ONEAPI_DEVICE_SELECTOR",
}

DEFAULT_MODEL_LEN = 32768
"""The reference's MAX_MODEL_LEN, for the model that GPUs serve where none is named. At its own 128,000 tokens vLLM profiles
a video of 458,752 patches: 12.6 GiB of activations, too much for a card of 24 GB."""


@dataclass(frozen=True)
class Cluster:
    """Resources of the Ray cluster. ``elastic``: nodes may still be added."""

    gpus: float
    cpus: float
    gpu_types: tuple[str, ...] = ()
    elastic: bool = False
    nodes_with_gpus: int = 1
    card_gib: float | None = None
    """Memory of the smallest card; None: unknown."""

    @property
    def gpu_accelerator(self) -> Accelerator:
        intel = any(name.lower().startswith("intel") for name in self.gpu_types)
        return Accelerator.XPU if intel else Accelerator.CUDA


def is_elastic() -> bool:
    """Whether nodes may still be added to the connected Ray cluster."""
    from ray._common.usage.usage_constants import KUBERAY_ENV
    from ray._private.state import state

    # KubeRay's nodes come after its head, even without an autoscaler, and Ray does not know how many.
    return KUBERAY_ENV in os.environ or state.get_max_resources_from_cluster_config() is not None


class Resolved(NamedTuple):
    """A config with accelerator, model and GPUs per replica decided, and the sentence that says why."""

    config: EPDConfig
    reason: str


def resolve(config: EPDConfig, cluster: Cluster) -> Resolved:
    """Decide what the config leaves open. Raises ``ConfigError`` where the cluster can never give what it asks for."""
    check_labels(config)
    accelerator, reason = pick_accelerator(config.accelerator, cluster)
    model = config.model or (DEMO_MODEL if accelerator is Accelerator.CPU else GPU_MODEL)
    reason += f"; model: {model}, {'because none is named' if config.model is None else 'as configured'}"
    cpus = cpus_per_replica(len(config.stages) + 1, cluster)
    decided: dict[str, Any] = {"accelerator": accelerator, "model": model}
    if model == GPU_MODEL != config.model:
        decided["engine_args"] = {"max_model_len": DEFAULT_MODEL_LEN} | config.engine_args
    if by_nixl(config, accelerator, cluster):
        decided["ec"] = config.ec.model_dump(exclude_unset=True) | {"connector": "ECCPUConnector"}
    if config.ingress_cpus is None:
        decided["ingress_cpus"] = cpus
    try:
        for stage, stage_config in fit_gpus(config, accelerator, cluster).items():
            open_cpus = {} if stage_config.cpus_per_replica is not None else {"cpus_per_replica": cpus}
            decided[stage.value] = stage_config.model_dump(exclude_unset=True) | open_cpus
        return Resolved(EPDConfig.model_validate(config.model_dump(exclude_unset=True) | decided), reason)
    except ValidationError as error:
        raise ConfigError.of(error) from None


def pick_accelerator(wanted: Accelerator, cluster: Cluster) -> tuple[Accelerator, str]:
    """The accelerator of all stages, and the reason as text. Raises ``ConfigError`` where the cluster does not tell or lacks
    it."""
    if wanted is not Accelerator.AUTO:
        if wanted is not Accelerator.CPU and not cluster.gpus and not cluster.elastic:
            raise ConfigError(
                f"`accelerator: {wanted}` needs GPUs and the Ray cluster has none: start Ray on a machine with GPUs "
                "(`ray status` lists them), or set `accelerator: cpu` or `auto`."
            )
        return wanted, f"accelerator: {wanted}, as configured"
    if cluster.elastic and not cluster.gpus:
        raise ConfigError(
            "`accelerator: auto` cannot tell on this Ray cluster, which has no GPU now and may get some: "
            "set `accelerator: cuda`, `xpu` or `cpu`."
        )
    accelerator, found = Accelerator.CPU, "no GPU"
    if cluster.gpus:
        names = f" ({', '.join(cluster.gpu_types)})" if cluster.gpu_types else ""
        accelerator, found = cluster.gpu_accelerator, f"{cluster.gpus:g} GPUs{names}"
    return accelerator, f"accelerator: {accelerator}, because the cluster has {found} (accelerator: auto)"


def check_labels(config: EPDConfig) -> None:
    """Raise ``ConfigError`` for labels that Ray would refuse when it starts the first replica."""
    for stage, stage_config in config.stages.items():
        if stage_config.label_selector:
            from ray.serve.schema import RayActorOptionsSchema

            try:
                RayActorOptionsSchema(label_selector=stage_config.label_selector)
            except ValidationError as error:
                why = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ConfigError(f"`{stage}.label_selector`: {why}") from None


def by_nixl(config: EPDConfig, accelerator: Accelerator, cluster: Cluster) -> bool:
    """Whether embeddings go from engine to engine where the config leaves it open: on GPUs of several or future nodes, which
    may mount no common folder."""
    spread = cluster.elastic or cluster.nodes_with_gpus > 1
    is_open = config.ec.model_fields_set <= {"max_bytes", "salt_by_tenant"} and not config.advanced.ec.model_fields_set
    return config.encoder is not None and accelerator is Accelerator.CUDA and spread and is_open


def cpus_per_replica(deployments: int, cluster: Cluster) -> float:
    """1, or 0.1 on a machine too small for two replicas of each deployment, so that they can start."""
    return 1.0 if cluster.elastic or cluster.cpus >= 2 * deployments else 0.1


def fit_gpus(config: EPDConfig, accelerator: Accelerator, cluster: Cluster) -> dict[Stage, StageConfig]:
    """Fill in ``gpus_per_replica`` where it is open: whole cards if there are enough, else shares.

    Raises ``ConfigError`` when one replica of each stage needs more cards than the cluster has.
    """
    stages = config.stages
    if accelerator is Accelerator.CPU:
        return {s: c if c.gpus_per_replica is not None else _claim(c, 0) for s, c in stages.items()}
    all_open = all(c.gpus_per_replica is None and c.world_size == 1 for c in stages.values())
    shares: Mapping[Stage, float] = {}
    # On two nodes with a card each, Ray could place encoder and prefill apart, with no whole card left for decode.
    if all_open and not cluster.elastic and 1 <= cluster.gpus < len(stages) and cluster.nodes_with_gpus == 1:
        # On two cards as in the reference: encoder and prefill on one, decode on the other.
        sharing = [stage for stage in stages if cluster.gpus < 2 or stage is not Stage.DECODE]
        shares = shares_of_one(sharing, cluster.card_gib)
    fitted = {
        s: c if c.gpus_per_replica is not None else _claim(c, shares.get(s, float(c.world_size)))
        for s, c in stages.items()
    }
    needed = sum(c.gpus_per_replica or 0 for c in fitted.values())
    if needed > cluster.gpus + 1e-6 and not cluster.elastic:
        claims = ", ".join(f"{s} {c.gpus_per_replica:g}" for s, c in fitted.items())
        raise ConfigError(
            f"One replica of each stage needs {needed:g} GPUs ({claims}) and the Ray cluster has {cluster.gpus:g}: "
            "lower `gpus_per_replica` (fractions share a card), or leave stages out."
        )
    return fitted


def _claim(config: StageConfig, gpus: float) -> StageConfig:
    return StageConfig.model_validate(config.model_dump(exclude_unset=True) | {"gpus_per_replica": gpus})


def actor_options(config: StageConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Ray's ``ray_actor_options`` of a stage of a resolved config."""
    env = dict(config.env)
    if config.devices is not None and accelerator in AFFINITY_ENV:
        env[AFFINITY_ENV[accelerator]] = config.devices
        env[NO_OVERRIDE_ENV[accelerator]] = "1"
    options: dict[str, Any] = {"num_cpus": config.cpus_per_replica}
    if config.gpus_per_replica:
        options["num_gpus"] = config.gpus_per_replica
    if config.resources:
        options["resources"] = dict(config.resources)
    if config.label_selector:
        options["label_selector"] = dict(config.label_selector)
    if env:
        options["runtime_env"] = {"env_vars": env}
    return options


def check_claims(
    stage: Stage,
    config: StageConfig,
    accelerator: Accelerator,
    assigned: Mapping[str, float],
    environ: Mapping[str, str],
) -> None:
    """Raise ``ConfigError`` in a replica without its stage's claims, which ``ray_actor_options`` of a deployment replace."""
    claimed = actor_options(config, accelerator)
    amounts = {"GPU": claimed.get("num_gpus", 0.0), **claimed.get("resources", {})}
    # Ray counts in units of 0.0001, rounded down.
    lacking = [
        f"{amount:g} {name}"
        for name, amount in amounts.items()
        if amount and (not assigned.get(name) or assigned[name] < amount - 1.5e-4)
    ]
    lacking += [name for name in claimed.get("runtime_env", {}).get("env_vars", {}) if name not in environ]
    if lacking:
        raise ConfigError(
            f"This replica of {stage} lacks what its stage claims ({', '.join(lacking)}): `ray_actor_options` under "
            f"`deployments:` take the place of all its claims. Leave them out, and set `gpus_per_replica`, "
            f"`cpus_per_replica`, `resources`, `label_selector` and `env` of `{stage}` under `args:`."
        )


def shared_cards(config: StageConfig, gpu_ids: Collection[int | str]) -> list[int | str]:
    """The cards that a replica may share with others: those that it names, or claims a part of."""
    if config.devices is not None:
        return list(config.devices.split(","))
    return list(gpu_ids) if (config.gpus_per_replica or 0) < 1 else []


def xpu_affinity(
    accelerator: Accelerator, gpu_ids: list[int] | list[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """ZE_AFFINITY_MASK for the cards that Ray picked. vLLM reads it, but Ray sets another variable."""
    mask = AFFINITY_ENV[Accelerator.XPU]
    if accelerator is not Accelerator.XPU or not gpu_ids or mask in environ:
        return {}
    return {mask: ",".join(str(gpu) for gpu in gpu_ids)}
