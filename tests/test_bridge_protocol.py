"""Bridge protocol: every frame of wire protocol version 1, and what breaks it."""

import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmarena_proxy import (
    Abort,
    Broken,
    BrowserFrame,
    Captured,
    End,
    Fetch,
    Frame,
    Head,
    Hello,
    Models,
    Ping,
    Pong,
    ProtocolError,
    Reload,
    SendModels,
    State,
    Upload,
    Uploaded,
    Welcome,
    decode_frame,
    split_records,
)

# No test depends on speed or on an earlier run.
settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")

HELLO = {
    "type": "hello",
    "protocol": 1,
    "script": "1.0.0",
    "url": "https://lmarena.ai/",
    "state": "ready",
    "account": "ab",
}
CAPTURED = {
    "type": "captured",
    "session_id": "s",
    "message_id": "m",
    "model_id": None,
    "mode": "direct",
    "account": None,
}


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (HELLO, Hello(1, "ready", "1.0.0", "https://lmarena.ai/", "ab")),
        (
            HELLO | {"features": ["upload", "x"]},
            Hello(1, "ready", "1.0.0", "https://lmarena.ai/", "ab", ["upload", "x"]),
        ),
        (HELLO | {"account": None, "state": "loading"}, Hello(1, "loading", "1.0.0", "https://lmarena.ai/")),
        ({"type": "state", "state": "sign_in", "account": None, "detail": "x"}, State("sign_in", None, "x")),
        ({"type": "state", "state": "verification"}, State("verification")),
        ({"type": "models", "models": [{"id": "1"}, 2]}, Models([{"id": "1"}, 2])),
        (CAPTURED, Captured("s", "m", None, "direct", None)),
        (CAPTURED | {"mode": "battle", "model_id": "x"}, Captured("s", "m", "x", "battle", None)),
        (CAPTURED | {"mode": "battle", "position": "b"}, Captured("s", "m", None, "battle", None, "b")),
        (
            {"type": "response", "id": 1, "status": 429, "headers": {"retry-after": "3"}},
            Head(1, 429, {"retry-after": "3"}),
        ),
        ({"type": "response", "id": 1, "status": 200}, Head(1, 200)),
        ({"type": "end", "id": 7}, End(7)),
        ({"type": "error", "id": 7, "reason": "network", "message": "m"}, Broken(7, "network", "m")),
        ({"type": "error", "id": 7, "reason": "aborted"}, Broken(7, "aborted")),
        ({"type": "error", "id": 7, "reason": "refused"}, Broken(7, "refused")),
        ({"type": "error", "id": 7, "reason": "not_offered"}, Broken(7, "not_offered")),
        ({"type": "uploaded", "id": 7, "url": "https://a/b"}, Uploaded(7, "https://a/b")),
        ({"type": "pong", "t": 1.5}, Pong(1.5)),
        ({"type": "pong"}, Pong()),
    ],
)
def test_every_frame_from_the_browser_is_read(frame: dict[str, Any], expected: BrowserFrame) -> None:
    assert decode_frame(json.dumps(frame)) == expected
    assert decode_frame(json.dumps(frame | {"from_a_later_script": [1]})) == expected


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (
            Welcome(1, "1.0.0", "c", 20),
            {
                "type": "welcome",
                "protocol": 1,
                "version": "1.0.0",
                "auth_cookie": "c",
                "heartbeat_seconds": 20,
            },
        ),
        (
            Fetch(1, "PUT", "/api/stream/x", "b"),
            {"type": "fetch", "id": 1, "method": "PUT", "path": "/api/stream/x", "body": "b"},
        ),
        (
            Upload(2, "a.png", "image/png", "iVBO"),
            {"type": "upload", "id": 2, "name": "a.png", "content_type": "image/png", "data": "iVBO"},
        ),
        (Abort(3), {"type": "abort", "id": 3}),
        (Ping(1.5), {"type": "ping", "t": 1.5}),
        (SendModels(), {"type": "send_models"}),
        (Reload("r"), {"type": "reload", "reason": "r"}),
    ],
)
def test_every_frame_to_the_browser_is_as_the_protocol_has_it(frame: Frame, expected: dict[str, Any]) -> None:
    assert msgspec.to_builtins(frame) == expected


@pytest.mark.parametrize("kind", ["news", "", "Hello", "fetch", "head", "broken"])
def test_an_unknown_type_is_ignored(kind: str) -> None:
    assert decode_frame(json.dumps({"type": kind, "id": "any"})) is None


@pytest.mark.parametrize("text", ["", "{", "hello", '{"type":"end","id":1}x', '{"type":"hel', "[" * 100_000])
def test_what_is_not_json_closes_with_1007(text: str) -> None:
    with pytest.raises(ProtocolError, match="malformed frame") as caught:
        decode_frame(text)
    assert caught.value.close_code == 1007


@pytest.mark.parametrize(
    "frame",
    [
        [],
        1,
        "hello",
        {},
        {"type": 1},
        {"type": None},
        {"type": "hello"},
        HELLO | {"protocol": "1"},
        HELLO | {"account": 7},
        HELLO | {"features": "upload"},
        {"type": "uploaded", "id": 1},
        {"type": "uploaded", "id": 1, "url": None},
        {"type": "state", "state": "happy"},
        {"type": "models", "models": {}},
        {"type": "response", "id": 1},
        {"type": "response", "id": "1", "status": 200},
        {"type": "response", "id": 1, "status": 200, "headers": {"retry-after": 3}},
        {"type": "end"},
        {"type": "error", "id": 1, "reason": "bored"},
        {"type": "captured", "session_id": 1, "message_id": "m"},
    ],
)
def test_a_frame_of_the_wrong_shape_closes_with_1003(frame: object) -> None:
    with pytest.raises(ProtocolError, match="malformed frame") as caught:
        decode_frame(json.dumps(frame))
    assert caught.value.close_code == 1003


def test_a_hello_of_another_protocol_is_read_whatever_states_it_knows() -> None:
    """So that its script is told to reinstall (4001), and does not just see its connection closed."""
    frame = decode_frame(json.dumps(HELLO | {"protocol": 2, "state": "napping"}))
    assert isinstance(frame, Hello)
    assert frame.protocol == 2


def close_code(text: str) -> int | None:
    """What a frame does to its connection; None when it stays open."""
    try:
        decode_frame(text)
    except ProtocolError as error:
        return error.close_code
    return None


@given(st.text())
def test_any_text_is_a_frame_or_nothing_or_a_protocol_error(text: str) -> None:
    assert close_code(text) in (None, 1003, 1007)


KINDS = ("hello", "state", "models", "captured", "response", "end", "uploaded", "error", "pong", "x")
FIELDS = ("protocol", "state", "account", "features", "models", "id", "status", "headers", "url", "t")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"type": st.sampled_from(KINDS)}, optional=dict.fromkeys(FIELDS, JSON)))
def test_any_object_is_a_frame_or_nothing_or_a_protocol_error(frame: dict[str, Any]) -> None:
    assert close_code(json.dumps(frame)) in (None, 1003, 1007)


@given(
    st.builds(Hello, st.integers(0, 9), st.just("ready"), st.text(), st.text(), st.none() | st.text())
    | st.builds(State, st.just("loading"), st.none() | st.text(), st.text())
    | st.builds(
        Captured, st.text(), st.text(), st.none() | st.text(), st.none() | st.text(), st.none() | st.text()
    )
    | st.builds(Head, st.integers(0, 2**32 - 1), st.integers(0, 999), st.dictionaries(st.text(), st.text()))
    | st.builds(End, st.integers(0, 2**32 - 1))
    | st.builds(Uploaded, st.integers(0, 2**32 - 1), st.text())
    | st.builds(
        Broken, st.integers(0, 2**32 - 1), st.sampled_from(["network", "aborted", "refused"]), st.text()
    )
)
def test_every_frame_survives_the_way(frame: BrowserFrame) -> None:
    assert decode_frame(msgspec.json.encode(frame).decode()) == frame


Record = tuple[int, bytes]


def joined(records: list[Record]) -> bytes:
    return b"".join(struct.pack(">II", number, len(data)) + data for number, data in records)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary())))
def test_records_survive_the_way(records: list[Record]) -> None:
    assert [*split_records(joined(records))] == records


@pytest.mark.parametrize(
    "records", [[], [(1, b"")], [(0, b"a"), (2**32 - 1, b"b"), (0, b"")], [(5, b"x" * 300_000), (5, b"y")]]
)
def test_a_binary_frame_is_its_records(records: list[Record]) -> None:
    assert [*split_records(joined(records))] == records


def test_a_binary_frame_cut_off_anywhere_but_between_records_is_refused() -> None:
    whole = joined([(1, b"abc"), (2, b""), (3, b"d")])
    for at in set(range(len(whole))) - {0, 11, 19}:
        with pytest.raises(ProtocolError, match="malformed record") as caught:
            [*split_records(whole[:at])]
        assert caught.value.close_code == 1003


def test_a_length_beyond_the_frame_is_refused_without_taking_memory() -> None:
    with pytest.raises(ProtocolError, match="4294967295 bytes announced, 2 there"):
        [*split_records(struct.pack(">II", 1, 2**32 - 1) + b"ab")]
