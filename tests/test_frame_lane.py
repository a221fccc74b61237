"""The lane below a bridge's WebSocket, against the library alone: the same bytes, the same messages.

Whatever a tab sends, and wherever the network cuts it: what is heard, in which order, how it ends, and what
goes back must be what it is without the lane.
"""

import functools
import itertools
import os
import re
import struct
from collections.abc import Callable
from typing import Any

import trio
import trio.testing
import trio_websocket
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmarena_proxy import Bridge, BrowserFrame, FrameLane

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
LARGEST_BYTES = 1 << 20
Result = tuple[list[str | bytes], str, bytes]


def frame(first: int, payload: bytes, key: bytes = b"\x01\xa2\x33\x04", length: int | None = None) -> bytes:
    """A frame (RFC 6455, section 5.2), masked unless the key is empty; `length` is what it says it has."""
    length = len(payload) if length is None else length
    mask = 0x80 if key else 0
    if length < 126:
        head = bytes([first, mask | length])
    elif length < 1 << 16:
        head = struct.pack(">BBH", first, mask | 126, length)
    else:
        head = struct.pack(">BBQ", first, mask | 127, length)
    masks = (key or bytes(4)) * (len(payload) // 4 + 1)
    body = bytes(byte ^ masks[at] for at, byte in enumerate(payload))
    return head + key + body


def message(opcode: int, payload: bytes, cuts: list[int], between: list[bytes]) -> bytes:
    """A message in as many frames as there are cuts and one more, with control frames in between."""
    places = [0, *sorted(cut % (len(payload) + 1) for cut in cuts), len(payload)]
    parts = [payload[start:end] for start, end in itertools.pairwise(places)]
    frames = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        frames.append(frame((0x80 if is_last else 0) | (0 if number else opcode), part))
        frames += between if not is_last else []
    return b"".join(frames)


short = st.binary(max_size=130) | st.text(max_size=40).map(str.encode)
sizes = st.sampled_from([0, 1, 125, 126, 127, 1000, 65_535, 65_536, 300_000])
payloads = short | sizes.map(lambda size: os.urandom(4).hex().encode() * (size // 8 + 1))
controls = st.builds(frame, st.sampled_from([0x80 | PING, 0x80 | PONG]), st.binary(max_size=125))
messages = st.builds(
    message,
    st.sampled_from([TEXT, BINARY]),
    payloads,
    st.lists(st.integers(0, 1 << 20), max_size=3) | st.just([]),
    st.lists(controls, max_size=2),
)
whole_messages = st.builds(lambda first, payload: frame(first, payload), st.sampled_from([0x81, 0x82]), short)
closes = st.builds(
    lambda code, reason: frame(0x80 | CLOSE, struct.pack(">H", code) + reason.encode()[:100]),
    st.sampled_from([1000, 1001, 1006, 3000, 4001, 5]),
    st.text(max_size=20),
)
broken = st.one_of(
    st.builds(frame, st.sampled_from([0xC1, 0xA2, 0x92, 0x83, 0x8B, 0x80, 0x00, 0x09, 0x08]), short),
    st.builds(frame, st.sampled_from([0x81, 0x82, 0x89]), short, st.just(b"")),  # Not masked.
    st.builds(frame, st.just(0x81), st.sampled_from([b"\xff", b"a\xc3", b"\xed\xa0\x80"])),
    st.builds(frame, st.just(0x81), short, length=st.sampled_from([1 << 21, 1 << 40, 1 << 63])),
    st.binary(min_size=1, max_size=20),
)
streams = st.lists(st.one_of(whole_messages, whole_messages, messages, controls, closes), max_size=12)


def ending(closed: trio_websocket.ConnectionClosed) -> str:
    return f"code {closed.reason.code} {closed.reason.reason or ''}".rstrip() if closed.reason else "cut"


async def accept(nursery: trio.Nursery, stream: Any) -> trio_websocket.WebSocketConnection:
    handshake = await trio_websocket.wrap_server_stream(
        nursery, stream, message_queue_size=64, max_message_size=LARGEST_BYTES
    )
    return await handshake.accept()


async def hear_by_library(nursery: trio.Nursery, stream: Any, heard: list[str | bytes]) -> str:
    connection = await accept(nursery, stream)
    try:
        while True:
            heard.append(await connection.get_message())
    except trio_websocket.ConnectionClosed as closed:
        return ending(closed)


class Ear(Bridge):
    """A bridge that only notes what it hears."""

    heard: list[str | bytes]

    def _hear(self, message: str | bytes, on_frame: Callable[[BrowserFrame], None]) -> None:
        self.heard.append(message)


async def hear_by_lane(nursery: trio.Nursery, stream: Any, heard: list[str | bytes]) -> str:
    lane = FrameLane(stream)
    bridge = Ear(1, await accept(nursery, lane), lane)
    bridge.heard = heard
    lane.open()
    return await bridge._read(lambda frame: None)


def listen(hear: Any, pieces: list[bytes], *, settles: bool) -> Result:
    """What is heard of these pieces, how it ends, and what goes back."""

    async def run() -> Result:
        theirs, ours = trio.testing.memory_stream_pair()
        heard: list[str | bytes] = []
        answered = bytearray()
        how = ""

        async def carry() -> None:
            nonlocal how
            async with trio.open_nursery() as nursery:
                try:
                    how = await hear(nursery, ours, heard)
                except trio_websocket.ConnectionClosed as closed:
                    how = f"before it began: {ending(closed)}"
                nursery.cancel_scope.cancel()
            await ours.aclose()

        async def read() -> None:
            async for data in theirs:
                answered.extend(data)

        with trio.fail_after(1000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(carry)
                nursery.start_soon(read)
                try:
                    for number, piece in enumerate(pieces):
                        await theirs.send_all(piece)
                        if settles or not number:
                            await trio.testing.wait_all_tasks_blocked()
                    await trio.testing.wait_all_tasks_blocked()
                    await trio.sleep(1)
                    await theirs.send_eof()
                except trio.BrokenResourceError:
                    pass  # It has hung up.
        # Where in the bytes UTF-8 breaks is told of as many as have been decoded at once.
        return heard, re.sub("in position .*", "", how), re.sub(b"(?s)in position .*", b"", answered)

    return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def compare(frames: list[bytes], cuts: list[int], *, settles: bool) -> list[str | bytes]:
    """What is heard of these frames through the lane, which must be what is heard without it.

    `cuts` are places in the frames' bytes. Without one at their beginning they come together with the
    handshake: the library alone would leave them lying until more comes. Of what came in one packet with a
    close it forgets what it has not handed out; the lane may be ahead of that, but never of each by itself.
    """
    sent = b"".join(frames)
    places = sorted({0, *(cut % (len(sent) + 1) for cut in cuts), len(sent)})
    pieces = [sent[start:end] for start, end in itertools.pairwise(places)]
    with_lane = [HANDSHAKE, *pieces] if 0 in cuts else [HANDSHAKE + b"".join(pieces[:1]), *pieces[1:]]
    heard, *end = listen(hear_by_lane, with_lane, settles=settles)
    least, *same_end = listen(hear_by_library, [HANDSHAKE, *pieces], settles=settles)
    most, *_ = listen(hear_by_library, [HANDSHAKE, *frames], settles=True)
    assert end == same_end
    assert heard[: len(least)] == least
    assert most[: len(heard)] == heard
    if settles and len(pieces) >= len(sent):
        assert heard == least
    return heard


@settings(max_examples=100, deadline=None)
@given(streams, st.lists(st.integers(0, 1 << 19), max_size=20), st.booleans())
def test_messages_cut_anywhere_are_heard_as_the_library_hears_them(
    frames: list[bytes], cuts: list[int], settles: bool
) -> None:
    compare(frames, cuts, settles=settles)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams, broken, streams, st.lists(st.integers(0, 1 << 12), max_size=8), st.booleans())
def test_what_breaks_the_protocol_ends_it_as_the_library_ends_it(
    before: list[bytes], bad: bytes, after: list[bytes], cuts: list[int], settles: bool
) -> None:
    compare([*before, bad, *after], cuts, settles=settles)


small_texts = st.builds(
    message,
    st.just(TEXT),
    st.text(max_size=20).map(str.encode),
    st.lists(st.integers(0, 20), max_size=2),
    st.just([]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(whole_messages | controls | small_texts | closes, max_size=5), st.booleans())
def test_byte_by_byte(frames: list[bytes], settles: bool) -> None:
    compare(frames, [*range(len(b"".join(frames)))], settles=settles)


@settings(max_examples=20, deadline=None)
@given(st.lists(short.map(functools.partial(frame, 0x82)), min_size=1, max_size=5), st.integers(0, 400))
@example([frame(0x81, b'{"type": "hello"}')], 0)
def test_a_hello_in_the_handshakes_packet_is_heard_first(frames: list[bytes], cut: int) -> None:
    for cuts in ([], [cut]):
        assert len(compare(frames, cuts, settles=True)) == len(frames)


def test_a_message_of_300_kb_is_heard_whole_between_two_short_ones() -> None:
    large = os.urandom(300_000)
    frames = [frame(0x81, b"a"), frame(0x82, large), frame(0x81, b"b")]
    heard = compare(frames, [*range(200, 300_000, 7_001)], settles=True)
    assert heard == ["a", large, "b"]
