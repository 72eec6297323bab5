"""The engine arguments and the environment that make each stage."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EPDConfig
from serve_app.hooks.vllm_plugin import STILL_NIXL_ENV
from serve_app.launch.engine_args import CPU_ENV, engine_args, ingress_args, model_path, replica_env
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage


def on_cpu(**args: Any) -> EPDConfig:
    return resolve(EPDConfig(**args), Cluster(0, 2)).config


def on_gpus(**args: Any) -> EPDConfig:
    return resolve(EPDConfig(**args), Cluster(8, 64)).config


@pytest.mark.parametrize("stage", list(Stage))
def test_stage_beats_shared_beats_role_beats_device(stage: Stage) -> None:
    key = "max_num_batched_tokens"
    default = 16384 if stage is Stage.ENCODER else None
    assert engine_args(on_cpu(), stage, "m").get(key) == default
    assert engine_args(on_cpu(engine_args={key: 1}), stage, "m")[key] == 1
    both = on_cpu(engine_args={key: 1}, **{stage.value: {"engine_args": {key: 2}}})
    assert engine_args(both, stage, "m")[key] == 2
    others = [engine_args(both, other, "m")[key] for other in Stage if other is not stage]
    assert others == [1, 1]


def test_demo_defaults_yield_to_the_users_and_are_only_the_demos() -> None:
    assert engine_args(on_cpu(), Stage.DECODE, "m")["max_model_len"] == 4096
    assert engine_args(on_cpu(engine_args={"max_model_len": 99}), Stage.DECODE, "m")["max_model_len"] == 99
    other = engine_args(on_cpu(model="a/b"), Stage.DECODE, "m")
    assert "max_model_len" not in other and "dtype" not in other


def test_encoder_runs_eager_without_prefix_cache() -> None:
    args = engine_args(on_gpus(), Stage.ENCODER, "m")
    assert (args["enforce_eager"], args["enable_prefix_caching"]) == (True, False)
    assert args["ec_transfer_config"]["ec_role"] == "ec_producer"
    assert "kv_transfer_config" not in args


def test_encoder_in_front_of_an_engine_that_pools_is_the_one_it_always_is() -> None:
    scores = {"architectures": ["ForScores"], "num_labels": 1}
    pools = {"runner": "pooling", "convert": "classify", "pooler_config": {"use_activation": False}}
    config = on_cpu(prefill=None, engine_args=pools | {"hf_overrides": scores})
    encoder, pooling = (engine_args(config, stage, "m") for stage in (Stage.ENCODER, Stage.DECODE))
    assert encoder["hf_overrides"] == {"num_labels": 1} and not pools.keys() & encoder.keys()
    assert pooling["hf_overrides"] == scores and {key: pooling[key] for key in pools} == pools


def test_decode_on_gpus_is_left_to_vllms_defaults() -> None:
    args = engine_args(on_gpus(model="a/b"), Stage.DECODE, "m")
    assert args.keys() == {
        "model",
        "served_model_name",
        "mm_processor_cache_gb",
        "ec_transfer_config",
        "kv_transfer_config",
    }


def test_engines_on_the_cpu_do_not_compile() -> None:
    assert engine_args(on_cpu(model="a/b"), Stage.DECODE, "m")["enforce_eager"] is True
    compiled = on_cpu(model="a/b", engine_args={"enforce_eager": False})
    assert engine_args(compiled, Stage.DECODE, "m")["enforce_eager"] is False


def test_worker_is_in_the_engines_own_process_only_alone_on_the_cpu() -> None:
    key = "distributed_executor_backend"
    config = on_cpu(decode={"engine_args": {"tensor_parallel_size": 2}})
    assert engine_args(config, Stage.PREFILL, "m")[key].endswith(".UniProcExecutor")
    assert engine_args(config, Stage.DECODE, "m")[key] == "mp"
    assert key not in engine_args(on_gpus(decode={"engine_args": {"tensor_parallel_size": 2}}), Stage.DECODE, "m")


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("config", [on_cpu(), on_gpus()], ids=["cpu", "gpus"])
def test_no_engine_has_a_processor_cache(config: EPDConfig, stage: Stage) -> None:
    assert engine_args(config, stage, "m")["mm_processor_cache_gb"] == 0
    assert ingress_args(config, "m")["mm_processor_cache_gb"] == 0


@pytest.mark.parametrize("stage", list(Stage))
def test_topology_decides_the_transfer_configs_of_a_stage(stage: Stage) -> None:
    args = engine_args(on_cpu(), stage, "m")
    assert args["ec_transfer_config"]["ec_role"] == ("ec_producer" if stage is Stage.ENCODER else "ec_consumer")
    assert ("kv_transfer_config" in args) == (stage is not Stage.ENCODER)


def test_one_engine_alone_has_no_transfer_configs() -> None:
    args = engine_args(on_cpu(encoder=None, prefill=None), Stage.DECODE, "m")
    assert not {"ec_transfer_config", "kv_transfer_config"} & args.keys()


def test_all_stages_agree_on_what_makes_tokens_and_hashes() -> None:
    config = on_gpus(
        model="a/b",
        served_model_name=["c", "d"],
        engine_args={"dtype": "bfloat16"},
        media={
            "limits": {"image": 3},
            "processor_kwargs": {"min_pixels": 4},
            "io_kwargs": {"video": {"num_frames": 5}},
            "allowed_local_path": "/media",
            "allowed_domains": ["example.org"],
        },
    )
    shared = {
        "model": "folder",
        "served_model_name": ["c", "d"],
        "dtype": "bfloat16",
        "limit_mm_per_prompt": {"image": 3},
        "mm_processor_kwargs": {"min_pixels": 4},
        "media_io_kwargs": {"video": {"num_frames": 5}},
        "allowed_local_media_path": "/media",
        "allowed_media_domains": ["example.org"],
    }
    for args in [*(engine_args(config, stage, "folder") for stage in Stage), ingress_args(config, "folder")]:
        assert {key: args[key] for key in shared} == shared


def test_ingress_renders_as_decode_does_and_connects_to_nothing() -> None:
    config = on_cpu(decode={"engine_args": {"max_num_seqs": 7, "profiler_config": {"profiler": "torch"}}})
    args = ingress_args(config, "m")
    decode = engine_args(config, Stage.DECODE, "m")
    assert decode.keys() - args.keys() == {"ec_transfer_config", "kv_transfer_config", "profiler_config"}
    assert args == {key: decode[key] for key in args}
    assert args["max_num_seqs"] == 7


@pytest.mark.parametrize("stage", [*Stage, None])
def test_replicas_spawn_their_engines(stage: Stage | None) -> None:
    """The replica has threads: a forked engine could inherit a held lock."""
    for config in (on_cpu(), on_gpus()):
        env = replica_env(config, stage)
        assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert env["UCX_RCACHE_MAX_UNRELEASED"] == "1024"


def test_cpu_environment_is_only_for_the_cpu() -> None:
    assert replica_env(on_cpu(), Stage.DECODE).items() >= CPU_ENV.items()
    assert not replica_env(on_gpus(), Stage.DECODE).keys() & CPU_ENV.keys()


@pytest.mark.parametrize(
    ("args", "still"),
    [
        ({}, {Stage.PREFILL, Stage.DECODE}),
        ({"encoder": None}, {Stage.PREFILL, Stage.DECODE}),
        ({"prefill": None}, set()),
    ],
)
def test_nixls_thread_is_stilled_where_kv_moves_on_the_cpu(args: dict[str, Any], still: set[Stage]) -> None:
    config = on_cpu(**args)
    assert {stage for stage in [*config.stages, None] if STILL_NIXL_ENV in replica_env(config, stage)} == still
    assert not any(STILL_NIXL_ENV in replica_env(on_gpus(**args), stage) for stage in config.stages)


def test_dynamo_is_off_where_the_engine_is_eager() -> None:
    config = on_cpu(decode={"engine_args": {"enforce_eager": False}})
    assert replica_env(config, Stage.PREFILL)["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in replica_env(config, Stage.DECODE)


def test_encoder_whose_cuda_graphs_are_asked_for_is_not_eager() -> None:
    asked = {"compilation_config": {"cudagraph_mm_encoder": True}}
    assert engine_args(on_gpus(encoder={"engine_args": asked}), Stage.ENCODER, "m")["enforce_eager"] is False
    assert engine_args(on_gpus(engine_args=asked), Stage.ENCODER, "m")["enforce_eager"] is False


def on_one_card(**args: Any) -> EPDConfig:
    return resolve(EPDConfig(**args), Cluster(1, 64)).config


def test_engines_on_one_card_get_shares_of_its_memory_and_a_cap() -> None:
    config = on_one_card()
    shares = [engine_args(config, stage, "m", 80.0)["gpu_memory_utilization"] for stage in Stage]
    caps = [replica_env(config, stage, 80.0)["PYTORCH_ALLOC_CONF"] for stage in Stage]
    assert shares == [0.143, 0.397, 0.397]  # claims of 0.15 and 0.425, less 0.5 GiB of context, less 5 % of the latter
    assert caps == [f"per_process_memory_fraction:{cap}" for cap in (0.143, 0.418, 0.418)]
    assert not any("gpu_memory_utilization" in engine_args(on_gpus(), stage, "m", 80.0) for stage in Stage)
    assert not any("PYTORCH_ALLOC_CONF" in replica_env(on_gpus(), stage, 80.0) for stage in (*Stage, None))


def test_own_share_of_the_memory_wins_and_is_never_above_the_cap() -> None:
    own = {"engine_args": {"gpu_memory_utilization": 0.3}}
    decode = own | {"gpus_per_replica": 0.6}
    config = on_one_card(prefill=own | {"gpus_per_replica": 0.3}, decode=decode, encoder={"gpus_per_replica": 0.1})
    assert engine_args(config, Stage.PREFILL, "m", 24.0)["gpu_memory_utilization"] == 0.3
    assert replica_env(config, Stage.PREFILL, 24.0)["PYTORCH_ALLOC_CONF"] == "per_process_memory_fraction:0.3"


def test_kv_blocks_are_read_from_other_cards_without_nvlink() -> None:
    key = "UCX_CUDA_IPC_ENABLE_GET_ZCOPY"
    assert [replica_env(on_gpus(), stage).get(key) for stage in (*Stage, None)] == ["on", "on", "on", None]
    assert not any(key in replica_env(on_cpu(), stage) for stage in Stage)


def test_ingress_needs_no_card() -> None:
    assert replica_env(on_gpus(), None)["VLLM_TARGET_DEVICE"] == "cpu"
    assert not any("VLLM_TARGET_DEVICE" in replica_env(on_gpus(), stage) for stage in Stage)


def test_limits_of_media_reach_vllm_as_they_are() -> None:
    limits = {"image": 3, "video": {"count": 1, "num_frames": 16}}
    args = engine_args(on_gpus(media={"limits": limits}), Stage.DECODE, "m")
    assert args["limit_mm_per_prompt"] == limits


def test_only_the_demo_model_is_kept_off_the_network() -> None:
    assert replica_env(on_cpu(), None)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in replica_env(on_cpu(model="a/b"), None)


def test_demo_model_is_made_and_any_other_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(model_path(on_cpu()))
    assert folder.is_relative_to(tmp_path) and (folder / "config.json").is_file()
    assert model_path(on_cpu(model="a/b")) == "a/b"


def test_engines_that_move_embeddings_with_nixl_run_vllms_second_model_runner() -> None:
    nixl = on_gpus(ec={"connector": "ECCPUConnector"})
    key = "VLLM_USE_V2_MODEL_RUNNER"
    assert [replica_env(nixl, stage).get(key) for stage in nixl.stages] == ["1", "1", "1"]
    assert key not in replica_env(nixl, None)  # the ingress may have no Triton, which that needs
    assert not any(key in replica_env(on_gpus(), stage) for stage in nixl.stages)


def test_tracing_reaches_every_engine_under_the_name_of_its_stage() -> None:
    endpoint = "http://127.0.0.1:4317"
    traced = on_cpu(tracing={"endpoint": endpoint})
    assert {engine_args(traced, stage, "m")["otlp_traces_endpoint"] for stage in Stage} == {endpoint}
    assert "otlp_traces_endpoint" not in ingress_args(traced, "m")
    names = [replica_env(traced, stage)["OTEL_SERVICE_NAME"] for stage in (*Stage, None)]
    assert names == ["epd-encoder", "epd-prefill", "epd-decode", "epd-ingress"]
    assert "otlp_traces_endpoint" not in engine_args(on_cpu(), Stage.DECODE, "m")
    assert "OTEL_SERVICE_NAME" not in replica_env(on_cpu(), None)
