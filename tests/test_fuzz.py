"""Inputs that nobody would think of: whatever comes, no 500, no hang, and nothing is left behind.

Hypothesis is synchronous: it drives a plain client in a worker thread, against one running program a test.
"""

import base64
import contextlib
import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from harness import (
    CLAUDE,
    EDIT,
    GPT,
    IMAGE,
    RAY,
    SEARCH,
    Rig,
    Stream,
    Tables,
    check_error,
    model_id,
    start,
    until,
    whole,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import ImagesResponse

from demo import contract
from demo.arena import Exchange, Switches, outcome_of
from demo.contract import Call, Model
from lmarena_proxy import Relay

TIMEOUT_SECONDS = 30
CHAT, GENERATIONS, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
MODELS = (CLAUDE, GPT, SEARCH, IMAGE, EDIT, RAY)
# What hangs is to end in a 504, also where a stream's keep-alives would go on.
TABLES: Tables = {
    "requests": {"total_timeout_seconds": 20, "queue_timeout_seconds": 20, "keepalive": "off"},
    "media": {"keep": True, "timeout_seconds": 10},
    "models": {"aliases": {"gpt-4o": CLAUDE, "lost": "nowhere"}},
}
PNG_BYTES = contract.png("seed")
PNG = base64.b64encode(PNG_BYTES).decode()
PNG_URL = f"data:image/png;base64,{PNG}"


def fuzzing(examples: int) -> settings:
    """The same examples every time: what fails here fails everywhere."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


async def drive(rig: Rig, fuzz: Callable[[httpx.Client], None]) -> None:
    """Run a fuzz in a thread with a client of its own; then nothing may be left of any request."""
    with httpx.Client(base_url=rig.url, timeout=TIMEOUT_SECONDS, verify=False, trust_env=False) as client:
        await trio.to_thread.run_sync(fuzz, client)
    await until(lambda: rig.program.answers.active == 0)
    for pool in rig.program.pool:
        assert (pool.limiter.borrowed_tokens, pool.waiting, pool.busy) == (0, 0, 0), pool


pytestmark = pytest.mark.usefixtures("errors")


def check_refusal(response: httpx.Response, *statuses: int) -> str:
    """An error in OpenAI's form with one of these statuses; returns its code."""
    assert response.status_code in statuses, (response.status_code, response.text)
    code = str(response.json()["error"]["code"])
    check_error(response, response.status_code, code)
    return code


def check_stream(response: httpx.Response) -> Stream:
    """Each choice begins with its role and ends with its reason, or all end with one error."""
    stream = Stream(response.text)
    assert stream.has_done, response.text
    assert len(stream.errors) <= 1
    for index in {choice.index for choice in stream.choices}:
        choices = [choice for choice in stream.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert (
            stream.errors
            or [bool(choice.finish_reason) for choice in choices].index(True) == len(choices) - 1
        )
    return stream


def check_chat(response: httpx.Response, *statuses: int) -> str:
    """A good answer in either form, or a refusal; returns what it was."""
    if response.status_code != 200:
        return check_refusal(response, *statuses)
    if response.headers["content-type"].startswith("text/event-stream"):
        errors = check_stream(response).errors
        return f"stream {errors[0]['code']}" if errors else "stream"
    whole(response)
    return "whole"


def check_pictures(response: httpx.Response, *statuses: int) -> str:
    if response.status_code != 200:
        return check_refusal(response, *statuses)
    pictures = ImagesResponse.model_validate_json(response.text, strict=True).data
    assert pictures
    assert all(bool(picture.url) != bool(picture.b64_json) for picture in pictures)
    return "pictures"


# ── Bodies ──────────────────────────────────────────────────────────────────────────────────────────────────
#
# Bodies are put together from pieces of JSON text, so that they can hold what no JSON library would write:
# a name twice, numbers beyond all types, half a character, an end too early.

DEEP = ["[" * 1500 + "]" * 1500, '{"a":' * 1500 + "1" + "}" * 1500, "[" * 900 + "]" * 900]
ODD_JSON = [
    *"null true false 0 -0 1 -1 7 1.0 1.5 1e3 1e999 -1e999 NaN Infinity 01 [] {} [[]]".split(),
    *r'"" "1" "null" "\ud800" "\udc00\ud800" "\u0000" {"":null} {"type":"text"} ["",""] [null]'.split(),
    *'[ " } nul // \x00'.split(" "),
    *("9" * 19, "9" * 400, "9" * 5000, "-" + "9" * 30),
    *DEEP,
]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # Surrogates, too.
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
JUNK = st.sampled_from(ODD_JSON) | ANY_VALUE.map(json.dumps)

ADDRESSES = [
    *f"""{PNG_URL}
  {PNG_URL}
data:image/png;base64,{PNG}!
data:image/png;base64,
data:,

data:image/svg+xml;charset=utf-8;base64,PHN2Zy8+
data:image/é;base64,AAAA
data:text/plain;base64,QQ==
data:image/png;a=b;c=d;base64,AAAA
data:image/png,AAAA
DATA:IMAGE/PNG;BASE64,AAAA""".split("\n"),
    *"""http://127.0.0.1:1/ http://[::1]/ http://localhost/ https://localhost/ http://0/ http://1 http://0x7f.1/
http://[::ffff:127.0.0.1]/ http://[fe80::1%25lo]/ http://224.0.0.1/ http://[bad http:// http:///x http://?
http://a..b/ http://\x00/ http://localhost:0/ http://localhost:65536/ http://localhost:-1/
http://localhost:a/ http://user:pass@127.0.0.1/ HTTP://LOCALHOST http://127.0.0.1\\@x/ http://localhost。 http://٣.1
ftp://127.0.0.1/ file:///etc/passwd //localhost/ /media/x javascript:1 http:/127.0.0.1""".split(),
    *(f"http://127.0.0.1:{'9' * 20}/", f"http://[::1]:{'9' * 400}/", f"http://{'a' * 70}/", "http://a b/"),
    f"http://127.0.0.1:1/media/{'0' * 32}.png",
]
MARKS = [
    *'![ ![a]( ]( ) [ ] ( " ``` ~~~ = A data:image/ data:image/png;base64, ;base64,'.split(),
    *("<think>", "</think>", "ad:{}\n"),
    *' |\n|\n```\n|\n   ~~~~\n|\r\n|\u2028|\x00|😀|你好|é|data: [DONE]\n\n|a0:"x"\n'.split("|"),
    *(PNG_URL, f"![x]({PNG_URL})", f'![x]({PNG_URL} "t")'),
]
TEXTS = (
    st.text(max_size=40)
    | st.lists(st.sampled_from(MARKS), max_size=12).map("".join)
    | st.sampled_from(["", " ", "Hello", "word " * 300, "长" * 500])
)


def mostly(
    good: st.SearchStrategy[Any], other: st.SearchStrategy[Any], one_in: int
) -> st.SearchStrategy[Any]:
    return st.integers(1, one_in).flatmap(lambda roll: other if roll == one_in else good)


FILES: list[dict[str, str]] = [
    *({"file_data": data} for data in (PNG_URL, PNG, "", "data:image/png;base64,%", ",,", "é")),
    *({"file_data": "QQ==", "filename": "a\x00.txt"}, {"file_id": "f"}, {}),
]
PARTS = st.one_of(
    TEXTS,
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(lambda text: {"type": "refusal", "refusal": text}, TEXTS),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, st.sampled_from(ADDRESSES)),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, st.sampled_from(ADDRESSES)),
    st.builds(lambda file: {"type": "file", "file": file}, st.sampled_from(FILES)),
    st.just({"type": "image_url", "image_url": {"url": PNG_URL, "detail": "high"}}),
    st.builds(
        lambda kind, key, value: {"type": kind, key: value},
        st.sampled_from(["text", "image_url", "file", "refusal", "input_audio", "video_url", "", "\x00"]),
        st.sampled_from(["text", "image_url", "file", "refusal", "type", "x"]),
        st.none() | TEXTS,
    ),
)
CALLS = st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS})
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user"] * 4 + "system developer assistant tool function".split()),
        "content": TEXTS | TEXTS | TEXTS | st.lists(PARTS, max_size=3) | st.none(),
    },
    optional={
        "name": TEXTS,
        "tool_call_id": TEXTS,
        "function_call": st.none() | CALLS,
        "tool_calls": st.none()
        | st.lists(st.fixed_dictionaries({}, optional={"function": CALLS}), max_size=2),
    },
).map(json.dumps)
MESSAGE_LISTS = st.lists(mostly(MESSAGES, JUNK, 15), min_size=1, max_size=4).map(
    lambda each: f"[{','.join(each)}]"
)
NAMES = st.sampled_from(
    [
        *(CLAUDE,) * 4,
        *(GPT,) * 4,
        SEARCH,
        IMAGE,
        EDIT,
        RAY,
        "gpt-4o",
        "lost",
        model_id(CLAUDE),
        CLAUDE[:-1],
        "",
        "é\x00",
    ]
)
STOPS = TEXTS | st.sampled_from(["", "]", "[c", " ", "\n", "o", "x" * 1001])
LIMITS = st.integers(-1, 30) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**30])
PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "model": NAMES,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans() | st.none(), "x": st.none()}
    ),
    "n": st.integers(0, 6),
    "stop": STOPS | st.lists(STOPS, max_size=5) | st.lists(st.just("a"), min_size=60, max_size=70),
    "max_tokens": LIMITS,
    "max_completion_tokens": LIMITS,
    "temperature": st.floats(0, 2),
    "tools": st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "allowed_tools", "allowed_tools": {}}]
    ),
    "function_call": st.sampled_from(["auto", "none", {"name": "f"}]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, "text", {"type": []}]),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 2),
    "modalities": st.lists(st.sampled_from(["text", "audio", "image"]), max_size=3),
    "audio": st.just({"voice": "alloy", "format": "wav"}),
    "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "unheard_of": ANY_VALUE,
    "\ud800": st.none(),
}


Values = dict[str, st.SearchStrategy[Any]]


@st.composite
def objects(draw: st.DrawFn, required: Values, parameters: Values) -> str:
    """The text of an object: what is required, mostly, and some parameters, maybe twice, often wrong."""
    pairs = [(name, draw(values)) for name, values in required.items() if draw(st.integers(0, 30)) < 30]
    for name in draw(st.lists(st.sampled_from(sorted(parameters)), max_size=5)):
        pairs.append((name, draw(mostly(parameters[name].map(json.dumps), JUNK, 8))))
    text = ",".join(f"{json.dumps(name)}:{value}" for name, value in draw(st.permutations(pairs)))
    end: str = draw(mostly(st.just("}"), st.sampled_from(["", "}}", "},{}", "}\x00", ",}"]), 30))
    return "{" + text + end


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


CHAT_BODIES = objects(
    {"model": NAMES.map(json.dumps), "messages": MESSAGE_LISTS, "stream": st.sampled_from(["true", "false"])},
    PARAMETERS,
).map(raw)
PICTURE_NAMES = st.sampled_from([*(IMAGE,) * 6, EDIT, CLAUDE, RAY, "nowhere", ""])
PICTURE_PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(0, 6),
    "response_format": st.sampled_from(["url", "b64_json", "b64", None]),
    "stream": st.booleans(),
    "mask": st.none() | TEXTS,
    "size": st.sampled_from(["1024x1024", "auto", "0x0"]),
    "user": TEXTS,
    "prompt": TEXTS,
    "unheard_of": ANY_VALUE,
}
PICTURE_BODIES = objects(
    {"model": PICTURE_NAMES.map(json.dumps), "prompt": TEXTS.map(lambda text: json.dumps(text or "A cat"))},
    PICTURE_PARAMETERS,
).map(raw)

# Multipart bodies, and what nearly is one. Each part is its lines of headers and its content.
BOUNDARIES = st.sampled_from([*b"b|b|b|----x|'()+_,-./:=?|a b||\xe9".split(b"|"), b"b" * 300])
FIELD_VALUES = st.one_of(
    st.sampled_from(b"1|2|4|5|0|-1||true|false|null|1e999|url|b64_json|\xff\xfe|\r\n--b|--b--".split(b"|")),
    st.sampled_from([b"9" * 5000, IMAGE.encode(), EDIT.encode()]),
    TEXTS.map(raw),
)
FIELD_NAMES = "model prompt n response_format image image[] mask size stream x image[0] _charset_".split()
FIELD_HEADERS = st.sampled_from(
    [
        *(b'Content-Disposition: form-data; name="%s"',) * 8,
        b'Content-Disposition: form-data; name="%s"; filename="a.png"',
        b'Content-Disposition: form-data; name="%s"; filename="\xff\x00"\r\nContent-Type: image/png',
        b"Content-Disposition: form-data; name*=utf-8''%s; filename*=zzz''%%ff",
        b'Content-Disposition: form-data; name="%s"\r\nContent-Type: text/plain; charset=utf-7',
        b'Content-Disposition: form-data; name="%s"\r\nContent-Transfer-Encoding: base64',
        b'content-disposition: attachment; name="%s"',
        b"Content-Disposition: form-data; x=%s",
        b"Content-Disposition:%s",
        b"%s",
        b": %s",
    ]
)
PARTS_OF_FORMS = st.builds(
    lambda header, name, value: header % name.encode() + b"\r\n\r\n" + value,
    FIELD_HEADERS,
    st.sampled_from(FIELD_NAMES),
    FIELD_VALUES,
)
PICTURE_PART = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + PNG_BYTES
TYPES = [
    *b"application/json|text/plain||multipart/form-data|multipart/form-data; boundary=|\xff/\xff".split(b"|"),
    *(b"multipart/form-data; boundary*=utf-8''%ff", b"multipart/mixed; boundary=b"),
    *(b'multipart/form-data; boundary="b', b"multipart/form-data" + b";a" * 2000),
]


@st.composite
def forms(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A content type and a body of POST /v1/images/edits."""
    boundary = draw(BOUNDARIES)
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\n'
        + draw(mostly(st.just(EDIT.encode()), FIELD_VALUES, 6))
    ]
    parts += [b'Content-Disposition: form-data; name="prompt"\r\n\r\nA hat'] * draw(
        mostly(st.just(1), st.integers(0, 2), 9)
    )
    parts += [PICTURE_PART] * draw(mostly(st.just(1), st.integers(0, 3), 6))
    parts += draw(st.lists(PARTS_OF_FORMS, max_size=3))
    body = b"".join(b"--%s\r\n%s\r\n" % (boundary, part) for part in draw(st.permutations(parts)))
    body += draw(
        mostly(st.just(b"--%s--\r\n" % boundary), st.sampled_from([b"", b"--", b"--%s" % boundary]), 9)
    )
    kind = draw(mostly(st.just(b"multipart/form-data; boundary=%s" % boundary), st.sampled_from(TYPES), 9))
    return kind, draw(mostly(st.just(body), st.binary(max_size=100), 20))


# ── From clients ────────────────────────────────────────────────────────────────────────────────────────────


async def start_all(nursery: trio.Nursery, tmp_path: Path, tables: Tables = TABLES) -> Rig:
    rig = await start(nursery, tmp_path, models=MODELS, tables=tables, filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    return rig


async def test_no_chat_body_is_an_error_of_the_program(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start_all(nursery, tmp_path)
    seen: Counter[str] = Counter()

    def fuzz(client: httpx.Client) -> None:
        @fuzzing(200)
        @given(CHAT_BODIES)
        def ask(body: bytes) -> None:
            response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
            seen[check_chat(response, 400, 404, 413)] += 1

        ask()

    await drive(rig, fuzz)
    # The arena is well: what it refused, the program should have.
    assert not [call.reason for call in rig.calls if call.reason]
    assert seen.keys() == {"whole", "stream", "invalid_request", "model_not_found"}
    assert seen["whole"] + seen["stream"] > seen.total() / 8, seen


async def test_no_address_of_an_image_is_an_error_of_the_program(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), tables=TABLES, filled=True)
    seen: Counter[str] = Counter()

    def fuzz(client: httpx.Client) -> None:
        for address in ADDRESSES:
            for part in (
                {"type": "image_url", "image_url": address},
                {"type": "file", "file": {"file_data": address}},
                {"type": "text", "text": address},
            ):
                seen[check_chat(client.post(CHAT, content=chat_with([part])), 400)] += 1

    await drive(rig, fuzz)
    assert not [call.reason for call in rig.calls if call.reason]
    assert seen.keys() == {"whole", "invalid_request"}


async def test_no_body_of_the_image_endpoints_is_an_error_of_the_program(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start_all(nursery, tmp_path)
    seen: Counter[str] = Counter()

    def fuzz(client: httpx.Client) -> None:
        @fuzzing(120)
        @given(PICTURE_BODIES)
        def generate(body: bytes) -> None:
            response = client.post(GENERATIONS, content=body)
            seen[f"generated {check_pictures(response, 400, 404)}"] += 1

        @fuzzing(150)
        @given(forms())
        def edit(form: tuple[bytes, bytes]) -> None:
            response = client.post(EDITS, content=form[1], headers=[(b"content-type", form[0])])
            seen[f"edited {check_pictures(response, 400, 404)}"] += 1

        generate()
        edit()

    await drive(rig, fuzz)
    assert not [call.reason for call in rig.calls if call.reason]
    assert seen["generated pictures"] > 10, seen
    assert seen["edited pictures"] > 10, seen


# Header names and values, as far as HTTP lets them through.
HEADER_VALUES = st.one_of(
    st.binary(max_size=20).map(
        lambda value: bytes(byte for byte in value if byte >= 32 and byte != 127).strip()
    ),
    st.sampled_from(
        b"|*|null|bytes=0-|bytes=-1|bytes=9-1|bytes=x|bytes=0-1,2-3|[|W/|Bearer|a=b; c".split(b"|")
    ),
    st.sampled_from([b"Basic !", b'Digest a="', b"9" * 400, b"Thu, 01 Jan 1970 00:00:00 GMT"]),
)
HEADER_NAMES = st.sampled_from(
    b"""accept accept-encoding accept-language access-control-request-headers access-control-request-method
    authorization content-encoding content-type cookie date forwarded if-match if-modified-since if-none-match
    if-range if-unmodified-since origin range referer user-agent x-forwarded-for x-request-id""".split()
)
HOSTS = st.sampled_from(
    """localhost localhost: localhost:x localhost:99999999 user@localhost localhost/x localhost?x
    localhost:1:2 [::1] [::1]:x [::1 LOCALHOST localhost. evil ,, é [""".split()
)
SEGMENTS = st.sampled_from(
    [
        *"v1 models media chat completions images edits api state sessions bootstrap health .. .".split(),
        *"%00 %ff %ED%A0%80 %2e%2e %2f %0d%0ax:y %zz % é 😀 [ { ; : \\ gpt-4o lost".split(),
        *("", CLAUDE, "a" * 3000, "0" * 32 + ".png", "0" * 32 + ".png%0a"),
    ]
)
PATHS = st.one_of(
    st.lists(SEGMENTS, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from([CHAT, GENERATIONS, EDITS, "/v1/models", "/api/state", f"/media/{'0' * 32}.png"]),
    st.builds(
        lambda place, name, query: place + name + query,
        st.sampled_from(["/v1/models/", "/media/", "/api/sessions/"]),
        SEGMENTS,
        st.sampled_from(["", "?", "?a=%ff&a", "?" + "a" * 3000]),
    ),
)


async def test_no_path_method_header_or_raw_body_is_an_error_of_the_program(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start_all(nursery, tmp_path)
    media = rig.program.media.directory
    media.mkdir(parents=True)
    (media / f"{'0' * 32}.png").write_bytes(PNG_BYTES)
    seen: Counter[int] = Counter()
    methods = st.sampled_from("GET GET GET POST POST HEAD OPTIONS DELETE PUT PATCH TRACE X".split())

    def fuzz(client: httpx.Client) -> None:
        @fuzzing(300)
        @given(
            methods,
            PATHS,
            st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=3),
            mostly(st.none(), HOSTS, 8),
            st.sampled_from(ODD_JSON).map(raw) | st.binary(max_size=60) | CHAT_BODIES,
        )
        def send(
            method: str, path: str, headers: list[tuple[bytes, bytes]], host: str | None, body: bytes
        ) -> None:
            hosts = [] if host is None else [(b"host", host.encode("latin-1"))]
            try:
                response = client.request(method, path, headers=[*hosts, *headers], content=body)
            except httpx.InvalidURL:
                return  # The client does not send this.
            seen[response.status_code] += 1
            assert response.status_code < 500, response.text
            assert response.headers["x-request-id"].startswith("req_")
            is_error = response.status_code >= 400 and method != "HEAD"
            # Only what is asked for anew elsewhere, is empty, or is a file's range has no error object.
            if is_error and response.status_code != 416:
                check_refusal(response, response.status_code)

        send()

    await drive(rig, fuzz)
    assert seen.keys() >= {200, 404, 405, 421}, seen


TRICKS: dict[str, Callable[[], bytes]] = {
    "pictures that begin in one another": lambda: chat_with(
        "![" * 250 + "](data:image/png;base64," + "A" * 4_000_000
    ),
    "pictures that never end": lambda: chat_with("![a](data:image/png;base64,A " * 100_000),
    "fences that never end": lambda: chat_with(f"{PNG_URL}\n" + "```\n~~~\n" * 100_000),
    "one long name of a type": lambda: chat_with(f"data:image/{'a' * 4_000_000};base64,"),
    "one long data URL": lambda: chat_with(
        [{"type": "image_url", "image_url": "data:image/png" + ";a" * 2_000_000}]
    ),
    "many addresses": lambda: chat_with([{"type": "image_url", "image_url": "http://127.0.0.1/"}] * 5000),
    "many broken parts": lambda: chat_with([*["a"] * 200_000, {"type": "x"}]),
    "a long unknown model": lambda: json.dumps(
        {"model": "abc" * 2_000_000, "messages": [{"role": "user"}]}
    ).encode(),
    "stops that nearly match": lambda: chat_with(
        "a" * 100_000, stop=["a" * 999 + str(place) for place in range(64)]
    ),
    "limits of a long text": lambda: chat_with(
        "长a" * 500_000, max_tokens=1_200_000, max_completion_tokens=10**30
    ),
    "brackets": lambda: b"[" * 8_000_000,
    "objects": lambda: b'{"model":' * 3_000_000,
}


def chat_with(content: object, **rest: Any) -> bytes:
    return json.dumps({"model": GPT, "messages": [{"role": "user", "content": content}], **rest}).encode()


@pytest.mark.parametrize("name", TRICKS)
async def test_no_body_keeps_the_program_from_others(
    nursery: trio.Nursery, tmp_path: Path, name: str
) -> None:
    """Reading a body of a few megabytes takes moments: all others wait that long."""
    rig = await start(nursery, tmp_path, models=(GPT,), tables=TABLES, filled=True)
    body = TRICKS[name]()

    def fuzz(client: httpx.Client) -> None:
        check_chat(client.post(CHAT, content=body), 400, 404, 413)

    await drive(rig, fuzz)


async def test_no_form_of_many_parts_keeps_the_program_from_others(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(EDIT,), tables=TABLES)
    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 100_000 + b"--b--\r\n"

    def fuzz(client: httpx.Client) -> None:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        check_pictures(client.post(EDITS, content=body, headers=headers), 400, 413)

    await drive(rig, fuzz)


async def test_a_body_that_nobody_reads_does_not_silence_its_connection(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=TABLES, connected=False)

    def fuzz(client: httpx.Client) -> None:
        for method, path in (
            ("POST", "/v1/embeddings"),
            ("POST", "/v1/models"),
            ("PUT", "/"),
            ("PUT", CHAT),
        ) * 3:
            check_refusal(client.request(method, path, content=b"n" * 1_000_000), 404, 405)
            assert client.get("/health").status_code == 200

    await drive(rig, fuzz)


# ── Below HTTP ──────────────────────────────────────────────────────────────────────────────────────────────

HOST = b"Host: localhost\r\n"
UPGRADE = HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: "
WEBSOCKET = (
    HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header of HTTP/2, neither indexed nor squeezed."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def http2(**pseudo: bytes) -> bytes:
    """A request of HTTP/2 with these pseudo-headers."""
    headers = b"".join(literal(b":" + name.encode(), value) for name, value in pseudo.items())
    return HTTP2 + frame(1, 5, 1, headers)


CONNECTIONS = [
    b"GET /health HTTP/1.1\r\n" + UPGRADE + b"AAA\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + UPGRADE + b"AAAA\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + UPGRADE + b"AAUAAAAA\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + UPGRADE + b"AAMAAABkAAQAAP__\r\n\r\ngarbage",
    b"GET / HTTP/1.1\r\n" + WEBSOCKET + b"\r\n",
    b"GET / HTTP/1.1\r\n" + WEBSOCKET + b"Sec-WebSocket-Protocol: \xff\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + WEBSOCKET.replace(b"localhost", b"example.com") + b"\r\n",
    http2(method=b"GET", scheme=b"http", path=b"/health", authority=b"localhost"),
    http2(method=b"GET", scheme=b"http", path=b"/\xff", authority=b"localhost"),
    http2(method=b"\xff", scheme=b"http", path=b"/health", authority=b"localhost"),
    http2(method=b"GET", scheme=b"http", path=b"/health"),
    http2(method=b"CONNECT", authority=b"localhost"),
    http2(method=b"CONNECT", protocol=b"websocket", scheme=b"http", path=b"/", authority=b"localhost"),
    HTTP2 + frame(1, 5, 1, b"\xff\xff\xff\xff"),
    b"GET ? HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET //[ HTTP/1.1\r\n" + HOST + b"\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n",
    b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100,
    b"\x00" * 100,
]
TOKENS = st.sampled_from(
    [
        *b"GET |POST |PRI |/health|*|/| HTTP/1.1\r\n| HTTP/2.0\r\n|\r\n|\r\n\r\n|AAA|\xff|\x00|:|{}".split(
            b"|"
        ),
        *b"Content-Length: 3\r\n|Transfer-Encoding: chunked\r\n|Expect: 100-continue\r\n".split(b"|"),
        *(HOST, UPGRADE, WEBSOCKET, HTTP2, frame(1, 5, 1, b"\x82\x84\x86"), frame(3, 0, 1, b"")),
        *(frame(4, 0, 0, b"\x00\x04\xff\xff\xff\xff"), frame(8, 0, 1, bytes(4)), frame(0, 1, 1, b"x")),
    ]
)
RANDOM_CONNECTIONS = st.lists(TOKENS | st.binary(max_size=30), max_size=10).map(b"".join)


async def test_no_bytes_at_the_port_end_the_program_or_meet_an_error(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=TABLES)
    url = urlsplit(rig.url)
    address = (url.hostname or "", url.port or 0)

    def fuzz(client: httpx.Client) -> None:
        def send(data: bytes) -> None:
            with socket.create_connection(address, TIMEOUT_SECONDS) as connection:
                with contextlib.suppress(ConnectionError):  # Closed on us: as good an answer as any.
                    connection.sendall(data)
                health = httpx.get(
                    f"{rig.url}/health", verify=False, trust_env=False, timeout=TIMEOUT_SECONDS
                )
                assert health.status_code == 200, data
                connection.setblocking(False)
                with contextlib.suppress(ConnectionError, BlockingIOError):
                    status = connection.recv(12)
                    assert not status.startswith(b"HTTP/1.1 500"), data

        for data in CONNECTIONS:
            send(data)
        fuzzing(100)(given(RANDOM_CONNECTIONS)(send))()

    await drive(rig, fuzz)


# ── Streamed and whole ──────────────────────────────────────────────────────────────────────────────────────


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first, and of those that begin earliest."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@st.composite
def cut_requests(draw: st.DrawFn) -> dict[str, Any]:
    """A chat whose answer, an echo, may be cut: by parts of it as stop strings, and by limits."""
    model = draw(st.sampled_from([CLAUDE, SEARCH]))
    alphabet = draw(st.sampled_from(["ab", "ab \n", "a长😀é"]))
    text = draw(
        st.text(alphabet, max_size=60) | st.text(max_size=60).filter(lambda text: "data:" not in text)
    )
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    echo = f"[{model}] {text or ' '}"
    if draw(st.booleans()):
        places = st.tuples(st.integers(0, len(echo)), st.integers(1, 6))
        parts = places.map(lambda place: echo[place[0] : place[0] + place[1]])
        body["stop"] = draw(st.lists(parts | st.text(alphabet, max_size=4), max_size=4))
    for name in draw(st.lists(st.sampled_from(["max_tokens", "max_completion_tokens"]), max_size=2)):
        body[name] = draw(st.integers(1, 40))
    if draw(st.booleans()):
        body["n"] = draw(st.integers(1, 3))
    return body


@pytest.mark.parametrize("reasoning", ["both", "think"])
async def test_streamed_and_whole_are_the_same_however_the_answer_arrives(
    nursery: trio.Nursery, tmp_path: Path, reasoning: str
) -> None:
    tables = {**TABLES, "requests": {**TABLES["requests"], "reasoning": reasoning, "list_sources": True}}
    switches = Switches(reasoning=True)
    rig = await start(
        nursery, tmp_path, models=(CLAUDE, SEARCH), tables=tables, switches=switches, filled=True
    )
    seen: Counter[str] = Counter()

    def fuzz(client: httpx.Client) -> None:
        @fuzzing(40)
        @given(cut_requests(), st.sampled_from([0, 2, 5, 40]), st.sampled_from([0, 3, 20]))
        def compare(body: dict[str, Any], streamed_chunk: int, whole_chunk: int) -> None:
            rig.arena.switches.chunk_bytes = whole_chunk
            complete = whole(client.post(CHAT, json=body))
            rig.arena.switches.chunk_bytes = streamed_chunk
            options = {"stream": True, "stream_options": {"include_usage": True}}
            stream = check_stream(client.post(CHAT, json=body | options))
            assert not stream.errors
            assert stream.usages == [complete.usage]
            assert len(complete.choices) == body.get("n", 1)
            for choice in complete.choices:
                chunks = [chunk for chunk in stream.choices if chunk.index == choice.index]
                deltas = [chunk.delta for chunk in chunks]
                message, extras = choice.message, [delta.model_extra or {} for delta in deltas]
                assert "".join(delta.content or "" for delta in deltas) == message.content
                assert chunks[-1].finish_reason == choice.finish_reason
                for field in ("reasoning_content", "reasoning"):
                    thoughts = "".join(extra.get(field) or "" for extra in extras)
                    assert thoughts == (message.model_extra or {}).get(field, "")
                sources = [source for extra in extras for source in extra.get("annotations") or ()]
                assert [source["url_citation"]["url"] for source in sources] == [
                    source.url_citation.url for source in message.annotations or ()
                ]
                seen[choice.finish_reason] += 1
            first = complete.choices[0]
            if not body.keys() & {"max_tokens", "max_completion_tokens"}:
                echo = f"[{body['model']}] {body['messages'][0]['content'] or ' '}"
                expected = cut_at(echo, [stop for stop in body.get("stop", ()) if stop])
                text = re.sub(r"\A<think>.*?</think>\n\n", "", first.message.content or "", flags=re.DOTALL)
                text = re.sub(r"(\A|\n\n)- \[Stand-in source\].*", "", text, flags=re.DOTALL)
                assert text == expected

        compare()

    await drive(rig, fuzz)
    assert seen.keys() == {"stop", "length"}


# ── From the site ───────────────────────────────────────────────────────────────────────────────────────────

LINE_VALUES = st.one_of(
    JUNK,
    TEXTS.map(json.dumps),
    st.sampled_from(
        [
            '{"finishReason":"stop"}',
            '{"finishReason":"stop","usage":{"promptTokens":1e999,"completionTokens":-1}}',
            '{"finishReason":"stop","usage":{"promptTokens":9007199254740991,"completionTokens":true}}',
            '{"finishReason":["\\ud800"],"usage":[]}',
            '{"finishReason":"content-filter"}',
            '{"finishReason":"error"}',
            '[{"type":"image","image":"http://localhost:1/a.png"},{"type":"image","image":"data:image/png;base64,AA"}]',
            '[{"type":"video","url":"\\ud800)"},{"type":"image","image":"http://[bad"},{"type":["image"]},null]',
            f'[{{"type":"image","image":"http://[::1]:{"9" * 30}/"}}]',
            '{"toolCallId":[],"argsTextDelta":"{\\"source\\":[{\\"url\\":\\"\\ud83d\\",\\"title\\":[[1]]}]}"}',
            '{"toolCallId":"t","argsTextDelta":"{\\"source\\":[{\\"url\\":\\"](<\\\\n>\\",\\"title\\":\\"a]\\\\n\\"}"}',
            '{"toolCallId":"t","argsTextDelta":"]}"}',
            '"\\ud83d"',
            '"\\ude00"',
        ]
    ),
)
LINES = st.builds(
    lambda prefix, value, end: raw(f"{prefix}:{value}{end}"),
    st.sampled_from("a0 a0 a0 ag ag a2 ac ad a3 ae af b0 bd zz a 0".split()),
    LINE_VALUES,
    st.sampled_from(["\n", "\n", "\n", "\r\n", "", "\n\n", "\r"]),
)
GOOD_LINE, GOOD_END = b'a0:"Good"\n', b'ad:{"finishReason":"stop"}\n'
SITE_ANSWERS = st.builds(
    lambda begins, lines, ends: [*([GOOD_LINE] if begins else []), *lines, *([GOOD_END] if ends else [])],
    st.integers(0, 3),
    st.lists(mostly(LINES, st.binary(max_size=30), 5), max_size=6),
    st.integers(0, 3),
)


class Script:
    """What the site answers next: these pieces, then an end or silence, or another status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces: list[bytes] = []
        self.status = 200
        self.hangs = self.is_over = False
        script, good_answer = self, Exchange.answer

        async def answer(exchange: Exchange, call: Call, model: Model) -> None:
            if script.is_over:
                await good_answer(exchange, call, model)
                return
            exchange.seen.status = script.status
            head = [(b"content-type", b"text/plain; charset=utf-8")]
            await exchange.send({"type": "http.response.start", "status": script.status, "headers": head})
            for piece in script.pieces:
                await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
            if script.hangs:
                await trio.sleep_forever()
            exchange.finish(outcome_of(b"".join(script.pieces).decode("utf-8", "replace")))
            await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})

        monkeypatch.setattr(Exchange, "answer", answer)


@pytest.mark.parametrize("reasoning", ["reasoning_content", "both", "think"])
async def test_nothing_that_the_site_answers_is_an_error_of_the_program(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reasoning: str
) -> None:
    monkeypatch.setattr(
        Relay, "PAUSES", (0.0,)
    )  # Else each answer that fails takes its time to be tried anew.
    tables: Tables = {
        **TABLES,
        "bridge": {"reconnect_grace_seconds": 0.1},
        "requests": {
            **TABLES["requests"],
            "first_byte_timeout_seconds": 1,
            "idle_timeout_seconds": 1,
            "reasoning": reasoning,
            "list_sources": reasoning != "both",
        },
    }
    rig = await start(nursery, tmp_path, models=(CLAUDE, SEARCH, IMAGE), tables=tables, filled=True)
    script = Script(monkeypatch)
    seen: Counter[str] = Counter()
    # Neither a check nor a sign-in: those wait for the person.
    statuses = mostly(
        st.just(200), st.sampled_from([201, 206, 300, 400, 403, 404, 409, 413, 422, 500, 502, 599]), 8
    )
    cuts = st.fixed_dictionaries(
        {"stream": st.booleans(), "n": st.sampled_from([1, 1, 2])},
        optional={"stop": STOPS.filter(lambda stop: len(stop) < 1000), "max_tokens": st.integers(1, 9)},
    )

    def fuzz(client: httpx.Client) -> None:
        @fuzzing(50)
        @given(st.sampled_from([CLAUDE, SEARCH, IMAGE]), cuts, SITE_ANSWERS, statuses, st.integers(0, 30))
        def ask(model: str, cut: dict[str, Any], pieces: list[bytes], status: int, silence: int) -> None:
            script.pieces, script.status, script.hangs = pieces, status, silence == 30
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **cut}
            allowed = (400, 413, 502, 504)
            seen[check_chat(client.post(CHAT, json=body), *allowed)] += 1
            if model == IMAGE:
                picture = {"model": model, "prompt": "A cat", "response_format": "b64_json"}
                seen[check_pictures(client.post(GENERATIONS, json=picture), *allowed)] += 1

        ask()

    await drive(rig, fuzz)
    assert seen.keys() >= {"whole", "stream", "upstream_error"}, seen
    script.is_over = True
    # The conversations that are left, and those that are opened now, are as good as ever.
    for _ in range(6):
        assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content
