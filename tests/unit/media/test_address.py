"""Only addresses of the public Internet are dialled for a client."""

import pytest

from serve_app.media.address import may_dial

PRIVATE = [
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "fc00::1",
    "fd12:3456::1",
    "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:c0a8:101",
    "64:ff9b::10.0.0.1",
    "64:ff9b::7f00:1",
]

NEVER = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::2",
    "::127.0.0.1",
    "::8.8.8.8",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:2::1",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "3fff::1",
    "64:ff9b:1::1",
    "64:ff9b:1::8.8.8.8",
    "64:ff9b::169.254.169.254",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "100::1",
    "5f00::1",
    "4000::1",
]

NO_ADDRESS = [
    "",
    "localhost",
    "2130706433",
    "0x7f.1",
    "0177.0.0.1",
    "127.1",
    "8.8.8.8 ",
    "[::1]",
    "8.8.8.8/32",
    "8.8.8",
]

PUBLIC = [
    "8.8.8.8",
    "93.184.215.14",
    "1.1.1.1",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "172.15.0.1",
    "172.32.0.1",
    "192.0.1.1",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "169.253.0.1",
    "169.255.0.1",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
    "2a00:1450:4001::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2620:4f:8000::1",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_is_dialled_only_where_allowed(address: str) -> None:
    assert not may_dial(address)
    assert may_dial(address, allow_private=True)


@pytest.mark.parametrize("address", NEVER + NO_ADDRESS)
def test_special_address_is_never_dialled(address: str) -> None:
    assert not may_dial(address)
    assert not may_dial(address, allow_private=True)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_dialled(address: str) -> None:
    assert may_dial(address)
