"""Traffic that asks again: conversations, whose next prompt begins with the last one and its answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from serve_app.routing.prefix import BLOCK, Prefix
from tools.sim.traffic import Kind, Request, Traffic, request

FIVE_PICTURES = Kind(images=5, embeds=2_700, text_tokens=200, output_tokens=300)
MORE_TEXT = Kind(text_tokens=200, output_tokens=300)


@dataclass(frozen=True)
class Talk:
    """What conversations are like. Sizes and times scatter around their means."""

    system_tokens: int = 2_000
    """The same for all, and first in each prompt."""
    turns: int = 8
    first: Kind = FIVE_PICTURES
    later: Kind = MORE_TEXT
    window: int = 5
    """Images in a prompt at most: those before leave it, and the prompt begins anew after the system's part."""
    think_s: float = 10.0
    """Mean time from the end of an answer to the next prompt (exponential)."""

    @property
    def prompt_tokens(self) -> list[int]:
        """Of each turn, in the mean."""
        kinds = [self.first] + [self.later] * (self.turns - 1)
        images = [kind.images * kind.embeds for kind in kinds]
        text = [kind.text_tokens + kind.output_tokens for kind in kinds]
        most = self.window * max(self.first.embeds, self.later.embeds)
        return [
            self.system_tokens + min(sum(images[: turn + 1]), most) + sum(text[:turn]) + kind.text_tokens
            for turn, kind in enumerate(kinds)
        ]


@dataclass(slots=True)
class Conversation:
    turns: list[Request]
    """With the sizes of what is new in each."""
    think_s: list[float]


@dataclass(frozen=True)
class Conversations(Traffic):
    """Conversations begin as a Poisson process. Each turn comes a while after the last answer has ended; it comes to any
    ingress replica. A conversation of which a request fails ends."""

    talk: Talk = field(default_factory=Talk)

    def requests(self, seed: int) -> Iterator[Request]:
        """The first turn of each. ``then`` gives the next."""
        chance = np.random.default_rng(seed)
        now, number = 0.0, 0
        while (now := now + chance.exponential(1 / self.peak)) < self.seconds:
            kinds = [self.talk.first] + [self.talk.later] * (self.talk.turns - 1)
            first = number * self.talk.turns
            turns = [request(first + turn, now, kind, chance) for turn, kind in enumerate(kinds)]
            think_s = list(chance.exponential(self.talk.think_s, len(turns)))
            yield self._turn(Conversation(turns, think_s), 0, now)
            number += 1

    def then(self, ended: Request, now: float) -> Request | None:
        conversation, turn = ended.conversation, ended.number % self.talk.turns
        assert isinstance(conversation, Conversation)
        at = now + conversation.think_s[turn]
        if turn + 1 == self.talk.turns or ended.outcome != "ok" or at >= self.seconds:
            return None
        return self._turn(conversation, turn + 1, at)

    def _turn(self, conversation: Conversation, turn: int, at: float) -> Request:
        """A prompt. Items that it has from earlier turns are encoded already: they count as text."""
        new, before = conversation.turns[turn], conversation.turns[:turn]
        images = [embeds for each in before for embeds in each.embeds]
        gone = max(len(images) + len(new.embeds) - self.talk.window, 0)
        text = sum(each.text_tokens + each.output_tokens for each in before) + sum(images[gone:])
        text += self.talk.system_tokens + new.text_tokens
        made = Request(new.number, at, new.embeds, text, new.output_tokens, conversation=conversation)
        shared, whole = self.talk.system_tokens // BLOCK, made.prompt_tokens // BLOCK
        own = ((new.number // self.talk.turns + 1) << 8 | gone) << 24
        keys = (*range(min(shared, whole)), *range(own + shared, own + whole))
        made.prefix = Prefix(keys, made.prompt_tokens)
        return made


def conversations(name: str, rate: float, seconds: float, talk: Talk) -> Conversations:
    """``rate``: conversations per second."""
    return Conversations(name, seconds, lambda _: rate, rate, (), talk=talk)
