"""The benchmark on a GPU, as far as it can be looked at without one."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.model import write_qwen_3b
from serve_app.config import EPDConfig, Stage
from serve_app.engine import check_engine_args
from serve_app.placement import Cluster, resolve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_3b(folder)
    return folder


def test_model_has_the_size_of_the_real_one(model: Path) -> None:
    with torch.device("meta"):
        made = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(model))
    made.tie_weights()
    assert sum(weights.numel() for weights in made.parameters()) == 3_754_622_976  # as the model's page says: 3.75B
    assert made.config.text_config.dtype == torch.bfloat16


def test_tokens_that_the_small_tokenizer_lacks_are_no_text_and_no_error(model: Path) -> None:
    tokenizer, stream = Tokenizer.from_file(str(model / "tokenizer.json")), DecodeStream()
    assert [stream.step(tokenizer, token) for token in (100_000, *tokenizer.encode("Hello").ids)][-1]


@pytest.mark.parametrize("name", gpu.TOPOLOGIES)
def test_stages_share_the_one_card(model: Path, name: str) -> None:
    args = gpu.config_of(model, gpu.TOPOLOGIES[name])
    stages = resolve(EPDConfig.model_validate(args), Cluster(1, 16, ("H100",))).config.stages
    assert sum(stage.gpus_per_replica or 0 for stage in stages.values()) == pytest.approx(1)
    check_engine_args(stages[Stage.DECODE].engine_args, "decode.engine_args")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert "No GPU here" in capsys.readouterr().out
