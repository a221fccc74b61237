"""The browser's side of the wire, fuzzed: any sequence of good, stale, repeated and malformed frames.

Each example runs a program of its own, with tiny timeouts, against up to three fake tabs and some clients.
Whatever the tabs do, the clients are told something, nobody gets another's answer, and nothing is left over.
"""

import contextlib
import json
import logging
import re
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio
import trio.testing
import trio_websocket
from harness import CLAUDE, DEEPSEEK, Stream, model_id, strict, until, user, write_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from rich.console import Console as RichConsole

import lmarena_proxy
from lmarena_proxy import ApiError, Event, Program, RateLimitGate, Relay

ORIGIN = "https://lmarena.ai"
# An example is over soon, whatever its tabs leave undone.
TABLES: dict[str, Any] = {
    "server": {"port": 0, "shutdown_grace_seconds": 0.1},
    "bridge": {"port": 0, "heartbeat_seconds": 0.15, "reconnect_grace_seconds": 0.1},
    "pool": {"sessions_per_model": 2, "max_consecutive_failures": 2},
    "bootstrap": {
        "enabled": False,
        "settle_seconds": 0,
        "timeout_seconds": 0.25,
        "max_rate_limit_wait_seconds": 0.25,
    },
    "requests": {
        "queue_timeout_seconds": 0.3,
        "first_byte_timeout_seconds": 0.25,
        "idle_timeout_seconds": 0.25,
        "total_timeout_seconds": 1,
        "person_wait_seconds": 0.15,
        "commit_after_seconds": 0.1,
        "keepalive_seconds": 0.05,
    },
}
# What takes this long has been forgotten.
PATIENCE_SECONDS = 20.0
# What a client may be told: anything but that the program has an error.
STATUSES = {400, 403, 413, 429, 502, 503, 504}
# The last is left alone by the tabs' model lists, for the chat at the end.
MODELS = (model_id(CLAUDE), model_id(DEEPSEEK))
NEW_MODEL = "a-new-model"
GONE = (trio_websocket.ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError)

HELLO: dict[str, Any] = {
    "type": "hello",
    "protocol": 1,
    "script": "1.0.0",
    "url": f"{ORIGIN}/",
    "state": "ready",
    "account": "a",
}
TAG = re.compile(r"\[\d+\.\d+\]")
BODIES = {
    "good": 'a0:"[TAG]"\na0:" 你好 STOP more"\nad:{"finishReason":"stop"}\n',
    "reasoned": 'ag:"hm"\na0:"[TAG]"\nad:{"finishReason":"stop","usage":{"promptTokens":1}}\n',
    "begun": 'a0:"[TAG]"\n',
    "filtered": 'ad:{"finishReason":"content-filter"}\n',
    "empty": 'ad:{"finishReason":"stop"}\n',
    "failed": 'a0:"[TAG]"\na3:"the model is overloaded"\n',
    "ended badly": 'a0:"[TAG]"\nad:{"finishReason":"error"}\n',
    "no newline": 'a0:"[TAG]"\nad:{"finishReason":"length"}',
    "noise": 'zz\na0:7\na0:"\\ud800\na2:[{"type":"image"}]\nac:{}\n\n:\n',
    "page": "<!doctype html><title>Just a moment...</title>",
    "object": '{"error":"not found"}',
}


class Tab:
    """A fake tab: the browser's end of one connection."""

    def __init__(self, number: int, stream: trio.SocketStream) -> None:
        self.number, self.stream = number, stream
        self.socket: trio_websocket.WebSocketConnection
        self.fetches: dict[int, str] = {}
        self.asked_at = -1.0
        self.is_silent = False

    async def listen(self) -> None:
        """Take frames and answer pings, until it is told to be silent or the connection ends."""
        with contextlib.suppress(*GONE):
            while not self.is_silent:
                frame = json.loads(await self.socket.get_message())
                if frame["type"] == "fetch":
                    assert frame["id"] not in self.fetches
                    self.fetches[frame["id"]] = frame["body"]
                    self.asked_at = trio.current_time()
                elif frame["type"] == "ping" and not self.is_silent:
                    await self.socket.send_message(json.dumps({"type": "pong", "t": frame["t"]}))

    async def say(self, frame: Any) -> None:
        with contextlib.suppress(*GONE):
            await self.socket.send_message(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    def pick(self, number: int) -> int:
        """One of the fetches it was asked for, the newest first; or an id that it was not given."""
        known = [*self.fetches]
        if number < 6 and known:
            return known[-1 - number % len(known)]
        return (0, 1, 2, 3, 999, 2**32 - 1)[number % 6]

    def body(self, kind: str, exchange_id: int) -> bytes:
        return BODIES[kind].replace("[TAG]", f"[{self.number}.{exchange_id}]").encode()


def record(exchange_id: int, data: bytes, extra_length: int = 0) -> bytes:
    return struct.pack(">II", exchange_id, len(data) + extra_length) + data


class Stage:
    """A program, its tabs and its clients. The methods without an underscore are the steps."""

    def __init__(self, nursery: trio.Nursery, program: Program) -> None:
        self._nursery, self._program = nursery, program
        self._tabs: dict[int, Tab] = {}
        self._all_tabs: list[Tab] = []
        self._clients: list[trio.CancelScope] = []
        self._http = httpx.AsyncClient(
            base_url=program.api.url, timeout=PATIENCE_SECONDS, trust_env=False, verify=False
        )
        self.running = 0
        self.told: list[str] = []

    # ── Steps of the tabs ───────────────────────────────────────────────────────────────────────────────────

    async def connect(self, slot: int, hello: Any) -> None:
        """A new page in a tab; what was there is gone without a word."""
        await self.drop(slot)
        address = self._program.api.bridge_url.removeprefix("ws://").rstrip("/")
        host, port = address.rsplit(":", 1)
        socket = None
        while socket is None:
            stream = await trio.open_tcp_stream(host, int(port))
            # On a busy machine the program's patience may end first, which the library never tells.
            with trio.move_on_after(lmarena_proxy.HELLO_TIMEOUT_SECONDS * 4):
                socket = await trio_websocket.wrap_client_stream(
                    self._nursery, stream, address, "/", extra_headers=[(b"Origin", ORIGIN.encode())]
                )
        tab = self._tabs[slot] = Tab(len(self._all_tabs), stream)
        self._all_tabs.append(tab)
        tab.socket = socket
        self._nursery.start_soon(tab.listen)
        if hello is not None:
            await tab.say(hello)

    async def say(self, slot: int, frame: Any) -> None:
        if tab := self._tabs.get(slot):
            await tab.say(frame)

    async def captured(self, slot: int, session: Any, model: Any, account: Any, rest: Any) -> None:
        frame = {"type": "captured", "session_id": self._session_id(session), "model_id": model}
        await self.say(slot, {**frame, "account": account, **rest})

    async def head(self, slot: int, number: int, status: int, headers: dict[str, str]) -> None:
        if tab := self._asked(slot):
            await tab.say({"type": "response", "id": tab.pick(number), "status": status, "headers": headers})

    async def refuse(self, slot: int, number: int, status: int, headers: dict[str, str], kind: str) -> None:
        """A whole refusal."""
        await self.head(slot, number, status, headers)
        await self.send_bytes(slot, [(number, kind, 0, 999)], 0)
        await self.end(slot, number)

    async def send_bytes(self, slot: int, pieces: list[tuple[int, str, int, int]], extra_length: int) -> None:
        """One binary frame of pieces of answers; `extra_length` is announced and not there."""
        if tab := self._asked(slot):
            records = []
            for number, kind, first, last in pieces:
                exchange_id = tab.pick(number)
                records.append(record(exchange_id, tab.body(kind, exchange_id)[first:last], extra_length))
            await tab.say(b"".join(records))

    async def end(self, slot: int, number: int) -> None:
        if tab := self._asked(slot):
            await tab.say({"type": "end", "id": tab.pick(number)})

    async def error(self, slot: int, number: int, reason: str) -> None:
        if tab := self._asked(slot):
            await tab.say({"type": "error", "id": tab.pick(number), "reason": reason, "message": "so it is"})

    async def answer(self, slot: int, number: int, kind: str, cuts: list[int]) -> None:
        """A whole answer, its body cut into frames anywhere."""
        if tab := self._asked(slot):
            exchange_id = tab.pick(number)
            await tab.say({"type": "response", "id": exchange_id, "status": 200, "headers": {}})
            body = tab.body(kind, exchange_id)
            ends = [*sorted({cut for cut in cuts if cut < len(body)}), len(body)]
            for first, last in zip([0, *ends], ends, strict=False):
                await tab.say(record(exchange_id, body[first:last]))
            await tab.say({"type": "end", "id": exchange_id})

    async def serve(self, slot: int) -> None:
        """Good answers to everything asked for, whether it was answered or not."""
        tab = self._asked(slot)
        for number in range(len(tab.fetches) if tab else 0):
            await self.answer(slot, number, "good", [9])

    async def raw(self, slot: int, data: bytes) -> None:
        """Bytes past the WebSocket library."""
        if tab := self._tabs.get(slot):
            with contextlib.suppress(*GONE):
                await tab.stream.send_all(data)

    async def close(self, slot: int, code: int) -> None:
        if tab := self._tabs.pop(slot, None):
            with contextlib.suppress(*GONE), trio.move_on_after(0.5):
                await tab.socket.aclose(code, "bye")

    async def drop(self, slot: int) -> None:
        if tab := self._tabs.pop(slot, None):
            await tab.stream.aclose()

    async def silence(self, slot: int) -> None:
        if tab := self._tabs.get(slot):
            tab.is_silent = True

    def _asked(self, slot: int) -> Tab | None:
        """The tab in a place; for -1 the one that was asked last."""
        if slot >= 0:
            return self._tabs.get(slot)
        return max(self._tabs.values(), key=lambda tab: tab.asked_at, default=None)

    # ── Steps of the clients ────────────────────────────────────────────────────────────────────────────────

    async def chat(self, model: str, rest: dict[str, Any]) -> None:
        scope = trio.CancelScope()
        self._clients.append(scope)
        self.running += 1
        self._nursery.start_soon(self._chat, len(self._clients), scope, model, rest)

    async def leave(self, number: int) -> None:
        if self._clients:
            self._clients[-1 - number % len(self._clients)].cancel()

    async def delete(self, session: Any) -> None:
        self.running += 1
        self._nursery.start_soon(self._delete, self._session_id(session))

    async def bootstrap(self, action: str) -> None:
        self.running += 1
        self._nursery.start_soon(self._bootstrap, action)

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    # ── What they are told ──────────────────────────────────────────────────────────────────────────────────

    async def _chat(self, number: int, scope: trio.CancelScope, model: str, rest: dict[str, Any]) -> None:
        # A prompt is known by its number, and an answer by its tag: the two must belong together.
        body = {"model": model, "messages": [user(f"Prompt {number}.")], **rest}
        try:
            with scope:
                response = await self._http.post("/v1/chat/completions", json=body)
                self.told.append(self._judge(f"Prompt {number}.", response))
        finally:
            self.running -= 1

    def _judge(self, prompt: str, response: httpx.Response) -> str:
        if response.status_code != 200:
            assert response.status_code in STATUSES or (
                response.status_code == 404 and NEW_MODEL in response.text
            ), response.text
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert response.headers["x-request-id"] in error["message"]
            return f"{response.status_code} {error['code']}"
        texts: dict[int, str] = {}
        outcome = "whole"
        if response.headers["content-type"].startswith("text/event-stream"):
            stream = Stream(response.text)
            assert stream.has_done, response.text
            for choice in stream.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            codes = [error["code"] for error in stream.errors]
            assert len(codes) <= 1, response.text
            assert "internal_error" not in codes, response.text
            assert codes or len(stream.finish_reasons) == len(texts), response.text
            outcome = f"stream {codes}"
        else:
            completion = strict(ChatCompletion, response.json())
            texts = {choice.index: choice.message.content or "" for choice in completion.choices}
            assert all(choice.finish_reason for choice in completion.choices)
        for text in texts.values():
            tags = {*TAG.findall(text)}
            assert len(tags) <= 1, text
            for tag in tags:
                tab, exchange = map(int, tag.strip("[]").split("."))
                assert prompt in self._all_tabs[tab].fetches[exchange], (prompt, tag)
        return outcome

    async def _delete(self, session_id: str) -> None:
        try:
            response = await self._http.delete(f"/api/sessions/{quote(session_id, safe='')}")
            assert response.status_code in (200, 404, 405), response.text
        finally:
            self.running -= 1

    async def _bootstrap(self, action: str) -> None:
        try:
            response = await self._http.post("/api/bootstrap", json={"action": action})
            assert response.status_code < 500, response.text
        finally:
            self.running -= 1

    def _session_id(self, choice: int | str) -> str:
        """A text is itself; a number is a session of the pool, or one that is just being opened."""
        if isinstance(choice, str):
            return choice
        known = sorted(session_id for pool in self._program.pool for session_id in pool.sessions)
        for tab in self._all_tabs:
            known += [json.loads(body).get("id", "none") for body in tab.fetches.values()]
        return known[choice % len(known)] if known else "none"

    # ── Checks ──────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        assert self._program.pool.violations() == []

    async def settle(self) -> None:
        """Let everybody act on what has happened, as far as that needs no time to pass."""
        with trio.fail_after(PATIENCE_SECONDS):
            await trio.testing.wait_all_tasks_blocked(0.001)

    async def finish(self) -> None:
        """Everything comes to an end by itself; then nothing may be left, and the program must be as new."""
        program, pool = self._program, self._program.pool
        await self._until("every client is told something", lambda: not self.running)
        await self._http.post("/api/bootstrap", json={"action": "abort"})
        await self._until("bootstrap ends", lambda: program.bootstrap.phase not in ("running", "settling"))
        await self._until("no answer is under way", lambda: program.answers.active == 0)
        self._check_rest()
        for tab in self._all_tabs:
            await tab.stream.aclose()
        await self._until("the tabs are missed", lambda: not [*program.bridges])
        assert (await self._http.get("/health")).status_code == 200
        await self.connect(0, HELLO | {"account": "fresh"})
        await self._until("the fresh tab is ready", lambda: program.bridges.obstacle() is None)
        await self.chat(MODELS[1], {})
        await self._until("the fresh tab is asked", lambda: self._tabs[0].fetches)
        await self.answer(0, 0, "good", [])
        await self._until("the client is answered", lambda: not self.running)
        assert self.told[-1] == "whole", self.told
        await self._until("the answer is over", lambda: program.answers.active == 0)
        self._check_rest()
        await self._until("store and pool agree", lambda: self._stored() == self._pooled(), self._differ)
        assert {pool.of(model).model.id for model in MODELS} == {*MODELS}
        await self._http.aclose()

    def _check_rest(self) -> None:
        """Nothing is borrowed, held or waited for."""
        self.check()
        for pool in self._program.pool:
            assert (pool.limiter.borrowed_tokens, pool.waiting, pool.busy) == (0, 0, 0), pool
            assert not pool.leases | pool.waiters.keys()
            assert pool.idle == len(pool.sessions)
        assert [bridge.in_flight for bridge in self._program.bridges if bridge.in_flight] == []

    async def _until(self, what: str, condition: Any, told: Any = None) -> None:
        try:
            await until(condition, PATIENCE_SECONDS)
        except AssertionError:
            raise AssertionError(f"not true that {what}: {told() if told else self.told}") from None

    def _stored(self) -> set[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self._program.store.path)) as file:
            fields = "session_id, message_id, model_id, account, source"
            return {*file.execute(f"SELECT {fields} FROM sessions")}

    def _pooled(self) -> set[tuple[Any, ...]]:
        sessions = [session for pool in self._program.pool for session in pool.sessions.values()]
        return {
            (each.session_id, each.message_id, each.model_id, each.account, each.source) for each in sessions
        }

    def _differ(self) -> str:
        stored, pooled = self._stored(), self._pooled()
        return f"only stored: {stored - pooled}; only in the pool: {pooled - stored}"


# ── Steps ───────────────────────────────────────────────────────────────────────────────────────────────────

SLOT = st.sampled_from([0, 0, 0, 1, 1, 2])
# The tab that was asked last, or the one in this place.
ASKED = st.sampled_from([-1, -1, -1, -1, 0, 1, 2])
PICK = st.sampled_from([0, 0, 0, 1, 2, 3, 6, 7])
ACCOUNT = st.sampled_from([*["a"] * 6, *["b"] * 3, None, ""])
STATE = st.sampled_from([*["ready"] * 6, "verification", "sign_in", "loading"])
ODD_HELLOS = [
    None,
    HELLO | {"protocol": 2},
    HELLO | {"state": "napping"},
    {"type": "state", "state": "ready", "account": "a"},
    {"type": "news"},
    b"",
]
ODD_FRAMES: list[Any] = [
    HELLO,
    HELLO | {"account": "b"},
    *({"type": "pong"}, {"type": "pong", "t": "x"}, {"type": "pong", "t": []}),
    *({"type": "news", "id": [1]}, {"type": "fetch", "id": 1}, {"type": 7}, {}, [], 1, None),
    *("", "{", "nul", '{"type":"end","id":1}x', "[" * 3000, '{"type":"state","state":"\\ud800"}'),
    *({"type": "state", "state": "happy"}, {"type": "state"}, {"type": "models", "models": {}}),
    *({"type": "end"}, {"type": "end", "id": "1"}, {"type": "end", "id": 10**30}, {"type": "end", "id": -1}),
    *({"type": "response", "id": 1}, {"type": "response", "id": 1, "status": 200, "headers": {"a": 1}}),
    {"type": "error", "id": 1, "reason": "bored"},
    {"type": "captured", "session_id": 1, "message_id": "m"},
    *(b"", b"\0", struct.pack(">II", 1, 9) + b"short", struct.pack(">II", 1, 2**32 - 1), b"\xff" * 8),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELDS = "protocol state account models id status headers reason session_id message_id t".split()
# Mostly of the right types' names and of the wrong shapes.
ANY_FRAME = (
    st.fixed_dictionaries(
        {"type": st.sampled_from("hello state models captured response end uploaded error pong x".split())},
        optional=dict.fromkeys(FIELDS, JSON),
    )
    | st.binary(max_size=40)
    | st.text(max_size=20)
)
RAW = [
    *(b"\x00", b"\xff\xff\xff", b"\x81\x05hello", b"\x81\x85\0\0\0\0hel", b"GET / HTTP/1.1\r\n\r\n"),
    # Text that is not UTF-8, a control frame that is too long, a continuation of nothing, a huge one.
    *(b"\x81\x82\0\0\0\0\xff\xfe", b"\x89\xfe\x00\xff\0\0\0\0", b"\x80\x80\0\0\0\0"),
    *(b"\x82\xff\0\0\0\0\xff\xff\xff\xff\0\0\0\0", b"\x88\x81\0\0\0\0x", b"\x01\x81\0\0\0\0{"),
]
ENTRY = st.fixed_dictionaries(
    {"id": st.sampled_from([MODELS[0], NEW_MODEL]), "publicName": st.sampled_from(["x", "y"])},
    optional={
        "capabilities": st.sampled_from(
            [
                {"inputCapabilities": {"text": True}, "outputCapabilities": {"text": True}},
                {"outputCapabilities": {"search": True}},
                {},
                [],
                {"inputCapabilities": 1},
            ]
        )
    },
)
ODD_ENTRY: st.SearchStrategy[Any] = st.sampled_from(
    [1, None, {}, [], {"id": "2"}, {"id": 2, "publicName": "x"}, {"publicName": ""}]
)
HEADERS = st.sampled_from(
    [
        *({}, {"content-type": "application/json"}, {"content-type": "text/html"}),
        *({"retry-after": "0"}, {"retry-after": "9"}, {"retry-after": "nan"}, {"Retry-After": "soon"}),
        {"cf-mitigated": "challenge"},
    ]
)
STATUS = st.sampled_from(
    [*(401, 403, 404, 409, 413, 429, 429, 500, 503, 400, 422), *(0, -1, 204, 302, 10**30)]
)
KIND = st.sampled_from(["good", "good", "good", *BODIES])
PIECE = st.tuples(PICK, KIND, st.sampled_from([0, 0, 0, 3, 20]), st.sampled_from([999, 999, 8, 13, 0]))
SESSION = st.sampled_from([0, 0, 1, 2, 3, "s0", "s0", "s1", "", "a\0b", "../..", "{x}", "é%2F"])
MODEL = st.sampled_from([*MODELS * 3, NEW_MODEL])
CHAT = st.fixed_dictionaries(
    {"stream": st.booleans()},
    optional={"n": st.just(2), "stop": st.sampled_from(["STOP", ["more"]]), "max_tokens": st.just(3)},
)


def page_hello(state: str, account: str | None) -> dict[str, Any]:
    return HELLO | {"state": state, "account": account}


def page_state(state: str, account: str | None) -> dict[str, Any]:
    return {"type": "state", "state": state, "account": account}


def model_list(entries: list[Any]) -> dict[str, Any]:
    return {"type": "models", "models": entries}


def step(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *arguments)


CAPTURED_MODELS = [*MODELS, MODELS[0], NEW_MODEL, "left-out", None]
CAPTURED = st.fixed_dictionaries(
    {
        "message_id": st.sampled_from(["m1", "m2", ""]),
        "mode": st.sampled_from(["direct"] * 4 + ["battle", None]),
    }
)
# Each as often as it is worth; what ends a connection comes seldom.
STEPS = {
    step("chat", MODEL, CHAT): 10,
    step("answer", ASKED, PICK, KIND, st.lists(st.integers(1, 60), max_size=4)): 10,
    step("serve", ASKED): 3,
    step("refuse", ASKED, PICK, STATUS, HEADERS, st.sampled_from(["object", "page", "failed"])): 5,
    step("head", ASKED, PICK, st.just(200) | STATUS, HEADERS): 2,
    step("send_bytes", ASKED, st.lists(PIECE, max_size=3), st.sampled_from([0] * 9 + [1, 2**31])): 3,
    step("end", ASKED, PICK): 2,
    step("error", ASKED, PICK, st.sampled_from(["network", "aborted", "refused"])): 2,
    step("captured", SLOT, SESSION, st.sampled_from(CAPTURED_MODELS), ACCOUNT, CAPTURED): 5,
    step("connect", SLOT, st.builds(page_hello, STATE, ACCOUNT)): 4,
    step("connect", SLOT, st.sampled_from(ODD_HELLOS)): 1,
    step("say", SLOT, st.builds(page_state, STATE, ACCOUNT)): 2,
    step("say", SLOT, st.builds(model_list, st.lists(ENTRY | ODD_ENTRY, max_size=3))): 2,
    step("say", SLOT, st.sampled_from(ODD_FRAMES)): 1,
    step("say", SLOT, ANY_FRAME): 1,
    step("raw", SLOT, st.sampled_from(RAW)): 1,
    step("close", SLOT, st.sampled_from([1000, 1001, 1011, 4000])): 1,
    step("drop", SLOT): 1,
    step("silence", SLOT): 1,
    step("leave", PICK): 2,
    step("delete", SESSION): 2,
    step("bootstrap", st.sampled_from(["start", "start", "abort"])): 2,
    step("wait", st.sampled_from([0.0, 0.01, 0.05, 0.1])): 2,
}
KINDS_OF_STEP = [*STEPS]
STEP = st.sampled_from([at for at, weight in enumerate(STEPS.values()) for _ in range(weight)]).flatmap(
    KINDS_OF_STEP.__getitem__
)
# Whether everybody has the time to act on it before the next, and the step.
SCRIPT = st.lists(st.tuples(st.sampled_from([True, True, False]), STEP), min_size=8, max_size=25)
OPENED = ("captured", 0, "s0", MODELS[0], "a", {"message_id": "m0", "mode": "direct"})
FIRST = st.sampled_from(
    [[(True, ("connect", 0, HELLO)), (True, OPENED)], [(True, ("connect", 0, HELLO))], []]
)


class Watcher(logging.Handler):
    """Collects what the program reports of itself: errors that are no ApiError."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if (error or record.levelno >= logging.ERROR) and not isinstance(error, ApiError):
            self.found.append(logging.Formatter().format(record))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    logger, watcher = logging.getLogger("lmarena_proxy"), Watcher()
    logger.addHandler(watcher)
    try:
        yield
        assert watcher.found == []
    finally:
        logger.removeHandler(watcher)


async def play(directory: Path, steps: list[tuple[bool, tuple[Any, ...]]]) -> None:
    write_models(directory, (CLAUDE, DEEPSEEK))
    console = lmarena_proxy.Console(RichConsole(file=StringIO(), width=160), can_ask=False)
    program = Program(lmarena_proxy.parse_config(TABLES), directory, console)

    def assert_consistent(event: Event) -> None:
        program.assert_consistent(event)

    program.bus.subscribe(assert_consistent)
    async with trio.open_nursery() as nursery:
        await nursery.start(program.run)
        stage = Stage(nursery, program)
        for is_slow, (name, *arguments) in steps:
            with trio.fail_after(PATIENCE_SECONDS):
                await getattr(stage, name)(*arguments)
            if is_slow:
                await stage.settle()
            stage.check()
        await stage.finish()
        nursery.cancel_scope.cancel()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no setting, made as small as the settings."""
    monkeypatch.setattr(Relay, "PAUSES", (0.0,))
    monkeypatch.setattr(RateLimitGate, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(RateLimitGate, "SLOWEST", 50.0)
    monkeypatch.setattr(lmarena_proxy, "RELOAD_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(lmarena_proxy, "HELLO_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(lmarena_proxy, "CLOSE_TIMEOUT_SECONDS", 0.1)


@settings(
    max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(FIRST, SCRIPT)
def test_whatever_the_tabs_do_everybody_is_told_and_nothing_is_left(
    quick: None, ready: Any, steps: Any
) -> None:
    with tempfile.TemporaryDirectory() as directory, watched():
        trio.run(play, Path(directory), [*ready, *steps])
