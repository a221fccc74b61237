"""Arena wire format: every line of the contract, however the network cuts it, and what the site is sent."""

import base64
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo import contract
from lmarena_proxy import (
    AnswerEvent,
    ArenaStreamDecoder,
    Attachment,
    Failure,
    Finish,
    Media,
    Message,
    Model,
    Reasoning,
    Source,
    StreamError,
    Text,
    encode_create,
    encode_retry,
    read_refusal,
    uuid7,
)

# No test depends on speed or on an earlier run.
settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")

ENTRIES: list[contract.Model] = json.loads((Path(__file__).parent.parent / "models.json").read_bytes())
END = b'ad:{"finishReason":"stop","usage":{"promptTokens":1,"completionTokens":2}}\n'
FINISH = Finish("stop", 1, 2)
VIDEO = Media("video", "https://a/v.mp4")


def sources_line(arguments: str, call: str = "t") -> bytes:
    return b"ac:" + json.dumps({"toolCallId": call, "argsTextDelta": arguments}).encode() + b"\n"


SOURCES = json.dumps(
    {"source": [{"title": "One", "url": "https://1"}, {"url": "https://2"}, {"title": "no url"}]}
)
SAMPLES: dict[str, tuple[bytes, list[AnswerEvent]]] = {
    "text": (b'a0:"Hel"\na0:"lo"\n' + END, [Text("Hello"), FINISH]),
    "escapes": (b'a0:"a\\n\\"b\\"\\\\ \\u4f60\\t"\n' + END, [Text('a\n"b"\\ 你\t'), FINISH]),
    "chinese": ('a0:"你好，世界"\n'.encode() + END, [Text("你好，世界"), FINISH]),
    "emoji": ('a0:"😀"\na0:"\\ud83d\\ude00"\n'.encode() + END, [Text("😀😀"), FINISH]),
    "emoji over two lines": (b'a0:"a\\ud83d"\na0:"\\ude00b"\n' + END, [Text("a😀b"), FINISH]),
    "emoji over three lines": (b'a0:"\\ud83d"\na0:""\na0:"\\ude00"\n' + END, [Text("😀"), FINISH]),
    "lone high surrogate": (b'a0:"a\\ud83d"\na0:"b"\n' + END, [Text("a\ufffdb"), FINISH]),
    "lone low surrogate": (b'a0:"a\\ude00b"\n' + END, [Text("a\ufffdb"), FINISH]),
    "invalid utf-8": (b'a0:"a\xffb"\n' + END, [Text("a\ufffdb"), FINISH]),
    "raw control character": (b'a0:"a\x01b"\n' + END, [Text("a\x01b"), FINISH]),
    "line separator": ('a0:"a\u2028b\x85c"\n'.encode() + END, [Text("a\u2028b\x85c"), FINISH]),
    "crlf": (b'a0:"a"\r\nag:"b"\r\n' + END.replace(b"\n", b"\r\n"), [Text("a"), Reasoning("b"), FINISH]),
    "reasoning": (b'ag:"why"\na0:"so"\n' + END, [Reasoning("why"), Text("so"), FINISH]),
    "image": (
        b'a2:[{"type":"image","image":"https://a/i.png","mimeType":"image/png"}]\n' + END,
        [Media("image", "https://a/i.png"), FINISH],
    ),
    "video after heartbeats": (
        b'a2:[{"type":"heartbeat"}]\na2:[{"type":"heartbeat"}]\na2:[{"type":"video","url":"https://a/v.mp4"}]\n'
        + END,
        [VIDEO, FINISH],
    ),
    "several media": (
        b'a2:[{"type":"image","image":"x"},null,1,{"type":"image"},{"type":"image","image":7},{"type":"video","url":"y"}]\n'
        + END,
        [Media("image", "x"), Media("video", "y"), FINISH],
    ),
    "sources": (
        sources_line(SOURCES) + END,
        [Source("One", "https://1"), Source("https://2", "https://2"), FINISH],
    ),
    "sources in pieces": (
        sources_line(SOURCES[:9]) + sources_line('{"source":[]}', "other") + sources_line(SOURCES[9:]) + END,
        [Source("One", "https://1"), Source("https://2", "https://2"), FINISH],
    ),
    "error": (b'a0:"a"\na3:"overloaded"\n', [Text("a"), Failure("overloaded")]),
    "nothing after an error": (b'a3:"no"\na0:"b"\n' + END, [Failure("no")]),
    "an error that is no string": (b'a3:{"message":"no"}\n', [Failure('{"message":"no"}')]),
    "nothing after the end": (END + b'a0:"b"\na3:"no"\n' + END, [FINISH]),
    "step marks": (
        b'af:{"messageId":"m"}\na0:"a"\nae:{"finishReason":"stop","isContinued":false}\n' + END,
        [Text("a"), FINISH],
    ),
    "unknown prefixes": (b'zz:1\nb0:"other"\nbd:{}\n0:"v"\n\n:\na\na0\na0"x"\na9:[]\n' + END, [FINISH]),
    "broken json": (b'a0:"a\na0:7\na0:null\na0:\nag:{}\na2:{\na2:7\nac:[]\nac:{}\n' + END, [FINISH]),
    "no usage": (b'ad:{"finishReason":"length"}\n', [Finish("length")]),
    "null usage": (b'ad:{"finishReason":"unknown","usage":null}\n', [Finish("unknown")]),
    "odd usage": (
        b'ad:{"finishReason":"stop","usage":{"promptTokens":-1,"completionTokens":"2"}}\n',
        [Finish("stop")],
    ),
    "boolean usage": (b'ad:{"finishReason":"stop","usage":{"promptTokens":true}}\n', [Finish("stop")]),
    "end without a reason": (b"ad:{}\n", [Finish("unknown")]),
    "end that is no object": (b"ad:[]\n", [Finish("unknown")]),
    "end without a newline": (END[:-1], [FINISH]),
}


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """Adjacent pieces made one: cuts may not change more than where the pieces end."""
    whole: list[AnswerEvent] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Text) and isinstance(last, Text):
            whole[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            whole[-1] = Reasoning(last.text + event.text)
        else:
            whole.append(event)
    return whole


def decoded(*chunks: bytes) -> list[AnswerEvent]:
    decoder = ArenaStreamDecoder()
    return merged([*(event for chunk in chunks for event in decoder.feed(chunk)), *decoder.finish()])


def text_of(events: Iterable[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


each_sample = pytest.mark.parametrize(("body", "events"), SAMPLES.values(), ids=SAMPLES.keys())


@each_sample
def test_a_body_in_one_chunk(body: bytes, events: list[AnswerEvent]) -> None:
    assert decoded(body) == events


@each_sample
def test_a_body_one_byte_at_a_time(body: bytes, events: list[AnswerEvent]) -> None:
    assert decoded(*(body[at : at + 1] for at in range(len(body)))) == events


@each_sample
def test_a_body_in_two_chunks_cut_anywhere(body: bytes, events: list[AnswerEvent]) -> None:
    for at in range(len(body)):
        assert decoded(body[:at], body[at:]) == events


def is_end(line: bytes) -> bool:
    """Whether a line ends the answer: an error, or an end whose JSON is whole."""
    try:
        return line.startswith(b"a3:") or (line.startswith(b"ad:") and json.loads(line[3:]) is not None)
    except ValueError:
        return False


@each_sample
def test_a_body_cut_off_anywhere_is_finished_only_with_its_end_or_error(
    body: bytes, events: list[AnswerEvent]
) -> None:
    for at in range(len(body)):
        decoder = ArenaStreamDecoder()
        got = [*decoder.feed(body[:at]), *decoder.finish()]
        assert decoder.is_finished == any(is_end(line) for line in body[:at].split(b"\n"))
        assert any(isinstance(event, Finish | Failure) for event in got) == decoder.is_finished
        assert all(isinstance(event, Finish | Failure) for event in got[-1:]) or not decoder.is_finished


def test_adjacent_text_of_one_chunk_is_one_event() -> None:
    assert ArenaStreamDecoder().feed(b'a0:"a"\na0:"b"\nag:"c"\na0:"d"\n') == [
        Text("ab"),
        Reasoning("c"),
        Text("d"),
    ]


def test_an_end_says_so_at_once() -> None:
    decoder = ArenaStreamDecoder()
    assert decoder.feed(END[:-1]) == []
    assert not decoder.is_finished
    assert decoder.feed(b"\n") == [FINISH]
    assert decoder.is_finished


def test_a_body_that_is_empty_or_no_answer_is_not_finished() -> None:
    for body in (b"", b"\n\n", b"<!doctype html>", b"\x00\xff" * 99, b'{"error":"x"}'):
        decoder = ArenaStreamDecoder()
        assert [*decoder.feed(body), *decoder.finish()] == []
        assert not decoder.is_finished


def test_a_line_of_ten_megabytes() -> None:
    text = "你" * 1_000_000 + "x" * 7_000_000
    body = b"a0:" + json.dumps(text, ensure_ascii=False).encode() + b"\n" + END
    chunks = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]
    assert decoded(*chunks) == [Text(text), FINISH]


def test_a_line_that_never_ends_is_given_up() -> None:
    decoder = ArenaStreamDecoder()
    mebibyte = b"x" * (1 << 20)
    decoder.feed(b'a0:"')
    with pytest.raises(StreamError, match="16 MiB"):  # noqa: PT012
        for _ in range((ArenaStreamDecoder.LINE_LIMIT_BYTES >> 20) + 1):
            decoder.feed(mebibyte)


def test_deeply_nested_json_breaks_nothing() -> None:
    for prefix in (b"a0:", b"a2:", b"ac:", b"ad:"):
        decoded(prefix + b"[" * 100_000 + b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b'a2:[{"type":"image","image":"https://a/\\ud83d"}]\n',
        sources_line('{"source":[{"title":"cut \\ud83d","url":"https://a"}]}'),
        b'a3:"cut \\ud83d!"\n',
        b'a3:{"message":"cut \xff \\ud83d!"}\n',
    ],
    ids=["media", "source", "error", "odd error"],
)
def test_no_event_carries_what_utf8_cannot(line: bytes) -> None:
    """JavaScript cuts titles inside an emoji; half of one cannot be written to a client or to the store."""
    [event] = decoded(line)
    for name in event.__struct_fields__:
        str(getattr(event, name)).encode()


def test_an_emoji_cut_between_two_pieces_of_a_sources_arguments_is_whole() -> None:
    first, second = '{"source":[{"title":"\ud83d', '\ude00","url":"https://a"}]}'
    assert decoded(sources_line(first), sources_line(second)) == [Source("😀", "https://a")]


def test_a_large_count_of_tokens_is_none_or_fits_the_store() -> None:
    [event] = decoded(b'ad:{"finishReason":"stop","usage":{"promptTokens":%d}}\n' % 10**30)
    assert isinstance(event, Finish)
    assert event.prompt_tokens is None or event.prompt_tokens < 1 << 63


@given(pieces=st.lists(st.text()), escaped=st.booleans(), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_any_text_cut_anywhere_comes_through(pieces: list[str], escaped: bool, sizes: list[int]) -> None:
    body = "".join(f"a0:{json.dumps(piece, ensure_ascii=escaped)}\n" for piece in pieces).encode() + END
    assert text_of(decoded(*cut(body, sizes))) == "".join(pieces)


@given(text=st.text(), places=st.sets(st.integers(0, 40)), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_text_cut_between_utf16_units_comes_through(text: str, places: set[int], sizes: list[int]) -> None:
    units = text.encode("utf-16-le")
    bounds = [0, *sorted(2 * place for place in places if 2 * place < len(units)), len(units)]
    pieces = [units[start:end].decode("utf-16-le", "surrogatepass") for start, end in pairwise(bounds)]
    body = "".join(f"a0:{json.dumps(piece)}\n" for piece in pieces).encode() + END
    assert text_of(decoded(*cut(body, sizes))) == text


@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from([b"a0:", b"ag:", b"a2:", b"ac:", b"a3:", b"ad:", b"ae:", b""]), st.binary()
        ).map(b"".join)
    ),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)
def test_any_bytes_break_nothing(lines: list[bytes], sizes: list[int]) -> None:
    body = b"\n".join(lines)
    assert decoded(*cut(body, sizes)) == decoded(body)


@given(units=st.lists(st.integers(0xD7FE, 0xE001).map(chr)))
def test_text_of_broken_surrogates_can_be_written(units: list[str]) -> None:
    body = "".join(f"a0:{json.dumps(unit)}\n" for unit in units).encode() + END
    text_of(decoded(body)).encode()


def cut(body: bytes, sizes: Sequence[int]) -> list[bytes]:
    chunks: list[bytes] = []
    at = 0
    while at < len(body):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(body[at : at + size])
        at += size
    return chunks


def test_ids_are_uuids_of_version_7_in_order_of_time() -> None:
    ids = [uuid7() for _ in range(50)]
    assert len({*ids}) == 50
    assert all(each[14] == "7" and each[19] in "89ab" for each in ids)
    assert [each[:8] for each in ids] == sorted(each[:8] for each in ids)


PNG = Attachment(
    "i.png", "image/png", "data:image/png;base64," + base64.b64encode(contract.png("x")).decode()
)
HISTORIES: dict[str, list[Message]] = {
    "one message": [Message("user", "Hi")],
    "system first": [Message("system", "Be brief."), Message("user", "Hi")],
    "long": [Message("user", "1"), Message("assistant", "2"), Message("system", "3"), Message("user", "4")],
    "empty content": [Message("user", ""), Message("assistant", ""), Message("user", "")],
    "unicode": [Message("user", '你好 😀 "\\\n\x00\u2028')],
    "two users in a row": [Message("user", "a"), Message("user", "b")],
}


def an_entry(modality: str, image: bool | None) -> contract.Model:
    """A built-in model of this modality that takes no image, may (False), or must (True)."""

    def fits(entry: contract.Model) -> bool:
        conditions = contract.image_input(entry)
        needs = None if conditions is None else bool(conditions.get("requiresUpload"))
        return contract.modality_of(entry) == modality and needs is image

    return next(filter(fits, ENTRIES))


CHAT, SEES, SEARCH = an_entry("chat", None), an_entry("chat", False), an_entry("search", None)
PAINTS, EDITS, FILMS = an_entry("image", None), an_entry("image", True), an_entry("video", None)
WITH_IMAGE = [Message("system", "s"), Message("user", "", (PNG,))]
CALLS = [
    *((entry, history) for entry in (CHAT, SEARCH, PAINTS, FILMS) for history in HISTORIES.values()),
    (EDITS, WITH_IMAGE),
    (SEES, WITH_IMAGE),
    (SEES, [Message("user", "two", (PNG, PNG)), Message("assistant", "yes"), Message("user", "and?")]),
]


@pytest.mark.parametrize(("entry", "history"), CALLS)
def test_what_opens_a_conversation_keeps_the_contract(entry: contract.Model, history: list[Message]) -> None:
    session_id, message_id = uuid7(), uuid7()
    body = encode_create(Model.from_entry(entry), history, session_id, message_id)
    call = contract.read_create(body.encode())
    contract.check_model_takes(call, entry)
    assert (call.session_id, call.message_id, call.model_id, call.mode) == (
        session_id,
        message_id,
        entry["id"],
        "direct",
    )
    assert call.turns == [(message.role, message.content or " ") for message in history]
    assert call.images == [len(message.attachments) for message in history]


@pytest.mark.parametrize(("entry", "history"), CALLS)
def test_what_retries_a_message_keeps_the_contract(entry: contract.Model, history: list[Message]) -> None:
    session_id = uuid7()
    body = encode_retry(Model.from_entry(entry), history, session_id)
    call = contract.read_retry(body.encode(), session_id, uuid7(), "direct")
    contract.check_model_takes(call, entry)
    assert call.model_id == entry["id"]
    assert call.turns == [(message.role, message.content or " ") for message in history]
    assert call.images == [len(message.attachments) for message in history]


@pytest.mark.parametrize("position", ["a", "b"])
@pytest.mark.parametrize(("entry", "history"), CALLS)
def test_what_retries_one_side_of_two_has_that_position_everywhere(
    entry: contract.Model, history: list[Message], position: contract.Side
) -> None:
    session_id = uuid7()
    body = encode_retry(Model.from_entry(entry), history, session_id, position)
    call = contract.read_retry(body.encode(), session_id, uuid7(), "side-by-side", position)
    contract.check_model_takes(call, entry)
    positions = [message["participantPosition"] for message in json.loads(body)["messages"]]
    assert positions == [position] * len(history)


PAIR = b"""af:{}
bf:{}
a0:"left"
b0:"right"
bg:"thought"
ag:"other thought"
a3:"broken"
b2:[{"type":"image","image":"https://x/1.png"}]
bd:{"finishReason":"stop"}
ad:{"finishReason":"error"}
"""


def test_of_two_participants_one_is_heard() -> None:
    picture = Media("image", "https://x/1.png")
    expected = {
        "b": [Text("right"), Reasoning("thought"), picture, Finish("stop")],
        "a": [Text("left"), Reasoning("other thought"), Failure("broken")],
    }
    decoder = ArenaStreamDecoder("b")
    assert decoder.feed_text(b'a0:"left"\n') is None
    assert decoder.feed_text(b'b0:"right"\nb0:"!"\n') == "right!"
    for position, events in expected.items():
        decoder = ArenaStreamDecoder("a" if position == "a" else "b")
        assert decoder.feed(PAIR) == events


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["publicName"])
def test_every_models_modality_is_the_contracts(entry: contract.Model) -> None:
    model = Model.from_entry(entry)
    conditions = contract.image_input(entry)
    assert model.modality == contract.modality_of(entry)
    assert model.takes_image == (conditions is not None)
    assert model.requires_image == bool((conditions or {}).get("requiresUpload"))


JSON_HEAD, HTML_HEAD = {"content-type": "application/json"}, {"content-type": "text/html; charset=utf-8"}
JSON_BODY, CHECK = (
    b'{"error":"no"}',
    b"<!DOCTYPE html><html><head><title>Just a moment...</title></head></html>",
)
CHALLENGED = {"content-type": "text/html", "cf-mitigated": "challenge"}


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind"),
    [
        (400, JSON_HEAD, JSON_BODY, "rejected"),
        (401, JSON_HEAD, JSON_BODY, "signed_out"),
        (403, CHALLENGED, b"", "challenge"),
        (503, CHALLENGED, b"", "challenge"),
        (403, HTML_HEAD, CHECK, "challenge"),
        (503, HTML_HEAD, CHECK, "challenge"),
        (403, {}, b"\n " + CHECK, "challenge"),
        (403, JSON_HEAD, JSON_BODY, "gone"),
        (404, JSON_HEAD, JSON_BODY, "gone"),
        (403, JSON_HEAD, b'{"error":"Just a moment..."}', "gone"),
        (409, JSON_HEAD, JSON_BODY, "running"),
        (413, JSON_HEAD, JSON_BODY, "too_large"),
        (413, HTML_HEAD, b"<html>413 Request Entity Too Large</html>", "too_large"),
        (429, JSON_HEAD, JSON_BODY, "rate_limited"),
        (500, JSON_HEAD, JSON_BODY, "failed"),
        (502, HTML_HEAD, b"<html>Bad Gateway</html>", "failed"),
        (503, JSON_HEAD, JSON_BODY, "failed"),
        (524, {}, b"", "failed"),
        (418, {}, b"", "failed"),
        (302, {}, b"", "failed"),
        (0, {}, b"", "failed"),
    ],
)
def test_a_refusal_is_of_the_contracts_kind(
    status: int, headers: dict[str, str], body: bytes, kind: str
) -> None:
    refusal = read_refusal(status, headers, body)
    assert (refusal.kind, refusal.status, refusal.reply) == (kind, status, body.decode())


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (HTML_HEAD, b"<html><title>Attention Required!</title></html>"),
        ({"content-type": "text/plain; charset=UTF-8"}, b"error code: 1020"),
        ({}, b""),
    ],
)
def test_what_is_no_json_does_not_retire_conversations(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    """The contract says that a conversation is gone with JSON; a proxy's error page says nothing of it."""
    assert read_refusal(status, headers, body).kind == "failed"


def test_json_counts_whatever_its_header_says() -> None:
    assert read_refusal(404, {"content-type": "text/plain"}, b' {"error":"not found"}').kind == "gone"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after_is_read_as_seconds(value: str, seconds: float | None) -> None:
    assert read_refusal(429, {"retry-after": value}, b"").retry_after_seconds == seconds


def test_a_refusal_without_retry_after_has_none() -> None:
    assert read_refusal(429, {}, b"").retry_after_seconds is None


def test_a_reply_that_is_no_utf8_is_still_text() -> None:
    assert read_refusal(500, {}, b"\xff").reply == "\ufffd"
