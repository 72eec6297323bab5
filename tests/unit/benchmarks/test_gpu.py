"""The benchmark on a GPU, as far as it can be looked at without one: its model, its weights, its systems, its time."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import card as cards
from benchmarks.gpu import systems
from benchmarks.gpu.budget import ENDING_S, Budget, OutOfTime, limit
from benchmarks.gpu.model import write_qwen_3b
from benchmarks.gpu.prerequisites import THREE_ENGINES_MIB
from benchmarks.gpu.visit import Visit, excerpt
from serve_app.config import EPDConfig
from serve_app.demo.tokenizer import VOCAB_SIZE
from serve_app.launch.placement import Cluster, resolve
from serve_app.launch.vllm_args import check_engine_args
from serve_app.stage import Stage
from tools.harness.servers import REPOSITORY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_3b(folder)
    return folder


def card(**changes: Any) -> cards.Card:
    facts = {"index": 0, "name": "NVIDIA H100", "driver": "580.95.05", "capability": 9.0, "total_mib": 81559}
    return cards.Card(**facts | {"used_mib": 0, "compute_mode": "Default", "mig": "Disabled"} | changes)


# ---- model and weights


def test_model_has_the_size_of_the_real_one(model: Path) -> None:
    with torch.device("meta"):
        made = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(model))
    made.tie_weights()
    assert sum(weights.numel() for weights in made.parameters()) == 3_754_622_976  # as the model's page says: 3.75B
    assert made.config.text_config.dtype == torch.bfloat16


def test_tokens_that_the_small_tokenizer_lacks_are_no_text_and_no_error(model: Path) -> None:
    tokenizer, stream = Tokenizer.from_file(str(model / "tokenizer.json")), DecodeStream()
    assert [stream.step(tokenizer, token) for token in (100_000, *tokenizer.encode("Hello").ids)][-1]


def test_weights_are_of_the_name_and_keep_the_scale_of_what_goes_in() -> None:
    from benchmarks.gpu.weights import fill

    first, again, other = (torch.empty(256, 512) for _ in range(3))
    for name, values in (("a.mlp.down_proj.weight", first), ("a.mlp.down_proj.weight", again), ("b.weight", other)):
        fill(name, values)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first @ torch.randn(512, 64)).std() == pytest.approx(1, rel=0.1)
    norm = torch.empty(8)
    fill("layers.0.input_layernorm.weight", norm)
    assert norm.tolist() == [1] * 8


def test_no_answer_has_a_token_that_the_small_tokenizer_lacks() -> None:
    """Its logit is 0, and the best of a thousand others lies far above that."""
    from benchmarks.gpu.weights import fill

    values = torch.empty(2 * VOCAB_SIZE, 64)
    fill("language_model.model.embed_tokens.weight", values)
    assert values[:VOCAB_SIZE].std() > 0 and not values[VOCAB_SIZE:].any()


def test_vllm_finds_the_loader_by_the_engine_arguments() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.import_utils import resolve_obj_by_qualname

    args = systems.config_of(systems.CUDA, Path("model"), {})["engine_args"]
    check_engine_args(args, "engine_args")
    assert resolve_obj_by_qualname(args["worker_extension_cls"]).__name__ == "Imported"
    assert type(get_model_loader(LoadConfig(load_format=args["load_format"]))).__name__ == "RandomLoader"


# ---- systems


@pytest.mark.parametrize("name", systems.TOPOLOGIES)
def test_stages_share_the_one_card(model: Path, name: str) -> None:
    args = systems.config_of(systems.CUDA, model, systems.TOPOLOGIES[name])
    stages = resolve(EPDConfig.model_validate(args), Cluster(1, 16, ("H100",))).config.stages
    assert sum(stage.gpus_per_replica or 0 for stage in stages.values()) == pytest.approx(1)
    check_engine_args(stages[Stage.DECODE].engine_args, "decode.engine_args")


def test_a_card_of_24_gb_has_no_room_for_prefill_beside_decode() -> None:
    small, large = card(total_mib=24564), card(total_mib=THREE_ENGINES_MIB)
    assert list(systems.systems(systems.CUDA, Path(), small)) == ["one engine", "ours E+PD"]
    assert list(systems.systems(systems.CUDA, Path(), large)) == ["one engine", "ours E+PD", "ours E+P+D"]


# ---- time


def test_what_hangs_is_given_up_in_time_and_the_handler_of_before_is_back() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime, match="--minutes"), limit(0.05):
        while True:
            signal.pause()
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_ends_in_time_is_left_alone() -> None:
    with limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_time_is_kept_for_the_systems_that_follow() -> None:
    budget = Budget(600, began=time.monotonic())
    assert budget.fair(2) == pytest.approx(200, abs=1)
    assert budget.most(2) == pytest.approx(300 - ENDING_S, abs=1)
    assert budget.most(0) == pytest.approx(600 - ENDING_S, abs=1)


# ---- a visit, the whole run


@contextmanager
def fails(folder: Path) -> Iterator[Any]:
    (folder / "serve.log").write_text("\x1b[36mloads\x1b[0m\nEPD cannot serve: out of memory\n")
    raise AssertionError("the server did not start\nand more")
    yield


def visit(name: str = "ours E+PD", rounds: int = 1) -> Visit:
    return Visit(name, None, "tokenizer", rounds, lambda line: None)


def test_a_system_that_does_not_start_is_a_result_with_its_log() -> None:
    found = visit().run(fails, Budget(600), 1)
    assert found["error"] == "AssertionError: the server did not start"
    assert found["log"] == ["loads", "EPD cannot serve: out of memory"]
    assert found["rounds"] == []


def test_a_system_that_hangs_ends_with_its_share_of_the_time() -> None:
    @contextmanager
    def hangs(folder: Path) -> Iterator[Any]:
        signal.pause()
        yield

    found = visit().run(hangs, Budget(ENDING_S + 0.1), 0)
    assert found["error"].startswith("OutOfTime")


class Loaded:
    """A visit of a server that is none: each round takes ``round_s`` by the clock that is patched in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, round_s: float, fails_in: int | None = None) -> None:
        self.now, self.seeds = 0.0, []
        monkeypatch.setattr("benchmarks.gpu.visit.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("benchmarks.gpu.visit.ask_all", lambda server: {})
        page = SimpleNamespace(text="")
        self.server = SimpleNamespace(
            url="", mark="", log=SimpleNamespace(read_text=lambda errors: ""), get=lambda path: page
        )

        def drive(url: str, mark: str, tokenizer: str, cells: list[Any], log: Path) -> list[dict[str, Any]]:
            self.now += round_s
            self.seeds.append([seed for _, seed in cells])
            if len(self.seeds) == fails_in:
                raise RuntimeError("the load generator failed")
            return [{"failed": 0, "request_throughput": float(seed)} for _, seed in cells]

        monkeypatch.setattr("benchmarks.gpu.visit.load.drive", drive)

    def start(self, folder: Path) -> AbstractContextManager[Any]:
        @contextmanager
        def running() -> Iterator[Any]:
            yield self.server

        return running()


def test_rounds_are_left_out_when_the_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch, round_s=200)
    found = visit(rounds=5).run(loaded.start, Budget(1000, began=time.monotonic()), 1)  # 500 s are fair
    assert len(found["rounds"]) == 2 and "error" not in found


def test_only_the_first_round_is_warmed_up_and_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch, round_s=1)
    found = visit(rounds=2).run(loaded.start, Budget(1000), 0)
    assert loaded.seeds == [[1, 2, 3, 4], [1001, 1002]]
    assert [[run["request_throughput"] for run in runs] for runs in found["rounds"]] == [[3.0, 4.0], [1001.0, 1002.0]]


def test_what_was_measured_before_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch, round_s=1, fails_in=2)
    found = visit(rounds=3).run(loaded.start, Budget(1000), 0)
    assert len(found["rounds"]) == 1 and found["error"] == "RuntimeError: the load generator failed"


def test_what_is_left_behind_is_told_and_changes_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch, round_s=1)

    @contextmanager
    def leaves(folder: Path) -> Iterator[Any]:
        yield loaded.server
        raise AssertionError("left behind after Ctrl-C: a file")

    found = visit().run(leaves, Budget(1000), 0)
    assert len(found["rounds"]) == 1 and "error" not in found
    assert found["ending"] == "AssertionError: left behind after Ctrl-C: a file"


def test_the_log_keeps_what_tells_of_errors_from_before_its_end() -> None:
    lines = ["ValueError: too large", *["nothing"] * 10, "(ProxyActor pid=1) error", *["last"] * 3]
    assert excerpt("\n".join(lines), last=3) == ["ValueError: too large", *["last"] * 3]


def test_there_is_a_report_when_every_system_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--out", str(tmp_path / "new")])
    failing = {"one engine": fails, "ours E+PD": fails}
    monkeypatch.setattr(systems, "systems", lambda *_: failing)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code
    told = (tmp_path / "new" / "RESULTS.md").read_text()
    assert told.count("EPD cannot serve: out of memory") == 2
    assert (tmp_path / "new" / "gpu.json").exists()


def test_there_is_a_report_of_what_was_measured_before_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def interrupted(folder: Path) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(systems, "systems", lambda *_: {"one engine": interrupted})
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert "| one engine |" in (tmp_path / "RESULTS.md").read_text()


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[cards.Card]:
        raise cards.NoCard("There is no card.")

    monkeypatch.setattr(cards, "cards", none)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"Nothing was measured. There is no card."):
        gpu.main()


def test_this_program_makes_no_cuda_context() -> None:
    """It would hold 0.4 GiB of the card during the whole run. A child process asks PyTorch what has to be asked."""
    program = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=REPOSITORY)
