"""OpenAI wire format: what clients may send, and that the openai package reads what they get."""

import json
from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lmarena_proxy import (
    IGNORED_PARAMETERS,
    SSE_COMMENT,
    SSE_DONE,
    ArenaError,
    BridgeError,
    ChatRequest,
    ChunkEncoder,
    ClientError,
    Finish,
    Media,
    Message,
    Source,
    Usage,
    citation,
    count_usage,
    decode_chat_request,
    encode_completion,
    error_object,
    estimate_tokens,
    finish_reason,
    media_markdown,
    read_messages,
)

MAX_LINE_BYTES = 128 * 1024
USER = {"role": "user", "content": "Hi"}
PNG = "data:image/png;base64,aGk="


def asked(*messages: Any, **parameters: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [*messages]} | parameters).encode()


def refused(body: bytes) -> ClientError:
    with pytest.raises(ClientError) as caught:
        decode_chat_request(body)
    assert (caught.value.http_status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def read(*messages: Any) -> list[Message]:
    return read_messages(decode_chat_request(asked(*messages))[0])


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (json.dumps({"messages": [USER]}).encode(), "model"),
        (json.dumps({"model": "m"}).encode(), "messages"),
        (asked(USER, model=""), "model"),
        (asked(USER, model=None), "model"),
        (asked(), "messages"),
        (asked("Hi"), "messages[0]"),
        (asked(USER, {"content": "x"}), "messages[1].role"),
        (asked({"role": "robot", "content": "x"}), "messages[0].role"),
        (asked({"role": "user", "content": 7}), "messages[0].content"),
        (asked(USER, user({"text": "x"})), "messages[1].content[0].type"),
        (asked(user({"type": "text", "text": 1})), "messages[0].content[0].text"),
        (asked(user({"type": "image_url", "image_url": 1})), "messages[0].content[0].image_url"),
        (asked(USER, stream="yes"), "stream"),
        (asked(USER, stream_options={"include_usage": "yes"}), "stream_options.include_usage"),
        (asked(USER, n=2), "n"),
        (asked(USER, n=0), "n"),
        (b"[]", None),
        (b"null", None),
    ],
)
def test_a_body_of_the_wrong_shape_is_refused_with_its_path(body: bytes, param: str | None) -> None:
    assert refused(body).param == param


@pytest.mark.parametrize("body", [b"", b"{", b"hello", b"\xff", b'{"model":"\xff"}', b'{"a":' * 100_000])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    assert refused(body).param is None


@pytest.mark.parametrize("stream", [None, True, False])
def test_optional_parameters_may_be_null(stream: bool | None) -> None:
    body = asked(USER, stream=stream, stream_options=None, n=None, user=None)
    assert decode_chat_request(body)[0].stream is stream


def test_unknown_parameters_are_ignored_and_known_ones_without_effect_are_named() -> None:
    body = asked(
        USER, temperature=0.5, tools=[{"type": "function"}], max_tokens=None, made_up={"x": [1]}, n=1
    )
    chat, ignored = decode_chat_request(body)
    assert chat.model == "m"
    assert ignored == ["max_tokens", "temperature", "tools"]


def test_parameters_that_have_an_effect_are_not_called_ignored() -> None:
    assert IGNORED_PARAMETERS.isdisjoint(ChatRequest.__struct_fields__)
    assert decode_chat_request(asked(USER, stream=True, n=1))[1] == []


@pytest.mark.parametrize(
    ("role", "expected"),
    [("developer", "system"), ("system", "system"), ("user", "user"), ("tool", "user"), ("function", "user")],
)
def test_roles_become_those_the_site_knows(role: str, expected: str) -> None:
    assert read({"role": role, "content": "x"}, USER)[0] == Message(expected, "x")  # type: ignore[arg-type]


def test_the_whole_history_goes_over() -> None:
    history = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER]
    expected = [
        Message("system", "s"),
        Message("user", "Hi"),
        Message("assistant", "a"),
        Message("user", "Hi"),
    ]
    assert read(*history) == expected


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_history_that_ends_with_no_users_message_gets_an_empty_one(role: str) -> None:
    assert read({"role": role, "content": "x"})[1:] == [Message("user", "")]


@pytest.mark.parametrize("content", [None, "", []])
def test_content_may_be_empty(content: Any) -> None:
    assert read({"role": "user", "content": content}) == [Message("user", "")]
    called = {"role": "assistant", "content": content, "tool_calls": [{"id": "1", "type": "function"}]}
    assert read(called, USER)[0] == Message("assistant", "")


def test_parts_of_text_are_joined_and_images_attached() -> None:
    [message] = read(user({"type": "text", "text": "a"}, image(PNG), {"type": "text", "text": "b"}))
    assert message.content == "a\n\nb"
    [attachment] = message.attachments
    assert (attachment.content_type, attachment.url) == ("image/png", PNG)
    assert attachment.name.endswith(".png")


def test_an_image_may_be_given_without_the_object_around_its_url() -> None:
    assert read(user({"type": "image_url", "image_url": PNG}))[0].attachments[0].url == PNG


def test_an_image_may_carry_a_detail() -> None:
    part = {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}
    assert read(user(part))[0].attachments[0].url == PNG


@pytest.mark.parametrize(
    ("subtype", "ending"), [("jpeg", ".jpeg"), ("webp", ".webp"), ("svg+xml", ".svg"), ("x-icon", ".x-icon")]
)
def test_the_kind_of_an_image_is_kept(subtype: str, ending: str) -> None:
    [attachment] = read(user(image(f"data:image/{subtype};base64,aGk=")))[0].attachments
    assert attachment.content_type == f"image/{subtype}"
    assert attachment.name.endswith(ending)


def test_the_site_gets_a_data_url_without_further_parameters() -> None:
    """Between type and data the contract's form has `;base64` alone."""
    [attachment] = read(user(image("data:image/png;charset=utf-8;base64,aGk=")))[0].attachments
    assert attachment.url == PNG


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:image/png,abc",
        "data:image/png;base64,",
        "data:image/png;base64,a",
        "data:image/png;base64,!!!!",
        "data:text/plain;base64,aGk=",
        "data:;base64,aGk=",
        "file:///etc/passwd",
        "javascript:alert(1)",
    ],
)
def test_what_is_no_image_is_refused_with_its_path(url: str) -> None:
    with pytest.raises(ClientError) as caught:
        read(USER, user({"type": "text", "text": "x"}, image(url)))
    assert caught.value.http_status == 400
    assert caught.value.param == "messages[1].content[1].image_url"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {}},
        {"type": "text"},
        {"type": "image_url"},
    ],
)
def test_a_part_that_cannot_be_carried_over_is_refused_with_its_path(part: dict[str, Any]) -> None:
    with pytest.raises(ClientError) as caught:
        read(user({"type": "text", "text": "x"}, part))
    assert (caught.value.param or "").startswith("messages[0].content[1]")


def test_a_large_image_is_read_in_linear_time() -> None:
    url = "data:image/png;base64," + "A" * (20 << 20)
    assert len(read(user(image(url)))[0].attachments[0].url) == len(url)


def events(data: bytes) -> list[Any]:
    """The JSON of each SSE event, after checking what no client may meet."""
    assert data.endswith(b"\n\n")
    lines = data.split(b"\n")
    assert {line[:6] for line in lines if line} == {b"data: "}
    assert all(len(line) < MAX_LINE_BYTES for line in lines)
    return [json.loads(event.removeprefix(b"data: ")) for event in data[:-2].split(b"\n\n")]


def chunks(data: bytes) -> list[ChatCompletionChunk]:
    """The same, as the openai package's own strict models."""
    return [ChatCompletionChunk.model_validate(event, strict=True) for event in events(data)]


ENCODER = ChunkEncoder("chatcmpl-1", 'name "quoted" 你', 1_700_000_000)


def content_of(data: bytes) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks(data))


def test_a_stream_is_chunks_of_the_openai_package() -> None:
    data = (
        ENCODER.delta({"role": "assistant", "content": ""})
        + ENCODER.text("Hello")
        + ENCODER.delta({"reasoning_content": "why"})
        + ENCODER.delta({"annotations": [citation(Source("t", "https://a"))]})
        + ENCODER.finish("stop")
        + ENCODER.usage(Usage(1, 2, 3))
    )
    first, text, reasoning, _, finish, usage = chunks(data)
    assert first.choices[0].delta.role == "assistant"
    assert (text.id, text.model, text.created) == ("chatcmpl-1", 'name "quoted" 你', 1_700_000_000)
    assert (text.choices[0].delta.content, text.choices[0].finish_reason) == ("Hello", None)
    assert (reasoning.choices[0].delta.model_extra or {})["reasoning_content"] == "why"
    assert finish.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 3


@pytest.mark.parametrize("reason", ["stop", "length", "content-filter", "error", "unknown", "new"])
def test_every_finish_reason_is_one_of_openais(reason: str) -> None:
    [chunk] = chunks(ENCODER.finish(finish_reason(Finish(reason))))
    expected = {"length": "length", "content-filter": "content_filter"}.get(reason, "stop")
    assert chunk.choices[0].finish_reason == expected


@pytest.mark.parametrize(
    "text", ["", "a", '"\\/\n\r\t\b\f', "\x00\x1f\x7f", "你好", "😀", "\u2028\u2029\x85", "data: x\n\n"]
)
def test_any_text_comes_through_a_chunk(text: str) -> None:
    assert content_of(ENCODER.text(text)) == text


@pytest.mark.parametrize("character", ["x", '"', "\x00", "\\", "你", "😀", "\u2028"])
@pytest.mark.parametrize("extra", [-1, 0, 1, 300_000])
def test_a_huge_text_has_no_line_of_128_kib(character: str, extra: int) -> None:
    text = character * (ChunkEncoder.TEXT_LIMIT + extra)
    assert content_of(ENCODER.text(text)) == text


def test_a_huge_piece_of_reasoning_has_no_line_of_128_kib() -> None:
    thoughts = "\x00你" * 100_000
    data = ENCODER.reasoning(thoughts)
    assert "".join(event["choices"][0]["delta"]["reasoning_content"] for event in events(data)) == thoughts


def test_the_fixed_events_are_what_clients_expect() -> None:
    assert SSE_DONE == b"data: [DONE]\n\n"
    assert SSE_COMMENT.startswith(b":")
    assert SSE_COMMENT.endswith(b"\n\n")


def test_a_whole_answer_is_a_completion_of_the_openai_package() -> None:
    message = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "reasoning_content": "why",
        "annotations": [citation(Source("t", "https://a"))],
    }
    body = encode_completion("chatcmpl-1", "m", 1_700_000_000, message, "stop", Usage(1, 2, 3))
    whole = ChatCompletion.model_validate(json.loads(body), strict=True)
    [choice] = whole.choices
    assert (choice.message.content, choice.finish_reason, whole.object) == ("Hi", "stop", "chat.completion")
    assert choice.message.annotations is not None
    assert choice.message.annotations[0].url_citation.url == "https://a"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (1, 2, 3)


def test_media_are_addresses_in_markdown() -> None:
    assert media_markdown(Media("image", "https://a/i.png")) == "![image](https://a/i.png)"
    assert media_markdown(Media("video", "https://a/v.mp4")) == "[video](https://a/v.mp4)"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("你好", 2), ("你好ab", 3), ("안녕", 2), ("é" * 8, 2)],
)
def test_tokens_are_estimated_by_kind_of_character(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


def test_the_sites_own_counts_win_over_the_estimate() -> None:
    asked_for = [Message("system", "abcd"), Message("user", "你好")]
    assert count_usage(Finish("stop", 10, 20), asked_for, "abcd") == Usage(10, 20, 30)
    assert count_usage(Finish("stop"), asked_for, "abcd") == Usage(3, 1, 4)
    assert count_usage(Finish("stop", 0, None), asked_for, "abcd") == Usage(0, 1, 1)


def test_an_error_is_openais_object_with_the_request_id_in_its_message() -> None:
    error = ClientError("No such model.", status=404, code="model_not_found", param="model")
    assert error_object(error, "req-1") == {
        "error": {
            "message": "No such model. (request id req-1)",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_an_error_without_param_says_null() -> None:
    body = json.loads(msgspec.json.encode(error_object(BridgeError("No tab."), "r")))
    assert body["error"]["param"] is None
    assert body["error"]["code"] == "bridge_unavailable"


def test_errors_know_whose_fault_they_are() -> None:
    assert (ClientError("x").http_status, BridgeError("x").http_status, ArenaError("x").http_status) == (
        400,
        503,
        502,
    )
    assert ArenaError("x", status=429, arena_status=429, reply="r").arena_status == 429


@pytest.mark.parametrize(
    ("seconds", "told"), [(None, None), (0, 1), (0.2, 1), (5, 5), (5.1, 6), (60, 60), (900, 60)]
)
def test_clients_are_told_to_come_back_in_one_to_sixty_seconds(
    seconds: float | None, told: int | None
) -> None:
    assert BridgeError("x", retry_after=seconds).retry_after == told


def test_a_wait_without_end_is_told_as_sixty_seconds() -> None:
    assert BridgeError("x", retry_after=float("inf")).retry_after == 60
