"""What of a prompt a replica's prefix cache holds, as an ingress replica knows it: from what it sent there.

A prompt is cut into blocks of ``BLOCK`` tokens. A block's key covers its tokens, its items' hashes and all blocks before
it, as in vLLM's own cache, so equal keys are equal prefixes. Pure functions and bookkeeping: the simulation (``tools/sim``)
has the same.
"""

import hashlib
from array import array
from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serve_app.handoff.types import Prompt

BLOCK = 64
"""Tokens. An engine's blocks have 16 to 128: what it finds may differ by as much from what is expected of it."""

LEARNING = 0.1
"""Weight of the latest answer in a share that is learnt."""


class Prefix(NamedTuple):
    """A prompt by its blocks."""

    keys: tuple[int, ...]
    """One for each whole block."""
    tokens: int
    """Of the whole prompt."""
    session: str = ""
    """What its conversation is called, if the client says."""


def prefix_of(prompt: Prompt, session: str | None = None, apart: str = "") -> Prefix:
    """``apart``: what else keeps KV blocks apart, such as an adapter. Prompts with different salts share no key."""
    secret = repr((prompt.cache_salt, apart)).encode(errors="surrogatepass")
    so_far, keys = hashlib.blake2b(secret, digest_size=8), []
    tokens = memoryview(array("I", prompt.token_ids)).cast("B")
    coming = sorted((item.offset, item.hash) for item in prompt.items)[::-1]
    for end in range(BLOCK, len(prompt.token_ids) + 1, BLOCK):
        while coming and coming[-1][0] < end:
            so_far.update(repr(coming.pop()).encode())
        so_far.update(tokens[4 * (end - BLOCK) : 4 * end])
        keys.append(int.from_bytes(so_far.digest()))
    named = hashlib.blake2b(f"{secret!r} {session}".encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return Prefix(tuple(keys), len(prompt.token_ids), named if session else "")


class Held:
    """The blocks that one replica holds, as far as is known."""

    def __init__(self) -> None:
        self._used: OrderedDict[int, int] = OrderedDict()  # key → ``_written`` at its last use, oldest first
        self._written = 0
        self._found: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._used)

    def leading(self, keys: Sequence[int]) -> int:
        """How many of the first blocks it holds. Of a prompt it forgets the last block first, so halving finds them."""
        if not keys or keys[0] not in self._used:
            return 0
        return bisect(keys, False, key=self._lacks)

    def _lacks(self, key: int) -> bool:
        return key not in self._used

    def use(self, keys: Sequence[int], most: int) -> None:
        """The replica runs a prompt of these blocks. ``most``: blocks to remember; the oldest are forgotten."""
        self._written += len(keys) - self.leading(keys)
        for key in reversed(keys):  # of a prompt, a cache drops the last block first
            self._used[key] = self._written
            self._used.move_to_end(key)
        while len(self._used) > most:
            self._used.popitem(last=False)

    def drop(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._used.pop(key, None)

    # How long a replica keeps a block depends on its cache and on what others send there. It is learnt, by age.

    def age(self, keys: Sequence[int], depth: int) -> int:
        """The age of the last of the first ``depth`` blocks, which it holds: how many were written since its last use, to
        the power of two."""
        return (self._written - self._used[keys[depth - 1]]).bit_length() if depth else 0

    def share(self, age: int) -> float:
        """The share that is found of blocks of this age. Nothing known: all."""
        return self._found.get(age, 1.0)

    def learn(self, age: int, share: float) -> None:
        self._found[age] = self.share(age) + LEARNING * (share - self.share(age))
