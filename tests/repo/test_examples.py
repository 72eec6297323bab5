"""The Serve configs that come with the project: Ray Serve and this application take every key in them.

Ray drops keys that it does not know without a word, so its schema is walked here.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from serve_app.app import check_vllm_args, parse
from serve_app.config import EPDConfig
from serve_app.launch.placement import Cluster, resolve

ROOT = Path(__file__).parents[2]

NO_GPU = Cluster(gpus=0, cpus=2)
GPUS = {1: Cluster(1, 16, ("H100",)), 2: Cluster(2, 32, ("H100",)), 3: Cluster(3, 48, ("H100",)), 8: Cluster(8, 128)}

EXAMPLES = {
    # file: (topology, clusters that can run it)
    "serve_config.yaml": ("E+P+D", [NO_GPU, *GPUS.values()]),
    "examples/epd.yaml": ("E+P+D", [NO_GPU, *GPUS.values()]),
    "examples/e_pd.yaml": ("E+PD", [NO_GPU, *GPUS.values()]),
    "examples/p_d.yaml": ("P+D", [NO_GPU, *GPUS.values()]),
    "examples/single.yaml": ("PD", [NO_GPU, *GPUS.values()]),
    "examples/two_gpus.yaml": ("E+P+D", [GPUS[2], GPUS[8]]),
    "examples/many_nodes.yaml": ("E+P+D", [GPUS[8]]),
    "examples/autoscaling.yaml": ("E+P+D", [GPUS[3], GPUS[8]]),
    "examples/audio.yaml": ("E+P+D", [GPUS[1], GPUS[2], GPUS[3]]),
    "examples/large_encoder.yaml": ("E+P+D", [GPUS[8]]),
    "examples/pooling.yaml": ("E+pool", [GPUS[1], GPUS[2]]),
}

every_example = pytest.mark.parametrize("name", EXAMPLES)


def load(name: str) -> dict[str, Any]:
    document = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(document, dict)
    return document


def application(name: str) -> dict[str, Any]:
    (only,) = load(name)["applications"]
    return only


def config(name: str) -> EPDConfig:
    return parse(application(name)["args"])


def unknown_keys(mapping: dict[str, Any], schema: type[BaseModel], where: str) -> list[str]:
    return [f"{where}.{key}" for key in mapping if key not in schema.model_fields]


def keys_that_ray_would_drop(document: dict[str, Any]) -> list[str]:
    unknown = unknown_keys(document, ServeDeploySchema, "")
    unknown += unknown_keys(document.get("http_options", {}), HTTPOptionsSchema, "http_options")
    for app in document["applications"]:
        unknown += unknown_keys(app, ServeApplicationSchema, app["name"])
        for deployment in app["deployments"]:
            where = f"{app['name']}.{deployment['name']}"
            unknown += unknown_keys(deployment, DeploymentSchema, where)
            for key, schema in {
                "autoscaling_config": AutoscalingConfig,
                "ray_actor_options": RayActorOptionsSchema,
            }.items():
                unknown += unknown_keys(deployment.get(key, {}), schema, f"{where}.{key}")
        for where, policy in policies(app).items():
            unknown += unknown_keys(policy, AutoscalingPolicy, f"{where}.policy")
    return unknown


def policies(app: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The autoscaling policies of an application, by where they stand."""
    found = {
        f"{app['name']}.{deployment['name']}": deployment["autoscaling_config"]["policy"]
        for deployment in app["deployments"]
        if "policy" in deployment.get("autoscaling_config", {})
    }
    return found | ({app["name"]: app["autoscaling_policy"]} if "autoscaling_policy" in app else {})


def test_every_config_is_tested() -> None:
    found = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.yaml"), *ROOT.glob("examples/*.yaml")]}
    assert found - {".pre-commit-config.yaml"} == set(EXAMPLES)


@every_example
def test_ray_serve_takes_every_key(name: str) -> None:
    document = load(name)

    assert keys_that_ray_would_drop(document) == []
    ServeDeploySchema.model_validate(document)


def test_a_key_that_ray_would_drop_is_seen() -> None:
    document = load("serve_config.yaml")
    document["http_option"] = {}
    document["applications"][0]["deployments"][1]["replicas"] = 2
    document["applications"][0]["deployments"][2]["autoscaling_config"]["max_replica"] = 2

    ServeDeploySchema.model_validate(document)  # no word from Ray
    assert keys_that_ray_would_drop(document) == [
        ".http_option",
        "epd.Encoder.replicas",
        "epd.Prefill.autoscaling_config.max_replica",
    ]


@every_example
def test_policies_are_ours_and_take_what_they_are_given(name: str) -> None:
    for where, policy in policies(application(name)).items():
        module, _, attribute = policy["policy_function"].partition(":")
        made = getattr(importlib.import_module(module), attribute)(**policy.get("policy_kwargs", {}))
        assert made.mistake is None, where


@every_example
def test_they_serve_the_same_address_and_application(name: str) -> None:
    app = application(name)

    assert load(name)["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert (app["import_path"], app["route_prefix"]) == ("serve_app.app:build_app", "/")


@every_example
def test_args_make_the_topology_that_the_deployments_name(name: str) -> None:
    parsed = config(name)

    assert parsed.topology == EXAMPLES[name][0]
    assert [deployment["name"] for deployment in application(name)["deployments"]] == [
        "Ingress",
        *(stage.capitalize() for stage in parsed.stages),
    ]


@every_example
def test_it_fits_the_machines_that_it_is_for(name: str) -> None:
    for cluster in EXAMPLES[name][1]:
        resolved = resolve(config(name), cluster).config

        assert resolved.topology == EXAMPLES[name][0]
        claimed = sum(stage.gpus_per_replica or 0 for stage in resolved.stages.values())
        assert claimed <= cluster.gpus + 1e-6


@every_example
def test_vllm_knows_the_engine_and_server_arguments(name: str) -> None:
    check_vllm_args(config(name))


def test_two_gpus_keeps_the_references_flags_on_two_cards() -> None:
    stages = resolve(config("examples/two_gpus.yaml"), GPUS[2]).config.stages.values()

    assert [stage.gpus_per_replica for stage in stages] == [0.25, 0.75, 1]
    assert [stage.engine_args["gpu_memory_utilization"] for stage in stages] == [0.01, 0.7, 0.7]


def test_the_picture_is_small() -> None:
    path = ROOT / "examples/shapes.png"

    assert Image.open(path).size == (224, 224)
    assert path.stat().st_size < 4096  # as base64 it still fits a command line
