"""The main job, end to end: the program in a terminal, a real Chromium with the userscript, openai's client.

The page's origin really is https://lmarena.ai; behind it stands the stand-in arena. The script is the one
that the program serves. One run of everything is shared by the tests of this module, in the order in which a
person meets it.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from harness import GPT, SIX_MODELS, Terminal, model_id, write_config, write_models
from playwright.sync_api import Page, Playwright
from userscript_bridge import (
    CHROMIUM,
    SITE,
    ArenaProcess,
    Everything,
    UserscriptBrowser,
    eventually,
    wait_status,
)

from demo import contract
from lmarena_proxy import PROMPT

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}")

CLAUDE, DEEPSEEK = SIX_MODELS[:2]
PIECES = [
    "你好，",
    "世界 😀",
    '"quoted" \\ back\tslash\n',
    "第二行 — ñ\n\n",
    "\U0001f468‍\U0001f469‍\U0001f467 end  ",
]
CONFIG: dict[str, dict[str, Any]] = {
    "server": {"port": 0},
    "bridge": {"port": 0},
    "bootstrap": {"settle_seconds": 2},
    "models": {"include": SIX_MODELS},  # the page's own list would add all others
}


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, arena_process: ArenaProcess, playwright: Playwright
) -> Iterator[Everything]:
    directory = tmp_path_factory.mktemp("program")
    write_models(directory, SIX_MODELS)
    config = write_config(directory, CONFIG)
    browser = UserscriptBrowser(playwright, arena_process, path=CHROMIUM)
    arena_process.reset(check=True, latency_seconds=0.2)
    with Terminal(directory, "--config", str(config)) as terminal:
        yield Everything(terminal, arena_process, browser.browser)
        browser.browser.close()


@pytest.fixture
def ready(everything: Everything) -> Everything:
    """Everything, once the first test has brought it up; with the arena's switches as they are at rest."""
    if everything.state()["bootstrap"]["phase"] != "done":
        pytest.skip("the conversations were not opened")
    eventually(lambda: everything.state()["requests"]["active"] == 0, "no request")
    settings = {"latency_seconds": 0.0, "line_delay_seconds": 0.0, "chunk_bytes": 0, "answers": {}}
    everything.arena.switch(**settings)
    return everything


def test_the_person_passes_the_check_signs_in_and_presses_enter(everything: Everything) -> None:
    page = everything.page
    page.goto(SITE)
    everything.console("pass it")
    page.click("#pass-check")
    everything.console("accept its terms or sign in")
    page.click("#accept-terms")
    everything.console(PROMPT)
    wait_status(page, "ready")
    assert everything.arena.record() == []
    everything.terminal.press("enter")
    output = everything.console("Bootstrap done: 24 of 24 opened")
    creates = everything.calls("create")
    assert sorted(call["model_id"] for call in creates) == sorted([model_id(name) for name in SIX_MODELS] * 4)
    assert all(count <= 4 for count in everything.arena.stats()["max_running_by_model"].values())
    log = (everything.terminal.directory / "logs" / "lmarena_proxy.jsonl").read_text(encoding="utf-8")
    for call in creates:
        assert call["body"]["messages"][0]["content"] == "Hi"
        for text in (output, log):
            assert call["session_id"] in text
            assert call["message_id"] in text


def test_answers_arrive_byte_for_byte_whole_and_streamed(ready: Everything) -> None:
    ready.arena.switch(chunk_bytes=1, answers={"*": PIECES})
    messages: Any = [{"role": "user", "content": "Say it"}]
    assert ready.ask(CLAUDE, "Say it") == "".join(PIECES)
    stream = ready.client.chat.completions.create(model=CLAUDE, messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(PIECES)


def test_the_retry_carries_the_whole_history_and_the_model_chooses_the_conversation(
    ready: Everything,
) -> None:
    opened = {(call["session_id"], call["message_id"]): call["model_id"] for call in ready.calls("create")}
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    for name in (CLAUDE, DEEPSEEK, CLAUDE):
        ready.client.chat.completions.create(model=name, messages=messages)
        call = ready.calls("retry")[-1]
        assert opened[call["session_id"], call["message_id"]] == call["model_id"] == model_id(name)
        sent = [
            {"role": message["role"], "content": message["content"]} for message in call["body"]["messages"]
        ]
        assert sent == messages


def test_twelve_at_once_are_answered_four_at_a_time_each_pair_alone(ready: Everything) -> None:
    ready.arena.switch(latency_seconds=0.3)
    before = len(ready.calls("retry"))
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(ready.ask, CLAUDE, f"question {number}") for number in range(12)]
        answers = [future.result() for future in asked]
    assert all(f"question {number}" in answer for number, answer in enumerate(answers))
    calls = ready.calls("retry")[before:]
    assert len(calls) == 12
    stats = ready.arena.stats()
    assert stats["max_running_by_model"][model_id(CLAUDE)] == 4
    assert stats["max_running_pair"] == 1
    assert {call["session_id"] for call in calls[:4]} == {call["session_id"] for call in calls[4:8]}


def test_a_client_that_leaves_ends_the_fetch_at_the_arena(ready: Everything) -> None:
    ready.arena.switch(line_delay_seconds=0.2, answers={"*": ["word "] * 200})
    body = {"model": DEEPSEEK, "stream": True, "messages": [{"role": "user", "content": "Go on"}]}
    with httpx.stream("POST", f"{ready.url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if "word" in line:
                break
    left_at = time.monotonic()
    eventually(lambda: ready.calls("retry")[-1]["outcome"] == "aborted", "the abort at the arena")
    assert time.monotonic() - left_at < 10  # two seconds by design; the machine may be busy
    session_id = ready.calls("retry")[-1]["session_id"]
    ready.arena.switch(line_delay_seconds=0.0, answers={})
    for number in range(4):
        assert f"again {number}" in ready.ask(DEEPSEEK, f"again {number}")
    assert session_id in {call["session_id"] for call in ready.calls("retry")[-4:]}


def send_by_hand(page: Page, button: str) -> None:
    page.evaluate("document.querySelector('#status').textContent = 'asked'")
    page.click(button)
    page.wait_for_function("/done|failed/.test(document.querySelector('#status').textContent)")


def test_chats_by_hand_join_the_pool(ready: Everything) -> None:
    page, sessions = ready.page, ready.sessions(DEEPSEEK)
    page.select_option("#mode", "direct")
    page.select_option("#model", model_id(DEEPSEEK))
    page.fill("#message", "by hand")
    send_by_hand(page, "#send")
    eventually(lambda: ready.sessions(DEEPSEEK) == sessions + 1, "the new chat in the pool")
    created = ready.calls("create")[-1]
    ready.console(f"session {created['session_id']} message {created['message_id']} (captured)")
    page.fill("#message", "and further")
    send_by_hand(page, "#send")
    further = ready.calls("post")[-1]
    ready.console(f"session {further['session_id']} message {further['message_id']} (captured)")
    send_by_hand(page, "#retry")
    for number in range(5):
        ready.ask(DEEPSEEK, f"after {number}")
    pairs = {(call["session_id"], call["message_id"]) for call in ready.calls("retry")[-5:]}
    assert (further["session_id"], further["message_id"]) in pairs


def test_a_reload_in_mid_queue_loses_no_request(ready: Everything) -> None:
    ready.arena.switch(latency_seconds=1.0)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ready.ask, CLAUDE, f"question {number}") for number in range(6)]
        eventually(lambda: ready.state()["bridges"][0]["in_flight"] >= 4, "four in flight")
        ready.page.reload()
        answers = [future.result() for future in asked]
    assert all(f"question {number}" in answer for number, answer in enumerate(answers))


def test_an_image_too_large_for_a_message_goes_where_the_page_s_own_files_go(ready: Everything) -> None:
    large = contract.png("large") + bytes(16 << 20)
    url = f"data:image/png;base64,{base64.b64encode(large).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    with pytest.raises(openai.APIStatusError, match="offers no upload") as caught:
        ready.client.chat.completions.create(model=GPT, messages=messages)
    assert caught.value.status_code == 413
    # The site brings its upload with a deployment, which the tab knows once it has the new page.
    ready.arena.switch(uploads={"offered": True})
    ready.page.reload()
    wait_status(ready.page, "ready")
    answer = ready.client.chat.completions.create(model=GPT, messages=messages)
    assert "What is this?" in (answer.choices[0].message.content or "")
    [attached] = ready.calls("retry")[-1]["body"]["messages"][0]["experimental_attachments"]
    assert attached["url"].startswith(f"{SITE}/storage/")
    [put] = [seen for seen in ready.arena.uploads() if seen["step"] == "put"]
    assert put["digest"] == hashlib.sha256(large).hexdigest()
    ready.console("was uploaded in tab")
    # A further deployment, under the page that is open.
    ready.arena.switch(uploads={"offered": True, "deployment": 2})
    ready.client.chat.completions.create(model=GPT, messages=messages)
    assert len([seen for seen in ready.arena.uploads() if seen["step"] == "put"]) == 2


def test_ctrl_c_ends_it(everything: Everything) -> None:
    everything.terminal.press("ctrl-c")
    watchdog = threading.Timer(60, everything.terminal.kill)
    watchdog.start()
    assert everything.terminal.process.wait() == 0
    watchdog.cancel()
    assert "Traceback" not in everything.terminal.output
    lines = everything.terminal.log_lines()
    assert {"SessionOpened", "RequestEnded", "BridgeConnected"} <= {line["event"] for line in lines}
    assert json.dumps(lines)
