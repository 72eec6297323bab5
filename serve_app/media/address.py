"""Which addresses the ingress may dial for a client's URL.

A URL is written by a stranger, and the ingress stands inside a network: it could be made to ask the cluster's own
services, or the cloud's metadata service for credentials (server-side request forgery). So only addresses that IANA's
registries of special-purpose addresses call globally reachable are dialled. They are listed here, because what
``ipaddress`` calls global differs between patch releases of Python 3.11 (CVE-2024-4032).

- https://www.iana.org/assignments/iana-ipv4-special-registry
- https://www.iana.org/assignments/iana-ipv6-special-registry
"""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

PRIVATE = [
    ip_network(network)
    for network in (
        "10.0.0.0/8",  # RFC 1918
        "172.16.0.0/12",  # RFC 1918
        "192.168.0.0/16",  # RFC 1918
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598; pods on some clouds
        "127.0.0.0/8",
        "::1/128",
        "fc00::/7",  # unique local, RFC 4193
    )
]
"""Networks that ``media.allow_private_addresses`` opens."""

NEVER = [
    ip_network(network)
    for network in (
        # Metadata services. Most stand at link-local addresses, which are refused anyway; these do not.
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure's wire server
        "192.0.0.192/32",  # Oracle
        "fd00:ec2::254/128",  # AWS
        "fd20:ce::254/128",  # Google
        "0.0.0.0/8",  # this network; 0.0.0.0 reaches the machine itself
        "169.254.0.0/16",  # link-local
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, RFC 7526
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "2001::/23",  # IETF protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address
        "3fff::/20",  # documentation
    )
]

GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that IANA has given out; link-local, multicast, site-local, mapped and compatible addresses lie outside."""

NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052: how an IPv6-only network reaches an IPv4 address, which stands in the last 32 bits."""


def may_dial(host: str, allow_private: bool = False) -> bool:
    """Whether an address may be dialled for a client. A text that is no address may not."""
    try:
        address = _unwrapped(ip_address(host))
    except ValueError:
        return False
    if any(address in network for network in NEVER):
        return False
    if any(address in network for network in PRIVATE):
        return allow_private
    return isinstance(address, IPv4Address) or address in GLOBAL_UNICAST


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for, where it is mapped (RFC 4291) or behind NAT64."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
