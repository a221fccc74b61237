"""Settings that are off until somebody turns them on: stale sessions, battles, system messages, models."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import CLAUDE, DEEPSEEK, Rig, model_id, start, turns, until, user, whole

from demo.arena import Failure
from lmarena_proxy import (
    AnswerRequest,
    Catalog,
    Event,
    EventBus,
    Lease,
    Model,
    ModelsListed,
    PoolConfig,
    Position,
    Session,
    SessionPool,
    SessionRetired,
    Store,
    merge_system,
    read_chat,
)

MODEL = Model("1", "gpt")
HOUR = 3600.0


# ── pool.max_idle_hours ─────────────────────────────────────────────────────────────────────────────────────


class Desk:
    """A pool that gives up what was idle for ten hours, and what it tells."""

    def __init__(self, directory: Path, hours: float) -> None:
        self.store, self.bus, self.events = Store(directory), EventBus(), list[Event]()
        self.bus.subscribe(self.events.append)
        self.pool = SessionPool(Catalog([MODEL]), PoolConfig(max_idle_hours=hours), self.store, self.bus)
        self.pool.set_accounts({"mine"})

    async def add(
        self, name: str, used: float | None, *, created: float = 100, account: str = "mine"
    ) -> None:
        """A session that was opened and last used so many hours ago."""
        now = time.time()
        session = Session(name, f"{name}-last", MODEL.id, account, "bootstrap", now - created * HOUR)
        session.last_used_at = None if used is None else now - used * HOUR
        await self.pool.add(session)

    async def taken(self) -> str | None:
        lease = Lease("r", MODEL)
        await self.pool.acquire(lease)
        session = self.pool.take(lease, ("mine",))
        self.pool.release(lease)
        assert self.pool.violations() == []
        return session.session_id if session else None

    @property
    def retired(self) -> list[tuple[str, str]]:
        return [
            (event.session_id, event.reason) for event in self.events if isinstance(event, SessionRetired)
        ]


@asynccontextmanager
async def desk(directory: Path, hours: float = 10) -> AsyncIterator[Desk]:
    at = Desk(directory, hours)
    async with trio.open_nursery() as nursery:
        await nursery.start(at.store.run)
        yield at
        at.store.close()


async def test_a_stale_session_is_retired_with_its_reason_when_one_is_asked_for(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("old", used=49)
        await at.add("fresh", used=9)
        assert await at.taken() == "fresh"
        assert at.retired == [("old", "not used for 49 hours (pool.max_idle_hours)")]
        assert at.pool.missing(MODEL) == 3
        await at.store.settle()
    assert [each.session_id for each in Store(tmp_path).sessions()] == ["fresh"]


async def test_a_session_that_was_never_used_counts_from_its_opening(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("old", used=None, created=11)
        await at.add("fresh", used=None, created=9)
        assert await at.taken() == "fresh"
        assert [session_id for session_id, _ in at.retired] == ["old"]


async def test_nothing_is_retired_by_a_clock_alone_but_it_counts_as_missing(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("old", used=11)
        assert (at.pool.missing(MODEL), at.retired) == (4, [])
        assert at.pool.find("old")


async def test_when_all_are_stale_there_is_none_to_take(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("old", used=11)
        await at.add("older", used=12)
        assert await at.taken() is None
        assert len(at.retired) == 2


async def test_sessions_of_other_accounts_are_left_to_their_own(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("theirs", used=99, account="theirs")
        assert await at.taken() is None
        assert at.retired == []


async def test_a_session_that_is_being_used_is_not_retired(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("busy", used=9.9999)
        lease = Lease("r", MODEL)
        await at.pool.acquire(lease)
        session = at.pool.take(lease, ("mine",))
        assert session
        session.last_used_at = time.time() - 11 * HOUR
        at.pool.retire_stale(MODEL, ("mine",))
        assert (at.retired, at.pool.missing(MODEL)) == ([], 3)
        at.pool.note_use(session)
        at.pool.release(lease)
        assert await at.taken() == "busy"


@pytest.mark.parametrize(("hours", "created", "used"), [(0, 1e5, 1e5), (10, -50, -50)])
async def test_never_means_never_and_a_clock_that_was_set_back_retires_nothing(
    hours: float, created: float, used: float, tmp_path: Path
) -> None:
    async with desk(tmp_path, hours) as at:
        await at.add("old", used, created=created)
        assert await at.taken() == "old"
        assert at.retired == []


async def test_a_request_opens_the_replacement_and_only_that(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"pool": {"max_idle_hours": 1}}, filled=True)
    old = {*rig.pool(CLAUDE).sessions}
    for session in rig.pool(CLAUDE).sessions.values():
        session.created_at -= 2 * HOUR
    await trio.sleep(0.2)
    assert rig.calls == []  # Time alone brings no traffic.
    assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    assert [seen.kind for seen in rig.calls] == ["create"]
    assert {event.session_id for event in rig.event(SessionRetired)} == old
    [new] = rig.pool(CLAUDE).sessions
    assert new not in old
    assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    assert [seen.session_id for seen in rig.retries] == [new]


async def test_a_run_of_bootstrap_replaces_what_is_stale(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"pool": {"max_idle_hours": 1}}, filled=True)
    stale = [*rig.pool(DEEPSEEK).sessions.values()][:2]
    for session in stale:
        session.created_at -= 2 * HOUR
    await rig.fill()
    assert [seen.model_id for seen in rig.creates] == [model_id(DEEPSEEK)] * 2
    assert len(rig.pool(DEEPSEEK).sessions) == 4
    assert not {each.session_id for each in stale} & {*rig.pool(DEEPSEEK).sessions}


# ── pool.use_battles ────────────────────────────────────────────────────────────────────────────────────────

BATTLES = {"pool": {"use_battles": True}}


async def ask_at(rig: Rig, position: str) -> None:
    """A chat that has to be answered by the one session there is, on that side."""
    response = await rig.chat(CLAUDE, {"role": "system", "content": "Be brief"}, user("Which side?"))
    assert whole(response).choices[0].message.content == f"[{CLAUDE}] Which side?"
    seen = rig.calls[-1]
    assert (seen.kind, seen.status, seen.outcome) == ("retry", 200, "complete")
    positions = [message["participantPosition"] for message in seen.body["messages"]]
    assert positions == [position, position]


async def capture_b(rig: Rig) -> Session:
    """A conversation side by side whose other side is the first that the program sees something of."""
    outbox, rig.twin.outbox = rig.twin.outbox, None
    await rig.twin.chat_by_hand(CLAUDE, "by hand", "side-by-side")
    rig.twin.outbox = outbox
    await rig.twin.retry_by_hand("b")
    await until(lambda: rig.pool(CLAUDE).sessions)
    [session] = rig.pool(CLAUDE).sessions.values()
    return session


async def test_a_conversation_side_by_side_serves_for_the_side_that_was_captured(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=BATTLES)
    await rig.twin.chat_by_hand(CLAUDE, "by hand", "side-by-side")
    await until(lambda: rig.pool(CLAUDE).sessions)
    [session] = rig.pool(CLAUDE).sessions.values()
    await ask_at(rig, "a")
    # What the person does on the other side is not this session's.
    before = session.message_id
    await rig.twin.retry_by_hand("b")
    await rig.twin.follow_up("more")
    await until(lambda: session.message_id != before)
    assert rig.arena.sessions[session.session_id].message_id == session.message_id
    await ask_at(rig, "a")
    assert rig.pool(CLAUDE).sessions == {session.session_id: session}


async def test_the_other_side_is_captured_when_it_is_the_first_that_is_seen(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=BATTLES)
    session = await capture_b(rig)
    assert rig.arena.sessions[session.session_id].message_b_id == session.message_id
    await ask_at(rig, "b")
    assert Store(tmp_path / "state").sessions()[0].position == "b"


async def test_what_goes_on_after_the_other_side_s_answer_is_followed(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=BATTLES)
    session = await capture_b(rig)
    before = session.message_id
    await rig.twin.follow_up("more")
    await until(lambda: session.message_id != before)
    await ask_at(rig, "b")
    assert rig.pool(CLAUDE).sessions == {session.session_id: session}


async def test_a_side_that_the_site_does_not_take_is_given_up_for_another_session(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=BATTLES)
    await rig.twin.chat_by_hand(CLAUDE, "by hand", "side-by-side")
    await until(lambda: rig.pool(CLAUDE).sessions)
    rig.arena.switch(failures={"*": Failure(400, on="retry", times=1)})
    response = await rig.chat(CLAUDE, "Hello")
    assert whole(response).choices[0].message.content == f"[{CLAUDE}] Hello"
    assert [seen.status for seen in rig.calls[1:]] == [400, 200]
    assert [event.reason for event in rig.event(SessionRetired)] == ["the site answered 400"]
    assert {each.position for each in rig.pool(CLAUDE).sessions.values()} == {None}


async def test_a_battle_whose_model_nobody_knows_is_not_used(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables=BATTLES)
    await rig.twin.chat_by_hand(CLAUDE, "by hand", "battle")
    await rig.twin.retry_by_hand()
    await rig.twin.chat_by_hand(DEEPSEEK, "by hand")  # Told after it, so the first one has been looked at.
    await until(lambda: rig.pool(DEEPSEEK).sessions)
    assert not rig.pool(CLAUDE).sessions


@pytest.mark.parametrize("is_on", [False, True])
async def test_a_stored_session_of_a_battle_rests_while_they_are_not_used(
    is_on: bool, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    sides: tuple[Position | None, ...] = (None, "a", "b")
    for side in sides:
        session = Session(f"s-{side}", "m", MODEL.id, "mine", "captured", 1.0, position=side)
        assert store.add_now([session]) == 1
    pool = SessionPool(Catalog([MODEL]), PoolConfig(use_battles=is_on), store, EventBus())
    assert {*pool.of(MODEL.id).sessions} == ({"s-None", "s-a", "s-b"} if is_on else {"s-None"})
    assert len(store.sessions()) == 3


# ── requests.merge_system ───────────────────────────────────────────────────────────────────────────────────


def asked(*messages: tuple[str, Any]) -> AnswerRequest:
    listed = [{"role": role, "content": content} for role, content in messages]
    return read_chat(json.dumps({"model": "gpt", "messages": listed}).encode())


def said(asked: AnswerRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in asked.messages]


CARD: Sequence[tuple[str, Any]] = (
    ("system", "You are Seraphina."),
    ("user", "你好"),
    ("developer", ""),
    ("assistant", "Hm."),
    ("developer", "The room is dark."),
    ("user", "Who is there?"),
    ("system", "Answer in one line."),
)


def test_system_messages_become_one_at_the_front() -> None:
    merged = merge_system(asked(*CARD))
    assert said(merged) == [
        ("system", "You are Seraphina.\n\nThe room is dark.\n\nAnswer in one line."),
        ("user", "你好"),
        ("assistant", "Hm."),
        ("user", "Who is there?"),
    ]
    assert len(merged.paths) == len(merged.messages)
    assert merged.paths[:2] == ["messages[0].content", "messages[1].content"]


@pytest.mark.parametrize(
    "messages", [[("system", "a")], [("user", "b"), ("assistant", "c"), ("system", "a")]]
)
def test_an_empty_turn_ends_a_conversation_that_has_no_user_s_there(messages: list[tuple[str, str]]) -> None:
    merged = merge_system(asked(*messages))
    assert said(merged) == [("system", "a"), *messages[:-1], ("user", "")]
    assert merged.paths[-1] == "messages"


def test_an_empty_message_that_the_user_sent_stays() -> None:
    assert said(merge_system(asked(("system", "a"), ("user", "b"), ("user", ""))))[-1] == ("user", "")


def test_a_conversation_without_system_messages_stays_as_it_is() -> None:
    request = asked(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert merge_system(request) is request


def test_images_of_system_messages_go_with_them_under_their_path() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    text = {"type": "text", "text": "see"}
    request = merge_system(asked(("system", "a"), ("user", "b"), ("system", [text, picture]), ("user", "c")))
    assert said(request) == [("system", "a\n\nsee"), ("user", "b"), ("user", "c")]
    assert {path: count for path, count in request.images.items() if count} == {"messages[2].content": 1}


@pytest.mark.parametrize("is_on", [False, True])
async def test_the_site_gets_them_as_the_setting_says(
    is_on: bool, nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables={"requests": {"merge_system": is_on}})
    messages = [{"role": role, "content": content} for role, content in CARD]
    assert (await rig.chat(CLAUDE, *messages)).status_code == 200
    roles = [role for role, _ in turns(rig.calls[-1])]
    assert roles == (
        ["system", "user", "assistant", "user"]
        if is_on
        else ["system", "user", "system", "assistant", "system", "user", "system", "user"]
    )


# ── bridge.model_refresh_hours ──────────────────────────────────────────────────────────────────────────────


async def test_tabs_are_asked_for_their_model_list_that_often(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"bridge": {"model_refresh_hours": 0.2 / HOUR}})
    await until(lambda: len(rig.event(ModelsListed)) >= 4)
    assert rig.calls == []  # The site has nothing of it.


async def test_else_the_list_comes_once_with_the_page(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path)
    await until(lambda: rig.event(ModelsListed))
    listed = len(rig.event(ModelsListed))
    await trio.sleep(0.6)
    assert len(rig.event(ModelsListed)) == listed
