"""A load generator runs as a process of its own: its job goes there, its findings or its failure come back."""

from pathlib import Path

import pytest

from benchmarks import job


def test_what_a_process_finds_comes_back(tmp_path: Path) -> None:
    nothing = {"url": "http://127.0.0.1:1", "mark": "none", "waves": [], "first": 0, "patience_s": 0.0}
    assert job.run("benchmarks.streams", nothing, tmp_path / "log", 60, {}) == []


def test_what_a_process_says_when_it_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'first'"):
        job.run("benchmarks.streams", {}, tmp_path / "log", 60, {})
