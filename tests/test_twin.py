"""The Python twin against the stand-in arena, with a scripted program at the other end of the bridge."""

import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio_websocket

from demo import contract
from demo.arena import Arena, serve
from demo.twin import Twin, may_relay

TEXT_MODEL = "00000000-0000-4000-8000-000000000001"
MODELS: list[dict[str, Any]] = [
    {
        "id": TEXT_MODEL,
        "publicName": "echo",
        "capabilities": {"inputCapabilities": {"text": True}, "outputCapabilities": {"text": True}},
    },
    {
        "id": "00000000-0000-4000-8000-000000000002",
        "publicName": '<painter> "quoted" 画家',
        "capabilities": {"inputCapabilities": {"text": True}, "outputCapabilities": {"image": True}},
    },
]


class Program:
    """A scripted program: it accepts bridges and keeps what they say."""

    def __init__(self, *, welcome: bool = True) -> None:
        self.welcome = welcome
        self.origins: list[str] = []
        self.hellos: list[dict[str, Any]] = []
        self.connection: trio_websocket.WebSocketConnection | None = None
        self.closings: list[int] = []
        self.to_test, self.frames = trio.open_memory_channel[Any](10_000)
        self.url = ""

    async def accept(self, request: trio_websocket.WebSocketRequest) -> None:
        self.origins.append(dict(request.headers)[b"origin"].decode())
        connection = await request.accept()
        hello = json.loads(await connection.get_message())
        self.hellos.append(hello)
        if not self.welcome:
            await connection.aclose(4001, "install the script again")
            return
        self.connection = connection
        await self.send(
            {"type": "welcome", "protocol": 1, "version": "t", "auth_cookie": contract.AUTH_COOKIE}
        )
        await self.to_test.send(hello)
        try:
            while True:
                frame = await connection.get_message()
                await self.to_test.send(frame if isinstance(frame, bytes) else json.loads(frame))
        except trio_websocket.ConnectionClosed as closed:
            self.closings.append(closed.reason.code if closed.reason else 1006)

    async def send(self, message: dict[str, Any]) -> None:
        assert self.connection is not None
        await self.connection.send_message(json.dumps(message))

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next message of that type; others before it are dropped."""
        while True:
            frame = await self.frames.receive()
            if isinstance(frame, dict) and frame["type"] == kind:
                return frame

    async def exchange(self, fetch_id: int) -> tuple[dict[str, Any] | None, bytes, dict[str, Any]]:
        """Head, body and closing message of one relayed fetch, which must come in this order."""
        head, body = None, b""
        while True:
            frame = await self.frames.receive()
            if isinstance(frame, bytes):
                assert head is not None
                body += b"".join(content for number, content in records(frame) if number == fetch_id)
            elif frame.get("id") == fetch_id and frame["type"] == "response":
                head = frame
            elif frame.get("id") == fetch_id:
                return head, body, frame


def records(frame: bytes) -> list[tuple[int, bytes]]:
    found = []
    while frame:
        number, length = struct.unpack(">II", frame[:8])
        found.append((number, frame[8 : 8 + length]))
        assert len(found[-1][1]) == length
        frame = frame[8 + length :]
    return found


class World:
    """An arena, a program and a twin that are connected."""

    def __init__(self, arena: Arena, program: Program, twin: Twin, nursery: trio.Nursery) -> None:
        self.arena, self.program, self.twin, self.nursery = arena, program, twin, nursery

    async def connect(self) -> dict[str, Any]:
        """Start the twin; returns its hello."""
        await self.nursery.start(self.twin.run)
        return await self.program.expect("hello")

    async def sign_in(self) -> None:
        await self.twin.open_page()
        await self.twin.accept_terms()


@asynccontextmanager
async def world(program: Program | None = None) -> AsyncIterator[World]:
    arena, program = Arena(MODELS), program or Program()
    async with trio.open_nursery() as nursery:
        arena_url = await nursery.start(partial(serve, arena))
        bridge = await nursery.start(trio_websocket.serve_websocket, program.accept, "127.0.0.1", 0, None)
        program.url = f"ws://127.0.0.1:{bridge.port}/"
        twin = Twin(arena_url, program.url, backoff_seconds=(0.01, 0.05))
        yield World(arena, program, twin, nursery)
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - real sockets give no event to wait for
            await trio.sleep(0.001)


def create_fetch(fetch_id: int, text: str = "Hi", session_id: str | None = None) -> dict[str, Any]:
    session_id = session_id or contract.uuid7()
    body = {
        "id": session_id,
        "mode": "direct",
        "modelAId": TEXT_MODEL,
        "userMessageId": contract.uuid7(),
        "modelAMessageId": contract.uuid7(),
        "modality": "chat",
        "userMessage": {"content": text, "experimental_attachments": [], "metadata": {}},
    }
    path = "/nextjs-api/stream/create-evaluation"
    return {"type": "fetch", "id": fetch_id, "method": "POST", "path": path, "body": json.dumps(body)}


async def test_hello_comes_first_with_the_origin_the_state_and_no_account() -> None:
    async with world() as w:
        hello = await w.connect()
        assert w.program.origins == ["https://lmarena.ai"]
        assert hello["protocol"] == 1
        assert hello["state"] == "sign_in"
        assert hello["account"] is None


async def test_person_passes_check_and_terms_and_the_program_hears_each_state() -> None:
    async with world() as w:
        w.arena.switch(check=True)
        assert (await w.connect())["state"] == "verification"
        assert await w.twin.pass_check() == "sign_in"
        assert (await w.program.expect("hello"))["state"] == "sign_in"
        assert await w.twin.accept_terms() == "ready"
        hello = await w.program.expect("hello")
        user_id = next(iter(w.arena.accounts.values()))
        assert hello["account"] == hashlib.sha256(user_id.encode()).hexdigest()
        assert await w.twin.sign_out() == "sign_in"
        assert (await w.program.expect("hello"))["account"] is None


@pytest.mark.parametrize("unescaped", [False, True])
@pytest.mark.parametrize("split", [False, True])
async def test_models_are_found_in_both_forms_of_the_page(unescaped: bool, split: bool) -> None:
    async with world() as w:
        w.arena.switch(unescaped_models=unescaped, split_cookie=split)
        await w.sign_in()
        assert (await w.connect())["state"] == "ready"
        assert (await w.program.expect("models"))["models"] == MODELS
        await w.program.send({"type": "send_models"})
        assert (await w.program.expect("models"))["models"] == MODELS


async def test_fetch_is_relayed_with_head_body_and_end() -> None:
    async with world() as w:
        w.arena.switch(chunk_bytes=1)
        await w.sign_in()
        await w.connect()
        await w.program.send(create_fetch(7, "héllo 世界 🙂"))
        head, body, last = await w.program.exchange(7)
        assert head is not None
        assert head["status"] == 200
        assert head["headers"] == {"content-type": "text/plain; charset=utf-8"}
        assert last == {"type": "end", "id": 7}
        text = "".join(json.loads(line[3:]) for line in body.decode().split("\n") if line.startswith("a0:"))
        assert text == "[echo] héllo 世界 🙂"


async def test_many_fetches_run_at_once_and_none_mixes_with_another() -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        w.arena.switch(hang_after_lines=100)
        for number in range(200):
            await w.program.send(create_fetch(number, f"number {number}."))
        await until(lambda: w.arena.running_all.now["all"] == 200)
        bodies: dict[int, bytes] = dict.fromkeys(range(200), b"")
        while not all(b'."\n' in body for body in bodies.values()):
            frame = await w.program.frames.receive()
            for number, content in records(frame) if isinstance(frame, bytes) else []:
                bodies[number] += content
        for number, body in bodies.items():
            lines = [line for line in body.decode().split("\n") if line.startswith("a0:")]
            assert "".join(json.loads(line[3:]) for line in lines) == f"[echo] number {number}."


@pytest.mark.parametrize("waiting", [{"latency_seconds": 3600.0}, {"hang_after_lines": 1}])
async def test_abort_reaches_the_arena_and_is_answered(waiting: dict[str, Any]) -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        w.arena.switch(**waiting)
        await w.program.send(create_fetch(1))
        await until(lambda: w.arena.running_all.now["all"] == 1)
        await w.program.send({"type": "abort", "id": 1})
        last = (await w.program.exchange(1))[2]
        assert (last["type"], last["reason"]) == ("error", "aborted")
        await until(lambda: w.arena.record[0].outcome == "aborted")


async def test_retry_after_and_challenge_headers_are_passed_on() -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        w.arena.switch(rate_limit_after=0, retry_after=3)
        await w.program.send(create_fetch(1))
        head, _, last = await w.program.exchange(1)
        assert head is not None
        assert head["status"] == 429
        assert head["headers"]["retry-after"] == "3"
        assert last["type"] == "end"
        w.arena.require_check()
        await w.program.send(create_fetch(2))
        head, body, _ = await w.program.exchange(2)
        assert head is not None
        assert head["status"] == 403
        assert head["headers"]["cf-mitigated"] == "challenge"
        assert b"Just a moment..." in body


@pytest.mark.parametrize(
    "path",
    [
        "/nextjs-api/sign-out",
        "https://example.com/nextjs-api/stream/create-evaluation",
        "/nextjs-api/stream/../sign-out",
        "/nextjs-api/stream/%2e%2e/sign-out",
    ],
)
async def test_other_paths_are_refused(path: str) -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        await w.program.send({"type": "fetch", "id": 1, "method": "POST", "path": path, "body": ""})
        head, _, last = await w.program.exchange(1)
        assert head is None
        assert (last["type"], last["reason"]) == ("error", "refused")
        assert w.arena.record == []


def test_both_prefixes_may_be_relayed() -> None:
    assert may_relay("/nextjs-api/stream/x")
    assert may_relay("/api/stream/x")
    assert not may_relay("/api/streams")


async def test_arena_that_is_gone_is_a_network_error() -> None:
    async with world() as w:
        w.twin.http.base_url = "http://127.0.0.1:9"
        w.twin.html = "<title>gone</title>"
        await w.connect()
        await w.program.send(create_fetch(1))
        last = (await w.program.exchange(1))[2]
        assert (last["type"], last["reason"]) == ("error", "network")


async def test_reload_ends_the_connection_aborts_its_fetches_and_says_hello_again() -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        w.arena.switch(hang_after_lines=0)
        await w.program.send(create_fetch(1))
        await until(lambda: w.arena.running_all.now["all"] == 1)
        w.arena.sign_out_everyone()
        await w.program.send({"type": "reload", "reason": "the sign-in is stale"})
        assert (await w.program.expect("hello"))["state"] == "sign_in"
        await until(lambda: w.arena.record[0].outcome == "aborted")
        assert w.program.closings == [1001]


async def test_stale_sign_in_that_can_be_renewed_is_ready_after_a_reload() -> None:
    async with world() as w:
        await w.sign_in()
        account = (await w.connect())["account"]
        w.arena.expire_sign_ins()
        await w.program.send({"type": "reload", "reason": "the sign-in is stale"})
        hello = await w.program.expect("hello")
        assert (hello["state"], hello["account"]) == ("ready", account)


async def test_ping_is_answered_with_its_time() -> None:
    async with world() as w:
        await w.connect()
        await w.program.send({"type": "something new"})
        await w.program.send({"type": "ping", "t": 12.5})
        assert (await w.program.expect("pong"))["t"] == 12.5


async def test_lost_connection_is_made_again() -> None:
    async with world() as w:
        await w.connect()
        assert w.program.connection is not None
        await w.program.connection.aclose()
        assert (await w.program.expect("hello"))["protocol"] == 1


async def test_other_protocol_ends_the_twin() -> None:
    async with world(Program(welcome=False)) as w:
        await w.twin.run()
        assert len(w.program.hellos) == 1


async def test_chat_by_hand_is_captured_and_can_be_retried_by_the_program() -> None:
    async with world() as w:
        await w.sign_in()
        account = (await w.connect())["account"]
        assert 'a0:"[echo] o"' in await w.twin.chat_by_hand("echo", "one")
        first = await w.program.expect("captured")
        await w.twin.follow_up("two")
        second = await w.program.expect("captured")
        await w.twin.retry_by_hand()
        third = await w.program.expect("captured")
        assert first["session_id"] == second["session_id"]
        assert first["message_id"] != second["message_id"]
        assert third == second
        assert (first["model_id"], first["mode"], first["account"]) == (TEXT_MODEL, "direct", account)
        assert [seen.outcome for seen in w.arena.record] == ["complete"] * 3


async def test_answer_that_failed_is_not_captured() -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        w.arena.switch(a3="no", trouble_times=1)
        await w.twin.chat_by_hand("echo", "one")
        await w.twin.chat_by_hand("echo", "two")
        assert (await w.program.expect("captured"))["session_id"] == w.arena.record[1].session_id


@pytest.mark.parametrize("mode", ["side-by-side", "battle"])
async def test_other_modes_are_captured_with_their_mode(mode: str) -> None:
    async with world() as w:
        await w.sign_in()
        await w.connect()
        answer = await w.twin.chat_by_hand("echo", "one", mode)
        assert "\nb0:" in answer
        captured, beside = [await w.program.expect("captured") for _ in "ab"]
        assert (captured["mode"], captured["position"]) == (mode, "a")
        assert (beside["mode"], beside["position"]) == (mode, "b")
        assert [line for line in (await w.twin.retry_by_hand("b")).split("\n") if line.startswith("a")] == []
        other = await w.program.expect("captured")
        assert other == beside
        assert other["session_id"] == captured["session_id"]
        assert other["message_id"] != captured["message_id"]
