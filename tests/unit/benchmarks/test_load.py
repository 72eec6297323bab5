"""The load is what the cell says, and failures are counted as a client sees them."""

import argparse

import pytest

from benchmarks import cpu
from benchmarks.load import KEPT, TARGET, Cell, arguments, outcome
from benchmarks.systems import reference_engine
from serve_app.launch.engine_args import engine_args
from serve_app.stage import Stage
from tools.harness.servers import cpu_config


def parsed(cell: Cell) -> argparse.Namespace:
    """As vLLM 0.32.0 reads it: benchmarks/load.py leans on these names."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    return parser.parse_args(arguments(cell, "http://127.0.0.1:1", "/model", 7))


def test_vllms_generator_is_told_the_cell() -> None:
    args = parsed(TARGET)
    assert (args.random_mm_base_items_per_request, args.random_input_len, args.random_output_len) == (2, 64, 16)
    assert args.random_mm_bucket_config == {(224, 224, 1): 1.0}
    assert (args.max_concurrency, args.request_rate, args.num_prompts) == (8, float("inf"), 128)
    assert (args.temperature, args.seed) == (0, 7)


def test_a_rate_is_a_poisson_process_without_a_limit() -> None:
    args = parsed(Cell(images=2, tokens=16, rate=2.0))
    assert (args.max_concurrency, args.request_rate, args.burstiness) == (None, 2.0, 1.0)


def test_the_run_that_is_measured_is_the_one_that_vllms_generator_calls() -> None:
    """benchmarks/load.py puts its clock around ``benchmark``, which the generator looks up in its module."""
    from vllm.benchmarks import serve

    assert "benchmark" in serve.main_async.__code__.co_names


def test_an_answer_that_breaks_off_counts_as_failed() -> None:
    result = dict.fromkeys(KEPT, 1.0) | {"output_lens": [16, 16, 3, 0], "errors": ["", "", "", "refused"]}
    found = outcome(TARGET, result | {"generated_texts": ["a", "a", "b", ""]})
    assert (found["failed"], found["errors"]) == (2, ["refused"])
    first, again, other, _ = found["answers"].split()
    assert first == again != other


@pytest.mark.parametrize("stage", Stage)
def test_the_baselines_engines_have_the_settings_of_ours(stage: Stage) -> None:
    """But for the connector of embeddings, which the reference's decode lacks, and the cache of processed media."""
    theirs = reference_engine(cpu_config({"ec": {"connector": "ECExampleConnector"}}), stage).args
    ours = engine_args(cpu_config({}), stage, theirs["model"])
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing == {"enable_request_id_headers", "ec_transfer_config", "mm_processor_cache_gb"}


def test_cpu_is_counted_by_kind_from_the_first_look_to_the_second() -> None:
    engine, ray = "engines", "others"
    before = {1: cpu.Spent(engine, 5.0), 2: cpu.Spent(ray, 1.0), 3: cpu.Spent(ray, 9.0)}
    after = {1: cpu.Spent(engine, 7.0), 2: cpu.Spent(ray, 1.5), 4: cpu.Spent(engine, 0.25)}
    assert cpu.between(before, after) == {engine: 2.25, ray: 0.5}


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("VLLM::EngineCore", "engines"),
        (
            "python -c from multiprocessing.spawn import spawn_main; spawn_main() --multiprocessing-fork",
            "engines",
        ),
        ("python -c from multiprocessing.resource_tracker import main;main(8)", "others"),
        ("ray::ServeReplica:epd:Encoder.handle_request", "Encoder replica"),
        ("ray::ProxyActor", "HTTP proxy"),
        ("python -m benchmarks.baselines.proxy --port 1", "HTTP proxy"),
        ("python -m vllm.entrypoints.openai.api_server --port 1", "API servers"),
        ("/ray/core/src/ray/raylet/raylet", "others"),
    ],
)
def test_processes_are_told_apart_by_their_titles(title: str, kind: str) -> None:
    assert cpu.kind_of(title) == kind
