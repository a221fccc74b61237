"""What dashboards, Prometheus and the log are shown, and what a dashboard can do."""

import csv
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    ROOT,
    Held,
    Rig,
    check_error,
    eventually,
    model_id,
    start,
    until,
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from demo.arena import Failure, Switches
from lmarena_proxy import (
    FEED_KEYS,
    AttemptFailed,
    Config,
    LogConfig,
    RequestEnded,
    ServerConfig,
    find_changes,
    find_sources,
    list_settings,
    parse_arguments,
)


@pytest.fixture(autouse=True)
def all_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The program writes its log from INFO on."""
    caplog.set_level("INFO", "lmarena_proxy")


# ── The feed ────────────────────────────────────────────────────────────────────────────────────────────────


class Dashboard:
    """A reader of the feed, which keeps what a page would keep."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.document: dict[str, Any] = {}
        self.log: list[Any] = []
        self.ended: list[Any] = []
        self.kinds: list[str] = []
        self.last_id = ""
        self.comments = 0

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        async with self.rig.http.stream("GET", "/api/events", headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            rest = ""
            async for text in response.aiter_text():
                *blocks, rest = (rest + text).split("\n\n")
                for block in blocks:
                    self.take(block)
                if self.document:
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED

    def take(self, block: str) -> None:
        if block.startswith(":"):
            self.comments += 1
            return
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert fields.keys() == {"id", "event", "data"}
        self.last_id = fields["id"]
        self.kinds.append(fields["event"])
        data = json.loads(fields["data"])
        if fields["event"] == "snapshot":
            self.document, self.log = data, data.pop("log")
            return
        assert data, "an empty change"
        self.log += data.pop("log", [])
        self.ended += data.pop("ended", [])
        for name, keys in data.pop("gone", {}).items():
            self.document[name] = [each for each in self.document[name] if each[FEED_KEYS[name]] not in keys]
        for name, value in data.items():
            if name in FEED_KEYS:
                entries = {each[FEED_KEYS[name]]: each for each in [*self.document.get(name, []), *value]}
                self.document[name] = [*entries.values()]
            else:
                self.document[name] = value

    def entries(self, name: str) -> dict[Any, Any]:
        return {each[FEED_KEYS[name]]: each for each in self.document[name]}


@asynccontextmanager
async def watched(rig: Rig, last_id: str = "") -> AsyncIterator[Dashboard]:
    async with trio.open_nursery() as nursery:
        dashboard = Dashboard(rig)
        dashboard.last_id = last_id
        if last_id:
            nursery.start_soon(dashboard.read)
        else:
            await nursery.start(dashboard.read)
        yield dashboard
        nursery.cancel_scope.cancel()


def alike(document: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether a dashboard shows what the state says, in whatever order."""
    left, right = (
        {
            name: sorted(map(json.dumps, value)) if name in FEED_KEYS else value
            for name, value in each.items()
            if name != "uptime_seconds"
        }
        for each in (document, state)
    )
    return left == right


async def test_a_dashboard_always_comes_to_show_the_state(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, connected=False)

    async def is_shown() -> bool:
        return alike(dashboard.document, await rig.state())

    async with watched(rig) as dashboard:
        assert dashboard.kinds == ["snapshot"]
        assert dashboard.document["person"]["state"] == "missing"
        await rig.connect()
        await eventually(is_shown)
        assert dashboard.document["person"] is None
        await rig.fill()
        await eventually(is_shown)
        assert len(dashboard.document["sessions"]) == 8
        assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
        await rig.twin.sign_out()
        await until(lambda: dashboard.document["person"] is not None)
        await eventually(is_shown)
        assert {session["state"] for session in dashboard.document["sessions"]} == {"resting"}
        assert [request["outcome"] for request in dashboard.ended] == ["stop"]
        assert dashboard.kinds.count("snapshot") == 1
    numbers = [line["seq"] for line in dashboard.log]
    assert numbers == sorted(set(numbers))
    assert any(line["event"] == "SessionOpened" for line in dashboard.log)


async def test_a_dashboard_follows_a_request_from_the_queue_to_its_end(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    tables = {"pool": {"sessions_per_model": 1}}
    switches = Switches(line_delay_seconds=0.4, answers={"*": ["A short ", "answer"]})
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    states: dict[str, list[Any]] = {"first": [], "second": [], "third": []}

    def note() -> None:
        for request in dashboard.document["running"]:
            seen = states[request["client"].split()[-1]]
            if (now := (request["state"], request["place"])) not in seen:
                seen.append(now)

    async def ask(name: str) -> None:
        headers = {"user-agent": name}
        body = {"model": CLAUDE, "messages": [{"role": "user", "content": "A rather long question"}]}
        await rig.http.post("/v1/chat/completions", json=body, headers=headers)

    async with watched(rig) as dashboard, trio.open_nursery() as clients:
        for name in states:
            clients.start_soon(ask, name)
            while not states[name]:
                note()
                await trio.sleep(0.01)
        held.release()
        while dashboard.document["running"] or len(dashboard.ended) < 3:
            note()
            await trio.sleep(0.01)
    assert states["first"][0] == ("waiting_for_first_byte", None)
    assert states["first"][-1] == ("streaming", None)
    assert states["second"][0] == ("queued", 1)
    assert states["third"][:2] == [("queued", 2), ("queued", 1)]
    assert [request["client"].split()[-1] for request in dashboard.ended] == [*states]


async def test_a_reader_that_comes_back_goes_on_where_it_was(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    async with watched(rig) as dashboard:
        pass
    async with watched(rig):  # somebody else keeps the feed going
        await rig.chat(CLAUDE, "Hello")
        async with watched(rig, dashboard.last_id) as back:
            back.document, back.log = dashboard.document, dashboard.log
            await until(lambda: any(session["uses"] for session in back.document["sessions"]))
            assert "snapshot" not in back.kinds
    for strange in ("nonsense", f"{dashboard.last_id.partition('-')[0]}-99999", "deadbeef-1"):
        async with watched(rig, strange) as anew:
            await until(lambda: anew.kinds)
            assert anew.kinds[0] == "snapshot"


async def test_a_reader_that_was_away_too_long_begins_anew(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    async with watched(rig) as dashboard:
        pass
    feed = rig.program.panel._feed
    for session in [*rig.pool(CLAUDE).sessions.values()]:
        for uses in range(feed.KEPT_EVENTS // 2):
            session.uses = uses + 1
            feed._next_at = -1e9
            feed._advance()
    async with watched(rig, dashboard.last_id) as back:
        await until(lambda: back.kinds)
        assert back.kinds[0] == "snapshot"


async def test_ten_dashboards_cost_one_look_a_tick(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    feed = rig.program.panel._feed
    describe, looks = feed._describe, []

    def counted() -> Any:
        looks.append(trio.current_time())
        return describe()

    monkeypatch.setattr(feed, "_describe", counted)
    async with trio.open_nursery() as dashboards:
        for _ in range(10):
            await dashboards.start(Dashboard(rig).read)
        looks.clear()
        await trio.sleep(2)
        dashboards.cancel_scope.cancel()
    assert 1 <= len(looks) <= 2 / feed.TICK_SECONDS + 1
    await until(lambda: trio.current_time() > looks[-1] + 1)
    count = len(looks)
    await trio.sleep(3 * feed.TICK_SECONDS)
    assert len(looks) == count  # nobody reads, nobody looks


async def test_a_quiet_feed_shows_that_it_lives(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await start(nursery, tmp_path)
    monkeypatch.setattr(type(rig.program.panel._feed), "QUIET_SECONDS", 0.3)
    async with watched(rig) as dashboard:
        await until(lambda: dashboard.comments >= 2)


ENTRIES = st.dictionaries(st.integers(0, 5), st.integers(0, 3))
DOCUMENTS = st.fixed_dictionaries(
    {"pool": ENTRIES, "running": ENTRIES, "person": st.none() | st.integers(0, 2)}
)


@given(DOCUMENTS, DOCUMENTS)
def test_changes_applied_to_the_old_document_make_the_new_one(old: Any, new: Any) -> None:
    def listed(document: Any) -> dict[str, Any]:
        return {
            name: [{FEED_KEYS[name]: key, "value": value} for key, value in part.items()]
            if name in FEED_KEYS
            else part
            for name, part in document.items()
        }

    nobody: Any = None
    page = Dashboard(nobody)
    page.document = listed(old)
    changes = find_changes(listed(old), listed(new))
    assert bool(changes) == (old != new)
    if changes:
        page.take(f"id: 1\nevent: change\ndata: {json.dumps(changes)}")
    assert alike(page.document, listed(new))


# ── Requests ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_is_told_whole_with_its_tries(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    rig.arena.switch(failures={CLAUDE: Failure(status=500, body="it broke", times=1)})
    response = await rig.chat(CLAUDE, "Hello", max_tokens=500, stop=["never"])
    assert response.status_code == 200
    request_id = response.headers["x-request-id"]
    found = (await rig.http.get(f"/api/requests/{request_id}")).raise_for_status().json()
    assert found["is_running"] is False
    assert found["path"] == "/v1/chat/completions"
    assert found["client"].startswith("127.0.0.1 · python-httpx/")
    assert found["messages"] == [{"role": "user", "content": "Hello", "attachments": []}]
    assert found["answer"] == response.json()["choices"][0]["message"]["content"]
    assert found["parameters"] == {"max_tokens": 500, "stop": ["never"]}
    first, second = found["tries"]
    assert "it broke" in first["problem"]
    assert first["first_byte_seconds"] is None
    assert second["problem"] is None
    assert first["ended_seconds"] <= second["started_seconds"] <= second["first_byte_seconds"]
    assert second["ended_seconds"] <= found["total_seconds"]
    assert found["attempts"] == 2
    [failed] = rig.event(AttemptFailed)
    assert (failed.request_id, failed.course) == (request_id, "counts")


async def test_a_failed_request_has_its_error_and_traceback(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(failures={CLAUDE: Failure(status=400, body="no thanks")})
    rig = await start(nursery, tmp_path, filled=False, switches=switches)
    response = await rig.chat(CLAUDE, "Hello")
    request_id = response.headers["x-request-id"]
    found = (await rig.http.get(f"/api/requests/{request_id}")).json()
    assert "no thanks" in found["error"]
    assert "Traceback" in found["traceback"]
    assert "ArenaError" in found["traceback"]
    [event] = rig.event(RequestEnded)
    assert event.text.startswith(f"{request_id} {CLAUDE}: 400 invalid_request")
    assert "no thanks" in event.text


async def test_a_running_request_is_shown_and_can_be_aborted(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    rig.arena.switch(hang_after_lines=2)
    responses: list[Any] = []

    async def ask(stream: bool) -> None:
        responses.append(await rig.chat(CLAUDE, "Hello", stream=stream))

    async with trio.open_nursery() as clients:
        for stream in (False, True):
            clients.start_soon(ask, stream)

        async def streaming() -> Any:
            running = (await rig.state())["running"]
            shown = [(each["state"], each["characters"]) for each in running]
            return running if shown == [("streaming", 16)] * 2 else None  # Two lines: all that comes.

        running = await eventually(streaming)
        for each in running:
            found = (await rig.http.get(f"/api/requests/{each['request_id']}")).json()
            assert found["is_running"] is True
            assert found["answer"]
            assert found["answer"].endswith(each["preview"])
            assert len(found["answer"]) == each["characters"]
            aborted = await rig.http.delete(f"/api/requests/{each['request_id']}")
            assert aborted.json() == {"aborted": each["request_id"]}
    whole = next(response for response in responses if response.status_code != 200)
    check_error(whole, 503, "aborted")
    assert whole.headers["x-should-retry"] == "false"
    streamed = next(response for response in responses if response.status_code == 200)
    assert '"code":"aborted"' in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    await until(lambda: rig.arena.stats()["running"] == 0)
    assert rig.pool(CLAUDE).idle == 4
    for each in running:
        check_error(await rig.http.delete(f"/api/requests/{each['request_id']}"), 404, "not_found")
    check_error(await rig.http.get("/api/requests/req_none"), 404, "not_found")
    for path in ("/api/requests", "/api/requests/export"):
        response = await rig.http.get(path, params={"q": "a" * 50_500})
        assert check_error(response, 400, "invalid_request")["param"] == "q"


async def test_without_contents_the_log_of_requests_has_none(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables={"log": {"contents": False}}, filled=True)
    secret = "do not keep this"
    response = await rig.chat(CLAUDE, secret)
    found = (await rig.http.get(f"/api/requests/{response.headers['x-request-id']}")).json()
    assert (found["messages"], found["answer"], found["reasoning"]) == (None, None, None)
    for path in ("/api/requests", "/api/requests/export", "/api/requests/export?format=csv"):
        assert secret not in (await rig.http.get(path)).text
    assert (await rig.http.get("/api/requests", params={"q": secret})).json()["data"] == []


async def test_exports_hold_every_request_that_matches(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    for text in ("=1+1", '"quoted",\nline', "你好"):
        assert (await rig.chat(CLAUDE, text)).status_code == 200
    await rig.chat(DEEPSEEK, "other")
    await until(lambda: len(rig.event(RequestEnded)) == 4)
    await rig.program.store.settle()
    lines = await rig.http.get("/api/requests/export", params={"model": CLAUDE})
    assert 'filename="requests.jsonl"' in lines.headers["content-disposition"]
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["你好", '"quoted",\nline', "=1+1"]
    table = await rig.http.get("/api/requests/export", params={"model": CLAUDE, "format": "csv"})
    assert table.content.startswith(b"\xef\xbb\xbf")
    cells = [*csv.DictReader(io.StringIO(table.text.removeprefix("\ufeff"), newline=""))]
    assert [json.loads(row["messages"])[0]["content"] for row in cells] == [
        row["messages"][0]["content"] for row in rows
    ]
    assert [row["request_id"] for row in cells] == [row["request_id"] for row in rows]
    check_error(await rig.http.get("/api/requests/export?format=xml"), 400, "invalid_request")
    check_error(await rig.http.get("/api/requests/export?status=bad"), 400, "invalid_request")


async def test_a_cell_of_a_table_is_never_a_formula(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    rig.arena.switch(answers={CLAUDE: ['=HYPERLINK("http://example.com")']})
    await rig.http.post(
        "/v1/chat/completions",
        json={"model": CLAUDE, "messages": [{"role": "user", "content": "x"}]},
        headers={"user-agent": "=cmd"},
    )
    await rig.program.store.settle()
    table = await rig.http.get("/api/requests/export?format=csv")
    cells = [*csv.reader(io.StringIO(table.text.removeprefix("\ufeff"), newline=""))]
    assert not [cell for row in cells for cell in row if cell.startswith(("=", "+", "@"))]


@pytest.mark.parametrize(
    "path",
    [
        "/api/requests?limit=0",
        "/api/requests?limit=501",
        "/api/requests?limit=ten",
        "/api/requests?status=fine",
        "/api/statistics?hours=2",
        "/api/statistics?hours=-1",
    ],
)
async def test_a_bad_question_is_a_clear_error(nursery: trio.Nursery, tmp_path: Path, path: str) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    error = check_error(await rig.http.get(path), 400, "invalid_request")
    assert error["param"] in path


# ── Actions ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_more_conversation_is_opened_on_demand(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, EDIT), filled=True)
    response = await rig.http.post("/api/sessions", json={"model_id": model_id(CLAUDE)})
    assert response.status_code == 201
    session = response.json()
    assert session["session_id"] in rig.pool(CLAUDE).sessions
    assert rig.pool(CLAUDE).limiter.total_tokens == 5
    rig.arena.switch(failures={CLAUDE: Failure(status=404, body="gone")})
    check_error(
        await rig.http.post("/api/sessions", json={"model_id": model_id(CLAUDE)}), 502, "upstream_error"
    )
    wrong: list[Any] = [{"model_id": "none"}, {"model_id": model_id(EDIT)}, {}, [], "x"]
    for body in wrong:
        check_error(await rig.http.post("/api/sessions", json=body), 400, "invalid_request")
    deleted = await rig.http.delete(f"/api/sessions/{session['session_id']}")
    assert deleted.status_code == 200
    [retired] = [each for each in (await rig.state())["sessions"] if each["state"] == "retired"]
    assert (retired["session_id"], retired["reason"]) == (session["session_id"], "by the person")


async def test_the_skipped_can_be_tried_again_alone(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(failures={DEEPSEEK: Failure(times=None)})
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK, GPT), switches=switches)
    await rig.fill()
    state = (await rig.state())["bootstrap"]
    assert [each["model"] for each in state["skipped"]] == [DEEPSEEK]
    assert "Traceback" in state["skipped"][0]["traceback"]
    assert "Internal Server Error" in state["skipped"][0]["reply"]
    assert {each["model_id"]: (each["opened"], each["planned"]) for each in state["progress"]} == {
        model_id(CLAUDE): (4, 4),
        model_id(DEEPSEEK): (0, 4),
        model_id(GPT): (4, 4),
    }
    rig.arena.switch(failures={})
    asked = {"action": "start", "models": [model_id(DEEPSEEK)]}
    assert (await rig.http.post("/api/bootstrap", json=asked)).status_code == 202
    await until(lambda: len(rig.pool(DEEPSEEK).sessions) == 4)
    assert (await rig.state())["bootstrap"]["skipped"] == []
    for body in ({"action": "start", "models": ["none"]}, {"action": "go"}, {"action": "start", "models": 1}):
        check_error(await rig.http.post("/api/bootstrap", json=body), 400, "invalid_request")


# ── Who may look ────────────────────────────────────────────────────────────────────────────────────────────

GUARDED = (
    "/api/state",
    "/api/events",
    "/api/requests",
    "/api/requests/export",
    "/api/requests/req_x",
    "/api/statistics",
    "/api/settings",
    "/metrics",
)


async def test_all_but_the_page_itself_wants_the_key(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, connected=False, tables={"server": {"api_key": "s3cret"}})
    for path in GUARDED:
        check_error(await rig.http.get(path), 401, "invalid_api_key")
        check_error(
            await rig.http.get(path, headers={"authorization": "Bearer s3cre"}), 401, "invalid_api_key"
        )
    for path in ("/api/bootstrap", "/api/sessions", "/api/models/refresh"):
        check_error(await rig.http.post(path, json={}), 401, "invalid_api_key")
    for path in ("/", "/dashboard/app.js", "/dashboard/style.css"):
        assert (await rig.http.get(path)).status_code == 200
    settings = await rig.http.get("/api/settings", headers={"authorization": "Bearer s3cret"})
    assert "s3cret" not in settings.text
    [key] = [each for each in settings.json()["settings"] if each["key"] == "server.api_key"]
    assert (key["value"], key["is_secret"]) == ("set", True)
    assert (await rig.http.get("/api/state", headers={"authorization": "Bearer s3cret"})).json()["needs_key"]


async def test_the_page_may_run_its_own_files_and_nothing_else(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    page = await rig.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page.text)
    again = await rig.http.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(
    "name",
    [
        "none.js",
        "",
        "panels",
        "../lmarena_proxy.py",
        "..%2f..%2fconfig.toml",
        "..%2fbridge.user.js",
        "%2e%2e/bridge.user.js",
        "%2fetc%2fpasswd.js",
        "/etc/passwd",
        "a%00.js",
        "vendor/README.md",
        "..\\bridge.user.js",
    ],
)
async def test_no_other_file_is_given(nursery: trio.Nursery, tmp_path: Path, name: str) -> None:
    rig = await start(nursery, tmp_path, connected=False)
    async with httpx.AsyncClient(follow_redirects=True, trust_env=False) as client:
        request = client.build_request("GET", rig.url)
        request.url = request.url.copy_with(raw_path=f"/dashboard/{name}".encode())
        check_error(await client.send(request), 404, "not_found")


# ── Settings, metrics, log ──────────────────────────────────────────────────────────────────────────────────


def test_each_setting_says_where_it_came_from() -> None:
    options = parse_arguments(["--port", "1234", "--models", "a*"])
    sources = find_sources(options, {"LMARENA_PROXY_API_KEY": "secret"})
    config = Config(
        server=ServerConfig(port=1234, api_key="secret", max_body_mb=8), log=LogConfig(contents=False)
    )
    found = {setting.key: setting for setting in list_settings(config, sources)}
    assert len(found) == sum(len(part.__struct_fields__) for part in msgspec.structs.astuple(Config()))
    chosen = ("server.port", "server.api_key", "server.max_body_mb", "log.contents", "log.level")
    assert [(found[key].value, found[key].source) for key in chosen] == [
        (1234, "command line"),
        ("set", "environment"),
        (8, "file"),
        (False, "file"),
        ("INFO", "default"),
    ]


async def metrics(rig: Rig) -> dict[tuple[str, ...], float]:
    response = (await rig.http.get("/metrics")).raise_for_status()
    return {
        (
            sample.name,
            *(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "le"),
        ): (sample.value)
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_metrics_count_what_happened(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    for _ in range(3):
        assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    rig.arena.switch(failures={DEEPSEEK: Failure(status=400, body="no")})
    assert (await rig.chat(DEEPSEEK, "Hello")).status_code == 400
    found = await metrics(rig)
    prefix = "lmarena_proxy_"
    assert found[f"{prefix}requests_total", f"model={CLAUDE}", "outcome=stop"] == 3
    assert found[f"{prefix}requests_total", f"model={DEEPSEEK}", "outcome=invalid_request"] == 1
    assert found[f"{prefix}sessions", "state=idle"] == 8
    assert found[f"{prefix}bridges", "state=ready"] == 1
    assert found[f"{prefix}bridges", "state=verification"] == 0
    assert found[f"{prefix}waiting_requests",] == found[f"{prefix}running_requests",] == 0
    assert found[f"{prefix}bridge_received_bytes_total",] > 0
    assert found[f"{prefix}bridge_sent_bytes_total",] > 0
    assert found[f"{prefix}request_queue_seconds_count", f"model={CLAUDE}"] == 3
    labels = ("gen_ai_operation_name=chat", "gen_ai_provider_name=lmarena", f"gen_ai_request_model={CLAUDE}")
    assert found["gen_ai_server_request_duration_seconds_count", "error_type=", *labels] == 3
    assert found["gen_ai_server_time_to_first_token_seconds_count", *labels] == 3
    tokens = found["gen_ai_client_token_usage_sum", *labels, "gen_ai_token_type=output"]
    assert tokens == sum(event.completion_tokens or 0 for event in rig.event(RequestEnded))
    assert not [name for name, *_ in found if name.endswith("_created")]


async def test_metrics_count_refusals_and_lost_tabs_bytes(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    before = (await metrics(rig))["lmarena_proxy_bridge_received_bytes_total",]
    rig.arena.switch(rate_limit_after=0, rate_limit_times=1, retry_after=1)
    assert (await rig.chat(CLAUDE, "Hello")).status_code == 200
    await rig.twin.open_page()
    await until(lambda: rig.program.bridges.obstacle() is None)
    found = await metrics(rig)
    assert found["lmarena_proxy_rate_limited_total",] == 1
    assert found["lmarena_proxy_bridge_received_bytes_total",] > before


async def test_the_grafana_dashboard_asks_for_metrics_and_labels_that_there_are(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    await rig.chat(CLAUDE, "Hello")
    there: dict[str, set[str]] = {}
    for name, *labels in await metrics(rig):
        there.setdefault(name, set()).update(label.partition("=")[0] for label in labels)
    board = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    for query in queries:
        names = set(re.findall(r"\b(?:lmarena_proxy|gen_ai_(?:server|client))_\w+", query))
        assert names
        assert names <= there.keys(), query
        used = set(re.findall(r"(\w+)(?==~|!~|=\")", query)) | set(re.findall(r"by \((\w+)\)", query)) - {
            "le"
        }
        assert used <= set().union(*(there[name] for name in names)), query


async def test_names_that_clients_make_up_are_no_labels(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(
        nursery, tmp_path, filled=True, tables={"models": {"aliases": {"mine": CLAUDE}}, "log": {}}
    )
    for name in ("mine", CLAUDE, model_id(CLAUDE)):
        assert (await rig.chat(name, "Hello")).status_code == 200
    for number in range(5):
        assert (await rig.chat(f"made-up-{number}", "Hello")).status_code == 404
    found = await metrics(rig)
    models = {label for _, *labels in found for label in labels if label.startswith("model=")}
    assert models == {f"model={CLAUDE}"}


async def test_one_request_can_be_followed_through_the_log(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, filled=True)
    rig.arena.switch(failures={CLAUDE: Failure(status=500, body="it broke", times=2)})
    async with watched(rig) as dashboard:
        response = await rig.chat(CLAUDE, "Hello")
        request_id = response.headers["x-request-id"]
        await until(lambda: dashboard.ended)
        await until(lambda: any(line["event"] == "RequestEnded" for line in dashboard.log))
    lines = [line for line in dashboard.log if line["request_id"] == request_id]
    assert [line["event"] for line in lines] == ["AttemptFailed", "AttemptFailed", "RequestEnded"]
    assert all(request_id in line["message"] for line in lines)


async def test_no_payload_and_no_key_is_in_the_feed(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"server": {"api_key": "s3cret-key"}}
    rig = await start(nursery, tmp_path, connected=False, tables=tables)
    rig.http.headers["authorization"] = "Bearer s3cret-key"
    await rig.connect()
    payload = "A" * 200
    await rig.chat(CLAUDE, f"see data:image/png;base64,{payload}")
    cookies = [cookie.value for cookie in rig.twin.http.cookies.jar if cookie.value]
    for path in ("/api/state", "/api/requests", "/api/requests/export", "/api/settings", "/metrics"):
        text = (await rig.http.get(path)).text
        assert "s3cret-key" not in text
        assert payload not in text
        assert not [value for value in cookies if value in text]
