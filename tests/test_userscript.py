"""bridge.user.js in a real Chromium, between a scripted program and the stand-in arena."""

import base64
import hashlib
import json
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright, Route
from userscript_bridge import (
    BADGE,
    CHROMIUM,
    CREATE_PATH,
    LONGEST_FRAME_BYTES,
    ROOT,
    SITE,
    ArenaProcess,
    Connection,
    ScriptedBridge,
    UserscriptBrowser,
    create_body,
    eventually,
    hash_of,
    new_ids,
    records_of,
    script_for,
    sign_in,
    status_of,
    wait_status,
)

MODELS: list[dict[str, Any]] = json.loads((ROOT / "models.json").read_text(encoding="utf-8"))
CHAT_MODEL = next(m["id"] for m in MODELS if "text" in m["capabilities"]["outputCapabilities"])
MIXED_TEXT = "你好，世界 😀 — ñ"
ANSWER_ALL_KINDS = f'af:{{}}\na0:{json.dumps(MIXED_TEXT, ensure_ascii=False)}\nad:{{"finishReason":"stop"}}\n'

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}")


@pytest.fixture(scope="module")
def browser(playwright: Playwright, arena_process: ArenaProcess) -> Iterator[UserscriptBrowser]:
    started = UserscriptBrowser(playwright, arena_process)
    yield started
    started.browser.close()


@pytest.fixture
def arena(arena_process: ArenaProcess) -> ArenaProcess:
    arena_process.reset()
    return arena_process


@pytest.fixture
def bridge() -> Iterator[ScriptedBridge]:
    scripted = ScriptedBridge()
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def profile(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> Iterator[BrowserContext]:
    with browser.profile(bridge) as context:
        yield context


@pytest.fixture
def page(profile: BrowserContext) -> Page:
    return profile.new_page()


@pytest.fixture
def tab(page: Page, bridge: ScriptedBridge) -> Connection:
    """A signed-in tab that is ready."""
    sign_in(page)
    wait_status(page, "ready")
    connection = bridge.connected()
    connection.wait_state("ready")
    return connection


def user_id(page: Page) -> str:
    """The account's id, read from the cookie as the site wrote it."""
    cookie = next(c["value"] for c in page.context.cookies(SITE) if c["name"] == "arena-auth-prod-v1")
    token = base64.b64decode(urllib.parse.unquote(cookie).removeprefix("base64-") + "==")
    return str(json.loads(token)["user"]["id"])


def chat(page: Page, text: str) -> dict[str, Any]:
    """A message by hand; what the answer field says when it is done."""
    page.fill("#message", text)
    page.click("#send")
    page.wait_for_function("/done|failed/.test(document.querySelector('#status').textContent)")
    return {"status": page.inner_text("#status"), "answer": page.inner_text("#answer")}


def retry_by_hand(page: Page) -> None:
    page.evaluate("document.querySelector('#status').textContent = 'asked'")
    page.click("#retry")
    page.wait_for_function("/done|failed/.test(document.querySelector('#status').textContent)")


# ==== Readiness =============================================================================================


def test_a_visitor_passes_the_check_then_accepts_the_terms_and_is_ready(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    arena.switch(check=True)
    page.goto(SITE)
    at_check = bridge.connection()
    assert at_check.first("hello") | {"state": "", "url": ""} == {
        "type": "hello", "protocol": 1, "script": "1.0.0", "url": "", "state": "", "account": None,
        "features": ["upload"],
    }  # fmt: skip
    assert at_check.first("hello")["url"].startswith(SITE)
    assert at_check.origin == SITE
    at_check.wait_state("verification")
    wait_status(page, "verification")
    page.click("#pass-check")
    at_terms = bridge.connection(1)
    at_terms.wait_state("sign_in")
    assert at_terms.state()["account"] is None
    wait_status(page, "sign_in")
    page.click("#accept-terms")
    signed_in = bridge.connection(2)
    assert signed_in.wait_state("ready")["account"] == hash_of(user_id(page))
    wait_status(page, "ready")
    assert {"ready", "sign_in"}.isdisjoint(m.get("state") for m in at_check.messages)


def test_signing_out_is_told_at_once(page: Page, tab: Connection) -> None:
    page.evaluate("cookieStore.delete('arena-auth-prod-v1')")
    told = tab.wait_state("sign_in")
    assert told["type"] == "state"
    assert told["account"] is None
    assert "arena-auth-prod-v1" in told["detail"]


def test_a_check_that_appears_later_ends_readiness(page: Page, tab: Connection) -> None:
    page.evaluate("document.title = 'Just a moment...'")
    assert tab.wait_state("verification")["account"] == hash_of(user_id(page))
    page.evaluate("document.title = 'Arena'")
    tab.wait_state("ready")


def test_an_auth_cookie_split_in_two_is_read(page: Page, arena: ArenaProcess, bridge: ScriptedBridge) -> None:
    arena.switch(split_cookie=True)
    sign_in(page)
    assert "arena-auth-prod-v1.1" in [c["name"] for c in page.context.cookies(SITE)]
    connection = bridge.connected()
    assert len(connection.wait_state("ready")["account"]) == 64


USER = {"user": {"id": "4f0c…é用户", "name": "????>>>>"}}
FORMS = {
    "base64": "base64-" + base64.b64encode(json.dumps(USER).encode()).decode(),
    "utf-8": "base64-" + base64.b64encode(json.dumps(USER, ensure_ascii=False).encode()).decode(),
    "base64url": "base64-" + base64.urlsafe_b64encode(json.dumps(USER).encode()).decode().rstrip("="),
    "url-encoded": urllib.parse.quote("base64-" + base64.b64encode(json.dumps(USER).encode()).decode()),
    "url-encoded-json": urllib.parse.quote(json.dumps(USER)),
    "json": json.dumps(USER, separators=(",", ":")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_auth_cookie_is_read_in_every_form(page: Page, tab: Connection, form: str) -> None:
    page.evaluate("value => { document.cookie = `arena-auth-prod-v1=${value}; path=/; secure` }", FORMS[form])
    eventually(lambda: tab.state()["account"] == hash_of(USER["user"]["id"]), "the account")
    assert tab.state()["state"] == "ready"


@pytest.mark.parametrize(
    "value", ["base64-!!!!", "base64-" + base64.b64encode(b'{"user":{}}').decode(), "x", "null"]
)
def test_a_cookie_that_cannot_be_read_is_no_sign_in(page: Page, tab: Connection, value: str) -> None:
    page.evaluate("value => { document.cookie = `arena-auth-prod-v1=${value}; path=/; secure` }", value)
    told = tab.wait_state("sign_in")
    assert told["account"] is None
    assert "cannot be read" in told["detail"]


def test_the_welcome_names_the_cookie(page: Page, bridge: ScriptedBridge) -> None:
    bridge.welcome["auth_cookie"] = "another-cookie"
    page.goto(SITE)
    bridge.connection().wait_state("sign_in")
    page.evaluate("value => { document.cookie = `another-cookie=${value}; path=/; secure` }", FORMS["base64"])
    assert bridge.connection().wait_state("ready")["account"] == hash_of(USER["user"]["id"])


def test_a_ping_is_answered_and_unknown_messages_are_not(tab: Connection) -> None:
    tab.send(type="constructor")
    tab.send(type="from the future", id=1)
    tab.send(no_type=True)
    tab.send(type="ping", t=12.5)
    assert tab.first("pong") == {"type": "pong", "t": 12.5}


def test_the_program_can_have_the_page_loaded_again_but_not_in_a_loop(
    page: Page, tab: Connection, bridge: ScriptedBridge
) -> None:
    before = len(bridge.connections)
    tab.send(type="reload", reason="the check must run")
    again = bridge.connection(before)
    again.wait_state("ready")
    again.send(type="reload", reason="the check must run")
    again.send(type="ping", t=1)
    again.first("pong")
    again.fetch(CREATE_PATH, create_body(CHAT_MODEL))
    again.first("end")
    assert not again.closed
    assert len(bridge.connections) == before + 1


# ==== Relay =================================================================================================


def test_bytes_arrive_exactly_as_the_site_sent_them(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(raw={"*": ANSWER_ALL_KINDS}, chunk_bytes=1)
    body = create_body(CHAT_MODEL, MIXED_TEXT)
    exchange = tab.finish(tab.fetch(CREATE_PATH, body))
    assert bytes(exchange.body) == ANSWER_ALL_KINDS.encode()
    assert exchange.head == {
        "type": "response", "id": 1, "status": 200, "headers": {"content-type": "text/plain; charset=utf-8"},
    }  # fmt: skip
    assert exchange.outcome == {"type": "end", "id": 1}
    assert exchange.events[0] == "response"
    assert exchange.events[-1] == "end"
    assert set(exchange.events[1:-1]) == {"bytes"}
    assert arena.record()[-1]["body"] == body


def test_refusals_of_the_site_are_answers_with_their_headers(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(rate_limit_after=0, retry_after=7)
    limited = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    assert limited.head
    assert limited.head["status"] == 429
    assert limited.head["headers"] == {"content-type": "application/json", "retry-after": "7"}
    assert json.loads(limited.body) == {"error": "too many requests"}
    arena.reset(check=True)
    arena.control("POST", "challenge", {})
    checked = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    assert checked.head
    assert checked.head["status"] == 403
    assert checked.head["headers"]["cf-mitigated"] == "challenge"
    assert b"Just a moment..." in checked.body


def test_twenty_four_exchanges_run_at_once_and_do_not_mix(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(chunk_bytes=3, answers={})
    exchanges = {}
    for number in range(24):
        text = f"{number}: {MIXED_TEXT}" * 20
        exchanges[text] = tab.fetch(CREATE_PATH, create_body(CHAT_MODEL, text))
    for text, exchange in exchanges.items():
        tab.finish(exchange)
        lines = exchange.body.decode().split("\n")
        assert "".join(json.loads(line[3:]) for line in lines if line.startswith("a0:")).endswith(text)
        assert exchange.events[-1] == "end"
        assert exchange.events.count("response") == 1
    assert all(len(frame) <= LONGEST_FRAME_BYTES for frame in tab.frames)

    arena.reset(hang_after_lines=1)
    hanging = [tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)) for _ in range(24)]
    eventually(lambda: arena.stats()["running"] == 24, "24 calls at the site at once")
    for exchange in hanging:
        tab.send(type="abort", id=exchange.number)
    assert {tab.finish(exchange).outcome["reason"] for exchange in hanging} == {"aborted"}  # type: ignore[index]
    eventually(lambda: arena.stats()["aborted"] == 24, "24 aborted calls at the site")


def test_an_abort_reaches_the_site_and_other_exchanges_go_on(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(hang_after_lines=2, trouble_times=1)
    hanging = tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))
    eventually(lambda: hanging.body, "the first bytes")
    other = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    assert other.outcome == {"type": "end", "id": 2}
    assert hanging.outcome is None
    tab.send(type="abort", id=hanging.number)
    tab.send(type="abort", id=999)
    assert tab.finish(hanging).outcome | {"message": ""} == {  # type: ignore[operator]
        "type": "error", "id": 1, "reason": "aborted", "message": "",
    }  # fmt: skip
    eventually(
        lambda: [s["outcome"] for s in arena.record()] == ["aborted", "complete"], "the abort at the site"
    )


def test_a_lost_program_aborts_what_runs(
    page: Page, tab: Connection, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    arena.switch(hang_after_lines=1)
    tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))
    eventually(lambda: arena.stats()["running"] == 1, "a running call")
    bridge.stop()
    eventually(lambda: arena.stats()["aborted"] == 1, "the abort at the site")


REFUSED = {
    "another method": ("GET", CREATE_PATH),
    "lower case": ("post", CREATE_PATH),
    "delete": ("DELETE", CREATE_PATH),
    "another path": ("POST", "/nextjs-api/sign-out"),
    "a page": ("POST", "/"),
    "prefix only": ("POST", "/nextjs-api/stream/"),
    "look-alike": ("POST", "/nextjs-api/streams/create-evaluation"),
    "another prefix": ("POST", "/x/nextjs-api/stream/create-evaluation"),
    "no slash": ("POST", "nextjs-api/stream/create-evaluation"),
    "another origin": ("POST", "https://example.com/nextjs-api/stream/create-evaluation"),
    "own origin spelled out": ("POST", SITE + CREATE_PATH),
    "scheme-relative": ("POST", "//example.com/nextjs-api/stream/create-evaluation"),
    "two slashes": ("POST", "/nextjs-api/stream//create-evaluation"),
    "dots": ("POST", "/nextjs-api/stream/../sign-out"),
    "one dot": ("POST", "/nextjs-api/stream/./create-evaluation"),
    "encoded dots": ("POST", "/nextjs-api/stream/%2e%2e/sign-out"),
    "half-encoded dots": ("POST", "/nextjs-api/stream/.%2E/sign-out"),
    "encoded slash": ("POST", "/nextjs-api/stream/..%2fsign-out"),
    "backslash": ("POST", "/nextjs-api/stream/..\\sign-out"),
    "leading backslash": ("POST", "/\\example.com/nextjs-api/stream/x"),
    "tab inside": ("POST", "/nextjs-api/stream/.\t./sign-out"),
    "line end": ("POST", CREATE_PATH + "\n"),
    "fragment": ("POST", CREATE_PATH + "#x"),
    "blank": ("POST", " " + CREATE_PATH),
}


def test_only_streaming_calls_of_this_origin_are_relayed(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    for name, (method, path) in REFUSED.items():
        refused = tab.finish(tab.fetch(path, "{}", method))
        outcome = refused.outcome or {}
        assert (refused.events, outcome["reason"]) == (["error"], "refused"), name
        assert "not relayed" in outcome["message"], name
    tab.send(type="fetch", id=500, method="POST", path=CREATE_PATH, body={"not": "text"})
    assert tab.first("error", id=500)["reason"] == "refused"
    tab.send(type="fetch", id=501, method=None, path=None, body="{}")
    assert tab.first("error", id=501)["reason"] == "refused"
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('base'), {href: 'https://example.com'}))"
    )
    older = tab.finish(tab.fetch("/api/stream/create-evaluation", create_body(CHAT_MODEL), number=502))
    assert older.head
    assert older.head["status"] == 200
    page.evaluate("0")  # lets the requests be told
    assert [url for url in seen if "/_" not in url] == [SITE + "/api/stream/create-evaluation"]
    assert len(arena.record()) == 1


def test_an_id_in_use_is_refused(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(hang_after_lines=1)
    tab.fetch(CREATE_PATH, create_body(CHAT_MODEL), number=7)
    eventually(lambda: arena.stats()["running"] == 1, "a running call")
    tab.fetch(CREATE_PATH, create_body(CHAT_MODEL), number=7)
    assert tab.first("error", id=7)["reason"] == "refused"
    assert arena.stats()["creates"] == 1


def test_a_redirect_is_not_followed(tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(failures={"*": {"status": 302, "headers": {"location": "/nextjs-api/stream/elsewhere"}}})
    refused = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    assert refused.outcome == {"type": "error", "id": 1, "reason": "refused", "message": "redirected"}
    assert refused.events == ["error"]


def test_a_network_failure_is_an_error_of_that_exchange(page: Page, tab: Connection) -> None:
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.send("Network.setBlockedURLs", {"urls": ["*create-evaluation*"]})
    failed = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    assert failed.outcome
    assert failed.outcome["reason"] == "network"
    assert failed.outcome["message"]
    network.send("Network.setBlockedURLs", {"urls": []})
    assert tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))).outcome == {"type": "end", "id": 2}


def test_large_bodies_pass_both_ways_in_frames_of_a_megabyte(tab: Connection, arena: ArenaProcess) -> None:
    line = f"a0:{json.dumps('大' * 1_200_000, ensure_ascii=False)}\n"
    arena.switch(raw={"*": line * 3 + 'ad:{"finishReason":"stop"}\n'})
    exchange = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL, "长" * 2_000_000)))
    assert exchange.outcome == {"type": "end", "id": 1}
    assert bytes(exchange.body) == (line * 3).encode() + b'ad:{"finishReason":"stop"}\n'
    assert max(len(frame) for frame in tab.frames) <= LONGEST_FRAME_BYTES
    assert len(arena.record()[-1]["body"]["messages"][0]["content"]) == 2_000_000


def test_a_program_that_is_behind_is_waited_for(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    line = "a0:" + json.dumps("x" * 65_000) + "\n"
    raw = line * 900 + 'ad:{"finishReason":"stop"}\n'
    watch = (
        "window.WebSocket = class extends WebSocket { constructor(u) { super(u); window.watched = this; } };"
    )
    with browser.profile(bridge, before=watch) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "ready")
        arena.switch(raw={"*": raw})
        connection = bridge.connected()
        bridge.reading = False
        exchange = connection.fetch(CREATE_PATH, create_body(CHAT_MODEL))
        page.wait_for_function("watched.bufferedAmount > 8 * 2 ** 20")
        page.wait_for_timeout(1500)
        # Chromium itself takes what the site sends, up to some 50 MB; the script has stopped reading it.
        assert page.evaluate("watched.bufferedAmount") < 10 * 2**20
        bridge.reading = True
        assert connection.finish(exchange).outcome == {"type": "end", "id": 1}
        assert bytes(exchange.body) == raw.encode()


def test_what_arrives_together_goes_out_in_one_frame(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    arena.switch(raw={"*": 'a0:"x"\n' * 2000 + 'ad:{"finishReason":"stop"}\n'})
    exchange = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    pieces = sum(len(records_of(frame)) for frame in tab.frames)
    assert exchange.body.count(b"\n") == 2001
    assert len(tab.frames) <= pieces < 2001


# ==== Uploads ===============================================================================================

LARGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * (1 << 16)  # 16 MiB
SMALL = b"\x89PNG\r\n\x1a\n small"


@pytest.fixture
def uploads(page: Page, arena: ArenaProcess, bridge: ScriptedBridge) -> Connection:
    """A tab that is ready, of a page that offers uploads."""
    return offer(page, arena, bridge)


def offer(page: Page, arena: ArenaProcess, bridge: ScriptedBridge, **uploads: Any) -> Connection:
    arena.switch(uploads={"offered": True, **uploads})
    sign_in(page)
    wait_status(page, "ready")
    connection = bridge.connected()
    connection.wait_state("ready")
    return connection


def steps(arena: ArenaProcess) -> list[tuple[str, str]]:
    return [(seen["step"], seen["outcome"]) for seen in arena.uploads()]


def upload_by_hand(page: Page, data: bytes) -> str:
    """What the person does with a file; returns what the page shows: its address at the site."""
    page.set_input_files("#file", {"name": "by hand.png", "mimeType": "image/png", "buffer": data})
    page.wait_for_function("document.querySelector('#uploaded').textContent")
    return page.inner_text("#uploaded")


def scripts_loaded(page: Page, action: Callable[[], Any]) -> list[str]:
    """The scripts and pages that are asked for over the network during an action, as paths."""
    seen: list[str] = []
    page.on("request", lambda request: seen.append(urllib.parse.urlsplit(request.url).path))
    action()
    page.evaluate("0")  # lets the requests be told
    return seen


def test_an_upload_goes_the_page_s_own_way(uploads: Connection, page: Page, arena: ArenaProcess) -> None:
    exchange = uploads.finish(uploads.upload(LARGE))
    assert exchange.outcome
    address = exchange.outcome.pop("url")
    assert exchange.outcome == {"type": "uploaded", "id": 1}
    assert address.startswith(f"{SITE}/storage/")
    place, put, last = arena.uploads()
    assert [seen["step"] for seen in (place, put, last)] == ["place", "put", "address"]
    assert place["values"] == ["1.png", "image/png"]
    assert (put["size_bytes"], put["digest"]) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert put["content_type"] == "image/png"
    assert last["values"] == [urllib.parse.unquote(urllib.parse.urlsplit(address).path).split("/")[-1]]
    # The storage gets no cookie, the site gets its own.
    assert [seen["has_cookies"] for seen in (place, put, last)] == [True, False, True]
    wait_status(page, "ready")


def test_scripts_are_searched_when_an_upload_is_asked_for_and_once(
    uploads: Connection, page: Page, arena: ArenaProcess
) -> None:
    first = scripts_loaded(page, lambda: uploads.finish(uploads.upload(SMALL)))
    assert any(path.startswith("/assets/") for path in first)
    again = scripts_loaded(page, lambda: uploads.finish(uploads.upload(SMALL)))
    assert not any(path.startswith("/assets/") for path in again)
    assert steps(arena) == [("place", "done"), ("put", "done"), ("address", "done")] * 2


def test_several_uploads_at_once_do_not_mix(uploads: Connection, arena: ArenaProcess) -> None:
    running = [uploads.upload(SMALL + bytes([number])) for number in range(6)]
    urls = {uploads.finish(exchange).outcome["url"] for exchange in running}  # type: ignore[index]
    assert len(urls) == 6
    digests = {seen["digest"] for seen in arena.uploads() if seen["step"] == "put"}
    assert digests == {hashlib.sha256(SMALL + bytes([number])).hexdigest() for number in range(6)}


def test_a_page_without_uploads_says_so(tab: Connection, arena: ArenaProcess) -> None:
    for _ in range(2):
        outcome = tab.finish(tab.upload(SMALL)).outcome
        assert outcome
        assert (outcome["type"], outcome["reason"]) == ("error", "not_offered")
        assert outcome["message"]
    assert tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))).outcome == {"type": "end", "id": 3}


def test_the_way_is_learned_from_an_upload_by_hand(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    tab = offer(page, arena, bridge, named=False)
    assert tab.finish(tab.upload(SMALL)).outcome["reason"] == "not_offered"  # type: ignore[index]
    assert upload_by_hand(page, SMALL).startswith(f"{SITE}/storage/")
    before = len(arena.uploads())
    loaded = scripts_loaded(page, lambda: tab.finish(tab.upload(LARGE)))
    assert not any(path.startswith("/assets/") for path in loaded)
    assert steps(arena)[before:] == [("place", "done"), ("put", "done"), ("address", "done")]
    assert tab.all("uploaded")[0]["url"].startswith(f"{SITE}/storage/")


def test_other_calls_of_the_page_teach_nothing(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    tab = offer(page, arena, bridge, named=False)
    action = "ab" * 21
    replies = ['1:{"success":true,"data":{"url":"https://x/"}}', '1:{"data":{"key":"k"}}', "no rows", ""]
    for reply in replies:
        page.route("**/other", answering(reply))
        for body in ('["a.png","image/png"]', '["k"]', "[1]", "{}", "x"):
            page.evaluate(
                "([id, body]) => fetch('/other', {method: 'POST', body, headers: {'Next-Action': id}})"
                ".then(response => response.text())",
                [action, body],
            )
        page.unroute("**/other")
    assert tab.finish(tab.upload(SMALL)).outcome["reason"] == "not_offered"  # type: ignore[index]


def test_ids_that_a_deployment_has_changed_are_learned_anew_once(
    uploads: Connection, page: Page, arena: ArenaProcess
) -> None:
    uploads.finish(uploads.upload(SMALL))
    arena.switch(uploads={"offered": True, "deployment": 2})
    loaded = scripts_loaded(page, lambda: uploads.finish(uploads.upload(SMALL)))
    assert "/assets/upload-2.js" in loaded
    assert len(uploads.all("uploaded")) == 2
    # Gone altogether, it is looked for and not found; the page itself was never loaded anew.
    arena.switch(uploads={"offered": True, "deployment": 3, "named": False})
    assert uploads.finish(uploads.upload(SMALL)).outcome["reason"] == "not_offered"  # type: ignore[index]
    assert not uploads.closed
    arena.switch(uploads={"offered": True, "deployment": 4})
    assert uploads.finish(uploads.upload(SMALL)).outcome["type"] == "uploaded"  # type: ignore[index]


def test_an_answer_that_means_nothing_is_not_held_against_the_page_for_ever(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    tab = offer(page, arena, bridge, status={"place": 200}, status_times=1)
    outcomes = [tab.finish(tab.upload(SMALL)).outcome for _ in range(2)]
    assert [outcome and outcome["type"] for outcome in outcomes] == ["error", "uploaded"]
    assert outcomes[0]
    assert outcomes[0]["reason"] == "not_offered"


def test_a_deployment_is_noticed_by_all_that_are_under_way(
    uploads: Connection, page: Page, arena: ArenaProcess
) -> None:
    uploads.finish(uploads.upload(SMALL))
    arena.switch(uploads={"offered": True, "deployment": 2})
    running = [uploads.upload(SMALL + bytes([number])) for number in range(5)]
    assert {uploads.finish(each).outcome["type"] for each in running} == {"uploaded"}  # type: ignore[index]


@pytest.mark.parametrize("step", ["place", "put", "address"])
def test_an_upload_can_be_aborted(page: Page, arena: ArenaProcess, bridge: ScriptedBridge, step: str) -> None:
    tab = offer(page, arena, bridge, hang=step)
    hanging = tab.upload(SMALL)
    eventually(lambda: (step, "running") in steps(arena), "the step")
    tab.send(type="abort", id=hanging.number)
    assert tab.finish(hanging).outcome | {"message": ""} == {  # type: ignore[operator]
        "type": "error", "id": 1, "reason": "aborted", "message": "",
    }  # fmt: skip
    eventually(lambda: (step, "aborted") in steps(arena), "the abort at the site")


@pytest.mark.parametrize("step", ["place", "address"])
def test_a_refusal_of_the_site_is_passed_on(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge, step: str
) -> None:
    tab = offer(page, arena, bridge, status={step: 429}, headers={"retry-after": "7"})
    refused = tab.finish(tab.upload(SMALL))
    headers = {"content-type": "application/json", "retry-after": "7"}
    assert refused.head == {"type": "response", "id": 1, "status": 429, "headers": headers}
    assert json.loads(refused.body) == {"error": "not now"}
    assert refused.outcome == {"type": "end", "id": 1}
    challenge = {"cf-mitigated": "challenge"}
    arena.switch(uploads={"offered": True, "status": {step: 403}, "headers": challenge})
    checked = tab.finish(tab.upload(SMALL))
    assert checked.head
    assert checked.head["headers"]["cf-mitigated"] == "challenge"
    wait_status(page, "check_due")


def test_the_site_s_words_and_the_storage_s_refusal_are_told(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    tab = offer(page, arena, bridge, words="Too many pixels")
    assert tab.finish(tab.upload(SMALL)).outcome == {
        "type": "error", "id": 1, "reason": "refused", "message": "Too many pixels",
    }  # fmt: skip
    arena.switch(uploads={"offered": True, "status": {"put": 403}})
    outcome = tab.finish(tab.upload(SMALL)).outcome
    assert outcome
    assert (outcome["reason"], outcome["message"]) == ("network", "the site's storage answered 403")


PLACES = {
    "plain http": "http://storage.example/x",
    "a script": "javascript:alert(1)",
    "no address": "storage",
    "data": "data:image/png;base64,AAAA",
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_put_where_it_could_be_read_on_the_way(
    uploads: Connection, page: Page, arena: ArenaProcess, place: str
) -> None:
    arena.switch(uploads={"offered": True, "place": PLACES[place]})
    seen = scripts_loaded(page, lambda: uploads.finish(uploads.upload(SMALL)))
    outcome = uploads.all("error")[0]
    assert (outcome["reason"], "https" in outcome["message"]) == ("refused", True)
    assert {path for path in seen if not path.startswith("/assets/")} == {"/"}


def test_what_is_no_upload_is_refused(uploads: Connection, arena: ArenaProcess) -> None:
    good = {"name": "a.png", "content_type": "image/png", "data": base64.b64encode(SMALL).decode()}
    wrongs: list[dict[str, Any]] = [
        *({"name": 1}, {"data": None}, {"data": "%%%"}, {"content_type": "text/html"}, {"content_type": None})
    ]
    for number, wrong in enumerate(wrongs):
        uploads.send(type="upload", id=number, **{**good, **wrong})
        assert uploads.first("error", id=number)["reason"] == "refused", wrong
    assert steps(arena) == []


def test_the_page_s_own_upload_is_left_as_it_is(uploads: Connection, page: Page, arena: ArenaProcess) -> None:
    assert upload_by_hand(page, LARGE).startswith(f"{SITE}/storage/")
    [put] = [seen for seen in arena.uploads() if seen["step"] == "put"]
    assert put["digest"] == hashlib.sha256(LARGE).hexdigest()
    # Headers that can be read once only are not read.
    got = page.evaluate(
        """async () => {
            function* headers() { yield ['next-action', 'ab'.repeat(21)]; yield ['x-more', '1']; }
            const request = fetch('/', {method: 'POST', headers: headers(), body: '["a","b"]'});
            return (await request).status;
        }"""
    )
    assert got == 404


# ==== Captures ==============================================================================================


def test_conversations_by_hand_are_captured(page: Page, tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(chunk_bytes=1)
    account = hash_of(user_id(page))
    page.select_option("#model", CHAT_MODEL)
    assert chat(page, MIXED_TEXT)["answer"].endswith(MIXED_TEXT)
    first = tab.first("captured")
    created = arena.record()[0]["body"]
    assert first == {
        "type": "captured", "session_id": created["id"], "message_id": created["modelAMessageId"],
        "model_id": CHAT_MODEL, "mode": "direct", "account": account,
    }  # fmt: skip
    retry_by_hand(page)
    eventually(lambda: len(tab.all("captured")) == 2, "the retry's capture")
    assert tab.all("captured")[1] == first
    chat(page, "more")
    eventually(lambda: len(tab.all("captured")) == 3, "the further message's capture")
    further = arena.record()[-1]["body"]
    assert tab.all("captured")[2] == first | {"message_id": further["modelAMessageId"]}
    assert first["message_id"] != further["modelAMessageId"]


def test_other_modes_are_captured_as_what_they_are(page: Page, tab: Connection, arena: ArenaProcess) -> None:
    for mode in ("side-by-side", "battle"):
        page.click("#new-chat")
        page.select_option("#mode", mode)
        before = len(tab.all("captured"))
        assert chat(page, "Hi")["status"] == "done"
        chat(page, "more")
        eventually(lambda: len(tab.all("captured")) == before + 4, f"captures in {mode}")  # noqa: B023
        captured = tab.all("captured")[before:]
        assert [(m["mode"], m["position"]) for m in captured] == [(mode, "a"), (mode, "b")] * 2
        bodies = [seen["body"] for seen in arena.record()[-2:] for _ in "ab"]
        names = ["modelAMessageId", "modelBMessageId"] * 2
        assert [m["message_id"] for m in captured] == [
            body[name] for body, name in zip(bodies, names, strict=True)
        ]
    # Loaded anew, the script has forgotten the mode: the answer of two models shows that it is not direct.
    page.click("#new-chat")
    page.select_option("#mode", "side-by-side")
    chat(page, "Hi")
    page.reload()
    wait_status(page, "ready")
    page.wait_for_selector("#retry:not([disabled])")
    chat(page, "more")
    again = tab.bridge.connected()
    assert again.first("captured")["mode"] == "side-by-side"


@pytest.mark.parametrize(
    "trouble",
    [
        {"a3": "boom", "a3_after_lines": 1},
        {"cut_after_lines": 1},
        {"finish_reason": "error"},
        {"failures": {"*": {"status": 500}}},
    ],
    ids=lambda trouble: next(iter(trouble)),
)
def test_an_answer_that_fails_is_not_captured(
    page: Page, tab: Connection, arena: ArenaProcess, trouble: dict[str, Any]
) -> None:
    arena.switch(**trouble)
    chat(page, "Hi")
    arena.reset()
    page.click("#new-chat")
    chat(page, "Hi")
    tab.first("captured")
    assert [m["session_id"] for m in tab.all("captured")] == [arena.record()[0]["session_id"]]


def test_what_the_program_itself_opens_is_not_captured(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    page.click("#new-chat")
    chat(page, "by hand")
    assert tab.first("captured")["session_id"] == arena.record()[-1]["session_id"]
    assert len(tab.all("captured")) == 1


CALLS = {
    "string": "fetch(path, {method: 'POST', body, headers})",
    "url": "fetch(new URL('/api/stream/create-evaluation', location), {method: 'post', headers, body})",
    "request": "fetch(new Request(path, {method: 'POST', body, headers}))",
    "request, init": "fetch(new Request(path, {method: 'PUT', body: 'x', headers}), {method: 'POST', body})",
    "bytes": "fetch(path, {method: 'POST', body: new TextEncoder().encode(body), headers})",
    "blob": "window.fetch(path, {method: 'POST', body: new Blob([body]), headers})",
}
GIVEN = f"const path = '{CREATE_PATH}', headers = {{'Content-Type': 'text/plain;charset=UTF-8'}};"


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_fetch_is_captured(page: Page, tab: Connection, call: str) -> None:
    body = create_body(CHAT_MODEL, MIXED_TEXT)
    script = f"async body => {{ {GIVEN} return await (await {CALLS[call]}).text(); }}"
    assert "ad:" in page.evaluate(script, json.dumps(body))
    captured = tab.first("captured")
    assert (captured["session_id"], captured["message_id"]) == (body["id"], body["modelAMessageId"])


def answering(body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(body=body)


def test_modes_are_told_by_shape_when_nothing_names_them(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    session, message, user = new_ids()
    ending = 'ad:{"finishReason":"stop"}\n'
    system = {"role": "system", "participantPosition": "b", "content": ""}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"modelId": "m", "messages": [system]}, ending, "direct"),
        ({"modelId": "m", "messages": [system | {"role": "assistant"}]}, ending, "side-by-side"),
        ({"modelBMessageId": user}, ending, "side-by-side"),
        ({"messages": []}, 'b0:"x"\n' + ending, "side-by-side"),
        ({"modelId": "m"}, 'b0:"x"\n' + "b" + ending[1:], "side-by-side"),
        ({}, 'a0:"b0:"\n' + ending.rstrip(), "direct"),
    ]
    for count, (body, answer, mode) in enumerate(cases):
        path = f"/nextjs-api/stream/retry-evaluation-session-message/{session}/messages/{message}"
        page.route("**" + path, answering(answer))
        page.evaluate(
            "([path, body]) => fetch(path, {method: 'PUT', body}).then(r => r.text())",
            [path, json.dumps(body)],
        )
        eventually(lambda: len(tab.all("captured")) == count + 1, f"capture {count}")  # noqa: B023
        page.unroute("**" + path)
        assert tab.all("captured")[-1]["mode"] == mode, body
        side = None if mode == "direct" else "b" if answer.startswith("b0") and "ad:" not in answer else "a"
        assert tab.all("captured")[-1].get("position") == side
        assert tab.all("captured")[-1]["model_id"] == body.get("modelId")
        assert tab.all("captured")[-1]["message_id"] == message


def test_captures_wait_for_the_program(
    page: Page, tab: Connection, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    bridge.stop()
    for _ in range(2):
        page.click("#new-chat")
        chat(page, "Hi")
    before = len(bridge.connections)
    bridge.start()
    later = bridge.connection(before)
    eventually(lambda: len(later.all("captured")) == 2, "both captures")
    assert [m["session_id"] for m in later.all("captured")] == [s["session_id"] for s in arena.record()]


def test_the_page_sees_the_fetch_it_knows(page: Page, tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(chunk_bytes=5)
    body = json.dumps(create_body(CHAT_MODEL, MIXED_TEXT))
    told = page.evaluate(
        """async body => {
          const frame = document.body.appendChild(document.createElement("iframe"));
          const native = frame.contentWindow.fetch;
          const path = "/nextjs-api/stream/create-evaluation";
          const looks = (f, owner) => {
            const { writable, enumerable, configurable } = Object.getOwnPropertyDescriptor(owner, "fetch");
            return JSON.stringify([f.name, f.length, String(f), f.toString(), typeof f, Object.keys(f),
              Object.getOwnPropertyNames(f), "prototype" in f, writable, enumerable, configurable]);
          };
          const fails = async (f, ...args) => {
            try { await f(...args); return "no error"; } catch (error) {
              return `${error.name}: ${error.message.replace(/'Window'/g, "")}`;
            }
          };
          const aborted = () => ({ method: "POST", body: "{}", signal: AbortSignal.abort() });
          const bad = [[], ["https://["], [path, { method: "GET", body: "x" }],
                       [path, { method: "BAD METHOD" }], [path, aborted()], ["data:nonsense"],
                       [{ toString() { throw new RangeError("mine"); } }]];
          const failures = [], expected = [];
          for (const args of bad) {
            failures.push(await fails(fetch, ...args));
            expected.push(await fails(native, ...args));
          }
          const used = new Request(path, { method: "POST", body: "{}" });
          await used.text();
          failures.push(await fails(fetch, used));
          failures.push(await fails((...a) => Reflect.apply(fetch, {}, a), path));
          expected.push(await fails(native, used), await fails((...a) => Reflect.apply(native, {}, a), path));
          const headers = { "Content-Type": "text/plain;charset=UTF-8" };
          const promise = fetch(path, { method: "POST", body, headers });
          const response = await promise;
          const [copy, decoder] = [response.clone(), new TextDecoder()];
          const reader = response.body.getReader();
          let text = "";
          for (let part; !(part = await reader.read()).done; ) {
            text += decoder.decode(part.value, { stream: true });
          }
          const leaked = Object.keys(window).filter(key => /proxy/i.test(key));
          return { seen: looks(fetch, window), known: looks(native, frame.contentWindow),
                   failures, expected, isPromise: Object.getPrototypeOf(promise) === Promise.prototype,
                   isResponse: Object.getPrototypeOf(response) === Response.prototype, url: response.url,
                   whole: text === await copy.text(), text, leaked };
        }""",
        body,
    )
    assert told["seen"] == told["known"]
    assert told["failures"] == told["expected"]
    assert told["isPromise"]
    assert told["isResponse"]
    assert told["whole"]
    assert told["leaked"] == []
    assert told["url"] == SITE + CREATE_PATH
    assert told["text"].startswith("af:")
    tab.first("captured")


def test_the_page_reads_an_answer_while_it_runs_and_can_stop_it(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    arena.switch(hang_after_lines=1)
    stopped = page.evaluate(
        """async body => {
          const controller = new AbortController();
          const headers = { "Content-Type": "text/plain;charset=UTF-8" };
          const call = { method: "POST", body, headers, signal: controller.signal };
          const reader = (await fetch("/nextjs-api/stream/create-evaluation", call)).body.getReader();
          const first = await reader.read();
          controller.abort();
          return [first.value.length, await reader.read().catch(error => error.name)];
        }""",
        json.dumps(create_body(CHAT_MODEL)),
    )
    assert stopped[0] > 0
    assert stopped[1] == "AbortError"
    eventually(lambda: arena.stats()["aborted"] == 1, "the abort at the site")
    assert tab.all("captured") == []


SPY = """secret => {
  const { apply, ownKeys, getOwnPropertyDescriptor, defineProperty, getPrototypeOf } = Reflect;
  const [decoder, decode] = [new TextDecoder(), TextDecoder.prototype.decode];
  const includes = String.prototype.includes;
  const [isView, Buffer, treasures] = [ArrayBuffer.isView, ArrayBuffer, [WebSocket, MessageEvent, Response]];
  const told = text => apply(includes, text, [secret]);
  const carries = (value, depth) => {
    if (typeof value === "string") return told(value);
    if (typeof value !== "object" || value === null) return false;
    for (let at = 0; at < 3; at += 1) if (value instanceof treasures[at]) return true;
    if (isView(value) || value instanceof Buffer) return told(apply(decode, decoder, [value]));
    const keys = depth > 0 ? ownKeys(value) : [];
    for (let at = 0; at < keys.length; at += 1) {
      if (carries(getOwnPropertyDescriptor(value, keys[at])?.value, depth - 1)) return true;
    }
    return false;
  };
  const leaks = window.leaks = [];
  let isLooking = false;
  const look = (name, ...seen) => {
    if (isLooking) return;
    isLooking = true;
    if (carries(seen, 5)) leaks[leaks.length] = name;
    isLooking = false;
  };
  const spying = (name, native) => function (...args) {
    const result = new.target ? Reflect.construct(native, args, new.target) : apply(native, this, args);
    look(name, this, args, result);
    return result;
  };
  const wrap = (label, owner) => {
    for (const key of ownKeys(owner)) {
      const found = getOwnPropertyDescriptor(owner, key);
      const name = `${label}.${String(key)}`;
      if (!found.configurable || /constructor|prototype|hasInstance/.test(name)) continue;
      for (const part of ["value", "get", "set"]) {
        const isPlain = part !== "value" || !/^[A-Z]/.test(String(key));
        if (typeof found[part] === "function" && isPlain) found[part] = spying(name, found[part]);
      }
      defineProperty(owner, key, found);
    }
  };
  const names = `Object Array Map Set Promise String Number RegExp JSON Math Reflect Function Symbol
    Uint8Array ArrayBuffer DataView WebSocket Response Request Headers URL AbortController AbortSignal
    EventTarget Event MessageEvent CloseEvent ReadableStream ReadableStreamDefaultReader TextDecoder
    TextEncoder MessagePort Performance SubtleCrypto Blob Error`.split(/\\s+/);
  const owners = names.flatMap(name => [[name, window[name]], [`${name}#`, window[name].prototype]]);
  owners.push(["TypedArray#", getPrototypeOf(Uint8Array.prototype)]);
  owners.push(["Iterator#", getPrototypeOf([].values())]);
  for (const name of ["fetch", "setTimeout", "queueMicrotask", "structuredClone"]) {
    window[name] = spying(name, window[name]);
  }
  for (const name of ["toJSON", "keepalive", "integrity", "mode"]) {
    const get = function () { look(`inherited ${name}`, this); };
    defineProperty(Object.prototype, name, { get, set() {}, configurable: true });
  }
  for (const [label, owner] of owners) if (owner) wrap(label, owner);
}"""


def test_a_page_that_wraps_everything_reads_nothing(page: Page, tab: Connection, arena: ArenaProcess) -> None:
    """Whatever of its globals a page replaces after the script has begun: no frame and no answer passes it.

    What would see them is `Object.prototype.then`, with which no page works.
    """
    secret = "what only the program knows"
    answer = f"a0:{json.dumps(secret)}\n" * 5 + ANSWER_ALL_KINDS
    arena.switch(raw={"*": answer})
    page.evaluate(SPY, secret)
    exchange = tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL, secret)))
    assert exchange.outcome == {"type": "end", "id": 1}
    assert exchange.head
    assert exchange.head["headers"]["content-type"].startswith("text/plain")
    assert bytes(exchange.body) == answer.encode()
    tab.send(type="ping", t=1)
    tab.first("pong")
    assert page.evaluate("leaks.splice(0)") == []
    page.evaluate("secret => void JSON.parse(JSON.stringify([secret]))", secret)
    assert page.evaluate("leaks.length") > 0  # the spies are at work


# Chromium's worlds are apart from the page as well, though not as Firefox's are: there the page's `fetch`
# cannot be replaced, and the page's own names are below `wrappedJSObject`. Both are brought about by hand.
APART = """
Object.defineProperty(window, "fetch", { value: window.fetch, writable: false });
window.wrappedJSObject = {};
addEventListener("a check appears", () => { window.wrappedJSObject._cf_chl_opt = {}; });
"""


def test_a_script_that_is_kept_apart_from_the_page_relays_all_the_same(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    context = browser.browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda line: said.append(line.text))
    source = APART + script_for(bridge)
    session = context.new_cdp_session(page)
    session.send("Page.enable")  # without it, no script is evaluated
    session.send("Page.addScriptToEvaluateOnNewDocument", {"source": source, "worldName": "apart"})
    page.goto(SITE)
    bridge.connection().wait_state("sign_in")
    page.click("#accept-terms")
    tab = bridge.connection(1)
    tab.wait_state("ready")
    wait_status(page, "ready")
    assert chat(page, "by hand")["status"].startswith("done")
    assert tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))).outcome == {"type": "end", "id": 1}
    assert tab.all("captured") == []
    assert len([line for line in said if "not noticed" in line]) == 2  # once a page
    page.evaluate("dispatchEvent(new Event('a check appears'))")
    tab.wait_state("verification")
    context.close()


# ==== Model list ============================================================================================


@pytest.mark.parametrize("unescaped", [False, True])
def test_the_page_s_models_are_sent_in_both_forms(
    page: Page, arena: ArenaProcess, bridge: ScriptedBridge, unescaped: bool
) -> None:
    arena.switch(unescaped_models=unescaped)
    sign_in(page)
    connection = eventually(lambda: next((c for c in bridge.connections if c.all("models")), None), "models")
    assert connection.all("models")[0]["models"] == MODELS
    connection.send(type="send_models")
    eventually(lambda: len(connection.all("models")) == 2, "the list again")
    assert connection.all("models")[1]["models"] == MODELS


def test_a_list_cut_over_several_scripts_is_put_together(page: Page, bridge: ScriptedBridge) -> None:
    listed = [
        {"id": "1", "publicName": 'a"]}[\\ 模型'},
        {"id": 2, "publicName": "no"},
        None,
        {"id": "3", "publicName": "é"},
    ]
    row = f'7:["$",{{"initialModels":{json.dumps(listed, ensure_ascii=False)},"initialModelAId":"1"}}]\n'
    pushes = [f"self.__next_f.push([1,{json.dumps(piece)}])" for piece in (row[:50], row[50:77], row[77:])]
    html = "".join(
        f"<script>{push}</script>" for push in ["self.__next_f = []", "'initialModels:[broken'", *pushes]
    )
    # Playwright's own answer comes from no address: to Chromium that is a public one.
    page.context.grant_permissions(["local-network-access"], origin=SITE)
    page.route(
        SITE + "/", lambda route: route.fulfill(body=f"<!doctype html><body>{html}", content_type="text/html")
    )
    page.goto(SITE)
    assert bridge.connection().first("models")["models"] == [listed[0], listed[3]]


def test_a_page_without_models_says_so_only_when_asked(page: Page, bridge: ScriptedBridge) -> None:
    page.goto(SITE)
    wait_status(page, "sign_in")
    assert bridge.connection().all("models") == []
    bridge.connection().send(type="send_models")
    assert bridge.connection().first("models")["models"] == []


# ==== Connection and tabs ===================================================================================


def test_one_tab_leads_and_the_next_takes_over(profile: BrowserContext, page: Page, tab: Connection) -> None:
    second = profile.new_page()
    second.goto(SITE)
    wait_status(second, "standing_by")
    chat(second, "in the second tab")
    captured = tab.first("captured")
    assert captured["session_id"] in second.url
    before = len(tab.bridge.connections)
    page.close()
    successor = tab.bridge.connection(before)
    successor.wait_state("ready")
    wait_status(second, "ready")
    second.click("#new-chat")
    chat(second, "again")
    successor.first("captured")
    assert len(successor.all("captured")) == 1


def test_captures_of_a_tab_that_stands_by_wait_for_the_leader(
    profile: BrowserContext, page: Page, tab: Connection, bridge: ScriptedBridge
) -> None:
    second = profile.new_page()
    second.goto(SITE)
    wait_status(second, "standing_by")
    bridge.stop()
    chat(second, "nobody listens")
    before = len(bridge.connections)
    bridge.start()
    assert bridge.connection(before).first("captured")["session_id"] in second.url
    assert len(bridge.connection(before).all("captured")) == 1


@pytest.mark.parametrize("check_csp", [False, True], ids=["", "the check forbids the connection"])
def test_the_tab_in_which_the_check_was_passed_leads(
    profile: BrowserContext, page: Page, tab: Connection, arena: ArenaProcess, check_csp: bool
) -> None:
    arena.switch(check=True, check_csp=check_csp)
    arena.control("POST", "challenge", {})
    page.reload()
    wait_status(page, "verification")
    second = profile.new_page()
    second.goto(SITE)
    wait_status(second, "verification")  # also there, although this tab stands by
    second.click("#pass-check")
    second.wait_for_selector("#message")
    wait_status(second, "ready")
    eventually(lambda: tab.bridge.connected().state()["state"] == "ready", "the tab that is ready")
    assert status_of(page) == "verification"
    page.reload()
    wait_status(page, "standing_by")


HEAR_OFFERS = """() => {
    window.between = new BroadcastChannel("lmarena_proxy bridge");
    window.heard = [];
    between.onmessage = ({ data }) => { heard.push(data.type) };
}"""


def offers(page: Page) -> int:
    return int(page.evaluate("heard.filter((type) => type === 'able').length"))


def test_a_leader_that_is_ready_keeps_the_lead(profile: BrowserContext, page: Page, tab: Connection) -> None:
    page.evaluate(HEAR_OFFERS)  # made after the script's own channel, so it hears later than that
    second = profile.new_page()
    second.goto(SITE)
    eventually(lambda: offers(page) > 1, "offers of the tab that waits")
    tab.send(type="ping", t=1)
    tab.first("pong")
    assert status_of(page) == "ready"
    assert status_of(second) == "standing_by"


def test_a_leader_gives_way_only_when_nothing_runs(
    profile: BrowserContext, page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    arena.switch(hang_after_lines=2, trouble_times=1)
    running = tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))
    eventually(lambda: running.body, "the first bytes")
    page.evaluate(HEAR_OFFERS)
    page.evaluate("document.title = 'Just a moment...'")
    tab.wait_state("verification")
    second = profile.new_page()
    second.goto(SITE)
    eventually(lambda: offers(page) > 1, "offers of the tab that waits")
    tab.send(type="ping", t=1)
    tab.first("pong")
    assert running.outcome is None
    tab.send(type="abort", id=running.number)
    assert tab.finish(running).outcome["reason"] == "aborted"  # type: ignore[index]
    wait_status(second, "ready")
    assert tab.bridge.connected() is not tab
    wait_status(page, "verification")


def test_tabs_whose_pages_forbid_the_connection_do_not_pass_the_lead_round(
    profile: BrowserContext, page: Page, arena: ArenaProcess
) -> None:
    arena.switch(page_csp=True)
    sign_in(page)
    wait_status(page, "policy_forbids")
    page.evaluate(HEAR_OFFERS)
    second = profile.new_page()
    second.goto(SITE)
    wait_status(second, "policy_forbids")  # it had its turn
    wait_status(page, "standing_by")
    second.evaluate(HEAR_OFFERS)
    for title, status in (("Just a moment...", "verification"), ("Arena", "standing_by")):
        page.evaluate("title => { document.title = title }", title)
        wait_status(page, status)  # it has looked at its page, and would have offered by now
    page.evaluate("between.postMessage({ type: 'last' })")
    eventually(lambda: second.evaluate("heard.includes('last')"), "the word of the first tab")
    assert offers(second) == 0
    assert status_of(second) == "policy_forbids"


def test_the_script_comes_back_when_the_program_does(
    page: Page, tab: Connection, bridge: ScriptedBridge
) -> None:
    bridge.stop()
    wait_status(page, "not_running")
    before = len(bridge.connections)
    bridge.start()
    again = bridge.connection(before)
    wait_status(page, "ready")
    assert again.first("hello")["state"] == "ready"
    assert again.finish(again.fetch(CREATE_PATH, create_body(CHAT_MODEL))).outcome == {"type": "end", "id": 1}


def test_a_program_that_is_not_heard_any_more_is_called_again(
    page: Page, tab: Connection, bridge: ScriptedBridge, arena: ArenaProcess
) -> None:
    """A path that carries nothing any more closes nothing: the missing pings tell."""
    arena.switch(hang_after_lines=1)
    tab.fetch(CREATE_PATH, create_body(CHAT_MODEL))
    eventually(lambda: arena.stats()["running"] == 1, "a running call")
    before = len(bridge.connections)
    tab.send(type="ping", t=100.0)
    tab.send(type="ping", t=100.5)
    assert bridge.connection(before).wait_state("ready")
    eventually(lambda: arena.stats()["aborted"] == 1, "the abort at the site")
    wait_status(page, "ready")
    page.wait_for_timeout(3500)
    assert len(bridge.connections) == before + 1  # its pace is not known yet


def test_another_protocol_stops_the_script(page: Page, bridge: ScriptedBridge) -> None:
    bridge.close_code = 4001
    page.goto(SITE)
    wait_status(page, "reinstall")
    bridge.close_code = None
    page.wait_for_timeout(3000)  # longer than the first pause between tries
    assert len(bridge.connections) == 1
    assert status_of(page) == "reinstall"


def test_a_stopped_tab_lets_another_lead(profile: BrowserContext, page: Page, bridge: ScriptedBridge) -> None:
    bridge.close_code = 4001
    page.goto(SITE)
    wait_status(page, "reinstall")
    bridge.close_code = None
    second = profile.new_page()
    second.goto(SITE)
    wait_status(second, "sign_in")


def test_a_page_from_the_back_button_connects_again(
    page: Page, tab: Connection, bridge: ScriptedBridge
) -> None:
    page.goto("about:blank")
    eventually(lambda: tab.closed, "the end of the connection")
    before = len(bridge.connections)
    page.go_back()
    bridge.connection(before).wait_state("ready")
    wait_status(page, "ready")


def test_a_frame_inside_the_page_does_not_connect(
    page: Page, tab: Connection, bridge: ScriptedBridge
) -> None:
    before = len(bridge.connections)
    page.evaluate(
        """url => new Promise(loaded => {
          const frame = document.createElement("iframe");
          frame.src = url; frame.onload = loaded; document.body.append(frame);
        })""",
        SITE + "/",
    )
    tab.send(type="ping", t=1)
    tab.first("pong")
    assert len(bridge.connections) == before
    assert len(page.frames) == 2
    assert page.frames[1].evaluate(f"document.querySelector('{BADGE}')") is None


def test_a_policy_of_the_page_is_named(page: Page, arena: ArenaProcess) -> None:
    arena.switch(page_csp=True)
    sign_in(page)
    wait_status(page, "policy_forbids")


def test_at_a_check_that_forbids_the_connection_the_check_is_what_is_due(
    page: Page, arena: ArenaProcess
) -> None:
    arena.switch(check=True, check_csp=True)
    page.goto(SITE)
    wait_status(page, "verification")
    page.click("#pass-check")
    wait_status(page, "sign_in")


def test_a_browser_that_blocks_the_local_network_is_named(
    playwright: Playwright, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    flag = f"--ip-address-space-overrides=127.0.0.1:{arena.port}=public"
    # Another browser, as flags hold for a whole one.
    public = UserscriptBrowser(playwright, arena, flag, path=CHROMIUM)
    try:
        with public.profile(bridge) as profile:
            page = profile.new_page()
            sign_in(page)
            wait_status(page, "permission_denied")
            assert "“Apps on device”" in said(page)
            profile.grant_permissions(["local-network-access"], origin=SITE)
            wait_status(page, "ready")
            assert bridge.connection().first("hello")["state"] == "ready"
    finally:
        public.browser.close()


def test_a_question_of_the_browser_is_named_until_it_is_answered(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    """No browser without a window asks, so the program keeps the call waiting, as the question would."""
    bridge.stop()
    with browser.profile(bridge) as profile:
        page = profile.new_page()
        with socket.create_server(("127.0.0.1", bridge.port)):
            sign_in(page)
            wait_status(page, "permission_prompt")
            assert "please allow it" in said(page)
        bridge.start()
        wait_status(page, "ready")


def knowing(name: str, state: str) -> str:
    """A browser that knows this one name for the permission."""
    return f"""navigator.permissions.query = async ({{ name }}) => {{
      if (name !== "{name}") throw new TypeError(name);
      return {{ state: "{state}" }};
    }};"""


@pytest.mark.parametrize(
    ("before", "status", "words"),
    [
        (knowing("loopback-network", "denied"), "permission_denied", "“Apps on device”"),
        (knowing("local-network", "denied"), "permission_denied", "“Apps on device”"),
        (knowing("local-network-access", "denied"), "permission_denied", "“Local network access”"),
        (knowing("loopback-network", "prompt"), "not_running", "is not running"),  # refused: it never asked
        (knowing("loopback-network", "granted"), "not_running", "is not running"),
        (knowing("another", "denied"), "not_running", "is not running"),
    ],
    ids=["loopback", "local", "old-name", "prompt", "granted", "no-name"],
)
def test_the_permission_is_known_by_any_of_its_names(
    browser: UserscriptBrowser,
    arena: ArenaProcess,
    bridge: ScriptedBridge,
    before: str,
    status: str,
    words: str,
) -> None:
    bridge.stop()
    with browser.profile(bridge, before) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, status)
        assert words in said(page)


def test_a_change_of_the_permission_is_watched_once(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    counting = """window.watchers = window.asked = 0;
        navigator.permissions.query = async () => {
          window.asked += 1;
          return { state: "granted", set onchange(_) { window.watchers += 1; } };
        };"""
    bridge.stop()
    with browser.profile(bridge, counting) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "not_running")
        eventually(lambda: page.evaluate("dispatchEvent(new Event('online')) && asked > 2"), "further tries")
        wait_status(page, "not_running")
        assert page.evaluate("watchers") == 1


def test_the_badge_has_the_words_of_firefox(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    bridge.stop()
    firefox = "delete Navigator.prototype.userAgentData;" + knowing("loopback-network", "denied")
    with browser.profile(bridge, firefox) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "permission_denied")
        assert "“Access this device”" in said(page)


def test_the_badge_has_a_word_on_brave_s_shields(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    bridge.stop()
    with browser.profile(bridge, "navigator.brave = {};") as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "not_running")
        assert "Shields" in said(page)


def test_a_browser_that_refuses_the_connection_without_closing_it_is_named(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    """As WebKit does with `ws://` on an https page: there is an error, and then nothing."""
    bridge.stop()
    webkit = """const listen = EventTarget.prototype.addEventListener;
      EventTarget.prototype.addEventListener = function (type, ...rest) {
        if (!(this instanceof WebSocket && type === "close")) listen.call(this, type, ...rest);
      };"""
    with browser.profile(bridge, webkit) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "policy_forbids")


# ==== Badge =================================================================================================


def test_the_badge_survives_a_page_that_renders_itself_anew(page: Page, tab: Connection) -> None:
    page.evaluate(f"document.querySelector('{BADGE}').remove()")
    wait_status(page, "ready")
    page.evaluate("document.documentElement.replaceChildren(document.createElement('body'))")
    wait_status(page, "ready")
    assert page.locator(BADGE).count() == 1


def test_the_badge_is_closed_and_stays_collapsed(page: Page, tab: Connection) -> None:
    assert page.evaluate(f"document.querySelector('{BADGE}').shadowRoot") is None
    host = page.locator(BADGE)
    open_box = host.bounding_box()
    assert open_box
    assert open_box["x"] < 20
    page.mouse.click(open_box["x"] + 15, open_box["y"] + 15)
    collapsed = host.bounding_box()
    assert collapsed
    assert collapsed["width"] < 40 < open_box["width"]
    page.reload()
    wait_status(page, "ready")
    again = host.bounding_box()
    assert again
    assert again["width"] == collapsed["width"]
    page.mouse.click(again["x"] + 15, again["y"] + 15)
    assert host.bounding_box() == open_box


def inside(page: Page) -> list[dict[str, Any]]:
    """The badge's elements and texts, which the page itself cannot read."""

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in [*node.get("shadowRoots", []), *node.get("children", [])]:
            yield from nodes(child)

    session = page.context.new_cdp_session(page)
    document = session.send("DOM.getDocument", {"depth": -1, "pierce": True})["root"]
    session.detach()
    host = next(node for node in nodes(document) if node["localName"] == BADGE)
    return [*nodes(host)]


def said(page: Page) -> str:
    return "|".join(node["nodeValue"] for node in inside(page) if node["nodeName"] == "#text")


def attributes(page: Page, element: str) -> dict[str, str]:
    pairs = next(node["attributes"] for node in inside(page) if node["localName"] == element)
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def width(page: Page) -> float:
    box = page.locator(BADGE).bounding_box()
    assert box
    return box["width"]


def corner(page: Page) -> str | None:
    return page.get_attribute(BADGE, "data-corner")


def test_the_badge_counts_what_runs(page: Page, tab: Connection, arena: ArenaProcess) -> None:
    arena.switch(hang_after_lines=1)
    running = [tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)) for _ in range(3)]
    eventually(lambda: said(page) == "lmarena_proxy: Connected.|3 running", "three running")
    for exchange in running:
        tab.send(type="abort", id=exchange.number)
    eventually(lambda: said(page) == "lmarena_proxy: Connected.", "none running")


def test_the_badge_is_folded_from_the_keyboard_and_named_for_screen_readers(
    page: Page, tab: Connection
) -> None:
    page.evaluate("document.body.replaceChildren()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.localName") == BADGE
    assert attributes(page, "span") == {"role": "status", "aria-live": "polite"}
    assert attributes(page, "button")["aria-label"] == "lmarena_proxy"
    for key, expanded in (("Enter", "false"), ("Space", "true"), ("Space", "false")):
        page.keyboard.press(key)
        assert attributes(page, "button")["aria-expanded"] == expanded
        assert (width(page) > 40) == (expanded == "true")


def test_a_folded_badge_unfolds_when_the_person_is_needed(page: Page, tab: Connection) -> None:
    cookies = page.context.cookies(SITE)

    def press() -> None:
        box = page.locator(BADGE).bounding_box()
        assert box
        page.mouse.click(box["x"] + 15, box["y"] + 15)
        page.mouse.move(600, 300)

    press()
    eventually(lambda: width(page) < 40, "the dot")
    page.evaluate("cookieStore.delete('arena-auth-prod-v1')")
    wait_status(page, "sign_in")
    assert width(page) > 40
    press()  # the person has read it
    page.wait_for_timeout(1500)
    assert width(page) < 40
    page.context.add_cookies(cookies)  # type: ignore[arg-type]
    wait_status(page, "ready")
    assert width(page) < 40
    page.evaluate("cookieStore.delete('arena-auth-prod-v1')")
    wait_status(page, "sign_in")
    assert width(page) > 40


def test_the_badge_keeps_clear_of_the_site_s_controls(page: Page, tab: Connection) -> None:
    def cover(name: str, style: str) -> None:
        page.evaluate(
            """([name, style]) => {
              const control = document.createElement(name);
              control.style = `position: fixed; ${style}`;
              document.body.append(control);
            }""",
            [name, style],
        )

    page.mouse.move(600, 300)
    assert corner(page) == "bottom left"
    cover("div", "left: 0; bottom: 0; width: 100px; height: 100px")  # not a control
    page.set_viewport_size({"width": 1200, "height": 700})
    assert corner(page) == "bottom left"
    cover("button", "left: 20px; bottom: 20px; width: 30px; height: 20px")
    eventually(lambda: corner(page) == "bottom right", "the next corner")
    cover("textarea", "left: 0; right: 0; bottom: 0; height: 60px")
    eventually(lambda: corner(page) == "top right", "the next corner")
    assert width(page) > 40
    cover("select", "left: 60px; right: 60px; top: 0; height: 60px")
    eventually(lambda: width(page) < 40, "the dot")
    assert (corner(page) or "").startswith("top")
    page.set_viewport_size({"width": 300, "height": 700})
    page.evaluate("document.querySelectorAll('body > [style]').forEach(each => each.remove())")
    eventually(lambda: width(page) > 40, "the whole badge")


def test_the_badge_says_what_the_site_s_answers_say_is_due(
    page: Page, tab: Connection, arena: ArenaProcess
) -> None:
    arena.control("POST", "expire")
    tab.finish(tab.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    wait_status(page, "sign_in_stale")
    assert "reload this page" in said(page)
    page.reload()
    wait_status(page, "ready")
    again = tab.bridge.connected()
    again.wait_state("ready")
    arena.control("POST", "challenge")
    again.finish(again.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    wait_status(page, "check_due")
    assert "human check" in said(page)
    arena.switch(check=False)
    again.finish(again.fetch(CREATE_PATH, create_body(CHAT_MODEL)))
    wait_status(page, "ready")


def test_a_page_that_signing_in_loads_anew_is_not_called_ready_before_that(
    page: Page, bridge: ScriptedBridge
) -> None:
    page.goto(SITE)
    before = bridge.connected()
    before.wait_state("sign_in")
    page.click("#accept-terms")
    page.wait_for_selector("#message")
    wait_status(page, "ready")
    said_before = [message["state"] for message in before.messages if message["type"] in ("hello", "state")]
    assert "ready" not in said_before


def test_the_badge_says_when_the_program_has_another_version_of_the_script(
    browser: UserscriptBrowser, bridge: ScriptedBridge
) -> None:
    bridge.welcome["version"] = "99.0.0"
    with browser.profile(bridge) as profile:
        page = profile.new_page()
        sign_in(page)
        wait_status(page, "outdated")
        assert "Please update this script" in said(page)
        assert "/bridge.user.js" in said(page)


MARKUP = "<img src=x onerror=window.broken=1>"


def test_the_badge_takes_no_markup(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge
) -> None:
    class Marked(ScriptedBridge):
        @property
        def url(self) -> str:
            return f"ws://127.0.0.1:{self.port}/{MARKUP}"

    marked = Marked(bridge.port)
    with browser.profile(marked) as profile:
        page = profile.new_page()
        bridge.welcome |= {"version": MARKUP, "auth_cookie": MARKUP, "detail": MARKUP}
        sign_in(page)
        connection = bridge.connected()
        assert MARKUP in connection.wait_state("sign_in")["detail"]
        connection.send(type="welcome", version=MARKUP, detail=MARKUP, auth_cookie=MARKUP)
        connection.send(type="state", state=MARKUP, detail=MARKUP)
        bridge.stop()
        wait_status(page, "not_running")
        assert MARKUP in said(page)  # the address of the bridge, as text
        names = {node["localName"] for node in inside(page)}
        assert names == {"", BADGE, "div", "button", "i", "span", "b"}
        assert page.evaluate("window.broken") is None


@pytest.mark.parametrize("locale", ["zh-CN", "zh-TW", "en-US", "de-DE"])
def test_the_badge_speaks_chinese_or_english(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge, locale: str
) -> None:
    with browser.profile(bridge, locale=locale) as profile:
        page = profile.new_page()
        page.goto(SITE)
        wait_status(page, "sign_in")
        chinese = locale.startswith("zh")
        assert ("请登录" if chinese else "Please sign in") in said(page)


@pytest.mark.parametrize("pixels", [360, 1280])
def test_the_badge_fits_the_window(
    browser: UserscriptBrowser, arena: ArenaProcess, bridge: ScriptedBridge, pixels: int
) -> None:
    bridge.stop()
    with browser.profile(bridge, viewport={"width": pixels, "height": 700}, locale="zh-CN") as profile:
        page = profile.new_page()
        page.goto(SITE)
        wait_status(page, "not_running")
        box = page.locator(BADGE).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= pixels
        assert box["y"] + box["height"] <= 700
        assert page.evaluate(f"document.querySelector('{BADGE}').lang") == "zh-CN"


# ==== Where the line is =====================================================================================


def test_the_script_does_nothing_that_only_the_person_may_do() -> None:
    text = (ROOT / "bridge.user.js").read_text(encoding="utf-8")
    written = ["innerHTML", "document.cookie", "cookieStore.set", "eval(", "Function("]
    done = ["dispatchEvent", ".click(", "turnstile", "grecaptcha"]
    for forbidden in written + done:
        assert forbidden not in text, forbidden


def test_the_program_finds_the_lines_it_fills_in() -> None:
    lines = [line.strip() for line in (ROOT / "bridge.user.js").read_text(encoding="utf-8").splitlines()]
    for line in (
        'const BRIDGE_URL = "ws://127.0.0.1:9081/";',
        'const INSTALL_URL = "http://127.0.0.1:9080/bridge.user.js";',
        'const AUTH_COOKIE = "arena-auth-prod-v1";',
    ):
        assert lines.count(line) == 1
    assert "// @version      1.0.0" in lines
    assert 'const VERSION = "1.0.0";' in lines
