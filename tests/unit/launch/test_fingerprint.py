"""Engines tell each other apart by what they were started from, and by nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serve_app.config import EPDConfig
from serve_app.handoff.types import ANY, Version
from serve_app.launch import fingerprint
from serve_app.launch.fingerprint import content_of, front_of, version_of, weights_of
from serve_app.launch.placement import Cluster, resolve


def config(**args: Any) -> EPDConfig:
    return resolve(EPDConfig.model_validate({"accelerator": "cpu"} | args), Cluster(0, 2)).config


def models(folder: str | Path, **more: Any) -> Any:
    """vLLM's config of a model, as far as it is looked at."""
    named: dict[str, Any] = {"model": str(folder), "tokenizer": str(folder), "revision": None, "seed": 0}
    return SimpleNamespace(**named | {"hf_config": SimpleNamespace(), "model_weights": ""} | more)


def engines(folder: str | Path, load_format: str = "auto", **more: Any) -> Any:
    return SimpleNamespace(model_config=models(folder, **more), load_config=SimpleNamespace(load_format=load_format))


@pytest.fixture
def model(demo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path / "model"))


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_two_copies_of_a_folder_are_one_version_whenever_they_were_made(model: Path, demo_folder: Path) -> None:
    os.utime(model / "model.safetensors", (1, 1))
    assert version_of(config(), engines(model)) == version_of(config(), engines(demo_folder))


@pytest.mark.parametrize("change", ["all of one", "one of each", "a smaller one"])
def test_other_weights_of_the_same_names_are_another_version(model: Path, change: str) -> None:
    before = version_of(config(), engines(model))
    tensors = weights(model)
    match change:
        case "all of one":
            tensors["lm_head.weight"] = -tensors["lm_head.weight"]
        case "one of each":
            for tensor in tensors.values():
                tensor.reshape(-1)[tensor.size // 2] += 1
        case _:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    after = version_of(config(), engines(model))
    assert after.other_than(before) == ["weights"]


def test_each_tensor_is_looked_at_where_there_are_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {f"t{index}": np.zeros(4096, np.float32) for index in range(32)}
    save_file(tensors, file)
    before, places = content_of([file]), []
    for name in tensors:
        save_file(tensors | {name: np.ones(4096, np.float32)}, file)
        assert content_of([file]) != before
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, place: places.append(place) or read(fd, count, place))
    monkeypatch.setattr(fingerprint, "MOST_SAMPLES", 10)
    content_of([file])
    assert 5 <= len(places) <= 10


@pytest.mark.parametrize("name", ["pytorch_model.bin", "broken.safetensors", "model.gguf"])
def test_weights_of_any_format_are_looked_into(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(bytes(1_000_000))
    before = content_of([file])
    file.write_bytes(bytes(500_000) + b"\1" * 500_000)
    assert content_of([file]) != before
    file.write_bytes(b"")
    assert content_of([file]) != before


def test_weights_of_a_hub_are_named_by_their_commit(tmp_path: Path) -> None:
    def named(model: str | Path = "org/model", **more: Any) -> str:
        return weights_of(engines(model, **more))

    cached = tmp_path / "snapshots" / "c1"
    cached.mkdir(parents=True)
    one, other = (named(hf_config=SimpleNamespace(_commit_hash=commit)) for commit in ("c1", "c2"))
    assert one != other
    assert named(cached) == one, "as vLLM names it without a network"
    assert len({one, named(), named(revision="v2"), named(tmp_path, model_weights="s3://b/m")}) == 4


def test_random_weights_are_named_by_their_seed(model: Path) -> None:
    def named(seed: int) -> str:
        return weights_of(engines(model, "dummy", seed=seed))

    assert named(0) == named(0) != named(1)
    (model / "model.safetensors").unlink()
    assert named(0) == weights_of(engines(model, "dummy"))


def test_an_ingress_needs_no_weights(model: Path) -> None:
    front = front_of(config(), models(model))
    (model / "model.safetensors").unlink()
    assert front_of(config(), models(model)) == front
    assert front.front and not front.weights and not front.layout


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "merges.txt"]
)
def test_other_files_beside_the_weights_are_another_front(model: Path, name: str) -> None:
    before = front_of(config(), models(model))
    (model / name).write_text("{}")
    changed = front_of(config(), models(model)).other_than(before)
    assert changed == ([] if name == "merges.txt" else ["front"]), "tokenizer.json says all, and others may be missing"


@pytest.mark.parametrize(
    ("args", "differ"),
    [
        ({"engine_args": {"dtype": "bfloat16"}}, True),
        ({"engine_args": {"quantization": "fp8"}}, True),
        ({"media": {"processor_kwargs": {"max_pixels": 100_000}}}, True),
        ({"kv": {"connector": "NixlPushConnector"}}, True),
        ({"ec": {"connector": "ECExampleConnector"}}, True),
        ({"decode": {"engine_args": {"max_num_seqs": 7}}}, False),
        ({"advanced": {"retry": {"attempts": 9}}, "served_model_name": "another"}, False),
    ],
)
def test_arguments_tell_versions_apart_where_both_sides_must_have_the_same(
    model: Path, args: dict[str, Any], differ: bool
) -> None:
    assert (front_of(config(), models(model)) != front_of(config(**args), models(model))) is differ


def test_tokenizer_of_its_own_is_looked_at_too(model: Path, demo_folder: Path) -> None:
    before = front_of(config(), models(demo_folder, tokenizer=str(model)))
    (model / "tokenizer.json").write_text("{}")
    assert front_of(config(), models(demo_folder, tokenizer=str(model))) != before


@pytest.mark.parametrize("way", ["file", "text"])
def test_template_counts_where_both_sides_know_it(model: Path, tmp_path: Path, way: str) -> None:
    def told(text: str) -> Version:
        file = tmp_path / "template.jinja"
        file.write_text(text)
        return front_of(config(api={"chat_template": str(file) if way == "file" else text}), models(model))

    one, other = told("{{ messages }}"), told("{{ messages[0] }}")
    assert other.other_than(one) == ["template"]
    elsewhere = front_of(config(api={"chat_template": "/only/at/the/ingress.jinja"}), models(model))
    assert elsewhere.fits(one) and elsewhere.fits(other)


def test_release_that_reads_hand_offs_in_another_way_is_another_front(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = front_of(config(), models(model))
    monkeypatch.setattr(fingerprint, "PROTOCOL", fingerprint.PROTOCOL + 1)
    assert front_of(config(), models(model)) != before
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "vllm_version", fingerprint.vllm_version.partition("+")[0] + "+cu130")
    assert front_of(config(), models(model)) == before


def test_front_is_the_same_in_ingress_and_engine(
    demo_vllm_config: Any, decode_vllm_config: Any, make_client: Callable[..., Any]
) -> None:
    resolved = config(model="demo-random")
    told = front_of(resolved, demo_vllm_config.model_config)
    assert version_of(resolved, decode_vllm_config)._replace(weights="") == told


def test_what_is_not_known_or_not_asked_for_fits() -> None:
    mine = Version("f", "t", "w", "l")
    assert mine.fits(ANY) and ANY.fits(mine) and mine.fits(mine)
    assert mine.fits(Version("f", weights="w"))
    assert mine.other_than(Version("g", "t", "v")) == ["front", "weights"]
