"""``timeouts:``: how long anything may take, in seconds."""

from pydantic import Field

from serve_app.config.base import Strict


class Timeouts(Strict):
    request_s: float = Field(600.0, gt=0, description="A request without a first token by then is answered 504.")
    encode_s: float = Field(30.0, gt=0, description="Time for one attempt to have an encoder encode an item.")
    media_fetch_s: float = Field(30.0, gt=0, description="Time to fetch one item from a URL, redirects included.")
    startup_s: float = Field(
        3600.0,
        gt=0,
        description="Time for all stages to load before the start-up fails, and for a replica to start in.",
    )
    hang_s: float = Field(
        600.0,
        gt=0,
        description="An engine without a sign of life for so long is taken to hang: its replica is replaced.",
    )
    drain_s: float = Field(
        300.0, gt=0, description="Time for a replica that goes away to finish what it holds; then it is killed."
    )
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        description="Time for which an ingress replica that goes away still takes requests, while `/-/healthz` already says "
        "503 to load balancers (`http: replicas`).",
    )
