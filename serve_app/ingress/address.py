"""Where the ingress listens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Address:
    """Where Serve's ``http_options`` say, and which application is there."""

    host: str
    port: int
    app_name: str = ""
    prefix: str = ""
    """``route_prefix``, without a final slash."""
    root_path: str = ""
    keep_alive_s: int = 90
    tls: Mapping[str, Any] = field(default_factory=dict)
    """uvicorn's arguments."""
