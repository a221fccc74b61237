"""Images and videos by their address: how they are fetched, kept and served.

Names, addresses and servers are an internet of the test's own (`Internet`): Trio asks it for every name, and
every connection the program opens goes through it. So it knows of each attempt, also of those that must not
be, and nothing leaves this machine.
"""

import base64
import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trustme
from harness import (
    CLAUDE,
    GPT,
    IMAGE,
    RAY,
    Rig,
    Stream,
    Tables,
    check_error,
    start,
    turns,
    until,
    user,
    whole,
)

import lmarena_proxy
from demo import contract

PUBLIC, OTHER, PUBLIC_6 = "93.184.216.34", "93.184.216.35", "2606:2800:220:1::25"
MIB = 1 << 20
PICTURE = contract.png("a picture")
# By kind: the first bytes of a file are all that is looked at.
FILES = {
    ("image/png", "png"): PICTURE,
    ("image/jpeg", "jpg"): b"\xff\xd8\xff\xe0" + b"jpeg" * 9,
    ("image/gif", "gif"): b"GIF89a" + b"gif" * 9,
    ("image/webp", "webp"): b"RIFF\x24\x00\x00\x00WEBPVP8 " + b"webp" * 9,
    ("image/avif", "avif"): b"\x00\x00\x00\x1cftypavif" + b"avif" * 9,
    ("video/mp4", "mp4"): contract.mp4(),
    ("video/webm", "webm"): b"\x1aE\xdf\xa3" + b"webm" * 9,
}
# Whether a connection is the test's own (a client, the tab) and not one that the program opens to fetch.
IS_OURS: ContextVar[bool] = ContextVar("IS_OURS", default=False)

Page = bytes | Callable[[trio.abc.Stream], Awaitable[None]]


# ── An internet ─────────────────────────────────────────────────────────────────────────────────────────────


class Visit(msgspec.Struct):
    """A request as a server of this internet saw it. `server_name` is what TLS asked for."""

    host: str
    target: str
    headers: dict[str, str]
    server_name: str | None = None


class Internet(trio.abc.HostnameResolver, trio.abc.SocketFactory):
    """Names, the addresses they stand for, and one server behind all that are `reachable`."""

    def __init__(self) -> None:
        # By name, what each look-up says; the last one stays.
        self.names: dict[str, list[list[str]]] = {}
        self.reachable = {PUBLIC, OTHER, PUBLIC_6}
        self.pages: dict[str, Page] = {}
        self.lookups: list[str] = []
        self.attempts: list[tuple[str, int]] = []
        self.visits: list[Visit] = []
        self.sent_bytes = 0
        self.connections = 0
        self.certificates: dict[str | None, ssl.SSLContext] = {}
        self._server_names: dict[int, str | None] = {}
        self._ports: dict[bool, int] = {}

    async def open(self, nursery: trio.Nursery) -> None:
        for is_tls in (False, True):
            serve = partial(trio.serve_tcp, partial(self._serve, is_tls), 0, host="127.0.0.1")
            [listener] = await nursery.start(serve)
            self._ports[is_tls] = listener.socket.getsockname()[1]
        trio.socket.set_custom_hostname_resolver(self)
        trio.socket.set_custom_socket_factory(self)

    def put(self, url: str, page: Page = b"", *, at: str = PUBLIC) -> str:
        """A page under an address, whose name is made known; returns the address."""
        name, _, path = url.partition("://")[2].partition("/")
        self.names.setdefault(name, [[at]])
        self.pages[f"{name}/{path}"] = page or ok(PICTURE)
        return url

    def trust(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *names: str) -> None:
        """A certificate for each name (comma: one for several), of an authority that the program trusts.

        Whoever asks for another name gets the first one's.
        """
        authority = trustme.CA()
        for each in names:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert(*each.split(",")).configure_cert(context)
            for name in each.split(","):
                self.certificates[name] = context
        authority.cert_pem.write_to_path(directory / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(directory / "authority.pem"))

    # What Trio asks.

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        name = (host or b"").decode()
        self.lookups.append(name)
        if name == "silent.test":
            await trio.sleep_forever()
        answers = self.names.get(name)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        tcp = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [
            (socket.AF_INET6, *tcp, (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, *tcp, (address, port))
            for address in addresses
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError

    def socket(
        self,
        family: socket.AddressFamily | int = socket.AF_INET,
        type: socket.SocketKind | int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> trio.socket.SocketType:
        if IS_OURS.get():
            return trio.socket.from_stdlib_socket(socket.socket(family, type, proto))
        made = trio.socket.from_stdlib_socket(socket.socket(socket.AF_INET, type))
        made.connect = partial(self._connect, made.connect)  # type: ignore[method-assign]
        return made

    async def _connect(self, connect: Callable[[Any], Awaitable[None]], address: Any) -> None:
        host, port = address[:2]
        self.attempts.append((host, port))
        if host not in self.reachable:
            raise OSError(errno.ECONNREFUSED, "Connection refused")
        await connect(("127.0.0.1", self._ports[port == 443]))

    # The server.

    async def _serve(self, is_tls: bool, plain: trio.SocketStream) -> None:
        self.connections += 1
        stream: trio.abc.Stream = self._encrypt(plain) if is_tls else plain
        # A visitor may leave at any moment, and need not like the certificate.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while visit := await self._read(stream):
                    visit.server_name = self._server_names.get(id(stream)) if is_tls else None
                    self.visits.append(visit)
                    page = self.pages.get(f"{visit.host}{visit.target}", answer("404 Not Found"))
                    if not isinstance(page, bytes):
                        await page(stream)
                        return
                    await self.send(stream, page)

    def _encrypt(self, plain: trio.SocketStream) -> trio.abc.Stream:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        first = next(iter(self.certificates.values()))

        def choose(connection: Any, name: str | None, _: object) -> None:
            self._server_names[id(stream)] = name
            connection.context = self.certificates.get(name, first)

        context.sni_callback = choose
        stream = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
        return stream

    async def _read(self, stream: trio.abc.Stream) -> Visit | None:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = await stream.receive_some(65536)
            if not piece:
                return None
            received += piece
        first, *lines = received.decode().split("\r\n\r\n")[0].split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Visit(headers["host"], first.split(" ")[1], headers)

    async def send(self, stream: trio.abc.Stream, data: bytes) -> None:
        await stream.send_all(data)
        self.sent_bytes += len(data)

    # Pages that misbehave. Each ends when its visitor leaves.

    def endless(self, head: bytes, piece: bytes) -> Page:
        async def page(stream: trio.abc.Stream) -> None:
            await self.send(stream, head)
            while True:
                await self.send(stream, piece)

        return page

    def stuck(self, beginning: bytes = b"") -> Page:
        async def page(stream: trio.abc.Stream) -> None:
            if beginning:
                await self.send(stream, beginning)
            await stream.receive_some(1)

        return page

    def breaking_off(self, data: bytes) -> Page:
        async def page(stream: trio.abc.Stream) -> None:
            if data:
                await self.send(stream, data)

        return page

    def dripping(self, beginning: bytes, drop: bytes) -> Page:
        async def page(stream: trio.abc.Stream) -> None:
            await self.send(stream, beginning)
            while True:
                await self.send(stream, drop)
                await trio.sleep(0.02)

        return page


def answer(status: str = "200 OK", body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    """A response; `length` is what its head says of the body, if that is not the truth."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ok(body: bytes, **headers: str) -> bytes:
    return answer("200 OK", body, length=None, **headers)


def moved(location: str, status: str = "302 Found") -> bytes:
    return answer(status, location=location)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def go_online(
    nursery: trio.Nursery, directory: Path, tables: Tables | None = None, **options: Any
) -> tuple[Rig, Internet]:
    """Everything running, on an internet of the test's own."""
    lmarena_proxy._tls.cache_clear()
    internet = Internet()
    await internet.open(nursery)
    options.setdefault("models", (GPT, CLAUDE))
    rig = await start(nursery, directory, tables=tables, connected=False, **options)
    # Set after the program's tasks began: they have it not, the clients and the tab have.
    IS_OURS.set(True)
    await rig.connect()
    return rig, internet


def picture(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


async def show(rig: Rig, url: str) -> httpx.Response:
    return await rig.chat(GPT, picture("What is this?", url))


def attached(rig: Rig, call: int = -1, message: int = 0) -> list[tuple[str, bytes]]:
    """Content types and bytes of what came to the arena with a message, all of it as data: URLs."""
    found = []
    for each in rig.calls[call].body["messages"][message]["experimental_attachments"]:
        head, _, encoded = each["url"].partition(",")
        assert head == f"data:{each['contentType']};base64"
        found.append((each["contentType"], base64.b64decode(encoded, validate=True)))
    return found


async def refuses(
    rig: Rig, url: str, *, status: int = 400, code: str = "invalid_request", says: str = ""
) -> str:
    """The program refuses an address, with a sentence, and sends nothing to the arena; returns it."""
    before = len(rig.calls)
    error = check_error(await show(rig, url), status, code)
    assert error["param"] == "messages[0].content", (url, error)
    message = str(error["message"])
    assert message.startswith("messages[0].content: "), message
    assert url[:200] in message, message
    assert says in message, message
    assert len(rig.calls) == before
    return message


# ── What is never connected to ──────────────────────────────────────────────────────────────────────────────

NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2001:0:7f00:1::1",
    "2001:db8::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
# Other notations for 127.0.0.1 and its like, and addresses that a hurried reader takes for others.
DISGUISED = [
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0/",
    "http://127.0.0.1./",
    "http://2852039166/latest/meta-data/",
    "http://0xa9fea9fe/",
    "http://①②⑦.⓪.⓪.①/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://[::ffff:7f00:1]/",
    "http://[0:0:0:0:0:ffff:127.0.0.1]/",
    "http://[fe80::1%25lo]/",
    "HTTP://127.0.0.1/",
    " http://127.0.0.1/ ",
    "http://127.0.0.1:80/",
    "https://127.0.0.1/",
    "http://pictures.test@127.0.0.1/a.png",
    "http://pictures.test:80@127.0.0.1/a.png",
    "http://pictures.test%2f@127.0.0.1/a.png",
    "http://pictures.test\\@127.0.0.1/a.png",
    "http://127.0.0.1\\@pictures.test:81/a.png",
    "http://127.0.0.1#@pictures.test/a.png",
    "http://127.0.0.1?@pictures.test/a.png",
]


async def test_no_address_that_is_not_public_is_ever_connected_to(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for address in NOT_PUBLIC:
        host = f"[{address}]" if ":" in address else address
        for url in (f"http://{host}/a.png", f"https://{host}/a.png", f"http://{host}:8080/a.png"):
            await refuses(rig, url, says="not on the public internet")
    assert (internet.attempts, internet.lookups) == ([], [])


async def test_no_other_notation_of_such_an_address_helps(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.names["pictures.test"] = [[PUBLIC]]
    for url in DISGUISED:
        check_error(await show(rig, url), 400, "invalid_request")
    # None of these may be read in two ways: one of them is, and then as the public name.
    assert {host for host, _ in internet.attempts} <= {PUBLIC}
    assert rig.calls == []


async def test_no_name_of_such_an_address_helps(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for address in NOT_PUBLIC:
        # Also beside a public one, whichever comes first.
        for addresses in ([address], [PUBLIC, address], [address, PUBLIC], [PUBLIC_6, OTHER, address]):
            internet.names["inside.test"] = [addresses]
            message = await refuses(rig, "http://inside.test/a.png")
            assert "not on the public internet" in message
    assert internet.attempts == []


async def test_the_own_machines_names_are_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for name in ("localhost", "LOCALHOST", "localhost.", "a.localhost", "ip6-localhost"):
        internet.names |= {each: [["127.0.0.1", "::1"]] for each in (name, name.lower())}
        for port in ("", ":80", f":{httpx.URL(rig.url).port}", f":{httpx.URL(rig.arena_url).port}"):
            await refuses(rig, f"http://{name}{port}/a.png", says="not on the public internet")
    assert internet.attempts == []


async def test_a_name_with_a_trailing_dot_is_still_that_name(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    whole(await show(rig, internet.put("http://pictures.test./a.png")))
    assert attached(rig) == [("image/png", PICTURE)]


async def test_no_redirect_leads_to_such_an_address(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.names["inside.test"] = [["10.0.0.1"]]
    targets = (
        "http://127.0.0.1/a.png",
        f"{rig.url}/health",
        f"{rig.arena_url}/media/a.png",
        "//127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/",
        "http://inside.test/a.png",
        "https://inside.test/a.png",
        "http://public@inside.test/a.png",
    )
    for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
        for target in targets:
            url = internet.put("http://pictures.test/a.png", moved(target, status))
            await refuses(rig, url, says="not on the public internet")
    assert {host for host, _ in internet.attempts} == {PUBLIC}


async def test_a_redirect_after_public_ones_is_checked_too(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.put("http://two.test/a", moved("http://127.0.0.1/a.png"), at=OTHER)
    internet.put("http://one.test/a", moved("http://two.test/a"))
    await refuses(rig, "http://one.test/a", says="not on the public internet")
    assert internet.attempts == [(PUBLIC, 80), (OTHER, 80)]


async def test_a_name_that_means_something_else_the_second_time_gains_nothing(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.names["rebind.test"] = [[PUBLIC], ["127.0.0.1"]]
    whole(await show(rig, internet.put("http://rebind.test/a.png")))
    # One look-up; the connection goes to what it said.
    assert (internet.lookups, internet.attempts) == (["rebind.test"], [(PUBLIC, 80)])
    await refuses(rig, "http://rebind.test/a.png", says="127.0.0.1")

    internet.names["again.test"] = [[PUBLIC], ["127.0.0.1"]]
    url = internet.put("http://again.test/a.png", moved("/b.png"))
    await refuses(rig, url, says="127.0.0.1")
    assert {host for host, _ in internet.attempts} == {PUBLIC}


async def test_redirects_to_other_schemes_are_not_followed(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.put("http://pictures.test/b.png")
    for target in (
        "ftp://pictures.test/b.png",
        "file:///etc/passwd",
        "gopher://pictures.test/",
        "data:image/png;base64,iVBORw0KGgo=",
        "javascript:alert(1)",
        "unix:///run/docker.sock",
        "http+unix://%2frun%2fdocker.sock/",
        "ws://pictures.test/b.png",
    ):
        await refuses(rig, internet.put("http://pictures.test/a.png", moved(target)))
    assert {visit.target for visit in internet.visits} == {"/a.png"}


async def test_what_is_no_address_of_anything_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    urls = [
        "http://",
        "http:///a.png",
        "http://:80/a.png",
        "http://pictures.test:99999/a.png",
        "http://pictures.test:x/a.png",
        "http://a b/a.png",
        "http://../a.png",
        "http://.test/a.png",
        "http://" + "a" * 64 + ".test/",
        "http://" + "a." * 200 + "test/",
        "http://xn--/a.png",
        "http://\u0000/a.png",
        "http://pictures.test\r\nhost: inside/a.png",
        "http://💥.test/a.png",
        "http://%00/a.png",
        "http://unknown.test/a.png",
        "http://pictures.test/" + "a" * 70_000,
        "http://[::1/a.png",
        "http://[/a.png",
        "http://a]b/a.png",
        "http://[not-an-address]/a.png",
    ]
    for url in urls:
        await refuses(rig, url)
    assert internet.attempts == []


async def test_allowed_networks_are_opened_and_nothing_beside_them(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"media": {"allowed_networks": ["198.18.0.0/15", "10.1.0.0/16", "fd00:1::/32"]}}
    rig, internet = await go_online(nursery, tmp_path, tables)
    for address in ("198.18.0.1", "198.19.255.255", "10.1.2.3", "fd00:1::5", PUBLIC, "::ffff:10.1.2.3"):
        internet.reachable.add(address)
        host = f"[{address}]" if ":" in address else address
        whole(await show(rig, internet.put(f"http://{host}/a.png")))
        internet.names["named.test"] = [[address]]
        whole(await show(rig, internet.put("http://named.test/a.png")))
    attempted = list(internet.attempts)
    for address in ("198.17.255.255", "198.20.0.1", "10.0.255.255", "10.2.0.0", "fd00:2::1"):
        if lmarena_proxy.is_public(address):
            continue  # Outside of every network, but public.
        internet.names["named.test"] = [[address]]
        await refuses(rig, "http://named.test/a.png")
    for address in NOT_PUBLIC:
        if address != "198.18.0.1":
            internet.names["named.test"] = [[address]]
            await refuses(rig, "http://named.test/a.png")
    assert internet.attempts == attempted


@pytest.mark.parametrize(
    "network",
    [
        "127.0.0.0/8",
        "127.0.0.1",
        "0.0.0.0/0",
        "::/0",
        "::1",
        "169.254.0.0/16",
        "169.254.169.254/32",
        "fe80::/64",
    ],
)
def test_this_machine_and_its_link_cannot_be_allowed(network: str) -> None:
    with pytest.raises(lmarena_proxy.ConfigError, match=r"media\.allowed_networks"):
        lmarena_proxy.parse_config({"media": {"allowed_networks": [network]}})


async def test_the_sites_own_origin_may_be_this_machine_and_no_other_port_of_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), connected=True)
    rig.program.media.site_origins.add(rig.arena_url)
    whole(await show(rig, f"{rig.arena_url}/media/seed.png"))
    assert attached(rig) == [("image/png", contract.png("seed"))]
    port = httpx.URL(rig.arena_url).port
    for origin in (rig.url, f"http://localhost:{port}", f"https://127.0.0.1:{port}", f"http://127.1:{port}"):
        await refuses(rig, f"{origin}/media/seed.png")


# ── What is fetched ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_public_picture_arrives_at_the_arena_as_data(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for (kind, ending), data in FILES.items():
        if kind.startswith("image/"):
            # What the server says of the type does not count.
            url = internet.put(f"http://pictures.test/a.{ending}", ok(data, content_type="text/html"))
            whole(await show(rig, url))
            assert attached(rig) == [(kind, data)]
            [message] = [each for each in turns(rig.calls[-1]) if each[0] == "user"]
            assert message[1] == "What is this?"
    assert {host for host, _ in internet.attempts} == {PUBLIC}
    assert {visit.host for visit in internet.visits} == {"pictures.test"}


async def test_the_server_learns_nothing_of_the_client(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, {"server": {"api_key": "secret-key"}})
    rig.http.headers.update({"authorization": "Bearer secret-key", "cookie": "a=b", "referer": "http://c/"})
    url = internet.put("http://pictures.test/a.png?b=c%20d&e=/../f")
    whole(await show(rig, url))
    [visit] = internet.visits
    assert visit.target == "/a.png?b=c%20d&e=/../f"
    assert visit.headers.keys() <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert visit.headers["host"] == "pictures.test"
    assert "secret-key" not in repr(visit)


async def test_ports_and_addresses_of_version_6_are_fine(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.put("http://pictures.test:8080/a.png")
    internet.names["pictures.test"] = [[PUBLIC_6]]
    whole(await show(rig, "http://pictures.test:8080/a.png"))
    whole(await show(rig, internet.put(f"http://[{PUBLIC_6}]/a.png")))
    whole(await show(rig, internet.put(f"http://{PUBLIC}/a.png")))
    assert internet.attempts == [(PUBLIC_6, 8080), (PUBLIC_6, 80), (PUBLIC, 80)]
    assert [visit.host for visit in internet.visits] == ["pictures.test:8080", f"[{PUBLIC_6}]", PUBLIC]


async def test_an_international_name_is_looked_up_in_its_ascii_form(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.names["xn--bcher-kva.test"] = [[PUBLIC]]
    internet.pages["xn--bcher-kva.test/a.png"] = ok(PICTURE)
    whole(await show(rig, "http://bücher.test/a.png"))
    assert internet.lookups == ["xn--bcher-kva.test"]


async def test_a_name_and_password_in_an_address_go_to_its_host_only(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.put("http://pictures.test/a.png", moved("http://other.test/b.png"))
    internet.put("http://other.test/b.png", at=OTHER)
    whole(await show(rig, "http://127.0.0.1:secret@pictures.test/a.png"))
    assert internet.attempts == [(PUBLIC, 80), (OTHER, 80)]
    assert "authorization" not in internet.visits[1].headers


async def test_the_next_address_of_a_name_is_tried_when_one_is_down(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.reachable.remove(PUBLIC)
    internet.names["pictures.test"] = [[PUBLIC, OTHER]]
    whole(await show(rig, internet.put("http://pictures.test/a.png")))
    assert internet.attempts == [(PUBLIC, 80), (OTHER, 80)]
    internet.reachable.remove(OTHER)
    await refuses(rig, "http://pictures.test/a.png")


async def test_redirects_to_public_addresses_are_followed(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.put("http://one.test/a", moved("b", "301 Moved"))
    internet.put("http://one.test/b", moved("//two.test/c", "303 See Other"))
    internet.put("http://two.test/c", moved("http://two.test/d", "307 Temporary"), at=OTHER)
    internet.put("http://two.test/d", moved("/e", "308 Permanent"))
    internet.put("http://two.test/e")
    whole(await show(rig, "http://one.test/a"))
    assert attached(rig) == [("image/png", PICTURE)]
    assert [visit.host + visit.target for visit in internet.visits] == [
        "one.test/a",
        "one.test/b",
        "two.test/c",
        "two.test/d",
        "two.test/e",
    ]


async def test_the_number_of_redirects_is_limited(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for step in range(10):
        internet.put(f"http://pictures.test/{step}", moved(f"/{step + 1}"))
    internet.put("http://pictures.test/10")
    whole(await show(rig, "http://pictures.test/5"))
    internet.visits.clear()
    await refuses(rig, "http://pictures.test/4")
    await refuses(rig, internet.put("http://pictures.test/loop", moved("/loop")))
    assert len(internet.visits) == 12


async def test_what_is_no_picture_is_refused_whatever_its_server_calls_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for body in (
        b"",
        b"<html><h1>Not found</h1></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"BM" + bytes(60),
        gzip.compress(PICTURE),
        b" " + PICTURE,
        PICTURE[:7],
    ):
        url = internet.put("http://pictures.test/a.png", ok(body, content_type="image/png"))
        await refuses(rig, url, says="neither an image nor a video")


async def test_a_packed_picture_is_not_unpacked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    packed = ok(gzip.compress(PICTURE), content_encoding="gzip", content_type="image/png")
    await refuses(rig, internet.put("http://pictures.test/a.png", packed))
    [visit] = internet.visits
    assert visit.headers["accept-encoding"] == "identity"


async def test_a_video_is_refused_where_a_picture_is_wanted(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for (kind, ending), data in FILES.items():
        if kind.startswith("video/"):
            url = internet.put(f"http://pictures.test/a.{ending}", ok(data))
            await refuses(rig, url, says="it is a video")


async def test_any_other_status_than_200_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for status in (201, 204, 206, 300, 304, 401, 403, 404, 407, 429, 500, 503, 999):
        page = answer(f"{status} So", b"" if status in (204, 304) else PICTURE)
        await refuses(rig, internet.put("http://pictures.test/a.png", page), says=str(status))


async def test_a_broken_answer_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    for data in (
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: nine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(PICTURE),
        answer(body=PICTURE, length=len(PICTURE) + 1),
        answer("302 Found"),
        moved(""),
        moved("http://[::1/"),
        moved("http://"),
        moved("http://a\x01b/"),
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 60_000,
    ):
        url = internet.put("http://pictures.test/a.png", internet.breaking_off(data))
        await refuses(rig, url)
    whole(await rig.chat(GPT, "Hello"))


async def test_an_answer_without_a_length_is_read_to_its_end(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)

    page = internet.breaking_off(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE)
    whole(await show(rig, internet.put("http://pictures.test/a.png", page)))
    pieces = [PICTURE[place : place + 7] for place in range(0, len(PICTURE), 7)]
    chunked = b"".join([*map(chunk, pieces), chunk(b"")])
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    whole(await show(rig, internet.put("http://pictures.test/b.png", head + chunked)))
    # A head that says less than there is: what it says is the picture.
    longer = answer(body=PICTURE + b"more", length=len(PICTURE))
    whole(await show(rig, internet.put("http://pictures.test/c.png", longer)))
    assert [attached(rig, call) for call in range(3)] == [[("image/png", PICTURE)]] * 3


# ── Limits ──────────────────────────────────────────────────────────────────────────────────────────────────

# What may be under way between two sockets of this machine, beside what was read.
ON_THE_WAY_BYTES = 16 * MIB
SMALL_PICTURES: Tables = {"arena": {"max_attachment_mb": 1}}


async def test_a_picture_that_is_too_large_is_given_up_early(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, {**SMALL_PICTURES, "media": {"max_file_mb": 1}})
    data = PICTURE + bytes(65536 - len(PICTURE))
    for head in (
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ):
        internet.sent_bytes = 0
        page = internet.endless(head, chunk(data) if b"chunked" in head else data)
        url = internet.put("http://pictures.test/a.png", page)
        await refuses(rig, url, status=413, code="request_too_large", says="1 MiB")
        assert internet.sent_bytes < ON_THE_WAY_BYTES


async def test_the_limit_of_a_picture_is_exact(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, SMALL_PICTURES)
    largest = PICTURE + bytes(MIB - len(PICTURE))
    whole(await show(rig, internet.put("http://pictures.test/a.png", ok(largest))))
    assert attached(rig) == [("image/png", largest)]
    await refuses_too_large(rig, internet.put("http://pictures.test/b.png", ok(largest + b"\0")))


async def test_the_body_of_a_redirect_is_not_read_without_limit(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, {"media": {"timeout_seconds": 5}, **SMALL_PICTURES})
    internet.put("http://pictures.test/b.png")
    head = b"HTTP/1.1 302 Found\r\nlocation: /b.png\r\n"
    page = internet.endless(head + b"content-length: 99999999999\r\n\r\n", bytes(65536))
    await show(rig, internet.put("http://pictures.test/a.png", page))
    assert internet.sent_bytes < ON_THE_WAY_BYTES


async def test_the_body_of_a_redirect_is_not_unpacked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, SMALL_PICTURES)
    internet.put("http://pictures.test/b.png")
    # What is no gzip can be told from gzip only by unpacking it.
    page = answer("302 Found", b"This is no gzip.", location="/b.png", content_encoding="gzip")
    whole(await show(rig, internet.put("http://pictures.test/a.png", page)))
    assert attached(rig) == [("image/png", PICTURE)]


async def test_nothing_that_is_slow_is_waited_for_longer_than_the_limit(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, internet = await go_online(nursery, tmp_path, {"media": {"timeout_seconds": 0.3}})
    internet.trust(monkeypatch, tmp_path, "slow.test")
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n"
    pages = {
        "silent": internet.stuck(),
        "half a head": internet.stuck(b"HTTP/1.1 200 OK\r\n"),
        "half a body": internet.stuck(head + PICTURE),
        "a head by drops": internet.dripping(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        "a body by drops": internet.dripping(head, b"\0"),
        "early hints": internet.dripping(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        "a redirect by drops": internet.dripping(
            b"HTTP/1.1 302 Found\r\nlocation: http://silent.test/\r\ncontent-length: 999\r\n\r\n", b"\0"
        ),
    }
    for place, page in enumerate(pages.values()):
        for base in ("http://slow.test/", "https://slow.test/"):
            await refuses(rig, internet.put(f"{base}{place}", page), says="media.timeout_seconds")
    await refuses(rig, "http://silent.test/a.png", says="media.timeout_seconds")
    # Nothing is left of them.
    await until(lambda: rig.program.answers.active == 0)
    whole(await rig.chat(GPT, "Hello"))


async def test_a_client_that_leaves_ends_the_fetching(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, {"media": {"timeout_seconds": 600}})
    left: list[str] = []

    async def page(stream: trio.abc.Stream) -> None:
        left.append("came")
        assert await stream.receive_some(1) == b""
        left.append("went")

    url = internet.put("http://pictures.test/a.png", page)
    async with trio.open_nursery() as clients:
        clients.start_soon(show, rig, url)
        await until(lambda: left)
        clients.cancel_scope.cancel()
    await until(lambda: left == ["came", "went"])
    await until(lambda: rig.program.answers.active == 0)
    assert rig.calls == []
    # No conversation was held meanwhile.
    whole(await rig.chat(GPT, "Hello"))


async def test_a_picture_being_fetched_holds_no_conversation(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"pool": {"sessions_per_model": 1}, "media": {"timeout_seconds": 600}}
    rig, internet = await go_online(nursery, tmp_path, tables)
    internet.put("http://pictures.test/slow.png", internet.stuck())
    async with trio.open_nursery() as clients:
        clients.start_soon(show, rig, "http://pictures.test/slow.png")
        await until(lambda: internet.visits)
        whole(await rig.chat(GPT, "Hello"))
        clients.cancel_scope.cancel()


# ── Pictures by address in a chat ───────────────────────────────────────────────────────────────────────────


async def test_every_picture_of_every_message_arrives_in_its_place(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    first, second, third = (contract.png(seed) for seed in "123")
    urls = [
        internet.put(f"http://pictures.test/{place}.png", ok(data))
        for place, data in enumerate((first, second, third))
    ]
    data_url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    answer = await rig.chat(
        GPT,
        {"role": "system", "content": "Be brief."},
        picture("One and two", urls[0], data_url, urls[1]),
        {"role": "assistant", "content": "Seen."},
        picture("Three, as a string", urls[2]) | {"content": [{"type": "image_url", "image_url": urls[2]}]},
    )
    whole(answer)
    assert [data for _, data in attached(rig, message=1)] == [first, PICTURE, second]
    assert [data for _, data in attached(rig, message=3)] == [third]
    assert attached(rig, message=0) == attached(rig, message=2) == []


async def test_the_message_whose_picture_cannot_be_had_is_named(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    good = internet.put("http://pictures.test/good.png")
    for is_stream in (False, True):
        response = await rig.chat(
            GPT, user("Hello"), picture("A", good), picture("B", "http://127.0.0.1/a.png"), stream=is_stream
        )
        assert check_error(response, 400, "invalid_request")["param"] == "messages[2].content"
    assert rig.calls == []
    assert rig.pool(GPT).waiting == 0


async def test_a_stream_whose_picture_is_slow_still_begins_in_time(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"requests": {"commit_after_seconds": 0.05}, "media": {"timeout_seconds": 0.5}}
    rig, internet = await go_online(nursery, tmp_path, tables)
    url = internet.put("http://pictures.test/a.png", internet.stuck())
    stream = await rig.stream(GPT, picture("A", url))
    [error] = stream.errors
    assert error["param"] == "messages[0].content"
    assert stream.has_done
    assert rig.calls == []


async def test_nothing_is_fetched_for_a_model_that_takes_no_picture(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    url = internet.put("http://pictures.test/a.png")
    response = await rig.chat(CLAUDE, picture("Look", url))
    assert check_error(response, 400, "invalid_request")["param"] == "messages[0].content"
    assert (internet.lookups, internet.attempts, rig.calls) == ([], [], [])


async def test_an_address_in_a_text_stays_text(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    text = f"See ![this]({internet.put('http://pictures.test/a.png')})"
    whole(await rig.chat(GPT, text))
    assert turns(rig.calls[0])[-1] == ("user", text)
    assert (internet.lookups, internet.attempts) == ([], [])


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_certificate_must_be_the_names_and_of_a_trusted_authority(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.trust(monkeypatch, tmp_path, "pictures.test", PUBLIC)
    whole(await show(rig, internet.put("https://pictures.test/a.png")))
    assert attached(rig) == [("image/png", PICTURE)]
    assert internet.attempts == [(PUBLIC, 443)]
    assert internet.visits[0].server_name == "pictures.test"
    # Another name at that address: its server has no certificate for it.
    await refuses(rig, internet.put("https://other.test/a.png"))
    # The address itself is refused for the name's certificate, and the name for the address's.
    await refuses(rig, internet.put(f"https://{PUBLIC}/a.png"))
    internet.certificates["pictures.test"] = internet.certificates[PUBLIC]
    await refuses(rig, "https://pictures.test/a.png")
    # A stranger's certificate.
    known = tmp_path / "known"
    known.mkdir()
    internet.trust(monkeypatch, known, "pictures.test")
    await refuses(rig, "https://pictures.test/a.png")
    assert len(internet.visits) == 1


async def test_a_certificate_for_an_address_is_good_for_it(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.trust(monkeypatch, tmp_path, PUBLIC)
    whole(await show(rig, internet.put(f"https://{PUBLIC}/a.png")))


async def test_each_name_at_one_address_gets_a_connection_of_its_own(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.trust(monkeypatch, tmp_path, "one.test", "two.test")
    internet.put("https://one.test/a", moved("https://two.test/b"))
    internet.put("https://two.test/b")
    whole(await show(rig, "https://one.test/a"))
    # A connection that was opened to one name proves nothing of another.
    assert [(visit.host, visit.server_name) for visit in internet.visits] == [
        ("one.test", "one.test"),
        ("two.test", "two.test"),
    ]
    internet.put("https://one.test/c", moved("https://false.test/d"))
    internet.put("https://false.test/d")
    await refuses(rig, "https://one.test/c")


async def test_redirects_may_change_between_http_and_https(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, internet = await go_online(nursery, tmp_path)
    internet.trust(monkeypatch, tmp_path, "pictures.test")
    internet.put("http://pictures.test/a", moved("https://pictures.test/b"))
    internet.put("https://pictures.test/b", moved("http://pictures.test/c"))
    internet.put("http://pictures.test/c")
    whole(await show(rig, "http://pictures.test/a"))
    assert [visit.server_name for visit in internet.visits] == [None, "pictures.test", None]


# ── Keeping and serving ─────────────────────────────────────────────────────────────────────────────────────

KEEP: Tables = {"media": {"keep": True}}


def media_directory(directory: Path) -> Path:
    return directory / "state" / "media"


def kept_name(data: bytes, ending: str = "png") -> str:
    return f"{hashlib.sha256(data).hexdigest()[:32]}.{ending}"


def media_answer(*entries: tuple[str, str], before: str = "", after: str = "") -> str:
    """The body of an answer that shows images ("image") and videos ("video") by their addresses."""
    keys = {"image": "image", "video": "url"}
    lines = [f"a0:{json.dumps(before)}"] if before else []
    lines += [f"a2:{json.dumps([{'type': kind, keys[kind]: url}])}" for kind, url in entries]
    lines += [f"a0:{json.dumps(after)}"] if after else []
    return "\n".join([*lines, 'ad:{"finishReason":"stop"}', ""])


async def keep(rig: Rig, url: str, kind: str = "image") -> str:
    """Let an answer show this address; returns the one that the client gets."""
    rig.arena.switch(raw={"*": media_answer((kind, url))})
    text = whole(await rig.chat(IMAGE, "A cat")).choices[0].message.content or ""
    opening = "![image](" if kind == "image" else "[video]("
    assert text.startswith(opening), text
    assert text.endswith(")"), text
    return text.removeprefix(opening)[:-1]


async def test_images_and_videos_get_an_address_of_this_server_under_the_name_the_client_used(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, RAY), tables=KEEP)
    rig.program.media.site_origins.add(rig.arena_url)
    rig.arena.switch(
        raw={
            IMAGE: media_answer(("image", f"{rig.arena_url}/media/seed.png")),
            RAY: media_answer(("video", f"{rig.arena_url}/media/seed.mp4")),
        }
    )
    port = httpx.URL(rig.url).port
    files = {
        IMAGE: ("![image](", "image/png", contract.png("seed"), "png"),
        RAY: ("[video](", "video/mp4", contract.mp4(), "mp4"),
    }
    for model, (opening, kind, data, ending) in files.items():
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            rig.http.headers["host"] = host
            address = f"http://{host}/media/{kept_name(data, ending)}"
            answer = whole(await rig.chat(model, "A cat"))
            assert answer.choices[0].message.content == f"{opening}{address})"
            stream = await rig.stream(model, "A cat")
            assert (stream.text, stream.finish_reasons) == (f"{opening}{address})", ["stop"])
            response = await rig.http.get(f"/media/{kept_name(data, ending)}")
            assert (response.status_code, response.content) == (200, data)
            assert response.headers["content-type"] == kind
    assert {path.name for path in media_directory(tmp_path).iterdir()} == {
        kept_name(contract.png("seed")),
        kept_name(contract.mp4(), "mp4"),
    }


async def test_text_around_kept_pictures_stays_in_its_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP)
    urls = [internet.put(f"http://pictures.test/{seed}", ok(contract.png(seed))) for seed in ("one", "two")]
    entries = [("image", url) for url in urls]
    rig.arena.switch(raw={"*": media_answer(*entries, before="Here:", after="Done.")})
    shown = [f"![image]({rig.url}/media/{kept_name(contract.png(seed))})" for seed in ("one", "two")]
    text = whole(await rig.chat(GPT, "Two cats")).choices[0].message.content or ""
    places = [text.index(each) for each in ("Here:", *shown, "Done.")]
    assert places == sorted(places)
    assert (await rig.stream(GPT, "Two cats")).text == text


async def test_every_kind_is_served_as_what_it_is_without_a_key_and_never_as_anything_else(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"server": {"api_key": "secret-key"}, **KEEP}
    rig, internet = await go_online(nursery, tmp_path, tables, models=(IMAGE,))
    rig.http.headers["authorization"] = "Bearer secret-key"
    async with httpx.AsyncClient(trust_env=False) as keyless:
        for (kind, ending), data in FILES.items():
            url = internet.put(f"http://pictures.test/a.{ending}", ok(data, content_type="text/html"))
            address = await keep(rig, url, kind.partition("/")[0])
            assert address == f"{rig.url}/media/{kept_name(data, ending)}"
            response = await keyless.get(address)
            assert (response.status_code, response.content) == (200, data)
            assert response.headers["content-type"] == kind
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-request-id"].startswith("req_")
            head = await keyless.head(address)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(data))
        assert (await keyless.get(f"{rig.url}/v1/models")).status_code == 401
        # Not under a name of somebody else's: a page there must not read it.
        foreign = await keyless.get(address, headers={"host": "evil.test"})
        check_error(foreign, 421, "misdirected_request")


async def test_a_video_can_be_had_in_parts_and_is_not_sent_twice(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    data = contract.mp4() + bytes(range(256)) * 400
    address = await keep(rig, internet.put("http://pictures.test/a.mp4", ok(data)), "video")
    for asked, (begin, end) in {
        "bytes=0-99": (0, 100),
        "bytes=100-": (100, len(data)),
        "bytes=-50": (len(data) - 50, len(data)),
        f"bytes=1000-{len(data) + 99}": (1000, len(data)),
    }.items():
        response = await rig.http.get(address, headers={"range": asked})
        assert response.status_code == 206, asked
        assert response.content == data[begin:end]
        assert response.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(data)}"
        assert response.headers["content-type"] == "video/mp4"
        assert response.headers["x-content-type-options"] == "nosniff"
    assert (await rig.http.get(address)).headers["accept-ranges"] == "bytes"
    beyond = await rig.http.get(address, headers={"range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416
    assert beyond.json()["error"]["message"]
    etag = (await rig.http.get(address)).headers["etag"]
    again = await rig.http.get(address, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")


async def test_nothing_but_what_is_kept_is_served(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    address = await keep(rig, internet.put("http://pictures.test/a.png"))
    name = address.rpartition("/")[2]
    directory = media_directory(tmp_path)
    secret = "0" * 32
    for place in (directory / "secret.png", directory.parent / f"{secret}.png", directory / f"{secret}.txt"):
        place.write_bytes(PICTURE)
    (directory / f"{'1' * 32}.png").mkdir()
    for path in (
        f"{secret}.png",
        f"{secret}.txt",
        f"{'1' * 32}.png",
        "secret.png",
        name.upper(),
        name.removesuffix(".png"),
        name.replace(".png", ".jpg"),
        f"{name}.png",
        f"{name}%00",
        f"{name}%0a",
        f"../{secret}.png",
        f"..%2f{secret}.png",
        "..%2F..%2Fmodels.json",
        f"..%5c{secret}.png",
        f"%2e%2e/{secret}.png",
        f"x/../{name}",
        f"./{name}/",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "..",
        "",
        "*",
    ):
        # Past httpx's own tidying of paths.
        response = await raw_get(rig, f"/media/{path}")
        check_error(response, 404, "not_found")
    for method in ("POST", "PUT", "DELETE"):
        check_error(await rig.http.request(method, f"/media/{name}"), 405, "method_not_allowed")
    assert (await raw_get(rig, f"/media/{name}")).content == PICTURE


async def raw_get(rig: Rig, target: str) -> httpx.Response:
    """GET a target exactly as it is written."""
    url = httpx.URL(rig.url)
    async with await trio.open_tcp_stream(url.host, url.port or 0) as stream:
        await stream.send_all(f"GET {target} HTTP/1.1\r\nhost: {url.netloc.decode()}\r\n\r\n".encode())
        received = bytearray()
        while b"\r\n\r\n" not in received:
            received += await stream.receive_some()
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        response = httpx.Response(int(first.split(" ")[1]), headers=headers)
        while len(body) < int(response.headers["content-length"]):
            body += await stream.receive_some()
    return httpx.Response(response.status_code, headers=headers, content=body)


async def test_a_connection_that_is_to_be_closed_is_closed(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    name = kept_name(PICTURE)
    await keep(rig, internet.put("http://pictures.test/a.png"))
    url = httpx.URL(rig.url)
    for path in (f"/media/{name}", "/media/none", "/health"):
        async with await trio.open_tcp_stream(url.host, url.port or 0) as stream:
            await stream.send_all(f"GET {path} HTTP/1.0\r\nhost: {url.host}\r\n\r\n".encode())
            with trio.fail_after(20):
                assert b"".join([piece async for piece in stream]).startswith(b"HTTP/1.1 ")


async def test_what_is_kept_is_private_on_disk(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    old_mask = os.umask(0)
    try:
        address = await keep(rig, internet.put("http://pictures.test/a.png"))
    finally:
        os.umask(old_mask)
    directory = media_directory(tmp_path)
    [path] = directory.iterdir()
    assert path.name == address.rpartition("/")[2] == kept_name(PICTURE)
    assert path.read_bytes() == PICTURE
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(directory.stat().st_mode)) == (0o600, 0o700)


async def test_the_same_content_is_one_file(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    addresses = {
        await keep(rig, internet.put(f"http://pictures.test/{place}")) for place in ("a", "b", "b", "c?d")
    }
    assert addresses == {f"{rig.url}/media/{kept_name(PICTURE)}"}
    assert len([*media_directory(tmp_path).iterdir()]) == 1


def large(seed: str, size_bytes: int) -> bytes:
    data = contract.png(seed)
    return data + bytes(size_bytes - len(data))


async def test_the_oldest_go_when_there_is_too_much_and_the_newest_stays(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"media": {"keep": True, "max_total_mb": 1, "max_file_mb": 2}}
    rig, internet = await go_online(nursery, tmp_path, tables, models=(IMAGE,))
    directory = media_directory(tmp_path)

    async def keep_file(seed: str, size_bytes: int) -> str:
        url = internet.put(f"http://pictures.test/{seed}", ok(large(seed, size_bytes)))
        name = (await keep(rig, url)).rpartition("/")[2]
        assert (directory / name).exists()
        for path in directory.iterdir():  # Time passes.
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))
        return name

    first, second = await keep_file("first", 400 << 10), await keep_file("second", 400 << 10)
    third = await keep_file("third", 400 << 10)
    assert {path.name for path in directory.iterdir()} == {second, third}
    # What is shown again is not old any more.
    assert await keep_file("second", 400 << 10) == second
    fourth = await keep_file("fourth", 400 << 10)
    assert {path.name for path in directory.iterdir()} == {second, fourth}
    check_error(await rig.http.get(f"/media/{first}"), 404, "not_found")
    # Exactly as much as may be.
    fifth = await keep_file("fifth", MIB - (800 << 10))
    assert {path.name for path in directory.iterdir()} == {second, fourth, fifth}
    # The newest stays, though it is too much alone.
    huge = await keep_file("huge", 2 * MIB)
    assert {path.name for path in directory.iterdir()} == {huge}


async def test_pictures_that_are_kept_at_the_same_time_are_all_kept(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables: Tables = {"media": {"keep": True}, "pool": {"sessions_per_model": 16}}
    rig, internet = await go_online(nursery, tmp_path, tables, models=(IMAGE,))
    # Many older ones, so that counting them takes a moment in which others are written.
    directory = media_directory(tmp_path)
    directory.mkdir(mode=0o700)
    for place in range(2000):
        (directory / f"{place:032x}.png").write_bytes(b"")
    files = {f"http://pictures.test/{place}": contract.png(str(place)) for place in range(8)}
    entries = [("image", internet.put(url, ok(data))) for url, data in files.items()]
    rig.arena.switch(raw={"*": media_answer(*entries)})

    texts: list[str] = []

    async def ask() -> None:
        texts.append(whole(await rig.chat(IMAGE, "Cats")).choices[0].message.content or "")

    async with trio.open_nursery() as clients:
        for _ in range(8):
            clients.start_soon(ask)
    assert "pictures.test" not in "".join(texts), caplog.text
    assert "is not kept" not in caplog.text
    assert len([*directory.iterdir()]) == 2000 + 8


async def test_what_cannot_be_kept_stays_at_its_address_with_a_warning(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = {"media": {"keep": True, "max_file_mb": 1, "timeout_seconds": 0.3}}
    rig, internet = await go_online(nursery, tmp_path, tables, models=(IMAGE,))
    for url in (
        internet.put("http://pictures.test/gone", answer("404 Not Found")),
        internet.put("http://pictures.test/text", ok(b"Hello")),
        internet.put("http://pictures.test/large", ok(large("large", MIB + 1))),
        internet.put("http://pictures.test/slow", internet.stuck()),
        internet.put("http://pictures.test/broken", internet.breaking_off(b"HTTP/1.1 200")),
        internet.put("http://pictures.test/inside", moved(f"{rig.arena_url}/media/a.png")),
        f"{rig.arena_url}/media/a.png",
        "http://unknown.test/a.png",
        "http://[::1/a.png",
        "https://pictures.test:x/a.png",
        "ftp://pictures.test/a.png",
        "no address at all",
        "",
    ):
        caplog.clear()
        if not url:
            continue  # Nothing that could be shown.
        assert await keep(rig, url) == url
        assert f"The image at {url} is not kept: " in caplog.text
    assert not media_directory(tmp_path).exists()
    assert rig.program.answers.failed == 0


async def test_a_disk_that_takes_nothing_costs_no_answer(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    media_directory(tmp_path).write_bytes(b"A file where the directory should be.")
    url = internet.put("http://pictures.test/a.png")
    assert await keep(rig, url) == url
    assert f"The image at {url} is not kept: " in caplog.text


async def test_only_what_failed_stays_where_it_was(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    good = internet.put("http://pictures.test/good")
    bad = internet.put("http://pictures.test/bad", answer("404 Not Found"))
    rig.arena.switch(raw={"*": media_answer(("image", bad), ("image", good), ("image", bad))})
    text = whole(await rig.chat(IMAGE, "Cats")).choices[0].message.content or ""
    kept = f"{rig.url}/media/{kept_name(PICTURE)}"
    assert re.findall(r"\((.*?)\)", text) == [bad, kept, bad]


async def test_a_kept_address_that_comes_back_is_read_from_the_disk(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE, GPT, RAY))
    address = await keep(rig, internet.put("http://pictures.test/a.png"))
    internet.attempts.clear()
    port = httpx.URL(rig.url).port
    name = kept_name(PICTURE)
    rig.arena.switch(raw={})
    # Under every name that this server may have had when it was told.
    for url in (address, f"http://localhost:{port}/media/{name}", f"https://nas.local/media/{name}?a=b#c"):
        whole(await show(rig, url))
        assert attached(rig) == [("image/png", PICTURE)]
    # What is not there is an address as any other.
    await refuses(rig, f"{rig.url}/media/{'0' * 32}.png", says="not on the public internet")
    await refuses(rig, f"{rig.url}/media/../media/{name}", says="not on the public internet")
    assert internet.attempts == []
    # A video is none, wherever it comes from.
    video = await keep(rig, internet.put("http://pictures.test/a.mp4", ok(contract.mp4())), "video")
    await refuses(rig, video, says="it is a video")


async def test_a_kept_picture_that_the_site_would_not_take_is_refused_as_too_large(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, {**KEEP, **SMALL_PICTURES}, models=(IMAGE, GPT))
    address = await keep(rig, internet.put("http://pictures.test/a.png", ok(large("large", MIB + 8))))
    assert address.startswith(rig.url)
    await refuses_too_large(rig, address)


async def refuses_too_large(rig: Rig, url: str) -> None:
    before = len(rig.calls)
    error = check_error(await show(rig, url), 413, "request_too_large")
    assert error["param"] == "messages[0].content"
    assert "1 MiB" in error["message"]
    assert len(rig.calls) == before


async def test_what_was_kept_is_served_by_the_next_start(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    name = (await keep(rig, internet.put("http://pictures.test/a.png"))).rpartition("/")[2]
    await rig.program.stop()
    # Whether it keeps or not.
    next_rig = await start(nursery, tmp_path, models=(IMAGE,), connected=False)
    assert (await next_rig.http.get(f"/media/{name}")).content == PICTURE


async def test_without_the_setting_addresses_are_left_alone(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, models=(IMAGE, RAY))
    for kind in ("image", "video"):
        url = internet.put("http://pictures.test/a")
        assert await keep(rig, url, kind) == url
    rig.arena.switch(raw={})
    text = whole(await rig.chat(RAY, "A cat")).choices[0].message.content or ""
    assert text.startswith(f"[video]({rig.arena_url}/media/")
    assert (internet.lookups, internet.attempts) == ([], [])
    assert not media_directory(tmp_path).exists()


async def test_a_stream_is_kept_alive_while_a_picture_is_fetched(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables: Tables = {
        "requests": {"commit_after_seconds": 0.05, "keepalive_seconds": 0.05},
        "media": {"keep": True, "timeout_seconds": 600},
    }
    rig, internet = await go_online(nursery, tmp_path, tables, models=(IMAGE,))
    go_on = trio.Event()

    async def page(stream: trio.abc.Stream) -> None:
        await go_on.wait()
        await internet.send(stream, ok(PICTURE))

    url = internet.put("http://pictures.test/a.png", page)
    rig.arena.switch(raw={"*": media_answer(("image", url))})
    body = {"model": IMAGE, "messages": [user("A cat")], "stream": True}
    received = ""
    async with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for text in response.aiter_text():
            received += text
            if internet.visits and received.count("data: ") > 3:
                go_on.set()
    stream = Stream(received)
    assert stream.text == f"![image]({rig.url}/media/{kept_name(PICTURE)})"
    assert stream.has_done
