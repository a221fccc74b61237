"""The stand-in arena: a web site that keeps the arena contract, for `--demo`, the tests and a real browser.

It answers strictly: what the contract calls a refusal is refused, with a reason a person can read. `Switches`
make it slow, limited, broken or guarded on purpose; `record` and `stats` say what really arrived and how much
ran at once. Control paths under `/_arena/` offer the same to another process:

    GET   /_arena/record?since=N   every API call seen, from index N on
    GET   /_arena/stats            what ran at once, and how calls ended
    GET   /_arena/switches         the switches as they stand
    PATCH /_arena/switches         change some of them (JSON, strictly typed)
    GET   /_arena/uploads          every step of an upload seen, if there are uploads (`demo/uploads.py`)
    POST  /_arena/reset            forget conversations, record and switches; accounts stay
    POST  /_arena/sign_out         revoke every account for good: pages show the terms again
    POST  /_arena/expire           make every sign-in stale: calls get 401 until a page is loaded
    POST  /_arena/challenge        the check is due again for everyone

Run it alone with `python -m demo.arena --port 8080 [--tls] [--switches JSON] [--models FILE]`.
"""

import argparse
import json
import logging
import math
import re
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from urllib.parse import parse_qs

import hypercorn.config
import hypercorn.trio
import msgspec
import trio
from hypercorn.protocol.h2 import H2Protocol

from demo import contract
from demo.contract import AUTH_COOKIE, CHECK_TITLE, CLEARANCE_COOKIE, Call, Kind, Model, Refusal
from demo.uploads import Uploads, UploadSeen, UploadSwitches, answer_or_notice

PAGES = Path(__file__).parent / "pages"
MODELS_FILE = Path(__file__).parent.parent / "models.json"
API_PREFIXES = ("/nextjs-api/stream/", "/api/stream/")
MAX_BODY_BYTES = 64 * 2**20  # several attachments of 5 MB in base64, and room for history
SIGN_IN_SECONDS = 3600  # how long a new token says it lives; the stand-in only revokes by hand
RECORD_LIMIT = 20_000  # a demo may run for days: the older half is forgotten beyond this
H2_STREAMS = 900  # hypercorn's 100 would queue calls that the real site runs at once; its tree bears 1000

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = list[tuple[str, str]]


# ── What can be asked of it ─────────────────────────────────────────────────────────────────────────────────


class Failure(msgspec.Struct, forbid_unknown_fields=True):
    """An answer in place of the real one."""

    status: int = 500
    body: str = '{"error":"Internal Server Error"}'
    content_type: str = "application/json"
    on: Literal["create", "retry", "post", "any"] = "any"
    times: int | None = None  # after so many it is over; None: it stays
    headers: dict[str, str] = {}


SOURCES = (
    {"title": "Stand-in source", "url": "https://example.com/one"},
    {"title": "第二个来源", "url": "https://example.com/two?q=1&r=2"},
)


class Switches(msgspec.Struct, forbid_unknown_fields=True):
    """All that the stand-in can be told to do. `Arena.switch` changes them and starts their counters anew."""

    latency_seconds: float = 0.0  # between a good call and the head of its answer
    line_delay_seconds: float = 0.0  # before each line of the answer
    chunk_bytes: int = 0  # 0: a chunk per line; N: the body is cut every N bytes, inside characters too

    check: bool = False  # the check stands before pages and calls of browsers without clearance
    check_status: int = 403  # Cloudflare says 403, sometimes 503
    check_header: bool = True  # False: no `cf-mitigated`, only the HTML tells
    check_csp: bool = False  # the check's page forbids ws://127.0.0.1
    page_csp: bool = False  # the other pages forbid it too

    rate_limit_after: int | None = None  # calls accepted per account before 429 begins; None: no limit
    rate_limit_times: int | None = (
        None  # refusals until the limit is lifted; None: it is not lifted by refusing
    )
    rate_limit_seconds: float | None = None  # time from the first refusal until it is lifted
    retry_after: int | None = None  # the header of a 429, in seconds; None: no header

    failures: dict[str, Failure] = {}  # by model id, public name or "*"
    dead_sessions: set[str] = set()  # conversations that are gone: 404 with JSON

    trouble_models: set[str] = set()  # ids or names that a3, cut and hang apply to; empty: all
    trouble_on: Literal["create", "retry", "post", "any"] = "any"
    trouble_times: int | None = None  # answers they apply to; None: every one
    a3: str | None = None  # an error line after `a3_after_lines` lines of content
    a3_after_lines: int = 0
    cut_after_lines: int | None = None  # the answer ends after so many lines of content, without `ad`
    hang_after_lines: int | None = None  # it falls silent after so many, until the client leaves

    reasoning: bool | None = None  # `ag` lines before the text; None: of models whose names say so
    sources: tuple[dict[str, str], ...] = SOURCES  # of search models
    finish_reason: str = "stop"
    omit_usage: bool = False  # `ad` without `usage`
    null_usage: bool = False  # `ad` with `usage: null`
    step_marks: bool = True  # `af` at the beginning, `ae` before the end
    answers: dict[str, list[str]] = {}  # pieces of text by model id, public name or "*"; one `a0` line each
    raw: dict[str, str] = {}  # a body sent exactly as it stands, likewise
    media_base_url: str | None = None  # where media addresses point; None: the host that was asked

    split_cookie: bool = False  # new auth cookies come in two parts, `.0` and `.1`
    unescaped_models: bool = False  # the model list stands plain in its script
    user_message_form: Literal["both", "messages", "userMessage"] = "both"  # what a create call may bring

    # Not of the contract, and so off: larger images by way of the site's storage.
    uploads: UploadSwitches = msgspec.field(default_factory=UploadSwitches)


class Seen(msgspec.Struct):
    """One API call as it arrived. Times are `trio.current_time()`."""

    index: int
    arrived: float
    method: str
    path: str
    kind: Kind | None
    ended: float | None = None
    account: str | None = None
    session_id: str | None = None
    message_id: str | None = None
    model_id: str | None = None
    body: Any = None
    status: int | None = None
    outcome: Literal["running", "complete", "failed", "cut", "aborted", "refused", "stopped"] = "running"
    reason: str = ""  # of a refusal
    sent_bytes: int = 0


class Conversation(msgspec.Struct):
    """A session: `retriable` once its answer ended well, `running` while one is being made."""

    session_id: str
    account: str
    mode: contract.Mode
    model_id: str
    message_id: str
    message_b_id: str | None = None
    user_text: str = ""
    retriable: bool = False
    running: bool = False

    def side_of(self, message_id: str | None) -> contract.Side:
        return "b" if message_id == self.message_b_id is not None else "a"


class Running:
    """How many are running now, and the most there ever were, by key."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    def enter(self, key: str) -> None:
        self.now[key] += 1
        self.most[key] = max(self.most[key], self.now[key])

    def leave(self, key: str) -> None:
        self.now[key] -= 1
        if not self.now[key]:
            del self.now[key]


class Request(msgspec.Struct):
    """A request with its whole body."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    cookies: dict[str, str]
    scheme: str
    body: bytes = b""

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.headers.get('host', 'localhost')}"


class Reply(msgspec.Struct):
    """A whole response."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Headers = []


def json_reply(content: Any, status: int = 200, headers: Headers | None = None) -> Reply:
    return Reply(status, msgspec.json.encode(content), headers=headers or [])


# ── The site ────────────────────────────────────────────────────────────────────────────────────────────────


class Arena:
    """The site's state, and the ASGI application that serves it.

    Plain ASGI, so that it sees a client leave at once, both while an answer is being made and while it flows.
    """

    def __init__(self, models: Sequence[Model] | None = None, switches: Switches | None = None) -> None:
        if models is None:
            models = json.loads(MODELS_FILE.read_text(encoding="utf-8"))
        self.models: dict[str, Model] = {model["id"]: model for model in models}
        self.switches = switches or Switches()
        self.accounts: dict[str, str] = {}  # access token → account, while it is not revoked
        self.refreshes: dict[str, str] = {}  # refresh token → account
        self.clearances: set[str] = set()
        self.uploads = Uploads()
        self.forget_calls()

    def __repr__(self) -> str:
        running = self.running_models.now.total()
        return f"<Arena models={len(self.models)} sessions={len(self.sessions)} running={running}>"

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError(f"the stand-in arena speaks http only, not {scope['type']}")
        request = read_head(scope)
        body = await read_body(receive)
        if body is None:
            return  # the client left before it had sent its request
        request.body = body
        kind = kind_of(request)
        if kind is not None:
            await Exchange(self, request, kind, receive, send).run()
        elif self.switches.uploads.offered and await self.take_upload(request, receive, send):
            return
        else:
            await send_reply(send, self.reply(request))

    async def take_upload(self, request: Request, receive: Receive, send: Send) -> bool:
        """Answer a step of an upload; False when the request is none."""
        wanted = self.switches.uploads
        action = request.headers.get("next-action", "")
        step = self.uploads.step_of(request.method, request.path, action, wanted.deployment)
        if step is None or (step != "put" and self.check_due(request)):
            return False
        account = self.account_of(request)
        if step == "unknown" or (step != "put" and account is None):
            status = 404 if step == "unknown" else 401
            await send_reply(send, json_reply({"error": "no such action"}, status))
            return True
        content_type = request.headers.get("content-type", "")
        has_cookies, now = bool(request.cookies), trio.current_time()
        seen = UploadSeen(step, account, has_cookies, now, content_type=content_type)
        self.uploads.record.append(seen)

        async def answer() -> None:
            found = await self.uploads.answer(seen, request.path, request.origin, request.body, wanted)
            status, body, headers = found
            kind = headers.get("content-type", "application/json")
            others = [(name, value) for name, value in headers.items() if name != "content-type"]
            await send_reply(send, Reply(status, body, kind, others))

        await answer_or_notice(seen, receive, answer)
        return True

    # What tests and the control paths do with it.

    def forget_calls(self) -> None:
        self.sessions: dict[str, Conversation] = {}
        self.uploads.forget()
        self.record: list[Seen] = []
        self.arrivals = 0
        self.running_models = Running()
        self.running_pairs = Running()
        self.running_all = Running()
        self.start_counters()

    def start_counters(self) -> None:
        """Limits count from here: calls accepted and refused by account, failures and troubles used up."""
        self.accepted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.limited_since: dict[str, float] = {}
        self.failures_used: Counter[str] = Counter()
        self.troubles_used = 0

    def reset(self) -> None:
        """Forget conversations, record and switches. Accounts and clearances stay: nobody is signed out."""
        self.switches = Switches()
        self.forget_calls()

    def switch(self, **changes: Any) -> None:
        """Change some switches, checked as JSON would be, and start their counters anew."""
        merged = msgspec.to_builtins(self.switches) | msgspec.to_builtins(changes)
        self.switches = msgspec.convert(merged, Switches)
        self.start_counters()

    def sign_out_everyone(self) -> None:
        """Revoke every account for good: calls get 401, and the next page shows the terms."""
        self.accounts.clear()
        self.refreshes.clear()

    def expire_sign_ins(self) -> None:
        """Make every access token stale: calls get 401 until the browser loads a page, which renews it."""
        self.accounts.clear()

    def require_check(self) -> None:
        """The check is due for every browser, also for those that passed it before."""
        self.switches.check = True
        self.clearances.clear()

    def max_running(self, model_id: str) -> int:
        return self.running_models.most[model_id]

    def max_running_pair(self) -> int:
        """The most retries that were under way for one pair, counting those refused with 409 for it."""
        return max(self.running_pairs.most.values(), default=0)

    def stats(self) -> dict[str, Any]:
        kinds, outcomes = Counter(s.kind for s in self.record), Counter(s.outcome for s in self.record)
        return {
            "max_running": self.running_all.most["all"],
            "max_running_by_model": dict(self.running_models.most),
            "max_running_pair": self.max_running_pair(),
            "running": self.running_all.now["all"],
            "creates": kinds["create"],
            "retries": kinds["retry"],
            "posts": kinds["post"],
            "aborted": outcomes["aborted"],
            "outcomes": dict(outcomes),
            "statuses": {
                str(k): n for k, n in Counter(s.status for s in self.record).items() if k is not None
            },
            "sessions": len(self.sessions),
        }

    def find_model(self, name: str | None) -> Model:
        if name not in self.models:
            raise Refusal(404, f"model {name} is not available")
        return self.models[name]

    def pick_for_battle(self, call: Call) -> Model:
        """In a battle the site chooses the models: here the first of the wanted modality."""
        fitting = (model for model in self.models.values() if contract.modality_of(model) == call.modality)
        model = next(fitting, None)
        if model is None:
            raise Refusal(404, f"no model for {call.modality}")
        return model

    @property
    def upload_script(self) -> str:
        """A deployment's own, as its actions are."""
        return f"/assets/upload-{self.switches.uploads.deployment}.js"

    # Browsers, accounts, pages.

    def account_of(self, request: Request) -> str | None:
        token = contract.read_token(request.cookies)
        return self.accounts.get(token.access_token) if token else None

    def check_due(self, request: Request) -> bool:
        return self.switches.check and request.cookies.get(CLEARANCE_COOKIE) not in self.clearances

    def check_reply(self) -> Reply:
        headers = [("cf-mitigated", "challenge")] if self.switches.check_header else []
        headers += csp(self.switches.check_csp)
        return Reply(self.switches.check_status, page("check.html"), "text/html; charset=UTF-8", headers)

    def reply(self, request: Request) -> Reply:
        """The answer to everything that is not one of the three streaming calls."""
        try:
            if request.path.startswith("/_arena/"):
                return self.control(request)
            if request.path == "/cdn-cgi/challenge" and request.method == "POST":
                return self.pass_check(request)
            if self.switches.uploads.offered and request.path == self.upload_script:
                body = self.uploads.script(page("upload.js").decode(), self.switches.uploads).encode()
                return Reply(200, body, "text/javascript; charset=UTF-8")
            if request.path.startswith(("/media/", "/assets/")) and request.method == "GET":
                return stored_file(request.path)
            if self.check_due(request):
                return self.check_reply()
            return self.page_reply(request)
        except Refusal as refusal:
            return json_reply({"error": refusal.reason}, refusal.status, list(refusal.headers.items()))

    def page_reply(self, request: Request) -> Reply:
        match request.method, request.path:
            case "POST", "/nextjs-api/sign-up":
                return self.sign_up(request)
            case "POST", "/nextjs-api/sign-out":
                return self.sign_out(request)
            case "GET", path if path.startswith(("/nextjs-api/", "/api/")) or path == "/favicon.ico":
                raise Refusal(404, f"there is no {path}")
            case "GET", _:
                return self.chat_or_terms(request)
        raise Refusal(405, f"{request.method} is not for {request.path}")

    def pass_check(self, request: Request) -> Reply:
        """The person has pressed the check's button: this browser is clear from now on."""
        clearance = uuid.uuid4().hex
        self.clearances.add(clearance)
        return json_reply(
            {"ok": True}, headers=[set_cookie(request, CLEARANCE_COOKIE, clearance, "; HttpOnly")]
        )

    def sign_up(self, request: Request) -> Reply:
        """The person has accepted the terms: an anonymous account of their own."""
        account = self.account_of(request) or str(uuid.uuid4())
        return json_reply({"ok": True}, headers=self.sign_in_cookies(request, account))

    def sign_in_cookies(self, request: Request, account: str) -> Headers:
        token = contract.new_token(account, int(trio.current_time()) + SIGN_IN_SECONDS)
        self.accounts[token.access_token] = account
        self.refreshes[token.refresh_token] = account
        value = contract.cookie_value(token)
        if not self.switches.split_cookie:
            cookies = [set_cookie(request, AUTH_COOKIE, value)]
            return forget_auth_cookies(request, keep=(AUTH_COOKIE,)) + cookies
        half = len(value) // 2
        parts = {f"{AUTH_COOKIE}.0": value[:half], f"{AUTH_COOKIE}.1": value[half:]}
        cookies = [set_cookie(request, name, part) for name, part in parts.items()]
        return forget_auth_cookies(request, keep=tuple(parts)) + cookies

    def sign_out(self, request: Request) -> Reply:
        token = contract.read_token(request.cookies)
        if token:
            self.accounts.pop(token.access_token, None)
            self.refreshes.pop(token.refresh_token, None)
        return json_reply({"ok": True}, headers=forget_auth_cookies(request))

    def chat_or_terms(self, request: Request) -> Reply:
        """The page. A stale sign-in is renewed here when it still can be, else its cookie is taken back."""
        account, headers = self.account_of(request), csp(self.switches.page_csp)
        if account is None:
            token = contract.read_token(request.cookies)
            account = self.refreshes.pop(token.refresh_token, None) if token else None
            headers += self.sign_in_cookies(request, account) if account else forget_auth_cookies(request)
        if account is None:
            return Reply(200, page("terms.html"), "text/html; charset=UTF-8", headers)
        session = None
        if request.path.startswith("/c/"):
            session = self.sessions.get(request.path.removeprefix("/c/"))
            if session is None or session.account != account:
                raise Refusal(404, "there is no such conversation")
        models = contract.models_script(
            list(self.models.values()), escaped=not self.switches.unescaped_models
        )
        opened = msgspec.json.encode(session).decode().replace("<", "\\u003c")
        uploads = f'<script src="{self.upload_script}"></script>' if self.switches.uploads.offered else ""
        body = page("chat.html", MODELS_SCRIPT=models, CONVERSATION=opened, UPLOADS=uploads)
        return Reply(200, body, "text/html; charset=UTF-8", headers)

    def control(self, request: Request) -> Reply:
        match request.method, request.path.removeprefix("/_arena/"):
            case "GET", "record":
                since = int(request.query.get("since", ["0"])[0])
                return json_reply([seen for seen in self.record if seen.index >= since])
            case "GET", "uploads":
                return json_reply(self.uploads.record)
            case "GET", "stats":
                return json_reply(self.stats())
            case "GET", "switches":
                return json_reply(self.switches)
            case "PATCH", "switches":
                return self.change_switches(request)
            case "POST", "reset" | "sign_out" | "expire" | "challenge" as action:
                {
                    "reset": self.reset,
                    "sign_out": self.sign_out_everyone,
                    "expire": self.expire_sign_ins,
                    "challenge": self.require_check,
                }[action]()
                return json_reply({"ok": True})
        raise Refusal(404, f"no control {request.method} {request.path}")

    def change_switches(self, request: Request) -> Reply:
        try:
            self.switch(**msgspec.json.decode(request.body, type=dict[str, Any]))
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise Refusal(400, str(error)) from error
        return json_reply(self.switches)

    # Limits and failures of the streaming calls.

    def limit(self, account: str) -> None:
        """Count the call, or raise 429 while the account is over its limit."""
        wanted = self.switches
        if wanted.rate_limit_after is not None and self.accepted[account] >= wanted.rate_limit_after:
            since = self.limited_since.setdefault(account, trio.current_time())
            by_times = self.refused[account] >= (math.inf if (n := wanted.rate_limit_times) is None else n)
            by_time = trio.current_time() - since >= (wanted.rate_limit_seconds or math.inf)
            if not by_times and not by_time:
                self.refused[account] += 1
                wait = wanted.retry_after
                raise Refusal(429, "too many requests", {} if wait is None else {"Retry-After": str(wait)})
        self.accepted[account] += 1

    def failure_for(self, kind: Kind, model: Model) -> Failure | None:
        """The failure set for this call, when one is left."""
        for key in (model["id"], model["publicName"], "*"):
            failure = self.switches.failures.get(key)
            if failure is None or failure.on not in (kind, "any"):
                continue
            if failure.times is None or self.failures_used[key] < failure.times:
                self.failures_used[key] += 1
                return failure
        return None

    def trouble_for(self, kind: Kind, model: Model) -> bool:
        """Whether a3, cut and hang apply to this answer; one that they apply to is counted."""
        wanted = self.switches
        if wanted.a3 is None and wanted.cut_after_lines is None and wanted.hang_after_lines is None:
            return False
        if wanted.trouble_on not in (kind, "any"):
            return False
        if wanted.trouble_models and not {model["id"], model["publicName"], "*"} & wanted.trouble_models:
            return False
        if wanted.trouble_times is not None and self.troubles_used >= wanted.trouble_times:
            return False
        self.troubles_used += 1
        return True


# ── One streaming call ──────────────────────────────────────────────────────────────────────────────────────


class Exchange:
    """One create, retry or post call, from its arrival to its end.

    Two tasks share its nursery: one makes the answer, the other waits for the client to leave and then
    cancels the first. What the call holds (its place in the counts, its conversation) is given back before
    the end of the body goes out, so that a client that has seen the end may retry at once.
    """

    def __init__(self, arena: Arena, request: Request, kind: Kind, receive: Receive, send: Send) -> None:
        self.arena, self.request, self.kind = arena, request, kind
        self.receive, self.send = receive, send
        self.seen = Seen(arena.arrivals, trio.current_time(), request.method, request.path, kind)
        self.held: list[tuple[Running, str]] = []
        self.session: Conversation | None = None

    async def run(self) -> None:
        self.arena.arrivals += 1
        self.arena.record.append(self.seen)
        if len(self.arena.record) > RECORD_LIMIT:
            del self.arena.record[: RECORD_LIMIT // 2]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.watch, nursery.cancel_scope)
                await self.answer_or_refuse()
                nursery.cancel_scope.cancel()
        finally:
            self.finish("stopped")

    async def watch(self, cancel_scope: trio.CancelScope) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.finish("aborted")
        cancel_scope.cancel()

    def finish(self, outcome: Literal["complete", "failed", "cut", "aborted", "refused", "stopped"]) -> None:
        """The call is over: note how, give back what it held. Only a complete answer is retriable."""
        if self.seen.outcome != "running":
            return
        self.seen.outcome, self.seen.ended = outcome, trio.current_time()
        for running, key in self.held:
            running.leave(key)
        if self.session is not None:
            self.session.running = False
            if outcome == "complete":
                self.session.retriable = True

    def hold(self, running: Running, key: str) -> None:
        running.enter(key)
        self.held.append((running, key))

    async def answer_or_refuse(self) -> None:
        arena = self.arena
        try:
            if arena.check_due(self.request):
                reply = arena.check_reply()
            else:
                call, model = self.accept()
                failure = arena.failure_for(self.kind, model)
                if failure is None:
                    await self.answer(call, model)
                    return
                reply = Reply(
                    failure.status, failure.body.encode(), failure.content_type, [*failure.headers.items()]
                )
        except Refusal as refusal:
            self.seen.reason = refusal.reason
            reply = json_reply({"error": refusal.reason}, refusal.status, [*refusal.headers.items()])
        self.seen.status = reply.status
        self.finish("refused")
        await send_reply(self.send, reply)

    # Refusals, in the order in which the site would find them.

    def accept(self) -> tuple[Call, Model]:
        """The call, when nothing is wrong with it. Its conversation is not touched before all is checked."""
        seen, arena, request = self.seen, self.arena, self.request
        seen.account = arena.account_of(request)
        seen.session_id, seen.message_id = ids_of(request.path)
        try:
            seen.body = msgspec.json.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, f"the body is not JSON: {error}") from error
        if seen.account is None:
            raise Refusal(401, "signed out: no auth cookie, or a stale one")
        arena.limit(seen.account)
        given = request.headers.get("content-type", "")
        if given.replace(" ", "").lower() != contract.CONTENT_TYPE.lower():
            raise Refusal(400, f"Content-Type must be {contract.CONTENT_TYPE}, not {given!r}")
        if self.kind == "create":
            return self.accept_create(seen.account)
        return self.accept_further(seen.account)

    def accept_create(self, account: str) -> tuple[Call, Model]:
        arena, call = self.arena, contract.read_create(self.request.body)
        form = arena.switches.user_message_form
        brought = "userMessage" if "userMessage" in self.seen.body else "messages"
        contract.require(form in ("both", brought), f"this deployment takes {form}, not {brought}")
        model = arena.pick_for_battle(call) if call.mode == "battle" else arena.find_model(call.model_id)
        self.count(call, model)
        contract.require(call.session_id not in arena.sessions, "this id is taken")
        contract.check_model_takes(call, model)
        if call.model_b_id is not None:
            arena.find_model(call.model_b_id)
        self.session = Conversation(
            call.session_id,
            account,
            call.mode or "direct",
            model["id"],
            call.message_id,
            call.message_b_id,
            running=True,
        )
        self.session.user_text = call.last_user_text
        arena.sessions[call.session_id] = self.session
        return call, model

    def accept_further(self, account: str) -> tuple[Call, Model]:
        """A retry or a further message: 404 for a conversation gone or another's, 409 while it runs."""
        arena, seen = self.arena, self.seen
        session = arena.sessions.get(seen.session_id or "")
        gone = seen.session_id in arena.switches.dead_sessions
        if session is None or session.account != account or gone:
            raise Refusal(404, f"there is no conversation {seen.session_id}")
        if self.kind == "retry":
            side = session.side_of(seen.message_id)
            pair = session.session_id, seen.message_id or ""
            call = contract.read_retry(self.request.body, *pair, session.mode, side)
            call.side = side
        else:
            call = contract.read_post(self.request.body, session.session_id, session.mode)
        if session.mode == "direct":
            contract.require(
                call.model_id in (None, session.model_id), "the conversation is with another model"
            )
        model = arena.find_model(
            session.model_id if session.mode == "direct" else call.model_id or session.model_id
        )
        self.count(call, model)
        if self.kind == "retry" and call.message_id not in (session.message_id, session.message_b_id):
            raise Refusal(404, f"{call.message_id} is not the last message of this conversation")
        if session.running:
            raise Refusal(409, "this message is being answered already")
        if self.kind == "retry" and not session.retriable:
            raise Refusal(404, "this message has no answer that ended well")
        contract.check_model_takes(call, model)
        if self.kind == "post":
            contract.require(call.message_id != session.message_id, "modelAMessageId must be new")
            session.message_id, session.message_b_id = call.message_id, call.message_b_id
            session.retriable, session.user_text = False, call.last_user_text
        self.session, session.running = session, True
        return call, model

    def count(self, call: Call, model: Model) -> None:
        self.seen.session_id, self.seen.message_id, self.seen.model_id = (
            call.session_id,
            call.message_id,
            model["id"],
        )
        self.hold(self.arena.running_all, "all")
        self.hold(self.arena.running_models, model["id"])
        if self.kind == "retry":
            self.hold(self.arena.running_pairs, f"{call.session_id}/{call.message_id}")

    # The answer.

    async def answer(self, call: Call, model: Model) -> None:
        wanted = self.arena.switches
        if wanted.latency_seconds:
            await trio.sleep(wanted.latency_seconds)
        self.seen.status = 200
        head = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self.send({"type": "http.response.start", "status": 200, "headers": head})
        troubled = self.arena.trouble_for(self.kind, model)
        lines, hang = compose(call, model, wanted, self.request.origin, troubled)
        buffered = bytearray()
        for line in lines:
            if wanted.line_delay_seconds:
                await trio.sleep(wanted.line_delay_seconds)
            buffered += line.encode()
            await self.send_chunks(buffered, wanted.chunk_bytes)
        await self.send_chunks(buffered, len(buffered))
        if hang:
            await trio.sleep_forever()
        self.finish(outcome_of("".join(lines)))
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_chunks(self, buffered: bytearray, size: int) -> None:
        """Send what fills whole chunks of `size` bytes (0: all there is) and keep the rest in the buffer."""
        size = size or len(buffered)
        while buffered and len(buffered) >= size:
            chunk = bytes(buffered[:size])
            del buffered[:size]
            self.seen.sent_bytes += len(chunk)
            await self.send({"type": "http.response.body", "body": chunk, "more_body": True})


def outcome_of(body: str) -> Literal["complete", "failed", "cut"]:
    if contract.ended_well(body):
        return "complete"
    return "failed" if re.search("^[ab][d3]:", body, re.MULTILINE) else "cut"


def compose(
    call: Call, model: Model, wanted: Switches, origin: str, troubled: bool
) -> tuple[list[str], bool]:
    """The answer's lines, and whether silence follows them."""
    raw = chosen(wanted.raw, model)
    if raw is not None:
        return re.findall("[^\n]*\n|[^\n]+", raw), False
    lines = whole_answer(call, model, wanted, origin)
    if not troubled:
        return [*lines.opening, *lines.content, *lines.ending], False
    if wanted.hang_after_lines is not None:
        return [*lines.opening, *lines.content[: wanted.hang_after_lines]], True
    if wanted.cut_after_lines is not None:
        return [*lines.opening, *lines.content[: wanted.cut_after_lines]], False
    ending = contract.ending_lines(call.side, "error", msgspec.UNSET)
    failed = [f"{call.side}3:{json.dumps(wanted.a3)}\n", *ending]
    return [*lines.opening, *lines.content[: wanted.a3_after_lines], *failed], False


def whole_answer(call: Call, model: Model, wanted: Switches, origin: str) -> contract.Lines:
    """An undisturbed answer: an echo of the last user message, or media whose address is served."""
    opening, content, ending = [], [], []
    for participant in "ab" if call.message_b_id and call.mode != "direct" else call.side:
        made = participant_content(participant, call, model, wanted, origin)
        content += made
        usage: Any = {
            "promptTokens": sum(len(text) for _, text in call.turns) // 4 + 1,
            "completionTokens": len(made),
        }
        usage = msgspec.UNSET if wanted.omit_usage else None if wanted.null_usage else usage
        marks = contract.ending_lines(participant, wanted.finish_reason, usage)
        ending += marks if wanted.step_marks else marks[1:]
        if wanted.step_marks:
            opening.append(f"{participant}f:{json.dumps({'messageId': call.message_id})}\n")
    return contract.Lines(opening, content, ending)


def participant_content(
    participant: str, call: Call, model: Model, wanted: Switches, origin: str
) -> list[str]:
    modality = contract.modality_of(model)
    pieces = chosen(wanted.answers, model)
    if pieces is None and modality in ("image", "video"):
        media_url = f"{wanted.media_base_url or origin}/media/{uuid.uuid4()}"
        return contract.media_lines(participant, modality, media_url)
    if pieces is None:
        pieces = contract.pieces_of(f"[{model['publicName']}] {call.last_user_text}")
    is_reasoning = says_thinking(model) if wanted.reasoning is None else wanted.reasoning
    thoughts = ["Looking at the ", "question…"] if is_reasoning else []
    lines = contract.text_lines(f"{participant}g", thoughts)
    if modality == "search":
        lines.append(contract.source_line(participant, wanted.sources))
    return lines + contract.text_lines(f"{participant}0", pieces)


def says_thinking(model: Model) -> bool:
    return bool(re.search("(?<!no-)thinking", model["publicName"]))


Value = TypeVar("Value")


def chosen(table: Mapping[str, Value], model: Model) -> Value | None:
    return next((table[key] for key in (model["id"], model["publicName"], "*") if key in table), None)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────


async def answer_lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to set up or to take down, but a server would log it if nobody said so."""
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


def read_head(scope: Mapping[str, Any]) -> Request:
    """The request without its body. HTTP/2 may split the cookies over several headers."""
    headers: dict[str, str] = {}
    cookies: list[str] = []
    for name, value in scope["headers"]:
        if name.lower() == b"cookie":
            cookies.append(value.decode("latin-1"))
        elif name.lower() in (b"host", b":authority"):
            headers["host"] = value.decode("latin-1")
        else:
            headers[name.decode("latin-1").lower()] = value.decode("latin-1")
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return Request(
        scope["method"],
        scope["path"],
        query,
        headers,
        dict(read_cookies("; ".join(cookies))),
        scope["scheme"],
    )


def read_cookies(header: str) -> Iterator[tuple[str, str]]:
    for pair in header.split(";"):
        name, equals, value = pair.strip().partition("=")
        if equals:
            yield name, value.strip('"')


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, or None when the client left before it was all there."""
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        if len(body) <= MAX_BODY_BYTES:
            body += event.get("body", b"")
        if not event.get("more_body", False):
            return bytes(body)


async def send_reply(send: Send, reply: Reply) -> None:
    headers = [("content-type", reply.content_type), ("content-length", str(len(reply.body))), *reply.headers]
    coded = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": coded})
    await send({"type": "http.response.body", "body": reply.body, "more_body": False})


def kind_of(request: Request) -> Kind | None:
    """Which of the three streaming calls this is; None for everything else."""
    prefix = next((prefix for prefix in API_PREFIXES if request.path.startswith(prefix)), None)
    if prefix is None:
        return None
    match request.method, request.path.removeprefix(prefix).split("/"):
        case "POST", ["create-evaluation"]:
            return "create"
        case "POST", ["post-to-evaluation", _]:
            return "post"
        case "PUT", ["retry-evaluation-session-message", _, "messages", _]:
            return "retry"
    return None


def ids_of(path: str) -> tuple[str | None, str | None]:
    """S and M as the path names them, as far as it does."""
    parts = path.split("/")
    if "post-to-evaluation" in parts:
        return parts[-1], None
    return (parts[-3], parts[-1]) if "messages" in parts else (None, None)


def set_cookie(request: Request, name: str, value: str, more: str = "") -> tuple[str, str]:
    secure = "; Secure" if request.scheme == "https" else ""
    return "set-cookie", f"{name}={value}; Path=/; Max-Age=31536000; SameSite=Lax{secure}{more}"


def forget_auth_cookies(request: Request, keep: tuple[str, ...] = ()) -> Headers:
    names = [name for name in request.cookies if name.startswith(AUTH_COOKIE) and name not in keep]
    return [("set-cookie", f"{name}=; Path=/; Max-Age=0") for name in names]


def csp(forbid: bool) -> Headers:
    """A policy under which the page may not open ws://127.0.0.1."""
    policy = (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
    )
    return [("content-security-policy", policy)] if forbid else []


def page(name: str, **parts: str) -> bytes:
    text = (PAGES / name).read_text(encoding="utf-8").replace("{{CHECK_TITLE}}", CHECK_TITLE)
    for part, content in parts.items():
        text = text.replace("{{" + part + "}}", content)
    return text.encode()


def stored_file(path: str) -> Reply:
    """A script of the pages, or a media file that an answer named; media need no sign-in, as on the site."""
    _, folder, name = path.split("/", 2)
    if folder == "assets" and name == "chat.js":
        return Reply(200, page(name), "text/javascript; charset=UTF-8")
    stem, _, ending = name.rpartition(".")
    if folder == "media" and ending == "png":
        return Reply(200, contract.png(stem), "image/png")
    if folder == "media" and ending == "mp4":
        return Reply(200, contract.mp4(), "video/mp4")
    raise Refusal(404, f"there is no {path}")


# ── Serving ─────────────────────────────────────────────────────────────────────────────────────────────────


async def serve(
    arena: Arena,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: bool = False,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the arena until cancelled; `task_status.started` gets its address, with the port that was bound.

    With `tls` it speaks HTTP/2 too, under a certificate of its own for lmarena.ai, arena.ai and localhost.
    """
    config = hypercorn.config.Config()
    config.bind = [f"{host}:{port}"]
    config.backlog = 1024
    config.h2_max_concurrent_streams = H2_STREAMS
    config.keep_alive_max_requests = (
        10**9
    )  # hypercorn's 1000 would close an HTTP/2 connection under its streams
    config.keep_alive_timeout = 75
    config.graceful_timeout = 0  # hypercorn would otherwise hold a cancelled server open for its clients
    config.max_app_queue_size = 1024  # a full queue would stop the reading of a whole HTTP/2 connection
    config.include_server_header = False
    config.errorlog = logging.getLogger("demo.arena.server")
    config.errorlog.setLevel(logging.WARNING)
    async with trio.open_nursery() as nursery:
        # The certificate is read before the server says that it has started, and is not left lying about.
        with tempfile.TemporaryDirectory(prefix="stand-in-arena-") as folder:
            if tls:
                write_certificate(config, Path(folder))
                H2Protocol._priority_updated = ignore_priority  # type: ignore[method-assign, assignment]
            serving = partial(hypercorn.trio.serve, cast(Any, arena), config, mode="asgi")
            binds: list[str] = await nursery.start(serving)
        task_status.started(binds[0])


async def ignore_priority(_protocol: H2Protocol, _event: object) -> None:
    """In place of hypercorn's own, which ends the whole server when Chromium's priorities form a loop.

    HTTP/2 priorities are deprecated (RFC 9113, 5.3): without them all streams get their turns alike.
    """


def write_certificate(config: hypercorn.config.Config, folder: Path) -> None:
    import trustme  # a library of the tests: plain http does without it

    issued = trustme.CA().issue_cert(
        "lmarena.ai", "*.lmarena.ai", "arena.ai", "*.arena.ai", "localhost", "127.0.0.1"
    )
    config.certfile, config.keyfile = str(folder / "chain.pem"), str(folder / "key.pem")
    Path(config.certfile).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    Path(config.keyfile).write_bytes(issued.private_key_pem.bytes())


async def main(arena: Arena, host: str, port: int, tls: bool) -> None:
    """Print the address as one line of JSON, then serve until SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            url = await nursery.start(partial(serve, arena, host=host, port=port, tls=tls))
            print(json.dumps({"url": url}), flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


def command_line() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.arena", description="A stand-in for the arena site."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    parser.add_argument("--tls", action="store_true", help="https and HTTP/2, with a certificate of its own")
    parser.add_argument("--switches", default="{}", metavar="JSON", help="fields of Switches to begin with")
    parser.add_argument("--models", type=Path, default=MODELS_FILE, metavar="FILE")
    given = parser.parse_args()
    try:
        switches = msgspec.json.decode(given.switches.encode(), type=Switches)
        models = json.loads(given.models.read_text(encoding="utf-8"))
    except (OSError, ValueError, msgspec.ValidationError) as error:
        parser.error(str(error))
    trio.run(main, Arena(models, switches), given.host, given.port, given.tls)


if __name__ == "__main__":
    command_line()
