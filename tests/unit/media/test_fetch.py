"""What may be fetched, what it may cost, and what the client hears if not."""

import asyncio
import gc
import gzip
import os
import socket
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError

from serve_app.config import MediaConfig, MediaLimits
from serve_app.media.fetch import Fetcher, decode_base64, read_file, split_data_url
from tests.unit.web import PUBLIC, Handler, Web, media_config, redirect, response

PICTURE = b"the bytes of a picture"
CLOSED = "has no address that is open to this server"


def fetch_from(web: Web, url: str, **rules: Any) -> bytes:
    async def main() -> bytes:
        async with web:
            fetcher = web.fetcher(media_config(**rules))
            try:
                return await fetcher.fetch(url)
            finally:
                await fetcher.close()

    return asyncio.run(main())


def fetch(url: str, handlers: dict[str, Handler] | None = None, **rules: Any) -> bytes:
    return fetch_from(Web(handlers or {"/a.png": response(PICTURE)}), url, **rules)


def refusal(url: str, handlers: dict[str, Handler] | None = None, **rules: Any) -> VLLMError:
    with pytest.raises(VLLMError) as caught:
        fetch(url, handlers, **rules)
    return caught.value


# ---- what is fetched


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "HTTP://EXAMPLE.org/a.png",
        "http://example.org./a.png",
        "http://example.org:8080/a.png",
        "http://bücher.example/a.png",
        "http://xn--bcher-kva.example/a.png",
        "http://example.org/a.png#part",
        f"http://{PUBLIC}/a.png",
    ],
)
def test_public_url_is_fetched(url: str) -> None:
    assert fetch(url) == PICTURE


def test_request_is_a_plain_get_that_tells_nothing_of_other_clients() -> None:
    async def main() -> Web:
        async with Web({"/a.png": response(PICTURE, Set_Cookie="a=b")}) as web:
            fetcher = web.fetcher()
            for _ in range(2):
                await fetcher.fetch("http://example.org/a.png")
            await fetcher.close()
            return web

    for head in asyncio.run(main()).requests:
        assert head.startswith("GET /a.png HTTP/1.1")
        assert "accept-encoding: identity" in head.lower()
        assert not any(word in head.lower() for word in ("cookie", "authorization", "referer"))


def test_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch("http://example.org/a.png") == PICTURE


def test_connection_is_reused_and_closed_without_a_warning() -> None:
    async def main() -> Web:
        async with Web({"/": response(PICTURE, Connection="keep-alive")}) as web:
            fetcher = web.fetcher()
            for _ in range(3):
                assert await fetcher.fetch("http://example.org/") == PICTURE
            await fetcher.close()
            await fetcher.close()
            return web

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        web = asyncio.run(main())
        gc.collect()
    assert len(web.requests) == 3
    assert web.dialled == [PUBLIC]


# ---- which addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://127.0.0.1:8265/api/version",
        "http://10.0.0.1/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/a.png",
        "http://[::]/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://[::ffff:7f00:1]/a.png",
        "http://[64:ff9b::7f00:1]/a.png",
        "http://[2002:7f00:1::]/a.png",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://[fe80::1%25eth0]/a.png",
        "http://[v1.x]/a.png",
        "http://0.0.0.0/a.png",
        "http://100.64.0.1/a.png",
        "http://224.0.0.1/a.png",
        "http://127。0。0。1/a.png",  # IDN maps these to dots, and the next to digits
        "http://①②⑦.0.0.1/a.png",
        "http://private.test/a.png",
        "http://PRIVATE.test./a.png",
        "http://rebound.test/a.png",
        "http://mixed.test/a.png",
        "http://metadata.test/a.png",
        "http://mapped.test/a.png",
        "http://v6.test/a.png",
        "http://nowhere.test/a.png",
        "http://exa mple.org/a.png",
        "http://%31%32%37.0.0.1/a.png",
    ],
)
def test_address_that_is_not_public_is_a_400_like_a_name_that_leads_nowhere(url: str) -> None:
    web = Web({"/a.png": response(PICTURE)})
    with pytest.raises(VLLMValidationError) as caught:
        fetch_from(web, url)
    assert str(caught.value) == str(refusal("http://nowhere.test/")).replace("http://nowhere.test/", url)
    assert web.dialled == web.requests == []


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.1", "0", "localhost", "a..b", "a" * 300],
)
def test_host_that_only_the_system_understands_is_checked_too(host: str) -> None:
    """With the system's own resolver, which reads numbers in any notation."""

    async def main() -> None:
        fetcher = Fetcher(MediaConfig(), MediaLimits(), 30)
        try:
            await fetcher.fetch(f"http://{host}:1/")
        finally:
            await fetcher.close()

    with pytest.raises(VLLMValidationError, match=f"{CLOSED}|is no valid URL"):
        asyncio.run(main())


def test_name_that_changes_its_address_between_requests_is_refused() -> None:
    async def main() -> list[str]:
        async with Web({"/a.png": response(PICTURE)}) as web:
            fetcher = web.fetcher()
            assert await fetcher.fetch("http://example.org/a.png") == PICTURE
            web.names.names["example.org"] = ["127.0.0.1"]
            await fetcher.close()  # and with it the cache of names
            with pytest.raises(VLLMValidationError, match=CLOSED):
                await fetcher.fetch("http://example.org/a.png")
            return web.dialled

    assert asyncio.run(main()) == [PUBLIC]


def test_address_is_checked_where_the_socket_is_made() -> None:
    """Whatever a resolver says: the check is on the address that is dialled."""

    def guard(address: str, **rules: Any) -> socket.socket:
        return Fetcher(MediaConfig(**rules), MediaLimits(), 30)._guarded_socket(
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        )

    guard("8.8.8.8").close()
    guard("127.0.0.1", allow_private_addresses=True).close()
    for address, rules in (("127.0.0.1", {}), ("169.254.169.254", {"allow_private_addresses": True})):
        with pytest.raises(Exception, match=address):
            guard(address, **rules)


def test_private_address_is_fetched_where_the_operator_allows_it() -> None:
    assert fetch("http://private.test/a.png", allow_private_addresses=True) == PICTURE
    assert CLOSED in str(refusal("http://metadata.test/a.png", allow_private_addresses=True))


def test_names_that_cannot_be_looked_up_now_are_a_422() -> None:
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    with pytest.raises(VLLMUnprocessableEntityError, match="try again"):
        fetch_from(Web({}, error), "http://example.org/a.png")


# ---- which URLs and domains


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@example.org/a.png", "user name or password"),
        ("http://user@example.org/a.png", "user name or password"),
        ("http://example.org@10.0.0.1/a.png", "user name or password"),
        ("http://", "names no host"),
        ("http:///a.png", "names no host"),
        ("http:a.png", "names no host"),
        ("http://example.org\\@10.0.0.1/", "no valid URL"),
        ("http://example.org:99999/", "no valid URL"),
        ("http://example.org:port/", "no valid URL"),
        ("http://[::1/", "no valid URL"),
        ("http://loc\u00adalhost/", "no valid URL"),
    ],
)
def test_url_that_may_not_be_fetched_is_a_400(url: str, words: str) -> None:
    error = refusal(url)
    assert isinstance(error, VLLMValidationError)
    assert words in str(error) and "secret" not in str(error)


@pytest.mark.parametrize(
    ("allowed", "host", "ok"),
    [
        (["example.org"], "example.org", True),
        (["Example.ORG."], "example.org.", True),
        (["example.org"], "cdn.example.org", False),
        ([".example.org"], "cdn.example.org", True),
        ([".example.org"], "example.org", True),
        ([".example.org"], "badexample.org", False),
        ([".example.org"], "example.org.evil.test", False),
        (["other.test", ".example.org"], "cdn.example.org", True),
        (["bücher.example"], "xn--bcher-kva.example", True),
        ([PUBLIC], PUBLIC, True),
        ([PUBLIC], "example.org", False),
        (["private.test"], "other.test", False),
    ],
)
def test_only_allowed_domains_are_fetched(allowed: list[str], host: str, ok: bool) -> None:
    if ok:
        assert fetch(f"http://{host}/a.png", allowed_domains=allowed) == PICTURE
    else:
        assert "`media.allowed_domains`" in str(refusal(f"http://{host}/a.png", allowed_domains=allowed))


def test_allowed_domain_does_not_open_a_private_address() -> None:
    assert CLOSED in str(refusal("http://private.test/a.png", allowed_domains=["private.test"]))


@pytest.mark.parametrize(
    "domain", ["", ".", "https://example.org", "example.org/a", "*.example.org", "a:80", "a@b", "a b"]
)
def test_domain_that_is_no_host_is_refused_at_the_start(domain: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        MediaConfig(allowed_domains=[domain])


# ---- redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("to", ["/b.png", "b.png", "http://other.test/b.png", "//cdn.example.org/b.png"])
def test_redirect_is_followed(to: str, status: str) -> None:
    assert fetch("http://example.org/a", {"/a": redirect(to, status), "/b.png": response(PICTURE)}) == PICTURE


@pytest.mark.parametrize(
    ("to", "kind", "words"),
    [
        ("http://127.0.0.1/b", VLLMValidationError, CLOSED),
        ("http://private.test/b", VLLMValidationError, CLOSED),
        ("http://169.254.169.254/latest/", VLLMValidationError, CLOSED),
        ("http://[::1]/b", VLLMValidationError, CLOSED),
        ("//rebound.test/b", VLLMValidationError, CLOSED),
        ("file:///etc/passwd", VLLMValidationError, "not http: or https:"),
        ("data:image/png;base64,AAAA", VLLMValidationError, "not http: or https:"),
        ("ftp://example.org/b", VLLMValidationError, "not http: or https:"),
        ("gopher://127.0.0.1:6379/_INFO", VLLMValidationError, "not http: or https:"),
        ("http://user:secret@example.org/b", VLLMValidationError, "user name or password"),
        ("http://[::1", VLLMValidationError, "no valid URL"),
        ("http://example.org:99999/", VLLMValidationError, "no valid URL"),
        ("/a", VLLMUnprocessableEntityError, "more than 5 times"),
        ("/missing", VLLMUnprocessableEntityError, "answered 404"),
    ],
)
def test_redirect_is_checked_like_the_url(to: str, kind: type, words: str) -> None:
    error = refusal("http://example.org/a", {"/a": redirect(to)})
    assert type(error) is kind
    assert words in str(error)
    assert not any(
        hidden in str(error) for hidden in ("127.0.0.1", "private.test", "rebound", "169.254", "passwd", "::1")
    )


def test_redirect_to_another_domain_is_refused_without_its_name() -> None:
    handlers: dict[str, Handler] = {"/a": redirect("http://other.test/b.png"), "/b.png": response(PICTURE)}
    error = refusal("http://example.org/a", handlers, allowed_domains=[".example.org"])
    assert "`media.allowed_domains`" in str(error) and "other.test" not in str(error)


def test_redirects_are_counted() -> None:
    chain: dict[str, Handler] = {f"/{n}": redirect(f"/{n + 1}") for n in range(3)} | {"/3": response(PICTURE)}
    assert fetch("http://example.org/0", chain, max_redirects=3) == PICTURE
    assert "more than 2 times" in str(refusal("http://example.org/0", chain, max_redirects=2))
    assert "more than 0 times" in str(refusal("http://example.org/2", chain, max_redirects=0))


# ---- bytes and time

LIMIT = 1024


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 512)
        await writer.drain()


async def endless_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"200\r\n" + b"x" * 512 + b"\r\n")
        await writer.drain()


BOMB = gzip.compress(bytes(64 * 1024 * 1024))
ZLIB_BOMB = zlib.compress(bytes(64 * 1024 * 1024))


@pytest.mark.parametrize(
    "handler",
    [
        response(b"x" * (LIMIT + 1)),
        response(b"", Content_Length=str(10**12)),
        response(b"x" * (LIMIT + 1), Content_Length="").replace(b"Content-Length: \r\n", b""),
        endless,
        endless_chunks,
        response(BOMB, Content_Encoding="gzip"),
        response(ZLIB_BOMB, Content_Encoding="deflate"),
        response(gzip.compress(b"x" * (LIMIT + 1)), Content_Encoding="gzip"),
    ],
    ids=["longer", "announced", "not announced", "endless", "chunked", "gzip bomb", "deflate bomb", "gzip"],
)
def test_body_over_the_limit_is_a_400(handler: Handler) -> None:
    error = refusal("http://example.org/a", {"/a": handler}, max_bytes=LIMIT)
    assert isinstance(error, VLLMValidationError)
    assert f"larger than the {LIMIT} bytes" in str(error)


def test_body_at_the_limit_is_fetched_compressed_or_not() -> None:
    body = b"x" * LIMIT
    for handler in (response(body), response(gzip.compress(body), Content_Encoding="gzip")):
        assert fetch("http://example.org/a", {"/a": handler}, max_bytes=LIMIT) == body


async def forever(writer: asyncio.StreamWriter) -> None:
    await writer.wait_closed()


async def silent_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
    await writer.drain()
    await forever(writer)


async def silent_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-")
    await writer.drain()
    await forever(writer)


@pytest.mark.parametrize("handler", [forever, silent_head, silent_body])
@pytest.mark.parametrize("path", ["/slow", "/to-slow"])
def test_whole_fetch_has_one_time_limit(handler: Handler, path: str) -> None:
    handlers = {"/slow": handler, "/to-slow": redirect("/slow")}
    error = refusal(f"http://example.org{path}", handlers, media_fetch_s=0.2)
    assert isinstance(error, VLLMUnprocessableEntityError)
    assert str(error) == f"Could not fetch http://example.org{path}: it took too long."


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (response(b"", "404 Not Found"), "answered 404"),
        (response(b"", "403 Forbidden"), "answered 403"),
        (response(b"", "500 Oops"), "answered 500"),
        (response(b"", "304 Not Modified"), "answered 304"),
        (response(b"", "302 Found"), "answered 302"),
        (response(b"short", Content_Length="100"), "the connection failed"),
        (response(b"x" * 5000, Content_Length="4"), "the connection failed"),
        (response(b"no gzip", Content_Encoding="gzip"), "the connection failed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "the connection failed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "the connection failed"),
        (b"", "the connection failed"),
    ],
)
def test_what_cannot_be_fetched_is_a_422(handler: Handler, words: str) -> None:
    error = refusal("http://example.org/a", {"/a": handler})
    assert isinstance(error, VLLMUnprocessableEntityError)
    assert words in str(error)
    assert str(error).startswith("Could not fetch http://example.org/a: ")


def test_https_that_is_none_is_a_422() -> None:
    error = refusal("https://example.org/a.png")
    assert isinstance(error, VLLMUnprocessableEntityError)


def test_long_url_is_cut_in_messages() -> None:
    assert len(str(refusal("http://example.org/" + "x" * 5000))) < 200


# ---- data: URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64,AAAA", ("image/png", "AAAA")),
        ("DATA:Image/PNG;charset=x;BASE64,AAAA", ("image/png", "AAAA")),
        ("data:;base64,", ("", "")),
        ("data:video/jpeg;base64,AAAA,BBBB", ("video/jpeg", "AAAA,BBBB")),
    ],
)
def test_data_url_is_split(url: str, expected: tuple[str, str]) -> None:
    assert split_data_url(url) == expected


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:image/png,abc", "data:base64,abc", "data:,abc"]
)
def test_data_url_without_base64_is_a_400(url: str) -> None:
    with pytest.raises(VLLMValidationError, match="must look like"):
        split_data_url(url)


def test_base64_is_measured_before_it_is_decoded() -> None:
    limits = MediaLimits(max_bytes=1024)
    assert decode_base64("AAAA" * 341, limits) == bytes(1023)
    with pytest.raises(VLLMValidationError, match="larger than the 1024 bytes"):
        decode_base64("@" * 1400, limits)
    for text in ("@@@@", "AAA", "AA AA", "AAAA,BBBB", "ÄÄÄÄ"):
        with pytest.raises(VLLMValidationError, match="not valid base64"):
            decode_base64(text, limits)


# ---- file: URLs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "sub dir").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "secret").write_bytes(b"secret")
    (allowed / "a.png").write_bytes(PICTURE)
    (allowed / "sub dir" / "ä.png").write_bytes(PICTURE)
    (allowed / "big").write_bytes(bytes(2000))
    (allowed / "inner").symlink_to("a.png")
    (allowed / "outer").symlink_to("../secret")
    (allowed / "out-dir").symlink_to("..")
    (allowed / "zero").symlink_to("/dev/zero")
    (allowed / "loop").symlink_to("loop")
    os.mkfifo(allowed / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        here = os.open(allowed, os.O_RDONLY)
        unix.bind(f"/proc/self/fd/{here}/socket")  # a path short enough
        os.close(here)
    return allowed


def read(folder: Path | None, url: str) -> bytes:
    return read_file(url, folder, MediaLimits(max_bytes=1024))


@pytest.mark.parametrize(
    "name", ["a.png", "inner", "sub%20dir/%C3%A4.png", "./sub dir/../a.png", "out-dir/allowed/a.png"]
)
@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://", "file:"])
def test_file_in_the_folder_is_read(folder: Path, start: str, name: str) -> None:
    assert read(folder, f"{start}{folder}/{name}") == PICTURE


def test_folder_may_itself_be_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert read(link, f"file://{link}/a.png") == read(link, f"file://{folder}/a.png") == PICTURE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../secret", "is not in the folder"),
        ("..%2Fsecret", "is not in the folder"),
        ("%2e%2e/secret", "is not in the folder"),
        ("../allowed-too/secret", "is not in the folder"),
        ("outer", "is not in the folder"),
        ("out-dir/secret", "is not in the folder"),
        ("zero", "is not in the folder"),
        ("", "is not in the folder"),
        ("../../../../../../../../etc/passwd", "is not in the folder"),
        ("gone", "no such file"),
        ("a.png/b", "no such file"),
        ("sub dir", "no such file"),
        ("pipe", "no such file"),
        ("socket", "no such file"),
        ("loop", "no such file"),
        ("a%00.png", "no such file"),
        ("x" * 5000, "no such file"),
        ("big", "larger than the 1024 bytes"),
    ],
)
def test_file_that_may_not_be_read_is_a_400(folder: Path, name: str, words: str) -> None:
    with pytest.raises(VLLMValidationError, match=words) as caught:
        read(folder, f"file://{folder}/{name}")
    assert str(folder.parent / "secret") not in str(caught.value).replace(f"file://{folder}/{name}", "")


@pytest.mark.parametrize(
    "url", ["file://host/a.png", "file://a.png", "file:a.png", "file:", "file://", "file://..", "file://[/"]
)
def test_file_url_without_an_absolute_path_is_a_400(folder: Path, url: str) -> None:
    with pytest.raises(VLLMValidationError):
        read(folder, url)


def test_no_file_is_read_without_a_folder(folder: Path) -> None:
    with pytest.raises(VLLMValidationError, match=r"`media\.allowed_local_path`"):
        read(None, f"file://{folder}/a.png")


def test_file_that_becomes_a_link_out_of_the_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder above it is exchanged between check and opening: what was opened is checked."""
    opened = os.open

    def exchange_then_open(path: Any, *args: Any, **kwargs: Any) -> int:
        (folder / "sub").rename(folder / "was")
        (folder / "sub").symlink_to(folder.parent / "allowed-too")
        return opened(path, *args, **kwargs)

    (folder / "sub").mkdir()
    (folder / "sub" / "secret").write_bytes(PICTURE)
    monkeypatch.setattr("serve_app.media.fetch.os.open", exchange_then_open)
    with pytest.raises(VLLMValidationError, match="is not in the folder"):
        read(folder, f"file://{folder}/sub/secret")
