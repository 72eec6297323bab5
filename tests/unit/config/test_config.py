"""Every mistake is refused when the config is read, with a message that names the key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import (
    DEMO_MODEL,
    OWN_KEYS,
    PARALLEL_SIZES,
    ROLE_ARGS,
    SHARED_ARGS,
    SIDE_CHANNEL_ENV,
    Accelerator,
    AdvancedConfig,
    ECConfig,
    EncodeConfig,
    EPDConfig,
    KVConfig,
    MediaConfig,
    StageConfig,
    Timeouts,
)
from serve_app.stage import Stage

NIXL = {"connector": "ECCPUConnector"}


def more(**keys: Any) -> dict[str, Any]:
    """Keys under ``advanced.ec:``."""
    return {"advanced": {"ec": keys}}


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        EPDConfig.model_validate(args)
    (mistake,) = caught.value.errors()
    return ".".join(map(str, mistake["loc"])) + ": " + mistake["msg"]


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({"modle": "x"}, "modle"),
        ({"encoder": {"gpu": 1}}, "encoder.gpu"),
        ({"prefill": {"replicas": 2}}, "prefill.replicas"),
        ({"decode": {"num_gpus": 1}}, "decode.num_gpus"),
        ({"ec": {"path": "/x"}}, "ec.path"),
        ({"kv": {"lease": 3}}, "kv.lease"),
        ({"timeouts": {"request": 3}}, "timeouts.request"),
        ({"advanced": {"speed": {}}}, "advanced.speed"),
        ({"advanced": {"encode": {"timeout": 3}}}, "advanced.encode.timeout"),
        ({"advanced": {"retry": {"budget": 3}}}, "advanced.retry.budget"),
        ({"metrics": {"ray": True}}, "metrics.ray"),
        ({"tracing": {"sampler": "x"}}, "tracing.sampler"),
        ({"media": {"domains": []}}, "media.domains"),
    ],
)
def test_unknown_key_is_refused_at_every_level(args: dict[str, Any], where: str) -> None:
    assert refusal(args).startswith(f"{where}: Extra inputs")


@pytest.mark.parametrize("key", sorted(OWN_KEYS))
@pytest.mark.parametrize("place", ["shared", "stage"])
def test_engine_arg_with_a_key_of_its_own_is_refused_naming_that_key(key: str, place: str) -> None:
    engine_args = {"engine_args": {key: 1}}
    message = refusal(engine_args if place == "shared" else {"decode": engine_args})
    assert f"`{key}` is set by {OWN_KEYS[key]}" in message


@pytest.mark.parametrize("key", sorted(SHARED_ARGS - OWN_KEYS.keys()))
@pytest.mark.parametrize("stage", list(Stage))
def test_argument_that_must_be_equal_everywhere_is_refused_under_one_stage(key: str, stage: Stage) -> None:
    message = refusal({stage.value: {"engine_args": {key: 1}}})
    assert f"`{key}` must be equal on all stages" in message
    assert "top-level `engine_args:`" in message
    assert EPDConfig(engine_args={key: 1}).engine_args == {key: 1}


def test_every_argument_that_makes_a_role_is_refused_as_an_engine_argument() -> None:
    assert OWN_KEYS.keys() >= ROLE_ARGS


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"decode": None}, ["every topology has a decode stage", "`prefill:`"]),
        ({"encoder": None, "ec": {}}, ["`ec` has no effect", "`encoder: null`"]),
        (
            {"ec": {"connector": "ECExampleConnector", "max_bytes": 1 << 30}},
            ["`ec.max_bytes` has no effect with `ec.connector: ECExampleConnector`"],
        ),
        (
            {"ec": NIXL, **more(lease_s=1)},
            ["`advanced.ec.lease_s` has no effect with `ec.connector: ECCPUConnector`"],
        ),
        ({"ec": NIXL, **more(module_path="mine")}, ["`advanced.ec.module_path` has no effect", "ECCPUConnector"]),
        (
            {"ec": NIXL, **more(extra_config={"ec_cpu_bytes": 1 << 30})},
            ["`advanced.ec.extra_config.ec_cpu_bytes` is set by `ec.max_bytes`"],
        ),
        ({"ec": NIXL, **more(extra_config={"ec_enable_nixl": False})}, ["ec_enable_nixl` is always on"]),
        (
            {"ec": NIXL, **more(extra_config={"consumer_ack_timeout": 5})},
            ["`advanced.ec.extra_config.consumer_ack_timeout` is not known", "knows consumer_ack_timeout_s"],
        ),
        (more(extra_config={"max_byte": 1}), ["`advanced.ec.extra_config.max_byte` is not known", "max_bytes"]),
        (
            {"encoder": {"engine_args": {"data_parallel_size": 2}}},
            ["`data_parallel_size` of the encoder", "`num_replicas`"],
        ),
        (
            {"ec": NIXL, "decode": {"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}},
            ["`decode.env.VLLM_USE_V2_MODEL_RUNNER`", "second model runner"],
        ),
        (
            {"ec": {"connector": "ECMooncakeConnector"}},
            ["`ec.connector: ECMooncakeConnector` cannot be used", "before a prefill replica is chosen"],
        ),
        *(({"prefill": {"env": {key: "1"}}}, [f"`{key}` is set by each replica"]) for key in sorted(SIDE_CHANNEL_ENV)),
        (
            more(lease_s=60, max_age_s=30),
            ["`advanced.ec.lease_s: 60` is longer than `advanced.ec.max_age_s: 30`"],
        ),
        (
            {"tracing": {"endpoint": "http://a"}, "decode": {"engine_args": {"disable_log_stats": True}}},
            ["`disable_log_stats` in the engine arguments of decode", "`tracing.endpoint`"],
        ),
        ({"encoder": None, **more(lease_s=9)}, ["`advanced.ec` has no effect", "without the stage `encoder`"]),
        ({"encoder": None, "advanced": {"encode": {}}}, ["`advanced.encode` has no effect"]),
        ({"encoder": None, "advanced": {"encoder": {}}}, ["`advanced.encoder` has no effect"]),
        ({"encoder": None, "timeouts": {"encode_s": 9}}, ["`timeouts.encode_s` has no effect"]),
        ({"prefill": None, "kv": {}}, ["`kv` has no effect", "`prefill: null`"]),
        ({"prefill": None, "advanced": {"kv": {}}}, ["`advanced.kv` has no effect"]),
        ({"prefill": None, "advanced": {"prefill": {}}}, ["`advanced.prefill` has no effect"]),
        ({"accelerator": "cpu", "ec": {"connector": "ECCPUConnector"}}, ["ECCPUConnector` needs a GPU"]),
        (
            {"decode": {"gpus_per_replica": 0.5, "engine_args": {"gpu_memory_utilization": 0.6}}},
            ["`decode.engine_args.gpu_memory_utilization: 0.6`", "`decode.gpus_per_replica: 0.5`"],
        ),
        ({"decode": {"gpus_per_replica": 1.5}}, ["`gpus_per_replica: 1.5`", "whole cards"]),
        (
            {"decode": {"gpus_per_replica": 1, "engine_args": {"tensor_parallel_size": 2}}},
            ["`gpus_per_replica: 1.0`", "= 2"],
        ),
        ({"decode": {"gpus_per_replica": 2, "devices": "0"}}, ["`devices: '0'` names fewer cards"]),
        ({"ec": {"connector": "Mine"}}, ["`ec.connector: Mine`", "`advanced.ec.module_path`"]),
        (
            {"ec": {"connector": "ECCPUConnector", "storage_path": "/x"}},
            ["`ec.storage_path` has no effect", "ECCPUConnector"],
        ),
        ({"advanced": {"kv": {"lease_s": 5}}}, ["advanced.kv.lease_s", "greater than or equal to 6"]),
        ({"advanced": {"kv": {"buffer_device": "tpu"}}}, ["advanced.kv.buffer_device", "'cuda', 'cpu' or 'xpu'"]),
        ({"accelerator": "rocm"}, ["accelerator", "'cuda'"]),
        ({"timeouts": {"request_s": 0}}, ["timeouts.request_s"]),
        ({"media": {"max_body_bytes": 1}}, ["media.max_body_bytes"]),
        ({"encoder": {"engine_args": {"mm_tensor_ipc": "torch_shm"}}}, ["`mm_tensor_ipc: torch_shm`", "leave it out"]),
        ({"media": {"limits": {"video": {"frames": 1}}}}, ["media.limits.video", "frames"]),
        (
            {"engine_args": {"enforce_eager": True, "compilation_config": {"cudagraph_mm_encoder": True}}},
            ["`cudagraph_mm_encoder` has no effect", "`enforce_eager: true`"],
        ),
        ({"advanced": {"encode": {"attempts": 0}}}, ["advanced.encode.attempts", "greater than or equal to 1"]),
        ({"timeouts": {"encode_s": 0}}, ["timeouts.encode_s", "greater than 0"]),
        (
            {"advanced": {"encode": {"affinity_headroom": 0.9}}},
            ["advanced.encode.affinity_headroom", "greater than or equal to 1"],
        ),
        ({"advanced": {"retry": {"attempts": 0}}}, ["advanced.retry.attempts", "greater than or equal to 1"]),
        ({"advanced": {"retry": {"ratio": -0.1}}}, ["advanced.retry.ratio", "greater than or equal to 0"]),
        ({"advanced": {"decode": {"max_ongoing_requests": 0}}}, ["advanced.decode.max_ongoing_requests"]),
        ({"advanced": {"media": {"max_bytes": 1}}}, ["advanced.media.max_bytes"]),
        ({"decode": {"gpus_per_replica": -1}}, ["decode.gpus_per_replica"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_mistake_is_refused_in_words_that_name_it(args: dict[str, Any], words: list[str]) -> None:
    message = refusal(args)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "args",
    [
        {"decode": {"gpus_per_replica": 0.5, "engine_args": {"gpu_memory_utilization": 0.5}}},
        {"decode": {"gpus_per_replica": 1, "engine_args": {"gpu_memory_utilization": 0.95}}},
        {"decode": {"gpus_per_replica": 4, "engine_args": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}},
        {"decode": {"gpus_per_replica": 0, "engine_args": {"tensor_parallel_size": 2}}},
        {"decode": {"gpus_per_replica": 2, "devices": "0,1"}},
        {"decode": {"gpus_per_replica": 0.5, "devices": "1"}},
        {"encoder": {"engine_args": {"mm_tensor_ipc": "torch_shm", "mm_processor_device": "cpu"}}},
        {"accelerator": "cuda", "ec": NIXL},
        {"ec": {**NIXL, "max_bytes": 4 << 30}, **more(extra_config={"consumer_ack_timeout_s": 5})},
        {"ec": NIXL, "decode": {"engine_args": {"data_parallel_size": 2}}},
        {"ec": NIXL, "encoder": {"env": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}},
        {"accelerator": "cpu", "ec": {"connector": "ECExampleConnector", "storage_path": "/x"}},
        {"ec": {"connector": "Mine", "storage_path": "/x"}, **more(module_path="mine")},
        {"encoder": None, "prefill": None},
        {"encoder": None, "advanced": {"retry": {"attempts": 1}}},
        {
            "advanced": {
                "encode": {"min_embeds": 0, "max_outstanding_embeds": 0, "remember_s": 0, "retry_encoders_after_s": 0},
                "retry": {"attempts": 1, "ratio": 0, "floor_per_s": 0, "backoff_s": 0},
                "kv": {"lease_s": 6},
            }
        },
    ],
    ids=str,
)
def test_what_fits_is_taken(args: dict[str, Any]) -> None:
    EPDConfig.model_validate(args)


def test_what_pools_takes_no_blocks_and_no_embeddings_by_nixl() -> None:
    pools = {"engine_args": {"runner": "pooling"}}
    assert "set `prefill: null`" in refusal(pools)
    assert "use SharedFolderECConnector" in refusal(pools | {"prefill": None, "ec": NIXL})
    assert "must be equal on all stages" in refusal({"decode": pools})
    adapters = {"prefill": None, "engine_args": pools["engine_args"] | {"enable_lora": True}}
    assert "pools wrongly where requests of several adapters share a batch" in refusal(adapters)


@pytest.mark.parametrize(
    ("args", "name", "stages"),
    [
        ({}, "E+P+D", ["encoder", "prefill", "decode"]),
        ({"prefill": None}, "E+PD", ["encoder", "decode"]),
        ({"encoder": None}, "P+D", ["prefill", "decode"]),
        ({"encoder": None, "prefill": None}, "PD", ["decode"]),
        ({"prefill": None, "engine_args": {"runner": "pooling"}}, "E+pool", ["encoder", "decode"]),
    ],
)
def test_topology_is_named_after_its_stages_in_the_order_of_the_data(
    args: dict[str, Any], name: str, stages: list[str]
) -> None:
    config = EPDConfig(**args)
    assert config.topology == name
    assert [stage.value for stage in config.stages] == stages


def test_nothing_configured_is_a_whole_pipeline_with_the_devices_left_open() -> None:
    config = EPDConfig()
    assert config.accelerator is Accelerator.AUTO
    assert config.model is None
    assert (config.ec.connector, config.ec.storage_path) == ("SharedFolderECConnector", None)
    assert (config.kv.connector, config.advanced.kv.lease_s, config.advanced.kv.buffer_device) == (
        "NixlConnector",
        30,
        None,
    )
    assert config.decode.gpus_per_replica is None
    assert config.media.max_body_bytes == 64 * 2**20
    assert config.media.allowed_local_path is None


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({}, DEMO_MODEL),
        ({"model": "a/b"}, "a/b"),
        ({"model": "a/b", "served_model_name": "c"}, "c"),
        ({"model": "a/b", "served_model_name": ["c", "d"]}, "c"),
    ],
)
def test_name_in_the_api_is_the_served_one_before_the_models(args: dict[str, Any], name: str) -> None:
    assert EPDConfig(**args).model_name == name


def test_list_of_no_names_is_refused() -> None:
    with pytest.raises(ValidationError, match="served_model_name"):
        EPDConfig(served_model_name=[])


@pytest.mark.parametrize(("gpus", "share"), [(None, None), (0, None), (0.25, 0.25), (1, None), (2, None)])
def test_share_of_a_card_is_what_is_less_than_one(gpus: float | None, share: float | None) -> None:
    assert StageConfig(gpus_per_replica=gpus).card_share == share


@pytest.mark.parametrize(
    ("connector", "module", "leases"),
    [
        ("NixlConnector", None, True),
        ("NixlPushConnector", None, True),
        ("NixlConnector", "mine", False),
        ("Other", None, False),
    ],
)
def test_kv_blocks_have_leases_with_connectors_of_ours(connector: str, module: str | None, leases: bool) -> None:
    config = EPDConfig(kv={"connector": connector}, advanced={"kv": {"module_path": module}})
    assert config.kv_has_leases is leases


def test_configuration_does_not_import_ray_or_vllm() -> None:
    code = "import sys, serve_app.config; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pydantic" in loaded and not {"ray", "vllm", "torch"} & set(loaded)


def test_world_size_is_all_ranks_of_an_engine() -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 2}
    assert StageConfig(engine_args=sizes, gpus_per_replica=12).world_size == 12
    assert StageConfig().world_size == 1


@pytest.mark.parametrize("size", PARALLEL_SIZES)
def test_cards_of_an_engine_are_its_stages_own(size: str) -> None:
    """Claims are per stage; an engine with more ranks than its replica has cards does not start."""
    with pytest.raises(ValidationError, match=f"`{size}` is each stage's own"):
        EPDConfig(engine_args={size: 2})


@pytest.mark.parametrize(
    "part",
    [EPDConfig(), StageConfig(), ECConfig(), KVConfig(), MediaConfig(), Timeouts(), AdvancedConfig(), EncodeConfig()],
    ids=lambda part: type(part).__name__,
)
def test_a_config_cannot_be_changed(part: Any) -> None:
    field = next(iter(type(part).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, field, None)


def test_relative_folders_become_absolute_where_the_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas have working directories of their own."""
    monkeypatch.chdir(tmp_path)
    config = EPDConfig(ec={"storage_path": "cache"}, media={"allowed_local_path": "media"})
    assert config.ec.storage_path == tmp_path / "cache"
    assert config.media.allowed_local_path == tmp_path / "media"
    assert EPDConfig(ec={"storage_path": "~/cache"}).ec.storage_path == Path.home() / "cache"
