"""Engine configs as a replica on a card would make them, up to where it would load the weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs

from serve_app.stages import fit
from serve_app.launch.card_memory import GIB
from serve_app.config import EPDConfig
from serve_app.stage import Stage
from serve_app.stages.fit import demand_of
from serve_app.launch.placement import Cluster, resolve
from serve_app.launch.engine_args import engine_args, replica_env
from serve_app.stages.engine import engine_config
from tests.gpu.build.platform import Card, card

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Planned:
    """One engine of a resolved config on one kind of card."""

    stage: Stage
    claimed: float
    vllm_config: Any
    env: dict[str, str]
    refusal: str | None
    """Why its replica ends before it loads; None: it goes on."""

    @property
    def cap(self) -> float | None:
        """Fraction of the card that PyTorch may give this engine; None: no cap."""
        setting = self.env.get("PYTORCH_ALLOC_CONF")
        return float(setting.rpartition(":")[2]) if setting else None


def serve_args(name: str) -> dict[str, Any]:
    """``args:`` of a Serve config, or of the one inside a RayService."""
    documents = [each for each in yaml.safe_load_all((ROOT / name).read_text()) if each]
    service = next((each for each in documents if each.get("kind") == "RayService"), None)
    document = yaml.safe_load(service["spec"]["serveConfigV2"]) if service else documents[0]
    args = document["applications"][0]["args"]
    assert isinstance(args, dict)
    return args


def resolved(args: dict[str, Any], cards: int, of: Card, **cluster: Any) -> EPDConfig:
    return resolve(EPDConfig.model_validate(args), Cluster(cards, 64, (), card_gib=of.gib, **cluster)).config


def plan(config: EPDConfig, of: Card, models: dict[str, str]) -> list[Planned]:
    """All engines of a config, by vLLM's own ``create_engine_config`` on that card."""
    return [_plan(config, stage, of, models) for stage in config.stages]


def _plan(config: EPDConfig, stage: Stage, of: Card, models: dict[str, str]) -> Planned:
    env = replica_env(config, stage, of.gib)
    kept = dict(os.environ)
    os.environ.update(env)
    try:
        with card(of):
            args = engine_args(config, stage, models.get(config.model or "", config.model or ""), of.gib)
            vllm_config = engine_config(AsyncEngineArgs(**args))
            try:
                fit.check(config, stage, vllm_config)
                refusal = None
            except fit.ConfigError as error:
                refusal = str(error)
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return Planned(stage, config.stages[stage].gpus_per_replica or 0.0, vllm_config, env, refusal)


def room_gib(planned: Planned, of: Card) -> float:
    """What an engine may use of its card."""
    utilization = planned.vllm_config.cache_config.gpu_memory_utilization
    return fit.room_gib(planned.stage, planned.claimed or 1.0, of.gib, utilization)


def demand_gib(planned: Planned, of: Card) -> float:
    with card(of):
        return demand_of(planned.vllm_config).bytes / GIB
