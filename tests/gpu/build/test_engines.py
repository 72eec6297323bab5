"""What vLLM's GPU build makes of our engine arguments, on cards that it is told of."""

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.usage.usage_lib import UsageContext

from serve_app.stage import Stage
from serve_app.handoff.errors import CannotStart
from serve_app.transfer.kv_layout import KVLayout, check_layouts, layout_of
from serve_app.launch.engine_args import engine_args
from serve_app.stages.engine import engine_config
from tests.gpu.build.engines import plan, resolved, serve_args
from tests.gpu.build.platform import A100_40, B200, H100, L4, T4, Card, card

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"

INGRESS = """
import os, sys
from serve_app.config import EPDConfig
from serve_app.launch.placement import Cluster, resolve
from serve_app.launch.engine_args import ingress_args, replica_env
import deployments.ingress, serve_app.app

config = resolve(EPDConfig(accelerator="cuda", model=sys.argv[1]), Cluster(0, 8, elastic=True)).config
assert "vllm" not in sys.modules, "vLLM reads its environment when it is imported"
if sys.argv[2] == "as a replica":
    os.environ.update(replica_env(config, None))
from serve_app.ingress.server import ingress_vllm_config
made = ingress_vllm_config(ingress_args(config, sys.argv[1]))
print(made.device_config.device_type)
"""


def start_ingress(model: str, how: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_TARGET_DEVICE"}
    command = [sys.executable, "-c", INGRESS, model, how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_ingress_starts_on_a_node_without_a_card(models: dict[str, str]) -> None:
    done = start_ingress(models[QWEN], "as a replica")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "cpu"


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a card here")
def test_ingress_would_not_without_its_environment(models: dict[str, str]) -> None:
    """The variable is there for a reason: without it this build of vLLM has no device here."""
    done = start_ingress(models[QWEN], "bare")
    assert done.returncode != 0 and "Failed to infer device type" in done.stderr


@pytest.mark.parametrize("of", [L4, A100_40, H100, B200], ids=lambda of: of.name)
@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.DECODE])
def test_engines_have_the_batch_sizes_of_vllm_serve(of: Card, stage: Stage, models: dict[str, str]) -> None:
    config = resolved({"accelerator": "cuda"}, 3, of)
    args = engine_args(config, stage, models[QWEN], of.gib)
    with card(of):
        ours = engine_config(AsyncEngineArgs(**args)).scheduler_config
        served = AsyncEngineArgs(**args).create_engine_config(UsageContext.OPENAI_API_SERVER).scheduler_config
        plain = AsyncEngineArgs(**args).create_engine_config(UsageContext.ENGINE_CONTEXT).scheduler_config
    assert (ours.max_num_batched_tokens, ours.max_num_seqs) == (served.max_num_batched_tokens, served.max_num_seqs)
    assert ours.max_num_seqs > plain.max_num_seqs


def test_encoder_takes_items_that_are_longer_than_its_budget(models: dict[str, str]) -> None:
    """vLLM raises the size of a vision batch and of the encoder cache to the largest item by itself."""
    (encoder, *_) = plan(resolved({"accelerator": "cuda"}, 3, H100), H100, models)
    with card(H100):
        budget = MultiModalBudget(encoder.vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    assert encoder.vllm_config.scheduler_config.max_num_batched_tokens == 16384
    assert budget.mm_max_toks_per_item["video"] == 32768
    assert (budget.encoder_compute_budget, budget.encoder_cache_size) == (32768, 32768)


@pytest.mark.parametrize("changed", [{}, {"encoder": {"gpus_per_replica": 0.2}}], ids=["a card", "a share"])
def test_cap_is_one_that_this_pytorch_takes(changed: dict[str, Any], models: dict[str, str]) -> None:
    import torch

    (encoder, *_) = plan(resolved({"accelerator": "cuda", **changed}, 3, H100), H100, models)
    assert ("PYTORCH_ALLOC_CONF" in encoder.env) == bool(changed)
    if changed:
        torch._C._accelerator_setAllocatorSettings(encoder.env["PYTORCH_ALLOC_CONF"])
        torch._C._accelerator_setAllocatorSettings("")
    with pytest.raises(ValueError, match="Unrecognized key"):
        torch._C._accelerator_setAllocatorSettings("per_process_memory_share:0.5")


def test_a_card_without_bfloat16_is_refused_unless_all_stages_do_without(models: dict[str, str]) -> None:
    for args, refused in (({}, True), ({"dtype": "float16"}, False)):
        config = resolved({"accelerator": "cuda", "engine_args": args | {"max_model_len": 4096}}, 3, T4)
        (encoder, *_) = plan(config, T4, models)
        assert bool(encoder.refusal) == refused, encoder.refusal
        assert not refused or "Tesla T4 has no bfloat16" in (encoder.refusal or "")


def test_encoders_graphs_and_items_over_cards_reach_vllm(models: dict[str, str]) -> None:
    (encoder, prefill, _) = plan(resolved(serve_args("examples/large_encoder.yaml"), 8, H100), H100, models)
    assert (encoder.refusal, prefill.refusal) == (None, None)
    config = encoder.vllm_config
    assert config.compilation_config.cudagraph_mm_encoder and not config.model_config.enforce_eager
    assert config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
    assert config.parallel_config.tensor_parallel_size == 2
    assert not prefill.vllm_config.compilation_config.cudagraph_mm_encoder


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"mm_encoder_tp_mode": "data", "tensor_parallel_size": 2}, "mm_encoder_tp_mode"),
    ],
)
def test_what_the_model_does_not_bring_is_refused_before_it_loads(
    option: dict[str, Any], name: str, models: dict[str, str]
) -> None:
    args = copy.deepcopy(serve_args("examples/audio.yaml")) | {"encoder": {"engine_args": option}}
    (encoder, *_) = plan(resolved(args, 8, H100), H100, models)
    assert encoder.refusal is not None and f"`{name}" in encoder.refusal


def test_cards_of_two_generations_exchange_no_kv_blocks_until_they_are_told_how(models: dict[str, str]) -> None:
    def layout(of: Card, **args: Any) -> KVLayout:
        config = resolved({"accelerator": "cuda", "engine_args": args}, 3, of)
        decode = plan(config, of, models)[-1]
        with card(of):
            return layout_of(decode.vllm_config)

    hopper, blackwell = layout(H100), layout(B200)
    assert hopper.digest == layout(A100_40).digest
    assert (hopper.backend, blackwell.backend) == ("FLASH_ATTN", "FLASHINFER")
    with pytest.raises(CannotStart, match="NVIDIA B200, FLASHINFER"):
        check_layouts([blackwell], [hopper])
    check_layouts([layout(B200, attention_backend="FLASH_ATTN")], [hopper])
