"""Session pool: who gets a token and a session, in what order, and what becomes of them."""

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from lmarena_proxy import (
    Catalog,
    Event,
    EventBus,
    Lease,
    Model,
    ModelPool,
    PoolConfig,
    Session,
    SessionOpened,
    SessionPool,
    SessionRetired,
    Store,
)

# No test depends on speed or on an earlier run.
settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")

MODEL, OTHER = Model("1", "gpt"), Model("2", "paints", "image", inputs=("text", "image"))
MINE, THEIRS = "mine", "theirs"


def a_session(name: str, account: str = MINE, model: Model = MODEL) -> Session:
    return Session(name, f"{name}-last", model.id, account, source="bootstrap", created_at=1.0)


class Desk:
    """A pool, its store, and what it tells."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.events: list[Event] = []
        self.store, self.bus = Store(directory), EventBus()
        self.bus.subscribe(self.events.append)
        self.config = PoolConfig(**settings)
        self.pool = self.reopened()
        self._numbers = itertools.count(1)

    def reopened(self) -> SessionPool:
        pool = SessionPool(Catalog([MODEL, OTHER]), self.config, self.store, self.bus)
        pool.set_accounts({MINE})
        return pool

    async def add(self, *names: str, account: str = MINE) -> list[Session]:
        sessions = [a_session(name, account) for name in names]
        for session in sessions:
            await self.pool.add(session)
        return sessions

    def lease(self) -> Lease:
        return Lease(f"r{next(self._numbers)}", MODEL)

    async def taken(self) -> Lease:
        """A lease with a token and, if there is one, a session."""
        lease = self.lease()
        await self.pool.acquire(lease)
        self.pool.take(lease, {MINE})
        return lease

    @property
    def of_model(self) -> ModelPool:
        return self.pool.of(MODEL.id)

    def counts(self) -> tuple[int, int, int]:
        return self.of_model.idle, self.of_model.busy, self.of_model.waiting


@asynccontextmanager
async def desk(tmp_path: Path, **settings: Any) -> AsyncIterator[Desk]:
    made = Desk(tmp_path, **settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.store.run)
        try:
            yield made
        finally:
            made.store.close()


def held(lease: Lease) -> str | None:
    return lease.session.session_id if lease.session else None


async def test_sessions_are_used_in_turn(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", "b", "c")
        order = []
        for _ in range(7):
            lease = await at.taken()
            order.append(held(lease))
            at.pool.release(lease)
        assert order == ["a", "b", "c", "a", "b", "c", "a"]


async def test_the_longest_idle_session_is_taken(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", "b", "c")
        first, second = await at.taken(), await at.taken()
        at.pool.release(second)
        at.pool.release(first)
        assert [held(await at.taken()) for _ in range(3)] == ["c", "b", "a"]


async def test_a_token_without_a_session_means_to_open_one(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=2) as at:
        await at.add("a")
        assert [held(await at.taken()), held(await at.taken())] == ["a", None]
        assert not at.pool.acquire_nowait(at.lease())


async def test_waiters_are_served_first_come_first_served(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with desk(tmp_path, sessions_per_model=1) as at:
        await at.add("a")
        served: list[int] = []

        async def wait(number: int) -> None:
            lease = await at.taken()
            served.append(number)
            await trio.sleep(1)
            at.pool.release(lease)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            assert at.counts() == (0, 1, 4)
        assert served == [0, 1, 2, 3, 4]
        assert at.counts() == (1, 0, 0)


async def test_a_newcomer_does_not_pass_a_waiter(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=1) as at, trio.open_nursery() as nursery:
        holder, waiter, newcomer = await at.taken(), at.lease(), at.lease()
        nursery.start_soon(at.pool.acquire, waiter)
        await trio.testing.wait_all_tasks_blocked()
        at.pool.release(holder)
        assert not at.pool.acquire_nowait(newcomer)
        await trio.testing.wait_all_tasks_blocked()
        assert (waiter.has_token, newcomer.has_token) == (True, False)


async def test_a_cancelled_waiter_leaves_the_queue_and_takes_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=1) as at, trio.open_nursery() as nursery:
        holder, gone, next_one = await at.taken(), at.lease(), at.lease()
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                await at.pool.acquire(gone)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(at.pool.acquire, next_one)
        await trio.testing.wait_all_tasks_blocked()
        assert at.of_model.waiting == 2
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert at.of_model.waiting == 1
        at.pool.release(gone)
        at.pool.release(holder)
        await trio.testing.wait_all_tasks_blocked()
        assert (gone.has_token, next_one.has_token) == (False, True)


async def test_there_are_as_many_tokens_as_usable_sessions_but_at_least_the_target(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=2) as at:
        limiter = at.of_model.limiter
        assert limiter.total_tokens == 2
        sessions = await at.add("a", "b", "c")
        assert limiter.total_tokens == 3
        await at.add("d", account=THEIRS)
        assert limiter.total_tokens == 3
        at.pool.set_accounts({MINE, THEIRS})
        assert limiter.total_tokens == 4
        at.pool.set_accounts(())
        assert limiter.total_tokens == 2
        at.pool.set_accounts({MINE})
        at.pool.retire(sessions[0], "test")
        assert limiter.total_tokens == 2


async def test_a_new_session_lets_a_waiter_in(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=1) as at, trio.open_nursery() as nursery:
        await at.add("a")
        await at.taken()
        waiter = at.lease()
        nursery.start_soon(at.pool.acquire, waiter)
        await trio.testing.wait_all_tasks_blocked()
        await at.add("b")
        await trio.testing.wait_all_tasks_blocked()
        assert waiter.has_token


async def test_sessions_of_accounts_without_a_tab_rest_in_their_place(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", account=THEIRS)
        await at.add("b")
        lease = await at.taken()
        assert held(lease) == "b"
        assert held(await at.taken()) is None
        assert at.pool.missing(MODEL) == 3
        at.pool.set_accounts({MINE, THEIRS})
        assert at.pool.missing(MODEL) == 2
        other = at.lease()
        taken = at.pool.take(other, {THEIRS})
        assert taken is not None
        assert taken.session_id == "a"


async def test_a_session_retired_while_leased_does_not_come_back(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=1) as at:
        [session] = await at.add("a")
        lease = await at.taken()
        at.pool.retire(session, "the site answered 404")
        assert at.counts() == (0, 0, 0)
        at.pool.give_back(lease)
        assert at.counts() == (0, 0, 0)
        at.pool.release(lease)
        assert at.of_model.limiter.borrowed_tokens == 0
        assert held(await at.taken()) is None


async def test_a_session_may_be_given_back_and_another_taken_under_one_token(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", "b")
        lease = await at.taken()
        at.pool.give_back(lease)
        assert (lease.session, lease.has_token) == (None, True)
        at.pool.take(lease, {MINE})
        assert held(lease) == "b"
        assert at.of_model.limiter.borrowed_tokens == 1


async def test_releasing_twice_gives_nothing_back_twice(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a")
        lease = await at.taken()
        at.pool.release(lease)
        at.pool.release(lease)
        assert at.counts() == (1, 0, 0)
        assert at.of_model.limiter.borrowed_tokens == 0


async def test_failures_in_a_row_retire_a_session(tmp_path: Path) -> None:
    async with desk(tmp_path, max_consecutive_failures=3) as at:
        [session] = await at.add("a")
        at.pool.note_failure(session, "x")
        at.pool.note_failure(session, "x")
        at.pool.note_use(session)
        at.pool.note_failure(session, "x")
        at.pool.note_failure(session, "x")
        assert at.pool.find("a") is session
        at.pool.note_failure(session, "cut off")
        assert at.pool.find("a") is None
        [retired] = [event for event in at.events if isinstance(event, SessionRetired)]
        assert retired.reason == "3 failures in a row, last: cut off"


async def test_a_session_is_retired_once(tmp_path: Path) -> None:
    async with desk(tmp_path, max_consecutive_failures=1) as at:
        [session] = await at.add("a")
        at.pool.retire(session, "by the person")
        at.pool.note_failure(session, "cut off")
        assert len([event for event in at.events if isinstance(event, SessionRetired)]) == 1


async def test_a_retired_session_leaves_the_store(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        sessions = await at.add("a", "b")
        at.pool.retire(sessions[0], "test")
        await at.add("c")
        assert [each.session_id for each in at.store.sessions()] == ["b", "c"]


async def test_a_use_is_counted_and_kept(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        [session] = await at.add("a")
        at.pool.note_use(session)
        at.pool.note_use(session)
        await at.add("b")
        [first, _] = at.store.sessions()
        assert first.uses == 2
        assert first.last_used_at == session.last_used_at is not None


async def test_a_captured_session_that_is_known_takes_the_new_message(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a")
        again = Session("a", "further", MODEL.id, MINE, source="captured", created_at=2.0)
        await at.pool.add(again)
        assert at.counts() == (1, 0, 0)
        lease = await at.taken()
        assert lease.session is not None
        assert lease.session.message_id == "further"


async def test_a_session_continued_by_hand_takes_the_new_message_also_while_it_is_leased(
    tmp_path: Path,
) -> None:
    async with desk(tmp_path) as at:
        [session] = await at.add("a")
        lease = await at.taken()
        await at.pool.continue_by_hand(session, "further")
        assert session.message_id == "further"
        assert at.counts() == (0, 1, 0)
        at.pool.release(lease)
        assert at.counts() == (1, 0, 0)
        assert [each.message_id for each in at.store.sessions()] == ["further"]


async def test_an_opened_session_is_in_the_store_before_it_is_told_of(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        seen: list[list[str]] = []

        def look(event: Event) -> None:
            if isinstance(event, SessionOpened):
                seen.append([each.session_id for each in at.store.sessions()])

        at.bus.subscribe(look)
        await at.add("a", "b")
        assert seen == [["a"], ["a", "b"]]


async def test_stored_sessions_are_in_the_pool_of_the_next_start(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", "b")
        pool = at.reopened()
        assert pool.of(MODEL.id).idle == 2
        assert pool.missing(MODEL) == 2
        assert repr(pool) == "<SessionPool of 2 sessions for 2 models>"


async def test_stored_sessions_of_a_model_that_the_page_adds_later_come_into_use(tmp_path: Path) -> None:
    """At the next start only what is missing is opened, also for models that only the page's list has."""
    new = Model("3", "new")
    async with desk(tmp_path) as at:
        at.pool.merge_models([new])
        await at.pool.add(a_session("a", model=new))
        pool = at.reopened()
        pool.merge_models([new])
        assert pool.missing(new) == 3


async def test_a_pools_repr_shows_its_counts(tmp_path: Path) -> None:
    async with desk(tmp_path, sessions_per_model=2) as at, trio.open_nursery() as nursery:
        await at.add("a", "b")
        lease = await at.taken()
        assert repr(at.of_model) == "<ModelPool gpt: 2 sessions, 1 idle, 1/2 tokens, 0 waiting>"
        assert repr(lease) == "<Lease r1 of gpt: a>"
        assert repr(at.lease()) == "<Lease r2 of gpt: no session>"
        await at.taken()
        nursery.start_soon(at.pool.acquire, at.lease())
        await trio.testing.wait_all_tasks_blocked()
        assert repr(at.of_model) == "<ModelPool gpt: 2 sessions, 0 idle, 2/2 tokens, 1 waiting>"
        nursery.cancel_scope.cancel()


async def test_the_snapshot_shows_every_model(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.add("a", "b")
        await at.taken()
        rest = {"requires_image": False, "resting": 0, "opening": 0, "waiting": 0, "tokens": 4}
        assert at.pool.snapshot() == [
            {
                "model": "gpt",
                "model_id": "1",
                "modality": "chat",
                "sessions": 2,
                "idle": 1,
                "busy": 1,
                "missing": 2,
                **rest,
            },
            {
                "model": "paints",
                "model_id": "2",
                "modality": "image",
                "sessions": 0,
                "idle": 0,
                "busy": 0,
                "missing": 4,
                **rest,
            },
        ]


class Life:
    """What may happen to one model's pool, a step at a time, and what holds after each."""

    STEPS = 8

    def __init__(self) -> None:
        self.pool = ModelPool(MODEL, 2)
        self.leases: list[Lease] = []
        self.number = 0

    def step(self, kind: int, which: int) -> None:
        steps: Sequence[Callable[[int], None]] = (
            self.put,
            self.admit,
            self.admit,
            self.give_back,
            self.take,
            self.release,
            self.drop,
            self.resize,
        )
        steps[kind](which)
        busy = [lease.session for lease in self.leases if lease.session]
        live = [session for session in busy if self.pool.sessions.get(session.session_id) is session]
        assert self.pool.idle + self.pool.busy == len(self.pool.sessions)
        assert self.pool.busy == len(live)
        assert len({session.session_id for session in busy}) == len(busy)
        assert self.pool.limiter.borrowed_tokens == len(self.leases)
        assert self.pool.limiter.total_tokens >= self.pool.target

    def put(self, which: int) -> None:
        # The last one again, as when the person goes on in it by hand; never one that was retired.
        self.number += which % 3 > 0 or f"s{self.number}" not in self.pool.sessions
        self.pool.put(a_session(f"s{self.number}", [MINE, THEIRS][which % 2]))

    def admit(self, which: int) -> None:
        lease = Lease("r", MODEL)
        try:
            self.pool.limiter.acquire_on_behalf_of_nowait(lease)
        except trio.WouldBlock:
            return
        self.leases.append(lease)
        self.pool.take(lease, {MINE, THEIRS} if which % 2 else {MINE})

    def chosen(self, which: int) -> Lease | None:
        return self.leases[which % len(self.leases)] if self.leases else None

    def give_back(self, which: int) -> None:
        if lease := self.chosen(which):
            self.pool.give_back(lease)

    def take(self, which: int) -> None:
        if (lease := self.chosen(which)) and not lease.session:
            self.pool.take(lease, {MINE})

    def release(self, which: int) -> None:
        if lease := self.chosen(which):
            self.pool.give_back(lease)
            self.pool.limiter.release_on_behalf_of(lease)
            self.leases.remove(lease)

    def drop(self, which: int) -> None:
        if sessions := [*self.pool.sessions.values()]:
            self.pool.drop(sessions[which % len(sessions)])

    def resize(self, which: int) -> None:
        self.pool.resize([(MINE,), (MINE, THEIRS), ()][which % 3])


@given(steps=st.lists(st.tuples(st.integers(0, Life.STEPS - 1), st.integers(0, 11)), max_size=40))
async def test_whatever_happens_sessions_and_tokens_add_up(steps: list[tuple[int, int]]) -> None:
    life = Life()
    for kind, which in steps:
        life.step(kind, which)


async def test_a_pool_of_a_model_that_is_not_served_is_a_bug(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        with pytest.raises(AssertionError):
            at.pool.of("none")
