"""What an ingress replica takes on at a time: requests, items, bytes of processed pixels. Above that it says so at once.

Text is bound by the number of requests alone, so it keeps flowing when media are at their limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve_app.config import AdmissionConfig
from serve_app.errors import Overloaded
from serve_app.handoff import Item


class Admission:
    """Counts what is outstanding. One object per ingress replica."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self.requests = self.items = self.size_bytes = 0

    def check_request(self) -> None:
        """Before anything is rendered. Raises ``Overloaded``."""
        self._check("requests", self.requests, 1, self._config.max_requests)

    @contextmanager
    def admit(self, items: tuple[Item, ...]) -> Iterator[None]:
        """Hold the places of one request. Raises ``Overloaded`` where it does not fit in."""
        size_bytes = sum(size_of(item.data) for item in items)
        self.check_request()
        if items:
            self._check("media items", self.items, len(items), self._config.max_items)
            self._check("bytes of media", self.size_bytes, size_bytes, self._config.max_media_bytes)
        self.requests += 1
        self.items += len(items)
        self.size_bytes += size_bytes
        try:
            yield
        finally:
            self.requests -= 1
            self.items -= len(items)
            self.size_bytes -= size_bytes

    @staticmethod
    def _check(what: str, outstanding: int, more: int, limit: int) -> None:
        # A single request above the limit passes on an idle server: it could never be served otherwise.
        if outstanding and outstanding + more > limit:
            raise Overloaded(
                f"This server has {outstanding} {what} under way and takes {limit}: try again in a moment."
            )


def size_of(data: Any | None) -> int:
    """Bytes of the tensors of an item (vLLM's MultiModalKwargsItem); 0 for what is no tensor."""
    if data is None:
        return 0
    return sum(int(getattr(field.data, "nbytes", 0)) for field in data.values())
