"""What goes past Hypercorn, against Hypercorn: the same requests, the same answers, whoever reads them how.

One small application stands behind both: it streams, in pieces, what the request's body says.
"""

import errno
import functools
import itertools
import json
import socket
from typing import Any

import h11
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmarena_proxy import (
    ClientStream,
    Config,
    HttpConnection,
    HttpListener,
    HttpRequest,
    read_plain_head,
    serve_by_hypercorn,
)

Event = tuple[Any, ...]


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the pieces that the body lists; without any, with the method, the path and the body."""
    http = HttpRequest(scope, receive, send)
    http.extra_headers = {"x-request-id": "req_1"}
    body = await http.read_body(1 << 24)
    if not scope["path"].startswith("/stream"):
        text = json.dumps([scope["method"], scope["path"], scope["query_string"].decode(), len(body)])
        await http.respond(200, text.encode(), {"content-type": "application/json"})
        return
    await http.start_stream([(b"content-type", b"text/event-stream")])
    for size in json.loads(body):
        piece = http.frame(b"x" * size)
        await http.write(piece[http.write_now(piece) :])
    await http.end_stream(http.frame(b"end"))


async def serve_plain(stream: trio.SocketStream) -> None:
    await HttpConnection(application, ClientStream(stream)).serve()


async def serve_all_by_hypercorn(stream: trio.SocketStream) -> None:
    await serve_by_hypercorn(application, ClientStream(stream), b"")


def read_answers(data: bytes, methods: list[str]) -> list[Event]:
    """The events of well-formed answers, dates left out; fails where they are not well-formed."""
    events: list[Event] = []
    client = h11.Connection(h11.CLIENT)
    client.receive_data(data)
    client.receive_data(b"")
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "here")]))
        client.send(h11.EndOfMessage())
        body = b""
        while True:
            event = client.next_event()
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.InformationalResponse | h11.Response):
                headers = sorted(header for header in event.headers if header[0] != b"date")
                events.append((event.status_code, headers))
            else:
                break
        events.append((type(event).__name__, body))
        if not isinstance(event, h11.EndOfMessage) or client.our_state is not h11.DONE:
            break
        if client.their_state is not h11.DONE:
            break
        client.start_next_cycle()
    return events


LAST = b"GET /last HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"


async def ask(serve: Any, pieces: list[bytes], *, buffer_bytes: int = 0, pause_seconds: float = 0) -> bytes:
    """All that comes back of these pieces, the last of which has to ask for the connection's end."""
    answered = bytearray()
    with trio.fail_after(60):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        if buffer_bytes:
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        client = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        if buffer_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        async with listener, client, trio.open_nursery() as nursery:
            nursery.start_soon(serve, await listener.accept())

            async def send() -> None:
                for piece in pieces:
                    await client.send_all(piece)
                    await trio.sleep(0.001)

            nursery.start_soon(send)
            while data := await client.receive_some(1000 if pause_seconds else None):
                answered += data
                await trio.sleep(pause_seconds)
    return bytes(answered)


def compare(pieces: list[bytes], methods: list[str], **how: Any) -> list[Event]:
    ours, theirs = (
        read_answers(trio.run(functools.partial(ask, serve, pieces, **how)), methods)
        for serve in (serve_plain, serve_all_by_hypercorn)
    )
    assert ours == theirs
    return ours


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: here", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def streamed(sizes: list[int], *headers: str, version: str = "1.1") -> bytes:
    return post("/stream", json.dumps(sizes).encode(), *headers, version=version)


piece_sizes = st.lists(st.sampled_from([1, 15, 16, 255, 4096, 70_000]), max_size=6)
requests = st.one_of(
    st.builds(lambda sizes: ("POST", streamed(sizes)), piece_sizes),
    st.builds(lambda body: ("POST", post("/other?a=b%20c", body)), st.binary(max_size=300)),
    st.sampled_from(
        [
            ("GET", b"GET /caf%C3%A9 HTTP/1.1\r\nhost:here \r\nX-Other:\r\n\r\n"),
            ("HEAD", b"HEAD /x HTTP/1.1\r\nHost: here\r\n\r\n"),
            ("POST", streamed([5], "Expect: 100-continue")),
            ("POST", b"POST /stream HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
                     b"4\r\n[300\r\n1\r\n]\r\n0\r\n\r\n"),
        ]
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=4), st.lists(st.integers(0, 1 << 12), max_size=5))
@example([("POST", streamed([70_000] * 6))] * 3, [])
def test_requests_in_one_go_or_cut_anywhere_are_answered_as_hypercorn_answers_them(
    asked: list[tuple[str, bytes]], cuts: list[int]
) -> None:
    sent = b"".join(request for _, request in asked)
    places = sorted({0, *(cut % (len(sent) + 1) for cut in cuts), len(sent)})
    pieces = [sent[start:end] for start, end in itertools.pairwise(places)]
    events = compare([*pieces, LAST], [*(method for method, _ in asked), "GET"])
    assert sum(event[0] == "EndOfMessage" for event in events) == len(asked) + 1


@pytest.mark.parametrize("number", [1, 3])
def test_a_slow_reader_with_little_room_gets_every_byte_in_order(number: int) -> None:
    sent = [streamed([10, 30_000, 1, 9_000]) for _ in range(number)]
    methods = ["POST"] * number + ["GET"]
    events = compare([*sent, LAST], methods, buffer_bytes=4096, pause_seconds=0.0005)
    assert [event[1] for event in events if event[0] == "EndOfMessage"][:number] == [
        b"x" * 39_011 + b"end"
    ] * number


def test_http_1_0_and_a_wish_to_close_are_hypercorns() -> None:
    compare([streamed([5, 6], version="1.0")], ["POST"])
    compare([streamed([5, 6], "Connection: close")], ["POST"])
    compare([streamed([5]), streamed([6], version="1.0")], ["POST", "POST"])


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nX: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_what_is_wrong_or_unclear_is_not_plain(head: bytes) -> None:
    assert read_plain_head(head) is None


@given(st.binary(max_size=30), st.integers(0, 60))
@settings(deadline=None)
def test_a_plain_head_is_one_that_h11_reads_the_same_way(noise: bytes, at: int) -> None:
    head = b"GET /a?b HTTP/1.1\r\nHost: here\r\nX-Y:  z \r\n\r\n"
    data = head[:at] + noise + head[at:]
    if plain := read_plain_head(data):
        scope, length, rest = plain
        server = h11.Connection(h11.SERVER)
        server.receive_data(data)
        event = server.next_event()
        assert isinstance(event, h11.Request)
        assert (event.method, event.target.partition(b"?")[0]) == (
            scope["method"].encode(),
            scope["raw_path"],
        )
        assert list(event.headers) == scope["headers"]
        assert rest.startswith(server.trailing_data[0]) or length


async def test_a_client_that_leaves_before_its_answer_is_told_nothing() -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with trio.fail_after(60):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        client = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        async with listener, client, trio.open_nursery() as nursery:
            nursery.start_soon(HttpConnection(waits, ClientStream(await listener.accept())).serve)
            await client.send_all(streamed([1]))
            await client.send_eof()
            assert await client.receive_some() == b""


class FullListener:
    """Stands in for a listener of a system that can open no more files, once; then one connection comes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._answers: list[Any] = [OSError(errno.EMFILE, "Too many open files"), stream]

    async def accept(self) -> trio.SocketStream:
        if not self._answers:
            await trio.sleep_forever()
        answer = self._answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        stream: trio.SocketStream = answer
        return stream

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_a_system_that_is_full_for_a_moment_ends_nothing() -> None:
    with trio.fail_after(60):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        client = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        async with listener, client, trio.open_nursery() as nursery:
            full: Any = FullListener(await listener.accept())
            app: Any = application
            server = HttpListener(app, Config())
            nursery.start_soon(server._listen, full, nursery)
            await client.send_all(LAST)
            answered = b""
            while data := await client.receive_some():
                answered += data
            nursery.cancel_scope.cancel()
    assert read_answers(answered, ["GET"])[0][0] == 200
