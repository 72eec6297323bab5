"""Where the items of a request came from, kept with the request from the rendering of its prompts to its last token.

An encoder's answer is needed twice: while vLLM renders the prompt, and in ``generate``, to which vLLM passes an item's hash
and fields and nothing else. In between vLLM goes through tasks of its own: their contexts are copies, and have the same
``Request``.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from serve_app.handoff import shaping
from serve_app.handoff.errors import HandoffLost
from serve_app.handoff.types import Item, Prompt, Source
from serve_app.stage import Stage


class Sources:
    """Of one request. What it keeps goes when the last of its users has ended, though contexts live on: that of a request
    which opened a connection to a media server, for as long as the connection."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], list[Source]] = {}
        self._users = 0

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def put(self, items: Iterable[tuple[str, Source]]) -> None:
        """Of the items, by hash, of one prompt that was rendered: of each one, however often it stands in the prompt."""
        for key, source in {(item_hash, source.reply is None): source for item_hash, source in items}.items():
            self._kept.setdefault(key, []).append(source)

    def of(self, prompt: Prompt, declared: Callable[[str], Collection[str]]) -> Prompt:
        """The prompt that goes to the engines, its items with their sources.

        Raises ``HandoffLost`` for an item that has neither a source nor pixels, of a model whose items can go without: no
        engine could encode it.
        """
        taken: dict[tuple[str, bool], Source | None] = {}

        def sourced(item: Item) -> Item:
            has_pixels = shaping.has_pixels(item, declared(item.modality))
            key = item.hash, has_pixels
            if key not in taken:
                taken[key] = self._take(key)
            if taken[key] is None and not has_pixels and declared(item.modality):
                raise HandoffLost(
                    Stage.ENCODER, f"answered for the item {item.hash}, and its answer is not kept any more"
                )
            return msgspec.structs.replace(item, source=taken[key])

        return msgspec.structs.replace(prompt, items=tuple(map(sourced, prompt.items)))

    def _take(self, key: tuple[str, bool]) -> Source | None:
        """Each prompt of a request takes one of its own, as an answer may serve one alone (``ec.shareable``). The last one
        stays: a beam search brings the same prompt again and again."""
        kept = self._kept.get(key)
        if not kept:
            return None
        return kept.pop() if len(kept) > 1 else kept[0]

    @contextmanager
    def used(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._leave()

    def use_until(self, task: asyncio.Task[object]) -> None:
        """A task may outlive the HTTP request, as a response that is made in the background does."""
        self._users += 1
        task.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._kept.clear()
