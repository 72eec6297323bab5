"""Models whose work cannot be handed from stage to stage are refused when they start, in a sentence."""

from pathlib import Path

import pytest

from tools.harness.families import WHISPER
from tools.harness.models import serving
from tools.harness.servers import serve_that_fails

pytestmark = pytest.mark.models


def test_encoder_decoder_model(tmp_path: Path) -> None:
    args = serving(WHISPER.ensure(tmp_path), max_model_len=448) | {"ec": {"storage_path": str(tmp_path / "ec")}}
    failed = serve_that_fails(tmp_path, args)
    said = failed.output.rstrip().splitlines()[-1]
    assert "is an encoder-decoder model, whose cross-attention no stage can hand on: serve it with `vllm serve`" in said
    assert failed.status == 1
