"""Results are small, a run a line, and are read again."""

import json
import sys
from pathlib import Path

import pytest

from tools.harness import record

RUN = {"system": "one engine", "wave": {"streams": 64}, "tokens_per_s": 1234.5678, "failed": 0, "rate": None}


def test_a_run_is_a_line_of_rounded_figures(tmp_path: Path) -> None:
    path = tmp_path / "results" / "made.json"
    record.write({"command": "make", "machine": {"cpus": 2}, "runs": [RUN, RUN], "errors": []}, path)
    read = json.loads(path.read_text())
    assert read == {
        "command": "make",
        "machine": {"cpus": 2},
        "runs": 2 * [RUN | {"tokens_per_s": 1234.57}],
        "errors": [],
    }
    assert sum('"system"' in line for line in path.read_text().splitlines()) == 2


def test_small_figures_keep_their_digits_and_counts_stay_whole() -> None:
    assert record.short({"s": 0.000123456789, "of": (1_234_567, 2.0)}) == {"s": 0.000123457, "of": [1_234_567, 2.0]}


def test_the_command_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--systems", "one engine"])
    about = record.about("benchmarks.bench")
    assert about["command"] == "python -m benchmarks.bench --systems 'one engine'"
    assert {"vllm", "ray", "python"} <= about["versions"].keys()
