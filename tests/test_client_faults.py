"""Clients that leave, dawdle, flood or break off: it costs them alone, and leaves nothing behind."""

import base64
import contextlib
import json
import socket
import sqlite3
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import h11
import httpx
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    GPT,
    IMAGE,
    Held,
    Rig,
    Stream,
    Tables,
    check_error,
    eventually,
    model_id,
    plain_client,
    request_body,
    sit_down,
    start,
    turns,
    until,
    whole,
)

import lmarena_proxy
from demo import contract
from demo.arena import Switches
from lmarena_proxy import RequestEnded

CHAT = "/v1/chat/completions"
ONE: Tables = {"pool": {"sessions_per_model": 1}}


pytestmark = pytest.mark.usefixtures("errors")


class Client:
    """One connection to the API, on which the test decides about every byte."""

    def __init__(self, url: str, stream: trio.SocketStream) -> None:
        self.host = urlsplit(url).netloc
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT)

    def head(self, method: str, path: str, *headers: str) -> bytes:
        return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {self.host}", *headers, "", ""]).encode()

    def chat(self, model: str, *messages: Any, headers: Sequence[str] = (), **rest: Any) -> bytes:
        """A whole request, as it goes over the wire."""
        body = json.dumps(request_body(model, *messages, **rest)).encode()
        usual = "Content-Type: application/json", f"Content-Length: {len(body)}"
        return self.head("POST", CHAT, *usual, *headers) + body

    async def ask(self, model: str, *messages: Any, **rest: Any) -> httpx.Response:
        await self.stream.send_all(self.chat(model, *messages, **rest))
        return await self.response()

    async def get(self, path: str) -> httpx.Response:
        await self.stream.send_all(self.head("GET", path))
        return await self.response()

    async def pieces(self, max_bytes: int) -> AsyncIterator[h11.Event]:
        """The next response's events; its bytes are taken from the socket so many at a time."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        # Only the reading half of h11 is used; it has to know what is being answered.
        self._http.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        self._http.send(h11.EndOfMessage())
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self.stream.receive_some(max_bytes))
                continue
            assert isinstance(event, h11.Event), event
            yield event
            if isinstance(event, h11.EndOfMessage):
                return

    async def response(self, max_bytes: int = 65536) -> httpx.Response:
        """The next response, read to its end."""
        status, headers, body = 0, [], bytearray()
        async for event in self.pieces(max_bytes):
            match event:
                case h11.Response():
                    status, headers = event.status_code, [*event.headers]
                case h11.Data():
                    body += event.data
        return httpx.Response(status, headers=headers, content=bytes(body))

    async def receive_until(self, wanted: bytes) -> bytes:
        received = b""
        while wanted not in received:
            data = await self.stream.receive_some(65536)
            assert data, received
            received += data
        return received

    async def leave(self, how: Literal["close", "reset"] = "close") -> None:
        """Close; with a reset as when an app is killed, else in order."""
        if how == "reset":
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(self.stream)


def text_of(response: httpx.Response) -> str:
    """The text of a good answer, streamed or whole."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        return whole(response).choices[0].message.content or ""
    stream = Stream(response.text)
    assert (stream.errors, stream.finish_reasons, stream.has_done) == ([], ["stop"], True), response.text
    return stream.text


# Headers of a request that the program reads itself, and of one that it leaves to Hypercorn.
WAYS: tuple[tuple[str, ...], ...] = (), ("Connection: close",)


@contextlib.asynccontextmanager
async def connection(url: str, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    """A connection; a small receive buffer makes what is not read stay with the server."""
    address = urlsplit(url)
    plain = trio.socket.socket()
    if receive_buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await plain.connect((address.hostname, address.port))
    async with trio.SocketStream(plain) as stream:
        yield Client(url, stream)


async def settled(rig: Rig) -> None:
    """Nothing of any request is left: no token, no session, no waiter, no call at the arena."""

    def is_settled() -> bool:
        pools = [*rig.program.pool]
        held = [pool.limiter.borrowed_tokens or pool.waiting or pool.busy for pool in pools]
        claims = [pool.leases or pool.waiters for pool in pools]
        return not (any(held) or any(claims) or rig.program.answers.active or rig.arena.stats()["running"])

    await until(is_settled, 20)
    assert rig.program.pool.violations() == []


# ── Leaving ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_leaves_nothing_behind(
    nursery: trio.Nursery, tmp_path: Path, how: Literal["close", "reset"], is_stream: bool
) -> None:
    """Before the site has begun, in the middle, with two answers at once, and queued behind those."""
    tables: Tables = {"pool": {"sessions_per_model": 2}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    for n in (1, 2):
        for switches in ({"latency_seconds": 600}, {"latency_seconds": 0, "hang_after_lines": 1}):
            rig.arena.switch(**switches, trouble_times=n)
            rig.arena.record.clear()
            async with connection(rig.url) as client, connection(rig.url) as queued:
                await client.stream.send_all(client.chat(CLAUDE, stream=is_stream, n=n))
                await until(lambda: len(rig.calls) == n)  # noqa: B023
                if n == 2:
                    await queued.stream.send_all(queued.chat(CLAUDE, stream=is_stream))
                    await until(lambda: rig.pool(CLAUDE).waiting == 1)
                    await queued.leave(how)
                    await until(lambda: rig.pool(CLAUDE).waiting == 0)
                if "hang_after_lines" in switches:
                    await until(lambda: all(seen.sent_bytes for seen in rig.calls))
                    if is_stream:
                        await client.receive_until(CLAUDE.encode()[:4])
                await client.leave(how)
            await settled(rig)
            assert [seen.outcome for seen in rig.calls] == ["aborted"] * n
            rig.arena.switch(latency_seconds=0, hang_after_lines=None, trouble_times=None)
            whole(await rig.chat(CLAUDE, n=2))
    assert {ended.outcome for ended in rig.event(RequestEnded) if ended.status != 200} == {"client_left"}
    assert len(rig.pool(CLAUDE).sessions) == 2


async def test_a_client_that_leaves_while_no_tab_is_there_is_never_asked_for_at_the_site(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), connected=False)
    async with contextlib.AsyncExitStack() as clients:
        for is_stream in (True, False):
            client = await clients.enter_async_context(connection(rig.url))
            await client.stream.send_all(client.chat(CLAUDE, stream=is_stream))
        await until(lambda: rig.program.answers.active == 2)
    await until(lambda: rig.program.answers.active == 0)
    await rig.connect()
    whole(await rig.chat(CLAUDE, "Still here"))
    assert [turns(seen)[-1][1] for seen in rig.calls] == ["Still here"]
    await settled(rig)


async def test_those_who_left_the_queue_are_not_asked_for_and_the_others_keep_their_order(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=ONE, filled=True)
    held = Held(monkeypatch)
    async with contextlib.AsyncExitStack() as clients:
        queue = [await clients.enter_async_context(connection(rig.url)) for _ in range(9)]
        for number, client in enumerate(queue):
            await client.stream.send_all(client.chat(CLAUDE, str(number), stream=number % 2 == 0))
            await until(lambda: rig.program.answers.active == number + 1)  # noqa: B023
        for number in (2, 3, 4, 8):
            await queue[number].leave("reset" if number % 2 else "close")
        await until(lambda: rig.pool(CLAUDE).waiting == 4)
        held.release()
        for number in (0, 1, 5, 6, 7):
            assert text_of(await queue[number].response()) == f"[{CLAUDE}] {number}"
        assert [turns(seen)[-1][1] for seen in rig.calls] == ["0", "1", "5", "6", "7"]
        await settled(rig)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_reads_byte_by_byte_gets_everything_and_slows_nobody(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    text = "长😀" * 400
    rig = await start(
        nursery, tmp_path, models=(CLAUDE, DEEPSEEK), switches=Switches(answers={CLAUDE: [text]})
    )
    for is_stream in (True, False):
        async with connection(rig.url, 2048) as slow, connection(rig.url) as other:
            await slow.stream.send_all(slow.chat(CLAUDE, stream=is_stream))
            body, count = bytearray(), 0
            async for event in slow.pieces(1):
                if isinstance(event, h11.Data):
                    body += event.data
                    count += 1
                    if count % 200 == 0:  # The other asks and is answered while this one is not half-way.
                        whole(await other.ask(DEEPSEEK))
        assert count == len(body) > 2000
        answer = (
            Stream(body.decode()).text if is_stream else json.loads(body)["choices"][0]["message"]["content"]
        )
        assert answer == text
    await settled(rig)


async def test_a_large_answer_waits_for_a_slow_reader(nursery: trio.Nursery, tmp_path: Path) -> None:
    """What does not fit into any buffer any more is taken from the site as it is read."""
    pieces = [f"{number:06} " * 2000 for number in range(600)]  # 8 MB
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(answers={"*": pieces}))
    async with connection(rig.url, 2048) as slow, connection(rig.url) as other:
        await slow.stream.send_all(slow.chat(CLAUDE, stream=True))
        body = bytearray()
        async for event in slow.pieces(16 << 10):
            if isinstance(event, h11.Data):
                body += event.data
                if len(body) < 1 << 16:
                    assert (await other.get("/health")).status_code == 200
    stream = Stream(body.decode())
    assert stream.text == "".join(pieces)
    assert stream.has_done
    await settled(rig)


async def test_a_whole_answer_that_nobody_reads_holds_no_conversation(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    switches = Switches(answers={"*": ["x" * 100_000] * 120})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=ONE, switches=switches)
    async with connection(rig.url, 2048) as client:
        await client.stream.send_all(client.chat(CLAUDE))
        await until(lambda: rig.calls and rig.calls[0].outcome == "complete")
        await until(lambda: rig.pool(CLAUDE).limiter.borrowed_tokens == 0)
        rig.arena.switch(answers={})
        whole(await rig.chat(CLAUDE, "and me?"))
        await client.leave("reset")
    await settled(rig)


@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("count", [8, 120], ids=["all in the outbox", "more than that"])
@pytest.mark.parametrize("headers", WAYS, ids=["plain", "Hypercorn"])
async def test_a_client_that_reads_nothing_for_too_long_has_left(
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    headers: Sequence[str],
    is_stream: bool,
    count: int,
) -> None:
    # What systems take beside what is asked of them would be megabytes.
    monkeypatch.setattr(lmarena_proxy.StreamedReply, "OUTBOX_LIMIT_BYTES", 1 << 24)
    tables = {**ONE, "requests": {"idle_timeout_seconds": 0.5}}
    switches = Switches(answers={"*": ["x" * 100_000] * count})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    async with connection(rig.url, 2048) as client:
        await client.stream.send_all(client.chat(CLAUDE, stream=is_stream, headers=headers))
        await until(lambda: rig.event(RequestEnded), 20)
        await settled(rig)
        assert [event.status for event in rig.event(RequestEnded)] == [499]
        rig.arena.switch(answers={})
        whole(await rig.chat(CLAUDE, "and me?"))


# ── Sending ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_may_arrive_byte_by_byte(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    async with connection(rig.url) as client:
        client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for is_stream in (True, False):
            for byte in client.chat(CLAUDE, "你好", stream=is_stream):
                await client.stream.send_all(bytes([byte]))
            assert text_of(await client.response()) == f"[{CLAUDE}] 你好"
    await settled(rig)


@pytest.mark.parametrize("framing", ["announced", "chunked"])
async def test_a_body_that_stops_half_way_times_out(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setattr(lmarena_proxy, "BODY_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(lmarena_proxy, "DRAIN_SECONDS", 0.1)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    length = "Content-Length: 1000" if framing == "announced" else "Transfer-Encoding: chunked"
    half = b'{"model":' if framing == "announced" else b'3e8\r\n{"model":'
    for path in (CHAT, "/v1/images/edits", "/api/bootstrap"):
        async with connection(rig.url) as client, connection(rig.url) as other:
            headers = length, "Content-Type: application/json"
            await client.stream.send_all(client.head("POST", path, *headers) + half)
            whole(await other.ask(CLAUDE))
            response = await client.response()
            check_error(response, 408, "timeout")
            # What is left of the body would be taken for the next request.
            assert response.headers["connection"] == "close"
            assert await client.stream.receive_some(1) == b""
    await settled(rig)
    assert len(rig.event(RequestEnded)) == 3


@pytest.mark.parametrize("how", ["close", "reset", "half"])
async def test_a_body_shorter_than_announced_is_nobodys_request(
    nursery: trio.Nursery, tmp_path: Path, how: Literal["close", "reset", "half"]
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for path in (CHAT, "/v1/images/generations", "/api/bootstrap"):
        body = json.dumps(request_body(CLAUDE)).encode()
        async with connection(rig.url) as client:
            length = f"Content-Length: {len(body) + 1}"
            await client.stream.send_all(client.head("POST", path, length) + body)
            assert (await rig.http.get("/health")).status_code == 200
            if how == "half":
                await client.stream.send_eof()
                assert b"HTTP/1.1 200" not in await client.stream.receive_some(65536)
            else:
                await client.leave(how)
    whole(await rig.chat(CLAUDE, "Still here"))
    await settled(rig)
    assert [turns(seen)[-1][1] for seen in rig.calls] == ["Still here"]
    assert [ended.status for ended in rig.event(RequestEnded)] == [200]


def memory_mib(pid: int, line: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    [kib] = [row.split()[1] for row in status.splitlines() if row.startswith(f"{line}:")]
    return int(kib) / 1024


@pytest.mark.parametrize("framing", ["announced", "chunked"])
async def test_a_flood_is_refused_on_its_connection_and_costs_no_memory(
    nursery: trio.Nursery, tmp_path: Path, framing: str
) -> None:
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    tables: Tables = {"server": {"max_body_mb": 1}, "bootstrap": {"enabled": False}}
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=tables)
    with desk.terminal as terminal:
        piece = b" " * (1 << 20)
        chunk = b"100000\r\n" + piece + b"\r\n" if framing == "chunked" else piece
        length = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {100 << 20}"
        async with connection(desk.url) as client:

            async def flood(megabytes: int) -> None:
                for _ in range(megabytes):
                    await client.stream.send_all(chunk)
                if framing == "chunked":
                    await client.stream.send_all(b"0\r\n\r\n")

            assert (await client.get("/health")).status_code == 200
            before = memory_mib(terminal.process.pid, "VmHWM")
            for path in (CHAT, "/v1/images/edits"):
                await client.stream.send_all(client.head("POST", path, length))
                async with trio.open_nursery() as sending:
                    sending.start_soon(flood, 100)
                    check_error(await client.response(), 413, "request_too_large")
                assert (await client.get("/health")).status_code == 200
            grown = memory_mib(terminal.process.pid, "VmHWM") - before
        assert grown < 12, grown
        assert not [line for line in terminal.log_lines() if "traceback" in line]


# ── Many ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_thousand_clients_at_once_share_four_conversations_in_order(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves, size = 20, 50
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    held = Held(monkeypatch)
    answered: list[str] = []

    async def ask(wave: int, number: int) -> None:
        async with connection(rig.url) as client:
            text = f"{wave} {number}"
            assert text_of(await client.ask(CLAUDE, text, stream=number % 2 == 0)) == f"[{CLAUDE}] {text}"
            answered.append(text)

    async with trio.open_nursery() as clients:
        for wave in range(waves):
            for number in range(size):
                clients.start_soon(ask, wave, number)
            await until(lambda: rig.program.answers.active == (wave + 1) * size)  # noqa: B023
        assert rig.pool(CLAUDE).waiting == waves * size - 4
        assert len(rig.calls) == 4
        held.release()
    assert len({*answered}) == waves * size
    assert rig.arena.max_running(model_id(CLAUDE)) == 4
    assert rig.arena.max_running_pair() == 1
    order = [int(turns(seen)[-1][1].split()[0]) for seen in rig.calls]
    assert len(order) == waves * size
    # Four are on their way to the site at once, and may overtake one another there.
    ordered = sorted(order)
    assert all(ordered[max(0, place - 4)] <= wave for place, wave in enumerate(order))
    assert all(wave <= ordered[min(place + 4, len(order) - 1)] for place, wave in enumerate(order))
    assert {ended.status for ended in rig.event(RequestEnded)} == {200}
    await settled(rig)


async def test_too_many_connections_are_refused_until_one_leaves(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables={"limits": {"connections": 4}})
    async with contextlib.AsyncExitStack() as clients:
        inside = [await clients.enter_async_context(connection(rig.url)) for _ in range(4)]
        for number, client in enumerate(inside):
            assert (await client.get("/health")).status_code == 200, number
        for request in (b"", inside[0].head("GET", "/health"), inside[0].chat(CLAUDE)):
            async with connection(rig.url) as outside:
                await outside.stream.send_all(request)
                response = await outside.response()
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (503, "overloaded")
                assert error.keys() == {"message", "type", "param", "code"}
                assert "limits.connections" in error["message"]
                assert response.headers["retry-after"] == "5"
                assert response.headers["connection"] == "close"
        for _ in range(20):  # A library's client sees the same, each time.
            async with plain_client(rig.url) as library:
                assert (await library.post(CHAT, json=request_body(CLAUDE))).status_code == 503
        assert text_of(await inside[0].ask(CLAUDE)) == f"[{CLAUDE}] Hello"
        last = inside.pop()
        await last.stream.send_all(last.head("GET", "/health", "Connection: close"))
        assert (await last.response()).status_code == 200
        await eventually(partial(is_served, rig), 5)
        for client in inside:
            assert (await client.get("/health")).status_code == 200
    await settled(rig)


async def is_served(rig: Rig) -> bool:
    """Whether there is room for a connection more."""
    async with connection(rig.url) as client:
        return (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_makes_place_however_its_client_left(
    nursery: trio.Nursery, tmp_path: Path, how: Literal["close", "reset"]
) -> None:
    """Before it said anything, within a head, within a body, after an answer, after an answer of the site."""
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables={"limits": {"connections": 5}})
    async with contextlib.AsyncExitStack() as clients:
        inside = [await clients.enter_async_context(connection(rig.url)) for _ in range(5)]
        _, head, body, idle, answered = inside
        await head.stream.send_all(head.chat(CLAUDE)[:20])
        await body.stream.send_all(body.chat(CLAUDE)[:-20])
        assert (await idle.get("/health")).status_code == 200
        assert text_of(await answered.ask(CLAUDE)) == f"[{CLAUDE}] Hello"
        assert not await is_served(rig)
        for client in inside:
            await client.leave(how)

        async def come_in() -> bool:
            client = await clients.enter_async_context(connection(rig.url))
            return (await client.get("/health")).status_code == 200

        for _ in range(5):
            await eventually(come_in, 5)
    await settled(rig)


async def test_idle_connections_disturb_nobody_and_stay_usable(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    async with contextlib.AsyncExitStack() as clients:
        idle = [await clients.enter_async_context(connection(rig.url)) for _ in range(200)]
        for client in idle[:100]:  # The others have never said anything.
            assert (await client.get("/health")).status_code == 200
        for _ in range(10):
            whole(await rig.chat(CLAUDE))
        for client in idle[50:150:10]:
            assert text_of(await client.ask(CLAUDE, stream=True)) == f"[{CLAUDE}] Hello"
            assert text_of(await client.ask(CLAUDE)) == f"[{CLAUDE}] Hello"
    await settled(rig)


async def test_requests_sent_ahead_are_answered_in_turn(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    async with connection(rig.url) as client:
        ahead = [client.chat(CLAUDE, str(number), stream=number % 2 == 0) for number in range(4)]
        await client.stream.send_all(b"".join(ahead))
        for number in range(4):
            assert text_of(await client.response()) == f"[{CLAUDE}] {number}"
    await settled(rig)


# ── Other protocols ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/", CHAT, "/v1/models", "/nowhere"])
async def test_a_websocket_at_the_api_is_forbidden(nursery: trio.Nursery, tmp_path: Path, path: str) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), connected=False)
    key = "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upgrade = "Connection: Upgrade", "Upgrade: websocket", *key
    for _ in range(3):
        async with connection(rig.url) as client:
            await client.stream.send_all(client.head("GET", path, *upgrade))
            assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 403 ")
    assert (await rig.http.get("/health")).status_code == 200
    await settled(rig)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_wants_the_connection_closed_has_it_closed_after_all_of_the_answer(
    nursery: trio.Nursery, tmp_path: Path, version: str, is_stream: bool
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    async with connection(rig.url) as client:
        request = client.chat(CLAUDE, stream=is_stream)
        if version == "1.0":
            request = request.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        else:
            request = request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        await client.stream.send_all(request)
        received = b""
        while data := await client.stream.receive_some(65536):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0].endswith(b" 200 "), head
    assert b"connection: close" in head.lower() or version == "1.0"
    if version == "1.0":
        assert b"chunked" not in head.lower()
        text = (
            Stream(body.decode()).text if is_stream else json.loads(body)["choices"][0]["message"]["content"]
        )
        assert text == f"[{CLAUDE}] Hello"
    else:
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        http.send(h11.EndOfMessage())
        http.receive_data(received)
        http.receive_data(b"")
        while (event := http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.EndOfMessage):
                break
        assert isinstance(event, h11.EndOfMessage)
    await settled(rig)


# ── Answers without an end ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("begins", [True, False], ids=["after the first byte", "before the first byte"])
async def test_an_answer_beyond_the_limit_is_aborted(
    nursery: trio.Nursery, tmp_path: Path, is_stream: bool, begins: bool
) -> None:
    # Lines of an unknown kind are skipped: nothing of them reaches the client.
    body = f'{"a0" if begins else "a_"}:"{"x" * 100_000}"\n' * 300
    tables = {"limits": {"answer_mb": 1}, **ONE}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(raw={"*": body}, line_delay_seconds=0.02)
    response = await rig.chat(CLAUDE, stream=is_stream)
    if is_stream and begins:
        stream = Stream(response.text)
        assert {*stream.text} == {"x"}
        assert len(stream.text) <= 1 << 20
        [error] = stream.errors
        assert (error["code"], stream.finish_reasons, stream.has_done) == ("upstream_error", [], True)
    else:
        error = check_error(response, 502, "upstream_error")
        assert response.headers["x-should-retry"] == "false"
    assert "does not end" in error["message"]
    await settled(rig)
    [seen] = rig.calls
    assert (seen.kind, seen.outcome) == ("retry", "aborted")
    assert seen.sent_bytes < len(body)
    rig.arena.switch(raw={}, line_delay_seconds=0)
    whole(await rig.chat(CLAUDE))


# ── What is written down ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keep", [False, True], ids=["", "keeping media"])
@pytest.mark.parametrize("contents", [True, False], ids=["contents", "no contents"])
async def test_no_secret_and_no_payload_is_written_down_and_no_content_where_that_is_off(
    nursery: trio.Nursery, tmp_path: Path, contents: bool, keep: bool
) -> None:
    key, wrong = "sk-the-right-one-7f3a", "sk-a-wrong-one-51bc"
    image = base64.b64encode(contract.png("seed") * 3).decode()
    url = f"data:image/png;base64,{image}"
    tables: Tables = {
        "server": {"api_key": key},
        "log": {"contents": contents, "level": "DEBUG"},
        "media": {"keep": keep},
        "bootstrap": {"enabled": False},
    }
    answers = {CLAUDE: [f"Quokka ![x]({url}) and ", url], GPT: ["Quokka"]}
    pictures = f'a2:{json.dumps([{"type": "image", "image": url}])}\nad:{{"finishReason":"stop"}}\n'
    switches = Switches(answers=answers, raw={IMAGE: pictures})
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE, GPT, IMAGE), tables=tables, switches=switches)
    with desk.terminal as terminal:
        await desk.make_ready()
        desk.http.headers["authorization"] = f"Bearer {key}"
        texts = (f"Wombat {url}", f"Wombat\n```\n{url}\n```", f"Wombat ![x]({url}) {url}")
        given = {"type": "image_url", "image_url": {"url": url}}
        file = {"type": "file", "file": {"file_data": image, "filename": "a.png"}}
        called = {"function": {"name": "see", "arguments": json.dumps({"Wombat": url})}}
        for message in (
            *({"role": role, "content": text} for text in texts for role in ("user", "system")),
            {"role": "user", "content": [{"type": "text", "text": "Wombat"}, given, file]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", **called}]},
        ):
            for model in (CLAUDE, GPT):
                for stream in (True, False):
                    body = request_body(model, message, "Wombat", stream=stream)
                    await desk.http.post(CHAT, json=body)  # Good or refused: what is written counts.
        assert (await desk.http.post(CHAT, json=request_body(IMAGE, "Wombat"))).status_code == 200
        await desk.http.post("/v1/images/generations", json={"model": IMAGE, "prompt": f"Wombat {url}"})
        desk.http.headers["authorization"] = f"Bearer {wrong}"
        assert (await desk.http.post(CHAT, json=request_body(CLAUDE, "Wombat"))).status_code == 401
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0
    logged = terminal.log_lines()
    assert not [line for line in logged if line["event"] != "RequestEnded" and "traceback" in line]
    lines = [json.dumps(line) for line in logged]
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "lmarena_proxy.sqlite3")) as store:
        rows = [repr(row) for row in store.execute("SELECT * FROM requests")]
        rows += [repr(row) for row in store.execute("SELECT * FROM sessions")]
    written = [*lines, *rows, terminal.output]
    assert len(rows) > 20
    cookies = [cookie.value for cookie in desk.twin.http.cookies.jar if cookie.value]
    assert cookies
    for secret in (key, wrong, image[:40], image[-40:], *cookies, *(cookie[-40:] for cookie in cookies)):
        assert [text[:600] for text in written if secret in text] == []
    for word in ("Wombat", "Quokka"):
        assert any(word in text for text in lines) == any(word in text for text in rows) == contents


# ── Shutting down ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_busy_shutdown_lets_finish_what_can_and_tells_the_others(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: Tables = {
        "server": {"shutdown_grace_seconds": 1.5},
        "pool": {"sessions_per_model": 2},
        "media": {"timeout_seconds": 600},
        "requests": {"commit_after_seconds": 0.05},
    }
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK, GPT), tables=tables, filled=True)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    origin = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    rig.program.media.site_origins.add(origin)
    visits: list[trio.SocketStream] = []

    async def never_answer(stream: trio.SocketStream) -> None:
        visits.append(stream)
        await trio.sleep_forever()

    nursery.start_soon(trio.serve_listeners, never_answer, listeners)
    part = {"type": "image_url", "image_url": {"url": f"{origin}/a.png"}}
    replies: dict[str, httpx.Response] = {}

    async def ask(name: str, model: str, content: Any = "Hello", **rest: Any) -> None:
        async with connection(rig.url) as client:
            replies[name] = await client.ask(model, {"role": "user", "content": content}, **rest)

    held = Held(monkeypatch)
    async with trio.open_nursery() as clients:
        for stream in (True, False):
            clients.start_soon(partial(ask, f"finishing {stream}", CLAUDE, stream=stream))
        await until(lambda: len(rig.calls) == 2)
        await until(lambda: rig.arena.stats()["running"] == 2)
        held.free = 1 << 20
        rig.arena.switch(hang_after_lines=1, trouble_models={DEEPSEEK})
        clients.start_soon(partial(ask, "two True", DEEPSEEK, n=2, stream=True))
        await until(lambda: len(rig.calls) == 4)
        for stream in (True, False):
            clients.start_soon(partial(ask, f"queued {stream}", DEEPSEEK, stream=stream))
            clients.start_soon(partial(ask, f"picture {stream}", GPT, [part], stream=stream))
        clients.start_soon(partial(ask, "two False", DEEPSEEK, n=2))
        await until(lambda: rig.program.answers.active == 8 and len(visits) == 2)
        await until(lambda: rig.pool(DEEPSEEK).waiting == 4)
        clients.start_soon(rig.program.stop)

        async def is_draining() -> bool:
            async with connection(rig.url) as late:
                response = await late.ask(GPT)
            return response.status_code == 503 and check_error(response, 503, "shutting_down") is not None

        await eventually(is_draining)
        held.release()
    for stream in (True, False):
        assert text_of(replies.pop(f"finishing {stream}")) == f"[{CLAUDE}] Hello"
    assert replies.keys() == {
        f"{what} {stream}" for what in ("two", "queued", "picture") for stream in (True, False)
    }
    for name, response in replies.items():
        if name.endswith("True"):
            stream_ = Stream(response.text)
            assert [error["code"] for error in stream_.errors] == ["shutting_down"], name
            assert (stream_.finish_reasons, stream_.has_done) == ([], True), name
        else:
            check_error(response, 503, "shutting_down")
    await until(lambda: rig.arena.stats()["running"] == 0)
    assert sorted(seen.outcome for seen in rig.calls) == ["aborted", "aborted", "complete", "complete"]
    assert rig.program.pool.violations() == []
    with pytest.raises(OSError):
        await trio.open_tcp_stream("127.0.0.1", urlsplit(rig.url).port or 0)


async def test_clients_that_do_not_read_do_not_hold_up_a_shutdown(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables: Tables = {"server": {"shutdown_grace_seconds": 0.2}, "requests": {"idle_timeout_seconds": 600}}
    switches = Switches(answers={"*": ["x" * 100_000] * 120})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches, filled=True)
    (program,) = [task for task in nursery.child_tasks if task.name.endswith("Program.run")]
    async with contextlib.AsyncExitStack() as clients:
        for headers in WAYS:
            for is_stream in (True, False):
                client = await clients.enter_async_context(connection(rig.url, 2048))
                request = client.chat(CLAUDE, stream=is_stream, headers=headers)
                await client.stream.send_all(request)
        await until(lambda: sum(seen.sent_bytes > 4_000_000 for seen in rig.calls) == 4)
        await rig.program.stop()
        await until(lambda: program not in nursery.child_tasks)
    assert len(rig.event(RequestEnded)) == 4
