"""The graph of a config, or one sentence per mistake. Nothing is deployed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.serve import Application
from ray.serve._private import constants

from serve_app import app
from serve_app.config import DEMO_MODEL, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.placement import Cluster

SMALL = Cluster(gpus=0, cpus=2)
Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Deployments by name of the application that a config makes on a cluster."""

    def make(args: dict[str, Any], cluster: Cluster = SMALL) -> dict[str, Any]:
        monkeypatch.setattr(app, "cluster", lambda: cluster)
        application = app.build_app(args)
        assert isinstance(application, Application)
        ingress = application._bound_deployment
        stages = [handle._bound_deployment for handle in ingress.init_kwargs.values()]
        return {deployment.name: deployment for deployment in [ingress, *stages]}

    return make


@pytest.mark.parametrize(
    ("args", "stages"),
    [
        ({}, ["encoder", "prefill", "decode"]),
        ({"prefill": None}, ["encoder", "decode"]),
        ({"encoder": None}, ["prefill", "decode"]),
        ({"encoder": None, "prefill": None}, ["decode"]),
    ],
)
def test_ingress_has_a_handle_to_each_stage_of_the_topology(
    build: Build, args: dict[str, Any], stages: list[str]
) -> None:
    deployments = build(args)
    assert list(deployments) == ["Ingress", *(stage.capitalize() for stage in stages)]
    assert list(deployments["Ingress"].init_kwargs) == stages
    for name, handle in deployments["Ingress"].init_kwargs.items():
        assert handle._bound_deployment.func_or_class.stage == name


def test_every_deployment_gets_the_same_resolved_config(build: Build) -> None:
    configs = [deployment.init_args[0] for deployment in build({}).values()]
    assert all(config is configs[0] for config in configs)
    assert (configs[0].accelerator, configs[0].model, configs[0].topology) == ("cpu", DEMO_MODEL, "E+P+D")


def test_ingress_needs_no_gpu_and_stages_claim_what_they_use(build: Build) -> None:
    deployments = build({"model": "a/b"}, Cluster(gpus=2, cpus=64))
    claims = {name: deployment.ray_actor_options for name, deployment in deployments.items()}
    assert {name: options.get("num_gpus") for name, options in claims.items()} == {
        "Ingress": None,
        "Encoder": 0.15,
        "Prefill": 0.85,
        "Decode": 1,
    }
    assert {options["num_cpus"] for options in claims.values()} == {1}


def test_ingress_runs_on_one_loop(build: Build) -> None:
    deployments = build({})
    assert deployments["Ingress"].ray_actor_options["runtime_env"] == {"env_vars": app.ONE_LOOP}
    for variable in app.ONE_LOOP:
        assert getattr(constants, variable) is True, (
            "serve_app/app.py ONE_LOOP: Ray's default, which engine replicas have"
        )


def test_small_machine_starts_every_deployment(build: Build) -> None:
    claims = [deployment.ray_actor_options["num_cpus"] for deployment in build({}).values()]
    assert sum(claims) <= SMALL.cpus


def test_environment_and_concurrency_of_a_stage_reach_its_deployment(build: Build) -> None:
    deployments = build({"prefill": {"env": {"UCX_TLS": "tcp"}}, "advanced": {"prefill": {"max_ongoing_requests": 7}}})
    prefill = deployments["Prefill"]
    assert prefill.ray_actor_options["runtime_env"]["env_vars"] == {"UCX_TLS": "tcp"}
    assert prefill.max_ongoing_requests == 7
    assert deployments["Decode"].max_ongoing_requests == 256
    assert deployments["Ingress"].max_ongoing_requests >= 256


def test_ingress_of_a_new_config_listens_before_the_old_one_goes(build: Build) -> None:
    def surge(args: dict[str, Any]) -> int:
        return int(build(args)["Ingress"]._deployment_config.max_surge_percent)

    assert surge({}) == 100
    assert surge({"http": "proxy"}) == 0


@pytest.mark.parametrize(("elastic", "starts"), [(False, 1), (True, constants.DEFAULT_CONSTRUCTOR_RETRY_COUNT)])
def test_first_failure_is_the_last_where_no_other_node_may_do(build: Build, elastic: bool, starts: int) -> None:
    deployments = build({"accelerator": "cpu"}, Cluster(gpus=0, cpus=8, elastic=elastic))
    counts = {
        name: deployment._deployment_config.max_constructor_retry_count for name, deployment in deployments.items()
    }
    assert counts == dict.fromkeys(["Ingress", "Encoder", "Prefill", "Decode"], starts)


def test_labels_of_a_stage_reach_its_deployment(build: Build) -> None:
    options = {
        name: deployment.ray_actor_options.get("label_selector")
        for name, deployment in build({"prefill": {"label_selector": {"zone": "in(a, b)"}}}).items()
    }
    assert options == {"Ingress": None, "Encoder": None, "Prefill": {"zone": "in(a, b)"}, "Decode": None}


@pytest.fixture
def empty_kuberay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray cluster on KubeRay whose head has no CPUs and whose workers are not there yet. Its autoscaler, v2, reports no
    sizes to Ray."""
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")  # as KubeRay sets it in every Ray container
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)


@pytest.mark.usefixtures("empty_kuberay")
def test_kuberay_brings_the_gpus_later() -> None:
    assert app.cluster() == Cluster(gpus=0, cpus=0, elastic=True)
    assert isinstance(app.build_app({"accelerator": "cuda", "model": "a/b"}), Application)


@pytest.mark.usefixtures("empty_kuberay")
def test_kuberay_with_no_gpu_yet_is_not_taken_for_a_cluster_without_any() -> None:
    with pytest.raises(ConfigError, match="`accelerator: auto` cannot tell"):
        app.build_app({})


def test_cluster_elsewhere_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_KUBERAY_IN_USE", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0})
    cards = [{"Alive": True, "Resources": {"GPU": 1.0}}] * 2
    gone, head = {"Alive": False, "Resources": {"GPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*cards, gone, head])
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert app.cluster() == Cluster(2, 8, ("H100",), elastic=False, nodes_with_gpus=2)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64})
    assert app.cluster().elastic


def test_every_deployment_has_the_time_to_finish_what_it_holds(build: Build) -> None:
    deployments = build({"timeouts": {"drain_s": 77}})
    options = [deployment._deployment_config.graceful_shutdown_timeout_s for deployment in deployments.values()]
    assert options == [77] * 4


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        app.parse(args)
    return str(caught.value)


def test_every_mistake_has_a_line_that_names_its_key() -> None:
    message = refusal({"modle": "x", "advanced": {"kv": {"lease_s": 1}}, "decode": {"engine_args": {"dtype": "half"}}})
    first, *mistakes = message.splitlines()
    assert first == "The configuration under `args:` cannot be used."
    keys = {line.strip().partition(":")[0] for line in mistakes}
    assert keys == {"modle", "advanced.kv.lease_s", "decode.engine_args"}
    assert "Value error" not in message and "errors.pydantic.dev" not in message


def test_mistake_between_stages_is_one_of_the_args_as_a_whole() -> None:
    assert "\n  args: `ec` has no effect" in refusal({"encoder": None, "ec": {}})


def test_config_without_mistakes_is_the_config() -> None:
    assert app.parse({"model": "a/b"}) == EPDConfig(model="a/b")
    assert app.parse({}) == EPDConfig()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"engine_args": {"max_modle_len": 1}}, "`engine_args.max_modle_len` is not an engine argument"),
        ({"decode": {"engine_args": {"max_sequences": 1}}}, "`decode.engine_args.max_sequences` is not an engine"),
        ({"api": {"chat_tempalte": "x"}}, "`api.chat_tempalte` is not an argument"),
        ({"api": {"port": 1}}, "`api.port` is Ray Serve's here"),
        ({"accelerator": "cuda"}, "`accelerator: cuda` needs GPUs"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
    ids=str,
)
def test_mistake_is_refused_before_anything_is_started(build: Build, args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(args)
    assert words in str(caught.value)


def test_names_that_vllm_knows_are_taken(build: Build) -> None:
    build(
        {
            "engine_args": {"max_model_len": 64, "block_size": 16},
            "decode": {"engine_args": {"max_num_seqs": 2}},
            "api": {"chat_template": "x"},
        }
    )


def test_stages_are_named_after_their_deployments() -> None:
    """The ingress finds the state of a stage under the capitalized name of its deployment."""
    assert {stage.capitalize() for stage in app.DEPLOYMENTS} == {each.name for each in app.DEPLOYMENTS.values()}


@pytest.mark.parametrize(
    ("address", "runtime_env", "forked"),
    [
        ("/run/forks", {}, True),
        ("/run/forks", {"env_vars": {"A": "1"}}, True),
        ("/run/forks", {"pip": ["x"]}, False),
        (None, {}, False),
    ],
)
def test_replicas_are_forked_where_make_serve_has_a_server_and_ray_no_other_python(
    build: Build, monkeypatch: pytest.MonkeyPatch, address: str | None, runtime_env: dict[str, Any], forked: bool
) -> None:
    monkeypatch.setattr("serve_app.launch.fork_server.built_for_cpu", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=runtime_env))
    if address is not None:
        monkeypatch.setenv("EPD_FORK_SERVER", address)
    for name, deployment in build({}).items():
        env = deployment.ray_actor_options.get("runtime_env", {})
        assert env.get("py_executable", "").endswith("ingress" if name == "Ingress" else "engine") or not forked
        assert ("py_executable" in env) is forked
        assert name != "Ingress" or "env_vars" in env
