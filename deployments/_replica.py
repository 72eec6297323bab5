"""What the engine replicas of all stages share: start, health, metrics, profile, shutdown."""

import os
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from serve_app.config import EPDConfig, Stage
from serve_app.placement import xpu_affinity
from serve_app.roles import engine_args, model_path, replica_env
from serve_app.transfer import check_shared_memory, side_channel_env, storage_path
from serve_app.vllm_plugin import REPLICA_ENV

if TYPE_CHECKING:
    from serve_app.engine import StageEngine


class EngineReplica:
    """One engine of one stage. Subclasses add the handle methods of their stage."""

    stage: Stage
    engine: "StageEngine"

    def __init__(self, config: EPDConfig) -> None:
        context = serve.get_replica_context()
        self.replica: str = context.replica_id.unique_id
        env = {REPLICA_ENV: self.replica} | replica_env(config, self.stage)
        env |= xpu_affinity(config.accelerator, ray.get_gpu_ids(), os.environ)
        for key, value in env.items():
            os.environ.setdefault(key, value)
        os.environ.update(side_channel_env(ray.util.get_node_ip_address()))
        check_shared_memory(config)
        if config.encoder is not None and config.ec.uses_folder:
            storage_path(config).mkdir(parents=True, exist_ok=True)

        # Only now: vLLM reads its environment when it is imported.
        from serve_app.engine import StageEngine

        args = engine_args(config, self.stage, model_path(config))
        self.engine = StageEngine(self.stage, args, config.metrics.engines_in_ray)

    async def check_health(self) -> None:
        await self.engine.check_health()

    def metrics(self) -> tuple[str, str, str]:
        """Stage, replica and metrics in Prometheus' text format."""
        return self.stage, self.replica, self.engine.metrics()

    async def start_profile(self, overrides: dict[str, Any]) -> str:
        await self.engine.start_profile(**overrides)
        return self.replica

    async def stop_profile(self) -> str:
        await self.engine.stop_profile()
        return self.replica

    def __del__(self) -> None:
        if (engine := getattr(self, "engine", None)) is not None:
            engine.shutdown()
