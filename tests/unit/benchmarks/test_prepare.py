"""benchmarks.prepare: the way of an image to an encoder's engine, with the real model's sizes."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.gpu.model import write_qwen_3b
from benchmarks.prepare import Cost, costs, media_of, photo, processor


def test_photo_is_the_same_every_time_and_about_as_large_as_a_photograph() -> None:
    data = photo()
    assert data == photo()
    assert Image.open(BytesIO(data)).size == (1920, 1080)
    assert 0.3e6 < len(data) < 1e6


def test_rates_follow_from_the_costs() -> None:
    cost = Cost(decode=10, process=20, message=10, jpeg_bytes=1, message_bytes=1, tokens=1)
    assert cost.per_replica == 50
    assert cost.per_core == 25


def test_image_of_1080p_is_13_mb_for_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As serve_app/media/items.py says: 10,764 patches of 1,176 bytes, not yet floats."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_qwen_3b(tmp_path)
    cost = costs(processor(tmp_path), media_of(photo()), images=1)
    assert cost.tokens == 2691
    assert cost.message_bytes == pytest.approx(10_764 * 1_176, rel=0.01)
