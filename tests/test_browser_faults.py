"""What goes wrong between program, browser and site, tried on the real ones.

The program runs in a terminal, Chromium has the script that it serves, and openai's client asks. Each test
has a program and profiles of its own. What breaks is really broken: tabs are reloaded and closed, the browser
is killed, and a `Way` that carries connections falls silent or refuses.
"""

import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest
import trio
from harness import CLAUDE, DEEPSEEK, Tables, Terminal, merge, write_config, write_models
from playwright.sync_api import Error, Page, Playwright
from userscript_bridge import (
    CHROMIUM,
    SITE,
    ArenaProcess,
    Everything,
    UserscriptBrowser,
    eventually,
    hash_of,
    sign_in,
    wait_status,
)

from lmarena_proxy import PROMPT

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}")

CONFIG: Tables = {
    "server": {"port": 0},
    "bridge": {"port": 0},
    "bootstrap": {"settle_seconds": 0.5},
    "pool": {"sessions_per_model": 2},
    "models": {"include": [CLAUDE, DEEPSEEK]},
}
PASS_THE_CHECK = "go to the LMArena tab and pass it"
SIGN_IN = "accept its terms or sign in"
PIECES = [f"piece {number} " for number in range(40)]


class Way:
    """A TCP path to a port of this machine, in a thread of its own, that can be broken in every way."""

    def __init__(self, port: int) -> None:
        self.target, self.port = port, 0
        self._is_held = self._is_closed = False
        self._numbers = self._lost = 0
        self._carried: set[trio.CancelScope] = set()

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve, ready), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(60)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile nothing passes; what was sent arrives afterwards, as TCP has it."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        """What there is is reset, and meanwhile what begins is, too."""
        self._is_closed = True
        trio.from_thread.run_sync(self._reset, trio_token=self._token)
        try:
            yield
        finally:
            self._is_closed = False

    def lose(self) -> None:
        """Nothing passes any more over the connections that there are, and neither end is told."""
        self._lost = self._numbers

    def _reset(self) -> None:
        for scope in self._carried:
            scope.cancel()

    async def _serve(self, ready: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                serve = partial(trio.serve_tcp, self._carry, 0, host="127.0.0.1")
                listeners: list[trio.SocketListener] = await nursery.start(serve)
                self.port = listeners[0].socket.getsockname()[1]
                ready.set()

    async def _carry(self, near: trio.SocketStream) -> None:
        self._numbers += 1
        number, scope = self._numbers, trio.CancelScope()
        self._carried.add(scope)
        try:
            with scope:
                if not self._is_closed:
                    far = await trio.open_tcp_stream("127.0.0.1", self.target)
                    async with far, trio.open_nursery() as both:
                        both.start_soon(self._pump, number, near, far)
                        both.start_soon(self._pump, number, far, near)
                    return
        except* (OSError, trio.BrokenResourceError):
            pass  # one end is not there, or has reset it: so does this
        finally:
            self._carried.discard(scope)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _pump(self, number: int, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await self._passage(number)
            await sink.send_all(data)
        await self._passage(number)
        await sink.send_eof()

    async def _passage(self, number: int) -> None:
        while self._is_held or number <= self._lost:  # noqa: ASYNC110 (set by another thread)
            await trio.sleep(0.01)


class Asked:
    """A streamed request, asked in a thread of its own: what has come of it so far."""

    def __init__(self, everything: Everything, text: str, model: str = CLAUDE) -> None:
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self.error: openai.APIError | None = None
        self._thread = threading.Thread(target=self._ask, args=(everything.client, model, text), daemon=True)
        self._thread.start()

    def _ask(self, client: openai.OpenAI, model: str, text: str) -> None:
        messages: Any = [{"role": "user", "content": text}]
        try:
            with client.chat.completions.create(model=model, messages=messages, stream=True) as chunks:
                for choice in (choice for chunk in chunks for choice in chunk.choices):
                    self.pieces += [choice.delta.content] if choice.delta.content else []
                    self.finish_reason = choice.finish_reason or self.finish_reason
        except openai.APIError as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def answer(self) -> str:
        """The whole answer, once it has ended well."""
        self._thread.join(120)
        assert self.is_over
        assert self.error is None, self.error
        assert self.finish_reason == "stop"
        return self.text

    def failure(self) -> openai.APIError:
        """The error with which it ended: it has no good end."""
        self._thread.join(120)
        assert self.is_over
        assert self.error is not None, self.text
        assert self.finish_reason is None
        return self.error


@pytest.fixture(scope="module")
def way_to_site(arena_process: ArenaProcess) -> Iterator[Way]:
    with Way(arena_process.port) as way:
        yield way


@pytest.fixture(scope="module")
def browser(
    playwright: Playwright, arena_process: ArenaProcess, way_to_site: Way
) -> Iterator[UserscriptBrowser]:
    started = UserscriptBrowser(playwright, arena_process, port=way_to_site.port)
    yield started
    started.browser.close()


@contextmanager
def running(
    directory: Path, arena: ArenaProcess, browser: UserscriptBrowser, *arguments: str, tables: Tables | None
) -> Iterator[Everything]:
    """All of it, until the test ends; then nothing must have gone wrong inside the program."""
    write_models(directory, [CLAUDE, DEEPSEEK])
    config = write_config(directory, merge(CONFIG, tables or {}))
    arena.reset()
    with Terminal(directory, "--config", str(config), *arguments) as terminal:
        everything = Everything(terminal, arena, browser.browser)
        try:
            yield everything
        finally:
            for context in browser.browser.contexts if browser.browser.is_connected() else ():
                context.close()
        assert "Traceback" not in terminal.output
        assert [line for line in terminal.log_lines() if line["level"] in ("ERROR", "CRITICAL")] == []


@pytest.fixture
def tables() -> Tables:
    """Settings of the program; tests give theirs as a parameter."""
    return {}


@pytest.fixture
def everything(
    tmp_path: Path, arena_process: ArenaProcess, browser: UserscriptBrowser, tables: Tables
) -> Iterator[Everything]:
    with running(tmp_path, arena_process, browser, "--yes", tables=tables) as started:
        yield started


@pytest.fixture
def filled(everything: Everything) -> Everything:
    """With its tab ready, and every model's conversations opened."""
    fill(everything)
    assert [pool["sessions"] for pool in everything.state()["pool"]] == [2, 2]
    return everything


def fill(everything: Everything) -> None:
    sign_in(everything.page)
    wait_done(everything)


def wait_done(everything: Everything) -> None:
    eventually(lambda: everything.state()["bootstrap"]["phase"] == "done", "the end of bootstrap")


def bridge_states(everything: Everything) -> list[str]:
    return [bridge["state"] for bridge in everything.state()["bridges"]]


def wait_states(everything: Everything, *states: str) -> None:
    eventually(lambda: bridge_states(everything) == [*states], f"tabs that are {states}")


def wait_running(everything: Everything, count: int) -> None:
    eventually(lambda: everything.arena.stats()["running"] == count, f"{count} running at the site")


def wait_pings(page: Page) -> None:
    """Until the script knows the pace of the program's pings: until two have come."""
    frames: list[str] = []
    session = page.context.new_cdp_session(page)
    session.on(
        "Network.webSocketFrameReceived", lambda event: frames.append(event["response"]["payloadData"])
    )
    session.send("Network.enable")
    eventually(
        lambda: page.evaluate("1") and sum('"ping"' in frame for frame in frames) >= 2,
        "two pings of the program",
    )
    session.detach()


def outcomes(everything: Everything, kind: str = "retry") -> list[str]:
    return [call["outcome"] for call in everything.calls(kind)]


# ==== Tabs ==================================================================================================


def test_a_tab_reloaded_before_the_first_byte_costs_nothing(filled: Everything) -> None:
    filled.arena.switch(latency_seconds=1.0)
    asked = Asked(filled, "question")
    wait_running(filled, 1)
    filled.page.reload()
    assert asked.answer() == f"[{CLAUDE}] question"
    assert outcomes(filled)[0] == "aborted"
    assert outcomes(filled)[-1] == "complete"


def test_a_tab_reloaded_in_mid_answer_ends_it_with_an_error(filled: Everything) -> None:
    filled.arena.switch(hang_after_lines=2, answers={"*": PIECES})
    asked = Asked(filled, "question")
    eventually(lambda: asked.text == "".join(PIECES[:2]), "the first pieces")
    filled.page.reload()
    error = asked.failure()
    assert "broke off" in error.message
    assert "req_" in error.message
    assert asked.text == "".join(PIECES[:2])
    filled.arena.switch(hang_after_lines=None)
    wait_states(filled, "ready")
    assert [filled.ask(CLAUDE, "again") for _ in range(3)] == ["".join(PIECES)] * 3
    assert filled.sessions(CLAUDE) == 2


def test_a_tab_closed_and_opened_again_is_waited_for(filled: Everything) -> None:
    filled.arena.switch(latency_seconds=1.0)
    asked = [Asked(filled, f"question {number}") for number in range(4)]
    wait_running(filled, 2)
    filled.page.close()
    wait_states(filled)
    assert httpx.get(f"{filled.url}/ready").status_code == 503
    assert not any(each.is_over for each in asked)
    filled.context.new_page().goto(SITE)
    assert [each.answer() for each in asked] == [f"[{CLAUDE}] question {number}" for number in range(4)]


@pytest.mark.parametrize("tables", [{"bridge": {"reconnect_grace_seconds": 1}}])
def test_a_tab_that_does_not_come_back_is_told_in_time(filled: Everything) -> None:
    filled.arena.switch(latency_seconds=60.0)
    asked = Asked(filled, "question")
    wait_running(filled, 1)
    filled.page.close()
    error = asked.failure()
    assert isinstance(error, openai.APIStatusError)
    assert (error.status_code, error.code) == (503, "bridge_unavailable")
    assert "open the site in the browser" in error.message


@pytest.mark.parametrize("tables", [{"bridge": {"heartbeat_seconds": 2}}])
def test_a_tab_that_was_frozen_for_a_while_is_taken_up_again(filled: Everything) -> None:
    """As a browser freezes one, or the machine that sleeps."""
    processes = filled.browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    renderers = [each["id"] for each in processes if each["type"] == "renderer"]
    filled.arena.switch(latency_seconds=1.0)
    asked = Asked(filled, "question")
    wait_running(filled, 1)
    for renderer in renderers:
        os.kill(renderer, signal.SIGSTOP)
    try:
        filled.console("no sign of life for 4 s")
        assert bridge_states(filled) == []
        assert not asked.is_over
    finally:
        for renderer in renderers:
            os.kill(renderer, signal.SIGCONT)
    assert asked.answer() == f"[{CLAUDE}] question"
    wait_status(filled.page, "ready")


def test_a_browser_that_is_killed_and_started_again_goes_on_with_the_work(
    tmp_path: Path, playwright: Playwright, arena_process: ArenaProcess
) -> None:
    doomed = UserscriptBrowser(playwright, arena_process)
    with running(tmp_path, arena_process, doomed, "--yes", tables={}) as everything:
        fill(everything)
        opened = len(everything.calls("create"))
        profile = everything.context.storage_state()
        processes = doomed.browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        arena_process.switch(latency_seconds=1.0)
        asked = [Asked(everything, f"question {number}") for number in range(4)]
        wait_running(everything, 2)
        os.kill(next(each["id"] for each in processes if each["type"] == "browser"), signal.SIGKILL)
        wait_states(everything)
        with pytest.raises(Error):
            everything.page.evaluate("0")
        everything.browser = UserscriptBrowser(playwright, arena_process).browser
        try:
            everything.profile(storage_state=profile).new_page().goto(SITE)
            answers = [each.answer() for each in asked]
        finally:
            everything.browser.close()
        assert answers == [f"[{CLAUDE}] question {number}" for number in range(4)]
        assert len(everything.calls("create")) == opened  # none further: the account is the same


# ==== Network ===============================================================================================


def test_a_network_that_is_gone_for_a_while_is_outlived(filled: Everything, way_to_site: Way) -> None:
    """Attempts go on for `bridge.reconnect_grace_seconds` (30), with pauses of up to 5 s: 20 s are outlived.

    Not to wait so long, it comes back here as soon as the third attempt has failed.
    """
    failed: list[str] = []
    filled.page.on("requestfailed", lambda request: failed.append(request.url))
    with way_to_site.closed():
        asked = Asked(filled, "question")
        eventually(lambda: filled.page.evaluate("1") and len(failed) >= 3, "three failures")
        assert not asked.is_over
        assert bridge_states(filled) == ["ready"]  # the way to this machine is none of the network's
    assert asked.answer() == f"[{CLAUDE}] question"
    assert outcomes(filled) == ["complete"]


@pytest.mark.parametrize("tables", [{"bridge": {"reconnect_grace_seconds": 1}}])
def test_a_network_that_stays_away_is_told(filled: Everything, way_to_site: Way) -> None:
    with way_to_site.closed():
        error = Asked(filled, "question").failure()
    assert isinstance(error, openai.APIStatusError)
    assert (error.status_code, error.code) == (502, "upstream_error")
    assert "Failed to fetch" in error.message
    assert filled.ask(CLAUDE, "again") == f"[{CLAUDE}] again"


def test_a_network_that_breaks_in_mid_answer_ends_it_with_an_error(
    filled: Everything, way_to_site: Way
) -> None:
    filled.arena.switch(hang_after_lines=2, answers={"*": PIECES})
    asked = Asked(filled, "question")
    eventually(lambda: asked.text == "".join(PIECES[:2]), "the first pieces")
    with way_to_site.closed():
        assert "broke off" in asked.failure().message
    filled.arena.switch(hang_after_lines=None)
    assert filled.ask(CLAUDE, "again") == "".join(PIECES)


@pytest.mark.parametrize("tables", [{"bridge": {"heartbeat_seconds": 2}}])
def test_a_browser_that_is_offline_altogether_comes_back_by_itself(filled: Everything) -> None:
    """Chromium then carries nothing, not even to this machine, and closes no connection for it."""
    wait_pings(filled.page)
    filled.arena.switch(latency_seconds=1.0)
    asked = Asked(filled, "question")
    wait_running(filled, 1)
    filled.context.set_offline(True)
    filled.console("no sign of life for 4 s")
    assert bridge_states(filled) == []
    assert not asked.is_over
    filled.context.set_offline(False)
    assert asked.answer() == f"[{CLAUDE}] question"
    wait_status(filled.page, "ready")


def test_an_outage_that_tcp_outlives_only_delays_the_answer(filled: Everything, way_to_site: Way) -> None:
    filled.arena.switch(line_delay_seconds=0.05, answers={"*": PIECES})
    streaming = Asked(filled, "question")
    eventually(lambda: len(streaming.pieces) >= 3, "the first pieces")
    with way_to_site.held():
        so_far = streaming.text
        waiting = Asked(filled, "question")
        filled.page.wait_for_timeout(4000)  # stands for 20 s: the program waits 180 s for a byte
        assert not streaming.is_over
        assert not waiting.is_over
        assert len(streaming.text) <= len(so_far) + 200  # what was on its way
    assert streaming.answer() == "".join(PIECES)
    assert waiting.answer() == "".join(PIECES)
    assert outcomes(filled) == ["complete", "complete"]


@pytest.mark.parametrize("tables", [{"requests": {"idle_timeout_seconds": 2}}])
def test_an_outage_that_lasts_ends_a_running_answer_with_an_error(
    filled: Everything, way_to_site: Way
) -> None:
    filled.arena.switch(line_delay_seconds=0.05, answers={"*": PIECES * 10})
    streaming = Asked(filled, "question")
    eventually(lambda: len(streaming.pieces) >= 3, "the first pieces")
    with way_to_site.held():
        assert "silent for 2 s" in streaming.failure().message
    filled.arena.switch(line_delay_seconds=0.0, answers={})
    assert filled.ask(CLAUDE, "again") == f"[{CLAUDE}] again"


@pytest.mark.parametrize("tables", [{"bridge": {"heartbeat_seconds": 2}}])
def test_a_bridge_that_is_half_open_is_given_up_by_both_ends(everything: Everything) -> None:
    """Nothing says that the path is gone: the program misses pongs, and the script misses pings."""
    bridge_port = everything.script.partition("ws://127.0.0.1:")[2].partition("/")[0]
    with Way(int(bridge_port)) as way:
        everything.script = everything.script.replace(f"127.0.0.1:{bridge_port}/", f"127.0.0.1:{way.port}/")
        page = everything.profile().new_page()
        sign_in(page)
        wait_done(everything)
        first = everything.state()["bridges"][0]["id"]
        wait_pings(page)
        everything.arena.switch(latency_seconds=3.0)
        asked = Asked(everything, "question")
        wait_running(everything, 1)
        way.lose()
        everything.console("no sign of life for 4 s")
        everything.arena.switch(latency_seconds=0.0)
        eventually(lambda: bridge_states(everything) == ["ready"], "the tab again")
        assert everything.state()["bridges"][0]["id"] != first
        assert asked.answer() == f"[{CLAUDE}] question"
        wait_status(page, "ready")


# ==== Several tabs ==========================================================================================


def test_the_tab_that_stands_by_takes_over_what_waits(filled: Everything) -> None:
    opened = len(filled.calls("create"))
    second = filled.context.new_page()
    second.goto(SITE)
    wait_status(second, "standing_by")
    assert len(filled.state()["bridges"]) == 1
    filled.arena.switch(latency_seconds=1.0)
    asked = [Asked(filled, f"question {number}") for number in range(4)]
    wait_running(filled, 2)
    filled.page.close()
    assert [each.answer() for each in asked] == [f"[{CLAUDE}] question {number}" for number in range(4)]
    wait_status(second, "ready")
    assert bridge_states(filled) == ["ready"]
    assert len(filled.calls("create")) == opened


def test_two_profiles_answer_each_in_its_own_conversations(filled: Everything) -> None:
    other = filled.profile().new_page()
    sign_in(other)
    wait_states(filled, "ready", "ready")
    first, second = (bridge["account"] for bridge in filled.state()["bridges"])
    assert first != second
    filled.arena.switch(latency_seconds=0.5)
    asked = [Asked(filled, f"question {number}") for number in range(12)]
    for number, each in enumerate(asked):
        assert each.answer() == f"[{CLAUDE}] question {number}"
    filled.page.close()
    wait_states(filled, "ready")
    answered_before = len(filled.arena.record())
    assert [filled.ask(CLAUDE, "alone") for _ in range(5)] == [f"[{CLAUDE}] alone"] * 5
    record = filled.arena.record()
    owners = {call["session_id"]: call["account"] for call in record if call["kind"] == "create"}
    assert all(owners[call["session_id"]] == call["account"] for call in record)
    assert {call["outcome"] for call in record[answered_before:]} == {"complete"}
    assert {hash_of(call["account"]) for call in record} == {first, second}
    assert {hash_of(call["account"]) for call in record[answered_before:]} == {second}


# ==== The human check =======================================================================================


def test_a_check_at_the_beginning_holds_the_work_until_the_person_has_passed_it(
    everything: Everything,
) -> None:
    page = everything.page
    everything.arena.switch(check=True)
    page.goto(SITE)
    asked = Asked(everything, "question")
    everything.console(PASS_THE_CHECK)
    wait_status(page, "verification")
    wait_states(everything, "verification")
    assert httpx.get(f"{everything.url}/ready").status_code == 503
    page.click("#pass-check")
    everything.console(SIGN_IN)
    wait_status(page, "sign_in")
    wait_states(everything, "sign_in")
    assert everything.arena.record() == []
    assert not asked.is_over
    page.click("#accept-terms")
    assert asked.answer() == f"[{CLAUDE}] question"
    wait_status(page, "ready")
    wait_done(everything)


def test_a_check_between_two_answers_is_shown_at_most_once_a_minute(filled: Everything) -> None:
    page, opened = filled.page, len(filled.calls("create"))
    page.wait_for_load_state()
    loads: list[Page] = []
    page.on("load", lambda loaded: loads.append(loaded))
    filled.arena.control("POST", "challenge")
    asked = [Asked(filled, f"question {number}") for number in range(4)]
    wait_status(page, "verification")  # the program has had the page loaded
    filled.console(PASS_THE_CHECK)
    wait_states(filled, "verification")
    assert not any(each.is_over for each in asked)
    page.click("#pass-check")
    assert [each.answer() for each in asked] == [f"[{CLAUDE}] question {number}" for number in range(4)]
    wait_status(page, "ready")
    assert len(loads) == 2  # the check's page, and the site's

    told = filled.terminal.output.count(PASS_THE_CHECK)
    filled.arena.control("POST", "challenge")
    again = Asked(filled, "again")
    filled.console(PASS_THE_CHECK, told + 1)
    wait_states(filled, "verification")
    wait_status(page, "check_due")
    page.wait_for_timeout(2000)
    assert len(loads) == 2  # within the minute the person is asked to load it
    assert not again.is_over
    page.reload()
    page.click("#pass-check")
    assert again.answer() == f"[{CLAUDE}] again"
    wait_status(page, "ready")
    assert len(filled.calls("create")) == opened


def test_a_check_while_one_answer_streams_and_others_wait_loses_none_of_these(filled: Everything) -> None:
    page = filled.page
    filled.arena.switch(line_delay_seconds=0.1, answers={CLAUDE: PIECES})
    streaming = Asked(filled, "long")
    eventually(lambda: streaming.pieces, "the first piece")
    filled.arena.control("POST", "challenge")
    asked = [Asked(filled, f"question {number}", DEEPSEEK) for number in range(4)]
    filled.console(PASS_THE_CHECK)
    wait_status(page, "verification")
    page.click("#pass-check")
    assert [each.answer() for each in asked] == [f"[{DEEPSEEK}] question {number}" for number in range(4)]
    eventually(lambda: streaming.is_over, "the end of the running answer")
    assert streaming.answer() == "".join(PIECES)


# ==== The sign-in ===========================================================================================


def test_a_stale_sign_in_is_renewed_without_the_person(filled: Everything) -> None:
    opened = len(filled.calls("create"))
    filled.arena.control("POST", "expire")
    asked = [Asked(filled, f"question {number}") for number in range(4)]
    assert [each.answer() for each in asked] == [f"[{CLAUDE}] question {number}" for number in range(4)]
    wait_status(filled.page, "ready")
    assert len(filled.calls("create")) == opened


def test_a_sign_out_at_the_site_holds_the_work_until_the_person_signs_in(filled: Everything) -> None:
    page = filled.page
    filled.arena.control("POST", "sign_out")
    asked = [Asked(filled, f"question {number}") for number in range(4)]
    filled.console(SIGN_IN)
    wait_status(page, "sign_in")
    wait_states(filled, "sign_in")
    assert not any(each.is_over for each in asked)
    page.click("#accept-terms")
    assert [each.answer() for each in asked] == [f"[{CLAUDE}] question {number}" for number in range(4)]
    wait_status(page, "ready")


def test_conversations_of_an_account_rest_while_another_is_signed_in(
    tmp_path: Path, arena_process: ArenaProcess, browser: UserscriptBrowser
) -> None:
    def sessions_of(calls: list[dict[str, Any]]) -> set[str]:
        return {call["session_id"] for call in calls}

    with running(tmp_path, arena_process, browser, tables={}) as started:

        def signed_in() -> str:
            wait_states(started, "ready")
            return str(started.state()["bridges"][0]["account"])

        everything, page = started, started.page
        sign_in(page)
        everything.console(PROMPT)
        everything.terminal.press("enter")
        wait_done(everything)
        first, own = signed_in(), sessions_of(everything.calls("create"))
        everything.ask(CLAUDE, "first")
        cookies = page.context.cookies(SITE)

        page.context.clear_cookies()
        everything.console(SIGN_IN, 2)
        sign_in(page)
        everything.console(PROMPT, 2)
        assert everything.state()["bootstrap"]["phase"] == "confirm"
        assert signed_in() != first
        before = len(everything.arena.record())
        everything.ask(CLAUDE, "before the question is answered")
        everything.terminal.press("enter")
        wait_done(everything)
        for _ in range(3):
            everything.ask(CLAUDE, "as another")
        calls = everything.arena.record()[before:]
        assert {call["outcome"] for call in calls} == {"complete"}
        assert sessions_of(calls).isdisjoint(own)
        assert hash_of(calls[0]["account"]) == signed_in()
        assert len(sessions_of(calls)) == 4  # two of each model

        page.context.clear_cookies()
        page.context.add_cookies(cookies)  # type: ignore[arg-type]
        page.goto(SITE)
        eventually(lambda: signed_in() == first, "the first account")
        before = len(everything.arena.record())
        for _ in range(3):
            everything.ask(CLAUDE, "first again")
        calls = everything.arena.record()[before:]
        assert [call["outcome"] for call in calls] == ["complete"] * 3
        assert sessions_of(calls) <= own
        page.wait_for_timeout(1500)  # longer than it would take to settle
        assert everything.state()["bootstrap"]["phase"] == "done"
        assert everything.terminal.output.count(PROMPT) == 2
