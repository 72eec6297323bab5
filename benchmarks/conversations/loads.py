"""What people ask: conversations with pictures, prompts that share nothing, prompts that share their beginning.

A session is one conversation. All of it follows from the load, a seed, and whose session it is. The answers in the history
are scripted, so each arm of a comparison gets the same prompts. Prefill has not computed those that the model gave either.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.streams import WORDS

SIDE = 896
"""Pixels of a picture's sides: 1,024 tokens, as with ``PIXELS``. A photo of one megapixel has 1,300."""
PIXELS = SIDE * SIDE
ANSWER_TOKENS = 16
KEPT = 5
"""Pictures in the window of a conversation."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A request of a conversation, and the seconds that its user thinks before."""

    think_s: float
    messages: list[Message]


@dataclass(frozen=True)
class Load:
    """``users`` at a time, each with one session after another; those after the first ``warm_up`` count."""

    name: str
    users: int
    sessions: int
    warm_up: int = 1
    turns: int = 1
    think_s: float = 0.0
    """The mean of exponential times."""
    pictures: str = ""
    """``first``: all come with the first turn. ``each``: one with every turn, and the last ones are kept."""
    system: int = 0
    """Words of the system prompt that all share; 0: each session has its own, from the first word."""
    question: tuple[int, int] = (40, 40)
    """Words of a turn: at least, at most."""
    opening: int = 0
    """Words of the first turn besides."""
    answer: int = ANSWER_TOKENS
    """Its tokens."""
    kept: int = KEPT
    side: int = SIDE

    @property
    def requests(self) -> int:
        return self.users * self.sessions * self.turns


def words(count: int, seed: str) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def turns(load: Load, user: int, number: int) -> int:
    """Turns of a user's session. The first ones are cut, each elsewhere, so that not all users begin at the same time."""
    return load.turns if number else 1 + user % load.turns


def session(load: Load, seed: int, user: int, number: int) -> Iterator[Turn]:
    """The turns of a user's session, in order."""
    own = f"{load.name} {seed} {user} {number}"
    think = random.Random(f"{own} think")
    system = words(load.system, load.name) if load.system else f"{think.random()} {own}"
    said: list[tuple[list[Message], str]] = []
    """Pictures and text of each turn so far."""
    for turn in range(turns(load, user, number)):
        count = random.Random(f"{own} {turn} length").randint(*load.question) + (0 if turn else load.opening)
        said.append((pictures(load, own, turn), words(count, f"{own} {turn}")))
        think_s = think.expovariate(1 / load.think_s) if load.think_s else 0.0
        yield Turn(think_s, history(load, system, said, own))


def pictures(load: Load, own: str, turn: int) -> list[Message]:
    """Those that come with a turn."""
    from tools.harness.media import image_url

    count = {"first": 0 if turn else load.kept, "each": 1, "": 0}[load.pictures]
    seeds = [random.Random(f"{own} {turn} picture {index}").getrandbits(48) for index in range(count)]
    return [{"type": "image_url", "image_url": {"url": image_url(seed, (load.side, load.side))}} for seed in seeds]


def history(load: Load, system: str, said: list[tuple[list[Message], str]], own: str) -> list[Message]:
    """The messages of a request: all turns so far, of their pictures the last ones."""
    messages: list[Message] = [{"role": "system", "content": system}]
    left = load.kept
    turns: list[list[Message]] = []
    for turn, (seen, text) in reversed(list(enumerate(said))):
        kept = seen[max(len(seen) - left, 0) :]
        left -= len(kept)
        turns.append([{"role": "user", "content": [*kept, {"type": "text", "text": text}]}])
        if turn + 1 < len(said):
            turns[-1].append({"role": "assistant", "content": words(load.answer, f"{own} {turn} answer")})
    return messages + [message for turn in reversed(turns) for message in turn]


SYSTEM = 400
CONVERSATIONS = Load("conversations", 12, 3, turns=8, think_s=4.0, pictures="first", system=SYSTEM)
MORE = Load("more conversations", 16, 3, turns=8, think_s=6.0, pictures="first", system=SYSTEM)
"""As many requests, of more users who think longer: their conversations fill 0.9 of the caches together."""
SLIDING = Load("sliding window", 12, 3, turns=8, think_s=4.0, pictures="each", system=SYSTEM)
NO_REUSE = Load("no reuse", 8, 32, warm_up=4, question=(300, 3000))
NO_REUSE_CALM = Load("no reuse, calm", 6, 20, warm_up=2, think_s=1.2, question=(300, 3000))
HOT = Load("hot prefix", 12, 32, warm_up=4, system=2000, question=(200, 600))
LENGTHS = [Load(f"alone, {count} words", 1, 5, turns=5, opening=count) for count in (850, 2600, 5250)]
