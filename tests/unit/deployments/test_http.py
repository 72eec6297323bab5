"""Where an ingress replica listens, as Serve's controller tells it."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, ProxyLocation

from deployments import _http
from serve_app.config import Http
from serve_app.handoff.errors import CannotStart
from serve_app.ingress.front import Address

OPTIONS = HTTPOptions(host="127.0.0.1", port=8123)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers what is set on it."""
    told: dict[str, Any] = {
        "get_http_config": OPTIONS,
        "get_proxy_location": ProxyLocation.Disabled,
        "get_all_endpoints": {
            DeploymentID("Ingress", "other"): {"route": "/other"},
            DeploymentID("Ingress", "epd"): {"route": "/"},
        },
    }
    methods = {name: SimpleNamespace(remote=lambda name=name: told[name]) for name in told}
    client = SimpleNamespace(_controller=SimpleNamespace(**methods))
    monkeypatch.setattr(_http, "_get_global_client", lambda: client)
    monkeypatch.setattr(ray, "get", lambda told, timeout: told)
    return told


def test_it_is_where_serves_options_say(controller: Any) -> None:
    assert _http.public_address(Http.REPLICAS, "epd") == Address("127.0.0.1", 8123, "epd", "", "", 90)


def test_prefix_root_path_and_certificates_are_taken_over(controller: Any) -> None:
    controller["get_http_config"] = HTTPOptions(
        host="::1", root_path="/api", keep_alive_timeout_s=7, ssl_keyfile="key", ssl_certfile="cert"
    )
    controller["get_all_endpoints"][DeploymentID("Ingress", "epd")] = {"route": "/epd"}
    tls = {"ssl_keyfile": "key", "ssl_certfile": "cert"}
    assert _http.public_address(Http.REPLICAS, "epd") == Address("::1", 8000, "epd", "/epd", "/api", 7, tls)


@pytest.mark.parametrize("location", [ProxyLocation.EveryNode, ProxyLocation.HeadOnly])
def test_replicas_do_not_listen_beside_serves_proxy(controller: Any, location: ProxyLocation) -> None:
    controller["get_proxy_location"] = location
    with pytest.raises(
        CannotStart, match=r"127.0.0.1:8123, where Ray Serve's proxy listens: set `proxy_location: Disabled`"
    ):
        _http.public_address(Http.REPLICAS, "epd")
    assert _http.public_address(Http.PROXY, "epd").port == 8123


def test_proxy_that_serve_does_not_start_is_told(controller: Any) -> None:
    with pytest.raises(CannotStart, match="`http: proxy` has nobody listen"):
        _http.public_address(Http.PROXY, "epd")


@pytest.mark.parametrize("http", Http)
def test_scaling_by_what_nobody_counts_is_refused(http: Http) -> None:
    def scaled(policy: AutoscalingPolicy | None) -> Any:
        config = AutoscalingConfig(min_replicas=1, max_replicas=2, **({"policy": policy} if policy else {}))
        return SimpleNamespace(autoscaling_config=config)

    _http.check_scaling(http, SimpleNamespace(autoscaling_config=None))
    _http.check_scaling(http, scaled(AutoscalingPolicy(policy_function="serve_app.autoscaling:IngressPolicy")))
    if http is Http.PROXY:
        return _http.check_scaling(http, scaled(None))
    with pytest.raises(CannotStart, match=r"policy: \{policy_function: serve_app.autoscaling:IngressPolicy\}"):
        _http.check_scaling(http, scaled(None))
