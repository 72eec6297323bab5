"""The public address of ingress replicas, from Ray Serve's controller."""

from typing import Any

import ray
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from serve_app.config import Http
from serve_app.handoff.errors import CannotStart
from serve_app.ingress.front import Address


def public_address(http: Http, app_name: str) -> Address:
    """Raises ``CannotStart`` if both the replicas and Serve's proxy would listen, or neither. The proxy sets SO_REUSEPORT
    too, so the kernel would silently give it a part of the connections."""
    client: Any = _get_global_client()
    controller = client._controller
    asked = controller.get_http_config, controller.get_proxy_location, controller.get_all_endpoints
    options, location, endpoints = ray.get([ask.remote() for ask in asked], timeout=30.0)
    has_proxy = options.host is not None and location != ProxyLocation.Disabled
    if http is Http.REPLICAS and has_proxy:
        raise CannotStart(
            f"`http: replicas` (the default) has each ingress replica listen on {options.host}:{options.port}, where Ray "
            "Serve's proxy listens: set `proxy_location: Disabled` at the top of the Serve config, or `http: proxy` under "
            "`args:`. Where Serve runs already, it keeps its own: `serve shutdown` first"
        )
    if http is Http.PROXY and not has_proxy:
        raise CannotStart(
            "`http: proxy` has nobody listen, because Ray Serve starts no proxy with `proxy_location: Disabled`: leave that "
            "out of the Serve config, or `http: proxy` out of `args:`. Where Serve runs already, it keeps its own: "
            "`serve shutdown` first"
        )
    if http is Http.REPLICAS and options.host is None:
        raise CannotStart(
            "`http: replicas` needs a host to listen on: set `http_options: {host: …}` in the Serve config"
        )
    routes = [told["route"] for deployment, told in endpoints.items() if deployment.app_name == app_name]
    tls = {key: value for key, value in options.model_dump().items() if key.startswith("ssl_") and value}
    return Address(
        host=options.host or "",
        port=options.port,
        app_name=app_name,
        prefix=(routes[0] if routes else "/").rstrip("/"),
        root_path=options.root_path,
        keep_alive_s=options.keep_alive_timeout_s,
        tls=tls,
    )


def check_scaling(http: Http, deployment: Any) -> None:
    """Raises ``CannotStart`` if a deployment's config scales it by requests that nobody counts."""
    scaling = deployment.autoscaling_config
    if http is Http.REPLICAS and scaling is not None and scaling.policy.is_default_policy_function():
        raise CannotStart(
            "`autoscaling_config` of `Ingress` counts requests that pass through Ray Serve, and with `http: replicas` none "
            "do: add `policy: {policy_function: serve_app.autoscaling:IngressPolicy}` to it"
        )
