"""The whole program as a person meets it: a process in a terminal, the stand-in arena and a tab beside it."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
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
    ROOT,
    SIX_MODELS,
    Desk,
    Held,
    Stream,
    Tables,
    Terminal,
    eventually,
    free_port,
    model_id,
    pick_models,
    plain_client,
    request_body,
    sit_down,
    start,
    until,
    write_config,
    write_models,
)

import lmarena_proxy
from demo.arena import Arena, Failure, Switches
from demo.arena import serve as serve_arena
from demo.twin import Twin

PROMPT = "按回车键继续"
START_LIMIT_SECONDS = 1.5
IDLE_LIMIT_MB = 50
SLOW_GUARD = 4  # a machine that is busy with other tests may take so many times as long
SESSION_LINE = re.compile(r"(\S+): session (\S+) message (\S+) \(bootstrap\)")


async def at_the_question(nursery: trio.Nursery, directory: Path, *arguments: str, **rest: Any) -> Desk:
    """A program that has asked its question."""
    desk = await sit_down(nursery, directory, *arguments, **rest)
    try:
        await desk.make_ready()
        await desk.terminal.shows(PROMPT)
        await desk.phase("confirm")
    except BaseException:
        desk.terminal.__exit__()
        raise
    return desk


# ── Up to the question ──────────────────────────────────────────────────────────────────────────────────────


async def test_the_banner_names_all_addresses_and_what_is_waited_for(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path)
    with desk.terminal as terminal:
        output = terminal.output
        assert f"{desk.url}/v1" in output
        assert f"{desk.url}/bridge.user.js" in output
        assert "Waiting for an LMArena tab" in output
        assert (await desk.state())["bootstrap"]["phase"] == "waiting_for_browser"
        assert (await desk.http.get("/health")).status_code == 200
        assert (await desk.http.get("/ready")).status_code == 503
        assert PROMPT not in output
        assert desk.arena.record == []


@pytest.mark.parametrize(("host", "name"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
async def test_addresses_are_told_as_this_machine_s_browser_reaches_them(
    nursery: trio.Nursery, tmp_path: Path, host: str, name: str
) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    tables = {"server": {"host": host, "api_key": "k"}, "bridge": {"host": host}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, connected=False)
    rig.http.headers["authorization"] = "Bearer k"
    port = int(rig.url.rpartition(":")[2])
    urls = (await rig.state())["urls"]
    assert (rig.url, urls["api"]) == (f"http://{name}:{port}", f"http://{name}:{port}/v1")
    assert urls["userscript"] == f"http://{name}:{port}/bridge.user.js"
    assert urls["bridge"].startswith(f"ws://{name}:")
    script = (await rig.http.get("/bridge.user.js")).text
    assert script.count(urls["userscript"]) >= 3
    assert f"//{host}:" not in script.replace("[", "").replace("]", "")


async def test_check_and_sign_in_are_asked_of_the_person_and_nothing_is_sent_before_enter(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path, switches=Switches(check=True))
    with desk.terminal as terminal:
        await nursery.start(desk.twin.run)
        await terminal.shows("The site wants its human check passed")
        assert desk.twin.state == "verification"
        await trio.sleep(0.7)  # longer than the settling window
        assert (await desk.state())["bootstrap"]["phase"] == "waiting_for_browser"

        await desk.twin.pass_check()
        await terminal.shows("The site wants a sign-in")
        await trio.sleep(0.7)
        assert (await desk.state())["bootstrap"]["phase"] == "waiting_for_browser"

        await desk.twin.accept_terms()
        await terminal.shows(PROMPT)
        await desk.phase("confirm")
        assert terminal.lines.count(PROMPT) == 1
        assert desk.arena.record == []
        counts = {"phase": "confirm", "opened": 0, "planned": 0, "skipped": []}
        assert (await desk.state())["bootstrap"].items() >= counts.items()


async def test_settling_starts_again_when_readiness_is_lost(nursery: trio.Nursery, tmp_path: Path) -> None:
    desk = await sit_down(nursery, tmp_path, tables={"bootstrap": {"settle_seconds": 4}})
    with desk.terminal as terminal:
        await desk.make_ready()
        await desk.phase("settling")
        await trio.sleep(0.5)
        await desk.twin.sign_out()
        await desk.phase("waiting_for_browser")
        assert PROMPT not in terminal.output
        started = trio.current_time()
        await desk.make_ready()
        await terminal.shows(PROMPT)
        assert trio.current_time() - started >= 3.9
        assert desk.arena.record == []


async def test_keys_pressed_before_the_question_do_not_answer_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path)
    with desk.terminal as terminal:
        terminal.press("enter")
        await desk.make_ready()
        await terminal.shows(PROMPT)
        await trio.sleep(1)
        assert (await desk.state())["bootstrap"]["phase"] == "confirm"
        assert desk.arena.record == []


# ── Enter ───────────────────────────────────────────────────────────────────────────────────────────────────


async def check_opened(desk: Desk, names: tuple[str, ...] = SIX_MODELS) -> None:
    """Four conversations for each model, no more, with the message Hi, each on console and in the log."""
    creates = desk.creates
    assert len(creates) == 4 * len(names)
    assert Counter(seen.model_id for seen in creates) == {model_id(name): 4 for name in names}
    assert [seen.body["messages"][0]["content"] for seen in creates] == ["Hi"] * len(creates)
    assert all(desk.arena.max_running(model_id(name)) <= 4 for name in names)
    wanted = {(seen.session_id, seen.message_id) for seen in creates}
    # The console's lines take a moment through the terminal or the pipe.
    await until(lambda: {found[1:] for found in SESSION_LINE.findall(desk.terminal.output)} == wanted)
    logged = [line for line in desk.terminal.log_lines() if line["event"] == "SessionOpened"]
    assert {(line["session_id"], line["message_id"]) for line in logged} == wanted
    assert {line["model"] for line in logged} == set(names)


async def test_enter_opens_four_conversations_for_every_model_and_shows_each(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await at_the_question(nursery, tmp_path, switches=Switches(latency_seconds=0.1))
    with desk.terminal as terminal:
        terminal.press("enter")
        state = await desk.phase("done")
        counts = {"phase": "done", "opened": 24, "planned": 24, "skipped": []}
        assert state["bootstrap"].items() >= counts.items()
        assert all((entry["sessions"], entry["idle"]) == (4, 4) for entry in state["pool"])
        output = await terminal.shows("Models: 6 ready")
        await terminal.shows("└")
        await check_opened(desk)
        for name in SIX_MODELS:
            assert re.search(rf"│ {re.escape(name)} +│ 4 +│ ready", terminal.output), output
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0


async def test_yes_answers_the_question(nursery: trio.Nursery, tmp_path: Path) -> None:
    desk = await sit_down(nursery, tmp_path, "--yes")
    with desk.terminal as terminal:
        await desk.make_ready()
        await desk.phase("done")
        await check_opened(desk)
        assert PROMPT not in terminal.output


async def test_the_api_answers_the_question_as_enter_does(nursery: trio.Nursery, tmp_path: Path) -> None:
    desk = await at_the_question(nursery, tmp_path)
    with desk.terminal:
        response = await desk.http.post("/api/bootstrap", json={"action": "start"})
        assert response.status_code == 202
        await desk.phase("done")
        await check_opened(desk)


async def test_without_a_terminal_bootstrap_is_skipped_with_a_notice_and_the_api_serves(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path, keyboard=False)
    with desk.terminal as terminal:
        await desk.make_ready()
        await desk.phase("skipped")
        await terminal.shows("there is no terminal to ask at")
        assert PROMPT not in terminal.output
        assert desk.creates == []
        response = await desk.http.post("/v1/chat/completions", json=request_body(CLAUDE, "Hello"))
        assert response.json()["choices"][0]["message"]["content"] == f"[{CLAUDE}] Hello"


async def test_without_a_terminal_yes_still_opens(nursery: trio.Nursery, tmp_path: Path) -> None:
    desk = await sit_down(nursery, tmp_path, "--yes", keyboard=False, models=(CLAUDE,))
    with desk.terminal:
        await desk.make_ready()
        await desk.phase("done")
        await check_opened(desk, (CLAUDE,))


async def test_no_bootstrap_skips_it(nursery: trio.Nursery, tmp_path: Path) -> None:
    desk = await sit_down(nursery, tmp_path, "--no-bootstrap", models=(CLAUDE,))
    with desk.terminal as terminal:
        await desk.make_ready()
        await desk.phase("skipped")
        await trio.sleep(0.7)
        assert PROMPT not in terminal.output


# ── Ctrl-C and SIGTERM ──────────────────────────────────────────────────────────────────────────────────────


async def test_ctrl_c_at_the_question_skips_bootstrap_and_the_api_serves_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await at_the_question(nursery, tmp_path)
    with desk.terminal as terminal:
        terminal.press("ctrl-c")
        await desk.phase("skipped")
        assert desk.creates == []
        response = await desk.http.post("/v1/chat/completions", json=request_body(CLAUDE, "Hello"))
        assert response.status_code == 200
        assert (await desk.http.post("/api/bootstrap", json={"action": "start"})).status_code == 202
        await desk.phase("done")
        assert len(desk.creates) == 24
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0


async def test_ctrl_c_half_way_keeps_what_was_opened_and_serves_on(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, free=10)
    desk = await at_the_question(nursery, tmp_path)
    with desk.terminal as terminal:
        terminal.press("enter")

        async def half_way() -> bool:
            return int((await desk.state())["bootstrap"]["opened"]) == 10

        await eventually(half_way)
        await until(lambda: len(desk.creates) == 18)
        terminal.press("ctrl-c")
        state = await desk.phase("aborted")
        await terminal.shows("Models:")
        await terminal.shows("└")
        opened = state["bootstrap"]["opened"]
        assert opened == 10
        assert sum(entry["sessions"] for entry in state["pool"]) == opened
        await until(lambda: desk.arena.stats()["running"] == 0)
        assert len(set(SESSION_LINE.findall(terminal.output))) == opened

        held.release()
        response = await desk.http.post("/v1/chat/completions", json=request_body(CLAUDE, "Hello"))
        assert response.status_code == 200
        assert (await desk.http.post("/api/bootstrap", json={"action": "start"})).status_code == 202
        await desk.phase("done")
        finished = Counter(seen.model_id for seen in desk.creates if seen.outcome == "complete")
        assert finished == {model_id(name): 4 for name in SIX_MODELS}
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0


async def test_ctrl_c_when_nothing_runs_shuts_down_with_exit_code_0(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,))
    with desk.terminal as terminal:
        await desk.phase("waiting_for_browser")
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0
        assert "Traceback" not in terminal.output
        with pytest.raises(httpx.TransportError):
            await desk.http.get("/health")


async def hanging_answer(desk: Desk, received: list[str]) -> None:
    """A client that keeps what it reads of a stream."""
    body = request_body(CLAUDE, "Hello", stream=True)
    try:
        async with desk.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for text in response.aiter_text():
                received.append(text)
    except httpx.TransportError as error:
        received.append(f"<{type(error).__name__}>")


async def test_a_second_ctrl_c_ends_at_once_with_exit_code_130(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables: Tables = {"server": {"shutdown_grace_seconds": 600}, "bootstrap": {"enabled": False}}
    switches = Switches(hang_after_lines=1)
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    with desk.terminal as terminal:
        await desk.make_ready()
        received: list[str] = []
        nursery.start_soon(hanging_answer, desk, received)
        await until(lambda: CLAUDE[:4] in "".join(received))
        terminal.press("ctrl-c")
        await terminal.shows("Ctrl-C again ends at once")
        await trio.sleep(0.5)
        assert terminal.process.poll() is None
        terminal.press("ctrl-c")
        assert await terminal.exit_code(20) == 130
        assert "Traceback" not in terminal.output


@pytest.mark.parametrize("phase", ["confirm", "running"])
async def test_sigterm_shuts_down_also_during_bootstrap(
    nursery: trio.Nursery, tmp_path: Path, phase: str
) -> None:
    desk = await at_the_question(nursery, tmp_path, switches=Switches(latency_seconds=60))
    with desk.terminal as terminal:
        if phase == "running":
            terminal.press("enter")
            await until(lambda: len(desk.creates) >= 4)
        terminal.process.send_signal(signal.SIGTERM)
        assert await terminal.exit_code(30) == 0
        assert "Traceback" not in terminal.output


async def test_a_running_answer_finishes_within_the_grace_of_a_shutdown(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables: Tables = {"server": {"shutdown_grace_seconds": 90}, "bootstrap": {"enabled": False}}
    switches = Switches(line_delay_seconds=0.6)
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    with desk.terminal as terminal:
        await desk.make_ready()
        received: list[str] = []
        nursery.start_soon(hanging_answer, desk, received)
        await until(lambda: CLAUDE[:4] in "".join(received))
        terminal.press("ctrl-c")
        await terminal.shows("Shutting down")
        refused = None
        with contextlib.suppress(httpx.TransportError):  # not listening any more is as good
            refused = await desk.http.post("/v1/chat/completions", json=request_body(CLAUDE, "Another"))
        if refused is not None:
            assert refused.status_code == 503
        assert await terminal.exit_code() == 0
        stream = Stream("".join(received))
        assert stream.text == f"[{CLAUDE}] Hello"
        assert stream.finish_reasons == ["stop"]
        assert stream.has_done


async def test_an_answer_that_outlives_the_grace_ends_with_an_error_event(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables: Tables = {"server": {"shutdown_grace_seconds": 0.5}, "bootstrap": {"enabled": False}}
    switches = Switches(hang_after_lines=1)
    desk = await sit_down(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    with desk.terminal as terminal:
        await desk.make_ready()
        received: list[str] = []
        nursery.start_soon(hanging_answer, desk, received)
        await until(lambda: CLAUDE[:4] in "".join(received))
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0
        await until(lambda: received[-1].startswith("<") or "[DONE]" in received[-1])
        stream = Stream("".join(received))
        assert [error["code"] for error in stream.errors] == ["shutting_down"]
        assert stream.finish_reasons == []
        assert stream.has_done
        await until(lambda: desk.arena.stats()["running"] == 0)


# ── Killed, and started again ───────────────────────────────────────────────────────────────────────────────


async def test_after_a_kill_exactly_the_missing_conversations_are_opened(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, free=9)
    desk = await at_the_question(nursery, tmp_path)
    with desk.terminal as terminal:
        terminal.press("enter")
        await until(lambda: len(SESSION_LINE.findall(terminal.output)) == 9)
        await until(lambda: len(desk.creates) == 17)
        terminal.kill()
    shown = {session for _, session, _ in SESSION_LINE.findall(terminal.output)}
    await until(lambda: desk.arena.stats()["running"] == 0)
    before = len(desk.creates)
    held.release()

    again = await sit_down(nursery, tmp_path, "--yes", arena=desk.arena, twin=desk.twin)
    with again.terminal as terminal:
        match = re.search(r"with (\d+) conversations in the store", terminal.output)
        assert match
        stored = int(match[1])
        assert len(shown) <= stored < 24
        await until(lambda: desk.twin.welcomes >= 2)
        state = await again.phase("done")
        assert state["bootstrap"]["planned"] == state["bootstrap"]["opened"] == 24 - stored
        assert len(again.creates) - before == 24 - stored
        assert all(entry["sessions"] == 4 for entry in state["pool"])
        await until(lambda: len(SESSION_LINE.findall(terminal.output)) == 24 - stored)
        assert not shown & {session for _, session, _ in SESSION_LINE.findall(terminal.output)}
        # What was stored before the kill still answers.
        for _ in range(4):
            response = await again.http.post("/v1/chat/completions", json=request_body(CLAUDE, "Hello"))
            assert response.status_code == 200
        assert len(again.creates) - before == 24 - stored


async def test_a_start_with_everything_in_the_store_asks_nothing(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    desk = await sit_down(nursery, tmp_path, "--yes", models=(CLAUDE,))
    with desk.terminal as terminal:
        await desk.make_ready()
        await desk.phase("done")
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0
    again = await sit_down(nursery, tmp_path, models=(CLAUDE,), arena=desk.arena, twin=desk.twin)
    with again.terminal as terminal:
        await again.phase("done")
        assert PROMPT not in terminal.output
        assert len(again.creates) == 4


# ── A model that fails ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_model_that_fails_is_shown_with_traceback_and_reply_and_skipped_alone(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    reply = '{"error":"Der Rechner brennt 着火了","trace":"0xC0FFEE"}'
    switches = Switches(failures={DEEPSEEK: Failure(status=500, body=reply)})
    desk = await at_the_question(nursery, tmp_path, switches=switches)
    with desk.terminal as terminal:
        terminal.press("enter")
        state = await desk.phase("done")
        await terminal.shows("└")
        [skipped] = state["bootstrap"]["skipped"]
        assert (skipped["model"], skipped["model_id"]) == (DEEPSEEK, model_id(DEEPSEEK))
        assert "500" in skipped["reason"]
        sessions = {entry["model"]: entry["sessions"] for entry in state["pool"]}
        assert sessions == {name: 0 if name == DEEPSEEK else 4 for name in SIX_MODELS}

        assert "Traceback (most recent call last)" in terminal.output
        assert "ArenaError" in terminal.output
        assert reply in terminal.output
        assert "Models: 5 ready, 1 skipped" in terminal.output
        assert re.search(rf"│ {re.escape(DEEPSEEK)} +│ 0 +│ skipped", terminal.output)
        [logged] = [line for line in terminal.log_lines() if line["event"] == "ModelSkipped"]
        assert logged["reply"] == reply
        assert logged["arena_status"] == 500
        assert "Traceback" in logged["traceback"]


# ── Starts that cannot be ───────────────────────────────────────────────────────────────────────────────────


def run_to_end(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"server": {"prot": 1}}, ("server.prot", "no such key")),
        ({"server": {"port": "9080"}}, ("server.port", "'9080'", "int")),
        ({"pool": {"sessions_per_model": 0}}, ("pool.sessions_per_model", "0", ">= 1")),
        ({"typo": {"a": 1}}, ("typo", "no such key")),
        ({"server": {"host": "0.0.0.0"}}, ("server.host", "0.0.0.0", "api_key")),
        ({"models": {"include": ["nothing-like-it"]}}, ("models.include", "nothing-like-it")),
        ({"models": {"path": "elsewhere.json"}}, ("models.path", "elsewhere.json")),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_clear_line(
    tmp_path: Path, tables: dict[str, dict[str, Any]], words: tuple[str, ...]
) -> None:
    write_models(tmp_path, (CLAUDE,))
    done = run_to_end(tmp_path, "--config", str(write_config(tmp_path, tables)))
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).strip().splitlines()
    assert line.startswith("Cannot start: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("chore", [(), ("--check",)])
@pytest.mark.parametrize(("option", "key"), [("--port", "server.port"), ("--bridge-port", "bridge.port")])
def test_a_port_in_use_ends_the_start_with_one_clear_line(
    tmp_path: Path, option: str, key: str, chore: tuple[str, ...]
) -> None:
    write_models(tmp_path, (CLAUDE,))
    config = write_config(tmp_path, {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        other = "--bridge-port" if option == "--port" else "--port"
        done = run_to_end(tmp_path, "--config", str(config), option, port, other, "0", *chore)
    assert done.returncode == 2
    assert chore or len(done.stdout.splitlines()) == 1
    line = done.stdout.splitlines()[-1]
    assert line.startswith(f"Cannot start: {key} = {port}: expected a free port, but it is in use")
    assert f"choose another with {option}" in line
    assert ("userscript" in line) == (option == "--bridge-port")
    assert port not in line.partition("expected")[2]


@pytest.mark.parametrize("chore", [(), ("--check",)])
def test_why_a_port_cannot_be_had_is_said_once(tmp_path: Path, chore: tuple[str, ...]) -> None:
    write_models(tmp_path, (CLAUDE,))
    # An address of documents, which no machine has.
    config = write_config(tmp_path, {"server": {"host": "192.0.2.1", "api_key": "k"}, "bridge": {"port": 0}})
    done = run_to_end(tmp_path, "--config", str(config), *chore)
    assert done.returncode == 2
    wanted = f"a port that can be listened at ({os.strerror(errno.EADDRNOTAVAIL)})"
    assert done.stdout.splitlines()[-1] == f"Cannot start: server.port = 9080: expected {wanted}"


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("bridge.user.js", ()),
        ("bridge.user.js", ("--check",)),
        ("dashboard/index.html", ()),
        ("dashboard/index.html", ("--doctor", "0")),
        ("demo/arena.py", ("--demo",)),
    ],
)
def test_a_program_that_is_not_whole_says_so_in_one_line(
    tmp_path: Path, missing: str, arguments: tuple[str, ...]
) -> None:
    for name in {"bridge.user.js", "dashboard/index.html", "demo/arena.py"} - {missing}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "lmarena_proxy.py", tmp_path)
    write_models(tmp_path, (CLAUDE,))
    command = [sys.executable, "lmarena_proxy.py", "--port", "0", "--bridge-port", "0", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    said = f"Cannot start: {missing} not found beside lmarena_proxy.py: take the whole repository"
    assert (done.returncode, done.stderr) == (2, "")
    assert [line.removeprefix("✗ ") for line in done.stdout.splitlines()][-1:] == [said]


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    done = run_to_end(tmp_path, "--config", "nowhere.toml")
    assert done.returncode == 2
    assert "nowhere.toml" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_version_and_help_need_nothing(tmp_path: Path) -> None:
    assert run_to_end(tmp_path, "--version").stdout.startswith("lmarena_proxy ")
    shown = run_to_end(tmp_path, "--help").stdout
    for option in ("--config", "--yes", "--no-bootstrap", "--models", "--host", "--port", "--bridge-port"):
        assert option in shown
    for option in ("--demo", "--check", "--update-models", "--version"):
        assert option in shown


def test_check_examines_the_start_and_exits(tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE,))
    arguments = ("--check", "--config", str(write_config(tmp_path, {})), "--port", "0", "--bridge-port", "0")
    assert run_to_end(tmp_path, *arguments).returncode == 0
    config = write_config(tmp_path, {"pool": {"nonsense": 1}})
    assert run_to_end(tmp_path, "--check", "--config", str(config)).returncode == 2


def test_check_finds_that_another_copy_uses_the_store(tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE,))
    arguments = ("--check", "--config", str(write_config(tmp_path, {})), "--port", "0", "--bridge-port", "0")
    with lmarena_proxy.hold_store(tmp_path / "state"):
        done = run_to_end(tmp_path, *arguments)
    assert done.returncode == 2
    assert "no other copy of the program uses now" in done.stdout
    assert run_to_end(tmp_path, *arguments).returncode == 0


@pytest.mark.parametrize("options", [(), ("-X", "dev"), ("-m",), ("-m", "cProfile", "-o", os.devnull)])
def test_it_begins_as_a_script_a_module_and_under_a_profiler(options: tuple[str, ...]) -> None:
    name = "lmarena_proxy" if options == ("-m",) else "lmarena_proxy.py"
    command = [sys.executable, *options, name, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["lmarena_proxy"]), done.stderr


def test_an_alias_of_no_model_is_told_by_check(tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE,))
    config = write_config(tmp_path, {"models.aliases": {"gpt-4o": CLAUDE, "mine": "nothing"}})
    ports = ("--port", "0", "--bridge-port", "0")
    ended = run_to_end(tmp_path, "--check", "--config", str(config), *ports)
    assert ended.returncode == 0
    assert "mine stands for nothing" in ended.stdout
    assert "gpt-4o stands" not in ended.stdout


# ── The model list ──────────────────────────────────────────────────────────────────────────────────────────


async def open_page(nursery: trio.Nursery, arena_url: str, bridge_url: str) -> None:
    """A tab that has accepted the terms: only then the site shows its list."""
    twin = Twin(arena_url, bridge_url)
    await nursery.start(twin.run)
    await twin.accept_terms()


async def test_update_models_lays_the_page_s_list_over_the_file_tells_what_changed_and_exits(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    own, old, [listed] = pick_models([GPT])[0], pick_models([DEEPSEEK])[0], pick_models([CLAUDE])
    stale = listed | {"capabilities": {"inputCapabilities": {"text": True}}, "ours": "你好"}
    path = tmp_path / "models.json"
    path.write_text(json.dumps([own, stale]), encoding="utf-8")
    arena = Arena([listed, old])
    url = await nursery.start(serve_arena, arena)
    # What is left out of service is still updated.
    config = write_config(tmp_path, {"models": {"include": ["none*"]}})
    arguments = ("--update-models", "--config", str(config), "--port", "0", "--bridge-port", "0")
    with Terminal(tmp_path, *arguments) as terminal:
        _, bridge_url = await terminal.addresses()
        await terminal.shows("Waiting for the page's model list")
        await open_page(nursery, url, bridge_url)
        assert await terminal.exit_code() == 0
        output = terminal.output
    assert json.loads(path.read_text(encoding="utf-8")) == [own, listed, old]
    assert re.search(rf"changed +{CLAUDE} .*: capabilities, ours", output)
    assert re.search(rf"new +{DEEPSEEK} ", output)
    assert GPT not in output
    assert "2 of 3 models" in output
    assert arena.record == []


async def test_update_models_leaves_the_file_alone_when_nothing_changed_or_it_is_interrupted(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    write_models(tmp_path, (CLAUDE, DEEPSEEK))
    path = tmp_path / "models.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    url = await nursery.start(serve_arena, Arena(pick_models([CLAUDE])))
    config = write_config(tmp_path, {})
    arguments = ("--update-models", "--config", str(config), "--port", "0", "--bridge-port", "0")
    with Terminal(tmp_path, *arguments) as terminal:
        await terminal.shows("Waiting for the page's model list")
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0
    with Terminal(tmp_path, *arguments) as terminal:
        _, bridge_url = await terminal.addresses()
        await open_page(nursery, url, bridge_url)
        await terminal.shows("0 of 2 models")
        assert await terminal.exit_code() == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_built_in_list_is_written_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    lmarena_proxy.write_models(path, json.loads((ROOT / "models.json").read_bytes()))
    assert path.read_bytes() == (ROOT / "models.json").read_bytes()


# ── The demo ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_demo_runs_everything_without_a_browser(nursery: trio.Nursery, tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE, DEEPSEEK))
    config = write_config(tmp_path, {"server": {"shutdown_grace_seconds": 90}})
    ports = ("--port", "0", "--bridge-port", "0")
    with Terminal(
        tmp_path, "--config", str(config), "--demo", "--yes", *ports, "--models", CLAUDE, typed=True
    ) as terminal:
        url, _ = await terminal.addresses()
        await terminal.shows("DEMO")
        await terminal.shows("Bootstrap done", 120)
        async with plain_client(url) as client:
            response = await client.post("/v1/chat/completions", json=request_body(CLAUDE, "Hello"))
        assert response.json()["choices"][0]["message"]["content"] == f"[{CLAUDE}] Hello"
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 0


DEMO = ("--demo", "--port", "0", "--bridge-port", "0", "--models", CLAUDE)


def demo_stores(directory: Path) -> list[Path]:
    return [*directory.glob("lmarena-proxy-demo-*")]


@pytest.mark.parametrize("text", ["Waiting for an LMArena tab", PROMPT])
async def test_a_terminal_that_closes_ends_the_demo_and_takes_its_store_away(
    tmp_path: Path, text: str
) -> None:
    write_models(tmp_path, (CLAUDE,))
    with Terminal(tmp_path, "--config", str(write_config(tmp_path, {})), *DEMO) as terminal:
        await terminal.shows(text)
        assert demo_stores(tmp_path) != []
        terminal.process.send_signal(signal.SIGHUP)
        terminal.process.send_signal(signal.SIGHUP)  # One of the terminal, and one of its shell.
        await terminal.shows("Shutting down")
        assert await terminal.exit_code() == 0
    assert demo_stores(tmp_path) == []


async def test_the_demo_s_store_goes_also_at_a_second_ctrl_c(nursery: trio.Nursery, tmp_path: Path) -> None:
    write_models(tmp_path, (CLAUDE,))
    config = write_config(tmp_path, {"server": {"shutdown_grace_seconds": 600}})
    with Terminal(tmp_path, "--config", str(config), *DEMO, "--no-bootstrap") as terminal:
        url, _ = await terminal.addresses()
        received: list[str] = []

        async def ask() -> None:
            """For an answer that takes minutes."""
            body = request_body(CLAUDE, "word " * 50_000, stream=True)
            with contextlib.suppress(httpx.TransportError):
                async with (
                    plain_client(url) as client,
                    client.stream("POST", "/v1/chat/completions", json=body) as response,
                ):
                    async for line in response.aiter_lines():
                        received.append(line)

        nursery.start_soon(ask)
        await until(lambda: "word" in "".join(received))
        terminal.press("ctrl-c")
        await terminal.shows("Ctrl-C again ends at once")
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 130
    assert demo_stores(tmp_path) == []


def test_under_nohup_a_terminal_that_closes_changes_nothing() -> None:
    steps = "import lmarena_proxy; print(lmarena_proxy.HANGUP)"
    command = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# ── Start-up time and memory ────────────────────────────────────────────────────────────────────────────────


def seconds_to_listen(directory: Path, number: int) -> tuple[float, float]:
    """From the start of the process until its API answers, and its memory (MB) when idle a second later."""
    place = directory / str(number)
    place.mkdir()
    write_models(place, None)
    port = free_port()
    config = write_config(place, {})
    started = time.perf_counter()
    ports = ("--port", str(port), "--bridge-port", "0")
    with Terminal(place, "--config", str(config), *ports, typed=True) as terminal:
        while time.perf_counter() - started < 60:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        time.sleep(1)
        status = Path(f"/proc/{terminal.process.pid}/status").read_text()
    kilobytes = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
    return seconds, kilobytes / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_it_listens_quickly_and_idles_small_with_all_models(tmp_path: Path) -> None:
    measured = [seconds_to_listen(tmp_path, number) for number in range(3)]
    seconds, megabytes = min(each[0] for each in measured), max(each[1] for each in measured)
    print(f"start to listening {seconds:.2f} s (best of 3), idle RSS {megabytes:.1f} MB")
    assert seconds < START_LIMIT_SECONDS * SLOW_GUARD
    assert megabytes < IDLE_LIMIT_MB


def test_a_start_loads_nothing_that_an_answer_does_not_need() -> None:
    names = {"quart.app", "quart_trio.app", "httpx._client", "hypercorn.config", "pygments", "werkzeug"}
    step = f"import lmarena_proxy, sys; print(sorted({names!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", step], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_pages_that_are_asked_for_at_once_before_their_library_is_loaded_all_come(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    write_models(tmp_path, (CLAUDE,))
    ports = ("--port", "0", "--bridge-port", "0")
    statuses: list[int] = []
    with Terminal(tmp_path, "--config", str(write_config(tmp_path, {})), *ports) as terminal:
        url, _ = await terminal.addresses()

        async def ask(method: str, path: str) -> None:
            async with plain_client(url) as client:
                statuses.append((await client.request(method, path)).status_code)

        async with trio.open_nursery() as asking:
            for path in ("/", "/api/state", "/metrics", "/openapi.json", "/bridge.user.js") * 3:
                asking.start_soon(ask, "GET", path)
                asking.start_soon(ask, "HEAD", path)  # Hypercorn's.
    assert statuses == [200] * 30


def test_two_images_that_are_fetched_at_once_before_their_library_is_loaded_are_both_told_of() -> None:
    """Under a name that is not known: what matters is that nothing else is raised."""
    code = """
import pathlib, sys, trio
from lmarena_proxy import FetchFailed, MediaConfig, MediaFiles

async def fetch(files, told):
    try:
        await files.fetch("http://nowhere.invalid/a.png", 1)
    except FetchFailed as failure:
        told.append(str(failure))

async def main():
    files, told = MediaFiles(MediaConfig(), pathlib.Path("media")), []
    assert "httpx._client" not in sys.modules
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(fetch, files, told)
    assert "httpx._client" in sys.modules
    print(*told, sep="\\n")

trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["the name nowhere.invalid is not known"] * 4, done.stderr


async def test_a_second_copy_on_the_same_store_is_refused_until_the_first_is_gone(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    first = await sit_down(nursery, tmp_path)
    with first.terminal as terminal:
        with Terminal(tmp_path, "--config", str(tmp_path / "config.toml")) as second:
            assert await second.exit_code() == 2
            assert "Cannot start: storage.path" in second.output
            assert "no other copy" in second.output
            assert "Traceback" not in second.output
        with Terminal(tmp_path, "--config", str(tmp_path / "config.toml"), "--prune") as pruning:
            assert await pruning.exit_code() == 2
        assert (await first.http.get("/health")).status_code == 200
        terminal.kill()
    with Terminal(tmp_path, "--config", str(tmp_path / "config.toml"), "--prune") as pruning:
        assert await pruning.exit_code() == 0
        assert "0 requests that were older than 30 days are gone" in pruning.output
    ports = ("--port", "0", "--bridge-port", "0")
    with Terminal(tmp_path, "--config", str(tmp_path / "config.toml"), *ports) as third:
        await third.addresses()
