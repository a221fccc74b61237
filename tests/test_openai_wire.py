"""OpenAI wire format: what clients may send, and that the openai package reads what they get."""

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import ImagesResponse
from openai.types import Model as OpenAIModel
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_message import Annotation as OpenAIAnnotation

from lmarena_proxy import (
    IGNORED_IMAGE_PARAMETERS,
    IGNORED_PARAMETERS,
    LINE_TEXT_LIMIT,
    REASONING_FIELDS,
    REFUSED_IMAGE_PARAMETERS,
    REFUSED_PARAMETERS,
    SSE_COMMENT,
    SSE_DONE,
    Answer,
    AnswerEvent,
    AnswerRequest,
    ArenaError,
    BridgeError,
    ChatBody,
    ChunkEncoder,
    ClientError,
    Delta,
    Failure,
    Finish,
    GrowingText,
    ImageBody,
    Media,
    Message,
    ModelCard,
    ModelList,
    Picture,
    Pictures,
    Reasoning,
    RequestsConfig,
    Source,
    StopScanner,
    Text,
    TokenEstimate,
    Usage,
    attach,
    cite,
    count_usage,
    encode_completion,
    encode_error,
    encode_json,
    estimate_tokens,
    finish_reason,
    is_too_large,
    media_markdown,
    media_type,
    read_chat,
    read_image_edit,
    read_image_generation,
    refuse_size,
    sum_usage,
)

# No test depends on speed or on an earlier run.
settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")

MAX_LINE_BYTES = 128 * 1024
USER = {"role": "user", "content": "Hi"}
PNG_BYTES = b"\x89PNG\r\n\x1a\nrest"
PNG = "data:image/png;base64," + base64.b64encode(PNG_BYTES).decode()
REASONING_SETTINGS = [*REASONING_FIELDS]


# ── Chat requests ───────────────────────────────────────────────────────────────────────────────────────────


def asked(*messages: Any, **parameters: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [*messages]} | parameters).encode()


def chat(**parameters: Any) -> AnswerRequest:
    return read_chat(asked(USER, **parameters))


def refused(body: bytes, reader: Callable[[bytes], object] = read_chat) -> ClientError:
    with pytest.raises(ClientError) as caught:
        reader(body)
    assert (caught.value.http_status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def read(*messages: Any) -> list[Message]:
    return read_chat(asked(*messages)).messages


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def text_part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def file(**fields: Any) -> dict[str, Any]:
    return {"type": "file", "file": fields}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


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
        (asked(USER, {"role": "assistant", "tool_calls": {}}), "messages[1].tool_calls"),
        (asked({"role": "assistant", "tool_calls": [1]}), "messages[0].tool_calls[0]"),
        (asked({"role": "assistant", "function_call": 1}), "messages[0].function_call"),
        (asked(USER, stream_options=[]), "stream_options"),
        (asked(USER, n=0), "n"),
        (asked(USER, n=-1), "n"),
        (asked(USER, n=1001), "n"),
        (asked(USER, n=10**30), "n"),
        (asked(USER, n=1.5), "n"),
        (asked(USER, n="2"), "n"),
        (asked(USER, n=True), "n"),
        (asked(USER, max_tokens=0), "max_tokens"),
        (asked(USER, max_tokens=-5), "max_tokens"),
        (asked(USER, max_tokens="5"), "max_tokens"),
        (asked(USER, max_tokens=0.5), "max_tokens"),
        (asked(USER, max_completion_tokens=0), "max_completion_tokens"),
        (asked(USER, max_completion_tokens=[1]), "max_completion_tokens"),
        (asked(USER, stop=1), "stop"),
        (asked(USER, stop={}), "stop"),
        (asked(USER, stop=[1]), "stop[0]"),
        (asked(USER, stop=["a", None]), "stop[1]"),
        (asked(USER, stop=["x"] * 65), "stop"),
        (asked(USER, stop="x" * 1001), "stop"),
        (asked(USER, stop=["a", "x" * 1001]), "stop[1]"),
        (b"[]", None),
        (b"null", None),
    ],
)
def test_a_body_of_the_wrong_shape_is_refused_with_its_path(body: bytes, param: str | None) -> None:
    assert refused(body).param == param


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"hello", b"\xff", b'{"model":"\xff"}', b'{"a":' * 100_000, b"[" * 100_000),
        *(rb'{"model":"\ud83d', rb'{"model":"\ud8zz"}', rb'{"model":"\ud83', b'{"model":"\\ud83d\xff"}'),
        *(b'{"model":"\\ud83d \0\0n"}', rb'{"a":"\ud83d","b":' + b"[" * 100_000, rb"\ud83d"),
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    assert refused(body).param is None


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"cut \ud83d", "cut \ufffd"),
        (r"cut \uD83D here", "cut \ufffd here"),
        (r"\ude00 cut", "\ufffd cut"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\u0041", "\ufffdA"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        (r"\ud83d\n\\", "\ufffd\n\\"),
        # An escaped backslash before a u is no escape.
        (r"\ud83d \\ud83d \\\ud83d \\\\ud83d", "\ufffd \\ud83d \\\ufffd \\\\ud83d"),
        (r"\ud83d\\ude00", "\ufffd\\ude00"),
    ],
)
def test_half_a_surrogate_pair_is_read_as_a_replacement_character(escaped: str, text: str) -> None:
    body = rf'{{"model": "m", "messages": [{{"role": "user", "content": "{escaped}"}}]}}'
    assert read_chat(body.encode()).messages == [Message("user", text)]
    assert read_image_generation(rf'{{"model": "m", "prompt": "{escaped}"}}'.encode()).messages == [
        Message("user", text)
    ]


def test_a_whole_pair_stays_one_beside_half_a_pair_in_a_key() -> None:
    messages = rb'[{"role": "user", "content": "\ud83d\ude00"}]'
    read = read_chat(rb'{"model": "m", "\ud83d": 1, "user": "\ude00", "messages": %b}' % messages)
    assert (read.messages, read.ignored) == ([Message("user", "😀")], ("user",))


def test_what_is_wrong_beside_half_a_pair_is_said() -> None:
    assert refused(asked(USER, n=0, user="\ud83d")).param == "n"
    assert refused(asked(USER, logprobs=True, user="\ud83d")).param == "logprobs"


@pytest.mark.parametrize("stream", [None, True, False])
def test_optional_parameters_may_be_null(stream: bool | None) -> None:
    parameters = dict.fromkeys(
        ChatBody.__struct_fields__[2:] + tuple(REFUSED_PARAMETERS) + ("user", "made_up")
    )
    read = chat(**parameters | {"stream": stream})
    assert read.stream is (stream is True)
    assert (read.n, read.include_usage, read.stop, read.ignored) == (1, False, (), ())
    assert (read.max_tokens, read.max_completion_tokens, read.image_format) == (None, None, None)


def test_unknown_parameters_are_ignored_and_known_ones_without_effect_are_named() -> None:
    read = chat(temperature=0.5, tools=[{"type": "function"}], top_p=None, made_up={"x": [1]}, n=1)
    assert read.model == "m"
    assert read.ignored == ("temperature", "tools")


@pytest.mark.parametrize("name", sorted(IGNORED_PARAMETERS - REFUSED_PARAMETERS.keys()))
@pytest.mark.parametrize("value", [0, False, "", [], {}, "x", {"a": [1.5, None]}])
def test_parameters_without_effect_are_named_whatever_their_value(name: str, value: Any) -> None:
    assert chat(**{name: value}).ignored == (name,)


@pytest.mark.parametrize("name", sorted(IGNORED_PARAMETERS))
def test_a_null_is_not_called_ignored(name: str) -> None:
    assert chat(**{name: None}).ignored == ()


def test_parameters_that_have_an_effect_are_not_called_ignored() -> None:
    assert IGNORED_PARAMETERS.isdisjoint(ChatBody.__struct_fields__)
    assert IGNORED_IMAGE_PARAMETERS.isdisjoint(ImageBody.__struct_fields__)
    parameters = {"stream": True, "n": 1, "stop": "x", "max_tokens": 1, "max_completion_tokens": 1}
    assert chat(**parameters, stream_options={"include_usage": True}).ignored == ()


def test_the_parameters_of_a_request_can_be_said_again() -> None:
    given = {"stream": True, "stop": ["x"], "max_tokens": 1, "max_completion_tokens": 1}
    given["stream_options"] = {"include_usage": True}
    assert json.loads(json.dumps(chat(**given, n=1).parameters)) == given
    assert chat(n=2, stream=False).parameters == {"n": 2}


def test_every_parameter_with_an_effect_is_read() -> None:
    read = chat(
        n=3,
        stream=True,
        stream_options={"include_usage": True},
        stop=["a", "b"],
        max_tokens=5,
        max_completion_tokens=7,
    )
    assert (read.n, read.stream, read.include_usage, read.stop) == (3, True, True, ("a", "b"))
    assert (read.max_tokens, read.max_completion_tokens, read.image_format) == (5, 7, None)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}, {"x": 1}])
def test_usage_is_streamed_only_where_it_is_asked_for(options: Any) -> None:
    assert not chat(stream=True, stream_options=options).include_usage


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        (["", ""], ()),
        ("a", ("a",)),
        ("\n", ("\n",)),
        (["a"], ("a",)),
        (["", "a", "", "b"], ("a", "b")),
        (["x" * 1000] * 64, ("x" * 1000,) * 64),
    ],
)
def test_stop_is_a_string_or_a_list_and_empty_ones_stop_nothing(stop: Any, expected: tuple[str, ...]) -> None:
    assert chat(stop=stop).stop == expected


@pytest.mark.parametrize("limit", [1, 4096, 2**31, 2**62])
def test_token_limits_may_be_any_positive_number(limit: int) -> None:
    read = chat(max_tokens=limit, max_completion_tokens=limit)
    assert (read.max_tokens, read.max_completion_tokens) == (limit, limit)


HARMLESS: dict[str, list[Any]] = {
    "tool_choice": [
        "auto",
        "none",
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
    ],
    "function_call": ["auto", "none"],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "top_logprobs": [0],
    "audio": [],
    "modalities": [["text"], ["text", "image"], []],
}
HARMFUL: dict[str, list[Any]] = {
    "tool_choice": [
        "required",
        "any",
        1,
        ["auto"],
        {},
        {"type": "function", "function": {"name": "f"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": "auto"},
    ],
    "function_call": [{"name": "f"}, "f", True],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        {},
        "text",
        "json_object",
        ["text"],
    ],
    "logprobs": [True, 1, "false"],
    "top_logprobs": [1, 20, "0"],
    "audio": [{"voice": "alloy", "format": "wav"}, {}, False],
    "modalities": [["audio"], ["text", "audio"], "audio", "text", {"text": True}],
}


def test_every_refused_parameter_is_tried() -> None:
    assert HARMLESS.keys() == HARMFUL.keys() == REFUSED_PARAMETERS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, each) for name in HARMLESS for each in HARMLESS[name]])
def test_values_that_ask_for_nothing_special_pass(name: str, value: Any) -> None:
    expected = (name,) if name in IGNORED_PARAMETERS else ()
    assert chat(**{name: value}).ignored == expected


@pytest.mark.parametrize(("name", "value"), [(name, each) for name in HARMFUL for each in HARMFUL[name]])
def test_what_would_change_the_result_and_cannot_be_honoured_is_refused(name: str, value: Any) -> None:
    error = refused(asked(USER, **{name: value}))
    assert error.param == name
    assert name in error.message


@pytest.mark.parametrize("name", sorted(REFUSED_PARAMETERS))
def test_a_null_asks_for_nothing(name: str) -> None:
    assert chat(**{name: None}).ignored == ()


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


def test_every_message_knows_its_path_and_its_images() -> None:
    read = read_chat(asked({"role": "system", "content": "s"}, user(image(PNG), image(PNG)), USER))
    assert read.paths == [f"messages[{index}].content" for index in range(3)]
    assert read.images == {"messages[0].content": 0, "messages[1].content": 2, "messages[2].content": 0}


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_the_images_of_a_last_message_that_is_not_the_users_are_counted(role: str) -> None:
    """The model is chosen, and whether it takes images decided, by these counts."""
    read = read_chat(asked(USER, {"role": role, "content": [image(PNG)]}))
    assert len(read.messages[1].attachments) == 1
    assert sum(read.images.values()) == 1
    assert read.images["messages[1].content"] == 1


@pytest.mark.parametrize("content", [None, "", [], [""], [{"type": "text", "text": ""}]])
def test_content_may_be_empty(content: Any) -> None:
    assert read({"role": "user", "content": content}) == [Message("user", "")]
    called = {"role": "assistant", "content": content, "tool_calls": [{"id": "1", "type": "function"}]}
    assert read(called, USER)[0] == Message("assistant", "")


def test_content_may_be_missing() -> None:
    assert read({"role": "user"}) == [Message("user", "")]


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"tool_calls": [call("f", '{"x": 1}')]}, '[called f({"x": 1})]'),
        ({"content": None, "tool_calls": [call("f", "")]}, "[called f()]"),
        ({"content": "I look.", "tool_calls": [call("f", "{}")]}, "I look.\n\n[called f({})]"),
        ({"tool_calls": [call("f", "1"), call("g", "2")]}, "[called f(1)]\n\n[called g(2)]"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "[called f({})]"),
        # A call of another kind than a function's has nothing to show.
        (
            {"content": "x", "tool_calls": [{"type": "custom", "custom": {"name": "c", "input": "in"}}]},
            "x\n\n[called c(in)]",
        ),
        ({"content": "x", "tool_calls": [], "function_call": None}, "x"),
        ({"content": "x", "tool_calls": None}, "x"),
    ],
)
def test_calls_of_tools_become_text(message: dict[str, Any], expected: str) -> None:
    assert read({"role": "assistant"} | message, USER)[0] == Message("assistant", expected)


def test_a_whole_exchange_with_a_tool_goes_over_as_text() -> None:
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city":"Bern"}')]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert read(*history) == [
        Message("user", "Hi"),
        Message("assistant", '[called weather({"city":"Bern"})]'),
        Message("user", "rain"),
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["a", "b"], "a\n\nb"),
        (["a", {"type": "text", "text": "b"}], "a\n\nb"),
        ([{"type": "refusal", "refusal": "No."}], "No."),
        ([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "No."}], "a\n\nNo."),
        (["a", "", "b"], "a\n\nb"),
    ],
)
def test_text_comes_in_parts_of_several_kinds(parts: list[Any], expected: str) -> None:
    assert read({"role": "assistant", "content": parts}, USER)[0] == Message("assistant", expected)


def test_parts_of_text_are_joined_and_images_attached() -> None:
    [message] = read(user(text_part("a"), image(PNG), text_part("b")))
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
def test_the_kind_of_an_image_whose_bytes_do_not_say_it_is_kept(subtype: str, ending: str) -> None:
    [attachment] = read(user(image(f"data:image/{subtype};base64,aGk=")))[0].attachments
    assert attachment.content_type == f"image/{subtype}"
    assert attachment.name.endswith(ending)


@pytest.mark.parametrize("said", ["image/png", "image/jpg", "application/octet-stream", "text/plain", ""])
def test_the_kind_of_an_image_is_what_its_bytes_say(said: str) -> None:
    data = in_base64(b"\xff\xd8\xff\xe0rest")
    [attachment] = read(user(image(f"data:{said};base64,{data}")))[0].attachments
    assert (attachment.content_type, attachment.url) == ("image/jpeg", f"data:image/jpeg;base64,{data}")
    assert attachment.name.endswith(".jpeg")


def test_the_site_gets_a_data_url_without_further_parameters() -> None:
    """Between type and data the contract's form has `;base64` alone."""
    [attachment] = read(user(image(PNG.replace(";", ";charset=utf-8;"))))[0].attachments
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
        "data:image/png;base64," + base64.b64encode(b"....ftypisom").decode(),
        "file:///etc/passwd",
        "javascript:alert(1)",
    ],
)
def test_what_is_no_image_is_refused_with_its_path(url: str) -> None:
    with pytest.raises(ClientError) as caught:
        read(USER, user(text_part("x"), image(url)))
    assert caught.value.http_status == 400
    assert caught.value.param == "messages[1].content[1].image_url"


@pytest.mark.parametrize(
    "url", ["https://a/i.png", "http://a/i.png?x=1#y", "HTTPS://a/i", "  https://a/i.png \n"]
)
def test_an_image_may_be_an_address_that_is_still_to_be_fetched(url: str) -> None:
    """Until then it has no content type."""
    [message] = read(user(text_part("x"), image(url)))
    [attachment] = message.attachments
    assert (attachment.content_type, attachment.url) == ("", url.strip())
    assert read_chat(asked(user(image(url)))).images == {"messages[0].content": 1}


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (PNG_BYTES, "image/png"),
        (b"\xff\xd8\xff\xe0rest", "image/jpeg"),
        (b"GIF89arest", "image/gif"),
        (b"GIF87arest", "image/gif"),
        (b"RIFF\x00\x01\n\x03WEBPVP8 ", "image/webp"),
        (b"\x00\x00\x00\x1cftypavifrest", "image/avif"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "data:application/octet-stream;base64,", "data:;base64,"])
def test_a_file_may_be_an_image_and_its_bytes_say_which(data: bytes, content_type: str, prefix: str) -> None:
    [message] = read(user(text_part("x"), file(file_data=prefix + in_base64(data), filename="x.bin")))
    [attachment] = message.attachments
    assert media_type(data) == attachment.content_type == content_type
    assert attachment.url == f"data:{content_type};base64,{in_base64(data)}"
    assert attachment.name.endswith(content_type.removeprefix("image/"))


def test_a_file_may_be_a_data_url_of_an_image() -> None:
    assert read(user(file(file_data=PNG)))[0].attachments[0].url == PNG


PDF = in_base64(b"%PDF-1.7\n...")
VIDEO = in_base64(b"\x00\x00\x00\x18ftypisomrest")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "https://a/v.mp4"}},
        {"type": ""},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "text", "refusal": "x"},
        {"type": "refusal"},
        {"type": "refusal", "text": "x"},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": None}},
        {"type": "file"},
        file(),
        file(file_data=""),
        file(file_data=None),
        file(file_data=1),
        file(file_id="file-1"),
        file(file_data=PDF),
        file(file_data=PDF, filename="a.pdf"),
        file(file_data=f"data:application/pdf;base64,{PDF}", filename="a.pdf"),
        file(file_data=VIDEO),
        file(file_data=in_base64(b"only words")),
        file(file_data="not base64"),
        file(file_data="data:image/png;base64,a"),
        file(file_data="https://a/i.png"),
        1,
        None,
        [],
    ],
)
def test_a_part_that_cannot_be_carried_over_is_refused_with_its_path(part: Any) -> None:
    error = refused(asked(user(text_part("x"), part)))
    assert (error.param or "").startswith("messages[0].content[1]")


def test_a_file_that_is_no_image_is_named() -> None:
    assert "'a.pdf'" in refused(asked(user(file(file_data=PDF, filename="a.pdf")))).message


def test_a_large_image_is_read_in_linear_time() -> None:
    url = "data:image/png;base64," + "A" * (20 << 20)
    assert len(read(user(image(url)))[0].attachments[0].url) == len(url)


# ── Images in text ──────────────────────────────────────────────────────────────────────────────────────────


def taken_out(text: str, role: str = "user") -> tuple[str, list[str]]:
    """A message's text without its images, white space evened, and their addresses."""
    message = read({"role": role, "content": text}, USER)[0]
    return " ".join(message.content.split()), [attachment.url for attachment in message.attachments]


GIF = "data:image/gif;base64," + in_base64(b"GIF89a")
SVG = "data:image/svg+xml;base64," + in_base64(b"<svg/>")


@pytest.mark.parametrize(
    ("text", "rest", "urls"),
    [
        (PNG, "", [PNG]),
        (f"  {PNG}\n", "", [PNG]),
        (f"What is this?\n{PNG}", "What is this?", [PNG]),
        (f"What is this?\r\n{PNG}\r\nSay.", "What is this? Say.", [PNG]),
        (f"{PNG}\n{GIF}", "", [PNG, GIF]),
        (f"![]({PNG})", "", [PNG]),
        (f"a ![a cat]({PNG}) b", "a b", [PNG]),
        (f"a ![a \\[cat]({PNG}) b", "a b", [PNG]),
        (f"a ![what a cat!]({PNG}) b", "a b", [PNG]),
        (f'a ![cat]({PNG} "the title") b', "a b", [PNG]),
        (f"a ![cat]( {PNG} ) b", "a b", [PNG]),
        (f"a ![cat](\n{PNG}\n) b", "a b", [PNG]),
        (f"a ![1]({PNG}) b ![2]({GIF}) c", "a b c", [PNG, GIF]),
        (f"![1]({PNG})![2]({GIF})", "", [PNG, GIF]),
        (f"![1]({PNG}) and\n\n![2]({PNG})", "and", [PNG, PNG]),
        # What is beside code is none of it.
        (f"```\nx\n```\n{PNG}", "``` x ```", [PNG]),
        (f"{PNG}\n```\nx", "``` x", [PNG]),
        (f"~~~~ py\n~~~\n{GIF}\n~~~~\n{PNG}", f"~~~~ py ~~~ {GIF} ~~~~", [PNG]),
        (f"`a` ![]({PNG}) ``b ` c``", "`a` ``b ` c``", [PNG]),
        (f"a ` alone ![]({PNG})\n`", "a ` alone `", [PNG]),
        (f"``a` ![]({PNG})", "``a`", [PNG]),
        # Some of it is taken, some is not.
        (f"data:image/png;base64,abc ![]({PNG})", "data:image/png;base64,abc", [PNG]),
        (f"`![]({PNG})` is ![]({PNG})", f"`![]({PNG})` is", [PNG]),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_images_that_stand_in_a_text_become_attachments(
    text: str, rest: str, urls: list[str], role: str
) -> None:
    assert taken_out(text, role) == (rest, urls)


def test_the_kind_of_an_image_in_a_text_is_what_its_bytes_say() -> None:
    assert taken_out(f"![]({PNG.replace('png', 'jpg')})") == ("", [PNG])


OTHER_TEXTS = [
    # Code.
    f"Why?\n```\n{PNG}\n```\n",
    f"```html\n<img src='{PNG}'>\n```",
    f"~~~\n{PNG}\n~~~",
    f"```\n{PNG}",
    f"~~~\n{PNG}\n```\n{PNG}",
    f"```\n~~~\n{PNG}\n```",
    f"   ```\n   {PNG}\n   ```",
    f"````\n```\n{PNG}\n````",
    f"```\n{PNG}\n`````\n",
    f"```\r\n{PNG}\r\n```\r\n",
    f"```\na\n```\nb\n```\n![]({PNG})\n```",
    f"    {PNG}\n\t{PNG}",
    f"Write `![]({PNG})`.",
    f"Write ``` `![]({PNG})` ```.",
    f'Use `<img src="{PNG}">`',
    # Named in passing.
    f"What is {PNG} this?",
    f"see ({PNG})",
    f"Icon: {PNG}",
    f"{PNG} is the icon",
    f"Minify: .icon{{background:url({PNG})}}",
    f'<img src="{PNG}">',
    f"[link]({PNG})",
    f'"{PNG}"',
    # No picture.
    SVG,
    f"![]({SVG})",
    "data:image/png;base64,AAAA",
    f"![](data:image/png;base64,{in_base64(b'only words')})",
    f"![](data:image/png;base64,{in_base64(b'....ftypisom')})",
    # No image's base64.
    "data:image/png;base64,a",
    "data:image/png;base64,abc",
    "data:image/png;base64,!!!!",
    "data:image/png;base64,",
    "data:image/png;base64",
    "![](data:image/png;base64,abc)",
    # No image's address.
    "data:image/png,abcd",
    "data:text/plain;base64,aGk=",
    "![](data:application/pdf;base64,aGk=)",
    "data:audio/wav;base64,aGk=",
    "![cat](https://a/i.png)",
    "  no image at all \n",
]


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert read({"role": "user", "content": text}) == [Message("user", text)]
    assert read(user(text_part(text))) == [Message("user", text)]
    assert read({"role": "assistant", "content": text})[0] == Message("assistant", text)


@pytest.mark.parametrize("role", ["tool", "function"])
def test_what_a_tool_gave_stays_as_it_is(role: str) -> None:
    text = f"{PNG}\n![]({PNG})"
    assert read({"role": role, "content": text}) == [Message("user", text)]


def test_for_a_model_that_takes_no_images_those_in_a_text_stay_there() -> None:
    text = f"![]({PNG})\n{PNG}"
    body = asked({"role": "assistant", "content": text}, user(text, image(PNG)))
    answered, question = read_chat(body, {"m": False}.__getitem__).messages
    assert answered == Message("assistant", text)
    assert (question.content, [attachment.url for attachment in question.attachments]) == (text, [PNG])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_systems_text_keeps_its_images(role: str) -> None:
    text = f"Answer with ![]({PNG})."
    assert read({"role": role, "content": text}, USER)[0] == Message("system", text)


def test_images_in_the_text_of_parts_stand_among_the_others_in_order() -> None:
    [message] = read(user(f"a\n{PNG}", image("https://a/i.png"), text_part(f"![]({GIF})"), "b"))
    assert message.content == "a\n\nb"
    assert [attachment.url for attachment in message.attachments] == [PNG, "https://a/i.png", GIF]


def test_images_in_text_are_counted() -> None:
    assert read_chat(asked({"role": "user", "content": f"{PNG}\n{GIF}"})).images == {"messages[0].content": 2}


@pytest.mark.parametrize(
    "text",
    [
        "![](" * 50_000 + "data:image/",
        "![](data:image/png;base64," * 20_000,
        "![" * 20_000 + "data:image/",
        "```\n" * 50_001 + PNG,
        "`" * 200_000 + f"\n{PNG}",
        "`a" * 200_001 + f"\n{PNG}",
        "a".join("`" * length for length in range(900)) + f"\n{PNG}",
        "``" + "a`b" * 200_000 + f"\n{PNG}",
        "data:image/" * 50_000,
        "data:image/png;base64,A" * 50_000,
    ],
)
def test_no_text_takes_long_to_read(text: str) -> None:
    """A pattern that tries again and again would not come to an end here."""
    assert read({"role": "user", "content": text})


def test_a_large_image_in_a_text_is_taken_out_in_linear_time() -> None:
    url = "data:image/png;base64," + in_base64(PNG_BYTES + bytes(3 << 20))
    assert taken_out(f"see ![x]({url}) and\n{url}") == ("see and", [url, url])


# ── Image requests ──────────────────────────────────────────────────────────────────────────────────────────


def generation(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "a cat"} | fields).encode()


def test_an_image_generation_is_one_message() -> None:
    read = read_image_generation(generation())
    assert (read.model, read.messages, read.n) == ("m", [Message("user", "a cat")], 1)
    assert (read.image_format, read.stream, read.stop, read.ignored) == ("url", False, (), ())
    assert read.images == {"prompt": 0}


@pytest.mark.parametrize("response_format", ["url", "b64_json"])
def test_an_image_generation_has_a_number_and_a_format(response_format: str) -> None:
    read = read_image_generation(generation(n=3, response_format=response_format))
    assert (read.n, read.image_format) == (3, response_format)


def test_a_prompt_is_sent_as_it_is() -> None:
    prompt = f"draw {PNG} [called f()]\n```"
    assert read_image_generation(generation(prompt=prompt)).messages == [Message("user", prompt)]


@pytest.mark.parametrize("name", sorted(IGNORED_IMAGE_PARAMETERS))
def test_image_parameters_without_effect_are_named(name: str) -> None:
    assert read_image_generation(generation(**{name: "x", "made_up": 1})).ignored == (name,)
    assert read_image_generation(generation(**{name: None})).ignored == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (generation(model=None), "model"),
        (generation(model=""), "model"),
        (json.dumps({"prompt": "x"}).encode(), "model"),
        (json.dumps({"model": "m"}).encode(), "prompt"),
        (generation(prompt=""), "prompt"),
        (generation(prompt=["x"]), "prompt"),
        (generation(n=0), "n"),
        (generation(n="1"), "n"),
        (generation(n=1001), "n"),
        (generation(response_format="png"), "response_format"),
        (generation(stream=True), "stream"),
        (generation(stream="false"), "stream"),
        (generation(mask="x"), "mask"),
        (b"[]", None),
        (b"{", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_an_image_generation_of_the_wrong_shape_is_refused_with_its_path(
    body: bytes, param: str | None
) -> None:
    assert refused(body, read_image_generation).param == param


def test_an_image_generation_may_say_that_it_is_not_streamed_and_null() -> None:
    nothing = dict.fromkeys([*REFUSED_IMAGE_PARAMETERS, "n", "response_format", "size"])
    read = read_image_generation(generation(**nothing | {"stream": False}))
    assert (read.n, read.image_format, read.ignored) == (1, "url", ())


def picture(data: bytes = PNG_BYTES, name: str = "a.png") -> tuple[str, bytes]:
    return (name, data)


def edit(fields: dict[str, str], *files: tuple[str, tuple[str, bytes]]) -> AnswerRequest:
    """Read an edit as an HTTP client's library encodes it."""
    form = {"model": "m", "prompt": "more hats"} | fields
    request = httpx.Request("POST", "http://x", data=form, files=[*files])
    return read_image_edit(request.read(), request.headers["content-type"])


def refused_edit(fields: dict[str, str], *files: tuple[str, tuple[str, bytes]]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        edit(fields, *files)
    assert (caught.value.http_status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def test_an_image_edit_is_one_message_with_its_image() -> None:
    read = edit({}, ("image", picture()))
    [message] = read.messages
    assert (read.model, read.n, read.image_format, read.ignored) == ("m", 1, "url", ())
    assert (message.role, message.content) == ("user", "more hats")
    [attachment] = message.attachments
    assert attachment.content_type == "image/png"
    assert attachment.url == f"data:image/png;base64,{in_base64(PNG_BYTES)}"
    assert read.images == {"image": 1}


@pytest.mark.parametrize(
    "names", [["image"], ["image"] * 3, ["image[]"], ["image[]"] * 2, ["image", "image[]"]]
)
def test_an_image_edit_may_have_several_images(names: list[str]) -> None:
    pictures = [b"GIF89a" + bytes([index]) for index in range(len(names))]
    read = edit({}, *((name, picture(data)) for name, data in zip(names, pictures, strict=True)))
    [message] = read.messages
    assert [attachment.url for attachment in message.attachments] == [
        f"data:image/gif;base64,{in_base64(data)}" for data in pictures
    ]
    assert read.images == {"image": len(names)}


def test_the_kind_of_an_edits_image_is_what_its_bytes_say() -> None:
    [message] = edit({}, ("image", picture(b"\xff\xd8\xffrest", "a.png"))).messages
    assert message.attachments[0].content_type == "image/jpeg"


def test_an_image_edit_has_a_number_and_a_format() -> None:
    read = edit({"n": "3", "response_format": "b64_json"}, ("image", picture()))
    assert (read.n, read.image_format) == (3, "b64_json")


def test_an_edits_parameters_without_effect_are_named() -> None:
    read = edit({"size": "1x1", "quality": "high", "made_up": "x"}, ("image", picture()))
    assert read.ignored == ("quality", "size")


@pytest.mark.parametrize("said", ["false", "False", "FALSE"])
def test_an_edit_may_say_that_it_is_not_streamed(said: str) -> None:
    assert edit({"stream": said}, ("image", picture())).stream is False


def test_a_field_of_an_edit_that_was_left_empty_counts_for_nothing() -> None:
    empty = dict.fromkeys(("mask", "stream", "n", "size", "response_format"), "")
    read = edit(empty, ("image", picture()))
    assert (read.n, read.image_format, read.ignored) == (1, "url", ())


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"model": ""}, [("image", picture())], "model"),
        ({"prompt": ""}, [("image", picture())], "prompt"),
        ({"n": "0"}, [("image", picture())], "n"),
        ({"n": "-1"}, [("image", picture())], "n"),
        ({"n": "two"}, [("image", picture())], "n"),
        ({"n": "1.5"}, [("image", picture())], "n"),
        ({"n": "1001"}, [("image", picture())], "n"),
        ({"n": "9" * 400}, [("image", picture())], "n"),
        ({"response_format": "png"}, [("image", picture())], "response_format"),
        ({"stream": "true"}, [("image", picture())], "stream"),
        ({}, [("image", picture()), ("mask", picture())], "mask"),
        ({"mask": "x"}, [("image", picture())], "mask"),
        ({}, [("picture", picture())], "image"),
        ({"image": "words"}, [("other", picture())], "image"),
        ({}, [("image", picture(b""))], "image"),
        ({}, [("image", picture(b"%PDF-1.7"))], "image"),
        ({}, [("image", picture(b"\x00\x00\x00\x18ftypisom"))], "image"),
        ({}, [("image", picture()), ("image", picture(b"words"))], "image"),
        ({}, [("image[]", picture(b"words"))], "image"),
    ],
)
def test_an_image_edit_of_the_wrong_shape_is_refused_with_its_field(
    fields: dict[str, str], files: list[tuple[str, tuple[str, bytes]]], param: str
) -> None:
    assert refused_edit(fields, *files).param == param


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_an_image_edit_needs_a_model_and_a_prompt(missing: str) -> None:
    form = {name: "x" for name in ("model", "prompt") if name != missing}
    request = httpx.Request("POST", "http://x", data=form, files=[("image", picture())])
    with pytest.raises(ClientError) as caught:
        read_image_edit(request.read(), request.headers["content-type"])
    assert caught.value.param == missing


def form_part(disposition: str, data: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f"Content-Disposition: {disposition}", *headers])
    return b"--B\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"


FORM = "multipart/form-data; boundary=B"
FIELDS = form_part('form-data; name="model"', b"m") + form_part('form-data; name="prompt"', b"p")
WHOLE_FORM = FIELDS + form_part('form-data; name="image"; filename="a"', PNG_BYTES) + b"--B--\r\n"


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "application/x-www-form-urlencoded", "multipart/mixed; boundary=B", "x", ";;"],
)
def test_a_body_of_another_type_is_no_edit(content_type: str) -> None:
    with pytest.raises(ClientError, match="multipart/form-data") as caught:
        read_image_edit(WHOLE_FORM, content_type)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (WHOLE_FORM, "multipart/form-data"),
        (WHOLE_FORM, "multipart/form-data; boundary="),
        (WHOLE_FORM, "multipart/form-data; boundary=other"),
        (WHOLE_FORM, "multipart/form-data; boundary=é"),
        (WHOLE_FORM[:-9], FORM),
        (WHOLE_FORM[:40], FORM),
        (b"", FORM),
        (b"--B", FORM),
        (b"--B--\r\n", FORM),
        (b"--B\r\nX: y\r\n\r\nz\r\n--B--\r\n", FORM),
        (b"--B\r\nno header\r\n\r\nz\r\n--B--\r\n", FORM),
        (b'{"model": "m"}', FORM),
        (form_part("form-data", b"without a name") + WHOLE_FORM, FORM),
    ],
)
def test_a_broken_form_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(ClientError) as caught:
        read_image_edit(body, content_type)
    assert (caught.value.http_status, caught.value.type) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="B"',
        "multipart/form-data;charset=utf-8;boundary=B",
        "Multipart/Form-Data; boundary=B",
    ],
)
def test_the_type_of_a_form_may_be_written_in_several_ways(content_type: str) -> None:
    assert read_image_edit(WHOLE_FORM, content_type).images == {"image": 1}


def test_a_form_is_read_whatever_its_parts_say_of_themselves() -> None:
    odd = form_part("form-data; name*=bogus''q%ff", b"x") + form_part(
        'form-data; name="q"', b"\xff\xfe", "Content-Type: text/plain; charset=bogus"
    )
    assert read_image_edit(odd + WHOLE_FORM, FORM).images == {"image": 1}


@pytest.mark.parametrize("limit_mb", [1, 2, 3, 5])
def test_an_image_may_be_as_large_as_the_site_takes_and_no_larger(limit_mb: int) -> None:
    assert not is_too_large(attach("image/png", bytes(limit_mb << 20)), limit_mb)
    for size in ((limit_mb << 20) + 1, limit_mb << 21):
        image = attach("image/png", bytes(size))
        assert is_too_large(image, limit_mb)
        error = refuse_size(image, limit_mb, "here", "there is no other way")
        assert (error.http_status, error.error_code, error.param) == (413, "request_too_large", "here")
        assert error.message.startswith("here:")
        assert f"{limit_mb} MiB" in error.message
        assert error.message.endswith("there is no other way.")


def test_an_attachment_has_a_name_of_its_own() -> None:
    first, second = (attach("image/svg+xml", b"x") for _ in range(2))
    assert first.name != second.name
    assert first.name.endswith(".svg")
    assert first.url == second.url == "data:image/svg+xml;base64,eA=="


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([PNG, "auto", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.text() | st.lists(
    st.sampled_from(["![", "](", ")", PNG, "data:image/png;base64,", "\n", "```", "~~~", " ", "A", "="])
).map("".join)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "refusal", "image_url", "file", "input_audio"]) | JUNK,
        "text": TEXTS | JUNK,
        "refusal": st.text() | JUNK,
        "image_url": TEXTS | st.fixed_dictionaries({"url": TEXTS}) | JUNK,
        "file": st.fixed_dictionaries({"file_data": TEXTS}) | JUNK,
    },
)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.text(), "arguments": JUNK}) | JUNK}
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | JUNK,
        "content": TEXTS | st.lists(PARTS | st.text(), max_size=3) | JUNK,
        "tool_calls": st.lists(CALLS, max_size=2) | JUNK,
        "function_call": JUNK,
    },
)
VALID_MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]),
        "content": TEXTS
        | st.none()
        | st.lists(st.text() | st.sampled_from([text_part("x"), image(PNG), image("https://a/i.png")])),
    }
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.text() | JUNK,
        "messages": st.lists(MESSAGES | VALID_MESSAGES, max_size=3) | JUNK,
        "prompt": st.text() | JUNK,
        "made_up": JUNK,
    }
    | dict.fromkeys([*ChatBody.__struct_fields__[2:], *REFUSED_PARAMETERS, *REFUSED_IMAGE_PARAMETERS], JUNK),
)


def read_or_refused(read: Callable[[], AnswerRequest]) -> AnswerRequest | None:
    """What was read, None where it was refused; anything else is raised."""
    refusal = None
    try:
        return read()
    except ClientError as error:
        refusal = error
    assert refusal.http_status == 400
    assert encode_error(refusal, "r")
    return None


@given(body=BODIES.map(json.dumps).map(str.encode) | JUNK.map(json.dumps).map(str.encode) | st.binary())
@pytest.mark.parametrize("reader", [read_chat, read_image_generation])
def test_any_body_is_read_or_refused(reader: Callable[[bytes], AnswerRequest], body: bytes) -> None:
    read = read_or_refused(lambda: reader(body))
    if read:
        assert read.messages[-1].role == "user"
        assert len(read.paths) == len(read.messages)


@given(messages=st.lists(VALID_MESSAGES, min_size=1, max_size=4))
def test_every_conversation_in_the_right_shape_is_read(messages: list[dict[str, Any]]) -> None:
    read = read_chat(asked(*messages))
    assert len(read.messages) == len(messages) + (
        messages[-1]["role"] in ("system", "developer", "assistant")
    )
    assert sum(read.images.values()) == sum(len(message.attachments) for message in read.messages)
    assert encode_json(read)


DISPOSITIONS = st.sampled_from(
    [
        'form-data; name="model"',
        'form-data; name="prompt"',
        'form-data; name="n"',
        'form-data; name="image"; filename="a.png"',
        'form-data; name="image[]"; filename=""',
        'form-data; name="mask"; filename="a"',
        "form-data; name*=utf-16''%ff%fe",
        'form-data; filename="a"',
        "form-data",
        "",
    ]
)
FORMS = st.lists(
    st.builds(form_part, DISPOSITIONS, st.binary() | st.sampled_from([PNG_BYTES, b"1", b"m"])) | st.binary()
).map(b"".join)


@given(
    body=FORMS | st.tuples(FORMS, st.sampled_from([b"--B--", b"--B--\r\n"])).map(b"".join),
    content_type=st.sampled_from([FORM] * 5 + ["multipart/form-data; boundary*=x''%ff"]) | st.text(),
)
def test_any_form_is_read_or_refused(body: bytes, content_type: str) -> None:
    read = read_or_refused(lambda: read_image_edit(body, content_type))
    assert read is None or read.messages[-1].attachments


# ── Limits and stops ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("你好", 2), ("你好ab", 3), ("안녕", 2), ("é" * 8, 2)],
)
def test_tokens_are_estimated_by_kind_of_character(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


# Half of these characters are one token, the others a quarter of one.
WORDS = st.text(alphabet="ab你안é😀\n𠮷")


@given(st.lists(st.text(min_size=1, max_size=5), max_size=80), st.integers(0, 200))
def test_a_growing_text_is_its_pieces_joined(pieces: list[str], characters: int) -> None:
    text = GrowingText()
    for piece in pieces:
        text.append(piece)
    whole = "".join(pieces)
    assert (str(text), len(text), bool(text)) == (whole, len(whole), bool(whole))
    assert text.last(characters) == whole[max(0, len(whole) - characters) :]


@given(pieces=st.lists(WORDS))
def test_an_estimate_does_not_depend_on_the_pieces(pieces: list[str]) -> None:
    estimate = TokenEstimate()
    counts = [estimate.add(piece) for piece in pieces]
    assert counts == sorted(counts)
    assert estimate.add("") == estimate_tokens("".join(pieces))


@given(before=WORDS, text=WORDS, room=st.integers(0, 20))
def test_what_fits_is_the_longest_beginning_within_the_limit(before: str, text: str, room: int) -> None:
    estimate = TokenEstimate()
    limit = estimate.add(before) + room
    fitting = estimate.fitting(text, limit)
    assert text.startswith(fitting)
    assert estimate_tokens(before + fitting) <= limit
    if fitting != text:
        assert estimate_tokens(before + text[: len(fitting) + 1]) > limit
    # Looking takes nothing.
    assert estimate.add("") == estimate_tokens(before)


def in_pieces(text: str, sizes: Sequence[int]) -> list[str]:
    """A text cut into pieces of so many characters, and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def stopped(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What is before the stop string that is whole first (the longest of several), and if there is one."""
    for end in range(1, len(text) + 1):
        if begins := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(begins)], True
    return text, False


def scanned(pieces: Iterable[str], stops: Sequence[str]) -> tuple[str, bool]:
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        shown += scanner.feed(piece)
        if scanner.is_found:
            return shown, True
    return shown + scanner.finish(), False


STOPS = st.lists(st.text(alphabet="ab你", min_size=1, max_size=4), min_size=1, max_size=4)
STOPPABLE = st.text(alphabet="ab你c", max_size=30)
SIZES = st.lists(st.integers(0, 5), max_size=12)


@given(text=STOPPABLE, stops=STOPS, sizes=SIZES)
@example(text="aab", stops=["ab"], sizes=[1, 1])
@example(text="abcabd", stops=["bd", "abcabe"], sizes=[5])
@example(text="xabc", stops=["b", "abc"], sizes=[4])
@example(text="xab", stops=["b", "ab"], sizes=[2])
def test_the_stop_string_that_is_whole_first_counts_wherever_the_pieces_end(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    expected = stopped(text, stops)
    assert scanned(in_pieces(text, sizes), stops) == scanned(text, stops) == expected
    assert not any(stop in expected[0] for stop in stops)


@given(text=STOPPABLE, stops=STOPS, sizes=SIZES)
def test_nothing_is_held_back_longer_than_it_must(text: str, stops: list[str], sizes: list[int]) -> None:
    scanner, given_, shown = StopScanner(stops), "", ""
    for piece in in_pieces(text, sizes):
        shown += scanner.feed(piece)
        given_ += piece
        if scanner.is_found:
            break
        held = given_.removeprefix(shown)
        assert shown + held == given_
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_stop_strings_of_the_largest_size_are_looked_for_in_little_time() -> None:
    stops = ["a" * 999 + chr(0x4E00 + index) for index in range(64)]
    assert scanned(["a" * 7] * 200, stops) == ("a" * 1400, False)


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────

THINK = RequestsConfig(reasoning="think")
LISTED = RequestsConfig(list_sources=True)
END = Finish("stop", 10, 20)
PICTURE, FILM = Media("image", "https://a/i.png"), Media("video", "https://a/v.mp4")
ONE, TWO = Source("One", "https://1"), Source("Two", "https://2")


def begin(settings: RequestsConfig | None = None, **wanted: Any) -> Answer:
    wanted = {"model": "m", "messages": [Message("user", "abcd")], "paths": ["messages[0].content"]} | wanted
    return Answer(AnswerRequest(**wanted), settings or RequestsConfig())


def feed(answer: Answer, *events: AnswerEvent, finish: Finish = END) -> list[AnswerEvent]:
    """Events one by one, as far as the answer needs them, and its end; returns what it shows."""
    shown: list[AnswerEvent] = []
    for event in events:
        shown += answer.take([event])
        if answer.cut:
            break
    return shown + answer.end(None if answer.cut else finish)


def answered(*events: AnswerEvent, settings: RequestsConfig | None = None, **wanted: Any) -> Answer:
    """A whole answer; what was shown of it is what it keeps."""
    answer = begin(settings, **wanted)
    shown = feed(answer, *events)
    assert "".join(event.text for event in shown if isinstance(event, Text)) == answer.text
    assert "".join(event.text for event in shown if isinstance(event, Reasoning)) == answer.reasoning
    assert [event for event in shown if isinstance(event, Source)] == answer.sources
    return answer


def letters(text: str) -> list[AnswerEvent]:
    return [Text(letter) for letter in text]


@pytest.mark.parametrize("setting", REASONING_SETTINGS)
@given(text=st.text(), sizes=SIZES)
def test_text_comes_out_unchanged_in_any_pieces(setting: Any, text: str, sizes: list[int]) -> None:
    events = [Text(piece) for piece in in_pieces(text, sizes) if piece]
    answer = answered(*events, settings=RequestsConfig(reasoning=setting))
    assert (answer.text, answer.finish_reason, answer.cut) == (text, "stop", None)


def test_what_is_shown_is_shown_at_once() -> None:
    answer = begin()
    events: list[AnswerEvent] = [Text("a"), Reasoning("why"), ONE, Text("b")]
    assert answer.take(events) == events
    assert (answer.text, answer.reasoning, answer.sources) == ("ab", "why", [ONE])
    assert answer.end(END) == []


def test_events_may_come_together_or_one_by_one() -> None:
    events: list[AnswerEvent] = [Reasoning("r"), Text("abE"), PICTURE, ONE, Text("cEND no")]
    together, apart = (begin(settings, stop=("END",)) for settings in (THINK, THINK))
    shown = together.take(events) + together.end(None)
    assert "".join(event.text for event in shown if isinstance(event, Text)) == together.text
    feed(apart, *events)
    assert together.text == apart.text
    assert together.usage == apart.usage


@pytest.mark.parametrize("event", [Failure("broken"), Finish("stop", 1, 2)])
def test_an_end_is_no_part_of_what_is_shown(event: AnswerEvent) -> None:
    answer = begin()
    assert answer.take([Text("a"), event]) == [Text("a")]
    assert answer.text == "a"


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("END", ("END",), ""),
        ("one EEND two", ("END",), "one E"),
        ("one ENDEND", ("ENDEND", "END"), "one "),
        ("a\n\nb", ("\n\n", "b"), "a"),
        ("你好世界", ("世界",), "你好"),
    ],
)
def test_an_answer_ends_before_a_stop_string_however_it_is_cut(
    text: str, stops: tuple[str, ...], expected: str, size: int
) -> None:
    events = [Text(text[start : start + size]) for start in range(0, len(text), size)]
    answer = answered(*events, stop=stops)
    assert (answer.text, answer.cut, answer.finish_reason) == (expected, "stop", "stop")


@pytest.mark.parametrize("text", ["one EN", "one E", "EN", "no such word", "ENENEN"])
def test_the_beginning_of_a_stop_string_comes_in_the_end(text: str) -> None:
    answer = answered(*letters(text), stop=("END",))
    assert (answer.text, answer.cut, answer.finish_reason) == (text, None, "stop")
    assert answer.usage == Usage(10, 20, 30)


def test_stop_strings_stop_no_reasoning() -> None:
    for setting in (None, THINK):
        answer = answered(Reasoning("the END?"), Text("no END"), settings=setting, stop=("END",))
        assert "the END?" in answer.reasoning + answer.text
        assert answer.text.endswith("no ")


@pytest.mark.parametrize(
    ("wanted", "reasoning", "text", "cut"),
    [
        ({"max_tokens": 1}, "0123456789", "abcd", "length"),
        ({"max_tokens": 2}, "0123456789", "abcdefgh", "length"),
        ({"max_tokens": 3}, "0123456789", "abcdefghij", None),
        ({"max_completion_tokens": 1}, "0123", "", "length"),
        ({"max_completion_tokens": 3}, "0123456789", "ab", "length"),
        ({"max_completion_tokens": 4}, "0123456789", "abcdef", "length"),
        ({"max_completion_tokens": 5}, "0123456789", "abcdefghij", None),
        ({"max_tokens": 1, "max_completion_tokens": 5}, "0123456789", "abcd", "length"),
        ({"max_tokens": 9, "max_completion_tokens": 3}, "0123456789", "ab", "length"),
    ],
)
def test_a_limit_cuts_text_or_text_and_reasoning(
    wanted: dict[str, Any], reasoning: str, text: str, cut: str | None
) -> None:
    whole = answered(Reasoning("0123456789"), Text("abcdefghij"), **wanted)
    apart = answered(*map(Reasoning, "0123456789"), *letters("abcdefghij"), **wanted)
    for answer in (whole, apart):
        assert (answer.reasoning, answer.text, answer.cut) == (reasoning, text, cut)
        assert answer.finish_reason == (cut or "stop")


def test_an_answer_that_just_fits_is_not_cut() -> None:
    answer = answered(Text("你好"), settings=None, max_tokens=2, max_completion_tokens=2)
    assert (answer.text, answer.cut, answer.finish_reason) == ("你好", None, "stop")


def test_nothing_is_shown_after_a_cut() -> None:
    for wanted in ({"max_tokens": 1}, {"stop": ("e",)}):
        answer = begin(None, **wanted)
        shown = answer.take([Text("abcdefgh"), Text("x"), Reasoning("y"), PICTURE, ONE])
        assert shown == [Text("abcd")]
        assert answer.take([Text("abcdefgh"), PICTURE, ONE]) == []
        assert answer.end(None) == []
        assert (answer.text, answer.sources, answer.media) == ("abcd", [], [])


def test_what_was_held_back_does_not_follow_a_cut() -> None:
    """After the cut there is room for one narrow character more, but what is held is no next one."""
    answer = answered(Text("a你你EN"), stop=("END",), max_tokens=2)
    assert (answer.text, answer.cut) == ("a你", "length")


def test_no_image_follows_a_cut() -> None:
    answer = answered(*letters("abcdE"), PICTURE, stop=("END",), max_tokens=1)
    assert (answer.text, answer.media, answer.cut) == ("abcd", [], "length")


@pytest.mark.parametrize("setting", REASONING_SETTINGS)
def test_reasoning_of_which_nothing_fits_leaves_no_trace(setting: Any) -> None:
    settings = RequestsConfig(reasoning=setting)
    answer = answered(Text("abcd"), Reasoning("x"), settings=settings, max_completion_tokens=1)
    assert (answer.text, answer.cut) == ("abcd", "length")
    assert completion(answer, setting=setting).choices[0].message.model_extra in (None, {})


@given(
    text=STOPPABLE,
    stops=st.just([]) | STOPS,
    max_tokens=st.none() | st.integers(1, 12),
    max_completion_tokens=st.none() | st.integers(1, 12),
    sizes=SIZES,
)
@example(text="a你你b", stops=["ba"], max_tokens=2, max_completion_tokens=None, sizes=[])
def test_stops_and_limits_together_cut_the_same_wherever_the_pieces_end(
    text: str, stops: list[str], max_tokens: int | None, max_completion_tokens: int | None, sizes: list[int]
) -> None:
    wanted: dict[str, Any] = {
        "stop": tuple(stops),
        "max_tokens": max_tokens,
        "max_completion_tokens": max_completion_tokens,
    }
    before, is_stopped = stopped(text, stops)
    limit = min(max_tokens or 1000, max_completion_tokens or 1000)
    expected = TokenEstimate().fitting(before, limit)
    cut = "length" if expected != before else "stop" if is_stopped else None
    for pieces in (in_pieces(text, sizes), [*text], [text]):
        answer = answered(*[Text(piece) for piece in pieces if piece], **wanted)
        assert (answer.text, answer.cut) == (expected, cut)
        assert not any(stop in answer.text for stop in stops)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([Reasoning("why"), Text("so")], "<think>\nwhy\n</think>\n\nso"),
        ([Reasoning("w"), Reasoning("hy"), Text("s"), Text("o")], "<think>\nwhy\n</think>\n\nso"),
        ([Reasoning("why")], "<think>\nwhy\n</think>\n\n"),
        ([Text("so")], "so"),
        ([], ""),
    ],
)
def test_reasoning_may_go_into_the_text(events: list[AnswerEvent], expected: str) -> None:
    answer = answered(*events, settings=THINK)
    assert (answer.text, answer.reasoning) == (expected, "")


def test_reasoning_after_text_goes_into_the_text_whole() -> None:
    answer = answered(Text("so"), Reasoning("why"), Text("!"), settings=THINK)
    before, _, rest = answer.text.partition("<think>\n")
    assert before.strip() == "so"
    assert rest == "why\n</think>\n\n!"


def test_thoughts_end_before_an_image_and_before_a_list() -> None:
    pictured = answered(Reasoning("why"), PICTURE, settings=THINK)
    before, _, rest = pictured.text.partition("</think>\n\n")
    assert (before, rest.strip()) == ("<think>\nwhy\n", media_markdown(PICTURE))
    settings = RequestsConfig(reasoning="think", list_sources=True)
    listed = answered(Reasoning("why"), ONE, settings=settings)
    assert listed.text.startswith("<think>\nwhy\n</think>\n\n")


def test_thoughts_end_where_the_answer_is_cut() -> None:
    answer = answered(Reasoning("0123456789"), settings=THINK, max_completion_tokens=1)
    assert (answer.text, answer.cut) == ("<think>\n0123\n</think>\n\n", "length")
    answer = answered(Reasoning("why"), Text("END"), settings=THINK, stop=("END",))
    assert (answer.text, answer.cut) == ("<think>\nwhy\n</think>\n\n", "stop")


def test_marks_of_thoughts_count_against_no_limit() -> None:
    answer = answered(Reasoning("0123"), Text("abcd"), settings=THINK, max_tokens=1, max_completion_tokens=2)
    assert (answer.text, answer.cut) == ("<think>\n0123\n</think>\n\nabcd", None)


def test_media_are_addresses_in_markdown() -> None:
    assert media_markdown(PICTURE) == "![image](https://a/i.png)"
    assert media_markdown(FILM) == "[video](https://a/v.mp4)"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([PICTURE], "![image](https://a/i.png)"),
        ([FILM], "[video](https://a/v.mp4)"),
        ([Text("Here:"), PICTURE], "Here:\n\n![image](https://a/i.png)"),
        ([PICTURE, FILM], "![image](https://a/i.png)\n\n[video](https://a/v.mp4)"),
        ([Reasoning("why"), PICTURE], "![image](https://a/i.png)"),
    ],
)
@pytest.mark.parametrize("wanted", [{}, {"stop": ("END",)}, {"max_tokens": 50}])
def test_images_and_videos_stand_in_the_text_after_a_blank_line(
    events: list[AnswerEvent], expected: str, wanted: dict[str, Any]
) -> None:
    answer = answered(*events, **wanted)
    assert answer.text == expected
    assert answer.media == [event for event in events if isinstance(event, Media)]


def test_an_image_comes_after_what_was_held_back() -> None:
    answer = answered(Text("a E"), PICTURE, Text("ND"), stop=("END",))
    assert answer.text.startswith("a E\n\n![image](https://a/i.png)")
    assert answer.text.endswith("ND")
    assert answer.cut is None


def test_no_stop_string_is_looked_for_in_an_address() -> None:
    assert answered(PICTURE, stop=("https",)).text == media_markdown(PICTURE)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (ONE, "- [One](<https://1>)"),
        (Source("a [b] \\c", "https://a"), r"- [a \[b\] \\c](<https://a>)"),
        (Source(" a\n\tb ", "https://a"), "- [a b](<https://a>)"),
        (Source("a", "https://a/(x) y"), "- [a](<https://a/(x)%20y>)"),
    ],
)
def test_sources_are_listed_below_the_text_where_that_is_set(source: Source, line: str) -> None:
    answer = answered(Text("so"), source, settings=LISTED)
    assert answer.text == f"so\n\n{line}"
    assert answered(Text("so"), source).text == "so"


@pytest.mark.parametrize("url", ["https://a/>x", "https://a/<x>", "https://a/\nx", "https://a/\r\n\r\n# x"])
def test_no_address_breaks_out_of_its_link(url: str) -> None:
    line = answered(Source("t", url), settings=LISTED).text.strip()
    assert line.startswith("- [t](<")
    assert line.endswith(">)")
    address = re.sub(r"\\[<>]", "", line.removeprefix("- [t](<").removesuffix(">)"))
    assert not re.search(r"[<>\r\n]", address)


def test_a_source_is_listed_once_and_cited_as_often_as_it_came() -> None:
    answer = answered(ONE, TWO, ONE, Text("so"), settings=LISTED)
    assert answer.text == "so\n\n- [One](<https://1>)\n- [Two](<https://2>)"
    assert answer.sources == [ONE, TWO, ONE]


def test_the_list_comes_last_and_counts_against_no_limit() -> None:
    answer = answered(ONE, Text("abc E"), settings=LISTED, stop=("END",), max_tokens=2)
    assert answer.text == "abc E\n\n- [One](<https://1>)"
    assert answer.cut is None
    cut = answered(ONE, Text("abcdefgh"), settings=LISTED, max_tokens=1)
    assert cut.text == "abcd\n\n- [One](<https://1>)"
    assert cut.finish_reason == "length"


@pytest.mark.parametrize("setting", [None, THINK, LISTED])
@pytest.mark.parametrize("wanted", [{}, {"stop": ("END",)}, {"max_tokens": 2, "max_completion_tokens": 9}])
def test_another_attempt_begins_anew(setting: RequestsConfig | None, wanted: dict[str, Any]) -> None:
    events: list[AnswerEvent] = [Reasoning("why"), ONE, PICTURE, Text("abcd EN")]
    lost: list[list[AnswerEvent]] = [events, [Text("long and longer END")], [Reasoning("x" * 99)]]
    answer, fresh = begin(setting, **wanted), begin(setting, **wanted)
    for each in lost:
        answer.take(each)
        answer.clear()
        assert (answer.text, answer.reasoning, answer.sources, answer.media) == ("", "", [], [])
        assert (answer.cut, answer.usage, answer.finish_reason) == (None, None, "stop")
    assert feed(answer, *events) == feed(fresh, *events)
    assert (answer.text, answer.cut, answer.usage) == (fresh.text, fresh.cut, fresh.usage)


def test_the_sites_own_counts_win_over_the_estimate() -> None:
    asked_for = [Message("system", "abcd"), Message("user", "你好")]
    assert count_usage(Finish("stop", 10, 20), asked_for, "abcd") == Usage(10, 20, 30)
    assert count_usage(Finish("stop"), asked_for, "abcd") == Usage(3, 1, 4)
    assert count_usage(Finish("stop", 0, None), asked_for, "abcd") == Usage(0, 1, 1)


def test_a_whole_answer_has_the_sites_usage_else_the_estimate_of_all_it_showed() -> None:
    assert answered(Text("abcd")).usage == Usage(10, 20, 30)
    answer = begin()
    feed(answer, Reasoning("abcd"), Text("efgh"), finish=Finish("stop"))
    assert answer.usage == Usage(1, 2, 3)


@pytest.mark.parametrize("wanted", [{"stop": ("END",)}, {"max_tokens": 1}, {"max_completion_tokens": 1}])
@pytest.mark.parametrize("finish", [None, Finish("stop", 10, 20), Finish("length"), Finish("content-filter")])
def test_a_cut_answer_is_counted_by_what_was_shown(wanted: dict[str, Any], finish: Finish | None) -> None:
    """The site's counts, where they came in the same bytes as the cut, are of more than that."""
    answer = begin(None, **wanted)
    answer.take([Text("abcdEND and more")])
    answer.end(finish)
    assert answer.text == "abcd"
    assert answer.usage == Usage(1, 1, 2)
    assert answer.finish_reason == ("stop" if "stop" in wanted else "length")


def test_an_answer_that_a_limit_cuts_has_no_more_tokens_than_that() -> None:
    for setting in ("reasoning_content", "reasoning", "both"):
        settings = RequestsConfig(reasoning=setting)
        answer = answered(
            Reasoning("你0123"), Text("abcd你好" * 5), settings=settings, max_completion_tokens=7
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content-filter", "content_filter"),
        ("error", "stop"),
        ("unknown", "stop"),
        ("new", "stop"),
    ],
)
def test_an_answer_ends_for_the_sites_reason(reason: str, expected: str) -> None:
    answer = begin()
    feed(answer, Text("a"), finish=Finish(reason))
    assert answer.finish_reason == finish_reason(Finish(reason)) == expected


def test_the_prompt_of_several_answers_counts_once() -> None:
    answers = [begin() for _ in range(4)]
    for answer, finish in zip(answers, (Finish("stop", 5, 1), Finish("stop", 5, 2), None), strict=False):
        answer.end(finish)
    assert sum_usage(answers) == Usage(5, 3, 8)
    assert sum_usage([]) == Usage(0, 0, 0)


# ── What is sent ────────────────────────────────────────────────────────────────────────────────────────────


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


NAME = 'name "quoted" 你'
ENCODER = ChunkEncoder("chatcmpl-1", NAME, 1_700_000_000)


def content_of(data: bytes) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks(data))


def test_a_stream_is_chunks_of_the_openai_package() -> None:
    data = (
        ENCODER.delta(Delta(role="assistant", content=""))
        + ENCODER.event(Text("Hello"))
        + ENCODER.event(Reasoning("why"))
        + ENCODER.event(Source("t", "https://a"))
        + ENCODER.finish("stop")
        + ENCODER.usage(Usage(1, 2, 3))
    )
    first, text, reasoning, cited, finish, usage = chunks(data)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    for chunk in chunks(data):
        assert (chunk.id, chunk.model, chunk.created) == ("chatcmpl-1", NAME, 1_700_000_000)
        assert all(choice.index == 0 for choice in chunk.choices)
    assert (text.choices[0].delta.content, text.choices[0].finish_reason) == ("Hello", None)
    assert (reasoning.choices[0].delta.model_extra or {})["reasoning_content"] == "why"
    [annotation] = (cited.choices[0].delta.model_extra or {})["annotations"]
    citation = OpenAIAnnotation.model_validate(annotation, strict=True).url_citation
    assert (citation.title, citation.url) == ("t", "https://a")
    assert finish.choices[0].finish_reason == "stop"
    assert finish.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 3


def test_a_delta_says_nothing_but_what_changes() -> None:
    deltas = [event["choices"][0]["delta"] for event in events(ENCODER.text("a") + ENCODER.delta(Delta()))]
    assert deltas == [{"content": "a"}, {}]


def test_every_answer_of_a_request_has_its_own_index() -> None:
    for index in (0, 1, 17):
        encoder = ChunkEncoder("chatcmpl-1", "m", 1, index)
        data = encoder.text("a") + encoder.delta(Delta(role="assistant")) + encoder.finish("length")
        assert [chunk.choices[0].index for chunk in chunks(data)] == [index] * 3


@pytest.mark.parametrize("reason", ["stop", "length", "content-filter", "error", "unknown", "new"])
def test_every_finish_reason_is_one_of_openais(reason: str) -> None:
    [chunk] = chunks(ENCODER.finish(finish_reason(Finish(reason))))
    expected = {"length": "length", "content-filter": "content_filter"}.get(reason, "stop")
    assert chunk.choices[0].finish_reason == expected


@pytest.mark.parametrize("event", [PICTURE, Failure("x"), Finish("stop")])
def test_what_an_answer_never_shows_is_a_bug(event: AnswerEvent) -> None:
    with pytest.raises(TypeError):
        ENCODER.event(event)


@pytest.mark.parametrize(
    "text", ["", "a", '"\\/\n\r\t\b\f', "\x00\x1f\x7f", "你好", "😀", "\u2028\u2029\x85", "data: x\n\n"]
)
def test_any_text_comes_through_a_chunk(text: str) -> None:
    assert content_of(ENCODER.text(text)) == text


@pytest.mark.parametrize("character", ["x", '"', "\x00", "\\", "你", "😀", "\u2028"])
@pytest.mark.parametrize("extra", [-1, 0, 1, 300_000])
def test_a_huge_text_has_no_line_of_128_kib(character: str, extra: int) -> None:
    text = character * (LINE_TEXT_LIMIT + extra)
    assert content_of(ENCODER.text(text)) == text


@given(text=st.text())
def test_no_text_breaks_its_event(text: str) -> None:
    assert content_of(ENCODER.event(Text(text))) == text


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("reasoning_content", ["reasoning_content"]),
        ("reasoning", ["reasoning"]),
        ("both", ["reasoning_content", "reasoning"]),
    ],
)
@pytest.mark.parametrize("thoughts", ["why", "\x00你" * 100_000, "\x01" * (LINE_TEXT_LIMIT + 1)])
def test_reasoning_is_in_the_fields_that_are_set_and_no_line_has_128_kib(
    setting: str, fields: list[str], thoughts: str
) -> None:
    encoder = ChunkEncoder("chatcmpl-1", "m", 1, reasoning=setting)
    data = encoder.event(Reasoning(thoughts))
    assert chunks(data)
    deltas = [event["choices"][0]["delta"] for event in events(data)]
    assert all([*delta] == fields for delta in deltas)
    for field in fields:
        assert "".join(delta[field] for delta in deltas) == thoughts


def test_a_source_has_no_line_of_128_kib() -> None:
    """The site's lines may have 16 MiB, and its sources come from anywhere."""
    for source in (Source("\x00" * 200_000, "https://a"), Source("t", "https://a/" + "x" * 200_000)):
        assert all(len(line) < MAX_LINE_BYTES for line in ENCODER.event(source).split(b"\n"))


def test_every_setting_of_reasoning_has_its_fields() -> None:
    assert [*msgspec.to_builtins(REASONING_FIELDS)] == REASONING_SETTINGS
    for setting in REASONING_FIELDS:
        assert msgspec.convert({"reasoning": setting}, RequestsConfig).reasoning == setting


def test_the_fixed_events_are_what_clients_expect() -> None:
    assert SSE_DONE == b"data: [DONE]\n\n"
    assert SSE_COMMENT.startswith(b":")
    assert SSE_COMMENT.endswith(b"\n\n")


def completion(*answers: Answer, setting: str = "reasoning_content") -> ChatCompletion:
    """A whole reply, as the openai package's own strict models."""
    body = encode_completion("chatcmpl-1", NAME, 1_700_000_000, answers, setting)
    return ChatCompletion.model_validate(json.loads(body), strict=True)


def test_a_whole_answer_is_a_completion_of_the_openai_package() -> None:
    whole = completion(answered(Reasoning("why"), Text("Hi"), Source("t", "https://a")))
    [choice] = whole.choices
    assert (whole.id, whole.created, whole.model) == ("chatcmpl-1", 1_700_000_000, NAME)
    assert (choice.message.content, choice.finish_reason, whole.object) == ("Hi", "stop", "chat.completion")
    assert (choice.index, choice.message.role, choice.message.refusal) == (0, "assistant", None)
    assert (choice.message.model_extra or {}) == {"reasoning_content": "why"}
    assert choice.message.annotations is not None
    [annotation] = choice.message.annotations
    assert (annotation.url_citation.title, annotation.url_citation.url) == ("t", "https://a")
    assert whole.usage is not None
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 20, 30)


def test_a_plain_answer_has_neither_reasoning_nor_annotations() -> None:
    message = completion(answered(Text("Hi"))).choices[0].message
    assert message.model_dump(exclude_unset=True) == {"role": "assistant", "content": "Hi", "refusal": None}


def test_an_empty_answer_is_a_completion_too() -> None:
    [choice] = completion(answered()).choices
    assert (choice.message.content, choice.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("reasoning_content", {"reasoning_content": "why"}),
        ("reasoning", {"reasoning": "why"}),
        ("both", {"reasoning_content": "why", "reasoning": "why"}),
        ("think", {}),
    ],
)
def test_reasoning_of_a_whole_answer_is_where_the_setting_says(setting: Any, fields: dict[str, str]) -> None:
    settings = RequestsConfig(reasoning=setting)
    answer = answered(Reasoning("w"), Reasoning("hy"), Text("Hi"), settings=settings)
    message = completion(answer, setting=setting).choices[0].message
    assert (message.model_extra or {}) == fields
    assert (message.content or "").endswith("Hi")
    assert ("<think>\nwhy\n" in (message.content or "")) is (setting == "think")


def test_a_stream_and_a_whole_reply_say_the_same() -> None:
    sent: list[AnswerEvent] = [Reasoning("why"), Text("a"), PICTURE, ONE, TWO, Text("b END c")]
    for setting in REASONING_SETTINGS:
        answer = begin(
            msgspec.convert({"reasoning": setting, "list_sources": True}, RequestsConfig), stop=("END",)
        )
        encoder = ChunkEncoder("chatcmpl-1", NAME, 1, reasoning=setting)
        data = b"".join(encoder.event(event) for event in feed(answer, *sent))
        deltas = [event["choices"][0]["delta"] for event in events(data)]
        message = json.loads(encode_completion("chatcmpl-1", NAME, 1, [answer], setting))["choices"][0][
            "message"
        ]
        assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
        for field in ("reasoning_content", "reasoning"):
            assert "".join(delta.get(field, "") for delta in deltas) == message.get(field, "")
        annotations = [each for delta in deltas for each in delta.get("annotations", [])]
        assert annotations == message["annotations"]


def test_several_answers_are_several_choices() -> None:
    cut = answered(Text("abcdefgh"), max_tokens=1)
    filtered = begin()
    feed(filtered, Text("b"), finish=Finish("content-filter", 10, 2))
    whole = completion(cut, filtered, answered(Text("c")))
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == ["abcd", "b", "c"]
    assert [choice.finish_reason for choice in whole.choices] == ["length", "content_filter", "stop"]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (10, 1 + 2 + 20)


def test_a_citation_is_one_of_the_openai_package() -> None:
    citation = OpenAIAnnotation.model_validate(json.loads(encode_json(cite(ONE))), strict=True)
    assert (citation.type, citation.url_citation.title, citation.url_citation.url) == (
        "url_citation",
        "One",
        "https://1",
    )


def test_pictures_are_an_images_response_of_the_openai_package() -> None:
    body = encode_json(
        Pictures(created=1_700_000_000, data=[Picture(url="https://a/i.png"), Picture(b64_json="aGk=")])
    )
    response = ImagesResponse.model_validate(json.loads(body), strict=True)
    assert response.created == 1_700_000_000
    assert response.data is not None
    by_address, by_data = response.data
    assert by_address.model_dump(exclude_unset=True) == {"url": "https://a/i.png"}
    assert by_data.model_dump(exclude_unset=True) == {"b64_json": "aGk="}


CARD = ModelCard(
    id="m",
    created=1,
    owned_by="acme",
    modality="image",
    input_capabilities=("text", "image"),
    output_capabilities=("image",),
    takes_many_images=False,
    requires_image=True,
    sessions_ready=4,
)


def test_a_model_is_one_of_the_openai_package_and_says_what_it_takes_and_gives() -> None:
    body = json.loads(encode_json(CARD))
    model = OpenAIModel.model_validate(body, strict=True)
    assert (model.id, model.object, model.created, model.owned_by) == ("m", "model", 1, "acme")
    assert model.model_extra == {
        "modality": "image",
        "input_capabilities": ["text", "image"],
        "output_capabilities": ["image"],
        "takes_many_images": False,
        "requires_image": True,
        "sessions_ready": 4,
    }
    assert json.loads(encode_json(ModelList(data=[CARD]))) == {"object": "list", "data": [body]}


def test_an_error_is_openais_object_with_the_request_id_in_its_message() -> None:
    error = ClientError("No such model.", status=404, code="model_not_found", param="model")
    assert json.loads(encode_error(error, "req-1")) == {
        "error": {
            "message": "No such model. (request id req-1)",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_an_error_without_param_says_null() -> None:
    body = json.loads(encode_error(BridgeError("No tab."), "r"))
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
