"""Ingress replicas: vLLM's OpenAI app in front of the stages. They have no engine and need no GPU."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments._http import check_scaling, public_address
from serve_app.config import EPDConfig
from serve_app.ingress.peers import Peers
from serve_app.ingress.readiness import Readiness
from serve_app.launch.engine_args import replica_env
from serve_app.launch.placement import is_elastic
from serve_app.launch.start_failure import says_why
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage


def channel_host() -> str:
    """An address of this node that decode replicas can send output tokens to."""
    return "127.0.0.1" if len(ray.nodes()) == 1 and not is_elastic() else str(ray.util.get_node_ip_address())


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    def __init__(self, config: EPDConfig, **handles: DeploymentHandle[Any]) -> None:
        self._config = config
        self._stages = {Stage(name): StageHandle(Stage(name), handle) for name, handle in handles.items()}
        context = serve.get_replica_context()
        self._app_name, self._replica = context.app_name, context.replica_id.unique_id
        self._deployment = context._deployment_config
        own = serve.get_deployment_handle(context.deployment, context.app_name, _check_exists=False)
        self._peers = Peers(self._replica, own)
        for key, value in replica_env(config, None).items():
            os.environ.setdefault(key, value)

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve. Returns when every stage can serve."""
        with says_why("ingress", str(self._config.model)):
            address = await asyncio.to_thread(public_address, self._config.http, self._app_name)
            check_scaling(self._config.http, self._deployment)
            # vLLM reads its environment when it is imported.
            from serve_app.ingress.start import Place, start

            place = Place(self._replica, address, channel_host(), self._deployment.max_ongoing_requests)
            readiness = Readiness(self._stages, self._deployments, self._config.timeouts.startup_s)
            self._app = await start(self._config, place, self._stages, readiness, self._peers)
        return self._app

    def _deployments(self) -> Mapping[str, Any]:
        """The status of this application's deployments."""
        deployments: Mapping[str, Any] = serve.status().applications[self._app_name].deployments
        return deployments

    async def close(self) -> tuple[int, float]:
        """Refuse new requests from now on. Returns how many are under way, and the seconds that they get to end."""
        return self._app.close(), self._config.timeouts.drain_s

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The metrics that Ray Serve passes to ``IngressPolicy``."""
        return {"requests": float(self._app.inside)}

    async def tell_peer(self, asker: str, what: str, key: str, *args: Any) -> Any | None:
        """Answer another ingress replica (see ``Peers``)."""
        return await self._peers.tell(asker, what, key, *args)
