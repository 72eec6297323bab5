"""What it computes in one tensor is what transformers computes, and a cut-off run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.demo.build import write_demo_files
from tools.demo.examples import Kind, random_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_demo_files(folder)
    return folder


@pytest.fixture(scope="module")
def trainee(folder: Path) -> Any:
    from transformers import AutoConfig

    from tools.demo.train import Trainee

    return Trainee(AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize("kind", ["one", "two", "none"])
def test_conversations_and_pictures_are_those_of_the_processor(folder: Path, trainee: Any, kind: Kind) -> None:
    import torch
    from transformers import AutoProcessor

    from tools.demo.train import SIDE, encode, patches

    example = random_example(np.random.default_rng(0), kind, SIDE, most_turns=1)
    processor = AutoProcessor.from_pretrained(folder)
    question, answer = example.turns[0]
    content = [{"type": "image"} for _ in example.pictures] + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt + answer + "<|im_end|>"], images=example.pictures or None, return_tensors="pt")

    ids, positions, labels = encode(processor.tokenizer.backend_tokenizer, example, picture_first=True)
    assert ids == inputs["input_ids"][0].tolist()
    assert processor.decode([token for token in labels if token != -100]) == answer + "<|im_end|>"
    if example.pictures:
        theirs, _ = trainee.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        assert theirs[-3:, 0].T.tolist() == [list(position) for position in positions]
        with torch.no_grad():
            image = processor.image_processor
            seen = trainee.see(patches(example.pictures, image.image_mean, image.image_std))[0].flatten(0, 1)
            whole = trainee.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        assert torch.allclose(seen, whole, atol=1e-4)


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.demo import train

    monkeypatch.setattr(train, "PARTS", {"see": (3, 2, 1e-3, (1, 0, 0, 0)), "answer": (3, 2, 1e-3, (0.5, 0, 0.5, 0))})
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    make_batch, left = train.make_batch, [2]

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make_batch(*args, **kwargs)

    train.train(tmp_path / "whole", "answer", seed=0, threads=1)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(train, "make_batch", cut_off)
        train.train(tmp_path / "cut", "answer", seed=0, threads=1)
    train.train(tmp_path / "cut", "answer", seed=0, threads=1)
    whole, cut = (tmp_path / run / "model-answer" / "model.safetensors" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
