"""Bridges: real connections of tabs, who may connect, what ends a connection, and the rate limit's gate."""

import json
import math
import sqlite3
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket

from lmarena_proxy import (
    EXCHANGE_BUFFER_BYTES,
    HELLO_TIMEOUT_SECONDS,
    RELOAD_INTERVAL_SECONDS,
    Attachment,
    Bridge,
    BridgeConfig,
    BridgeConnected,
    BridgeError,
    BridgeListener,
    BridgeLost,
    BridgeRefused,
    Bridges,
    Catalog,
    Config,
    Event,
    EventBus,
    Exchange,
    ExchangeBroken,
    Head,
    Lease,
    Limits,
    Model,
    PoolConfig,
    RateLimited,
    RateLimitGate,
    Session,
    SessionPool,
    Store,
    Uploader,
)

ORIGIN = "https://lmarena.ai"
MODEL = Model("1", "gpt")
HELLO = {
    "type": "hello",
    "protocol": 1,
    "script": "1.0.0",
    "url": f"{ORIGIN}/",
    "state": "ready",
    "account": "mine",
}


class Tab:
    """The browser's end of a connection."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self.socket = socket

    async def say(self, frame: Any) -> None:
        await self.socket.send_message(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def hear(self, kind: str) -> dict[str, Any]:
        """The next frame of this type; pings and others are passed over."""
        while True:
            frame: dict[str, Any] = json.loads(await self.socket.get_message())
            if frame["type"] == kind:
                return frame

    async def closed(self) -> tuple[int, str]:
        """The code and reason with which the program closes."""
        with pytest.raises(trio_websocket.ConnectionClosed) as caught:
            await self.hear("nothing that is ever said")
        reason = caught.value.reason
        assert reason is not None
        return reason.code, reason.reason or ""


class Gateway:
    """The program's end: its bridges, and what they tell."""

    def __init__(self, directory: Path, config: Config) -> None:
        self.bus, self.events, self.port = EventBus(), list[Event](), 0
        self.bus.subscribe(self.events.append)
        self.store = Store(directory)
        self.pool = SessionPool(Catalog([MODEL]), PoolConfig(), self.store, self.bus)
        self.bridges = Bridges(config, self.bus, self.pool)
        self.listener = BridgeListener(config, self.bus, self.pool, self.bridges)

    @asynccontextmanager
    async def socket(self, origin: str | None = ORIGIN) -> AsyncIterator[Tab]:
        headers = [] if origin is None else [(b"Origin", origin.encode())]
        connect = partial(trio_websocket.open_websocket, use_ssl=False, extra_headers=headers)
        async with connect("127.0.0.1", self.port, "/") as socket:
            yield Tab(socket)

    @asynccontextmanager
    async def tab(self, **hello: Any) -> AsyncIterator[Tab]:
        """A tab that has said hello and was welcomed."""
        async with self.socket() as tab:
            await tab.say(HELLO | hello)
            await tab.hear("welcome")
            yield tab

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def bridge(self) -> Bridge:
        [bridge] = self.bridges
        return bridge

    async def until_told(self, kind: type[Event]) -> Any:
        while not self.told(kind):
            await trio.lowlevel.checkpoint()
        return self.told(kind)[-1]


@asynccontextmanager
async def gateway(tmp_path: Path, **settings: Any) -> AsyncIterator[Gateway]:
    made = Gateway(tmp_path, Config(bridge=BridgeConfig(port=0, **settings)))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.store.run)
        made.port = await nursery.start(made.listener.serve)
        try:
            yield made
        finally:
            made.store.close()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "origin",
    [
        "https://lmarena.ai",
        "https://beta.lmarena.ai",
        "https://a.b-c.lmarena.ai",
        "https://arena.ai",
        "https://www.arena.ai",
    ],
)
async def test_the_sites_origins_are_let_in(origin: str, tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.socket(origin) as tab:
        await tab.say(HELLO)
        assert (await tab.hear("welcome"))["protocol"] == 1


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "",
        "null",
        "https://lmarena.ai.evil.example",
        "https://evillmarena.ai",
        "https://evil.example/.lmarena.ai",
        "https://evil.example?.lmarena.ai",
        "https://user@evil.example#.lmarena.ai",
        "https://.lmarena.ai",
        "https://a..lmarena.ai",
        "https://lmarenaXai",
        "https://lmarena.ai:8443",
        "https://lmarena.ai/",
        "http://lmarena.ai",
        "wss://lmarena.ai",
        "lmarena.ai",
        "*",
        "https://*.lmarena.ai",
    ],
)
async def test_other_origins_are_refused_at_the_handshake(origin: str | None, tmp_path: Path) -> None:
    async with gateway(tmp_path) as at:
        with pytest.raises(trio_websocket.ConnectionRejected) as caught:
            async with at.socket(origin):
                pass
        assert caught.value.status_code == 403
        assert "allowed_origins" in at.told(BridgeRefused)[0].reason
        assert [*at.bridges] == []


async def test_an_origin_may_be_allowed_with_its_port(tmp_path: Path) -> None:
    async with gateway(tmp_path, allowed_origins=("http://localhost:8000",)) as at:
        async with at.socket("http://localhost:8000") as tab:
            await tab.say(HELLO)
            await tab.hear("welcome")
        with pytest.raises(trio_websocket.ConnectionRejected):
            async with at.socket("http://localhost:8001"):
                pass


async def test_a_tab_is_welcomed_and_noted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.socket() as tab:
        await tab.say(HELLO)
        welcome = await tab.hear("welcome")
        assert welcome["auth_cookie"] == "arena-auth-prod-v1"
        bridge = at.bridge()
        assert (bridge.is_ready, bridge.account, bridge.script) == (True, "mine", "1.0.0")
        assert repr(at.bridges) == "<Bridges: [<Bridge 1: ready, 0 in flight>]>"
        assert at.bridges.accounts() == {"mine"}
        assert at.bridges.obstacle() is None
        [shown] = at.bridges.snapshot()
        assert (shown["id"], shown["state"], shown["account"], shown["in_flight"]) == (1, "ready", "mine", 0)
        assert at.told(BridgeConnected)[0].url == f"{ORIGIN}/"


@pytest.mark.parametrize(
    ("state", "account", "code"),
    [
        ("loading", None, "bridge_unavailable"),
        ("verification", None, "human_verification_required"),
        ("sign_in", None, "sign_in_required"),
        ("ready", None, "sign_in_required"),
    ],
)
async def test_a_tab_that_is_not_ready_says_what_the_person_should_do(
    state: str, account: str | None, code: str, tmp_path: Path
) -> None:
    async with gateway(tmp_path) as at, at.tab(state=state, account=account) as tab:
        obstacle = at.bridges.obstacle()
        assert obstacle is not None
        assert obstacle.code == code
        waiting_ended = trio.Event()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                await at.bridges.wait_ready(60)
                waiting_ended.set()

            nursery.start_soon(wait)
            await tab.say({"type": "state", "state": "ready", "account": "mine"})
            await waiting_ended.wait()
        assert at.bridges.obstacle() is None


async def test_a_tab_that_leaves_is_told_of(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at:
        async with at.tab():
            assert at.bridges.obstacle() is None
        assert "1000" in (await at.until_told(BridgeLost)).reason
        obstacle = at.bridges.obstacle()
        assert obstacle is not None
        assert obstacle.state == "missing"


@pytest.mark.parametrize("protocol", [0, 2, 99])
async def test_another_protocol_is_told_to_reinstall(protocol: int, tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.socket() as tab:
        await tab.say(HELLO | {"protocol": protocol})
        code, reason = await tab.closed()
        assert code == 4001
        assert "reinstall" in reason
        assert [*at.bridges] == []


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "state", "state": "ready", "account": "mine"},
        {"type": "response", "id": 1, "status": 200},
        {"type": "models", "models": []},
        {"type": "pong", "t": 1},
    ],
)
async def test_nothing_comes_before_hello(frame: dict[str, Any], tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.socket() as tab:
        await tab.say(frame)
        assert (await tab.closed())[0] == 1003
        assert "unexpected frame" in (await at.until_told(BridgeRefused)).reason


async def test_hello_is_said_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        await tab.say(HELLO)
        code, reason = await tab.closed()
        assert code == 1003
        assert "'hello'" in reason


MALFORMED = [
    ("{", 1007),
    ('{"type":"state","state":"happy"}', 1003),
    ("[]", 1003),
    (struct.pack(">II", 1, 9) + b"short", 1003),
    (b"\0", 1003),
]


@pytest.mark.parametrize(("frame", "code"), MALFORMED)
async def test_a_malformed_frame_closes_its_connection_and_no_other(
    frame: str | bytes, code: int, tmp_path: Path
) -> None:
    async with gateway(tmp_path) as at, at.tab(account="other") as other, at.tab() as tab:
        broken, kept = max(at.bridges, key=lambda each: each.id), min(at.bridges, key=lambda each: each.id)
        with (
            kept.fetch("POST", "/api/stream/x", "") as going_on,
            broken.fetch("POST", "/api/stream/x", "") as lost,
        ):
            await tab.say(frame)
            closed = await tab.closed()
            assert closed[0] == code
            assert "malformed" in closed[1]
            with pytest.raises(ExchangeBroken) as caught:
                await lost.head()
            assert caught.value.reason == "lost"
            await other.say({"type": "response", "id": going_on.id, "status": 200})
            assert (await going_on.head()).status == 200
        assert [*at.bridges] == [kept]


async def test_frames_of_unknown_types_and_of_forgotten_exchanges_are_passed_over(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        for frame in ({"type": "news"}, {"type": "end", "id": 9}, struct.pack(">II", 9, 1) + b"x", b""):
            await tab.say(frame)
        with at.bridge().fetch("POST", "/api/stream/x", "b") as exchange:
            fetch = await tab.hear("fetch")
            await tab.say({"type": "response", "id": fetch["id"], "status": 204})
            assert (await exchange.head()).status == 204


IMAGE = Attachment("a.png", "image/png", "data:image/png;base64,iVBO")


async def test_an_upload_ends_with_an_address_or_as_a_fetch_does(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab(features=["upload", "news"]) as tab:
        assert at.bridge().can_upload
        with at.bridge().upload(IMAGE) as upload:
            frame = await tab.hear("upload")
            told = {"name": "a.png", "content_type": "image/png", "data": "iVBO"}
            assert frame == {"type": "upload", "id": upload.id, **told}
            await tab.say({"type": "uploaded", "id": upload.id, "url": "https://a/b"})
            assert await upload.address() == "https://a/b"
        with at.bridge().upload(IMAGE) as limited:
            await tab.say({"type": "response", "id": limited.id, "status": 429})
            await tab.say({"type": "end", "id": limited.id})
            assert await limited.address() == ""
            assert (await limited.head()).status == 429
            assert await limited.receive() == b""
        with at.bridge().upload(IMAGE) as empty:
            await tab.say({"type": "end", "id": empty.id})
            with pytest.raises(ExchangeBroken, match="before it began"):
                await empty.address()
        with at.bridge().upload(IMAGE) as left:
            pass
        assert await tab.hear("abort") == {"type": "abort", "id": left.id}
        with at.bridge().upload(IMAGE) as lost:
            await tab.socket.aclose()
            with pytest.raises(ExchangeBroken, match="the tab was lost"):
                await lost.address()


async def test_an_address_is_no_answer_of_a_fetch(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        assert not at.bridge().can_upload
        with at.bridge().fetch("POST", "/api/stream/x", "") as exchange:
            await tab.say({"type": "uploaded", "id": exchange.id, "url": "https://a/b"})
            with pytest.raises(ExchangeBroken, match="before it began"):
                await exchange.head()


async def test_the_pages_model_list_is_merged_whatever_else_it_holds(tmp_path: Path) -> None:
    entries = [1, {"id": "2"}, {"id": "2", "publicName": "new"}, {"id": "1", "publicName": "gpt-2"}]
    async with gateway(tmp_path) as at, at.tab() as tab:
        await tab.say({"type": "models", "models": entries})
        await tab.say({"type": "models", "models": []})
        with at.bridge().fetch("POST", "/api/stream/x", "") as exchange:
            await tab.say({"type": "end", "id": (await tab.hear("fetch"))["id"]})
            assert await exchange.receive() == b""
        assert [(model.id, model.name) for model in at.pool.catalog] == [("1", "gpt-2"), ("2", "new")]


async def test_a_model_list_of_another_shape_does_not_cost_the_tab_its_connection(tmp_path: Path) -> None:
    entry = {"id": "2", "publicName": "new", "capabilities": {"inputCapabilities": ["text"]}}
    async with gateway(tmp_path) as at, at.tab() as tab:
        await tab.say({"type": "models", "models": [entry]})
        with at.bridge().fetch("POST", "/api/stream/x", "") as exchange:
            await tab.say({"type": "end", "id": (await tab.hear("fetch"))["id"]})
            assert await exchange.receive() == b""


CAPTURED = {
    "type": "captured",
    "session_id": "s",
    "message_id": "m1",
    "model_id": "1",
    "mode": "direct",
    "account": "mine",
}


async def test_a_conversation_by_hand_joins_the_pool_and_follows_the_person(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        for mode, session_id in (("battle", "b"), ("side-by-side", "c"), (None, "d")):
            await tab.say(CAPTURED | {"mode": mode, "session_id": session_id})
        await tab.say(CAPTURED | {"session_id": "e", "model_id": "left-out"})
        await tab.say(CAPTURED | {"session_id": "f", "model_id": None})
        await tab.say(CAPTURED)
        while at.pool.find("s") is None:
            await trio.lowlevel.checkpoint()
        await tab.say(CAPTURED | {"message_id": "stolen", "account": "other"})
        await tab.say(CAPTURED | {"message_id": "m2", "model_id": None, "mode": None})
        session = at.pool.find("s")
        assert session is not None
        while session.message_id == "m1":
            await trio.lowlevel.checkpoint()
        assert (session.message_id, session.source, session.account) == ("m2", "captured", "mine")
        assert [*at.pool.of("1").sessions] == ["s"]


async def test_a_fetch_brings_head_and_bytes_in_order(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        bridge = at.bridge()
        with (
            bridge.fetch("PUT", "/api/stream/x", "你") as exchange,
            bridge.fetch("POST", "/api/stream/y", "") as other,
        ):
            fetch = await tab.hear("fetch")
            assert (fetch["method"], fetch["path"], fetch["body"]) == ("PUT", "/api/stream/x", "你")
            assert (await tab.hear("fetch"))["id"] != fetch["id"]
            await tab.say(
                {"type": "response", "id": exchange.id, "status": 200, "headers": {"content-type": "t"}}
            )
            assert await exchange.head() == Head(exchange.id, 200, {"content-type": "t"})
            await tab.say(struct.pack(">II", exchange.id, 2) + b"ab" + struct.pack(">II", other.id, 1) + b"z")
            await tab.say(struct.pack(">II", exchange.id, 1) + b"c")
            await tab.say({"type": "end", "id": exchange.id})
            body = b""
            while data := await exchange.receive():
                body += data
            assert body == b"abc"
            assert await other.receive() == b"z"
            assert bridge.in_flight == 2
        assert bridge.in_flight == 0
        # The one that had ended needs no abort.
        assert (await tab.hear("abort"))["id"] == other.id


@pytest.mark.parametrize("reason", ["network", "aborted", "refused"])
async def test_a_fetch_that_breaks_says_why(reason: str, tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        with at.bridge().fetch("POST", "/api/stream/x", "") as exchange:
            await tab.say({"type": "error", "id": exchange.id, "reason": reason, "message": "why"})
            with pytest.raises(ExchangeBroken, match="why") as caught:
                await exchange.receive()
            assert caught.value.reason == reason


async def test_a_tab_that_is_lost_breaks_its_fetches_and_those_that_come_too_late(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at:
        async with at.tab() as tab:
            bridge = at.bridge()
            with bridge.fetch("POST", "/api/stream/x", "") as exchange:
                await tab.socket.aclose()
                with pytest.raises(ExchangeBroken) as caught:
                    await exchange.receive()
                assert caught.value.reason == "lost"
        await at.until_told(BridgeLost)
        with bridge.fetch("POST", "/api/stream/x", "") as exchange, pytest.raises(ExchangeBroken) as caught:
            await exchange.head()
        assert caught.value.reason == "lost"


async def test_requests_go_to_the_least_busy_tab_of_their_account(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab(), at.tab(), at.tab(account="other"):
        first, second, other = sorted(at.bridges, key=lambda each: each.id)
        with first.fetch("POST", "/api/stream/x", ""):
            assert at.bridges.ready({"mine"})[0] is second
            with second.fetch("POST", "/api/stream/x", ""), second.fetch("POST", "/api/stream/x", ""):
                assert at.bridges.ready({"mine"})[0] is first
                assert at.bridges.ready({"mine", "other"})[0] is other


async def silence(clock: trio.testing.MockClock, seconds: float) -> None:
    """Let time pass while nothing arrives, and let everyone act on it."""
    await trio.testing.wait_all_tasks_blocked(0.02)
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.02)


async def test_a_tab_that_gives_no_sign_of_life_for_two_beats_is_lost(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with gateway(tmp_path) as at, at.tab():
        with at.bridge().fetch("POST", "/api/stream/x", "") as exchange:
            await silence(mock_clock, 20)
            assert at.told(BridgeLost) == []
            await silence(mock_clock, 20)
            # Both ends are of this process, so the closing handshake would still work: it is not waited for.
            with pytest.raises(ExchangeBroken) as caught:
                await exchange.head()
            assert caught.value.reason == "lost"
            await silence(mock_clock, 2)
        assert (await at.until_told(BridgeLost)).reason == "no sign of life for 40 s"


async def test_a_tab_that_answers_pings_stays(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with gateway(tmp_path, heartbeat_seconds=5) as at, at.tab() as tab:
        for _ in range(5):
            await silence(mock_clock, 5)
            await tab.say({"type": "pong", "t": (await tab.hear("ping"))["t"]})
        await silence(mock_clock, 0)
        assert at.told(BridgeLost) == []
        assert at.bridge().is_ready


async def test_a_connection_that_says_no_hello_is_closed(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with gateway(tmp_path) as at, at.socket() as tab:
        await silence(mock_clock, HELLO_TIMEOUT_SECONDS)
        assert (await at.until_told(BridgeRefused)).reason == "no hello"
        await tab.closed()
        assert [*at.bridges] == []


async def test_a_missing_tab_is_waited_for_from_when_it_went(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with gateway(tmp_path, reconnect_grace_seconds=30) as at:
        async with at.tab():
            await at.bridges.wait_ready(0)
        await at.until_told(BridgeLost)
        mock_clock.jump(20)
        mock_clock.autojump_threshold = 0
        started = trio.current_time()
        with pytest.raises(BridgeError) as caught:
            await at.bridges.wait_ready(120)
        mock_clock.autojump_threshold = float("inf")
        assert trio.current_time() - started == pytest.approx(10)
        assert (caught.value.http_status, caught.value.error_code) == (503, "bridge_unavailable")
        assert caught.value.retry_after == 5


async def test_a_challenge_asks_for_a_reload_at_most_once_a_minute(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with gateway(tmp_path, heartbeat_seconds=1000) as at, at.tab() as tab:
        bridge = at.bridge()
        at.bridges.note_challenge(bridge)
        at.bridges.note_challenge(bridge)
        assert bridge.state == "verification"
        assert "check" in (await tab.hear("reload"))["reason"]
        await tab.say({"type": "state", "state": "ready", "account": "mine"})
        while not bridge.is_ready:
            await trio.lowlevel.checkpoint()
        at.bridges.note_challenge(bridge)
        await silence(mock_clock, RELOAD_INTERVAL_SECONDS - 1)
        with trio.move_on_after(0):
            await tab.hear("reload")
            pytest.fail("a second reload within the minute")
        await silence(mock_clock, 1)
        await tab.hear("reload")


async def test_a_tab_that_does_not_come_back_from_the_check_counts_as_being_there(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with gateway(tmp_path) as at:
        async with at.tab() as tab:
            at.bridges.note_challenge(at.bridge())
            await tab.hear("reload")
        await at.until_told(BridgeLost)
        obstacle = at.bridges.obstacle()
        assert obstacle is not None
        assert obstacle.state == "verification"
        mock_clock.jump(121)
        obstacle = at.bridges.obstacle()
        assert obstacle is not None
        assert obstacle.state == "missing"


async def test_a_stale_sign_in_is_reloaded_once_and_then_the_persons_matter(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        bridge, states = at.bridge(), []

        async def refuse_401(*, reloads: bool = False) -> None:
            at.bridges.note_signed_out(bridge, "mine")
            states.append(bridge.state)
            if reloads:
                await tab.hear("reload")
            await tab.say({"type": "state", "state": "ready", "account": "mine"})
            while not bridge.is_ready:
                await trio.lowlevel.checkpoint()

        await refuse_401(reloads=True)
        await refuse_401()
        at.bridges.note_accepted("mine", a_lease("any"))
        await refuse_401()
        assert states == ["loading", "sign_in", "loading"]


async def test_a_refusal_that_comes_after_the_page_knows_reloads_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """The page was signed out; a call that was under way is answered 401 only then."""
    async with gateway(tmp_path, heartbeat_seconds=1000) as at, at.tab() as tab:
        bridge = at.bridge()
        for state, account in (("sign_in", None), ("ready", "other")):
            await tab.say({"type": "state", "state": state, "account": account})
            while (bridge.reported, bridge.account) != (state, account):
                await trio.lowlevel.checkpoint()
            at.bridges.note_signed_out(bridge, "mine")
            assert bridge.state == state
        await silence(mock_clock, RELOAD_INTERVAL_SECONDS)
        assert at.bridges.reloads == 0


async def test_an_upload_leaves_the_gate_that_it_went_through(tmp_path: Path) -> None:
    """The page signs in as somebody else meanwhile."""
    limits = Limits(60, 60, 60, 60, 60, 60, 60, attempts=1)
    image = Attachment("a.png", "image/png", "data:image/png;base64,AAAA")
    async with gateway(tmp_path) as at, at.tab(features=["upload"]) as tab, trio.open_nursery() as nursery:
        gate, lease = at.bridges.gate("mine"), a_lease()
        gate.refuse(1)
        way = Uploader(at.bridges).way(lease, limits)
        assert way is not None
        nursery.start_soon(way, image)
        upload = await tab.hear("upload")
        assert not gate.is_open
        await tab.say({"type": "state", "state": "ready", "account": "other"})
        await tab.say({"type": "uploaded", "id": upload["id"], "url": "https://storage.example/a.png"})
        await opened(gate)


async def test_a_rate_limit_is_told_once_and_holds_for_the_account_alone(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab():
        for _ in range(3):
            at.bridges.note_rate_limit("mine", None)
        assert [event.seconds for event in at.told(RateLimited)] == [pytest.approx(5, abs=0.1)]
        assert not at.bridges.gate("mine").is_open
        assert at.bridges.gate("other").is_open


async def test_an_exchange_that_nobody_reads_is_given_up_alone() -> None:
    full, other = Exchange(1), Exchange(2)
    for _ in range(EXCHANGE_BUFFER_BYTES >> 20):
        full.feed(b"x" * (1 << 20))
    assert not full.is_over
    full.feed(b"x")
    other.begin(Head(2, 200))
    other.feed(b"y")
    assert full.is_over
    assert await other.receive() == b"y"


async def test_an_exchange_that_is_read_takes_more_than_its_buffer() -> None:
    exchange = Exchange(1)
    exchange.begin(Head(1, 200))
    for _ in range(40):
        exchange.feed(b"x" * (1 << 20))
        assert len(await exchange.receive()) == 1 << 20
    exchange.end()
    assert await exchange.receive() == b""
    assert repr(exchange) == "<Exchange 1: ended, 0 bytes waiting>"


def a_lease(name: str = "r") -> Lease:
    return Lease(name, MODEL)


def a_gate() -> RateLimitGate:
    return RateLimitGate(trio.lowlevel.ParkingLot())


async def opened(gate: RateLimitGate) -> None:
    while not gate.is_open:
        with trio.move_on_after(gate.seconds or math.inf):
            await gate._changed.park()


async def test_refusals_without_retry_after_double_from_five_seconds_to_five_minutes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, pauses = a_gate(), []
    for _ in range(9):
        started = trio.current_time()
        await opened(gate)
        pauses.append(round(trio.current_time() - started, 6))
        lease = a_lease()
        gate.enter(lease)
        gate.refuse(None)
        gate.leave(lease)
    assert pauses == [0, 5, 10, 20, 40, 80, 160, 300, 300]


async def test_a_success_ends_the_doubling(autojump_clock: trio.testing.MockClock) -> None:
    gate = a_gate()
    for _ in range(3):
        gate.refuse(None)
        await trio.sleep(gate.seconds)
    probe = a_lease("probe")
    gate.enter(probe)
    gate.accept(a_lease("sent before"))
    assert not gate.is_open
    gate.accept(probe)
    await trio.sleep(1 / gate.SLOWEST)
    assert gate.is_open
    assert gate.refuse(None) == pytest.approx(5)


async def test_retry_after_wins_over_the_doubling(autojump_clock: trio.testing.MockClock) -> None:
    gate = a_gate()
    assert gate.refuse(42) == pytest.approx(42)
    assert repr(gate) == "<RateLimitGate: closed for 42.0 s>"
    await trio.sleep(42)
    assert gate.refuse(None) == pytest.approx(10)


async def test_a_herd_of_refusals_counts_once(autojump_clock: trio.testing.MockClock) -> None:
    gate = a_gate()
    for _ in range(8):
        await trio.sleep(0.1)
        gate.refuse(None)
    await trio.sleep(gate.seconds)
    assert gate.refuse(None) == pytest.approx(10)


async def test_a_later_refusal_of_the_herd_never_shortens_the_pause(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = a_gate()
    gate.refuse(60)
    assert gate.refuse(1) == pytest.approx(60)


async def test_a_retry_after_of_nothing_still_makes_a_pause(autojump_clock: trio.testing.MockClock) -> None:
    """Otherwise a request goes round in a circle without a pause: 429, free, 429, ..."""
    gate = a_gate()
    assert gate.refuse(0) > 0
    assert not gate.is_open


async def test_after_the_pause_one_goes_first_and_the_others_when_the_site_took_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, passed = a_gate(), list[tuple[str, float]]()
    gate.refuse(None)

    async def go(name: str) -> None:
        await opened(gate)
        lease = a_lease(name)
        gate.enter(lease)
        passed.append((name, round(trio.current_time(), 3)))
        await trio.sleep(2)
        gate.accept(lease)
        gate.leave(lease)

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(go, str(number))
    times = [at - started for _, at in passed]
    assert times[0] == pytest.approx(5, abs=0.01)
    assert times[1] == pytest.approx(7, abs=0.01)
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    assert all(0.5 < gap <= 1 / gate.SLOWEST for gap in gaps), times


async def test_a_refusal_halves_the_pace_and_what_the_site_takes_raises_it_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = a_gate()

    async def send(count: int) -> float:
        """Returns how many went out a second."""
        started = trio.current_time()
        for _ in range(count):
            await opened(gate)
            gate.enter(lease := a_lease())
            gate.accept(lease)
            gate.leave(lease)
            await trio.sleep(0.1 if gate.pace == math.inf else 0)
        return count / (trio.current_time() - started)

    assert await send(100) == pytest.approx(10, rel=0.05)
    gate.refuse(5)
    gate.refuse(5)  # Of the same herd: counts once.
    await trio.sleep(gate.seconds)
    assert gate.pace == pytest.approx(5, rel=0.1)
    slowed = await send(5)
    assert slowed < 8
    faster = await send(10)
    assert slowed < faster
    await send(10)
    assert gate.pace == math.inf
    for _ in range(20):
        gate.refuse(1)
        await trio.sleep(gate.seconds)
    assert gate.pace == gate.SLOWEST


async def test_a_probe_that_ends_without_a_result_makes_place_for_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = a_gate()
    gate.refuse(None)
    await trio.sleep(5)
    probe = a_lease()
    gate.enter(probe)
    assert not gate.is_open
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened, gate)
        await trio.testing.wait_all_tasks_blocked()
        gate.leave(probe)
    assert gate.is_open


async def test_a_refused_probe_closes_the_gate_for_twice_as_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, probe = a_gate(), a_lease()
    gate.refuse(None)
    await opened(gate)
    gate.enter(probe)
    gate.refuse(None)
    gate.leave(probe)
    assert gate.seconds == pytest.approx(10)


# ── A conversation told of twice ────────────────────────────────────────────────────────────────────────────


async def stored_and_pooled(at: Gateway) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """What store and pool hold, once all that is queued is on the disk."""
    flush = Session("flush", "m", "1", "x", "captured", created_at=0.0)
    assert await at.store.save(flush)
    at.store.remove(flush)
    await trio.testing.wait_all_tasks_blocked(0.05)
    with sqlite3.connect(at.store.path) as file:
        rows = file.execute(
            "SELECT session_id, message_id, model_id, account FROM sessions WHERE session_id != 'flush'"
        )
        stored = {*rows}
    sessions = [session for pool in at.pool for session in pool.sessions.values()]
    return stored, {(each.session_id, each.message_id, each.model_id, each.account) for each in sessions}


@pytest.mark.parametrize("second", [{"account": "other"}, {"model_id": "2"}, {"message_id": "m2"}, {}])
async def test_a_conversation_told_of_twice_at_once_is_the_same_in_store_and_pool(
    second: dict[str, str], tmp_path: Path
) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        at.pool.merge_models([Model("2", "two")])
        await tab.say(CAPTURED)
        await tab.say(CAPTURED | second)
        while at.pool.find("s") is None:
            await trio.lowlevel.checkpoint()
        stored, pooled = await stored_and_pooled(at)
        assert stored == pooled
        [(_, message_id, model_id, account)] = stored
        assert (model_id, account) == (CAPTURED["model_id"], CAPTURED["account"])
        assert message_id == second.get("message_id", CAPTURED["message_id"])


async def test_a_conversation_retired_while_it_is_told_of_again_is_the_same_in_both(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at, at.tab() as tab:
        await tab.say(CAPTURED)
        await tab.say(CAPTURED)
        while (session := at.pool.find("s")) is None:
            await trio.lowlevel.checkpoint()
        at.pool.retire(session, "by the person")
        stored, pooled = await stored_and_pooled(at)
        assert stored == pooled


async def test_another_account_s_claim_to_a_session_is_not_believed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as at:
        for account in ("mine", "other"):
            await at.pool.add(Session("s", "m1", "1", account, "captured", created_at=0.0))
        assert await stored_and_pooled(at) == ({("s", "m1", "1", "mine")}, {("s", "m1", "1", "mine")})
