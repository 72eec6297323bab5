"""Whether an engine fits its part of a card, by arithmetic; ``tests/gpu/build`` has it with real models."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.card_memory import GIB, share_of, shares_of_one
from serve_app.launch.engine_args import engine_args
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage
from serve_app.stages.engine import engine_config
from serve_app.stages.fit import (
    WHOLE,
    Demand,
    alternatives,
    bytes_per_vision_token,
    check,
    check_fit,
    check_precision,
    room_gib,
)

QWEN_3B = Demand(
    weights=int(6.99 * GIB),
    tokens_per_item={"image": 16384, "video": 114688},
    max_model_len=128000,
    batch_tokens=0,
    bytes_per_vision_token=4 * 29376,
    bytes_per_embedding=4096,
    bytes_per_kv_token=36864,
)
TOWER = Demand(int(1.25 * GIB), {"image": 16384, "video": 114688}, 32768, 16384, 4 * 29376, 4096, 0)

# Qwen2.5-VL-3B in bf16: fits by length, card and share. Shares: E+P+D and P+D on one card, E+PD, a card for itself.
FITS = [
    (128000, 22.0, [False, False, False, False]),
    (128000, 39.4, [False, False, True, True]),
    (128000, 79.1, [True, True, True, True]),
    (32768, 22.0, [False, False, True, True]),
    (32768, 39.4, [True, True, True, True]),
    (16384, 22.0, [False, False, True, True]),
]


def utilizations(card_gib: float) -> list[float]:
    topologies = (list(Stage), [Stage.PREFILL, Stage.DECODE], [Stage.ENCODER, Stage.DECODE])
    claims = [shares_of_one(stages, card_gib)[Stage.DECODE] for stages in topologies]
    return [share_of(Stage.DECODE, claim, card_gib).utilization for claim in claims] + [WHOLE]


@pytest.mark.parametrize(("length", "card_gib", "fits"), FITS)
def test_default_model_fits_by_the_arithmetic_of_vllms_start(length: int, card_gib: float, fits: list[bool]) -> None:
    needed = QWEN_3B.at(length).bytes / GIB
    assert [needed <= utilization * card_gib for utilization in utilizations(card_gib)] == fits


def test_the_page_says_of_each_card_what_the_arithmetic_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gpus.md").read_text()
    cards = [22.0, 39.4, 44.4, 79.1]
    parts = {"E+P+D on one card": 0, "P+D on one card": 1, "E+PD on one card": 2, "E+P+D on two cards or more": 2}
    rows = re.findall(r"^\| ([^|,]+), (\d+)[^|]*\|(.*)\|$", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == {*parts, "a card each"}
    for name, length, cells in rows:
        said = [cell.strip().split(";")[0] for cell in cells.split("|")]
        utilization = [utilizations(card)[parts.get(name, 3)] * card for card in cards]
        needed = QWEN_3B.at(int(length)).bytes / GIB
        assert said == ["fits" if needed <= room else "refused" for room in utilization], name
    assert QWEN_3B.at(8192).bytes / GIB <= utilizations(22.0)[1] * 22.0
    assert QWEN_3B.without("video").bytes / GIB <= utilizations(22.0)[3] * 22.0


def test_what_is_needed_is_weights_one_batch_its_cache_and_one_sequence() -> None:
    demand = QWEN_3B.at(32768)
    item = 32768 * (4 * 29376 + 4096)
    assert demand.bytes == QWEN_3B.weights + item + 32768 * 36864 + int(0.4 * GIB)
    without = demand.without("video")
    assert demand.bytes - without.bytes == 16384 * (4 * 29376 + 4096)
    assert without.without("image").bytes == QWEN_3B.weights + 32768 * 36864 + int(0.4 * GIB)


def test_an_encoder_needs_a_batch_of_its_budget_and_no_kv() -> None:
    assert TOWER.bytes == TOWER.weights + 32768 * (4 * 29376 + 4096)
    assert TOWER.at(8192).bytes == TOWER.weights + 16384 * (4 * 29376 + 4096)


def on_card(card_gib: float, cards: int = 1, **args: Any) -> EPDConfig:
    return resolve(EPDConfig(accelerator="cuda", **args), Cluster(cards, 64, card_gib=card_gib)).config


def test_a_refusal_is_one_sentence_with_the_arithmetic_and_what_would_fit() -> None:
    config = on_card(22.0)
    utilization = share_of(Stage.PREFILL, 0.35, 22.0).utilization
    with pytest.raises(ConfigError) as refused:
        check_fit(config, Stage.PREFILL, QWEN_3B.at(32768), 22.0, utilization)
    assert str(refused.value) == (
        "prefill of Qwen/Qwen2.5-VL-3B-Instruct needs about 12.2 GiB (weights 7.0, `max_model_len` 32768) and may use "
        "6.2 GiB (0.35 of 22.0 GiB of this card). What would fit: `prefill: null` (decode prefills); a card of 40 GB."
    )


def test_alternatives_are_only_those_that_fit() -> None:
    whole = on_card(22.0, cards=3)
    assert alternatives(whole, Stage.DECODE, QWEN_3B, 22.0, WHOLE) == [
        "`engine_args: {max_model_len: 65536}`",
        "`media: {limits: {video: 0}}`",
        "a card of 32 GB",
    ]
    huge = Demand(140 * GIB, {}, 4096, 0, 0, 0, 1)
    assert alternatives(whole, Stage.DECODE, huge, 22.0, WHOLE) == ["a card of 180 GB"]
    beyond = Demand(500 * GIB, {}, 4096, 0, 0, 0, 1)
    with pytest.raises(ConfigError, match="What would fit: a smaller model or more cards"):
        check_fit(whole, Stage.DECODE, beyond, 22.0, WHOLE)


def test_an_encoder_is_bounded_by_its_cap_and_not_by_what_vllm_asks_to_be_free() -> None:
    assert room_gib(Stage.ENCODER, 0.25, 80.0, 0.01) == 80 * share_of(Stage.ENCODER, 0.25, 80.0).cap
    assert room_gib(Stage.ENCODER, 1.0, 80.0, 0.01) == 80 * WHOLE
    assert room_gib(Stage.PREFILL, 0.75, 80.0, 0.7) == 80 * 0.7


def test_bytes_of_a_vision_token_are_known_of_towers_that_merge_patches() -> None:
    qwen = SimpleNamespace(
        spatial_merge_size=2,
        hidden_size=1280,
        intermediate_size=3420,
        in_channels=3,
        temporal_patch_size=2,
        patch_size=14,
    )
    assert bytes_per_vision_token(SimpleNamespace(vision_config=qwen), 1) == 4 * 29376
    assert bytes_per_vision_token(SimpleNamespace(vision_config=SimpleNamespace(hidden_size=1152)), 1) == 0
    assert bytes_per_vision_token(SimpleNamespace(), 1) == 0


def test_an_encoder_with_nothing_to_encode_is_refused_on_any_device(demo_folder: Path) -> None:
    for limits, refused in (({"image": 0, "video": 0}, True), ({"image": 0}, False)):
        config = resolve(EPDConfig(model=str(demo_folder), media={"limits": limits}), Cluster(0, 2)).config
        for stage in Stage:
            vllm_config = engine_config(AsyncEngineArgs(**engine_args(config, stage, str(demo_folder))))
            if refused and stage is Stage.ENCODER:
                with pytest.raises(ConfigError, match=r"nothing is left to encode: `media\.limits` allows no item of"):
                    check(config, stage, vllm_config)
            else:
                check(config, stage, vllm_config)


def test_a_model_with_an_encoder_of_its_own_kind_is_refused(demo_folder: Path) -> None:
    """Whisper's decoder looks at its encoder in each layer, at every token."""
    config = resolve(EPDConfig(model=str(demo_folder)), Cluster(0, 2)).config
    vllm_config = engine_config(AsyncEngineArgs(**engine_args(config, Stage.DECODE, str(demo_folder))))
    vllm_config.model_config.hf_config.is_encoder_decoder = True
    vllm_config.model_config.__dict__.pop("is_encoder_decoder", None)  # a cached property
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        check(config, Stage.DECODE, vllm_config)


@pytest.mark.parametrize(
    ("own", "taken", "refused"),
    [("bfloat16", "float16", True), ("bfloat16", "bfloat16", False), ("float16", "float16", False)],
)
def test_a_precision_that_this_card_alone_would_have_is_refused(own: str, taken: str, refused: bool) -> None:
    model = SimpleNamespace(hf_config=SimpleNamespace(dtype=getattr(torch, own)), dtype=getattr(torch, taken))
    if not refused:
        return check_precision(model, "T4")
    with pytest.raises(ConfigError, match=r"T4 has no bfloat16.*engine_args: \{dtype: float16\}"):
        check_precision(model, "T4")
