"""Every config of this repository on the cards that people have: vLLM takes it, and it fits or is refused in a sentence."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode

from serve_app.launch.card_memory import CONTEXT_GIB
from serve_app.stage import Stage
from serve_app.handoff.errors import ConfigError
from tests.gpu.build.engines import ROOT, demand_gib, plan, resolved, room_gib, serve_args
from tests.gpu.build.platform import A100_40, H100, L4, Card

CARDS = {24: L4, 40: A100_40, 80: H100}
COUNTS = (1, 2, 3, 8)
SERVE_CONFIGS = ["serve_config.yaml", *sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.yaml"))]
GPU_MANIFESTS = sorted(
    f"k8s/{path.name}" for path in (ROOT / "k8s").glob("*.yaml") if "accelerator: cuda" in path.read_text()
)


def named_cards(name: str) -> dict[int, int]:
    """What a config says of the cards that it fits: GB of each, by the number of cards from which that holds."""
    (line,) = re.findall(r"^# Cards: (.*)\.$", (ROOT / name).read_text(), re.MULTILINE)
    return {int(count): int(size) for count, size in re.findall(r"(\d+) of (\d+) GB", line)}


@pytest.mark.parametrize("size", CARDS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_config_fits_the_cards_that_it_names_and_is_refused_before_it_loads_on_smaller_ones(
    name: str, count: int, size: int, models: dict[str, str]
) -> None:
    of, named = CARDS[size], named_cards(name)
    smallest = named[max(from_count)] if (from_count := [each for each in named if each <= count]) else None
    try:
        config = resolved(serve_args(name) | {"accelerator": "cuda"}, count, of)
    except ConfigError as error:
        assert smallest is None and re.search("needs .* GPUs", str(error))
        return
    engines = plan(config, of, models)
    refusals = [engine.refusal for engine in engines if engine.refusal]
    for refusal in refusals:
        assert "What would fit: " in refusal and "\n" not in refusal
    if smallest is not None:
        assert bool(refusals) == (size < smallest), refusals
    for engine in engines if not refusals else ():
        assert demand_gib(engine, of) <= room_gib(engine, of)
        pools = engine.vllm_config.model_config.runner_type == "pooling"  # which vLLM schedules synchronously
        assert engine.vllm_config.scheduler_config.async_scheduling != pools
        assert engine.vllm_config.use_v2_model_runner
        graphs = engine.vllm_config.compilation_config.cudagraph_mode is not CUDAGraphMode.NONE
        assert graphs or engine.stage is Stage.ENCODER or "two_gpus" in name


@pytest.mark.parametrize("of", CARDS.values(), ids=lambda of: of.name)
@pytest.mark.parametrize("topology", [{}, {"prefill": None}, {"encoder": None}], ids=["E+P+D", "E+PD", "P+D"])
def test_caps_and_contexts_of_the_engines_on_one_card_are_no_more_than_the_card(
    of: Card, topology: dict[str, Any], models: dict[str, str]
) -> None:
    engines = plan(resolved({"accelerator": "cuda", **topology}, 1, of), of, models)
    caps = [engine.cap for engine in engines if engine.cap is not None]
    assert len(caps) == len(engines)
    assert sum(caps) * of.gib + CONTEXT_GIB * len(engines) <= of.gib * 1.0001
    for engine, cap in zip(engines, caps, strict=True):
        assert engine.vllm_config.cache_config.gpu_memory_utilization <= cap
    # The last engine to start finds its part free, with the others' contexts and caches on the card.
    free = of.gib - sum(caps[:-1]) * of.gib - CONTEXT_GIB * len(engines)
    assert free >= engines[-1].vllm_config.cache_config.gpu_memory_utilization * of.gib


@pytest.mark.parametrize("name", GPU_MANIFESTS)
def test_manifest_fits_the_cards_that_it_names(name: str, models: dict[str, str]) -> None:
    of = A100_40 if "one-gpu" in name else H100
    config = resolved(serve_args(name), 0, of, elastic=True)
    for engine in plan(config, of, models):
        assert engine.refusal is None
    if "NVIDIA-L4" in Path(ROOT, name).read_text():
        (encoder,) = (engine for engine in plan(config, L4, models) if engine.stage is Stage.ENCODER)
        assert encoder.refusal is None


def test_a_refusal_names_what_fits_and_that_does(models: dict[str, str]) -> None:
    config = resolved({"accelerator": "cuda"}, 1, L4)
    refusals = [engine.refusal or "" for engine in plan(config, L4, models)]
    assert "prefill of Qwen/Qwen2.5-VL-3B-Instruct needs about 12" in refusals[1]
    assert "`prefill: null` (decode prefills)" in refusals[1] and "a card of 40 GB" in refusals[1]
    fits = plan(resolved({"accelerator": "cuda", "prefill": None}, 1, L4), L4, models)
    assert [engine.refusal for engine in fits] == [None, None]


@pytest.mark.parametrize(
    ("args", "fits"),
    [
        ({"engine_args": {"max_model_len": 128000}}, False),
        ({"engine_args": {"max_model_len": 128000}, "media": {"limits": {"video": 0}}}, True),
        (
            {"engine_args": {"max_model_len": 65536}, "media": {"limits": {"video": {"count": 1, "num_frames": 16}}}},
            True,
        ),
    ],
    ids=["all of the context", "no videos", "smaller ones"],
)
def test_videos_decide_whether_the_whole_context_fits_a_card_of_24_gb(
    args: dict[str, Any], fits: bool, models: dict[str, str]
) -> None:
    config = resolved({"accelerator": "cuda", "model": "Qwen/Qwen2.5-VL-3B-Instruct"} | args, 3, L4)
    engines = plan(config, L4, models)
    assert all(engine.refusal is None for engine in engines[1:]) == fits


def test_environment_is_as_before(models: dict[str, str]) -> None:
    before = dict(os.environ)
    plan(resolved({"accelerator": "cuda"}, 1, H100), H100, models)
    assert dict(os.environ) == before
