"""What a chunk costs, counted in calls of Python functions: the same on every machine, and never in seconds.

A count that grows says that something was added to the path of every chunk. It may be worth that; then the
limit here is raised with it, on purpose.
"""

import contextlib
import gc
import io
import json
import logging
import re
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing
from rich.console import Console
from rich.syntax import Syntax

from lmarena_proxy import (
    Answer,
    AnswerRequest,
    ArenaStreamDecoder,
    Catalog,
    Choice,
    ChunkEncoder,
    ConfigError,
    ConsoleHandler,
    EventBus,
    Exchange,
    FrameLane,
    Head,
    HttpConnection,
    HttpRequest,
    Lease,
    Limits,
    Message,
    Model,
    PoolConfig,
    Pump,
    RequestsConfig,
    SessionPool,
    Store,
    StreamedReply,
    Text,
    Translator,
    parse_config,
)

CHUNKS = 200
LINES = [b"a0:" + json.dumps(f"piece {number}, 你好").encode() + b"\n" for number in range(CHUNKS)]
LIMITS = Limits(10, 10, 10, 10, 10, 10, 10, attempts=1)
ASKED = AnswerRequest(model="m", messages=[Message("user", "Hello")], paths=["messages[0]"], stream=True)


def calls_per_chunk(work: Callable[[], object]) -> float:
    """How many Python functions `work`, which is done with all chunks, calls for each."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count / CHUNKS


def masked(opcode: int, payload: bytes) -> bytes:
    """A final frame as a browser sends it (RFC 6455, section 5.2)."""
    key = b"\x01\x02\x03\x04"
    short = len(payload) < 126
    size = bytes([0x80 | len(payload)]) if short else struct.pack(">BH", 0x80 | 126, len(payload))
    body = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))
    return bytes([0x80 | opcode]) + size + key + body


def test_a_chunk_is_decoded_shown_and_encoded_in_few_calls() -> None:
    decoder, answer = ArenaStreamDecoder(), Answer(ASKED, RequestsConfig())
    encoder = ChunkEncoder("chatcmpl-1", "m", 1)
    sent: list[bytes] = []

    def work() -> None:
        for line in LINES:
            for event in answer.take(decoder.feed(line)):
                sent.append(encoder.event(event))

    assert calls_per_chunk(work) <= 11  # It is 10: four to decode a line, three to show it, two to encode it.
    assert len(sent) == CHUNKS


class Connection:
    """Stands in for HttpConnection, before a client that reads all."""

    has_body_here = True
    written = b""

    def __init__(self) -> None:
        self.started: list[int] = []

    def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.started.append(status)

    def write_now(self, data: bytes | bytearray) -> int:
        self.written += data
        return len(data)


async def streamed_reply(connection: Connection) -> StreamedReply:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        raise AssertionError(f"{message} is not sent without waiting")

    scope = {"method": "POST", "path": "/", "headers": [], "http_version": "1.1"}
    http = HttpRequest(scope | {"state": {HttpConnection.STATE_KEY: connection}}, receive, send)
    await http.read_body(1 << 20)
    return StreamedReply(http, ASKED, RequestsConfig())


async def test_a_chunk_is_written_in_few_calls_and_without_a_task_switch() -> None:
    connection = Connection()
    reply = await streamed_reply(connection)
    events = [Text("piece")]
    await reply.show(0, events)

    def work() -> None:
        for _ in LINES:
            with contextlib.suppress(StopIteration):
                reply.show(0, events).send(None)  # No scheduler: it must not wait for anything.

    assert calls_per_chunk(work) <= 17  # It is 15, of which three are `suppress`.
    assert connection.written.count(b"piece") == CHUNKS + 1
    assert connection.started == [200]


async def test_a_chunk_goes_from_the_bridge_to_the_socket_in_few_calls_and_without_a_task_switch() -> None:
    connection = Connection()
    reply = await streamed_reply(connection)
    exchange, lease = Exchange(1), Lease("req_1", Model(id="m-1", name="m"))
    choice = Choice(reply, 0, Answer(ASKED, RequestsConfig()), lease, None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Pump(choice, lease, LIMITS).run, exchange)
        exchange.begin(Head(1, 200))
        await trio.testing.wait_all_tasks_blocked()
        exchange.feed(LINES[0])
        assert connection.started == [200]
        assert connection.written.count(b"piece") == 1

        def work() -> None:
            for line in LINES:
                exchange.feed(line)

        calls = calls_per_chunk(work)
        assert connection.written.count(b"piece") == CHUNKS + 1
        nursery.cancel_scope.cancel()
    assert calls <= 25  # It is 24, of which six are the clock's.


async def test_a_chunk_is_taken_from_the_bridge_in_few_calls() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    lane, exchange = FrameLane(ours), Exchange(1)  # type: ignore[arg-type]
    taken: list[bytes] = []

    def take(message: bytes, is_text: bool) -> bool:
        exchange.feed(message[8:])
        taken.append(message)
        return True

    lane.take = take
    lane.open()
    frames = b"".join([masked(2, struct.pack(">II", 1, len(line)) + line) for line in LINES])
    await theirs.send_all(frames)
    await theirs.send_eof()
    with trio.fail_after(10):
        assert await lane.receive_some() == b""
    assert [message[8:] for message in taken] == LINES
    taken.clear()

    calls = calls_per_chunk(lambda: lane._sift(frames))
    assert calls <= 9  # It is 7: three for the frame, the mask, two for the exchange, and `take` here.
    assert await exchange.receive() == b"".join(LINES * 2)


@pytest.mark.parametrize("cut", [1, 5, 100])
async def test_frames_that_arrive_in_pieces_are_taken_whole_and_in_order(cut: int) -> None:
    """And what is not for the lane passes, byte for byte: pings, fragments, and what comes after them."""
    ping, text = masked(9, b"hello"), masked(1, b'{"type": "pong"}')
    fragments = bytes([masked(2, b"ab")[0] & 0x7F]) + masked(2, b"ab")[1:] + masked(0, b"cd")
    binary = [masked(2, struct.pack(">II", 1, len(line)) + line) for line in LINES[:3]]
    frames = [binary[0], ping, text, binary[1], fragments, ping, binary[2]]
    lane = FrameLane(None)  # type: ignore[arg-type]
    taken: list[tuple[bytes, bool]] = []

    def take(message: bytes, is_text: bool) -> bool:
        taken.append((message, is_text))
        return True

    lane.take = take
    lane.open()
    sent, passed = b"".join(frames), b""
    for at in range(0, len(sent), cut):
        passed += lane._sift(bytes(lane._rest) + sent[at : at + cut])
    assert [message[8:] for message, is_text in taken if not is_text] == LINES[:2]
    assert [message for message, is_text in taken if is_text] == [b'{"type": "pong"}']
    # The last one must not overtake the fragmented one, which the library still has.
    assert passed == ping + fragments + ping + binary[2]


async def test_what_comes_before_the_bridge_listens_is_not_overtaken() -> None:
    """A hello may arrive before there is anybody to take it: it passes, and what follows waits behind it."""
    hello, chunk = masked(1, b'{"type": "hello"}'), masked(2, struct.pack(">II", 1, 1) + b"x")
    lane = FrameLane(None)  # type: ignore[arg-type]
    taken: list[bytes] = []

    def take(message: bytes, is_text: bool) -> bool:
        taken.append(message)
        return True

    lane.open()
    assert lane._sift(hello) == hello
    lane.take = take
    assert lane._sift(chunk) == chunk
    for _ in range(2):
        lane.note_handed_out()
    assert lane._sift(chunk) == b""
    assert len(taken) == 1


async def hand_over_calls(directory: Path, waiters: int, hand_overs: int = 10) -> float:
    """How many functions the way of a model's only token from one request to the next calls."""
    bus = EventBus()
    pool = SessionPool(Catalog([Model("1", "m")]), PoolConfig(sessions_per_model=1), Store(directory), bus)
    leases = [Lease(str(number), Model("1", "m")) for number in range(waiters + 1)]
    admitted: list[Lease] = []
    count = 0

    async def wait(lease: Lease) -> None:
        await pool.acquire(lease)
        admitted.append(lease)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    async with trio.open_nursery() as nursery:
        for lease in leases:
            nursery.start_soon(wait, lease)
            await trio.testing.wait_all_tasks_blocked()
        before = sys.getprofile()
        # What a collection of other tests' garbage calls is not the hand-over's.
        gc.collect()
        gc.disable()
        sys.setprofile(note)
        try:
            for number in range(hand_overs):
                pool.release(admitted[-1])
                while len(admitted) < number + 2:
                    await trio.lowlevel.checkpoint()
        finally:
            sys.setprofile(before)
            gc.enable()
        assert admitted == leases[: hand_overs + 1]
        nursery.cancel_scope.cancel()
    return count / hand_overs


async def test_a_hand_over_costs_the_same_before_ten_waiters_and_before_two_thousand(tmp_path: Path) -> None:
    few = await hand_over_calls(tmp_path / "few", 10)
    assert await hand_over_calls(tmp_path / "many", 2000) <= 1.2 * few


def shown_traceback(error: BaseException) -> str:
    screen = Console(file=io.StringIO(), width=120)
    record = logging.LogRecord("lmarena_proxy", logging.ERROR, "", 0, "It broke", None, None)
    record.exc_info = (type(error), error, error.__traceback__)
    ConsoleHandler(screen, Translator("en")).emit(record)
    _, _, trace = screen.file.getvalue().partition("\n")  # type: ignore[attr-defined]
    return re.sub(" +", " ", trace)  # rich makes room for the number of the file's last line


def test_a_traceback_shows_what_rich_shows_and_reads_only_the_lines_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        try:
            parse_config({"server": {"port": "x"}})
        except ConfigError as error:
            raise RuntimeError("over several", "lines") from error
    except RuntimeError as error:
        broken = error
    shown_traceback(broken)  # loads it
    read: list[str] = []
    highlight = Syntax.highlight

    def note(syntax: Syntax, code: str, *rest: Any) -> Any:
        read.append(code)
        return highlight(syntax, code, *rest)

    monkeypatch.setattr(Syntax, "highlight", note)
    shown = shown_traceback(broken)
    assert len(read) >= 3  # this file's frames, and the program's
    assert all(code.count("\n") <= 7 for code in read)
    read.clear()
    monkeypatch.setattr("rich.traceback.Syntax", Syntax)
    assert shown_traceback(broken) == shown
    assert max(code.count("\n") for code in read) > 7000
