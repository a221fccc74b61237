"""The dashboard in a real Chromium, in front of the running program with the stand-in arena and a tab.

The program, the arena and the tab run in a thread of their own (`Stage`); the tests stay synchronous, as
Playwright is. Each page is watched: an error on its console, or something that its Content-Security-Policy
stopped, fails the test (`Board`).
"""

import base64
import json
import queue
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    IMAGE,
    RAY,
    SEARCH,
    Rig,
    Terminal,
    free_port,
    model_id,
    start,
    write_config,
)
from playwright.sync_api import Browser, ConsoleMessage, Download, Locator, Page, Playwright, Route, expect
from userscript_bridge import CHROMIUM, HEADLESS_SHELL, eventually

from demo import contract
from demo.arena import Failure, Switches

ROOT = Path(__file__).parent.parent
AXE = ROOT / "tests" / "dashboard" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
MODELS = (CLAUDE, DEEPSEEK, GPT, SEARCH, IMAGE, EDIT)
DASHBOARD = ROOT / "dashboard"
OURS = [
    path
    for path in sorted(DASHBOARD.rglob("*.*"))
    if path.parent.name != "vendor" or path.name == "preact-htm.js"
]
PANELS = ("now", "pool", "requests", "time", "log", "settings", "connect")
PATIENCE_MS = 30_000
KEY = "sk-dashboard"
PNG_URL = "data:image/png;base64," + base64.b64encode(contract.png("x")).decode()
Result = TypeVar("Result")

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}")
expect.set_options(timeout=PATIENCE_MS)


# ── The program in a thread ─────────────────────────────────────────────────────────────────────────────────


class Stage:
    """The program, the arena and a tab, in a thread of their own."""

    rig: Rig

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self._begun: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(settings,), daemon=True)
        self._thread.start()
        if problem := self._begun.get(timeout=120):
            raise problem
        self.url = self.rig.url
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def _run(self, settings: dict[str, Any]) -> None:
        try:
            trio.run(self._main, settings)
        except BaseException as error:  # told to the test, if it still waits for the beginning
            self._begun.put(error)
            raise

    async def _main(self, settings: dict[str, Any]) -> None:
        self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            self.rig = await start(nursery, self.directory, **settings)
            self._begun.put(None)
            await self._end.wait()
            nursery.cancel_scope.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join(60)

    def call(self, function: Callable[..., Awaitable[Result]], *arguments: Any, **rest: Any) -> Result:
        return trio.from_thread.run(partial(function, *arguments, **rest), trio_token=self._token)

    def do(self, function: Callable[..., Result], *arguments: Any, **rest: Any) -> Result:
        return trio.from_thread.run_sync(partial(function, *arguments, **rest), trio_token=self._token)

    def switch(self, **switches: Any) -> None:
        """Set these of the arena's switches, and all others back."""
        self.do(self.rig.arena.switch, **msgspec.to_builtins(Switches()) | switches)

    def fail(self, model: str = CLAUDE, text: str = "Hello") -> str:
        """The id of a request that the site does not answer."""
        self.switch(failures={model: Failure(body='{"error":"no such luck"}', on="retry")})
        request_id = self.ask_id(model, text)
        self.switch()
        return request_id

    def ask(self, model: str = CLAUDE, text: str = "Hello", **rest: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **rest}
        return self.http.post("/v1/chat/completions", json=body)

    def ask_id(self, *arguments: Any, **rest: Any) -> str:
        """The id under which it is in the request log."""
        return str(self.ask(*arguments, **rest).headers["x-request-id"])

    def state(self) -> Any:
        return self.http.get("/api/state").raise_for_status().json()

    async def _stream(self, model: str, text: str) -> None:
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": text}]}
        async with self.rig.http.stream("POST", "/v1/chat/completions", json=body, timeout=None) as response:
            async for _ in response.aiter_raw():
                pass

    @contextmanager
    def streaming(
        self, *models: str, text: str = "Go on", line_delay_seconds: float = 0.25
    ) -> Iterator[None]:
        """One long answer for each of these while the block runs; then their client leaves."""
        self.switch(line_delay_seconds=line_delay_seconds, answers={"*": ["word "] * 5000})
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    for model in models:
                        nursery.start_soon(self._stream, model, text)

        self.do(self.nursery.start_soon, run)
        try:
            eventually(lambda: len(self.state()["running"]) >= len(models), "the answers run")
            yield
        finally:
            self.do(scope.cancel)
            self.switch()
            eventually(lambda: self.state()["requests"]["active"] == 0, "no answer runs")

    def insert_requests(self, count: int) -> None:
        """Requests of the last day, straight into the store."""
        now, entries = time.time(), self.state()["pool"]
        rows = [
            (
                f"req_{number:032x}",
                now - 60 - number * 8,
                (entry := entries[number % len(entries)])["model"],
                entry["model_id"],
                200 if number % 20 else 502,
                "stop" if number % 20 else "upstream_error",
                json.dumps([{"role": "user", "content": f"question {number}"}]),
                f"answer {number} " * 20,
                "127.0.0.1 · test",
                "/v1/chat/completions",
                None if number % 20 else "the site failed",
            )
            for number in range(count)
        ]
        path = self.directory / "state" / "lmarena_proxy.sqlite3"
        with sqlite3.connect(path, timeout=60) as database:
            names = (
                "request_id, created_at, model, model_id, status, outcome, messages, answer, client, path,"
                " error, is_stream, attempts, queued_seconds, first_byte_seconds, total_seconds,"
                " prompt_tokens, completion_tokens"
            )
            places = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 1, 0, 0.5, 2, 10, 40"
            database.executemany(f"INSERT INTO requests ({names}) VALUES ({places})", rows)
        database.close()


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    browser = playwright.chromium.launch(executable_path=HEADLESS_SHELL, args=CHROMIUM_FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage"), models=MODELS, tables={"media": {"keep": True}}) as stage:
        stage.rig.program.media.site_origins.add(stage.rig.arena_url)
        stage.call(stage.rig.fill)
        for number in range(3):
            stage.ask(text=f"question {number}")
        yield stage


# ── A page that is watched ──────────────────────────────────────────────────────────────────────────────────

WATCH = """addEventListener("securitypolicyviolation", (event) =>
    console.error(`CSP ${event.violatedDirective} ${event.blockedURI}`))"""


class Board:
    """A page with the dashboard."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        context = {"locale": "en-US", "viewport": {"width": 1280, "height": 900}} | context
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(PATIENCE_MS)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.context.add_init_script(WATCH)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.expected = "(?!)"  # what may stand on the console, as the test provokes it
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _note(self, line: ConsoleMessage) -> None:
        if line.type == "error":
            self.problems.append(line.text)

    def close(self) -> None:
        self.context.close()
        assert [line for line in self.problems if not re.search(self.expected, line)] == []

    def open(self, panel: str) -> None:
        self.page.goto(f"{self.url}/#/{panel}")
        expect(self.page.locator("main h1")).to_be_visible()

    def button(self, name: str | re.Pattern[str], exact: bool = True) -> Locator:
        return self.page.get_by_role("button", name=name, exact=exact)

    def shows(self, text: str | re.Pattern[str]) -> None:
        expect(self.page.get_by_text(text).first).to_be_visible()

    def rows(self) -> Locator:
        """The rows of requests that have ended."""
        return self.page.locator("tbody.b-ended tr.b-row")

    def clipboard(self) -> str:
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def axe(self) -> list[str]:
        """What axe-core objects to: rule, element, reason."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']}: {node['html'][:160]}: {node['failureSummary'][:300]}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]


@pytest.fixture
def board(browser: Browser, stage: Stage) -> Iterator[Board]:
    board = Board(browser, stage.url)
    yield board
    stage.switch()
    board.close()


def text_of(download: Download) -> str:
    return Path(download.path()).read_text(encoding="utf-8")


# ── The files ───────────────────────────────────────────────────────────────────────────────────────────────


def dictionary(language: str) -> dict[str, str]:
    texts = [path.read_text(encoding="utf-8") for path in (DASHBOARD / "i18n" / language).glob("*.js")]
    pairs = re.findall(r'^  "([^"]+)":\s*"((?:[^"\\]|\\.)*)",$', "\n".join(texts), re.MULTILINE)
    assert (
        len(pairs) == len(dict(pairs)) == sum(len(re.findall(r'^  "', text, re.MULTILINE)) for text in texts)
    )
    return dict(pairs)


def test_both_languages_have_the_same_texts_with_the_same_variables() -> None:
    english, chinese = dictionary("en"), dictionary("zh")
    assert english.keys() == chinese.keys()

    def variables(text: str) -> set[str]:
        return set(re.findall(r"\{(\w+)", text))

    # One language may do without a number that the other needs for its plural.
    assert {key for key in english if not variables(chinese[key]) <= variables(english[key])} == set()


def test_chinese_texts_are_polite() -> None:
    assert [text for text in dictionary("zh").values() if "你" in text] == []


def test_every_text_that_is_asked_for_exists_and_every_one_is_asked_for() -> None:
    keys = dictionary("en").keys()
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in OURS if path.suffix == ".js" and "i18n/" not in str(path)
    )
    asked = set(re.findall(r'\bt\(\s*"([^"]+)"', sources))
    completed = set(re.findall(r"\bt\(\s*`([^`$]+)\$\{", sources))  # t(`phase.${phase}`)
    begun = set(re.findall(r"`([a-z]+\.[\w.]*)\$\{", sources))
    named = set(re.findall(r'"([a-z]+\.[\w.]+)"', sources))
    assert asked - keys == set()
    assert {start for start in completed if not any(key.startswith(start) for key in keys)} == set()
    assert {key for key in keys if key not in named and not key.startswith(tuple(begun))} == set()


@pytest.mark.parametrize(
    "path", [path for path in OURS if path.suffix in (".js", ".css", ".html")], ids=lambda path: path.name
)
def test_files_set_no_markup_and_load_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        == []
    )
    assert (
        re.findall(r"""(?:from|import)\s*\(?["']https?:|url\(["']?https?:|@import|\ssrc=["']https?:""", text)
        == []
    )
    if path.suffix == ".html":
        assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text) == []
    if path.suffix == ".js":
        assert text.startswith("// @ts-check")


# ── The shell ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_panel_opens_from_the_navigation_and_has_its_address_and_title(board: Board) -> None:
    board.open("now")
    navigation = board.page.get_by_role("navigation")
    for link, panel in zip(navigation.get_by_role("link").all(), PANELS, strict=True):
        link.click()
        expect(board.page).to_have_url(f"{board.url}/#/{panel}")
        expect(board.page.locator("main h1")).to_be_visible()
        expect(link).to_have_attribute("aria-current", "page")
        assert "lmarena_proxy" in board.page.title()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_no_panel_scrolls_sideways_in_either_language_and_theme(
    browser: Browser, stage: Stage, locale: str, theme: str
) -> None:
    board = Board(browser, stage.url, locale=locale, color_scheme=theme)
    too_wide = {}
    for panel in (*PANELS, f"requests/{stage.ask_id(text='long ' * 500)}"):
        for width in (360, 1600):
            board.page.set_viewport_size({"width": width, "height": 900})
            board.open(panel)
            board.page.wait_for_timeout(150)
            pixels = board.page.evaluate(
                "(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)(document.documentElement)"
            )
            if pixels > 0:
                too_wide[panel, width] = pixels
        texts = board.page.locator("body").inner_text()
        assert re.findall(r"(?m)^(?:b|ui|shell|now|boot|pool|log|settings|panel)\.[a-z_.]+$", texts) == []
    assert board.page.evaluate("document.documentElement.lang") in (locale, locale[:2])
    board.close()
    assert too_wide == {}


@pytest.mark.skipif(not AXE.exists(), reason="npm ci --prefix tests/dashboard")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_on_any_panel(browser: Browser, stage: Stage, theme: str) -> None:
    board = Board(browser, stage.url, color_scheme=theme)
    request_id = stage.ask_id(text="long " * 1000)
    failed = stage.fail()
    with stage.streaming(CLAUDE, DEEPSEEK):
        found = {}
        for panel in (*PANELS, f"requests/{request_id}", f"requests/{failed}"):
            board.open(panel)
            board.page.wait_for_timeout(400)
            if violations := board.axe():
                found[panel] = violations
        board.open("time")
        board.button(re.compile("^As table"), exact=False).first.click()
        if violations := board.axe():
            found["time as table"] = violations
    board.close()
    assert found == {}


def test_language_and_theme_are_switched_and_kept(board: Board) -> None:
    board.open("requests")
    board.button("中文", exact=False).click()
    expect(board.page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(board.page.locator("h1")).to_have_text("请求")
    board.button(re.compile("主题")).click()
    theme = board.page.locator("html")
    expect(theme).to_have_attribute("data-theme", "light")
    light = board.page.evaluate("getComputedStyle(document.body).backgroundColor")
    board.button(re.compile("主题")).click()
    expect(theme).to_have_attribute("data-theme", "dark")
    assert board.page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    board.page.reload()
    expect(theme).to_have_attribute("data-theme", "dark")
    expect(board.page.locator("h1")).to_have_text("请求")


def test_the_keyboard_alone_reaches_everything_with_a_visible_focus(board: Board, stage: Stage) -> None:
    page = board.page
    board.open("requests")
    expect(board.rows().first).to_be_visible()
    page.keyboard.press("Tab")
    assert "skip" in page.evaluate("document.activeElement.className")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen: list[str] = []
    for _ in range(12):
        page.keyboard.press("Tab")
        name, is_shown = page.evaluate(
            """() => {
                const focus = document.activeElement, box = focus.getBoundingClientRect();
                const lined = [focus, focus.closest("tr")].some(
                    (one) => one && getComputedStyle(one).outlineStyle !== "none");
                return [focus.tagName, lined && box.width > 0 && box.bottom > 0 && box.top < innerHeight];
            }"""
        )
        if name == "BODY":  # beyond the last
            break
        assert is_shown, f"the focus on {name} is not seen"
        seen.append(name)
    assert {"BUTTON", "INPUT", "SELECT", "A"} <= set(seen)
    board.rows().first.get_by_role("link").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#/requests/req_"))
    page.locator("main").get_by_role("link", name="Requests").press("Enter")
    expect(page).to_have_url(re.compile("#/requests$"))


def test_a_page_that_is_not_looked_at_renders_nothing(board: Board, stage: Stage) -> None:
    """Hidden as a browser hides it: no frames come; what happened meanwhile is there afterwards."""
    board.open("requests")
    first = board.rows().first.get_by_role("link")
    before = first.get_attribute("href")
    page = board.context.new_page()
    page.goto("about:blank")
    page.bring_to_front()
    request_id = stage.ask_id(text="meanwhile")
    board.page.bring_to_front()
    page.close()
    expect(first).to_have_attribute("href", f"#/requests/{request_id}")
    assert before != f"#/requests/{request_id}"


# ── Opening conversations, the pool ─────────────────────────────────────────────────────────────────────────


def test_the_run_is_started_stopped_and_retried_from_the_page(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Stage(tmp_path_factory.mktemp("run"), models=(CLAUDE, DEEPSEEK, GPT)) as stage:
        failure = Failure(status=500, body='{"error":"no such luck"}')
        stage.switch(failures={DEEPSEEK: failure}, latency_seconds=600)
        board = Board(browser, stage.url)
        board.open("now")
        board.button("Open what is missing").click()
        board.button("Stop").click()
        board.shows("Stopped")
        stage.switch(failures={DEEPSEEK: failure})
        board.button("Open what is missing").click()
        card = board.page.get_by_role("region", name="Opening conversations")
        expect(card.get_by_text("Done", exact=True)).to_be_visible()
        board.shows("Skipped models (1)")
        board.shows(re.compile("no such luck|500"))
        stage.switch()
        board.button(re.compile(f"again.*{DEEPSEEK}|{DEEPSEEK}.*again")).click()
        eventually(lambda: all(pool["sessions"] == 4 for pool in stage.state()["pool"]), "all are open")
        board.shows("Every model has its conversations.")
        expect(board.page.get_by_text("Skipped models (1)")).to_have_count(0)
        board.close()


def test_the_question_counts_what_is_missing_at_that_moment(board: Board, stage: Stage) -> None:
    board.open("now")
    tell = "async (change) => (await import('/dashboard/store.js')).store.applyChange(change)"
    state = stage.state()
    pool = next(pool for pool in state["pool"] if pool["model"] == CLAUDE)
    board.page.evaluate(tell, {"bootstrap": state["bootstrap"] | {"phase": "confirm"}})
    for missing in (3, 2):
        board.page.evaluate(tell, {"pool": [pool | {"missing": missing}]})
        expect(board.button(re.compile(f"Open {missing} conversations"), exact=False)).to_be_visible()


def test_one_model_is_opened_by_its_name(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Stage(tmp_path_factory.mktemp("one"), models=(CLAUDE, DEEPSEEK)) as stage:
        board = Board(browser, stage.url)
        board.open("now")
        board.page.get_by_label("For one model only").fill(DEEPSEEK)
        board.button("Open").click()
        eventually(lambda: [pool["sessions"] for pool in stage.state()["pool"]] == [0, 4], "only that one")
        board.close()


def test_two_models_of_one_name_are_told_apart(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The one that begins with an image has no conversation before its first request."""
    with Stage(tmp_path_factory.mktemp("two"), models=(RAY,)) as stage:
        board = Board(browser, stage.url)
        board.open("now")
        board.page.get_by_label("For one model only").fill(RAY)
        board.button("Open").click()
        eventually(lambda: [pool["sessions"] for pool in stage.state()["pool"]] == [0, 4], "the text's")
        expect(board.page.locator("datalist option")).to_have_count(1)
        image = {"type": "image_url", "image_url": {"url": PNG_URL}}
        for content in ("Run", [{"type": "text", "text": "Run"}, image]):
            body = {"model": RAY, "messages": [{"role": "user", "content": content}]}
            stage.http.post("/v1/chat/completions", json=body).raise_for_status()
        for panel in ("pool", "time"):
            board.open(panel)
            names = board.page.get_by_role("rowheader").filter(has_text=RAY)
            expect(names).to_have_count(2)
            told = sorted(re.sub(r"\s+", " ", name) for name in names.all_inner_texts())
            assert told == [f"{RAY} Video", f"{RAY} Video from image"], panel
        board.close()


def test_a_session_is_opened_and_retired_from_the_pool(board: Board, stage: Stage) -> None:
    def sessions() -> int:
        return next(int(pool["sessions"]) for pool in stage.state()["pool"] if pool["model"] == GPT)

    before = sessions()
    board.open("pool")
    board.button(GPT).click()
    board.button("Open one more").click()
    eventually(lambda: sessions() == before + 1, "one more")
    dialog = board.page.get_by_role("dialog")
    dialog.locator("[aria-haspopup], .link-button, li button").first.click()
    board.button("Retire").click()
    question = board.page.get_by_role("dialog", name=re.compile("^Retire this session"))
    question.get_by_role("button", name="Retire").click()
    eventually(lambda: sessions() == before, "one less")
    board.page.keyboard.press("Escape")


# ── Requests ────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_flow_in_without_losing_the_reader_s_place(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Stage(tmp_path_factory.mktemp("flow")) as stage:
        stage.insert_requests(130)
        board = Board(browser, stage.url)
        board.open("requests")
        first = board.rows().first.get_by_role("link")
        expect(board.rows()).to_have_count(50)
        at_top = stage.ask_id(text="while at the top")
        expect(first).to_have_attribute("href", f"#/requests/{at_top}")
        board.button("Older requests").click()
        expect(board.rows()).to_have_count(101)
        board.button("Older requests").click()
        board.shows("That is all.")
        expect(board.rows()).to_have_count(131)
        board.page.evaluate("scrollTo(0, 2000)")
        place = board.rows().nth(60)
        offset = place.bounding_box()
        further_down = stage.ask_id(text="while further down")
        expect(board.button("1 new")).to_be_visible()
        assert place.bounding_box() == offset
        assert first.get_attribute("href") == f"#/requests/{at_top}"
        place.get_by_role("link").click()
        expect(board.page).to_have_url(re.compile("#/requests/req_"))
        board.page.go_back()
        expect(board.rows()).to_have_count(131)
        assert abs(board.page.evaluate("scrollY") - 2000) < 2
        board.button("1 new").click()
        expect(first).to_have_attribute("href", f"#/requests/{further_down}")
        assert board.page.evaluate("scrollY") == 0
        board.close()


def test_search_and_filters_narrow_the_list_and_the_downloads(board: Board, stage: Stage) -> None:
    wanted = stage.ask_id(model=DEEPSEEK, text="a needle in the hay, 针")
    failed = stage.fail()
    board.open("requests")
    only = board.rows().get_by_role("link")
    board.page.get_by_role("searchbox").fill("针")
    expect(only).to_have_count(1)
    expect(only).to_have_attribute("href", f"#/requests/{wanted}")
    for form in ("JSON Lines", "CSV"):
        with board.page.expect_download() as download:
            board.button(form).click()
        text = text_of(download.value)
        assert wanted in text
        assert failed not in text
    board.button("Clear filters").click()
    board.page.get_by_label("State").select_option("failed")
    expect(only.first).to_have_attribute("href", f"#/requests/{failed}")
    board.page.get_by_label("State").select_option("")
    board.page.get_by_label("Model").select_option(DEEPSEEK)
    expect(only.first).to_have_attribute("href", f"#/requests/{wanted}")
    assert {link.inner_text() for link in only.all()} == {DEEPSEEK}
    board.page.get_by_role("searchbox").fill("nothing has this")
    board.shows("No request fits these filters.")


# The pause after which a search begins ends when a test says so, and with it whatever else waits as long.
PAUSES = """
const { setTimeout: later, clearTimeout: forget } = window;
const paused = new Map();
window.setTimeout = (task, delay, ...rest) =>
  delay === 300 ? (paused.set(-paused.size - 1, task), -paused.size) : later(task, delay, ...rest);
window.clearTimeout = (id) => id < 0 ? paused.set(id, null) : forget(id);
window.isPausing = () => [...paused.values()].some(Boolean);
window.endPauses = () => [...paused].forEach(([id, task]) => { paused.set(id, null); task?.(); });
"""


def test_what_is_typed_while_a_search_begins_and_other_filters_stay(board: Board) -> None:
    page = board.page
    page.add_init_script(PAUSES)
    board.open("requests")
    search, state = page.get_by_role("searchbox"), page.get_by_label("State")

    def pause_over() -> None:
        eventually(lambda: page.evaluate("isPausing()"), "a search that is about to begin")
        page.evaluate("endPauses()")

    page.evaluate("endPauses()")
    search.fill("ne")
    eventually(lambda: page.evaluate("isPausing()"), "a search that is about to begin")
    with page.expect_request(lambda request: request.url.endswith("q=ne")):
        search.evaluate("""box => {
            endPauses();
            box.value = "nee";
            box.dispatchEvent(new InputEvent("input", { bubbles: true }));
        }""")
    with page.expect_request(lambda request: request.url.endswith("q=nee")):
        pause_over()
    expect(search).to_have_value("nee")

    search.fill("nee ")
    state.select_option("failed")
    with page.expect_request(lambda request: "q=nee+" in request.url and "status=failed" in request.url):
        pause_over()
    expect(state).to_have_value("failed")

    search.fill("needle")
    board.button("Clear filters").click()
    expect(state).to_have_value("")
    page.evaluate("endPauses()")
    expect(board.button("Clear filters")).to_have_count(0)
    expect(search).to_have_value("")


def test_a_running_request_is_seen_followed_and_aborted(board: Board, stage: Stage) -> None:
    board.open("requests")
    running = board.page.locator("tbody.b-runnings tr.b-row")
    with stage.streaming(CLAUDE, *[DEEPSEEK] * 5):
        expect(running).to_have_count(6)
        board.shows("Queued · 1")
        row = running.filter(has_text=CLAUDE)
        expect(row).to_contain_text("Streaming")
        expect(row).to_contain_text("word word")
        row.get_by_role("link").click()
        answer = board.page.get_by_role("region", name="Answer")
        expect(answer).to_contain_text("word")
        length = len(answer.inner_text())
        board.page.wait_for_function(
            "length => document.querySelector('.b-answer').innerText.length > length + 20", arg=length
        )
        board.button("Abort").click()
        board.button("Really abort?").click()
        board.shows("The request was aborted.")
        expect(board.button("Abort")).to_have_count(0)
        board.open("requests")
        row = running.filter(has_text=DEEPSEEK).last
        expect(running).to_have_count(5)
        row.get_by_role("button", name=re.compile("^Abort")).click()
        row.get_by_role("button", name=re.compile("^Really abort")).click()
        expect(running).to_have_count(4)


def test_one_request_tells_its_tries_and_why_the_first_failed(board: Board, stage: Stage) -> None:
    dead = [
        session["session_id"]
        for session in stage.state()["sessions"]
        if session["model_id"] == model_id(SEARCH)
    ]
    stage.switch(dead_sessions=dead[:1])
    ids = [stage.ask_id(model=SEARCH, text="find it", max_tokens=50) for _ in range(4)]
    stage.switch()
    details = [stage.http.get(f"/api/requests/{request_id}").json() for request_id in ids]
    tried_twice = next(detail for detail in details if detail["attempts"] > 1)
    board.open(f"requests/{tried_twice['request_id']}")
    expect(board.page.locator("h1")).to_have_text(SEARCH)
    table = board.page.get_by_role("table", name="Timings")
    expect(table.get_by_role("rowheader", name="Try 1")).to_be_visible()
    expect(table.get_by_role("row", name=re.compile("Try 1"))).to_contain_text(
        tried_twice["tries"][0]["problem"]
    )
    expect(table.get_by_role("rowheader", name="Whole request")).to_be_visible()
    board.shows("max_tokens: 50")
    board.button("Copy id").click()
    assert board.clipboard() == tried_twice["request_id"]


def test_texts_of_the_network_stay_text_and_only_safe_pictures_load(board: Board, stage: Stage) -> None:
    kept = re.search(r"!\[.*\]\((.+)\)", stage.ask(model=IMAGE).json()["choices"][0]["message"]["content"])
    assert kept
    hostile = (
        "<img src=x onerror=alert(1)> [x](javascript:alert(1)) ![p](http://127.0.0.1:1/x.png)\n"
        f"[good](https://example.com/a) ![far](https://example.com/p.png) ![near]({kept[1]})\nend"
    )
    stage.switch(answers={"*": [hostile]})
    request_id = stage.ask_id(text=hostile)
    referrers = []
    png = contract.png("far")

    def serve(route: Route) -> None:
        referrers.append(route.request.headers.get("referer"))
        route.fulfill(body=png, content_type="image/png")

    board.context.route("https://example.com/**", serve)
    board.open(f"requests/{request_id}")
    answer = board.page.locator(".b-answer")
    expect(answer).to_contain_text(
        "<img src=x onerror=alert(1)> [x](javascript:alert(1)) ![p](http://127.0.0.1:1/x.png)"
    )
    links = [link.get_attribute("href") for link in answer.get_by_role("link").all()]
    assert links == ["https://example.com/a", "https://example.com/p.png", kept[1]]
    board.page.wait_for_function(
        "() => [...document.querySelectorAll('.b-answer img')].every((image) => image.naturalWidth > 0)"
    )
    assert answer.locator("img").count() == 2
    assert set(referrers) == {None}
    assert answer.inner_text().endswith("\nend")


def test_long_messages_are_collapsed(board: Board, stage: Stage) -> None:
    request_id = stage.ask_id(text="长 text " * 2000)
    board.open(f"requests/{request_id}")
    message = board.page.locator(".b-message")
    assert len(message.inner_text()) < 3000
    message.get_by_role("button", name=re.compile("^Show all")).click()
    assert len(message.inner_text()) > 13_000
    message.get_by_role("button", name="Show less").click()
    assert len(message.inner_text()) < 3000


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(
    "text", ['It\'s `x` $HOME \\ "quoted"\n二 😀 !history', "much " * 40_000], ids=["quotes", "long"]
)
def test_the_copied_curl_command_works_in_a_shell(board: Board, stage: Stage, text: str) -> None:
    request_id = stage.ask_id(text=text, stop=["'; exit 1"], max_tokens=100_000)
    board.open(f"requests/{request_id}")

    def logged() -> set[str]:
        return {row["request_id"] for row in stage.http.get("/api/requests?limit=500").json()["data"]}

    eventually(lambda: request_id in logged(), "the request in the log")
    before = logged()
    board.button("Copy as curl").click()
    board.shows("Copied")
    run = subprocess.run(
        ["sh", "-s"], input=board.clipboard(), capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(run.stdout)["object"] == "chat.completion", run.stdout
    again = eventually(lambda: "".join(logged() - before), "the repeated one in the log")
    first, second = (stage.http.get(f"/api/requests/{each}").json() for each in (request_id, again))
    assert first["messages"] == second["messages"]
    assert first["parameters"] == second["parameters"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_copied_curl_command_of_a_stream_streams(board: Board, stage: Stage) -> None:
    request_id = stage.ask_id(stream=True, stream_options={"include_usage": True})
    board.open(f"requests/{request_id}")
    board.button("Copy as curl").click()
    board.shows("Copied")
    command = board.clipboard()
    run = subprocess.run(["sh", "-s"], input=command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.startswith("data: "), run.stdout
    assert run.stdout.endswith("data: [DONE]\n\n")


def test_an_unknown_request_is_said_to_be_unknown(board: Board) -> None:
    board.expected = "404"
    board.open("requests/req_unknown")
    board.shows("There is no request req_unknown in the store.")
    board.open("requests/%zz")  # a damaged link
    board.page.reload()
    board.shows("There is no request %zz in the store.")


# ── Over time ───────────────────────────────────────────────────────────────────────────────────────────────


def test_charts_are_drawn_and_are_tables_too(board: Board, stage: Stage) -> None:
    stage.ask()
    board.open("time")
    plots = board.page.locator(".b-plot canvas")
    expect(plots).to_have_count(4)
    drawn = (
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    )
    assert all(plot.evaluate(drawn) for plot in plots.all())
    before = plots.first.bounding_box()
    board.page.set_viewport_size({"width": 500, "height": 900})
    board.page.wait_for_timeout(300)
    after = plots.first.bounding_box()
    assert before
    assert after
    assert after["width"] < before["width"]
    board.button(re.compile("^As table: Requests")).click()
    table = board.page.get_by_role("region", name="Requests and errors").get_by_role("table")
    counted = [int(cell.inner_text()) for cell in table.locator("tbody tr td:nth-child(2)").all()]
    assert len(counted) == 60
    assert sum(counted) > 3
    board.page.get_by_role("radio", name="Last day").check()
    expect(table.locator("tbody tr").first).to_be_visible()
    expect(
        board.page.get_by_role("region", name="By model").get_by_role("row", name=re.compile(CLAUDE))
    ).to_be_visible()


# How many pixels each column of a chart's canvas has that are not empty, and where its plot begins and ends.
DRAWN = """plot => {
    const canvas = plot.querySelector("canvas"), whole = canvas.getBoundingClientRect();
    const inner = plot.querySelector(".u-over").getBoundingClientRect(), scale = canvas.width / whole.width;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const columns = new Array(canvas.width).fill(0);
    for (let at = 3; at < data.length; at += 4) if (data[at]) columns[((at - 3) / 4) % canvas.width] += 1;
    return [columns, ...[inner.left, inner.right].map((x) => Math.round((x - whole.left) * scale))];
}"""


@pytest.mark.parametrize(("span", "buckets", "seconds"), [("Last hour", 60, 60), ("Last day", 96, 900)])
def test_a_few_requests_of_the_present_are_seen_in_the_charts(
    board: Board, span: str, buckets: int, seconds: int
) -> None:
    """The newest bucket, whose neighbours are empty, ends at a full hour, where a label stands."""
    end = 1_764_442_800
    nothing = [0] * (buckets - 1)
    once = [*[None] * (buckets - 1), 1.5]
    statistics = {
        "from": end - buckets * seconds,
        "to": end,
        "bucket_seconds": seconds,
        "times": [end - number * seconds for number in range(buckets, 0, -1)],
        "requests": [*nothing, 5],
        "errors": [*nothing, 0],
        "queue_depth": [*nothing, 0],
        "first_byte_seconds": {"median": once, "p95": once},
        "tokens_per_second": {"median": once, "p95": once},
        "models": [],
    }
    board.context.route("**/api/statistics?*", lambda route: route.fulfill(json=statistics))
    board.open("time")
    board.page.get_by_role("radio", name=span).check()
    expect(board.page.locator(".b-plot canvas")).to_have_count(4)

    for chart, pixels in (("Requests and errors", 200), ("Time to first token", 8), ("Tokens per second", 8)):
        plot = board.page.get_by_role("img", name=re.compile(f"^{chart}"))
        columns, left, right = plot.evaluate(DRAWN)
        width = round((right - left) / buckets)
        grid = sum(columns[right - 4 * width : right - 3 * width])
        assert sum(columns[right - width : right]) > grid + pixels, chart
        assert columns[-2:] == [0, 0], f"{chart}: the last label is cut off"


def test_a_program_without_requests_says_so_everywhere(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Stage(tmp_path_factory.mktemp("empty"), connected=False) as stage:
        board = Board(browser, stage.url)
        board.open("time")
        board.shows(re.compile("No request in the last hour"))
        board.open("requests")
        board.shows(re.compile("No request has come yet"))
        board.open("now")
        board.shows("No LMArena tab is connected")
        board.close()


# ── Connect ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_snippets_are_for_the_chosen_model_and_those_for_the_shell_run(board: Board, stage: Stage) -> None:
    board.open("connect")
    code = board.page.get_by_role("tabpanel").locator("pre")
    expect(code).to_contain_text(f"{stage.url}/v1/chat/completions")
    picker = board.page.get_by_role("combobox")
    picker.click()
    picker.fill("deepseek")
    expect(board.page.get_by_role("option")).to_have_count(1)
    picker.press("Enter")
    expect(picker).to_have_value(DEEPSEEK)
    expect(code).to_contain_text(DEEPSEEK)
    names = [tab.inner_text() for tab in board.page.get_by_role("tab").all()]
    assert len(names) == 10
    board.page.get_by_role("tab", name="curl").focus()
    for name in names:
        expect(board.page.get_by_role("tab", name=name, exact=True)).to_be_focused()
        expect(code).to_contain_text(re.compile(re.escape(stage.url.removeprefix("http://").split(":")[1])))
        board.page.keyboard.press("ArrowRight")
    board.page.get_by_role("tab", name="curl").click()
    board.page.get_by_role("tabpanel").get_by_role("button", name="Copy").click()
    run = subprocess.run(
        ["sh"], input=board.clipboard(), capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.rstrip().endswith("data: [DONE]")


def test_python_s_snippets_run(board: Board, stage: Stage) -> None:
    board.open("connect")
    expect(board.page.get_by_role("combobox")).not_to_have_value("")
    for name in ("openai (Python)", "LangChain"):
        board.page.get_by_role("tab", name=name).click()
        snippet = board.page.get_by_role("tabpanel").locator("pre").inner_text()
        scope: dict[str, Any] = {}
        exec(compile(snippet, name, "exec"), scope)  # it asks the program, and prints the answer
    asked = [seen.body["messages"][-1]["content"] for seen in stage.do(lambda: stage.rig.retries[-2:])]
    assert asked == ["Hello", "Hello"]


def test_the_box_to_try_streams_over_several_turns_and_stops(board: Board, stage: Stage) -> None:
    board.open("connect")
    picker, box = board.page.get_by_role("combobox"), board.page.get_by_label("Message", exact=True)
    picker.fill(CLAUDE)
    picker.press("Enter")
    log = board.page.get_by_role("log")
    stage.switch(reasoning=True)
    box.fill("first")
    box.press("Shift+Enter")
    box.type("line")
    box.press("Enter")
    expect(log.get_by_text(re.compile(r"first\s+line")).last).to_be_visible()
    expect(log.get_by_text(re.compile("^Reasoning"))).to_be_visible()
    expect(board.button("Send")).to_be_visible()
    stage.switch()
    box.fill("second")
    box.press("Enter")
    expect(log.locator("li")).to_have_count(4)
    expect(board.button("Send")).to_be_visible()
    sent = stage.do(lambda: stage.rig.retries[-1].body["messages"])
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    stage.switch(line_delay_seconds=0.2, answers={"*": ["slow "] * 1000})
    box.fill("third")
    box.press("Enter")
    expect(log.locator("li").last).to_contain_text("slow slow")
    board.button("Stop").click()
    board.shows("Stopped by you.")
    eventually(lambda: stage.do(lambda: stage.rig.retries[-1].outcome) == "aborted", "the abort at the arena")
    stage.switch()
    board.page.get_by_role("navigation").get_by_role("link", name="Log").click()
    board.page.go_back()
    expect(log.locator("li")).to_have_count(6)
    board.page.reload()
    expect(log).to_be_visible()
    expect(log.locator("li")).to_have_count(0)


def test_an_answer_that_was_cleared_away_writes_into_no_other(board: Board, stage: Stage) -> None:
    stage.switch(line_delay_seconds=0.2, answers={"*": ["slow "] * 1000})
    board.open("connect")
    box = board.page.get_by_label("Message", exact=True)
    log = board.page.get_by_role("log")
    turns = log.get_by_role("listitem")
    expect(board.page.get_by_role("combobox")).not_to_have_value("")
    box.fill("first")
    box.press("Enter")
    expect(turns.last).to_contain_text("slow slow")
    board.button("Clear").click()
    box.fill("second")
    box.press("Enter")
    eventually(lambda: stage.do(lambda: stage.rig.retries[-2].outcome) == "aborted", "the abort at the arena")
    expect(turns.last).to_contain_text("slow slow")
    expect(turns).to_have_count(2)
    expect(turns.last).to_have_attribute("aria-busy", "true")
    board.button("Clear").click()
    eventually(lambda: stage.state()["requests"]["active"] == 0, "both answers are broken off")
    expect(turns).to_have_count(0)


def test_no_model_can_be_named_before_the_list_has_come(board: Board) -> None:
    held: list[Route] = []
    board.context.route("**/v1/models", lambda route: held.append(route))
    board.open("connect")
    picker = board.page.get_by_role("combobox")
    expect(picker).to_be_disabled()
    eventually(lambda: board.page.evaluate("performance.now()") and held, "the list is asked for")
    board.context.route("**/v1/models", lambda route: route.continue_())
    for route in held:
        route.continue_()
    picker.fill(IMAGE)
    picker.press("Enter")
    expect(picker).to_have_value(IMAGE)


def test_the_box_shows_pictures_and_errors_with_the_request_id(board: Board, stage: Stage) -> None:
    board.expected = "400"
    board.open("connect")
    picker, box = board.page.get_by_role("combobox"), board.page.get_by_label("Message", exact=True)
    picker.fill(IMAGE)
    picker.press("Enter")
    box.fill("a cat")
    box.press("Enter")
    board.page.wait_for_function("() => document.querySelector('[role=log] img')?.naturalWidth > 0")
    picker.fill(EDIT)
    picker.press("Enter")
    board.shows(re.compile("works on an image"))
    box.fill("a cat")
    box.press("Enter")
    expect(board.page.get_by_role("log").get_by_role("alert")).to_contain_text("req_")


# ── Log, settings ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_shows_what_happens(board: Board, stage: Stage) -> None:
    board.open("log")
    request_id = stage.fail()
    expect(board.page.get_by_role("group", name="Lines of the log")).to_contain_text(request_id)


def test_the_settings_are_listed_with_their_values(board: Board) -> None:
    board.open("settings")
    board.shows("sessions_per_model")


# Headless browsers show no notifications: this notes what would be shown, to a person who is elsewhere.
NOTIFICATIONS = """
  window.shown = [];
  window.Notification = class {
    static permission = sessionStorage.getItem("allowed") ?? "default";
    static async requestPermission() {
      sessionStorage.setItem("allowed", (Notification.permission = "ANSWER"));
      return "ANSWER";
    }
    constructor(title, options) { window.shown.push([title, options.silent]); }
    close() {}
  };
  document.hasFocus = () => false;
"""


def sign_out_and_in(stage: Stage, board: Board, *, is_told: bool) -> None:
    stage.call(stage.rig.twin.sign_out)
    board.shows("The site asks you to sign in or to accept its terms")
    if is_told:  # it waits a moment for what passes by itself
        eventually(lambda: board.page.evaluate("shown.length"), "a notification")
    else:
        board.page.wait_for_timeout(4500)
    stage.call(stage.rig.make_ready)
    expect(board.page.locator(".banner")).to_have_count(0)
    board.page.wait_for_timeout(2500)  # it looks once a second


def test_the_desktop_is_told_that_the_person_is_needed_once_they_have_turned_that_on(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Stage(tmp_path_factory.mktemp("notifications")) as stage:
        board = Board(browser, stage.url)
        board.page.add_init_script(NOTIFICATIONS.replace("ANSWER", "granted"))
        board.open("settings")
        sign_out_and_in(stage, board, is_told=False)
        assert board.page.evaluate("shown") == []
        board.button("Turn on").click()
        sign_out_and_in(stage, board, is_told=True)
        title = "The site asks you to sign in or to accept its terms"
        assert board.page.evaluate("shown") == [[title, True]]
        board.page.get_by_text("With sound").click()
        board.page.reload()
        expect(board.page.get_by_label("With sound")).to_be_checked()
        sign_out_and_in(stage, board, is_told=True)
        assert board.page.evaluate("shown") == [[title, False]]
        board.button("Turn off").click()
        expect(board.button("Turn on")).to_be_visible()
        board.close()


def test_a_browser_that_forbids_notifications_is_said_to(browser: Browser, stage: Stage) -> None:
    board = Board(browser, stage.url)
    board.page.add_init_script(NOTIFICATIONS.replace("ANSWER", "denied"))
    board.open("settings")
    board.button("Turn on").click()
    board.shows("The browser does not allow notifications for this page")
    board.close()


# ── Key, contents, restart ──────────────────────────────────────────────────────────────────────────────────


def test_the_key_is_asked_for_once_and_contents_that_are_off_are_said_to_be_off(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tables = {"server": {"api_key": KEY}, "log": {"contents": False}}
    with Stage(tmp_path_factory.mktemp("key"), tables=tables) as stage:
        stage.http.headers["authorization"] = f"Bearer {KEY}"
        request_id = stage.ask_id()
        board = Board(browser, stage.url)
        board.expected = "401"
        board.page.goto(stage.url)
        field = board.page.get_by_label("Key")
        for wrong in ("wrong", "sk–密钥"):  # no header can carry the second
            field.fill(wrong)
            field.press("Enter")
            board.shows("That is not the key.")
            board.page.reload()
            expect(field).to_be_visible()
        board.page.evaluate("sessionStorage.setItem('lmarena_proxy.key', '密钥')")
        board.page.reload()
        field.fill(KEY)
        field.press("Enter")
        board.page.get_by_role("navigation").get_by_role("link", name="Connect").click()
        assert KEY not in board.page.locator("main").inner_text()
        expect(board.page.get_by_role("tabpanel").locator("pre")).to_contain_text("$LMARENA_PROXY_API_KEY")
        board.button("Show").click()
        board.shows(KEY)
        board.button("Copy key").click()
        assert board.clipboard() == KEY
        board.open(f"requests/{request_id}")
        board.shows("Contents are not kept")
        expect(board.page.get_by_role("region", name="Answer")).to_have_count(0)
        board.page.reload()
        expect(board.page.locator("main h1")).to_be_visible()
        board.close()


def test_the_page_finds_the_program_again_after_a_restart(browser: Browser, tmp_path: Path) -> None:
    port, directory = free_port(), tmp_path / "program"
    directory.mkdir()
    shutil.copy(ROOT / "models.json", directory)
    config = write_config(directory, {"models": {"include": [CLAUDE]}})
    arguments = ("--demo", "--yes", "--config", str(config), "--port", str(port), "--bridge-port", "0")

    def is_up() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    with Terminal(directory, *arguments) as first:
        eventually(is_up, "the program")
        board = Board(browser, f"http://127.0.0.1:{port}")
        board.expected = "Failed to load resource|ERR_"
        board.open("requests")
        board.shows("Connected")
        settings = board.context.new_page()
        settings.goto(f"{board.url}/#/settings")
        person_wait = settings.locator(".setting", has_text="person_wait_seconds").locator("dd").first
        expect(person_wait).to_contain_text("120")
        first.kill()
        board.shows("Not connected")
    write_config(directory, {"models": {"include": [CLAUDE]}, "requests": {"person_wait_seconds": 77}})
    with Terminal(directory, *arguments):
        eventually(is_up, "the program again")
        board.shows("Connected")
        expect(person_wait).to_contain_text("77")
        body = {"model": CLAUDE, "messages": [{"role": "user", "content": "after the restart"}]}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        link = board.rows().first.get_by_role("link")
        expect(link).to_have_attribute("href", f"#/requests/{answer.headers['x-request-id']}")
        board.close()


# ── Speed ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """All models with their conversations, 10,000 requests in the store, 100 answers that stream."""
    entries = json.loads((ROOT / "models.json").read_text(encoding="utf-8"))
    names = [*dict.fromkeys(entry["publicName"] for entry in entries)]
    with Stage(tmp_path_factory.mktemp("crowd"), models=names) as stage:
        stage.call(stage.rig.fill)
        stage.insert_requests(10_000)
        chats = [pool["model"] for pool in stage.state()["pool"] if pool["modality"] == "chat"][:25]
        with stage.streaming(*chats * 4, line_delay_seconds=0.5):
            yield stage


def shares(board: Board, milliseconds: int = 3000) -> tuple[float, float]:
    """What its scripts, by a profile, and all of its work take of a core."""
    session = board.context.new_cdp_session(board.page)
    session.send("Performance.enable")
    session.send("Profiler.enable")

    def metrics() -> dict[str, float]:
        return {
            metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]
        }

    session.send("Profiler.start")
    before = metrics()
    board.page.wait_for_timeout(milliseconds)
    after = metrics()
    profile = session.send("Profiler.stop")["profile"]
    names = {node["id"]: node["callFrame"]["functionName"] for node in profile["nodes"]}
    deltas = zip(profile["samples"], profile["timeDeltas"], strict=True)
    busy = sum(delta for node, delta in deltas if names[node] not in ("(idle)", "(program)", "(root)"))
    task = (after["TaskDuration"] - before["TaskDuration"]) / (after["Timestamp"] - before["Timestamp"])
    return busy / (profile["endTime"] - profile["startTime"]), task


@pytest.mark.parametrize("panel", ["now", "pool", "requests", "time", "log"])
def test_the_page_stays_light_under_a_crowd(browser: Browser, crowd: Stage, panel: str) -> None:
    """Shares are of one core. The bounds are wide: the machine plays program, arena, tab and clients, too."""
    board = Board(browser, crowd.url)
    board.open(panel)
    paint = board.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert len(crowd.state()["running"]) == 100
    board.page.wait_for_timeout(1000)
    script, task = shares(board)
    nodes = board.page.evaluate("document.querySelectorAll('*').length")
    print(
        f"\n{panel}: first paint {paint:.0f} ms, script {script:.1%}, all {task:.1%}, {nodes} elements",
        end="",
    )
    board.close()
    assert paint < 5000
    assert script < 0.25
    assert nodes < 12_000
