"""Store: what was saved survives, and what cannot be written does not end the program."""

import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from lmarena_proxy import (
    _SCHEMA,
    STORE_VERSION,
    ConfigError,
    PhaseChanged,
    RequestEnded,
    RequestLog,
    Session,
    Store,
)


def a_session(number: int = 1, **fields: Any) -> Session:
    values: dict[str, Any] = {"source": "bootstrap", "created_at": float(number)} | fields
    return Session(f"s{number}", f"m{number}", "model", "account", **values)


def ended(request_id: str = "r1", **changes: Any) -> RequestEnded:
    event = RequestEnded(
        request_id=request_id,
        created_at=1.5,
        model="name",
        model_id="model",
        is_stream=True,
        status=200,
        outcome="stop",
        session_id="s1",
        attempts=1,
        queued_seconds=0.25,
        first_byte_seconds=0.5,
        total_seconds=2.0,
        prompt_tokens=3,
        completion_tokens=4,
        messages="[]",
        answer="你好",
    )
    return msgspec.structs.replace(event, **changes)


def stored(session: Session) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(session).items() if name != "failures"}


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Store]:
    store = Store(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        try:
            yield store
        finally:
            store.close()


def rows(store: Store, query: str) -> list[Any]:
    """What another process sees."""
    with closing(sqlite3.connect(store.path)) as connection:
        return connection.execute(query).fetchall()


async def test_a_saved_session_survives_a_new_start(tmp_path: Path) -> None:
    sessions = [a_session(2, last_used_at=9.5, uses=3, source="captured"), a_session(1)]
    async with running(tmp_path) as store:
        for session in sessions:
            assert await store.save(session)
    async with running(tmp_path) as store:
        assert [stored(session) for session in store.sessions()] == [
            stored(each) for each in reversed(sessions)
        ]


async def test_the_store_makes_its_directory(tmp_path: Path) -> None:
    async with running(tmp_path / "a" / "b") as store:
        assert await store.save(a_session())
    assert (tmp_path / "a" / "b").is_dir()


async def test_saving_returns_when_the_session_is_on_disk(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.save(a_session())
        assert rows(store, "SELECT session_id, message_id, uses FROM sessions") == [("s1", "m1", 0)]


async def test_a_save_of_a_known_session_replaces_it(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        session = a_session()
        await store.save(session)
        session.message_id = "later"
        await store.save(session)
        assert rows(store, "SELECT session_id, message_id FROM sessions") == [("s1", "later")]


async def test_many_saves_at_once_are_all_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as store, trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(store.save, a_session(number))
    assert len(Store(tmp_path).sessions()) == 50


async def test_uses_and_removals_are_kept_in_order_when_closing_drains(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        kept, removed = a_session(1), a_session(2)
        await store.save(kept)
        await store.save(removed)
        kept.uses, kept.last_used_at = 7, 8.5
        store.touch(kept)
        store.remove(removed)
        store.touch(removed)
        for number in range(20):
            store.log_request(ended(f"r{number}"))
        # Nothing waits for these writes: closing does.
    again = Store(tmp_path)
    assert [(each.session_id, each.uses, each.last_used_at) for each in again.sessions()] == [("s1", 7, 8.5)]
    assert rows(again, "SELECT count(*) FROM requests") == [(20,)]


async def test_closing_drains_even_when_the_program_is_cancelled(tmp_path: Path) -> None:
    store = Store(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.touch(a_session())
        store.log_request(ended())
        nursery.cancel_scope.cancel()
        store.close()
    assert rows(store, "SELECT request_id FROM requests") == [("r1",)]


async def test_a_request_is_one_row_with_the_events_fields(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.log_request(ended())
        store.log_request(ended("r2", session_id=None, first_byte_seconds=None, messages=None, answer=None))
    rest = [None] * 7
    assert rows(store, "SELECT * FROM requests ORDER BY request_id") == [
        ("r1", 1.5, "name", "model", 1, 200, "stop", "s1", 1, 0.25, 0.5, 2.0, 3, 4, "[]", "你好", *rest),
        ("r2", 1.5, "name", "model", 1, 200, "stop", None, 1, 0.25, None, 2.0, 3, 4, None, None, *rest),
    ]


async def test_the_columns_of_a_request_are_the_events_fields(tmp_path: Path) -> None:
    columns = [row[1] for row in rows(Store(tmp_path), "PRAGMA table_info(requests)")]
    assert columns == [*RequestEnded.__struct_fields__]


async def test_events_that_are_no_request_are_not_written(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.log_request(PhaseChanged("done", ""))
    assert rows(store, "SELECT * FROM requests") == []


def moved_aside(directory: Path) -> list[Path]:
    return [*directory.glob("*.damaged-*")]


@pytest.mark.parametrize(
    "content", [b"this is no database, but it is long enough to be read" * 99, b"\0" * 4096]
)
async def test_a_damaged_store_is_moved_aside_and_a_new_one_begun(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lmarena_proxy.sqlite3"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Store(tmp_path, may_replace=False)  # Looking at it, as --check does, changes nothing.
    assert caught.value.key == "storage.path"
    assert moved_aside(tmp_path) == []
    async with running(tmp_path) as store:
        assert store.sessions() == []
        assert await store.save(a_session(1))
    [aside] = moved_aside(tmp_path)
    assert aside.read_bytes() == content
    assert str(aside) in caplog.text
    assert len(Store(tmp_path).sessions()) == 1


async def test_a_store_with_broken_pages_is_moved_aside(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        for number in range(200):
            await store.save(a_session(number))
    content = store.path.read_bytes()
    store.path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    assert Store(tmp_path).sessions() == []
    assert len(moved_aside(tmp_path)) == 1


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
async def test_the_store_is_nobody_elses_to_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with running(tmp_path / "state") as store:
            await store.save(a_session(1))
            modes = {path.name: path.stat().st_mode & 0o777 for path in store.path.parent.iterdir()}
    finally:
        os.umask(before)
    assert len(modes) == 3
    assert set(modes.values()) == {0o600}
    assert store.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_store_of_a_later_version_is_a_config_error(tmp_path: Path) -> None:
    path = Store(tmp_path).path
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {STORE_VERSION + 1}")
    with pytest.raises(ConfigError, match=f"it has version {STORE_VERSION + 1}"):
        Store(tmp_path)


async def test_a_store_of_the_first_version_is_brought_up_to_date_with_all_it_holds(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "lmarena_proxy.sqlite3")) as old:
        old.executescript(_SCHEMA)
        old.execute("INSERT INTO sessions VALUES ('s1', 'm1', 'model', 'account', 'bootstrap', 1.0, NULL, 0)")
        old.execute(
            "INSERT INTO requests VALUES "
            "('r0', 0.5, 'name', 'model', 0, 200, 'stop', 's1', 1, 0, 0.5, 2.0, 3, 4, '[]', 'so')"
        )
        old.commit()
    async with running(tmp_path) as store:
        assert [(session.session_id, session.position) for session in store.sessions()] == [("s1", None)]
        store.log_request(ended(error="broken"))
        found = [await RequestLog(store).one(each) for each in ("r0", "r1", "r2")]
    assert [each and (each["answer"], each["error"]) for each in found] == [
        ("so", None),
        ("你好", "broken"),
        None,
    ]


def test_a_path_that_cannot_be_a_directory_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"storage\.path"):
        Store(tmp_path / "file")


async def test_a_store_that_cannot_be_written_says_so_and_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        with closing(sqlite3.connect(store.path)) as connection:
            connection.execute("ALTER TABLE sessions RENAME TO elsewhere")
            assert not await store.save(a_session())
            connection.execute("ALTER TABLE elsewhere RENAME TO sessions")
        assert await store.save(a_session())


async def test_a_locked_store_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **options | {"timeout": 0}))
    async with running(tmp_path) as store:
        with closing(connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert not await store.save(a_session())
            other.execute("ROLLBACK")
        assert await store.save(a_session())


@pytest.mark.parametrize(
    "unwritable", [{"prompt_tokens": 2**63}, {"answer": "\ud83d"}], ids=["huge", "surrogate"]
)
async def test_a_record_that_sqlite_cannot_take_does_not_end_the_program(
    unwritable: dict[str, Any], tmp_path: Path
) -> None:
    async with running(tmp_path) as store:
        store.log_request(ended(**unwritable))
        await store.save(a_session(1))
        assert await store.save(a_session(2))


async def test_a_record_that_cannot_be_written_does_not_take_others_with_it(tmp_path: Path) -> None:
    """Both are queued before the writer runs, so they share a commit."""
    async with running(tmp_path) as store:
        store.log_request(ended(model=None))
        assert await store.save(a_session())


async def test_old_requests_are_forgotten_and_others_kept(tmp_path: Path) -> None:
    now = time.time()
    async with running(tmp_path) as store:
        for days in (0, 1, 29, 31, 400):
            store.log_request(ended(f"r{days}", created_at=now - days * 86_400))
        assert await store.prune(30) == 2
        assert await store.prune(30) == 0
    assert [row[0] for row in rows(store, "SELECT request_id FROM requests ORDER BY created_at")] == [
        "r29",
        "r1",
        "r0",
    ]


async def test_pruning_gives_the_disk_its_space_back_and_keeps_conversations(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await store.save(a_session())
        for number in range(300):
            store.log_request(ended(f"r{number}", created_at=1.0, answer="x" * 10_000))
    before = store.path.stat().st_size
    again = Store(tmp_path)
    assert again.prune_now(1) == 300
    assert store.path.stat().st_size < before / 10
    assert [session.session_id for session in again.sessions()] == ["s1"]
