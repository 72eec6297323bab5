"""The built-in model's files, made once, the same everywhere, and what its prompts look like."""

import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from serve_app.demo import ensure_demo_model
from serve_app.demo.cache import build_once
from tools.harness.models import ensure_audio_model

BUILD = (
    "import sys; from pathlib import Path; from {module} import {name} as make; print(make(Path(sys.argv[1]){more}))"
)
DEMO, RANDOM = ("serve_app.demo", "ensure_demo_model", ""), ("serve_app.demo", "ensure_demo_model", ", 'demo-random'")
AUDIO = ("tools.harness.models", "ensure_audio_model", "")


def in_new_process(recipe: tuple[str, str, str], root: Path) -> Path:
    module, name, more = recipe
    command = [sys.executable, "-c", BUILD.format(module=module, name=name, more=more), str(root)]
    repository = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=["demo", "demo-random"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("cache"), request.param)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def render(folder: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    """Render as transformers does: same environment, same treatment of blocks and of JSON."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    return template.render(messages=messages, **({"add_generation_prompt": True} | options))


@pytest.mark.parametrize("recipe", [DEMO, RANDOM, AUDIO])
def test_two_builds_give_the_same_bytes(recipe: tuple[str, str, str], tmp_path: Path) -> None:
    first, second = (in_new_process(recipe, tmp_path / root) for root in ("a", "b"))
    assert first.name == second.name
    assert digests(first) == digests(second)


def test_processes_may_race_to_build(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(in_new_process, DEMO, tmp_path) for _ in range(4)]
    made = {run.result() for run in runs}
    assert list(tmp_path.iterdir()) == list(made)  # one folder, and no scratch folder left


def test_losing_the_race_takes_the_winners_folder(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("mine")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "file").write_text("theirs")

    assert (build_once(tmp_path / "model", build) / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        build_once(tmp_path / "model", build)
    assert not list(tmp_path.iterdir())


def test_the_second_call_builds_nothing(model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert ensure_demo_model(model.parent, model.name.rpartition("-")[0]) == model
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_default_root_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ensure_demo_model().parent == tmp_path / "epd-serve"


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, serve_app.demo; print({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_weights_fit_the_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    with safe_open(model / "model.safetensors", "np") as weights:
        parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        sizes = {name: math.prod(part.get_shape()) for name, part in parts.items()}
        precisions = {part.get_dtype() for part in parts.values()}
        head = parts["lm_head.weight"].get_shape()
    few, many, precision = (500_000, 1_000_000, "F32") if "random" in model.name else (1_000_000, 3_000_000, "BF16")
    assert precisions == {precision}
    assert few < sum(sizes.values()) < many
    text, vision = config["text_config"], config["vision_config"]
    assert head == [text["vocab_size"], text["hidden_size"]]
    assert sum(".norm1." in name for name in parts) == vision["depth"]
    assert sum(".input_layernorm." in name for name in parts) == text["num_hidden_layers"]


@pytest.mark.parametrize("text", ["What is shown?\n\n", "it's 12:30 — naïve 日本語 😀", ' {"a": [1, 2]}\t', "a  b   c"])
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_each(model: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((model / "config.json").read_text())
    assert tokenizer.encode("<|image_pad|>").ids == [config["image_token_id"]]
    assert tokenizer.encode("<|video_pad|>").ids == [config["video_token_id"]]
    assert tokenizer.encode("<|vision_start|>").ids == [config["vision_start_token_id"]]
    assert tokenizer.encode("<|im_end|>").ids == [config["text_config"]["eos_token_id"]]
    assert tokenizer.get_vocab_size() == config["text_config"]["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("<|im_start|><think></think><tool_call></tool_call>").ids) == (
        "<think></think><tool_call></tool_call>"  # parsers read these, so they are not skipped
    )


def test_template_puts_media_where_they_stand(model: Path) -> None:
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": " with "},
        {"type": "video"},
        {"type": "image_url", "image_url": {"url": "…"}},
    ]
    vision = "<|vision_start|><|{}_pad|><|vision_end|>"
    assert render(model, [{"role": "user", "content": parts}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nCompare {vision.format('image')} with {vision.format('video')}{vision.format('image')}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_of_many_turns(model: Path) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert render(model, messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_template_of_tools(model: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": [{"type": "text", "text": "two"}]},
    ]
    prompt = render(model, messages, tools=tools)
    system, _, turns = prompt.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in system
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert turns == (
        "<|im_start|>user\nGo<|im_end|>\n"
        f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("first", [True, False])
def test_template_drops_no_media_whoever_sends_it(model: Path, role: str, first: bool, tools: Any) -> None:
    parts = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": " and "}, {"type": "video"}]
    messages = [{"role": role, "content": parts}, {"role": "user", "content": "Go"}]
    prompt = render(model, messages if first else messages[::-1], tools=tools)
    vision = "<|vision_start|><|{}_pad|><|vision_end|>"
    assert prompt.count(f"See {vision.format('image')} and {vision.format('video')}") == 1


def test_audio_model_takes_sounds_only(tmp_path: Path) -> None:
    prompt = render(ensure_audio_model(tmp_path), [{"role": "user", "content": [{"type": "audio"}, {"type": "image"}]}])
    assert "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|><|im_end|>" in prompt
