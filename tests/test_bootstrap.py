"""Bootstrap inside the test, against the stand-in arena: what is opened, what pauses it, what ends it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio
import trio.testing
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    IMAGE,
    RAY,
    SEARCH,
    Held,
    Rig,
    Tables,
    check_error,
    eventually,
    model_id,
    start,
    until,
)

from demo.arena import Failure, Switches
from demo.twin import Twin
from lmarena_proxy import (
    PHASES,
    Bootstrap,
    BootstrapRun,
    Bridge,
    Bridges,
    Catalog,
    Config,
    EventBus,
    Exchange,
    Head,
    Model,
    ModelSkipped,
    Phase,
    PhaseChanged,
    RateLimited,
    Relay,
    Session,
    SessionOpened,
    SessionPool,
    Store,
)

FOUR = (CLAUDE, DEEPSEEK, GPT, SEARCH)


def opened_well(rig: Rig) -> Counter[str | None]:
    return Counter(seen.model_id for seen in rig.creates if seen.outcome == "complete")


def four_each(*names: str) -> Counter[str | None]:
    return Counter({model_id(name): 4 for name in names})


async def phase(rig: Rig, wanted: str) -> Any:
    async def reached() -> Any:
        state = (await rig.state())["bootstrap"]
        return state if state["phase"] == wanted else None

    return await eventually(reached)


# ── What is opened ──────────────────────────────────────────────────────────────────────────────────────────


async def test_only_what_the_store_lacks_is_opened(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK))
    for _ in range(3):
        assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    assert len(rig.creates) == 1  # one conversation, used in turn
    rig.arena.record.clear()
    await rig.fill()
    assert opened_well(rig) == {model_id(CLAUDE): 3, model_id(DEEPSEEK): 4}
    assert (await rig.state())["bootstrap"]["planned"] == 7


async def test_a_second_run_opens_only_what_is_missing_since(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    gone = [*rig.pool(CLAUDE).sessions][:2]
    for session_id in gone:
        assert (await rig.http.delete(f"/api/sessions/{session_id}")).status_code == 200
    await rig.fill()
    assert opened_well(rig) == {model_id(CLAUDE): 2}
    state = (await rig.state())["bootstrap"]
    assert (state["opened"], state["planned"], state["skipped"]) == (2, 2, [])
    await rig.fill()
    assert len(rig.creates) == 2
    assert (await rig.state())["bootstrap"]["planned"] == 0


async def test_a_new_process_finds_the_conversations_of_the_last_one(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async with trio.open_nursery() as first:
        rig = await start(first, tmp_path, models=(CLAUDE,), filled=True)
        sessions = {(each.session_id, each.message_id) for each in rig.pool(CLAUDE).sessions.values()}
        arena = rig.arena
        cookies = rig.twin.http.cookies
        first.cancel_scope.cancel()
    again = await start(nursery, tmp_path, models=(CLAUDE,), arena=arena, connected=False)
    again.twin.http.cookies = cookies
    await again.connect()
    assert {(each.session_id, each.message_id) for each in again.pool(CLAUDE).sessions.values()} == sessions
    await again.fill()
    assert again.creates == []
    assert (await again.chat(CLAUDE, "Hello")).status_code == 200
    assert [seen.kind for seen in again.calls] == ["retry"]


async def test_another_account_gets_conversations_of_its_own(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    await rig.twin.sign_out()
    await until(lambda: rig.program.bridges.obstacle() is not None)
    await rig.make_ready()
    await rig.fill()
    assert opened_well(rig) == four_each(CLAUDE)
    assert len(rig.pool(CLAUDE).sessions) == 8
    used = {seen.session_id for seen in rig.creates}
    for _ in range(5):
        assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    assert {seen.session_id for seen in rig.retries} <= used
    assert {seen.status for seen in rig.calls} == {200}


async def test_models_that_need_an_image_are_left_for_requests(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(EDIT, RAY, IMAGE, SEARCH))
    await rig.fill()
    text_to_video = next(model.id for model in rig.program.pool.catalog.named(RAY) if not model.takes_image)
    assert opened_well(rig) == {text_to_video: 4, model_id(IMAGE): 4, model_id(SEARCH): 4}
    assert len(rig.creates) == 12
    assert (await rig.state())["bootstrap"]["skipped"] == []
    assert "on demand" in rig.output


async def test_a_model_never_has_more_openings_at_once_than_tokens(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"bootstrap": {"concurrency": 16}, "pool": {"sessions_per_model": 3}}
    switches = Switches(latency_seconds=0.2)
    rig = await start(nursery, tmp_path, models=FOUR, tables=tables, switches=switches)
    await rig.fill()
    stats = rig.arena.stats()
    assert stats["creates"] == 12
    assert all(most <= 3 for most in stats["max_running_by_model"].values())
    assert stats["max_running"] <= 16


async def test_all_openings_together_keep_to_the_global_limit(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"bootstrap": {"concurrency": 2}}
    switches = Switches(latency_seconds=0.05)
    rig = await start(nursery, tmp_path, models=FOUR, tables=tables, switches=switches)
    await rig.fill()
    assert rig.arena.stats()["max_running"] == 2
    assert opened_well(rig) == four_each(*FOUR)


async def test_the_first_conversation_of_every_model_comes_before_any_second(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=FOUR, tables={"bootstrap": {"concurrency": 1}})
    await rig.fill()
    order = [seen.model_id for seen in rig.creates]
    assert order == [model_id(name) for name in FOUR] * 4


async def test_requests_are_answered_while_bootstrap_runs(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(latency_seconds=0.3))
    await rig.bootstrap()
    await until(lambda: len(rig.creates) >= 4)
    async with trio.open_nursery() as clients:
        for _ in range(4):
            clients.start_soon(rig.chat, CLAUDE, "Hello")
    await phase(rig, "done")
    assert rig.arena.max_running(model_id(CLAUDE)) <= 4
    assert rig.arena.max_running_pair() <= 1
    assert {seen.status for seen in rig.calls} == {200}


async def test_the_message_and_the_number_are_settings(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables: Tables = {"bootstrap": {"message": "你好，世界"}, "pool": {"sessions_per_model": 2}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables)
    await rig.fill()
    assert [seen.body["messages"][0]["content"] for seen in rig.creates] == ["你好，世界"] * 2


# ── Phases ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_phases_are_told_in_order(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"bootstrap": {"enabled": True, "settle_seconds": 0.2}}
    rig = await start(nursery, tmp_path, tables=tables, connected=False, confirmed=True)
    assert (await phase(rig, "waiting_for_browser"))["planned"] == 0
    await rig.connect()
    assert (await phase(rig, "done"))["opened"] == 8
    assert [event.phase for event in rig.event(PhaseChanged)] == ["settling", "running", "done"]


async def test_start_does_not_wait_for_settling_but_for_the_tab(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"bootstrap": {"enabled": True, "settle_seconds": 3600}}
    rig = await start(nursery, tmp_path, tables=tables, connected=False)
    assert (await rig.bootstrap()).status_code == 202
    await phase(rig, "running")
    await rig.connect()
    await phase(rig, "done")
    assert opened_well(rig) == four_each(CLAUDE, DEEPSEEK)


async def test_start_while_one_runs_and_abort_while_none_runs_are_conflicts(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, switches=Switches(latency_seconds=30))
    idle = await rig.bootstrap("abort")
    assert (idle.status_code, idle.json()["error"]["code"]) == (409, "conflict")
    assert (await rig.bootstrap()).status_code == 202
    await phase(rig, "running")
    assert (await rig.bootstrap()).status_code == 409
    unknown = await rig.bootstrap("dance")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "action")


async def test_abort_stops_the_openings_at_the_site_and_keeps_what_there_is(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=FOUR, tables={"bootstrap": {"concurrency": 4}})
    rig.arena.switch(trouble_models=[SEARCH], hang_after_lines=0)
    await rig.bootstrap()
    await until(lambda: sum(opened_well(rig).values()) == 12)
    await until(lambda: len(rig.event(SessionOpened)) == 12)
    assert (await rig.bootstrap("abort")).status_code == 202
    state = await phase(rig, "aborted")
    assert state["opened"] == 12
    await until(lambda: rig.arena.stats()["running"] == 0)
    assert len(rig.pool(SEARCH).sessions) == 0
    assert repr(rig.pool(SEARCH)) == "<ModelPool grok-4-search: 0 sessions, 0 idle, 0/4 tokens, 0 waiting>"
    assert "Models: 1 not opened, 3 ready" in rig.output

    rig.arena.switch(hang_after_lines=None)
    await rig.fill()
    assert opened_well(rig) == four_each(*FOUR)


# ── Whom it asks for ────────────────────────────────────────────────────────────────────────────────────────


AT_ONCE = {"bootstrap": {"enabled": True, "settle_seconds": 0.1}}


async def change_account(rig: Rig) -> tuple[str, str]:
    """Sign out, and in as somebody else; returns the old account and the new one."""
    old = rig.twin.account
    await rig.twin.sign_out()
    await rig.twin.accept_terms()
    new = rig.twin.account
    assert old
    assert new
    assert old != new
    return old, new


async def test_another_account_gets_its_own_conversations_after_another_yes(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=AT_ONCE, confirmed=True)
    await phase(rig, "done")
    assert opened_well(rig) == four_each(CLAUDE, DEEPSEEK)
    cookies = [*rig.twin.http.cookies.jar]
    old, new = await change_account(rig)
    await until(lambda: rig.pool(CLAUDE).usable([new]) == rig.pool(DEEPSEEK).usable([new]) == 4)
    await phase(rig, "done")
    assert rig.pool(CLAUDE).usable([old]) == 4
    assert rig.pool(CLAUDE).limiter.total_tokens == 4

    rig.twin.http.cookies.jar.clear()
    for cookie in cookies:
        rig.twin.http.cookies.jar.set_cookie(cookie)
    rig.arena.record.clear()
    phases = len(rig.event(PhaseChanged))
    await rig.twin.look()
    await until(lambda: rig.program.bridges.accounts() == {old})
    await rig.state()
    assert len(rig.event(PhaseChanged)) == phases  # nothing is missing: nothing is asked
    assert rig.creates == []


async def test_what_was_interrupted_does_not_begin_again_by_itself(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that `--yes` gives is over with the first Ctrl-C."""
    held = Held(monkeypatch, free=1)
    rig = await start(nursery, tmp_path, tables=AT_ONCE, confirmed=True)
    await until(lambda: rig.program.bootstrap.opened == 1)
    other = Twin(rig.arena_url, rig.program.api.bridge_url)
    await other.http.post("/nextjs-api/sign-up", content="{}")
    await nursery.start(other.run)
    await until(lambda: len(rig.program.bridges.accounts()) == 2)
    assert rig.program.bootstrap.abort()
    await phase(rig, "skipped")
    held.release()
    phases = [event.phase for event in rig.event(PhaseChanged)]
    assert phases[phases.index("running") :] == ["running", "aborted", "settling", "skipped"]


async def test_another_account_is_asked_for_even_after_the_question_was_skipped(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=AT_ONCE)
    await phase(rig, "skipped")
    await change_account(rig)
    await until(lambda: [event.phase for event in rig.event(PhaseChanged)] == ["settling", "skipped"] * 2)
    assert rig.creates == []


async def test_a_second_account_beside_a_supplied_one_is_not_asked_for(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=AT_ONCE, confirmed=True)
    await phase(rig, "done")
    rig.arena.record.clear()
    other = Twin(rig.arena_url, rig.program.api.bridge_url)
    await nursery.start(other.run)
    await other.open_page()
    await other.accept_terms()
    await until(lambda: len(rig.program.bridges.accounts()) == 2)
    await rig.state()
    assert rig.program.bootstrap.phase == "done"
    await rig.twin.sign_out()
    await until(lambda: opened_well(rig) == four_each(CLAUDE, DEEPSEEK))


async def test_a_run_may_be_for_some_models_only(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(failures={DEEPSEEK: Failure()})
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK, GPT), switches=switches)
    rig.program.bootstrap.start({model_id(DEEPSEEK)})
    await phase(rig, "done")
    assert (await rig.state())["bootstrap"]["skipped"][0]["model"] == DEEPSEEK
    rig.program.bootstrap.start({model_id(CLAUDE)})
    await until(lambda: len(rig.pool(CLAUDE).sessions) == 4)
    await phase(rig, "done")
    assert (await rig.state())["bootstrap"]["skipped"][0]["model"] == DEEPSEEK
    assert len(rig.pool(GPT).sessions) == 0


def make_bootstrap(phase: Phase) -> Bootstrap:
    """A bootstrap of which only the phases are used."""
    nothing: Any = None
    bootstrap = Bootstrap(Config(), nothing, nothing, nothing, nothing, EventBus())
    bootstrap.phase = phase
    return bootstrap


@pytest.mark.parametrize(("phase", "event", "reached"), [(*pair, phase) for pair, phase in PHASES.items()])
def test_a_legal_event_changes_the_phase(phase: Phase, event: str, reached: Phase) -> None:
    bootstrap = make_bootstrap(phase)
    bootstrap._go(event)
    assert bootstrap.phase == reached


EVENTS = sorted({event for _, event in PHASES})
STATES = sorted({phase for phase, _ in PHASES})


@pytest.mark.parametrize(
    ("phase", "event"),
    [(phase, event) for phase in STATES for event in EVENTS if (phase, event) not in PHASES],
)
def test_an_illegal_event_raises_with_phase_and_event(phase: Phase, event: str) -> None:
    bootstrap = make_bootstrap(phase)
    with pytest.raises(RuntimeError, match=f"{phase}.*{event}"):
        bootstrap._go(event)
    assert bootstrap.phase == phase


# ── What pauses it ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_rate_limit_pauses_everyone_and_no_model_is_skipped(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    switches = Switches(rate_limit_after=5, rate_limit_times=6, retry_after=1)
    rig = await start(nursery, tmp_path, models=FOUR, switches=switches)
    await rig.fill()
    assert (await rig.state())["bootstrap"]["skipped"] == []
    assert opened_well(rig) == four_each(*FOUR)
    refused = [seen for seen in rig.calls if seen.status == 429]
    assert len(refused) == 6
    assert rig.event(RateLimited)
    # Nothing was sent while the site's second was not over; then one probe, and the others after it.
    first = refused[0]
    assert first.ended is not None
    under_way = 8
    later = [seen for seen in rig.calls[first.index + under_way :] if seen.arrived - first.ended < 0.9]
    assert later == []
    probes = [seen for seen in refused if seen.arrived - first.ended >= 0.9]
    gaps = [b.arrived - a.arrived for a, b in pairwise(probes)]
    assert all(gap >= 0.9 for gap in gaps)


async def test_requests_too_wait_at_the_rate_limit(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(rate_limit_after=0, rate_limit_times=4, retry_after=1)
    started = trio.current_time()
    async with trio.open_nursery() as clients:
        for _ in range(4):
            clients.start_soon(rig.chat, CLAUDE, "Hello")
    assert trio.current_time() - started >= 0.9
    assert [seen.status for seen in rig.calls].count(200) == 4
    assert rig.program.answers.failed == 0


async def test_a_tab_of_another_account_answers_those_that_wait_at_a_rate_limit(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    rig.arena.switch(rate_limit_after=0, rate_limit_times=4, retry_after=500)
    async with trio.open_nursery() as clients:
        for _ in range(4):
            clients.start_soon(rig.chat, CLAUDE, "Hello")
        await until(lambda: len(rig.calls) == 4)
        await until(lambda: not rig.pool(CLAUDE).busy)
        rig.arena.switch(rate_limit_after=None, rate_limit_times=None)
        other = Twin(rig.arena_url, rig.program.api.bridge_url)
        await other.http.post("/nextjs-api/sign-up", content="{}")
        await nursery.start(other.run)
    assert rig.program.answers.failed == 0
    assert [seen.status for seen in rig.calls].count(200) == 4


async def test_who_waits_at_a_rate_limit_is_told_of_a_tab_that_went(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"bridge": {"reconnect_grace_seconds": 0.3}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True, tables=tables)
    rig.arena.switch(rate_limit_after=0, retry_after=500)
    replies: list[httpx.Response] = []

    async def ask() -> None:
        replies.append(await rig.chat(CLAUDE, "Hello"))

    async with trio.open_nursery() as clients:
        clients.start_soon(ask)
        await until(lambda: rig.event(RateLimited))
        rig.twin.bridge_url = "ws://127.0.0.1:1/"
        rig.twin.leave_page()
    check_error(replies[0], 503, "bridge_unavailable")


async def test_without_patience_nobody_waits_for_the_probe(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"requests": {"queue_timeout_seconds": 0}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True, tables=tables)
    rig.arena.switch(rate_limit_after=0, rate_limit_times=1, retry_after=1)
    check_error(await rig.chat(CLAUDE, "Hello"), 429, "rate_limit_exceeded")
    [account] = rig.program.bridges.accounts()
    gate = rig.program.bridges.gate(account)
    rig.arena.switch(rate_limit_after=None, rate_limit_times=None, latency_seconds=600)
    await until(lambda: gate.is_open)
    async with trio.open_nursery() as clients:
        clients.start_soon(rig.chat, CLAUDE, "the probe")
        await until(lambda: len(rig.calls) == 2)
        await until(lambda: gate.seconds == 0)
        assert not gate.is_open
        check_error(await rig.chat(CLAUDE, "Hello"), 429, "rate_limit_exceeded")
        clients.cancel_scope.cancel()


async def test_the_time_that_a_tab_is_away_is_not_the_sites(nursery: trio.Nursery, tmp_path: Path) -> None:
    """Of the site's limit nothing but the pace is left when the tab goes for longer than a limit may last."""
    tables: Tables = {"bootstrap": {"max_rate_limit_wait_seconds": 0.6}, "pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=FOUR, tables=tables)
    [bridge] = rig.program.bridges
    rig.program.bridges.gate(bridge.account or "").pace = 3.0
    await rig.bootstrap()
    await until(lambda: len(rig.calls) == 1)
    rig.program.bridges.note_state(bridge, "loading", bridge.account)
    await trio.sleep(0.8)
    rig.program.bridges.note_state(bridge, "ready", bridge.account)
    assert (await phase(rig, "done"))["opened"] == 4


async def test_answers_that_were_under_way_do_not_lift_a_rate_limit(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """The site took five calls and will answer them soon; it refused the sixth, and means it."""
    switches = Switches(latency_seconds=0.3, rate_limit_after=5, rate_limit_times=3, retry_after=2)
    rig = await start(nursery, tmp_path, models=FOUR, switches=switches)
    await rig.fill()
    assert opened_well(rig) == four_each(*FOUR)
    refused_at = next(seen.arrived for seen in rig.calls if seen.status == 429)
    first_wave = 8  # bootstrap.concurrency
    assert [seen.index for seen in rig.calls[first_wave:] if seen.arrived < refused_at + 1.9] == []


async def test_a_longer_limit_than_allowed_ends_the_run_as_aborted(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"bootstrap": {"max_rate_limit_wait_seconds": 2}}
    switches = Switches(rate_limit_after=5, retry_after=3600)
    rig = await start(nursery, tmp_path, models=FOUR, tables=tables, switches=switches)
    await rig.bootstrap()
    state = await phase(rig, "aborted")
    assert state["skipped"] == []
    assert state["opened"] == sum(len(pool.sessions) for pool in rig.program.pool) <= 5
    await until(lambda: rig.arena.stats()["running"] == 0)
    assert len(rig.calls) <= 5 + 8  # what it took, and those that were under way when it said no
    assert rig.event(ModelSkipped) == []


async def test_a_tab_that_is_not_ready_any_more_pauses_it(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, free=4)
    rig = await start(nursery, tmp_path, models=FOUR)
    await rig.bootstrap()
    await until(lambda: sum(len(pool.sessions) for pool in rig.program.pool) == 4)
    await until(lambda: len(rig.calls) == 12)
    await rig.twin.sign_out()
    await until(lambda: rig.program.bridges.obstacle() is not None)
    await until(lambda: rig.arena.stats()["running"] == 0)
    sent = len(rig.calls)
    await trio.sleep(1)
    assert len(rig.calls) == sent
    assert (await rig.state())["bootstrap"]["phase"] == "running"

    held.release()
    await rig.make_ready()
    state = await phase(rig, "done")
    assert state["skipped"] == []
    assert state["opened"] == state["planned"] == 16
    # Signing in anew is another account: the next run opens what that one lacks.
    await rig.fill()
    account = rig.creates[-1].account
    mine = Counter(seen.model_id for seen in rig.creates if seen.account == account)
    assert mine == four_each(*FOUR)


async def test_a_human_check_pauses_it_until_it_has_been_passed(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, free=4)
    rig = await start(nursery, tmp_path, models=FOUR)
    await rig.bootstrap()
    await until(lambda: sum(len(pool.sessions) for pool in rig.program.pool) == 4)
    await until(lambda: len(rig.calls) == 12)
    rig.arena.require_check()
    nursery.start_soon(rig.chat, CLAUDE, "Hello")  # meets the check
    await until(lambda: rig.twin.state == "verification")
    await until(lambda: rig.program.bridges.obstacle() is not None)
    await until(lambda: rig.arena.stats()["running"] == 0)
    sent = len(rig.calls)
    await trio.sleep(1)
    assert len(rig.calls) == sent
    held.release()
    await rig.twin.pass_check()
    state = await phase(rig, "done")
    assert state["skipped"] == []
    assert state["opened"] == state["planned"] == 16
    assert {len(pool.sessions) for pool in rig.program.pool} == {4}


async def test_a_lost_tab_pauses_it_until_it_is_back(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, free=4)
    rig = await start(nursery, tmp_path, models=FOUR)
    await rig.bootstrap()
    await until(lambda: len(rig.calls) == 12)
    await rig.twin.open_page()
    await until(lambda: len(rig.calls) == 20)
    held.release()
    state = await phase(rig, "done")
    assert state["skipped"] == []
    assert {len(pool.sessions) for pool in rig.program.pool} == {4}


# ── What fails ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_model_that_fails_is_skipped_and_costs_few_calls(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    switches = Switches(failures={DEEPSEEK: Failure(status=404, body='{"error":"not available"}')})
    tables = {"bootstrap": {"concurrency": 2}}
    rig = await start(nursery, tmp_path, models=FOUR, switches=switches, tables=tables)
    await rig.fill()
    [skipped] = rig.event(ModelSkipped)
    assert (skipped.model, skipped.arena_status, skipped.reply) == (
        DEEPSEEK,
        404,
        '{"error":"not available"}',
    )
    assert opened_well(rig) == four_each(CLAUDE, GPT, SEARCH)
    assert sum(seen.model_id == model_id(DEEPSEEK) for seen in rig.calls) == 1
    assert "Models: 3 ready, 1 skipped" in rig.output


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        (Switches(trouble_models={DEEPSEEK}, a3="model exploded 爆"), "model exploded 爆"),
        (Switches(trouble_models={DEEPSEEK}, cut_after_lines=1), "cut off"),
        (Switches(failures={DEEPSEEK: Failure(status=400, body="no such thing")}), "no such thing"),
        (Switches(trouble_models={DEEPSEEK}, hang_after_lines=1), "2 s"),
    ],
)
async def test_every_way_to_fail_is_told_as_the_reason(
    nursery: trio.Nursery, tmp_path: Path, switches: Switches, reason: str
) -> None:
    tables = {"bootstrap": {"timeout_seconds": 2}}
    rig = await start(nursery, tmp_path, tables=tables, switches=switches)
    await rig.fill()
    [skipped] = (await rig.state())["bootstrap"]["skipped"]
    assert skipped["model"] == DEEPSEEK
    assert reason in skipped["reason"]
    assert opened_well(rig) == four_each(CLAUDE)
    assert len(rig.pool(DEEPSEEK).sessions) == 0


async def test_a_model_that_was_skipped_is_tried_again_by_the_next_run(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, switches=Switches(failures={DEEPSEEK: Failure(times=None)}))
    await rig.fill()
    assert len((await rig.state())["bootstrap"]["skipped"]) == 1
    rig.arena.switch(failures={})
    await rig.fill()
    assert (await rig.state())["bootstrap"]["skipped"] == []
    assert opened_well(rig) == four_each(CLAUDE, DEEPSEEK)


# ── How long it takes ───────────────────────────────────────────────────────────────────────────────────────


class SlowSite(Bridge):
    """A ready tab on a site that takes two seconds for each answer."""

    LATENCY_SECONDS = 2.0

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(1, cast(Any, None), cast(Any, None))
        self._nursery = nursery
        self._phase, self.reported, self.account = "open", "ready", "mine"
        self.calls = self.running = self.most = 0

    @contextmanager
    def fetch(
        self, method: str, path: str, body: str, accept: Callable[[Head], bool] | None = None
    ) -> Iterator[Exchange]:
        self.calls += 1
        exchange = Exchange(self.calls, accept)
        self._nursery.start_soon(self._answer, exchange)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield exchange
        finally:
            self.running -= 1

    async def _answer(self, exchange: Exchange) -> None:
        await trio.sleep(self.LATENCY_SECONDS)
        exchange.begin(Head(exchange.id, 200))
        exchange.feed(b'a0:"Hello"\nad:{"finishReason":"stop"}\n')
        exchange.end()


async def test_544_conversations_take_no_longer_than_the_site_does(
    nursery: trio.Nursery,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In virtual time: eight at once, two seconds each. The disk, which takes real time, is left out."""

    async def save(store: Store, session: Session) -> bool:
        return True

    monkeypatch.setattr(Store, "save", save)
    config, bus, store = Config(), EventBus(), Store(tmp_path)
    models = [Model(str(number), f"model {number}") for number in range(136)]
    pool = SessionPool(Catalog(models), config.pool, store, bus)
    bridges = Bridges(config, bus, pool)
    site = SlowSite(nursery)
    bridges.add(site, "https://lmarena.ai/", "ready", "mine")
    run = BootstrapRun(config, pool, bridges, Relay(config, pool, bridges, bus), bus, frozenset())
    began_at = trio.current_time()
    await run.open_all()
    assert run.opened.total() == site.calls == 544
    assert site.most == config.bootstrap.concurrency == 8
    assert trio.current_time() - began_at <= 544 / 8 * site.LATENCY_SECONDS * 1.05
