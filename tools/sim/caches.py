"""The prefix cache of a prefill replica: blocks of the last prompts, as vLLM keeps them."""

from collections import OrderedDict
from collections.abc import Sequence

from serve_app.routing.prefix import BLOCK, Prefix


class BlockCache:
    """Blocks of prompts that run are pinned. Of the others the one that was freed first makes room, of a prompt its tail.

    Where all blocks are pinned the cache grows: prefill's memory bounds nothing here.
    """

    def __init__(self, tokens: int) -> None:
        self._most = tokens // BLOCK
        self._pins: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()  # the next to go first

    def __len__(self) -> int:
        return len(self._pins) + len(self._free)

    def begin(self, prefix: Prefix) -> int:
        """A prompt runs from now on. Returns the tokens that need not be computed; the last one always is."""
        if not self._most:
            return 0
        cached = 0
        for key in prefix.keys:
            if key not in self._pins and key not in self._free:
                break
            cached += 1
        for key in prefix.keys:
            self._free.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
        while self._free and len(self) > self._most:
            self._free.popitem(last=False)
        return min(cached, (prefix.tokens - 1) // BLOCK) * BLOCK

    def end(self, keys: Sequence[int]) -> None:
        """A prompt has run."""
        for key in reversed(keys) if self._most else ():
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._free[key] = None
