"""What stages and launch lean on inside vLLM's engine, and names that are looked up no sooner than they are needed."""

import inspect

import pytest

from tests.contracts.looking import fields, find, parameters

IMPORTS = [
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config"),
    ("serve_app/stages/engine.py", "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER"),
    ("serve_app/launch/card_memory.py", "ray._private.thirdparty.pynvml:nvmlDeviceGetMemoryInfo"),
    ("serve_app/stages/fit.py", "vllm.model_executor.model_loader:get_model_cls"),
    ("serve_app/stages/fit.py", "vllm.model_executor.models.interfaces:supports_encoder_cudagraph"),
    ("serve_app/transfer/kv_layout.py", "vllm.distributed.kv_transfer.kv_connector.utils:get_current_attn_backends"),
    ("serve_app/stages/fit.py", "vllm.multimodal.encoder_budget:MultiModalBudget"),
    ("serve_app/stages/fit.py", "vllm.config:VllmConfig.is_mm_encoder_only"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.add_lora"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.remove_lora"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.start_profile"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.dead_error"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.abort"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.async_llm:AsyncLLM.errored"),
    ("serve_app/stages/engine.py", "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async"),
    ("serve_app/stages/engine.py", "vllm.v1.metrics.loggers:StatLoggerBase.record"),
    ("serve_app/stages/tap.py", "vllm.v1.engine:EngineCoreEventType.SCHEDULED"),
    ("serve_app/scaling/policies.py", "ray.serve.config:AutoscalingPolicy.get_policy"),
    ("serve_app/launch/engine_args.py", "vllm.v1.executor.uniproc_executor:UniProcExecutor"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MediaConnector._get_cached_bytes"),
    ("serve_app/ingress/media.py", "vllm.multimodal.media.connector:MediaConnector._put_cached_bytes"),
    ("serve_app/media/items.py", "vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder.get_dummy_text"),
    ("serve_app/media/check.py", "vllm.multimodal.video_decoders.opencv:OpenCVVideoBackendMixin.open_video_capture"),
    (
        "serve_app/transfer/ec_connector.py",
        "vllm.distributed.ec_transfer.ec_connector.metrics:ECConnectorPromMetrics.observe",
    ),
    ("serve_app/launch/placement.py", "ray._private.state:state.get_max_resources_from_cluster_config"),
    ("serve_app/routing/handles.py", "ray.serve._private.common:ReplicaID.to_full_id_str"),
    ("serve_app/routing/handles.py", "ray.serve.handle:DeploymentHandle.broadcast"),
    ("serve_app/routing/handles.py", "ray.serve.handle:DeploymentResponse.cancel"),
]


@pytest.mark.parametrize(("ours", "theirs"), IMPORTS, ids=[theirs for _, theirs in IMPORTS])
def test_name_is_where_we_import_it(ours: str, theirs: str) -> None:
    try:
        find(theirs)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{ours} uses {theirs}: {error}")


def test_client_implements_all_that_vllm_asks_of_an_engine() -> None:
    from vllm.engine.protocol import EngineClient

    from serve_app.ingress.client import EPDClient

    assert not EPDClient.__abstractmethods__, "serve_app/ingress/client.py: new methods of EngineClient"
    for name in EngineClient.__abstractmethods__:
        theirs, ours = getattr(EngineClient, name), getattr(EPDClient, name)
        if not inspect.isfunction(theirs):
            continue
        assert inspect.iscoroutinefunction(theirs) == inspect.iscoroutinefunction(ours), (
            f"serve_app/ingress/client.py: {name} is async in one of EngineClient and EPDClient only"
        )
        taken = parameters(ours)
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            missing = parameters(theirs).keys() - taken.keys()
            assert not missing, f"serve_app/ingress/client.py: {name} does not take {missing}"


def test_engine_can_be_shut_down_and_profiled_as_we_do() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "timeout" in parameters(AsyncLLM.shutdown), "serve_app/stages/engine.py: StageEngine.shutdown"
    profile = parameters(AsyncLLM.start_profile).keys()
    wanted = {"profile_prefix", "delay_iterations", "max_iterations"}
    assert profile >= wanted, "serve_app/ingress/server.py: start_profile"


def test_an_engine_tells_what_it_holds_with_each_step() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from serve_app.stages.engine import KVUse

    assert "stat_loggers" in parameters(AsyncLLM.from_engine_args), "serve_app/stages/engine.py: StageEngine"
    assert "kv_cache_usage" in fields(SchedulerStats), "serve_app/stages/engine.py: KVUse"
    assert parameters(StatLoggerManager.record).keys() - {"self"} <= parameters(KVUse.record).keys(), "KVUse.record"
    assert not KVUse.__abstractmethods__, "serve_app/stages/engine.py: KVUse"
    usage = inspect.getsource(KVCacheManager.usage.fget)
    assert "get_usage" in usage, "serve_app/stages/engine.py holds_blocks: what counts as used"
    waits_for_pull = inspect.getsource(Scheduler.has_finished_requests)
    assert "delayed connector cleanup" in waits_for_pull, (
        "deployments/prefill.py holds: the engine steps while it holds"
    )


def test_only_an_engine_with_a_kv_cache_measures_what_it_may_take() -> None:
    """``card_memory``: an encoder is bounded by nothing of vLLM's, and others by a KV cache of their share."""
    core = inspect.getsource(find("vllm.v1.engine.core:EngineCore._initialize_kv_caches"))
    assert core.index("has_kv_cache") < core.index("determine_available_memory")
    assert find("vllm.config:CacheConfig").gpu_memory_utilization == find("serve_app.stages.fit:WHOLE")
