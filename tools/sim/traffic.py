"""What clients ask for: kinds of requests, and when they come."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import cos, pi

import numpy as np

from serve_app.routing.prefix import Prefix


@dataclass(frozen=True)
class Kind:
    """Requests of one kind. Sizes scatter around their means (log-normal)."""

    images: int = 0
    embeds: int = 0
    """Mean of one image or video: visual tokens."""
    text_tokens: int = 300
    output_tokens: int = 250
    scatter: float = 0.4
    """Standard deviation of the logarithm of each size."""


@dataclass(slots=True)
class Request:
    number: int
    at: float
    embeds: tuple[int, ...]
    """Of its items."""
    text_tokens: int
    output_tokens: int
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None
    """``ok``, or why it failed. Set once."""
    at_prefill: int = 0
    """Items that prefill encoded."""
    prefix: Prefix | None = None
    """None: it shares nothing with others."""
    cached_tokens: int = 0
    """Of its prompt, at prefill."""
    prefilled_by: str = ""
    conversation: object = None
    """What its traffic needs for the next turn."""

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + sum(self.embeds)

    @property
    def embeds_share(self) -> float:
        return sum(self.embeds) / self.prompt_tokens

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.at

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        assert self.first_token_at is not None and self.ended_at is not None
        return (self.ended_at - self.first_token_at) / max(self.output_tokens - 1, 1)


@dataclass(frozen=True)
class Traffic:
    """Requests per second over time, and the share of each kind over time."""

    name: str
    seconds: float
    rate: Callable[[float], float]
    peak: float
    """``rate`` is never above."""
    kinds: tuple[Kind, ...]
    shares: Callable[[float], tuple[float, ...]] = field(default=lambda _: (1.0,))

    def requests(self, seed: int) -> Iterator[Request]:
        """A Poisson process, thinned to the rate of the moment."""
        chance = np.random.default_rng(seed)
        now, number = 0.0, 0
        while True:
            now += chance.exponential(1 / self.peak)
            if now >= self.seconds:
                return
            if chance.random() * self.peak < self.rate(now):
                shares = self.shares(now)
                kind = self.kinds[chance.choice(len(self.kinds), p=shares) if len(shares) > 1 else 0]
                yield request(number, now, kind, chance)
                number += 1

    def then(self, ended: Request, now: float) -> Request | None:
        """What the client of a request asks next."""
        return None


def request(number: int, now: float, kind: Kind, chance: np.random.Generator) -> Request:
    def size(mean: int) -> int:
        if not kind.scatter:
            return mean
        return max(round(mean * chance.lognormal(-(kind.scatter**2) / 2, kind.scatter)), 1)

    embeds = tuple(size(kind.embeds) for _ in range(kind.images))
    return Request(number, now, embeds, size(kind.text_tokens), size(kind.output_tokens))


def steady(name: str, rate: float, seconds: float, kind: Kind) -> Traffic:
    return Traffic(name, seconds, lambda _: rate, rate, (kind,))


def burst(text: float, images: float, kinds: tuple[Kind, Kind], begins: float, ends: float, seconds: float) -> Traffic:
    """Text at ``text`` requests per second all the time, requests with images at ``images`` from ``begins`` to ``ends``."""

    def now_images(now: float) -> float:
        return images if begins <= now < ends else 0.0

    def shares(now: float) -> tuple[float, float]:
        part = now_images(now) / (text + now_images(now))
        return 1 - part, part

    return Traffic("burst", seconds, lambda now: text + now_images(now), text + images, kinds, shares)


def day(peak: float, kinds: tuple[Kind, Kind], day_s: float) -> Traffic:
    """A day in ``day_s`` seconds: quiet at night, most in the afternoon; no images in the first and last quarter."""

    def rate(now: float) -> float:
        return peak * (0.15 + 0.85 * (1 - cos(2 * pi * now / day_s)) / 2)

    def shares(now: float) -> tuple[float, float]:
        images = 0.6 if 0.25 <= now / day_s < 0.75 else 0.0
        return 1 - images, images

    return Traffic("day", day_s, rate, peak, kinds, shares)
