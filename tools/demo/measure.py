"""`python -m tools.demo.measure`: how often the demo model is right about pictures that it was not trained on.

Plain transformers, without vLLM: pictures go through the model's own processor and answers are generated greedily.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.demo import ensure_demo_model
from tools.demo.examples import Example, Kind, random_example

HELD_OUT = 2**32
"""Seeds from here on are never trained on."""

Question = tuple[Sequence[Any], str, str]
"""Pictures, what is asked about them, and the right answer."""


def held_out(kind: Kind, count: int) -> list[Question]:
    """The same questions for the same `kind` and `count`, about pictures of 96 to 447 pixels."""
    questions = []
    for number in range(count):
        random = np.random.default_rng((HELD_OUT, number))
        example: Example = random_example(random, kind, side=int(random.integers(96, 448)), most_turns=1)
        questions.append((example.pictures, *example.turns[0]))
    return questions


class Plain:
    """The model as transformers runs it."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, questions: Sequence[Question], batch: int = 20) -> list[str]:
        found: list[str] = []
        for start in range(0, len(questions), batch):
            some = questions[start : start + batch]
            prompts = [
                self.processor.apply_chat_template(
                    [
                        {
                            "role": "user",
                            "content": [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}],
                        }
                    ],
                    add_generation_prompt=True,
                )
                for pictures, question, _ in some
            ]
            pictures = [picture for each, _, _ in some for picture in each]
            inputs = self.processor(
                text=prompts, images=pictures or None, padding=True, padding_side="left", return_tensors="pt"
            )
            output = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            found += self.processor.batch_decode(new, skip_special_tokens=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.measure", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="the model (default: the one that came with the package)")
    parser.add_argument("--count", type=int, default=500, help="questions of each kind")
    options = parser.parse_args()
    plain = Plain(options.folder or ensure_demo_model())
    kinds: tuple[Kind, ...] = ("one", "two", "count")
    for kind in kinds:
        questions = held_out(kind, options.count)
        wrong = [
            (question, answer, right)
            for (_, question, right), answer in zip(questions, plain.answers(questions), strict=True)
            if answer != right
        ]
        print(f"{kind}: {1 - len(wrong) / len(questions):.1%} of {len(questions)}; wrong are {wrong[:6]}", flush=True)


if __name__ == "__main__":
    main()
