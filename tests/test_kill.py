"""The real process killed at any moment, and the faults of a disk: what was told of is not lost.

The kills come at random moments, from a seed that is printed; `SEED=N` repeats one as far as timing allows.
There are 12 of them, or as many as the environment variable KILLS says (`KILLS=50`).
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    GPT,
    PROGRAM,
    Desk,
    Tables,
    Terminal,
    eventually,
    merge,
    pick_models,
    request_body,
    sit_down,
    until,
    write_config,
    write_models,
)

import lmarena_proxy
from demo.arena import Arena, Switches
from demo.arena import serve as serve_arena
from demo.twin import Twin

KILLS = int(os.environ.get("KILLS", "12"))
MODELS = (CLAUDE, DEEPSEEK, GPT)
OPENED = re.compile(r": session (\S+) message (\S+) \((?:bootstrap|on_demand)\)")
RETIRED = re.compile(r": session (\S+) retired: ")
NOWHERE = "ws://127.0.0.1:9/"
ON_DEMAND: Tables = {"bootstrap": {"enabled": False}}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the disk's faults are made as Linux has them")


async def chat(desk: Desk, text: str = "Hello", model: str = CLAUDE, **rest: Any) -> httpx.Response:
    return await desk.http.post("/v1/chat/completions", json=request_body(model, text, **rest))


async def until_ready(desk: Desk) -> None:
    async def is_ready() -> bool:
        return (await desk.http.get("/ready")).status_code == 200

    await eventually(is_ready)


async def check_answers(desk: Desk, text: str = "Hello") -> None:
    response = await chat(desk, text)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == f"[{CLAUDE}] {text}"


async def check_shuts_down(terminal: Terminal) -> None:
    terminal.press("ctrl-c")
    assert await terminal.exit_code() == 0
    assert "Traceback" not in terminal.output


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def store_of(directory: Path) -> Path:
    return directory / "state" / "lmarena_proxy.sqlite3"


# ── Kills ───────────────────────────────────────────────────────────────────────────────────────────────────


class Ledger:
    """What the program has told of over all its lives, and what its store must therefore hold."""

    def __init__(self, directory: Path, arena: Arena) -> None:
        self.directory, self.arena = directory, arena
        self.opened: set[tuple[str, str]] = set()
        self.retired: set[str] = set()
        self.ended: set[str] = set()
        self.audits = self.cut_lines = 0

    def read_console(self, output: str) -> None:
        self.opened |= set(OPENED.findall(output))
        self.retired |= set(RETIRED.findall(output))

    def read_log(self) -> None:
        """Every line but the last is JSON; the kill may have cut that one."""
        path = self.directory / "logs" / "lmarena_proxy.jsonl"
        content = path.read_bytes() if path.exists() else b""
        *whole, last = content.split(b"\n")
        lines = [json.loads(line) for line in whole]
        if last:
            # The next life would go on in the middle of this line; that is another test's matter.
            self.cut_lines += 1
            path.write_bytes(content[: -len(last)])
        for line in lines:
            if line["event"] == "SessionOpened":
                self.opened.add((line["session_id"], line["message_id"]))
            elif line["event"] == "SessionRetired":
                self.retired.add(line["session_id"])
            elif line["event"] == "RequestEnded":
                self.ended.add(line["request_id"])

    def audit(self, place: Path) -> list[Any]:
        """Look at a copy of the store, so that the program finds what the kill left and mends it itself."""
        self.audits += 1
        self.read_log()
        source = store_of(self.directory)
        if not source.exists():
            assert not self.opened
            return []
        place.mkdir()
        for path in source.parent.iterdir():
            # One only indexes another, and is made anew.
            if path.name.endswith((".sqlite3", "-wal", "-journal")):
                shutil.copy(path, place)
        copy = place / source.name
        assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
        if rows(copy, "PRAGMA user_version") == [(0,)]:
            assert not self.opened  # Killed before it had made the tables.
            return []
        sessions = rows(copy, "SELECT session_id, message_id, model_id, account, source FROM sessions")
        self.check_sessions(sessions)
        with closing(sqlite3.connect(copy)) as connection:
            connection.row_factory = sqlite3.Row
            columns = connection.execute("PRAGMA table_info(requests)").fetchall()
            needed = {column["name"] for column in columns if column["notnull"]}
            assert len(needed) > 5
            for row in connection.execute("SELECT * FROM requests"):
                self.check_request(dict(row), needed)
        return sessions

    def check_sessions(self, sessions: list[Any]) -> None:
        ids = [session_id for session_id, *_ in sessions]
        assert len(ids) == len(set(ids))
        stored = {(session_id, message_id) for session_id, message_id, *_ in sessions}
        # What is being removed when the kill comes may be gone before it is told of.
        removed = self.retired | self.arena.switches.dead_sessions
        must = {pair for pair in self.opened if pair[0] not in removed}
        assert must <= stored, f"lost: {must - stored}"
        for session_id, message_id, model, account, source in sessions:
            conversation = self.arena.sessions[session_id]
            assert (conversation.message_id, conversation.model_id) == (message_id, model)
            assert hashlib.sha256(conversation.account.encode()).hexdigest() == account
            assert source in ("bootstrap", "on_demand")

    def check_request(self, row: dict[str, Any], needed: set[str]) -> None:
        assert all(row[name] is not None for name in needed), row
        assert row["request_id"] in self.ended
        assert row["model"] in MODELS
        assert [message["role"] for message in json.loads(row["messages"])] == ["user"]
        assert isinstance(row["answer"], str)
        if row["status"] == 200:
            assert row["answer"].startswith(f"[{row['model']}] ")
            assert row["session_id"]
            assert row["prompt_tokens"]
            assert row["completion_tokens"]


class Life:
    """One process, from its start to the kill, and what its clients do."""

    def __init__(self, desk: Desk, ledger: Ledger, chance: random.Random, counts: Counter[str]) -> None:
        self.desk, self.ledger, self.chance, self.counts = desk, ledger, chance, counts

    async def load(self) -> None:
        """Clients ask, leave, and the person deletes conversations, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(self.ask_on, number)
            nursery.start_soon(self.remove_some)

    async def ask_on(self, number: int) -> None:
        with contextlib.suppress(httpx.TransportError):  # The kill.
            while True:
                text = f"{number} " + "你好" * self.chance.randrange(200)
                body = request_body(self.chance.choice(MODELS), text, stream=self.chance.random() < 0.5)
                with trio.move_on_after(self.chance.choice((0.05, 60, 60))) as patience:
                    response = await self.desk.http.post("/v1/chat/completions", json=body)
                    # Without a tab for the whole of its grace there may be a 503, too.
                    assert response.status_code in (200, 503), response.text
                    self.counts[f"chat {response.status_code}"] += 1
                self.counts["left"] += patience.cancelled_caught

    async def remove_some(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await trio.sleep(self.chance.uniform(0, 0.1))
                live = [
                    session_id
                    for session_id, _ in sorted(self.ledger.opened)
                    if session_id not in self.ledger.retired | self.ledger.arena.switches.dead_sessions
                ]
                self.ledger.read_console(self.desk.terminal.output)
                if not live:
                    continue
                session_id = self.chance.choice(live)
                if self.chance.random() < 0.3:
                    self.ledger.arena.switches.dead_sessions.add(session_id)
                    self.counts["died"] += 1
                else:
                    # Asked for is as good as told of: the kill may come between removal and line.
                    self.ledger.retired.add(session_id)
                    await self.desk.http.delete(f"/api/sessions/{session_id}")
                    self.counts["deleted"] += 1


async def test_nothing_that_was_told_of_is_lost_by_kills_at_any_moment(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"seed {seed}, {KILLS} kills")
    chance, counts = random.Random(seed), Counter[str]()
    arena = Arena(pick_models(MODELS), Switches(latency_seconds=0.02, line_delay_seconds=0.005))
    arena_url = await nursery.start(serve_arena, arena)
    twin = Twin(arena_url, NOWHERE, backoff_seconds=(0.05, 0.2))
    directory = tmp_path / "program"
    write_models(directory, MODELS)
    ledger = Ledger(directory, arena)
    tables = {"bootstrap": {"settle_seconds": 0, "concurrency": 3}}

    for number in range(KILLS):
        kind = chance.choice(("start", "bootstrap", "load", "load", "both"))
        counts[f"kill at {kind}"] += 1
        if kind == "start":
            config = write_config(directory, tables)
            ports = ("--port", "0", "--bridge-port", "0")
            with Terminal(directory, "--config", str(config), *ports, "--yes") as terminal:
                await trio.sleep(chance.uniform(0, 0.8))
                terminal.kill()
        else:
            options = ("--no-bootstrap",) if kind == "load" else ("--yes",)
            desk = await sit_down(
                nursery, directory, *options, models=MODELS, tables=tables, arena=arena, twin=twin
            )
            with desk.terminal as terminal:
                await desk.make_ready()
                await until_ready(desk)
                life = Life(desk, ledger, chance, counts)
                async with trio.open_nursery() as clients:
                    if kind in ("load", "both"):
                        clients.start_soon(life.load)
                    await trio.sleep(chance.uniform(0, 1.2 if kind == "load" else 0.6))
                    terminal.kill()
                    clients.cancel_scope.cancel()
            await desk.http.aclose()
        ledger.read_console(terminal.output)
        assert "Traceback" not in terminal.output
        assert "damaged" not in terminal.output
        stored = ledger.audit(tmp_path / f"audit-{number}")
        counts["most stored"] = max(counts["most stored"], len(stored))

    last = await sit_down(nursery, directory, "--yes", models=MODELS, tables=tables, arena=arena, twin=twin)
    with last.terminal as terminal:
        await last.make_ready()
        state = await last.phase("done")
        assert all(entry["sessions"] >= 4 for entry in state["pool"])
        assert state["violations"] == []
        # Those that died at the site are found out by being used: each retires one at most.
        for _ in range(len(arena.switches.dead_sessions) + 4):
            arena.record.clear()
            await check_answers(last)
            if [seen.kind for seen in arena.record] == ["retry"]:
                break
        assert [seen.kind for seen in arena.record] == ["retry"]
        assert max(arena.running_pairs.most.values(), default=0) <= 1
        left = sum(entry["sessions"] for entry in (await last.state())["pool"])
        await check_shuts_down(terminal)
        ledger.read_console(terminal.output)
    assert len(ledger.audit(tmp_path / "audit-last")) == left
    print(dict(counts), f"cut log lines {ledger.cut_lines}, opened {len(ledger.opened)}")


# ── The log ─────────────────────────────────────────────────────────────────────────────────────────────────


def log_file(directory: Path) -> Path:
    return directory / "logs" / "lmarena_proxy.jsonl"


def broken_lines(path: Path) -> list[str]:
    """Lines of a log that are no JSON."""
    broken = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            json.loads(line)
        except ValueError:
            broken.append(line)
    return broken


async def test_a_line_that_a_kill_cut_takes_no_other_line_with_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    cut = '{"time":"2025-01-01T00:00:00.000+00:00","level":"INFO","event":"Sess'
    log_file(tmp_path).parent.mkdir()
    log_file(tmp_path).write_text(cut, encoding="utf-8")
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=ON_DEMAND)
    with desk.terminal as terminal:
        await desk.make_ready()
        await check_answers(desk)
        await check_shuts_down(terminal)
    assert broken_lines(log_file(tmp_path)) == [cut]


@ON_LINUX
async def test_a_log_directory_that_cannot_be_is_told_in_one_line_and_the_program_works(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = merge(ON_DEMAND, {"log": {"directory": "/sys/kernel/lmarena_proxy"}})
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=tables)
    with desk.terminal as terminal:
        await desk.make_ready()
        for _ in range(3):
            await check_answers(desk)
        await check_shuts_down(terminal)
        told = [line for line in terminal.lines if "/sys/kernel/lmarena_proxy" in line]
        assert len(told) == 1, terminal.output
        assert "log.directory" in told[0]


@ON_LINUX
async def test_a_log_that_cannot_be_written_is_told_once_and_the_program_works(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    log_file(tmp_path).parent.mkdir()
    log_file(tmp_path).symlink_to("/dev/full")
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=ON_DEMAND)
    with desk.terminal as terminal:
        await desk.make_ready()
        for _ in range(20):
            await check_answers(desk, "你好" * 500)
        await check_shuts_down(terminal)
        told = [line for line in terminal.lines if "cannot be written" in line]
        assert len(told) == 1, terminal.output
        assert str(log_file(tmp_path)) in told[0]
        assert "No space left on device" in told[0]
    assert len(rows(store_of(tmp_path), "SELECT * FROM requests")) == 20


# ── The disk ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 1 MB, if this user may mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only Linux's root can mount a small disk")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Use up what room there is, to the last byte."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return filler


async def test_a_full_disk_ends_nothing_and_is_recovered_from(nursery: trio.Nursery, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        places: Tables = {"storage": {"path": str(disk / "state")}, "log": {"directory": str(disk / "logs")}}
        store, log = disk / "state" / "lmarena_proxy.sqlite3", disk / "logs" / "lmarena_proxy.jsonl"
        desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=merge(ON_DEMAND, places))
        with desk.terminal as terminal:
            await desk.make_ready()
            await check_answers(desk, "before")
            await until(lambda: rows(store, "SELECT * FROM requests"))
            filler = fill(disk)
            for number in range(30):
                await check_answers(desk, f"full {number} " + "你好" * 400)
            # More at once than there are conversations in the store: some open new ones.
            async with trio.open_nursery() as clients:
                for number in range(4):
                    clients.start_soon(check_answers, desk, f"at once {number}")
            await terminal.shows("The store could not write a record")
            await terminal.shows("cannot be written")
            assert (await desk.state())["violations"] == []
            filler.unlink()
            for number in range(10):
                await check_answers(desk, f"after {number}")
            await check_shuts_down(terminal)
            output = terminal.output
        # Each spell of trouble is told once, not each line; space that SQLite frees may end one for a moment.
        assert 1 <= output.count("cannot be written") <= 3, output
        assert rows(store, "PRAGMA integrity_check") == [("ok",)]
        answers = {answer for (answer,) in rows(store, "SELECT answer FROM requests")}
        assert {f"[{CLAUDE}] before"} | {f"[{CLAUDE}] after {number}" for number in range(10)} <= answers
        # A record that did not fit may be cut; that it takes no other with it is tested below.
        assert len(broken_lines(log)) <= 1


@ON_LINUX
def test_a_record_that_a_full_disk_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    """As one of a long conversation may be: it is more than goes to the disk at once."""
    import resource

    path = tmp_path / "log"
    handler = lmarena_proxy.LogFile(path, encoding="utf-8")
    handler.setFormatter(lmarena_proxy.JsonLines())

    def write(text: str) -> None:
        handler.handle(logging.LogRecord("lmarena_proxy", logging.INFO, "", 0, text, None, None))

    write("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this for a moment: as on a disk that has 40 bytes left.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, limits[1]))
    try:
        write("x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for number in range(3):
        write(f"after {number}")
    handler.close()
    assert len(broken_lines(path)) <= 1
    messages = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            messages.append(json.loads(line)["message"])
    assert messages == ["before", "after 0", "after 1", "after 2"]


async def test_a_disk_that_is_full_at_the_start_is_told_in_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        write_models(tmp_path, (CLAUDE,))
        done = run_to_end(tmp_path, {"storage": {"path": str(disk / "state")}})
        assert done.returncode == 2
        assert done.stderr == ""
        [line] = done.stdout.splitlines()
        assert line.startswith("Cannot start: storage.path")
        assert "Traceback" not in done.stdout


# ── The store ───────────────────────────────────────────────────────────────────────────────────────────────


def run_to_end(directory: Path, tables: Tables, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = write_config(directory, tables)
    ports = ("--port", "0", "--bridge-port", "0")
    command = [*PROGRAM, "--config", str(config), *ports, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


async def test_a_store_that_another_process_holds_for_a_while_delays_only_what_it_must(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE, DEEPSEEK), tables=ON_DEMAND)
    with desk.terminal as terminal:
        await desk.make_ready()
        await check_answers(desk)
        done: list[httpx.Response] = []

        async def ask(number: int) -> None:
            done.append(await chat(desk, f"opens {number}", DEEPSEEK))

        with closing(sqlite3.connect(store_of(tmp_path), isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            async with trio.open_nursery() as clients:
                for number in range(4):
                    clients.start_soon(ask, number)
                # Retries note their use and their end without waiting for the disk.
                for number in range(10):
                    await check_answers(desk, f"meanwhile {number}")
                assert len(desk.creates) >= 5
                # A conversation is on disk before it is told of.
                assert terminal.output.count("(on_demand)") == 1
                assert done == []
                other.execute("ROLLBACK")
        assert [response.status_code for response in done] == [200] * 4
        await check_shuts_down(terminal)
        assert "could not write" not in terminal.output
    assert len(rows(store_of(tmp_path), "SELECT * FROM requests")) == 15
    assert len(rows(store_of(tmp_path), "SELECT * FROM sessions")) == 5


def damage(directory: Path) -> bytes:
    path = store_of(directory)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"this is no database, but it is long enough to be read" * 99)
    return path.read_bytes()


async def test_a_damaged_store_is_moved_aside_with_a_message_and_a_new_one_begun(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    content = damage(tmp_path)
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=ON_DEMAND)
    with desk.terminal as terminal:
        assert terminal.output.count("The store is damaged") == 1
        [aside] = store_of(tmp_path).parent.glob("*.damaged-*")
        assert aside.read_bytes() == content
        assert aside.name in terminal.output
        await desk.make_ready()
        await check_answers(desk)
        await check_shuts_down(terminal)
    assert len(rows(store_of(tmp_path), "SELECT * FROM sessions")) == 1
    again = await sit_down(
        nursery, tmp_path, models=(CLAUDE,), tables=ON_DEMAND, arena=desk.arena, twin=desk.twin
    )
    with again.terminal as terminal:
        assert "damaged" not in terminal.output
        await until_ready(again)
        await check_answers(again)
        assert [seen.kind for seen in desk.arena.record] == ["create", "retry"]
        await check_shuts_down(terminal)


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_check_leaves_a_damaged_store_as_it_is(tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE,))
    damage(tmp_path)
    before = contents(store_of(tmp_path).parent)
    done = run_to_end(tmp_path, {}, "--check")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("Cannot start: storage.path")
    assert "Traceback" not in done.stdout + done.stderr
    assert contents(store_of(tmp_path).parent) == before


def test_check_leaves_a_damaged_store_that_a_kill_left_as_it_is(tmp_path: Path) -> None:
    """What SQLite's second file holds beside the damaged one stays apart: a repair may want both."""
    write_models(tmp_path, (CLAUDE,))
    lmarena_proxy.Store(store_of(tmp_path).parent)._connection.close()
    path, left = store_of(tmp_path), tmp_path / "left"
    insert = "INSERT INTO sessions VALUES (?, 'message', 'model', 'account', 'bootstrap', 1.5, NULL, 0, NULL)"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(insert, [(f"session {number}",) for number in range(2000)])
    with closing(sqlite3.connect(path)) as connection:
        with connection:
            connection.execute(insert, ("the last",))
        shutil.copytree(path.parent, left)  # As after a kill: nothing was closed.
    shutil.rmtree(path.parent)
    left.rename(path.parent)
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    wal = path.with_name(path.name + "-wal")
    assert wal.stat().st_size
    before = contents(path.parent)
    done = run_to_end(tmp_path, {}, "--check")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("Cannot start: storage.path")
    after = contents(path.parent)
    assert after[path.name][0] == before[path.name][0]
    assert after[wal.name][0] == before[wal.name][0]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
async def test_store_and_log_are_nobody_elses_to_read_whatever_the_umask(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=ON_DEMAND)
    finally:
        os.umask(before)
    with desk.terminal as terminal:
        await desk.make_ready()
        await check_answers(desk)
        for place, names in (
            (tmp_path / "logs", {"lmarena_proxy.jsonl"}),
            (tmp_path / "state", {"lock", *(store_of(tmp_path).name + end for end in ("", "-wal", "-shm"))}),
        ):
            assert place.stat().st_mode & 0o777 == 0o700
            modes = {path.name: path.stat().st_mode & 0o777 for path in place.iterdir()}
            assert modes == dict.fromkeys(names, 0o600)
        await check_shuts_down(terminal)
