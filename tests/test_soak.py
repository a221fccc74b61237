"""Everything at once for a while: clients that ask and leave, tabs that come and go, a site that fails.

It takes 30 s, or as long as the environment variable SOAK_SECONDS says (`SOAK_SECONDS=3600`). The seed is
printed, and `SEED=N` repeats one as far as timing allows.
"""

import contextlib
import ctypes
import gc
import io
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from harness import CLAUDE, DEEPSEEK, Rig, Stream, Tables, model_id, request_body, start, until, whole

import lmarena_proxy
from demo.arena import Failure, Switches
from demo.twin import Twin
from lmarena_proxy import ModelPool, RateLimitGate, RequestEnded

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
MODELS = (CLAUDE, DEEPSEEK)
CLIENTS = 10
NOWHERE = "ws://127.0.0.1:9/"
GROWTH_LIMIT_MB = 5
TABLES: Tables = {
    "pool": {"sessions_per_model": 3},
    "bridge": {"reconnect_grace_seconds": 0.5, "heartbeat_seconds": 2},
    "requests": {
        "first_byte_timeout_seconds": 1,
        "idle_timeout_seconds": 0.7,
        "total_timeout_seconds": 20,
        "queue_timeout_seconds": 10,
        "person_wait_seconds": 3,
        "commit_after_seconds": 0.3,
        "keepalive_seconds": 0.1,
    },
}
# What a client may be told while the site fails. Never 500: that is an error of the program.
STATUSES = {200, 403, 429, 502, 503, 504}
# For a few answers each, so that something goes well between them.
TROUBLES: dict[str, dict[str, Any]] = {
    "rate limit": {"rate_limit_after": 3, "rate_limit_seconds": 0.3, "retry_after": 1},
    "no retry-after": {"rate_limit_after": 2, "rate_limit_times": 1},
    "a3 at once": {"a3": "busy", "trouble_times": 2},
    "a3 later": {"a3": "broken", "a3_after_lines": 2, "trouble_times": 3},
    "cut": {"cut_after_lines": 1, "trouble_times": 3},
    "hang at once": {"hang_after_lines": 0, "trouble_times": 2},
    "hang later": {"hang_after_lines": 2, "trouble_times": 3},
    "failures": {"failures": {"*": Failure(status=500, times=3)}},
    "gateway": {"failures": {"*": Failure(status=502, body="<html>", content_type="text/html", times=2)}},
    "gone": {"failures": {"*": Failure(status=404, on="retry", times=2)}},
    "slow": {"line_delay_seconds": 0.1},
    "late": {"latency_seconds": 0.4},
    "crumbs": {"chunk_bytes": 1},
}
CALM = Switches(latency_seconds=0.005, line_delay_seconds=0.003)


class Soak:
    """The clients, the person, the faults, and a count of what they met."""

    def __init__(self, rig: Rig, chance: random.Random) -> None:
        self.rig, self.chance = rig, chance
        self.twins = [rig.twin, Twin(rig.arena_url, rig.program.api.bridge_url, backoff_seconds=(0.05, 0.2))]
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.is_over = False
        rig.program.bus.subscribe(self.note)

    def note(self, event: lmarena_proxy.Event) -> None:
        self.counts[type(event).__name__] += 1
        if isinstance(event, RequestEnded):
            self.statuses[event.status] += 1

    # Clients.

    async def ask_on(self, number: int) -> None:
        while not self.is_over:
            rest: dict[str, Any] = {}
            if self.chance.random() < 0.2:
                rest["n"] = 2
            if self.chance.random() < 0.2:
                rest["stop"] = ["3 好"]
            if self.chance.random() < 0.2:
                rest["max_tokens"] = 5
            patience = self.chance.choice((0.01, 0.1, 0.5, 120, 120, 120, 120))
            text = f"{number} " + " ".join(f"{index} 好" for index in range(self.chance.randrange(2, 40)))
            body = request_body(self.chance.choice(MODELS), text, stream=self.chance.random() < 0.5, **rest)
            with trio.move_on_after(patience) as left:
                await self.check(await self.rig.http.post("/v1/chat/completions", json=body), body)
            self.counts["client left"] += left.cancelled_caught

    async def check(self, response: httpx.Response, body: dict[str, Any]) -> None:
        status, wanted = response.status_code, f"[{body['model']}] {body['messages'][0]['content']}"
        assert status in STATUSES, response.text
        if status != 200:
            self.counts[f"{status} {response.json()['error']['code']}"] += 1
            await trio.sleep(0.05)
            return
        if not body["stream"]:
            choices = whole(response).choices
            assert len(choices) == body.get("n", 1)
            assert all(wanted.startswith(choice.message.content or "") for choice in choices)
            self.counts["whole"] += 1
            return
        stream = Stream(response.text)
        assert stream.has_done
        for error in stream.errors:
            assert error["code"] != "internal_error", response.text
            self.counts[f"streamed {error['code']}"] += 1
        if not stream.errors:
            assert len(stream.finish_reasons) == body.get("n", 1)
            self.counts["streamed"] += 1
        for index in range(body.get("n", 1)):
            pieces = [choice.delta.content or "" for choice in stream.choices if choice.index == index]
            assert wanted.startswith("".join(pieces))

    # The person.

    async def attend(self) -> None:
        """Pass checks and accept terms, a little late."""
        while True:
            await trio.sleep(0.1)
            for twin in self.twins:
                acts: dict[str, Callable[[], Awaitable[Any]]] = {
                    "verification": twin.pass_check,
                    "sign_in": twin.accept_terms,
                }
                state = twin.state
                if act := acts.get(state):
                    try:
                        await act()
                        self.counts[f"person: {state}"] += 1
                    except httpx.HTTPStatusError:
                        await twin.open_page()  # The check came between; the page shows it.
                    except httpx.TransportError:
                        self.counts["person: offline"] += 1

    # Faults.

    async def trouble(self) -> None:
        faults: dict[str, Callable[[], Awaitable[None]]] = {
            "dead": self.die,
            "check": self.check_due,
            "expire": self.expire,
            "reload": self.reload,
            "close": self.close,
            "delete": self.delete,
            "hand": self.chat_by_hand,
            "sign out": self.sign_out,
            "offline": self.go_offline,
        }
        while not self.is_over:
            await trio.sleep(self.chance.uniform(0, 0.5))
            name = self.chance.choice((*TROUBLES, *faults))
            self.counts[f"fault: {name}"] += 1
            if name in TROUBLES:
                self.set(**TROUBLES[name])
            else:
                await faults[name]()

    def set(self, **changes: Any) -> None:
        """These troubles in place of the last ones; the check stays due if it is."""
        arena = self.rig.arena
        check, dead = arena.switches.check, arena.switches.dead_sessions
        arena.switches = CALM
        arena.switch(**changes, check=check)
        arena.switches.dead_sessions = dead

    def some_session(self) -> str | None:
        ids = [session_id for pool in self.rig.program.pool for session_id in pool.sessions]
        return self.chance.choice(ids) if ids else None

    async def die(self) -> None:
        if session_id := self.some_session():
            self.rig.arena.switches.dead_sessions.add(session_id)

    async def delete(self) -> None:
        if session_id := self.some_session():
            response = await self.rig.http.delete(f"/api/sessions/{session_id}")
            assert response.status_code in (200, 404)

    async def check_due(self) -> None:
        self.rig.arena.require_check()
        await trio.sleep(self.chance.uniform(0.2, 1))

    async def expire(self) -> None:
        self.rig.arena.expire_sign_ins()

    async def reload(self) -> None:
        await self.chance.choice(self.twins).open_page()

    async def sign_out(self) -> None:
        """The person signs out, and deletes what nobody can use from then on."""
        twin = self.chance.choice(self.twins)
        if twin.state == "ready":
            account = twin.account
            with contextlib.suppress(httpx.HTTPStatusError):  # The check is due.
                await twin.sign_out()
            for pool in self.rig.program.pool:
                for session in [*pool.sessions.values()]:
                    if session.account == account:
                        await self.rig.http.delete(f"/api/sessions/{session.session_id}")

    async def go_offline(self) -> None:
        """The site cannot be reached from a tab."""
        twin = self.chance.choice(self.twins)
        twin.http.base_url = httpx.URL("http://127.0.0.1:9")
        await trio.sleep(self.chance.uniform(0.05, 1))
        twin.http.base_url = httpx.URL(self.rig.arena_url)

    async def close(self) -> None:
        """A tab is gone for a while; or both are."""
        gone = self.chance.choice((self.twins[:1], self.twins[1:], self.twins))
        for twin in gone:
            twin.bridge_url = NOWHERE
            twin.leave_page()
        await trio.sleep(self.chance.uniform(0, 1))
        for twin in gone:
            twin.bridge_url = self.rig.program.api.bridge_url

    async def chat_by_hand(self) -> None:
        """The person opens a conversation, which the pool may use from then on."""
        twin = self.chance.choice(self.twins)
        if twin.find_models():
            with trio.move_on_after(1):
                await twin.chat_by_hand(self.chance.choice(MODELS), "by hand")

    # What would grow in the test and not in the program.

    async def tidy(self) -> None:
        while True:
            await trio.sleep(0.5)
            self.forget()

    def forget(self) -> None:
        arena, pool = self.rig.arena, self.rig.program.pool
        arena.record.clear()
        arena.running_pairs.most.clear()
        kept = {session_id for each in pool for session_id in each.sessions}
        for session_id in [*arena.sessions]:
            if session_id not in kept and not arena.sessions[session_id].running:
                arena.switches.dead_sessions.discard(session_id)
                del arena.sessions[session_id]
        self.rig.events.clear()
        file = self.rig.program.console.screen.file
        assert isinstance(file, io.StringIO)
        file.seek(0)
        file.truncate()


def resident_mb() -> float:
    """The process's memory, without what is merely not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Errors(logging.Handler):
    """What the program's log has of tracebacks; the records themselves are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter().format(record)
        if record.exc_info or "Traceback" in text or "could not" in text:
            self.found.append(text)


async def test_faults_under_load_leave_nothing_behind(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"seed {seed}, {SECONDS:g} s")
    # Waits that are meant for days, made fit for seconds.
    monkeypatch.setattr(lmarena_proxy, "RELOAD_INTERVAL_SECONDS", 0.2)
    monkeypatch.setattr(RateLimitGate, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(RateLimitGate, "SLOWEST", 10.0)
    # The records of an hour are not kept by pytest.
    monkeypatch.setattr(lmarena_proxy.log, "propagate", False)
    errors = Errors()
    lmarena_proxy.log.addHandler(errors)
    tokens: Counter[str] = Counter()
    resize = ModelPool.resize

    def watched_resize(pool: ModelPool, accounts: Any) -> None:
        resize(pool, accounts)
        tokens[pool.model.id] = max(tokens[pool.model.id], int(pool.limiter.total_tokens))

    monkeypatch.setattr(ModelPool, "resize", watched_resize)
    try:
        rig = await start(nursery, tmp_path, models=MODELS, tables=TABLES, switches=CALM, filled=True)
        rig.twin.backoff_seconds = (0.05, 0.2)
        program = rig.program
        soak = Soak(rig, random.Random(seed))
        await nursery.start(soak.twins[1].run)
        await soak.twins[1].accept_terms()
        nursery.start_soon(soak.attend)
        nursery.start_soon(soak.tidy)
        measured: list[float] = []
        async with trio.open_nursery() as busy:
            for number in range(CLIENTS):
                busy.start_soon(soak.ask_on, number)
            busy.start_soon(soak.trouble)
            for _ in range(3):
                await trio.sleep(SECONDS / 3)
                measured.append(resident_mb() if sys.platform == "linux" else 0.0)
            soak.is_over = True
        most = {model: rig.arena.max_running(model_id(model)) for model in MODELS}
        print(dict(sorted(soak.counts.items())), dict(soak.statuses))
        print("MB", measured, "at once", most, "tokens", dict(tokens))

        # All is well again: so is the program.
        rig.arena.switches = CALM
        rig.arena.start_counters()
        for twin in soak.twins:
            await twin.open_page()
        await until(lambda: len(program.bridges.accounts()) == 2)
        await until(lambda: program.answers.active == 0)
        assert sum(bridge.in_flight for bridge in program.bridges) == 0
        assert program.pool.violations() == []
        for pool in program.pool:
            assert pool.idle == len(pool.sessions), pool
            assert pool.limiter.borrowed_tokens == 0, pool
            assert pool.waiting == 0
            assert not pool.leases | pool.waiters.keys()
        await until(lambda: rig.arena.stats()["running"] == 0)
        for model in MODELS:
            for stream in (False, True):
                response = await rig.chat(model, "Hello", stream=stream)
                assert response.status_code == 200, response.text
        assert errors.found == []
        assert soak.statuses.keys() <= STATUSES | {499}
        for model in MODELS:
            assert most[model] <= tokens[model_id(model)]
        counts = soak.counts
        assert counts["whole"] > 10
        assert counts["streamed"] > 10
        assert counts["client left"] > 10
        soak.forget()
        if sys.platform == "linux":
            measured.append(resident_mb())
            assert measured[-1] - measured[0] < GROWTH_LIMIT_MB, measured
    finally:
        lmarena_proxy.log.removeHandler(errors)
