"""The leases of KV blocks that wait at the ingress for a place at decode: prefill renews them meanwhile."""

from serve_app.handoff.waits import HandOffs
from serve_app.routing.handles import StageHandle


def leases(prefill: StageHandle, lease_s: float) -> HandOffs[str]:
    """Hand-offs go by prefill's ids of their requests."""

    async def lost(waiting: list[str]) -> set[str]:
        replies = await prefill.broadcast("renew", waiting, timeout_s=lease_s / 3)
        return {request for ended in replies if not isinstance(ended, Exception) for request in ended}

    return HandOffs(lease_s / 6, lease_s / 3, lost, "waited for a place until the lease of its KV blocks was over")
