"""The parameters of chat completions, through the whole program and as the openai package reads them.

`ask` makes one and the same request in six ways (raw, with the asynchronous and the synchronous client; whole
and streamed) and checks that all of them tell the same.
"""

import base64
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import openai
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    IMAGE,
    SEARCH,
    Held,
    Rig,
    Stream,
    Tables,
    check_error,
    model_id,
    request_body,
    start,
    turns,
    until,
    user,
    whole,
)
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from demo import contract
from demo.arena import Failure, Seen, Switches
from lmarena_proxy import RequestEnded

ONE_IMAGE = "flux-1-kontext-dev"  # takes an image, but not several
ECHO = f"[{CLAUDE}] Hello"
REASONING = "Looking at the question…"
SOURCES = "- [Stand-in source](<https://example.com/one>)\n- [第二个来源](<https://example.com/two?q=1&r=2>)"
PNG_BASE64 = base64.b64encode(contract.png("seed")).decode()
PNG = f"data:image/png;base64,{PNG_BASE64}"
OTHER_PNG = "data:image/png;base64," + base64.b64encode(contract.png("other seed")).decode()
ERROR_KEYS = {"message", "type", "param", "code"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
DEADLINE_SECONDS = 120

Made = TypeVar("Made")


# ── Six ways to ask ─────────────────────────────────────────────────────────────────────────────────────────


class Choice(NamedTuple):
    text: str
    reason: str
    beside: dict[str, Any]  # what stands beside the text: reasoning, annotations


class Told(NamedTuple):
    choices: list[Choice]
    usage: CompletionUsage

    @property
    def only(self) -> Choice:
        [choice] = self.choices
        return choice


def read_whole(answer: ChatCompletion) -> Told:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    assert answer.usage
    choices = []
    for choice in answer.choices:
        message = choice.message
        assert message.role == "assistant"
        beside = dict(message.model_extra or {})
        if message.annotations is not None:
            beside["annotations"] = [each.model_dump() for each in message.annotations]
        choices.append(Choice(message.content or "", choice.finish_reason, beside))
    return Told(choices, answer.usage)


def read_chunks(chunks: Sequence[ChatCompletionChunk]) -> Told:
    """What a stream with usage told: each choice begins with its role and ends with its finish reason."""
    *body, last = chunks
    assert last.choices == []
    assert last.usage
    assert not any(chunk.usage for chunk in body)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    parts = [choice for chunk in body for choice in chunk.choices]
    choices = []
    indices = sorted({part.index for part in parts})
    assert indices == list(range(len(indices)))
    for index in indices:
        own = [part for part in parts if part.index == index]
        assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [bool(part.finish_reason) for part in own] == [False] * (len(own) - 1) + [True]
        beside: dict[str, Any] = {}
        for part in own:
            for name, value in (part.delta.model_extra or {}).items():
                beside[name] = beside[name] + value if name in beside else value
        text = "".join(part.delta.content or "" for part in own)
        choices.append(Choice(text, own[-1].finish_reason or "", beside))
    return Told(choices, last.usage)


COUNTED = {"stream": True, "stream_options": {"include_usage": True}}


async def in_thread(call: Callable[[], Made]) -> Made:
    with trio.fail_after(DEADLINE_SECONDS):
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


@contextmanager
def sync_client(rig: Rig) -> Iterator[Any]:
    """The openai package's blocking client, for threads."""
    http = openai.DefaultHttpxClient(verify=False, trust_env=False)  # reading all certificates takes its time
    base_url = f"{rig.url}/v1"
    with openai.OpenAI(
        base_url=base_url, api_key="any", max_retries=0, timeout=60, http_client=http
    ) as client:
        yield client


async def raw_whole(rig: Rig, body: dict[str, Any]) -> Told:
    return read_whole(whole(await rig.http.post("/v1/chat/completions", json=body)))


async def raw_stream(rig: Rig, body: dict[str, Any]) -> Told:
    response = await rig.http.post("/v1/chat/completions", json=body | COUNTED)
    assert response.status_code == 200, response.text
    stream = Stream(response.text)
    assert (stream.errors, stream.has_done) == ([], True)
    return read_chunks(stream.chunks)


async def async_whole(rig: Rig, body: dict[str, Any]) -> Told:
    return read_whole(await rig.openai.chat.completions.create(**body))


async def async_stream(rig: Rig, body: dict[str, Any]) -> Told:
    stream: Any = await rig.openai.chat.completions.create(**body | COUNTED)
    return read_chunks([chunk async for chunk in stream])


async def sync_whole(rig: Rig, body: dict[str, Any]) -> Told:
    def call() -> ChatCompletion:
        with sync_client(rig) as client:
            answer = client.chat.completions.create(**body)
            assert isinstance(answer, ChatCompletion)
            return answer

    return read_whole(await in_thread(call))


async def sync_stream(rig: Rig, body: dict[str, Any]) -> Told:
    def call() -> list[ChatCompletionChunk]:
        with sync_client(rig) as client:
            return [*client.chat.completions.create(**body | COUNTED)]

    return read_chunks(await in_thread(call))


WAYS: tuple[Callable[[Rig, dict[str, Any]], Awaitable[Told]], ...] = (
    raw_whole,
    raw_stream,
    async_whole,
    async_stream,
    sync_whole,
    sync_stream,
)


def ways(rig: Rig) -> Sequence[Callable[[Rig, dict[str, Any]], Awaitable[Told]]]:
    """All of them; the plain ones where the site sends byte by byte, which a library takes no part in."""
    return WAYS[:2] if rig.arena.switches.chunk_bytes == 1 else WAYS


async def ask(rig: Rig, model: str, *messages: Any, **rest: Any) -> Told:
    """Ask in every way, one after the other; what all of them told."""
    told = [await way(rig, request_body(model, *messages, **rest)) for way in ways(rig)]
    for way, each in zip(ways(rig), told, strict=True):
        assert each == told[0], way.__name__
    return told[0]


# ── What to look at ─────────────────────────────────────────────────────────────────────────────────────────


class Records(logging.Handler):
    """What the program logs, as lines with their tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter("%(levelname)s %(message)s").format(record))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    log = logging.getLogger("lmarena_proxy")
    monkeypatch.setattr(log, "disabled", False)
    level, records = log.level, Records()
    log.setLevel(logging.DEBUG)
    log.addHandler(records)
    yield records.lines
    log.removeHandler(records)
    log.setLevel(level)


def tokens(text: str) -> int:
    """The estimate that README describes: one for a Chinese character, one for each four others."""
    wide = sum("一" <= character <= "鿿" for character in text)
    return wide + -(-(len(text) - wide) // 4)


def outcomes(rig: Rig) -> list[str]:
    return [seen.outcome for seen in rig.calls]


async def all_free(rig: Rig, model: str, idle: int) -> None:
    """Wait until nothing is held of a model: no token, and all of its sessions are idle."""
    pool = rig.pool(model)
    await until(lambda: (pool.idle, pool.busy, pool.limiter.borrowed_tokens, pool.waiting) == (idle, 0, 0, 0))


async def all_ended(rig: Rig, number: int) -> list[RequestEnded]:
    """The ends of all requests: a client may have its answer a little before."""
    await until(lambda: len(rig.event(RequestEnded)) >= number)
    assert len(rig.event(RequestEnded)) == number
    return rig.event(RequestEnded)


async def refused(rig: Rig, status: int, model: str, *messages: Any, **rest: Any) -> openai.APIStatusError:
    """The error that a request brings, whole and streamed, before anything is sent to the site."""
    before = len(rig.calls)
    for stream in (True, False):
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.openai.chat.completions.create(**request_body(model, *messages, **rest), stream=stream)
        assert caught.value.status_code == status
        body = caught.value.body
        assert isinstance(body, dict)
        assert body.keys() == ERROR_KEYS
    assert len(rig.calls) == before
    return caught.value


def attachments(seen: Seen) -> list[list[tuple[str, str]]]:
    """By message, the type and the address of each attachment."""
    return [
        [(each["contentType"], each["url"]) for each in message["experimental_attachments"]]
        for message in seen.body["messages"]
    ]


def picture(*urls: str, text: str = "Look") -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


# ── n ───────────────────────────────────────────────────────────────────────────────────────────────────────

LONG_PIECES = [f"{number} 个字 " for number in range(60)]


@pytest.mark.parametrize("n", [2, 4])
async def test_several_answers_each_come_whole_and_the_prompt_counts_once(
    nursery: trio.Nursery, tmp_path: Path, n: int
) -> None:
    switches = Switches(answers={"*": LONG_PIECES}, chunk_bytes=11)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches, filled=True)
    one = await ask(rig, CLAUDE, "Hello")
    rig.arena.record.clear()
    told = await ask(rig, CLAUDE, "Hello", n=n)
    assert told.choices == [Choice("".join(LONG_PIECES), "stop", {})] * n
    assert told.usage.prompt_tokens == one.usage.prompt_tokens
    assert told.usage.completion_tokens == n * len(LONG_PIECES)
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens
    assert outcomes(rig) == ["complete"] * n * len(WAYS)
    for place in range(0, len(rig.calls), n):
        assert len({seen.session_id for seen in rig.calls[place : place + n]}) == n
    events = await all_ended(rig, 2 * len(WAYS))
    assert [event.attempts for event in events] == [1] * len(WAYS) + [n] * len(WAYS)
    assert {event.completion_tokens for event in events[len(WAYS) :]} == {told.usage.completion_tokens}
    assert (await rig.state())["requests"]["completed"] == 2 * len(WAYS)


@pytest.mark.parametrize("stream", [True, False])
async def test_several_answers_are_made_side_by_side(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    held = Held(monkeypatch)
    async with trio.open_nursery() as clients:
        clients.start_soon(raw_stream if stream else raw_whole, rig, request_body(CLAUDE, n=4))
        await until(lambda: len(rig.calls) == 4)
        assert {seen.session_id for seen in rig.calls} == set(rig.pool(CLAUDE).sessions)
        assert {seen.kind for seen in rig.calls} == {"retry"}
        assert rig.program.answers.active == 1
        held.release()
    assert rig.arena.max_running(model_id(CLAUDE)) == 4
    await all_free(rig, CLAUDE, 4)


async def test_several_answers_of_a_fresh_model_open_as_many_conversations(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,))
    told = await sync_stream(rig, request_body(CLAUDE, n=3))
    assert [choice.text for choice in told.choices] == [ECHO] * 3
    assert [seen.kind for seen in rig.calls] == ["create"] * 3
    await all_free(rig, CLAUDE, 3)
    told = await async_whole(rig, request_body(CLAUDE, n=4))
    assert [choice.text for choice in told.choices] == [ECHO] * 4
    assert [seen.kind for seen in rig.calls[3:]].count("create") == 1
    await all_free(rig, CLAUDE, 4)


async def test_more_answers_than_conversations_are_refused_before_anything_is_sent(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path / "four", models=(CLAUDE,))
    error = await refused(rig, 400, CLAUDE, n=5)
    assert (error.param, error.code) == ("n", "invalid_request")
    assert "up to 4" in error.message
    for n in (0, -1, "two", 1001):
        assert (await refused(rig, 400, CLAUDE, n=n)).param == "n"
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path / "one", models=(CLAUDE,), tables=tables)
    error = await refused(rig, 400, CLAUDE, n=2)
    assert error.param == "n"
    assert "up to 1" in error.message
    assert (await ask(rig, CLAUDE, "Hello", n=1)).only.text == ECHO


@pytest.mark.parametrize("stream", [True, False])
async def test_one_answer_that_cannot_be_had_ends_the_whole_request(
    nursery: trio.Nursery, tmp_path: Path, stream: bool
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    failure = Failure(status=400, body='{"error":"bad prompt"}', times=1)
    # The other three would take for ever.
    rig.arena.switch(failures={"*": failure}, latency_seconds=600)
    response = await rig.chat(CLAUDE, "Hello", n=4, stream=stream)
    assert "bad prompt" in check_error(response, 400, "invalid_request")["message"]
    await until(lambda: sorted(outcomes(rig)) == ["aborted"] * 3 + ["refused"])
    await all_free(rig, CLAUDE, 4)
    rig.arena.switches = Switches()
    assert [choice.text for choice in (await ask(rig, CLAUDE, "Hello", n=4)).choices] == [ECHO] * 4


async def test_one_answer_that_breaks_off_ends_the_stream_of_all_with_one_error(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(cut_after_lines=2)
    Held(monkeypatch, free=1)
    stream = await rig.stream(CLAUDE, "Hello", n=3)
    [error] = stream.errors
    assert error.keys() == ERROR_KEYS
    assert error["code"] == "upstream_error"
    assert (stream.finish_reasons, stream.usages) == ([], [])
    assert stream.body.count("data: [DONE]") == 1
    assert stream.body.endswith("data: [DONE]\n\n")
    await until(lambda: sorted(outcomes(rig)) == ["aborted", "aborted", "cut"])
    await all_free(rig, CLAUDE, 4)
    assert [event.status for event in await all_ended(rig, 1)] == [502]


async def test_answers_that_have_shown_nothing_are_tried_again_each_for_itself(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(cut_after_lines=0, trouble_times=2)
    assert [choice.text for choice in (await async_stream(rig, request_body(CLAUDE, n=2))).choices] == [
        ECHO
    ] * 2
    assert len(rig.calls) == 4
    rig.arena.switch(cut_after_lines=2, trouble_times=2)
    told = await sync_whole(rig, request_body(CLAUDE, n=2))
    assert [choice.text for choice in told.choices] == [ECHO] * 2
    assert len(rig.calls) == 8


async def test_what_was_held_back_or_counted_is_forgotten_when_an_answer_is_tried_again(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for rest in ({"stop": "STOP"}, {"stop": "STOP", "max_tokens": 2}):
        for way in (raw_stream, sync_whole):
            rig.arena.record.clear()
            rig.arena.switch(answers={"*": ["ST", "ARTED"]}, cut_after_lines=1, trouble_times=1)
            told = await way(rig, request_body(CLAUDE, **rest))
            assert told.only == Choice("STARTED", "stop", {}), way.__name__
            assert outcomes(rig) == ["cut", "complete"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_all_of_its_answers(
    nursery: trio.Nursery, tmp_path: Path, stream: bool
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(hang_after_lines=1)
    async with trio.open_nursery() as clients:
        clients.start_soon(raw_stream if stream else raw_whole, rig, request_body(CLAUDE, n=4))
        await until(lambda: len(rig.calls) == 4 and all(seen.sent_bytes for seen in rig.calls))
        clients.cancel_scope.cancel()
    await until(lambda: outcomes(rig) == ["aborted"] * 4)
    await all_free(rig, CLAUDE, 4)
    [event] = await all_ended(rig, 1)
    assert (event.outcome, rig.program.answers.active) == ("client_left", 0)


@pytest.mark.parametrize(("sessions", "n"), [(4, 4), (4, 3), (2, 2)])
async def test_more_answers_at_once_than_conversations_wait_for_each_other_and_all_end(
    nursery: trio.Nursery, tmp_path: Path, sessions: int, n: int
) -> None:
    tables = {"pool": {"sessions_per_model": sessions}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(latency_seconds=0.01, line_delay_seconds=0.001)
    answers: list[Told] = []

    async def keep(way: Any) -> None:
        answers.append(await way(rig, request_body(CLAUDE, n=n)))

    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as clients:
            for way in WAYS:
                clients.start_soon(keep, way)
    assert [told.choices for told in answers] == [[Choice(ECHO, "stop", {})] * n] * len(WAYS)
    assert rig.arena.max_running(model_id(CLAUDE)) == sessions
    assert rig.arena.max_running_pair() == 1
    await all_free(rig, CLAUDE, sessions)


async def test_nothing_more_is_said_of_an_answer_that_has_ended_while_others_go_on(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"requests": {"commit_after_seconds": 0, "keepalive_seconds": 0.02}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    body = request_body(CLAUDE, n=2, **COUNTED)
    ended_first: set[int] = set()
    while ended_first != {0, 1}:  # which of them the site answers first is left to chance
        held = Held(monkeypatch, free=1)
        received = ""
        async with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for text in response.aiter_text():
                received += text
                if received.partition('"finish_reason":"stop"')[2].count("\n\n") > 3:
                    held.release()
        stream = Stream(received)
        assert read_chunks(stream.chunks).choices == [Choice(ECHO, "stop", {})] * 2
        ended_first.add(next(choice.index for choice in stream.choices if choice.finish_reason))


# ── stop ────────────────────────────────────────────────────────────────────────────────────────────────────

CUT_PIECES = ["one ST", "O", "P two", " STO"]


@pytest.mark.parametrize("chunk_bytes", [0, 1])
async def test_an_answer_ends_before_a_stop_string_however_it_is_cut_into_pieces(
    nursery: trio.Nursery, tmp_path: Path, chunk_bytes: int
) -> None:
    # The site falls silent after the last piece: who waits for more than is needed waits for ever.
    switches = Switches(answers={"*": CUT_PIECES}, chunk_bytes=chunk_bytes, hang_after_lines=3)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switches = switches
    for stop, text in (
        ("STOP", "one "),
        (["zzz", "", "STOP"], "one "),
        (["STOP two", "P t"], "one STO"),  # the one that is whole first, not the one that begins first
        (["OP", "STOP"], "one "),  # whole at once: the one that begins first
        ("one", ""),
        (["two"], "one STOP "),
    ):
        rig.arena.record.clear()
        told = await ask(rig, CLAUDE, "Hello", stop=stop)
        assert told.only == Choice(text, "stop", {}), stop
        assert told.usage.completion_tokens == tokens(text)
        assert told.usage.prompt_tokens == tokens("Hello")
        await until(lambda: outcomes(rig) == ["aborted"] * len(ways(rig)))
    await all_free(rig, CLAUDE, 4)


@pytest.mark.parametrize("chunk_bytes", [0, 1])
async def test_what_was_held_back_for_a_stop_string_comes_when_there_is_none(
    nursery: trio.Nursery, tmp_path: Path, chunk_bytes: int
) -> None:
    switches = Switches(answers={"*": CUT_PIECES}, chunk_bytes=chunk_bytes)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switches = switches
    for stop in ("STOPP", ["STOOP", "STOP!"], [], [""], "", None, ["two STOP"]):
        told = await ask(rig, CLAUDE, "Hello", stop=stop)
        assert told.only == Choice("".join(CUT_PIECES), "stop", {}), stop
        assert told.usage.completion_tokens == len(CUT_PIECES)  # the site's own: nothing was cut
    assert set(outcomes(rig)) == {"complete"}


async def test_an_answer_in_chinese_ends_before_a_stop_string_inside_its_characters_bytes(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    switches = Switches(answers={"*": ["你好，世", "界。\n\n完", "毕"]}, chunk_bytes=1)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches, filled=True)
    assert (await ask(rig, CLAUDE, "你好", stop="世界")).only == Choice("你好，", "stop", {})
    assert (await ask(rig, CLAUDE, "你好", stop=["\n\n"])).only == Choice("你好，世界。", "stop", {})
    assert (await ask(rig, CLAUDE, "你好", stop="完毕！")).only.text == "你好，世界。\n\n完毕"


async def test_after_a_stop_string_the_site_is_told_and_the_conversation_serves_again(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    [session_id] = rig.pool(CLAUDE).sessions
    rig.arena.switch(answers={"*": ["begin ", "STOP", *["more "] * 2000]}, line_delay_seconds=0.05)
    assert (await ask(rig, CLAUDE, "Hello", stop="STOP")).only == Choice("begin ", "stop", {})
    await until(lambda: outcomes(rig) == ["aborted"] * len(WAYS))
    await all_free(rig, CLAUDE, 1)
    rig.arena.switches = Switches()
    assert (await ask(rig, CLAUDE, "Hello")).only.text == ECHO
    assert outcomes(rig)[len(WAYS) :] == ["complete"] * len(WAYS)
    assert {seen.session_id for seen in rig.calls} == {session_id}
    assert rig.arena.max_running(model_id(CLAUDE)) == 1


@pytest.mark.parametrize("way", [raw_whole, sync_stream])
async def test_an_opening_that_a_stop_string_ended_does_not_join_the_pool(
    nursery: trio.Nursery, tmp_path: Path, way: Callable[[Rig, dict[str, Any]], Awaitable[Told]]
) -> None:
    switches = Switches(answers={"*": CUT_PIECES}, hang_after_lines=3)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches)
    for n in (1, 4):
        rig.arena.record.clear()
        told = await way(rig, request_body(CLAUDE, stop="STOP", n=n))
        assert told.choices == [Choice("one ", "stop", {})] * n
        await until(lambda: outcomes(rig) == ["aborted"] * n)  # noqa: B023
        await all_free(rig, CLAUDE, 0)
    rig.arena.switches = Switches()
    rig.arena.record.clear()
    assert (await ask(rig, CLAUDE, "Hello")).only.text == ECHO
    assert [seen.kind for seen in rig.calls] == ["create"] + ["retry"] * (len(WAYS) - 1)
    await all_free(rig, CLAUDE, 1)


async def test_a_conversation_whose_end_was_an_error_does_not_join_the_pool_after_a_stop_string(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,))
    # All of it in one piece, so that the stop string and the bad end are read together.
    bad = 'a0:"one STOP two"\nad:{"finishReason":"error"}\n'
    rig.arena.switch(raw={"*": bad}, chunk_bytes=len(bad))
    assert (await raw_whole(rig, request_body(CLAUDE, stop="STOP"))).only.text == "one "
    # The program leaves when it has read the stop string, maybe before the stand-in has noted the end.
    await until(lambda: rig.calls[0].outcome in ("failed", "aborted"))
    rig.arena.switches = Switches()
    assert (await raw_whole(rig, request_body(CLAUDE))).only.text == ECHO
    assert [(seen.kind, seen.status) for seen in rig.calls[1:]] == [("create", 200)]


async def test_a_stop_string_in_the_reasoning_ends_nothing(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(reasoning=True), filled=True)
    told = await ask(rig, CLAUDE, "Hello", stop="question")
    assert told.only == Choice(ECHO, "stop", {"reasoning_content": REASONING})
    told = await ask(rig, CLAUDE, "Hello", stop="]")
    assert told.only == Choice(f"[{CLAUDE}", "stop", {"reasoning_content": REASONING})


# ── max_tokens ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk_bytes", [0, 1])
@pytest.mark.parametrize(
    ("pieces", "limit", "text"),
    [
        (["abcdef", "ghijkl", "mnopqrst"], 3, "abcdefghijkl"),
        (["一二", "三四五", "六七八"], 3, "一二三"),
        (["a一b", "二c三", "d四efgh"], 4, "a一b二c三d"),
        (["😀👩‍👩‍👧‍👦 and more", " and more"], 1, "😀👩‍👩"),
    ],
)
async def test_an_answer_is_cut_where_the_estimate_reaches_the_limit(
    nursery: trio.Nursery, tmp_path: Path, pieces: list[str], limit: int, text: str, chunk_bytes: int
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(answers={"*": pieces}, chunk_bytes=chunk_bytes, hang_after_lines=len(pieces))
    for name in ("max_tokens", "max_completion_tokens"):
        rig.arena.record.clear()
        told = await ask(rig, CLAUDE, "多少? Hello", **{name: limit})
        assert told.only.reason == "length"
        assert told.only.text.rstrip("\u200d") == text.rstrip("\u200d")
        assert told.usage.completion_tokens == limit == tokens(told.only.text)
        assert told.usage.prompt_tokens == tokens("多少? Hello") == 4
        await until(lambda: outcomes(rig) == ["aborted"] * len(ways(rig)))
    await all_free(rig, CLAUDE, 4)
    rig.arena.switches = Switches()
    assert (await ask(rig, CLAUDE, "Hello", max_tokens=1000)).only.text == ECHO


async def test_an_answer_that_just_fits_is_not_cut(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(answers={"*": ["abcd", "一二", "ef", "gh"]})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches, filled=True)
    for limits in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": None}):
        told = await ask(rig, CLAUDE, "Hello", **limits)
        assert told.only == Choice("abcd一二efgh", "stop", {})
    assert set(outcomes(rig)) == {"complete"}
    assert (await ask(rig, CLAUDE, "Hello", max_tokens=3)).only == Choice("abcd一二", "length", {})


@pytest.mark.parametrize("chunk_bytes", [0, 1])
async def test_reasoning_counts_against_the_limit_of_the_completion_only(
    nursery: trio.Nursery, tmp_path: Path, chunk_bytes: int
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(reasoning=True, answers={"*": ["abcdef", "ghijkl"]}, chunk_bytes=chunk_bytes)
    assert tokens(REASONING) == 6
    for limits, reasoning, text in (
        ({"max_tokens": 2}, REASONING, "abcdefgh"),
        ({"max_completion_tokens": 8}, REASONING, "abcdefgh"),
        ({"max_completion_tokens": 8, "max_tokens": 1}, REASONING, "abcd"),
        ({"max_completion_tokens": 7, "max_tokens": 2}, REASONING, "abcd"),
        ({"max_completion_tokens": 6}, REASONING, ""),
        ({"max_completion_tokens": 2}, REASONING[:8], ""),
    ):
        told = await ask(rig, CLAUDE, "Hello", **limits)
        assert told.only == Choice(text, "length", {"reasoning_content": reasoning}), limits
        assert told.usage.completion_tokens == tokens(reasoning + text)
    whole_answer = Choice("abcdefghijkl", "stop", {"reasoning_content": REASONING})
    assert (await ask(rig, CLAUDE, "Hello", max_completion_tokens=9)).only == whole_answer
    assert (await ask(rig, CLAUDE, "Hello", max_tokens=3)).only == whole_answer


async def test_each_of_several_answers_has_the_limit_for_itself(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(answers={"*": ["abcdef", "ghijkl", "STOP"]}, hang_after_lines=3)
    told = await ask(rig, CLAUDE, "Hello", n=3, max_tokens=2)
    assert told.choices == [Choice("abcdefgh", "length", {})] * 3
    assert told.usage == CompletionUsage(prompt_tokens=2, completion_tokens=6, total_tokens=8)
    told = await ask(rig, CLAUDE, "Hello", n=2, max_tokens=100, stop="STOP")
    assert told.choices == [Choice("abcdefghijkl", "stop", {})] * 2
    await until(lambda: set(outcomes(rig)) == {"aborted"})


async def test_nothing_follows_a_cut_also_not_what_was_held_back_for_a_stop_string(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    switches = Switches(answers={"*": ["a長b", "cd"]})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches, filled=True)
    told = await ask(rig, CLAUDE, "Hello", max_tokens=1, stop="bz")
    assert told.only == Choice("a", "length", {})


async def test_limits_and_stop_strings_of_the_wrong_kind_are_refused(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for name in ("max_tokens", "max_completion_tokens"):
        for value in (0, -1, "many", 1.5, [1]):
            error = await refused(rig, 400, CLAUDE, **{name: value})
            assert (error.param, error.code) == (name, "invalid_request"), value
    for stop in (5, {"a": "b"}):
        assert (await refused(rig, 400, CLAUDE, stop=stop)).param == "stop"
    assert str((await refused(rig, 400, CLAUDE, stop=["x", 5])).param).startswith("stop")


# ── usage ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_usage_is_the_site_s_or_else_an_estimate_streamed_and_whole(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(answers={"*": ["你好", " and so on"]}, reasoning=True)
    history = [{"role": "system", "content": "简短。"}, user("Hello there")]
    told = await ask(rig, CLAUDE, *history)
    sent = sum(len(message["content"]) for message in history)
    assert told.usage.prompt_tokens == sent // 4 + 1
    assert told.usage.completion_tokens == 4  # lines of content, as the stand-in counts
    for wanted in ({"omit_usage": True}, {"omit_usage": False, "null_usage": True}):
        rig.arena.switch(**wanted)
        usage = (await ask(rig, CLAUDE, *history)).usage
        assert usage.prompt_tokens == sum(tokens(message["content"]) for message in history)
        assert usage.completion_tokens == tokens(REASONING + "你好 and so on")
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": None}, None])
async def test_a_stream_tells_its_usage_only_where_it_was_asked_to(
    nursery: trio.Nursery, tmp_path: Path, options: dict[str, Any] | None
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for rest in ({}, {"n": 2}, {"stop": "]"}):
        stream = await rig.stream(CLAUDE, "Hello", stream_options=options, **rest)
        assert (stream.errors, stream.usages, stream.has_done) == ([], [], True)
        assert all(chunk.choices for chunk in stream.chunks)
        assert len(stream.finish_reasons) == rest.get("n", 1)


# ── Reasoning, sources, moderation ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("reasoning_content", ["reasoning_content"]),
        ("reasoning", ["reasoning"]),
        ("both", ["reasoning_content", "reasoning"]),
        ("think", []),
    ],
)
async def test_reasoning_comes_where_the_setting_says(
    nursery: trio.Nursery, tmp_path: Path, setting: str, fields: list[str]
) -> None:
    tables = {"requests": {"reasoning": setting}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    assert (await ask(rig, CLAUDE, "Hello")).only == Choice(ECHO, "stop", {})
    rig.arena.switch(reasoning=True)
    thoughts = f"<think>\n{REASONING}\n</think>\n\n" if setting == "think" else ""
    wanted = Choice(thoughts + ECHO, "stop", dict.fromkeys(fields, REASONING))
    assert (await ask(rig, CLAUDE, "Hello")).only == wanted
    assert (await ask(rig, CLAUDE, "Hello", n=2, stop="nowhere")).choices == [wanted] * 2
    # Text alone counts against max_tokens, and only text is looked at for stop strings.
    cut = wanted._replace(text=f"{thoughts}{ECHO[:4]}", reason="length")
    assert (await ask(rig, CLAUDE, "Hello", max_tokens=1)).only == cut
    stopped = wanted._replace(text=f"{thoughts}[")
    assert (await ask(rig, CLAUDE, "Hello", stop=["think>", ECHO[1:3]])).only == stopped


async def test_reasoning_in_the_text_is_closed_where_no_text_follows(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"requests": {"reasoning": "think"}}
    switches = Switches(reasoning=True, answers={"*": []})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    for rest, reason in (({}, "stop"), ({"max_completion_tokens": 6}, "stop")):
        told = await ask(rig, CLAUDE, "Hello", **rest)
        assert told.only == Choice(f"<think>\n{REASONING}\n</think>\n\n", reason, {})
    told = await ask(rig, CLAUDE, "Hello", max_completion_tokens=2)
    assert told.only == Choice(f"<think>\n{REASONING[:8]}\n</think>\n\n", "length", {})


@pytest.mark.parametrize("listed", [True, False])
async def test_sources_are_listed_below_the_text_where_that_is_set(
    nursery: trio.Nursery, tmp_path: Path, listed: bool
) -> None:
    tables = {"requests": {"list_sources": listed}}
    rig = await start(nursery, tmp_path, models=(SEARCH, CLAUDE), tables=tables, filled=True)
    below = f"\n\n{SOURCES}" if listed else ""
    for n in (1, 2):
        told = await ask(rig, SEARCH, "Hello", n=n)
        for choice in told.choices:
            assert (choice.text, choice.reason) == (f"[{SEARCH}] Hello{below}", "stop")
            assert choice.beside.keys() == {"annotations"}
            assert [each["type"] for each in choice.beside["annotations"]] == ["url_citation"] * 2
            cited = [each["url_citation"] for each in choice.beside["annotations"]]
            assert [each["title"] for each in cited] == ["Stand-in source", "第二个来源"]
            urls = ["https://example.com/one", "https://example.com/two?q=1&r=2"]
            assert [each["url"] for each in cited] == urls
    assert (await ask(rig, CLAUDE, "Hello")).only == Choice(ECHO, "stop", {})
    rig.arena.switch(sources=[])
    assert (await ask(rig, SEARCH, "Hello")).only == Choice(f"[{SEARCH}] Hello", "stop", {})


async def test_an_answer_that_moderation_stopped_says_so_also_when_it_is_empty(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(raw={"*": 'a0:"I will"\nad:{"finishReason":"content-filter"}\n'})
    assert (await ask(rig, CLAUDE, "Hello")).only == Choice("I will", "content_filter", {})
    rig.arena.switch(raw={"*": 'ad:{"finishReason":"content-filter"}\n'})
    assert (await ask(rig, CLAUDE, "Hello")).only == Choice("", "content_filter", {})
    assert (await ask(rig, CLAUDE, "Hello", n=2, stop="x", max_tokens=5)).choices == [
        Choice("", "content_filter", {})
    ] * 2
    assert set(outcomes(rig)) == {"complete"}
    await all_free(rig, CLAUDE, 4)


# ── Parameters without effect, and those that cannot be honoured ────────────────────────────────────────────

HARMLESS: dict[str, Any] = {
    "temperature": 0.2,
    "top_p": 0.9,
    "seed": 0,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "logit_bias": {"50256": -100},
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "functions": [],
    "function_call": "none",
    "metadata": {"a": "b"},
    "store": False,
    "user": "someone",
    "reasoning_effort": "low",
    "verbosity": "low",
    "service_tier": "auto",
    "prediction": {"type": "content", "content": "x"},
}


async def test_parameters_without_effect_are_named_in_a_header_and_once_in_the_log(
    nursery: trio.Nursery, tmp_path: Path, logged: list[str]
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    named = sorted(HARMLESS)
    body = request_body(CLAUDE, **HARMLESS, top_k=None, safety_identifier=None, never_heard_of={"x": 1})
    body |= {
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "modalities": ["text"],
    }
    for stream in (True, False):
        response = await rig.http.post("/v1/chat/completions", json={**body, "stream": stream})
        assert response.status_code == 200, response.text
        assert response.headers["x-ignored-parameters"].split(", ") == named
    lines = [line for line in logged if "no effect" in line]
    assert len(lines) == 1
    assert all(name in lines[0] for name in named)
    assert "top_k" not in lines[0]

    raw = rig.openai.chat.completions.with_raw_response
    answer: Any = await raw.create(**request_body(CLAUDE, temperature=0, seed=None))
    assert answer.headers["x-ignored-parameters"] == "temperature"
    assert answer.parse().choices[0].message.content == ECHO

    def streamed() -> tuple[str, str]:
        with sync_client(rig) as client:
            told = client.chat.completions.with_raw_response.create(
                **request_body(CLAUDE, user="me", tools=TOOLS, tool_choice="none"), stream=True
            )
            pieces = [chunk.choices[0].delta.content or "" for chunk in told.parse()]
            return told.headers["x-ignored-parameters"], "".join(pieces)

    assert await in_thread(streamed) == ("tool_choice, tools, user", ECHO)
    assert [line for line in logged if "no effect" in line] == lines
    await rig.chat(CLAUDE, top_k=5)
    [_, news] = [line for line in logged if "no effect" in line]
    assert news.endswith(": top_k")
    for rest in ({}, {"stream": True}, {"temperature": None}, {"n": 1, "stop": None, "max_tokens": 5}):
        assert "x-ignored-parameters" not in (await rig.chat(CLAUDE, **rest)).headers


async def test_an_error_also_names_the_parameters_without_effect(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(failures={"*": Failure(status=400, body="no")})
    response = await rig.chat(CLAUDE, temperature=1)
    check_error(response, 400, "invalid_request")
    assert response.headers["x-ignored-parameters"] == "temperature"


REFUSED: list[tuple[str, Any]] = [
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}),
    ("function_call", {"name": "weather"}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    ("logprobs", True),
    ("top_logprobs", 3),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("modalities", ["text", "audio"]),
]


async def test_parameters_that_cannot_be_honoured_are_refused_before_anything_is_sent(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for name, value in REFUSED:
        error = await refused(rig, 400, CLAUDE, tools=TOOLS, **{name: value})
        assert isinstance(error, openai.BadRequestError)
        assert (error.param, error.code, error.type) == (name, "invalid_request", "invalid_request_error")
        assert name in error.message
        assert "req_" in error.message

    def parse() -> Any:
        body = request_body(CLAUDE, response_format={"type": "json_object"})
        with sync_client(rig) as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**body)
        return caught.value

    error = await in_thread(parse)
    assert (error.param, error.code) == ("response_format", "invalid_request")
    assert rig.calls == []
    await all_free(rig, CLAUDE, 4)
    for rest in (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"modalities": ["text", "image"]},
        {"audio": None, "tool_choice": None, "response_format": None, "logprobs": None, "modalities": None},
    ):
        assert (await raw_whole(rig, request_body(CLAUDE, **rest))).only.text == ECHO


# ── Tools in the history ────────────────────────────────────────────────────────────────────────────────────


async def test_earlier_calls_of_tools_and_functions_are_carried_over_as_text(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    arguments = '{"city": "北京"}'
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}},
        {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ]
    history = [
        user("How is it?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[1:]},
        {"role": "tool", "tool_call_id": "call_2", "content": "one o'clock"},
    ]
    told = await ask(rig, CLAUDE, *history, tools=TOOLS)
    assert told.only == Choice(f"[{CLAUDE}] one o'clock", "stop", {})
    weather, clock = f"[called weather({arguments})]", "[called clock({})]"
    wanted = [
        ("user", "How is it?"),
        ("assistant", f"{weather}\n\n{clock}"),
        ("user", "sunny"),
        ("user", "noon"),
        ("assistant", f"Let me see.\n\n{clock}"),
        ("user", "one o'clock"),
    ]
    assert [turns(seen) for seen in rig.calls] == [wanted] * len(WAYS)

    rig.arena.record.clear()
    history = [
        user("How is it?"),
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": arguments}},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    functions = [{"name": "weather", "parameters": {"type": "object"}}]
    told = await sync_whole(rig, request_body(CLAUDE, *history, functions=functions, function_call="auto"))
    assert told.only == Choice(f"[{CLAUDE}] sunny", "stop", {})
    wanted = [("user", "How is it?"), ("assistant", weather), ("user", "sunny")]
    assert turns(rig.calls[0]) == wanted


# ── Aliases ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_alias_stands_for_its_model_everywhere(nursery: trio.Nursery, tmp_path: Path) -> None:
    aliases = {"gpt-4o": CLAUDE, "我的/模型": model_id(DEEPSEEK), "lost": "claude-sonet-4", DEEPSEEK: CLAUDE}
    tables: Tables = {"models": {"aliases": aliases}}
    rig = await start(nursery, tmp_path, tables=tables, filled=True)
    for alias, name in (("gpt-4o", CLAUDE), ("我的/模型", DEEPSEEK), (DEEPSEEK, CLAUDE)):
        rig.arena.record.clear()
        assert (await ask(rig, alias, "Hello")).only.text == f"[{name}] Hello"
        assert {seen.model_id for seen in rig.calls} == {model_id(name)}
        answer = await rig.openai.chat.completions.create(**request_body(alias))
        assert answer.model == alias
        assert {chunk.model for chunk in (await rig.stream(alias, "Hello")).chunks} == {alias}
        one = await rig.openai.models.retrieve(alias)
        assert (one.id, one.object) == (alias, "model")

    def listed() -> list[str]:
        with sync_client(rig) as client:
            return [model.id for model in client.models.list().data]

    assert await in_thread(listed) == [CLAUDE, DEEPSEEK, "gpt-4o", "我的/模型"]
    assert {event.model for event in rig.event(RequestEnded)} == {"gpt-4o", "我的/模型", DEEPSEEK}

    error = await refused(rig, 404, "lost")
    assert (error.param, error.code) == ("model", "model_not_found")
    for name in ("'lost'", "'claude-sonet-4'", CLAUDE):  # the alias, its target, and what was meant
        assert name in error.message
    with pytest.raises(openai.NotFoundError) as caught:
        await rig.openai.models.retrieve("lost")
    assert caught.value.param == "model"
    assert "'lost'" in caught.value.message
    assert "'claude-sonet-4'" in caught.value.message


# ── Images ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_images_in_texts_and_parts_arrive_as_attachments(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    fenced = f"```\n![kept]({PNG})\n```"
    messages = [
        user(f"Before ![a picture]({PNG}) after\n\n{fenced}"),
        {"role": "assistant", "content": f"![image]({OTHER_PNG})"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"And\n{PNG}"},
                {"type": "image_url", "image_url": {"url": OTHER_PNG, "detail": "low"}},
                {"type": "image_url", "image_url": PNG},
                {"type": "file", "file": {"filename": "a.png", "file_data": PNG}},
                {"type": "file", "file": {"filename": "b.png", "file_data": PNG_BASE64}},
                {"type": "text", "text": "compare"},
            ],
        },
    ]
    await ask(rig, GPT, *messages)
    png, other = ("image/png", PNG), ("image/png", OTHER_PNG)
    for seen in rig.calls:
        assert attachments(seen) == [[png], [other], [png, other, png, png, png]]
        (_, first), (_, second), (_, third) = turns(seen)[:3]
        assert first.split() == ["Before", "after", *fenced.split()]
        assert second.strip() == ""
        assert third.split() == ["And", "compare"]
    assert len(rig.calls) == len(WAYS)


async def test_images_that_a_model_does_not_take_are_refused_before_anything_is_sent(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, ONE_IMAGE, EDIT), filled=True)
    for messages, param in (
        ([picture(PNG)], "messages[0].content"),
        ([user("x"), picture(PNG)], "messages[1].content"),
        (
            [{"role": "user", "content": [{"type": "file", "file": {"file_data": PNG}}]}],
            "messages[0].content",
        ),
    ):
        error = await refused(rig, 400, CLAUDE, *messages)
        assert (error.param, error.code) == (param, "invalid_request")
        assert CLAUDE in error.message
    error = await refused(rig, 400, ONE_IMAGE, picture(PNG), picture(PNG, OTHER_PNG))
    assert (error.param, error.code) == ("messages[1].content", "invalid_request")
    assert "one image" in error.message
    error = await refused(rig, 400, EDIT, "Paint it black")
    assert (error.param, error.code) == ("messages[0].content", "invalid_request")
    assert "image" in error.message
    assert rig.calls == []
    for model in (ONE_IMAGE, EDIT):
        assert "![image](" in (await sync_whole(rig, request_body(model, picture(PNG)))).only.text


async def test_the_list_says_which_models_take_images_and_how_many(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    shared = "seedance-v1-pro"  # One from text, which takes no image, and one from images.
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT, ONE_IMAGE, IMAGE, shared))
    listed = (await rig.http.get("/v1/models")).json()["data"]
    assert {each["id"]: each["takes_many_images"] for each in listed} == {
        **dict.fromkeys((CLAUDE, ONE_IMAGE, IMAGE), False),
        **dict.fromkeys((GPT, shared), True),
    }


async def test_images_in_the_text_of_a_conversation_are_text_for_a_model_that_takes_none(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    drawn = {"role": "assistant", "content": f"Here: ![image]({PNG})"}
    named = user(f".icon{{background:url({PNG})}}")
    await ask(rig, CLAUDE, named, drawn, user("Go on"))
    for seen in rig.calls:
        assert [text for _, text in turns(seen)[:2]] == [named["content"], drawn["content"]]
        assert not any(map(any, attachments(seen)))
    assert len(rig.calls) == len(WAYS)


async def test_images_of_a_last_message_that_is_not_the_users_count_like_others(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), filled=True)
    answered = {**picture(PNG), "role": "assistant"}
    error = await refused(rig, 400, CLAUDE, "x", answered)
    assert error.param == "messages[1].content"
    large = "data:image/png;base64," + base64.b64encode(contract.png("seed") + bytes(6 << 20)).decode()
    error = await refused(rig, 413, GPT, "x", {"role": "assistant", "content": f"![image]({large})"})
    assert error.param == "messages[1].content"
    nowhere = {**picture("http://127.0.0.1:1/a.png"), "role": "system"}
    error = await refused(rig, 400, GPT, "x", nowhere)
    assert error.param == "messages[1].content"


async def test_an_image_that_is_too_large_is_refused_with_the_limit(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    png = contract.png("seed")
    encoded = base64.b64encode(png + bytes(6_000_000)).decode()
    large = f"data:image/png;base64,{encoded}"
    for message in (
        picture(large),
        picture(PNG, large),
        user(f"Look: ![]({large})"),
        {"role": "user", "content": [{"type": "file", "file": {"file_data": encoded}}]},
    ):
        error = await refused(rig, 413, GPT, "x", message, n=2)
        assert (error.param, error.code) == ("messages[1].content", "request_too_large")
        assert "5 MiB" in error.message
    assert rig.calls == []
    fitting = "data:image/png;base64," + base64.b64encode(png + bytes((5 << 20) - len(png))).decode()
    await raw_whole(rig, request_body(GPT, picture(fitting)))
    assert attachments(rig.calls[0])[0] == [("image/png", fitting)]
    await all_free(rig, GPT, 4)


async def test_a_picture_is_never_cut(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    for way in (async_whole, sync_stream):
        told = await way(rig, request_body(IMAGE, "A cat", n=2, max_tokens=1, stop="media"))
        texts = [choice.text for choice in told.choices]
        assert [choice.reason for choice in told.choices] == ["stop"] * 2
        assert len(set(texts)) == 2
        for text in texts:
            address = text.removeprefix("![image](").removesuffix(")")
            assert (await rig.http.get(address)).headers["content-type"] == "image/png"


# ── Errors ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_errors_before_and_after_the_first_byte_have_the_same_keys(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(cut_after_lines=1)
    seen: list[tuple[Any, str]] = []
    late = await rig.chat(CLAUDE, stream=True)
    [error] = Stream(late.text).errors
    seen.append((error, late.headers["x-request-id"]))
    # Whole: nothing of it was shown, so it is tried three times before the client is told.
    early = await rig.chat(CLAUDE)
    seen.append((check_error(early, 502, "upstream_error"), early.headers["x-request-id"]))
    refusal = await rig.chat(CLAUDE, n=9, stream=True)
    seen.append((check_error(refusal, 400, "invalid_request"), refusal.headers["x-request-id"]))
    lost = await rig.http.get("/v1/models/nothing")
    seen.append((check_error(lost, 404, "model_not_found"), lost.headers["x-request-id"]))
    for each, request_id in seen:
        assert list(each) == list(seen[0][0]) == ["message", "type", "param", "code"]
        assert request_id in each["message"]
        assert isinstance(each["param"], str | None)
    assert error | {"message": ""} == seen[1][0] | {"message": ""}


async def test_the_openai_package_raises_the_same_error_before_and_after_the_first_byte(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)

    def streamed() -> tuple[str, Any]:
        text = ""
        with sync_client(rig) as client:
            try:
                for chunk in client.chat.completions.create(**request_body(CLAUDE), stream=True):
                    text += chunk.choices[0].delta.content or ""
            except openai.APIError as error:
                return text, error
        raise AssertionError(f"no error after {text!r}")

    rig.arena.switch(cut_after_lines=2, trouble_times=1)
    text, late = await in_thread(streamed)
    assert text
    assert ECHO.startswith(text)
    rig.arena.switch(cut_after_lines=0, trouble_times=None)
    text, early = await in_thread(streamed)
    assert text == ""
    assert isinstance(early, openai.InternalServerError)
    for error in (late, early):
        assert isinstance(error.body, dict)
        assert error.body.keys() == ERROR_KEYS
        assert (error.code, error.type, error.param) == ("upstream_error", "upstream_error", None)
        assert "req_" in str(error)
    assert len(rig.calls) == 4  # the stream that had begun was not tried again
    await all_free(rig, CLAUDE, 4)


# ── A client that reads nothing ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_does_not_read_its_error_either_leaves_nothing_behind(
    tmp_path: Path, logged: list[str], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_listeners = trio.open_tcp_listeners

    async def open_narrow(*where: Any, **how: Any) -> list[trio.SocketListener]:
        """What both systems take for a client that does not read is less than a line of the answer."""
        listeners = await open_listeners(*where, **how)
        for listener in listeners:
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
        return listeners

    monkeypatch.setattr(trio, "open_tcp_listeners", open_narrow)
    tables: Tables = {"requests": {"total_timeout_seconds": 2, "idle_timeout_seconds": 3}}
    async with trio.open_nursery() as nursery:
        rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
        rig.arena.switch(answers={"*": ["x" * 100_000] * 300})
        port = int(rig.url.rsplit(":", 1)[1])
        body = json.dumps(request_body(CLAUDE, stream=True, n=n)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        plain = trio.socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 13)
        await plain.connect(("127.0.0.1", port))
        async with trio.SocketStream(plain) as client:
            await client.send_all(head.encode() + body)
            [event] = await all_ended(rig, 1)
            assert (event.status, event.outcome) == (504, "timeout")
            await all_free(rig, CLAUDE, 4)
            await until(lambda: rig.arena.stats()["running"] == 0)
            assert (rig.program.answers.active, rig.program.answers.failed) == (0, 1)
            rig.arena.switches = Switches()
            told = await raw_whole(rig, request_body(CLAUDE, n=4))
            assert told.choices == [Choice(ECHO, "stop", {})] * 4
            await until(lambda: any("did not read" in line for line in logged))
        nursery.cancel_scope.cancel()
    # The program has ended too: whatever there was to be logged of that client has been.
    assert not [line for line in logged if "Traceback" in line or line.startswith(("ERROR", "CRITICAL"))]
