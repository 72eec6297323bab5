"""Which replicas are forked, and in what environment their server loads vLLM."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import EPDConfig
from serve_app.launch import fork_server
from serve_app.launch.engine_args import replica_env
from serve_app.launch.fork_server import environment, forks
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage

TWO_CORES = Cluster(gpus=0, cpus=2)
CARD = Cluster(gpus=1, cpus=8, gpu_types=("H100",))


def config(args: dict[str, Any], cluster: Cluster = TWO_CORES) -> EPDConfig:
    return resolve(EPDConfig.model_validate(args), cluster).config


@pytest.fixture(autouse=True)
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "built_for_cpu", lambda: True)


def test_all_replicas_of_the_default_config_are_forked_on_the_cpu() -> None:
    assert all(forks(config({}), stage) for stage in (None, *Stage))


def test_nothing_is_forked_where_there_may_be_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(forks(config({}, CARD), stage) for stage in (None, *Stage))
    monkeypatch.setattr(fork_server, "built_for_cpu", lambda: False)
    assert not any(forks(config({}), stage) for stage in (None, *Stage))


@pytest.mark.parametrize(
    "decode",
    [
        {"env": {"OMP_NUM_THREADS": "2"}},
        {"cpus_per_replica": 2},
        {"engine_args": {"enforce_eager": False}},
        {"engine_args": {"tensor_parallel_size": 2}},
        {"engine_args": {"data_parallel_backend": "ray"}},
    ],
    ids=str,
)
def test_stage_that_wants_another_environment_is_not_forked_and_the_others_are(decode: dict[str, Any]) -> None:
    found = config({"decode": decode})
    assert not forks(found, Stage.DECODE)
    assert forks(found, Stage.PREFILL)


def test_server_loads_vllm_in_what_all_that_it_forks_set_alike() -> None:
    found = config({})
    env = environment(found)
    assert env["TORCHDYNAMO_DISABLE"] == "1"
    assert "VLLM_TARGET_DEVICE" not in env, "the ingress alone sets it"
    for stage in (None, *Stage):
        assert env.items() <= replica_env(found, stage).items()


@pytest.mark.parametrize(
    "serve",
    [
        {},
        {"applications": [{"import_path": "other:app"}]},
        {"applications": [{"import_path": fork_server.APP, "args": {"encoder": 3}}]},
        {"applications": [{"import_path": fork_server.APP, "args": {"accelerator": "cuda"}}]},
    ],
    ids=str,
)
def test_no_server_starts_for_what_will_not_be_forked(
    serve: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "ForkServer", lambda env: pytest.fail(f"a server for {env}"))
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(serve))
    assert fork_server.start(path) is None
