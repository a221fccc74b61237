"""The computer's clock is set back, by hand or over the network, while the program runs."""

import time
from pathlib import Path

import pytest
import trio
from harness import CLAUDE, Rig, start, until

import lmarena_proxy
from demo.arena import Switches
from lmarena_proxy import RateLimited, RequestEnded, SessionOpened, Store

DAY = 86_400.0


class Clock:
    """The wall clock, which the test can set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offset, self._now = 0.0, time.time
        monkeypatch.setattr(time, "time", lambda: self._now() + self.offset)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def ask(rig: Rig) -> str:
    response = await rig.chat(CLAUDE, "Hello")
    assert response.status_code == 200, response.text
    return str(response.headers["x-request-id"])


async def test_answers_openings_and_captures_go_on(
    nursery: trio.Nursery, tmp_path: Path, clock: Clock
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    before = await ask(rig)
    clock.offset = -DAY
    after = await ask(rig)
    await rig.http.delete(f"/api/sessions/{next(iter(rig.pool(CLAUDE).sessions))}")
    await rig.fill()
    await rig.twin.open_page("/")
    await until(lambda: rig.program.bridges.obstacle() is None)
    await rig.twin.chat_by_hand(CLAUDE, "By hand")
    await until(lambda: rig.event(SessionOpened)[-1].source == "captured")
    assert len(rig.pool(CLAUDE).sessions) == 5

    page = (await rig.http.get("/api/requests")).json()["data"]
    assert {each["request_id"] for each in page} == {before, after}
    assert (await rig.http.get("/api/statistics?hours=1")).status_code == 200
    assert (await rig.http.get("/metrics")).status_code == 200
    assert all(event.total_seconds >= 0 for event in rig.event(RequestEnded))
    stored = {session.session_id for session in Store(tmp_path / "state").sessions()}
    assert stored == set(rig.pool(CLAUDE).sessions)


@pytest.mark.parametrize("offset", [-DAY, DAY])
async def test_waiting_is_not_measured_with_the_wall_clock(
    nursery: trio.Nursery, tmp_path: Path, clock: Clock, offset: float
) -> None:
    switches = Switches(rate_limit_after=0, rate_limit_times=1, retry_after=2)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches)
    began_at = trio.current_time()
    async with trio.open_nursery() as clients:
        clients.start_soon(ask, rig)
        await until(lambda: rig.event(RateLimited))
        clock.offset = offset
    assert trio.current_time() - began_at >= 1.9


def test_ids_stay_unique_and_well_formed(clock: Clock) -> None:
    ids = []
    for step in range(1000):
        clock.offset = -DAY * (step % 3)
        ids.append(lmarena_proxy.uuid7())
    assert len(set(ids)) == len(ids)
    assert all(len(each) == 36 and each[14] == "7" for each in ids)
