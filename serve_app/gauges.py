"""Gauges that Ray does not forget.

Ray drops a gauge that is not told again within twice ``metrics_report_interval_ms`` (10 s, at least 1 s): what an idle
engine or ingress told last would be gone from a dashboard. So gauges are set here, and Ray is told the latest values from a
thread, as Ray Serve does with its own.
"""

import threading
import time
from typing import Any

TELL_S = 1.0


class Gauges:
    """The latest values of gauges of ``ray.util.metrics`` in this process, told to Ray every ``interval_s``."""

    def __init__(self, interval_s: float = TELL_S) -> None:
        self._interval_s = interval_s
        self._latest: dict[tuple[int, frozenset[tuple[str, str]]], tuple[Any, float, dict[str, str]]] = {}
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    def set(self, gauge: Any, value: float, tags: dict[str, str]) -> None:
        """Of what is set between two tellings Ray gets the last. Not to be called by two threads at once."""
        self._latest[id(gauge), frozenset(tags.items())] = gauge, value, tags
        if self._thread.ident is None:
            self._thread.start()

    def tell(self) -> None:
        for gauge, value, tags in list(self._latest.values()):
            gauge.set(value, tags)

    def _run(self) -> None:
        while True:
            self.tell()
            time.sleep(self._interval_s)
