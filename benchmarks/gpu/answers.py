"""Whether a system answers as one engine does, token by token.

Requests go one at a time, so that no batch changes the shape of a kernel. Even so, bfloat16 rounds differently where decode
computes a prompt's last token that one engine computes with the rest. So each token comes with its log-probability and with
its margin over the runner-up: a first difference where one engine itself was within ``NEAR_TIE`` is rounding, any other is a
lost embedding or a wrong KV block.
"""

from dataclasses import dataclass
from typing import Any

from tools.harness.cases import LONG, Case, chat, image, text
from tools.harness.servers import Server

NEAR_TIE = 0.15
"""Nats. With these weights a token is 0.6 ahead of the next best in the middle; in bfloat16 the same prompts alone and in a
batch of three moved that by up to 0.1 (on a CPU, all 3.75 billion weights)."""

ASKED: dict[str, Any] = {"ignore_eos": True, "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}

PROMPTS: dict[str, Case] = {
    "text": chat(text("Tell me about the weather."), **ASKED),
    "another text": chat(text("Which city is the largest?"), **ASKED),
    "long text": chat(text(LONG * 3), **ASKED),
    "1 image": chat(text("Describe this image."), image(1, (448, 448)), **ASKED),
    "another image": chat(text("Describe this image."), image(2, (448, 448)), **ASKED),
    "4 images": chat(*(image(seed, (448, 448)) for seed in (3, 4, 5, 6)), text("Which is best?"), **ASKED),
    "a large image": chat(image(7, (1372, 1372)), text("Describe this image."), **ASKED),  # 49 × 49 tokens
    "an image and a long text": chat(text(LONG), image(8, (448, 448)), text(LONG), **ASKED),
}


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the log-probability of each, and by how much it was ahead of the second best."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]

    @classmethod
    def of(cls, choice: dict[str, Any]) -> "Answer":
        content = choice["logprobs"]["content"]
        tops = [sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True) for token in content]
        return cls(
            choice["token_ids"], [token["logprob"] for token in content], [first - second for first, second, *_ in tops]
        )


@dataclass(frozen=True)
class Comparison:
    """``equal`` tokens of ``tokens`` come before the first difference. ``margin``: one engine's own, at that difference;
    None where there is none. ``noise``: the most that the equal tokens' log-probabilities differ by."""

    equal: int
    tokens: int
    margin: float | None
    noise: float

    @property
    def verdict(self) -> str:
        if self.margin is None:
            return "equal"
        return "near-tie" if self.margin <= NEAR_TIE else "**different**"


def compare(ours: Answer, one: Answer) -> Comparison:
    pairs = list(zip(ours.tokens, one.tokens, strict=False))
    equal = next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), len(pairs))
    noise = max((abs(ours.logprobs[index] - one.logprobs[index]) for index in range(equal)), default=0.0)
    if equal == len(ours.tokens) == len(one.tokens):
        return Comparison(equal, len(one.tokens), None, noise)
    margin = one.margins[equal] if equal < len(one.margins) else float("inf")
    return Comparison(equal, len(one.tokens), margin, noise)


def ask(server: Server, case: Case) -> Answer:
    path, body = case
    response = server.post(path, body)
    if response.status_code != 200:
        raise RuntimeError(f"{path} answered {response.status_code}: {response.text[:500]}")
    return Answer.of(response.json()["choices"][0])


def ask_all(server: Server) -> dict[str, Answer]:
    return {name: ask(server, case) for name, case in PROMPTS.items()}
