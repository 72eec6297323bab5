"""What serve_app leans on inside Ray Serve."""

import inspect

from tests.contracts.looking import fields, parameters


def test_serve_awaits_the_end_of_a_replica_and_asks_it_for_signals() -> None:
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert "async def __del__(self)" in source, "serve_app/stages/replica.py __del__"
    assert '"record_autoscaling_stats"' in source, "serve_app/stages/replica.py record_autoscaling_stats"
    pusher = inspect.getsource(replica.ReplicaMetricsManager.start_metrics_pusher)
    assert "metrics_interval_s" in pusher, "docs/operations.md, Metrics: how often replicas report"


def test_ray_serves_an_app_that_the_replica_builds() -> None:
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from deployments.ingress import Ingress

    name = "__serve_build_asgi_app__"
    assert name == SERVE_BUILD_ASGI_APP_METHOD, "deployments/ingress.py"
    assert hasattr(Ingress.func_or_class, name), "deployments/ingress.py"  # type: ignore[attr-defined]


def test_ray_broadcasts_to_all_replicas_and_keeps_their_exceptions() -> None:
    from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle, DeploymentResponseGenerator

    assert {"timeout_s", "return_exceptions"} <= parameters(DeploymentBroadcastResponse.results_async).keys(), (
        "serve_app/routing/handles.py broadcast"
    )
    assert "_by_reference" in parameters(DeploymentHandle.options), "serve_app/routing/handles.py: calls by gRPC"
    assert not hasattr(DeploymentResponseGenerator, "aclose"), (
        "serve_app/routing/handles.py stream: aclose() may do now"
    )


def test_replicas_that_are_asked_all_at_once_can_be_awaited_one_by_one() -> None:
    from ray.serve._private.replica_result import ReplicaResult
    from ray.serve.handle import DeploymentBroadcastResponse

    for method in (DeploymentBroadcastResponse._fetch_replica_results_async, ReplicaResult.get_async):
        assert list(parameters(method)) == ["self"] and inspect.iscoroutinefunction(method), (
            "serve_app/ingress/peers.py find"
        )


def test_controller_tells_where_to_listen() -> None:
    from ray.serve._private.controller import ServeController
    from ray.serve.context import ReplicaContext, _get_global_client

    assert callable(_get_global_client), "deployments/_http.py public_address"
    for name in ("get_http_config", "get_proxy_location", "get_all_endpoints"):
        assert hasattr(ServeController, name), f"deployments/_http.py public_address: {name}"
    assert "_deployment_config" in fields(ReplicaContext), "deployments/ingress.py __init__"


def test_serve_ends_the_life_of_the_app_before_anything_else_of_a_replica() -> None:
    """In which the ingress waits for what is under way (``Front.drain``)."""
    from ray import serve
    from ray.serve._private import http_util, replica

    wrapper = inspect.getsource(http_util.ASGIAppReplicaWrapper.__del__)
    assert "await self._serve_asgi_lifespan.shutdown()" in wrapper, "serve_app/ingress/front.py Front._live"
    steps = ["await ASGIAppReplicaWrapper.__del__(self)", "await cls.__del__(self)"]
    source = inspect.getsource(serve.ingress)
    assert source.index(steps[0]) < source.index(steps[1]), "serve_app/ingress/front.py Front._live"
    ending = inspect.getsource(replica.Replica._perform_graceful_shutdown)
    assert "await self.shutdown()" in ending, "serve_app/ingress/front.py Front.drain"


def test_a_request_router_chooses_in_tiers_and_knows_how_long_queues_are() -> None:
    from ray.serve._private.request_router.common import PendingRequest, ReplicaQueueLengthCache, RequestRoutingContext
    from ray.serve._private.request_router.request_router import FIFOMixin, RequestRouter

    where = "serve_app/routing/routers.py"
    assert {"candidate_replicas", "pending_request"} <= parameters(RequestRouter.choose_replicas).keys(), where
    assert {"pending_request", "replica_id"} <= parameters(RequestRouter.on_request_routed).keys(), where
    assert {"replica_id", "internal_request_id"} <= parameters(RequestRouter.on_request_completed).keys(), where
    assert "replicas" in parameters(RequestRouter.update_replicas), where
    assert "replica_id" in parameters(RequestRouter.on_send_request), where
    for router in (RequestRouter, FIFOMixin):  # replaced: a replica takes the call that it was chosen for
        assert list(parameters(router._fulfill_next_pending_request)) == ["self", "replica", "request_metadata"], where
    assert {"args", "metadata", "routing_context"} <= fields(PendingRequest), where
    assert "should_backoff" in fields(RequestRoutingContext), where
    assert isinstance(RequestRouter.replica_queue_len_cache, property), "serve_app/routing/handles.py queues_of"
    assert "replica_id" in parameters(ReplicaQueueLengthCache.get), "serve_app/routing/handles.py queues_of"
    assert isinstance(RequestRouter.curr_replicas, property), where
