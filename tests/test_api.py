"""The HTTP API inside the test: real clients in front, the stand-in arena behind a tab at the back."""

import base64
import json
import re
import socket
import struct
from collections import Counter
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import trio
import trio.testing
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    IMAGE,
    PATIENCE_SECONDS,
    RAY,
    SEARCH,
    Held,
    Rig,
    Stream,
    Tables,
    check_error,
    model_id,
    pick_models,
    plain_client,
    request_body,
    start,
    turns,
    until,
    user,
    whole,
)
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

import lmarena_proxy
from demo import contract
from demo.arena import Arena, Failure, Switches
from demo.twin import Twin
from lmarena_proxy import VERSION, RequestEnded, SessionRetired

HARD_PIECES = [
    "你好，世界",
    '！\n\n```py\n\tprint("\\u0041\\\\n")\n```\r\n',
    "😀👩‍👩‍👧‍👦🇩🇪",
    '"quotes" \\ back\\slash / </script> \x00\x07\x1f\x7f',
    "\u2028\u2029\u0085\ufeff\u00a0",
    'data: [DONE]\n\na0:"no"\nad:{}',
    "𠮷𝒳\U0010fffd",
    " ",
    "é = e\u0301, ß, ﬁ, عربى",
]
HARD_TEXT = "".join(HARD_PIECES)
PNG = "data:image/png;base64," + base64.b64encode(contract.png("seed")).decode()


def picture(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


async def read_all(rig: Rig, model: str, text: str, into: list[str]) -> None:
    """Ask through the openai package, streamed, and keep the text."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
    stream = await rig.openai.chat.completions.create(model=model, messages=messages, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    into.append("".join(pieces))


async def ask(rig: Rig, model: str, text: str) -> ChatCompletion:
    """Ask through the openai package for a whole answer."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
    return await rig.openai.chat.completions.create(model=model, messages=messages)


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk_bytes", [1, 7, 0])
async def test_answers_arrive_byte_for_byte_streamed_and_whole(
    nursery: trio.Nursery, tmp_path: Path, chunk_bytes: int
) -> None:
    switches = Switches(chunk_bytes=chunk_bytes, answers={"*": HARD_PIECES})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches)
    for _ in range(2):  # a create call's answer, then a retry's
        answer = await ask(rig, CLAUDE, "Hello")
        assert answer.choices[0].message.content == HARD_TEXT
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == CLAUDE
        texts: list[str] = []
        await read_all(rig, CLAUDE, "Hello", texts)
        assert texts == [HARD_TEXT]
        raw = await rig.stream(CLAUDE, "Hello")
        assert raw.text == HARD_TEXT
        assert raw.finish_reasons == ["stop"]
        assert raw.has_done
        assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content == HARD_TEXT
    assert [seen.kind for seen in rig.calls] == ["create"] + ["retry"] * 7


async def test_a_long_answer_stays_in_short_lines(nursery: trio.Nursery, tmp_path: Path) -> None:
    text = "长" * 300_000
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(answers={"*": [text]}))
    stream = await rig.stream(CLAUDE, "Hello")
    assert stream.text == text
    assert max(len(line.encode()) for line in stream.body.split("\n")) < 128 << 10


async def test_a_good_stream_ends_with_finish_usage_and_done(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,))
    plain = await rig.stream(CLAUDE, "Hello there")
    assert (plain.finish_reasons, plain.usages, plain.has_done) == (["stop"], [], True)
    assert {chunk.id for chunk in plain.chunks} == {plain.chunks[0].id}
    assert plain.choices[0].delta.role == "assistant"
    counted = await rig.stream(CLAUDE, "Hello there", stream_options={"include_usage": True})
    [usage] = counted.usages
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    assert counted.chunks[-1].choices == []
    assert counted.has_done
    answer = whole(await rig.chat(CLAUDE, "Hello there"))
    assert answer.usage == usage


async def test_usage_is_estimated_where_the_site_sends_none(nursery: trio.Nursery, tmp_path: Path) -> None:
    for switches in (Switches(omit_usage=True), Switches(null_usage=True)):
        rig = await start(nursery, tmp_path / str(switches.null_usage), models=(CLAUDE,), switches=switches)
        usage = whole(await rig.chat(CLAUDE, "你好世界")).usage
        assert usage
        assert usage.prompt_tokens == 4
        assert usage.completion_tokens > 4


@pytest.mark.parametrize(
    ("site", "client"), [("stop", "stop"), ("length", "length"), ("content-filter", "content_filter")]
)
async def test_finish_reasons_are_translated(
    nursery: trio.Nursery, tmp_path: Path, site: str, client: str
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(finish_reason=site))
    assert (await rig.stream(CLAUDE, "Hello")).finish_reasons == [client]
    assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].finish_reason == client


async def test_reasoning_and_sources_come_beside_the_text(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(SEARCH,), switches=Switches(reasoning=True))
    answer = (await rig.chat(SEARCH, "Hello")).json()["choices"][0]["message"]
    assert answer["reasoning_content"] == "Looking at the question…"
    urls = [each["url_citation"]["url"] for each in answer["annotations"]]
    assert urls == ["https://example.com/one", "https://example.com/two?q=1&r=2"]
    stream = await rig.stream(SEARCH, "Hello")
    extra = [choice.delta.model_extra or {} for choice in stream.choices]
    assert "".join(each.get("reasoning_content", "") for each in extra) == "Looking at the question…"
    assert sum(len(each.get("annotations", [])) for each in extra) == 2
    assert stream.text == answer["content"] == f"[{SEARCH}] Hello"


async def test_an_image_model_answers_with_an_address(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    for text in (
        whole(await rig.chat(IMAGE, "A cat")).choices[0].message.content or "",
        (await rig.stream(IMAGE, "A cat")).text,
    ):
        assert text.startswith("![image](http")
        address = text.removeprefix("![image](").removesuffix(")")
        assert (await rig.http.get(address)).headers["content-type"] == "image/png"


# ── What reaches the site ───────────────────────────────────────────────────────────────────────────────────


async def test_a_retry_names_model_session_and_message_and_carries_the_whole_history(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    history = [
        {"role": "system", "content": "Be brief. 简短。"},
        user("One?"),
        {"role": "assistant", "content": "1"},
        user("Two?"),
    ]
    before = next(iter(rig.pool(CLAUDE)._idle))
    assert whole(await rig.chat(CLAUDE, *history)).choices[0].message.content == f"[{CLAUDE}] Two?"
    [seen] = rig.calls
    assert (seen.kind, seen.status, seen.outcome) == ("retry", 200, "complete")
    assert (seen.session_id, seen.message_id) == (before.session_id, before.message_id)
    assert seen.body["modelId"] == seen.model_id == model_id(CLAUDE)
    assert turns(seen) == [(each["role"], each["content"]) for each in history]
    assert [message["participantPosition"] for message in seen.body["messages"]] == ["b", "a", "a", "a"]
    assert [message["status"] for message in seen.body["messages"]] == ["success"] * 3 + ["pending"]


async def test_roles_and_contents_the_site_does_not_know_are_carried_over(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    messages = [
        {"role": "developer", "content": "Rules"},
        user(""),
        {"role": "assistant", "content": None},
        parts,
        {"role": "assistant", "content": "and so"},
    ]
    response = await rig.chat(CLAUDE, *messages, temperature=0.2, unheard_of={"x": 1})
    whole(response)
    assert response.headers["x-ignored-parameters"] == "temperature"
    got = turns(rig.calls[0])
    assert got[0] == ("system", "Rules")
    assert [role for role, _ in got] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert got[1][1].strip() == ""
    assert got[3][1].split() == ["a", "b"]
    assert all(content for role, content in got if role == "user")


async def test_changing_the_model_changes_the_conversation(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    for name in (CLAUDE, DEEPSEEK, CLAUDE):
        answer = whole(await rig.chat(name, "Hello"))
        assert answer.choices[0].message.content == f"[{name}] Hello"
    assert [seen.model_id for seen in rig.calls] == [model_id(n) for n in (CLAUDE, DEEPSEEK, CLAUDE)]
    own = {name: set(rig.pool(name).sessions) for name in (CLAUDE, DEEPSEEK)}
    assert rig.calls[0].session_id in own[CLAUDE]
    assert rig.calls[1].session_id in own[DEEPSEEK]
    assert rig.calls[2].session_id in own[CLAUDE] - {rig.calls[0].session_id}


async def test_a_model_may_be_named_by_its_id(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    assert whole(await rig.chat(model_id(CLAUDE), "Hello")).model == model_id(CLAUDE)


async def test_the_sessions_of_a_model_are_used_in_turn(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    for _ in range(8):
        await rig.chat(CLAUDE, "Hello")
    order = [seen.session_id for seen in rig.calls]
    assert len(set(order[:4])) == 4
    assert order[:4] == order[4:]


async def test_many_requests_at_once_share_four_conversations_in_order_of_arrival(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    held = Held(monkeypatch)
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        for number in range(12):
            clients.start_soon(read_all, rig, CLAUDE, f"question {number:02}", answers)
            await until(lambda: rig.program.answers.active == number + 1)  # noqa: B023
        await until(lambda: len(rig.calls) == 4)
        assert rig.pool(CLAUDE).waiting == 8
        held.release()
    assert sorted(answers) == [f"[{CLAUDE}] question {number:02}" for number in range(12)]
    assert rig.arena.max_running(model_id(CLAUDE)) == 4
    assert rig.arena.max_running_pair() == 1
    # The four whose turn comes in the same moment may be sent in any order.
    places = [int(turns(seen)[-1][1].removeprefix("question ")) for seen in rig.calls]
    assert sorted(places) == [*range(12)]
    assert all(abs(number - place) < 4 for place, number in enumerate(places))
    assert Counter(seen.session_id for seen in rig.calls) == dict.fromkeys(rig.pool(CLAUDE).sessions, 3)
    assert {seen.kind for seen in rig.calls} == {"retry"}
    assert repr(rig.pool(CLAUDE)) == f"<ModelPool {CLAUDE}: 4 sessions, 4 idle, 0/4 tokens, 0 waiting>"


async def test_a_model_without_a_conversation_opens_one_with_the_request_itself_and_then_retries_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,))
    history = [{"role": "system", "content": "Be brief."}, user("First")]
    assert whole(await rig.chat(CLAUDE, *history)).choices[0].message.content == f"[{CLAUDE}] First"
    assert whole(await rig.chat(CLAUDE, "Second")).choices[0].message.content == f"[{CLAUDE}] Second"
    first, second = rig.calls
    assert (first.kind, second.kind) == ("create", "retry")
    assert turns(first) == [("system", "Be brief."), ("user", "First")]
    assert (first.session_id, first.message_id) == (second.session_id, second.message_id)
    assert {session.source for session in rig.pool(CLAUDE).sessions.values()} == {"on_demand"}


async def test_a_shared_name_is_chosen_by_the_image(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(RAY,))
    assert "[video](http" in (whole(await rig.chat(RAY, "A cat")).choices[0].message.content or "")
    whole(await rig.chat(RAY, picture("This cat", PNG)))
    by_image = {model.takes_image: model.id for model in rig.program.pool.catalog.named(RAY)}
    assert [seen.model_id for seen in rig.calls] == [by_image[False], by_image[True]]
    [attachment] = rig.calls[1].body["messages"][0]["experimental_attachments"]
    assert (attachment["contentType"], attachment["url"]) == ("image/png", PNG)


async def test_images_travel_as_attachments_of_a_retry(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(GPT, EDIT), filled=True)
    whole(await rig.chat(GPT, picture("Compare", PNG, PNG)))
    assert rig.calls[0].kind == "retry"
    assert len(rig.calls[0].body["messages"][0]["experimental_attachments"]) == 2
    whole(await rig.chat(EDIT, picture("Paint it black", PNG)))
    assert rig.calls[1].kind == "create"


# ── Clients that leave ──────────────────────────────────────────────────────────────────────────────────────


async def leave_when(rig: Rig, model: str, wanted: str, *, is_stream: bool = True) -> None:
    """A client that closes its connection once `wanted` is in the stream."""
    async with plain_client(rig.url) as client:
        body = request_body(model, "Hello", stream=is_stream)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            received = ""
            async for text in response.aiter_text():
                received += text
                if wanted in received:
                    return


async def test_a_client_that_leaves_mid_stream_aborts_at_the_site_and_frees_the_session(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(hang_after_lines=1, trouble_times=1)
    await leave_when(rig, CLAUDE, "claude-")
    left_at = trio.current_time()
    [seen] = rig.calls
    await until(lambda: seen.outcome == "aborted", 10)
    print(f"the site saw the abort after {(seen.ended or 0) - left_at:.3f} s")
    assert whole(await rig.chat(CLAUDE, "Next")).choices[0].message.content == f"[{CLAUDE}] Next"
    assert rig.calls[1].session_id == seen.session_id
    assert rig.event(RequestEnded)[0].outcome == "client_left"
    state = await rig.state()
    assert state["requests"] == {"active": 0, "completed": 1, "failed": 0, "left": 1}


async def test_a_client_that_leaves_before_the_answer_began_aborts_too(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(latency_seconds=600)
    for is_stream in (True, False):
        rig.arena.record.clear()
        with trio.CancelScope() as client:
            async with trio.open_nursery() as clients:
                clients.start_soon(partial(leave_when, rig, CLAUDE, "never", is_stream=is_stream))
                await until(lambda: len(rig.calls) == 1)
                client.cancel()
        await until(lambda: rig.calls[0].outcome == "aborted", 10)
        await until(lambda: rig.pool(CLAUDE).idle == 4)


async def test_a_client_that_leaves_while_queued_frees_its_place(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    held = Held(monkeypatch)
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        clients.start_soon(read_all, rig, CLAUDE, "first", answers)
        await until(lambda: len(rig.calls) == 1)
        with trio.CancelScope() as second:
            async with trio.open_nursery() as impatient:
                impatient.start_soon(read_all, rig, CLAUDE, "second", answers)
                await until(lambda: rig.pool(CLAUDE).waiting == 1)
                clients.start_soon(read_all, rig, CLAUDE, "third", answers)
                await until(lambda: rig.pool(CLAUDE).waiting == 2)
                second.cancel()
        await until(lambda: rig.pool(CLAUDE).waiting == 1)
        held.release()
    assert answers == [f"[{CLAUDE}] first", f"[{CLAUDE}] third"]
    assert [turns(seen)[-1][1] for seen in rig.calls] == ["first", "third"]


# ── The site's troubles ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_dead_session_is_retired_and_the_request_goes_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    dead = [session.session_id for session in rig.pool(CLAUDE)._idle][:2]
    rig.arena.switch(dead_sessions=dead)
    assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content == f"[{CLAUDE}] Hello"
    assert [seen.status for seen in rig.calls] == [404, 404, 200]
    assert [event.session_id for event in rig.event(SessionRetired)] == dead
    assert set(rig.pool(CLAUDE).sessions).isdisjoint(dead)
    rig.arena.switch(dead_sessions=[*rig.pool(CLAUDE).sessions])
    assert (await rig.stream(CLAUDE, "Hello")).text == f"[{CLAUDE}] Hello"
    assert [seen.kind for seen in rig.calls[3:]] == ["retry", "retry", "create"]


async def test_a_conversation_that_is_busy_at_the_site_is_not_given_up(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(failures={"*": {"status": 409, "on": "retry", "times": 2}})
    assert (await rig.stream(CLAUDE, "Hello")).text == f"[{CLAUDE}] Hello"
    assert [seen.status for seen in rig.calls] == [409, 409, 200]
    assert len(rig.pool(CLAUDE).sessions) == 4


async def test_a_conversation_that_was_busy_once_does_not_shorten_what_comes_after(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"bridge": {"reconnect_grace_seconds": 0.3}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    held = Held(monkeypatch)
    rig.arena.switch(failures={"*": {"status": 409, "on": "retry", "times": 1}})
    async with trio.open_nursery() as clients:
        clients.start_soon(rig.chat, CLAUDE, "Hello")
        await until(lambda: len(rig.calls) == 2)
        await trio.sleep(0.4)
        await rig.twin.open_page()
        await until(lambda: len(rig.calls) == 3)
        held.release()
    assert rig.program.answers.completed == 1
    assert [seen.status for seen in rig.calls][::2] == [409, 200]


async def test_those_who_waited_for_the_tab_keep_their_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    [bridge] = rig.program.bridges
    for _ in range(3):
        rig.arena.record.clear()
        rig.program.bridges.note_state(bridge, "loading", bridge.account)
        async with trio.open_nursery() as clients:
            for number in range(6):
                clients.start_soon(rig.chat, CLAUDE, str(number))
                await until(lambda: rig.program.answers.active == number + 1)  # noqa: B023
                await trio.testing.wait_all_tasks_blocked(0.01)
            rig.program.bridges.note_state(bridge, "ready", bridge.account)
        assert [turns(seen)[-1][1] for seen in rig.calls] == ["0", "1", "2", "3", "4", "5"]


async def test_a_check_that_no_page_shows_is_told_after_the_persons_time(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmarena_proxy, "RELOAD_INTERVAL_SECONDS", 0.05)
    tables = {"requests": {"person_wait_seconds": 0.6}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    challenge = Failure(
        status=403,
        body="<title>Just a moment...</title>",
        content_type="text/html",
        headers={"cf-mitigated": "challenge"},
    )
    rig.arena.switch(failures={"*": challenge})
    check_error(await rig.chat(CLAUDE, "Hello"), 403, "human_verification_required")
    assert len(rig.calls) > 1
    assert len(rig.pool(CLAUDE).sessions) == 4


async def test_trouble_at_the_site_is_tried_again_with_another_session(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(failures={"*": {"status": 503, "times": 2}})
    assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content == f"[{CLAUDE}] Hello"
    assert [seen.status for seen in rig.calls] == [503, 503, 200]
    assert len({seen.session_id for seen in rig.calls}) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_trouble_that_stays_is_a_bad_gateway_with_the_site_s_reply(
    nursery: trio.Nursery, tmp_path: Path, stream: bool
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(failures={"*": Failure(status=500, body='{"error":"on fire 火"}')})
    error = check_error(await rig.chat(CLAUDE, "Hello", stream=stream), 502, "upstream_error")
    assert "on fire 火" in error["message"]
    assert len(rig.calls) == 3
    assert (await rig.state())["requests"]["failed"] == 1


async def test_a_conversation_that_fails_again_and_again_is_retired(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    [bad] = rig.pool(CLAUDE).sessions
    rig.arena.switch(failures={"*": Failure(status=500, on="retry")})
    check_error(await rig.chat(CLAUDE, "Hello"), 502, "upstream_error")
    assert [event.session_id for event in rig.event(SessionRetired)] == [bad]
    assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content == f"[{CLAUDE}] Hello"
    assert rig.calls[-1].kind == "create"


@pytest.mark.parametrize("trouble", [{"cut_after_lines": 0}, {"a3": "overloaded"}])
async def test_a_failure_before_the_first_piece_is_tried_again(
    nursery: trio.Nursery, tmp_path: Path, trouble: dict[str, Any]
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(**trouble, trouble_times=2)
    stream = await rig.stream(CLAUDE, "Hello")
    assert (stream.text, stream.errors, stream.finish_reasons) == (f"[{CLAUDE}] Hello", [], ["stop"])
    assert len(rig.calls) == 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [({"cut_after_lines": 2}, "cut off"), ({"a3": "over 载", "a3_after_lines": 2}, "over 载")],
)
async def test_a_failure_after_the_first_piece_ends_the_stream_with_an_error_event(
    nursery: trio.Nursery, tmp_path: Path, trouble: dict[str, Any], words: str
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(**trouble)
    response = await rig.chat(CLAUDE, "Hello", stream=True)
    stream = Stream(response.text)
    assert f"[{CLAUDE}] Hello".startswith(stream.text)
    assert stream.text
    assert stream.finish_reasons == []
    [error] = stream.errors
    assert error["code"] == "upstream_error"
    assert words in error["message"]
    assert response.headers["x-request-id"] in error["message"]
    assert stream.body.endswith("data: [DONE]\n\n")
    assert len(rig.calls) == 1
    with pytest.raises(openai.APIError, match="request id req_"):
        await read_all(rig, CLAUDE, "Hello", [])


async def test_a_whole_answer_that_was_cut_is_asked_for_again(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(cut_after_lines=2, trouble_times=1)
    assert whole(await rig.chat(CLAUDE, "Hello")).choices[0].message.content == f"[{CLAUDE}] Hello"
    assert len(rig.calls) == 2


@pytest.mark.parametrize("trouble", [{"cut_after_lines": 0}, {"a3": "overloaded"}])
async def test_a_delivered_prompt_that_failed_is_not_sent_again_by_the_client(
    nursery: trio.Nursery, tmp_path: Path, trouble: dict[str, Any]
) -> None:
    """clients.md: failed after the prompt was delivered means `x-should-retry: false`."""
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(**trouble)
    response = await rig.chat(CLAUDE, "Hello")
    check_error(response, 502, "upstream_error")
    assert response.headers["x-should-retry"] == "false"


async def test_an_answer_that_never_begins_times_out(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"requests": {"first_byte_timeout_seconds": 0.5}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(hang_after_lines=0)
    response = await rig.chat(CLAUDE, "Hello")
    check_error(response, 504, "timeout")
    assert response.headers["x-should-retry"] == "false"
    await until(lambda: rig.calls[0].outcome == "aborted")
    assert len(rig.calls) == 1


async def test_an_answer_that_falls_silent_times_out(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"requests": {"idle_timeout_seconds": 0.5}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(hang_after_lines=2)
    stream = await rig.stream(CLAUDE, "Hello")
    assert [error["code"] for error in stream.errors] == ["timeout"]
    assert stream.finish_reasons == []
    await until(lambda: rig.calls[0].outcome == "aborted")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Failure(status=400, body='{"error":"bad prompt"}'), 400, "invalid_request"),
        (Failure(status=413, body='{"error":"attachment too large"}'), 413, "request_too_large"),
    ],
)
async def test_what_the_site_rejects_is_the_client_s_error(
    nursery: trio.Nursery, tmp_path: Path, failure: Failure, status: int, code: str
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(failures={"*": failure})
    error = check_error(await rig.chat(CLAUDE, "Hello"), status, code)
    assert json.loads(failure.body)["error"] in error["message"]
    assert len(rig.calls) == 1
    assert len(rig.pool(CLAUDE).sessions) == 4


async def test_a_model_the_site_does_not_offer_is_a_bad_gateway(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,))
    rig.arena.switch(failures={"*": {"status": 404, "body": '{"error":"gone"}'}})
    check_error(await rig.chat(CLAUDE, "Hello"), 502, "upstream_error")


# ── The person and the tab ──────────────────────────────────────────────────────────────────────────────────


async def test_a_stale_sign_in_is_renewed_by_a_reload_and_the_request_goes_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    welcomes = rig.twin.welcomes
    rig.arena.expire_sign_ins()
    assert (await rig.stream(CLAUDE, "Hello")).text == f"[{CLAUDE}] Hello"
    assert [seen.status for seen in rig.calls] == [401, 200]
    assert rig.twin.welcomes == welcomes + 1


async def test_a_sign_in_that_a_reload_does_not_renew_waits_for_the_person(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.sign_out_everyone()
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        clients.start_soon(read_all, rig, CLAUDE, "Hello", answers)
        await until(lambda: [bridge.state for bridge in rig.program.bridges] == ["sign_in"])
        assert rig.twin.state == "sign_in"
        sent = len(rig.calls)
        await trio.sleep(0.5)
        assert len(rig.calls) == sent
        assert answers == []
        await rig.make_ready()
    assert answers == [f"[{CLAUDE}] Hello"]


async def test_a_human_check_holds_requests_and_they_go_on_by_themselves(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.require_check()
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        for number in range(6):
            clients.start_soon(read_all, rig, CLAUDE, f"question {number}", answers)
        await until(lambda: rig.twin.state == "verification")
        await until(lambda: [bridge.state for bridge in rig.program.bridges] == ["verification"])
        await trio.sleep(0.5)
        assert answers == []
        assert (await rig.http.get("/ready")).status_code == 503
        await rig.twin.pass_check()
    assert sorted(answers) == [f"[{CLAUDE}] question {number}" for number in range(6)]
    assert (await rig.http.get("/ready")).status_code == 200
    assert len(rig.pool(CLAUDE).sessions) == 4


@pytest.mark.parametrize(
    ("header", "status"), [(True, 403), (False, 403), (True, 503)], ids=["header", "html only", "503"]
)
async def test_the_check_is_known_in_all_its_forms(
    nursery: trio.Nursery, tmp_path: Path, header: bool, status: int
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(check_header=header, check_status=status)
    rig.arena.require_check()
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        clients.start_soon(read_all, rig, CLAUDE, "Hello", answers)
        await until(lambda: rig.twin.state == "verification")
        await rig.twin.pass_check()
    assert answers == [f"[{CLAUDE}] Hello"]


async def test_a_tab_lost_before_anything_was_delivered_is_waited_for_and_asked_again(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    held = Held(monkeypatch)
    answers: list[str] = []
    async with trio.open_nursery() as clients:
        clients.start_soon(read_all, rig, CLAUDE, "Hello", answers)
        await until(lambda: len(rig.calls) == 1)
        await rig.twin.open_page()
        await until(lambda: len(rig.calls) == 2)
        held.release()
    assert answers == [f"[{CLAUDE}] Hello"]
    assert [seen.outcome for seen in rig.calls] == ["aborted", "complete"]
    assert len(rig.pool(CLAUDE).sessions) == 4


async def test_a_tab_lost_after_something_was_delivered_ends_the_stream_with_an_error(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(hang_after_lines=1)
    received = ""
    body = request_body(CLAUDE, "Hello", stream=True)
    async with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for text in response.aiter_text():
            received += text
            if "claude-" in text and '"content":"[' in text:
                await rig.twin.open_page()
    stream = Stream(received)
    assert [error["code"] for error in stream.errors] == ["upstream_error"]
    assert stream.finish_reasons == []
    assert len(rig.calls) == 1


async def test_conversations_by_hand_join_the_pool_and_are_used(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK))
    assert "[deepseek-v3.1] by hand" in "".join(
        json.loads(line[3:])
        for line in (await rig.twin.chat_by_hand(DEEPSEEK, "by hand")).split("\n")
        if line.startswith("a0:")
    )
    await until(lambda: len(rig.pool(DEEPSEEK).sessions) == 1)
    [session] = rig.pool(DEEPSEEK).sessions.values()
    opened = rig.calls[0]
    assert (session.session_id, session.message_id, session.source) == (
        opened.session_id,
        opened.message_id,
        "captured",
    )
    whole(await rig.chat(DEEPSEEK, "through the API"))
    assert (rig.calls[-1].kind, rig.calls[-1].session_id) == ("retry", session.session_id)

    await rig.twin.follow_up("and further")
    await until(lambda: session.message_id != opened.message_id)
    assert [seen.kind for seen in rig.calls] == ["create", "retry", "post"]
    whole(await rig.chat(DEEPSEEK, "again"))
    assert rig.retries[-1] is rig.calls[-1]
    assert rig.calls[-1].message_id == session.message_id == rig.calls[-2].message_id

    await rig.twin.retry_by_hand()
    whole(await rig.chat(DEEPSEEK, "once more"))
    assert {seen.status for seen in rig.calls} == {200}
    assert len(rig.pool(DEEPSEEK).sessions) == 1
    assert len(rig.pool(CLAUDE).sessions) == 0


@pytest.mark.parametrize("mode", ["battle", "side-by-side"])
async def test_conversations_of_other_modes_stay_out_of_the_pool(
    nursery: trio.Nursery, tmp_path: Path, mode: str
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK))
    await rig.twin.chat_by_hand(CLAUDE, "by hand", mode)
    await rig.twin.chat_by_hand(DEEPSEEK, "by hand")  # told after it, so the first one has been looked at
    await until(lambda: len(rig.pool(DEEPSEEK).sessions) == 1)
    assert len(rig.pool(CLAUDE).sessions) == 0


async def test_requests_spread_over_two_tabs_and_keep_to_the_account_of_a_session(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    other = Twin(rig.arena_url, rig.program.api.bridge_url)
    await nursery.start(other.run)
    await other.accept_terms()
    await until(lambda: sum(bridge.is_ready for bridge in rig.program.bridges) == 2)
    await until(lambda: rig.program.bridges.accounts() == {rig.twin.account, other.account})
    rig.arena.switch(latency_seconds=0.2)
    async with trio.open_nursery() as clients:
        for _ in range(8):
            clients.start_soon(rig.chat, CLAUDE, "Hello")
    assert {seen.status for seen in rig.calls} == {200}
    owners = {s.session_id: s.account for s in rig.arena.sessions.values()}
    assert all(owners[seen.session_id or ""] == seen.account for seen in rig.calls)


# ── Errors a client sees ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [user("x")]}, "model"),
        ({"model": CLAUDE}, "messages"),
        ({"model": CLAUDE, "messages": []}, "messages"),
        ({"model": CLAUDE, "messages": "x"}, "messages"),
        ({"model": CLAUDE, "messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"model": CLAUDE, "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"model": CLAUDE, "messages": [user("x")], "n": 5}, "n"),
        ({"model": CLAUDE, "messages": [user("x")], "stream": "yes"}, "stream"),
        (
            {"model": CLAUDE, "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"model": GPT, "messages": [picture("x", "data:image/png;base64,!!")]},
            "messages[0].content[1].image_url",
        ),
        ({"model": CLAUDE, "messages": [picture("x", PNG)]}, "messages[0].content"),
        ({"model": EDIT, "messages": [user("x")]}, "messages[0].content"),
        ({"model": EDIT, "messages": [picture("x", PNG, PNG)]}, "messages[0].content"),
        ([], None),
        ("{", None),
        ("", None),
    ],
)
async def test_a_bad_body_is_refused_with_the_place_named(
    nursery: trio.Nursery, tmp_path: Path, body: Any, param: str | None
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT, EDIT), connected=False)
    content = body if isinstance(body, str) else json.dumps(body)
    response = await rig.http.post("/v1/chat/completions", content=content)
    error = check_error(response, 400, "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


async def test_an_unknown_model_is_not_found_and_close_names_are_given(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    error = check_error(await rig.chat("claude-sonet-4", "x"), 404, "model_not_found")
    assert error["param"] == "model"
    assert CLAUDE in error["message"]
    error = check_error(await rig.http.get("/v1/models/claude-sonet-4"), 404, "model_not_found")
    assert CLAUDE in error["message"]
    with pytest.raises(openai.NotFoundError):
        await ask(rig, "zzz", "x")


async def test_the_key_guards_what_costs_and_tells_nothing_else(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables={"server": {"api_key": "sk-geheim"}}, connected=False)
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{CLAUDE}"),
        ("GET", "/api/state"),
        ("POST", "/api/bootstrap"),
    ):
        for key in (None, "Bearer wrong", "Bearer", "Basic c2s="):
            headers = {"authorization": key} if key else {}
            response = await rig.http.request(method, path, headers=headers, json={})
            error = check_error(response, 401, "invalid_api_key")
            assert "geheim" not in error["message"]
    assert (await rig.http.get("/health")).status_code == 200
    assert (await rig.http.get("/bridge.user.js")).status_code == 200
    headers = {"authorization": "Bearer sk-geheim"}
    assert (await rig.http.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_may_have_any_letters(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"server": {"api_key": "clé-là"}}, connected=False)
    headers = {b"authorization": "Bearer clé-là".encode()}
    assert (await rig.http.get("/v1/models", headers=headers)).status_code == 200


async def test_no_other_spelling_of_a_path_goes_round_the_key(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"server": {"api_key": "sk-geheim"}}, connected=False)
    is_open = re.compile("/|/health|/ready|/bridge.user.js|/openapi.json|/dashboard/.*|/media/.*")
    operations = (await rig.http.get("/openapi.json")).json()["paths"]
    guarded = [
        (path, method) for path in operations if not is_open.fullmatch(path) for method in operations[path]
    ]
    assert len(guarded) > 15
    for path, method in [*guarded, ("/v1", "get"), ("/api/", "get"), ("/nothing", "get")]:
        for spelling in (
            "{}",
            "/{}",
            "//{}",
            "/%2f{}",
            "/%2F%2f/{}",
            "/.{}",
            "/;{}",
            "/dashboard/..{}",
            "/%5c{}",
        ):
            url = httpx.URL(rig.url).copy_with(raw_path=spelling.format(path).encode())
            response = await rig.http.request(method, url)
            assert response.status_code in (401, 404), (method, url)
            assert response.status_code == 401 or "dashboard/.." in spelling


async def test_a_base_url_that_ends_in_slashes_is_understood(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path)
    whole(await rig.http.post(f"{rig.url}//v1/chat/completions", json=request_body(CLAUDE)))
    models = await rig.http.get(f"{rig.url}//v1/models/{CLAUDE}")
    assert models.json()["id"] == CLAUDE


async def test_a_body_that_is_too_large_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"server": {"max_body_mb": 1}}, connected=False)
    check_error(await rig.chat(CLAUDE, "x" * (1 << 20)), 413, "request_too_large")

    async def unannounced() -> Any:
        for _ in range(64):
            yield b"x" * (1 << 15)

    response = await rig.http.post("/v1/chat/completions", content=unannounced())
    check_error(response, 413, "request_too_large")
    assert (await rig.http.get("/health")).status_code == 200


async def test_a_body_as_large_as_allowed_is_read(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    large = "data:image/png;base64," + base64.b64encode(bytes(4 << 20)).decode()
    whole(await rig.chat(GPT, picture("large", large, large, large)))
    assert len(rig.calls[0].body["messages"][0]["experimental_attachments"]) == 3


async def test_other_host_names_are_misdirected(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"server": {"allowed_hosts": ["nas.local"]}}, connected=False)
    port = httpx.URL(rig.url).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example"):
        check_error(await rig.http.get("/v1/models", headers={"host": host}), 421, "misdirected_request")
    for host in (f"127.0.0.1:{port}", "localhost", f"[::1]:{port}", "nas.local", f"NAS.local:{port}"):
        assert (await rig.http.get("/v1/models", headers={"host": host})).status_code == 200, host


async def test_pages_of_other_origins_may_not_change_anything(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        headers = {"origin": origin}
        response = await rig.http.post("/api/bootstrap", json={"action": "start"}, headers=headers)
        check_error(response, 403, "origin_not_allowed")
        check_error(await rig.http.post("/api/models/refresh", headers=headers), 403, "origin_not_allowed")
        check_error(await rig.http.delete("/api/sessions/x", headers=headers), 403, "origin_not_allowed")
    assert rig.program.bootstrap.phase == "skipped"
    own = await rig.http.post("/api/models/refresh", headers={"origin": rig.url})
    assert own.status_code == 202


async def test_cors_is_for_the_origins_that_are_allowed(nursery: trio.Nursery, tmp_path: Path) -> None:
    allowed = "http://localhost:3000"
    rig = await start(nursery, tmp_path, tables={"server": {"cors_origins": [allowed], "api_key": "k"}})
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-custom",
    }
    preflight = await rig.http.options("/v1/chat/completions", headers={"origin": allowed, **ask})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == allowed
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-custom"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    other = await rig.http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **ask})
    assert not [name for name in other.headers if name.startswith("access-control")]

    headers = {"origin": allowed, "authorization": "Bearer k"}
    body = request_body(CLAUDE, "Hello", stream=True)
    responses = [
        await rig.http.post("/v1/chat/completions", json=body, headers=headers),
        await rig.http.post("/v1/chat/completions", json={}, headers=headers),
        await rig.http.get("/v1/models", headers=headers),
        await rig.http.get("/nowhere", headers=headers),
        await rig.http.get("/v1/models", headers={"origin": allowed}),
    ]
    assert [response.status_code for response in responses] == [200, 400, 200, 404, 401]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == allowed
        exposed = response.headers["access-control-expose-headers"]
        assert {"x-request-id", "retry-after"} <= {name.strip() for name in exposed.split(",")}
    plain = await rig.http.get("/v1/models", headers={**headers, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("obstacle", ["human_verification_required", "sign_in_required"])
async def test_the_person_is_waited_for_and_then_asked_for(
    nursery: trio.Nursery, tmp_path: Path, obstacle: str, stream: bool
) -> None:
    tables = {"requests": {"person_wait_seconds": 0.3}}
    switches = Switches(check=obstacle == "human_verification_required")
    rig = await start(nursery, tmp_path, tables=tables, switches=switches, connected=False)
    await rig.connect(ready=False)
    started = trio.current_time()
    error = check_error(await rig.chat(CLAUDE, "x", stream=stream), 403, obstacle)
    assert trio.current_time() - started >= 0.3
    assert "LMArena tab" in error["message"]
    assert rig.calls == []
    with pytest.raises(openai.PermissionDeniedError):
        await read_all(rig, CLAUDE, "x", [])


async def test_without_a_tab_the_service_is_unavailable_after_the_grace(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"bridge": {"reconnect_grace_seconds": 0.3}}
    rig = await start(nursery, tmp_path, tables=tables, connected=False)
    response = await rig.chat(CLAUDE, "x")
    error = check_error(response, 503, "bridge_unavailable")
    assert response.headers["retry-after"] == "5"
    assert "tab" in error["message"]
    started = trio.current_time()
    check_error(await rig.chat(CLAUDE, "x", stream=True), 503, "bridge_unavailable")
    assert trio.current_time() - started < PATIENCE_SECONDS
    ready = await rig.http.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "missing")


async def test_a_queue_that_takes_too_long_says_so(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables: Tables = {"requests": {"queue_timeout_seconds": 0.3}, "pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(hang_after_lines=1, trouble_times=1)
    with trio.CancelScope() as first:
        async with trio.open_nursery() as clients:
            clients.start_soon(leave_when, rig, CLAUDE, "never")
            await until(lambda: len(rig.calls) == 1)
            response = await rig.chat(CLAUDE, "x")
            check_error(response, 429, "queue_timeout")
            assert 1 <= int(response.headers["retry-after"]) <= 60
            first.cancel()
    await until(lambda: rig.pool(CLAUDE).idle == 1)
    whole(await rig.chat(CLAUDE, "x"))


async def test_a_rate_limit_that_outlasts_the_queue_is_told(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"requests": {"queue_timeout_seconds": 0.5}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(rate_limit_after=0, retry_after=3600)
    response = await rig.chat(CLAUDE, "x")
    check_error(response, 429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "60"
    again = await rig.chat(CLAUDE, "x", stream=True)
    check_error(again, 429, "rate_limit_exceeded")
    assert len(rig.calls) == 1


async def test_paths_and_methods_that_are_not_there_are_told_in_openai_s_form(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    check_error(await rig.http.get("/v1/nothing"), 404, "not_found")
    check_error(await rig.http.post("/v1/models"), 405, "method_not_allowed")
    check_error(await rig.http.post("/v1/embeddings", json={}), 404, "not_found")
    check_error(await rig.http.delete("/api/sessions/nothing"), 404, "not_found")
    check_error(await rig.http.get("/v1/models/"), 404, "not_found")
    check_error(await rig.http.get("/v1/models/<path:name>"), 404, "model_not_found")
    check_error(await rig.http.delete("/v1/models/a/b"), 405, "method_not_allowed")
    for path in ("/health", "/v1/models"):
        by_get, by_head = await rig.http.get(path), await rig.http.head(path)
        assert (by_head.status_code, by_head.content) == (200, b"")
        for name in ("content-type", "content-length"):
            assert by_head.headers[name] == by_get.headers[name]


async def test_what_breaks_where_memory_is_told_is_an_error_in_openai_s_form(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    monkeypatch.setattr(rig.program.pool.catalog, "named", lambda name: 1 / 0)
    check_error(await rig.http.get(f"/v1/models/{CLAUDE}"), 500, "internal_error")
    assert (await rig.http.get("/health")).status_code == 200


# ── Waiting ─────────────────────────────────────────────────────────────────────────────────────────────────


WAITING = {"requests": {"commit_after_seconds": 0.1, "keepalive_seconds": 0.2}}


@pytest.mark.parametrize("keepalive", ["chunk", "comment", "off"])
async def test_a_stream_that_waits_commits_and_is_kept_alive(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keepalive: str
) -> None:
    tables: Tables = {"requests": {**WAITING["requests"], "keepalive": keepalive}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    held = Held(monkeypatch)
    body = request_body(CLAUDE, "Hello", stream=True)
    received = ""
    async with rig.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert rig.calls[0].status is None  # the site has not answered yet
        async for text in response.aiter_text():
            received += text
            if keepalive == "off" or received.count("\n\n") > 3:
                held.release()
    stream = Stream(received)
    assert stream.text == f"[{CLAUDE}] Hello"
    assert stream.finish_reasons == ["stop"]
    assert stream.has_done
    empty = [choice for choice in stream.choices[1:] if choice.delta.content == ""]
    comments = received.count(": keep-alive")
    if keepalive == "chunk":
        assert len(empty) >= 2
        assert comments == 0
    else:
        assert empty == []
        assert (comments >= 2) == (keepalive == "comment")


async def test_after_the_commit_a_failure_is_an_error_event(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables: Tables = {"requests": {**WAITING["requests"], "first_byte_timeout_seconds": 2}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(latency_seconds=60)
    response = await rig.chat(CLAUDE, "Hello", stream=True)
    assert response.status_code == 200
    stream = Stream(response.text)
    assert [error["code"] for error in stream.errors] == ["timeout"]
    assert response.headers["x-request-id"] in stream.errors[0]["message"]
    assert (stream.text, stream.finish_reasons) == ("", [])
    assert stream.body.endswith("data: [DONE]\n\n")


async def test_after_the_commit_a_failure_is_still_tried_again(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=WAITING, filled=True)
    rig.arena.switch(latency_seconds=0.5, cut_after_lines=0, trouble_times=2)
    stream = await rig.stream(CLAUDE, "Hello")
    assert (stream.text, stream.errors) == (f"[{CLAUDE}] Hello", [])
    assert len(rig.calls) == 3


async def test_a_failure_before_the_commit_is_a_status(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"requests": {"commit_after_seconds": 30}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(failures={"*": Failure(status=400, body="no")})
    check_error(await rig.chat(CLAUDE, "Hello", stream=True), 400, "invalid_request")


# ── The other pages ─────────────────────────────────────────────────────────────────────────────────────────


async def test_the_models_are_listed_without_a_tab(nursery: trio.Nursery, tmp_path: Path) -> None:
    names = (CLAUDE, RAY, IMAGE, SEARCH, EDIT)
    rig = await start(nursery, tmp_path, models=names, connected=False)
    listed = (await rig.openai.models.list()).data
    assert [model.id for model in listed] == list(names)  # a shared name once
    assert {model.object for model in listed} == {"model"}
    one = await rig.openai.models.retrieve(CLAUDE)
    assert (one.id, one.object) == (CLAUDE, "model")


async def test_a_model_id_may_arrive_percent_encoded(nursery: trio.Nursery, tmp_path: Path) -> None:
    odd = "a/b c+d:v1.0 模型?#%41"
    entry = pick_models([CLAUDE])[0] | {"publicName": odd}
    arena = Arena([entry])
    rig = await start(nursery, tmp_path, models=(DEEPSEEK,), arena=arena)
    await until(lambda: rig.program.pool.catalog.named(odd))
    response = await rig.http.get(f"/v1/models/{quote(odd, safe='')}")
    assert (response.status_code, response.json().get("id")) == (200, odd)
    assert whole(await rig.chat(odd, "Hello")).model == odd


async def test_the_page_s_models_are_laid_over_the_built_in_ones(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    renamed = pick_models([CLAUDE])[0] | {"publicName": "renamed"}
    rig = await start(
        nursery, tmp_path, models=(CLAUDE, DEEPSEEK), arena=Arena([renamed, *pick_models([GPT])])
    )
    await until(lambda: len(rig.program.pool.catalog) == 3)
    listed = [model["id"] for model in (await rig.http.get("/v1/models")).json()["data"]]
    assert listed == ["renamed", DEEPSEEK, GPT]
    rig.arena.models = {}
    assert (await rig.http.post("/api/models/refresh")).json() == {"asked": 1}
    await rig.twin.open_page()
    assert len(rig.program.pool.catalog) == 3


async def test_health_and_ready(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, connected=False, switches=Switches(check=True))
    assert (await rig.http.get("/health")).status_code == 200
    assert (await rig.http.get("/ready")).json()["status"] == "missing"
    await rig.connect(ready=False)
    assert (await rig.http.get("/ready")).json()["status"] == "verification"
    await rig.make_ready()
    assert (await rig.http.get("/ready")).status_code == 200
    assert (await rig.http.get("/health")).status_code == 200


async def test_the_state_has_the_promised_shape(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    rig.arena.switch(hang_after_lines=1, trouble_models=[CLAUDE])
    async with AsyncExitStack() as stack:
        clients = await stack.enter_async_context(trio.open_nursery())
        clients.start_soon(leave_when, rig, CLAUDE, "never")
        await until(lambda: rig.pool(CLAUDE).busy == 1 and len(rig.calls) == 1)
        state = await rig.state()
        clients.cancel_scope.cancel()
    promised = {"version", "uptime_seconds", "bridges", "bootstrap", "pool", "requests", "violations"}
    assert set(state) >= promised
    assert state["violations"] == []
    assert isinstance(state["version"], str)
    assert state["uptime_seconds"] > 0
    [bridge] = state["bridges"]
    assert bridge.keys() >= {"id", "state", "account", "script", "connected_at", "in_flight"}
    assert (bridge["state"], bridge["account"]) == ("ready", rig.twin.account)
    assert bridge["in_flight"] == 1
    assert datetime.fromisoformat(bridge["connected_at"]).tzinfo is not None
    assert state["bootstrap"].items() >= {"phase": "done", "opened": 8, "planned": 8, "skipped": []}.items()
    expected = [
        {
            "model": name,
            "model_id": model_id(name),
            "modality": "chat",
            "sessions": 4,
            "idle": idle,
            "busy": 4 - idle,
            "waiting": 0,
        }
        for name, idle in ((CLAUDE, 3), (DEEPSEEK, 4))
    ]
    assert all(pool.items() >= part.items() for pool, part in zip(state["pool"], expected, strict=True))
    assert state["requests"] == {"active": 1, "completed": 0, "failed": 0, "left": 0}


async def test_the_userscript_has_the_addresses_filled_in(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    response = await rig.http.get("/bridge.user.js")
    assert response.status_code == 200
    assert "javascript" in response.headers["content-type"]
    script = response.text
    assert script.startswith("// ==UserScript==")
    assert f'const BRIDGE_URL = "{rig.program.api.bridge_url}";' in script
    assert f'const INSTALL_URL = "{rig.url}/bridge.user.js";' in script
    assert 'const AUTH_COOKIE = "arena-auth-prod-v1";' in script
    assert f'const VERSION = "{VERSION}";' in script
    assert re.search(rf"^// @version +{re.escape(VERSION)}$", script, re.MULTILINE)
    for name in ("updateURL", "downloadURL"):
        assert re.search(rf"^// @{name} +{re.escape(rig.url)}/bridge.user.js$", script, re.MULTILINE)
    assert "9081" not in rig.program.api.bridge_url  # so the default is not what was looked at


async def test_a_session_is_deleted_on_request(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    [first, *_] = rig.pool(CLAUDE).sessions
    assert (await rig.http.delete(f"/api/sessions/{first}")).status_code == 200
    assert first not in rig.pool(CLAUDE).sessions
    check_error(await rig.http.delete(f"/api/sessions/{first}"), 404, "not_found")


async def test_a_client_that_reads_nothing_holds_no_conversation(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables: Tables = {"requests": {"idle_timeout_seconds": 1}}
    switches = Switches(answers={"*": ["x" * 100_000] * 300})
    rig = await start(nursery, tmp_path, tables=tables, switches=switches)
    port = int(rig.url.rsplit(":", 1)[1])
    body = json.dumps(request_body(CLAUDE, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", port) as client:
        await client.send_all(head.encode() + body)
        await until(lambda: rig.event(RequestEnded))
        assert rig.pool(CLAUDE).limiter.borrowed_tokens == 0
        await until(lambda: rig.arena.stats()["running"] == 0)
        rig.arena.switch(answers={})
        assert (await rig.chat(CLAUDE, "and me?")).status_code == 200


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01 no http at all\r\n\r\n", None]
)
async def test_connections_that_break_at_the_bridges_port_break_nothing_else(
    nursery: trio.Nursery, tmp_path: Path, said: bytes | None
) -> None:
    rig = await start(nursery, tmp_path)
    port = int(rig.program.api.bridge_url.rstrip("/").rsplit(":", 1)[1])
    if said is None:
        key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        key += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: https://evil.example\r\n"
        said = f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{key}\r\n".encode()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(said)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.sleep(0.01)
    assert (await rig.chat(CLAUDE)).status_code == 200
