"""What the tests in a real browser are played with: a program, the stand-in arena, a real Chromium.

The program is `ScriptedBridge`, its end of the WebSocket reduced to what a test says, in a thread of its own;
or `Everything` has the real one, in a terminal. Tests are written without `await`: they send, and wait for
what arrives. Every wait is a poll with a generous deadline.
"""

import base64
import hashlib
import json
import os
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import httpx
import openai
import trio
from harness import Terminal
from playwright.sync_api import Browser, BrowserContext, Error, Page, Playwright
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from lmarena_proxy import VERSION

ROOT = Path(__file__).resolve().parent.parent
SITE = "https://lmarena.ai"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# The same engine without windows, which nobody sees here and which are most of the work. Where it is not
# installed, all of Chromium does. What the browser itself asks or forbids is only there in all of it.
_SHELL = f"{CHROMIUM}-headless-shell"
HEADLESS_SHELL = _SHELL if Path(_SHELL).exists() else CHROMIUM
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]
CREATE_PATH = "/nextjs-api/stream/create-evaluation"
DEADLINE_SECONDS = 60.0
LONGEST_FRAME_BYTES = 2**20  # the protocol's promise; a longer one closes the connection with 1009
BADGE = "lmarena-proxy-badge"


def eventually(look: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value that `look` returns."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := look():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


def records_of(frame: bytes) -> list[tuple[int, bytes]]:
    """The records of a binary frame; a frame that is cut off is an error."""
    records, at = [], 0
    while at < len(frame):
        number, length = struct.unpack_from(">II", frame, at)
        assert at + 8 + length <= len(frame), "a record is longer than its frame"
        records.append((number, frame[at + 8 : at + 8 + length]))
        at += 8 + length
    return records


class Exchange:
    """What arrived for one fetch, in the order in which it arrived: `events` holds the kinds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.head: dict[str, Any] | None = None
        self.body = bytearray()
        self.outcome: dict[str, Any] | None = None
        self.events: list[str] = []

    def __repr__(self) -> str:
        return f"<Exchange {self.number} {self.events[-3:]} bytes={len(self.body)} outcome={self.outcome}>"


class Connection:
    """One connected tab as the program sees it."""

    def __init__(self, bridge: "ScriptedBridge", socket: WebSocketConnection, origin: str | None) -> None:
        self.bridge = bridge
        self.socket = socket
        self.origin = origin
        self.messages: list[dict[str, Any]] = []
        self.frames: list[bytes] = []
        self.exchanges: dict[int, Exchange] = {}
        self.closed = False
        self.numbers = 0

    def take(self, data: str | bytes) -> None:
        if isinstance(data, bytes):
            self.frames.append(data)
            for number, piece in records_of(data):
                exchange = self.exchanges[number]
                exchange.body += piece
                exchange.events.append("bytes")
            return
        message = json.loads(data)
        running = self.exchanges.get(message.get("id"))
        if running is not None:
            running.events.append(message["type"])
            if message["type"] == "response":
                running.head = message
            else:
                running.outcome = message
        self.messages.append(message)

    def send(self, **message: Any) -> None:
        self.bridge.call(partial(self.socket.send_message, json.dumps(message)))

    def fetch(self, path: str, body: Any, method: str = "POST", number: int | None = None) -> Exchange:
        self.numbers += 1
        exchange = Exchange(self.numbers if number is None else number)
        self.exchanges.setdefault(exchange.number, exchange)
        text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
        self.send(type="fetch", id=exchange.number, method=method, path=path, body=text)
        return exchange

    def upload(self, data: bytes, content_type: str = "image/png") -> Exchange:
        self.numbers += 1
        exchange = self.exchanges[self.numbers] = Exchange(self.numbers)
        encoded = base64.b64encode(data).decode()
        fields = {"name": f"{self.numbers}.png", "content_type": content_type, "data": encoded}
        self.send(type="upload", id=exchange.number, **fields)
        return exchange

    def finish(self, exchange: Exchange) -> Exchange:
        eventually(lambda: exchange.outcome, f"the end of {exchange}")
        return exchange

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    def first(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first message of that type with those fields, once it is there."""

        def look() -> dict[str, Any] | None:
            fitting = (m for m in self.all(kind) if all(m.get(k) == v for k, v in fields.items()))
            return next(fitting, None)

        found: dict[str, Any] = eventually(look, f"{kind} with {fields} among {self.messages[-5:]}")
        return found

    def state(self) -> dict[str, Any]:
        """The last word on the page's state."""
        return [m for m in self.messages if m["type"] in ("hello", "state")][-1]

    def wait_state(self, state: str) -> dict[str, Any]:
        eventually(lambda: self.state()["state"] == state, f"state {state}")
        return self.state()


class ScriptedBridge:
    """The program's listener, reduced to what a test says. It answers `hello` with `welcome` by itself."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.connections: list[Connection] = []
        self.welcome: dict[str, Any] = {"protocol": 1, "version": VERSION}
        self.welcome["auth_cookie"] = "arena-auth-prod-v1"
        self.close_code: int | None = None  # said in place of a welcome
        self.reading = True
        self.thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    def start(self) -> None:
        ready = threading.Event()
        self.thread = threading.Thread(target=trio.run, args=(self.serve, ready), daemon=True)
        self.thread.start()
        assert ready.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        if self.thread is not None:
            trio.from_thread.run_sync(self.scope.cancel, trio_token=self.token)
            self.thread.join(DEADLINE_SECONDS)
            self.thread = None

    def call(self, function: Callable[[], Any]) -> None:
        trio.from_thread.run(function, trio_token=self.token)

    async def serve(self, ready: threading.Event) -> None:
        self.token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self.scope:
            async with trio.open_nursery() as nursery:
                serving = partial(serve_websocket, max_message_size=LONGEST_FRAME_BYTES, message_queue_size=1)
                server = await nursery.start(
                    partial(serving, self.handle, "127.0.0.1", self.port, ssl_context=None)
                )
                self.port = server.port
                ready.set()

    async def handle(self, request: WebSocketRequest) -> None:
        headers = {name.lower(): value.decode() for name, value in request.headers}
        socket = await request.accept()
        connection = Connection(self, socket, headers.get(b"origin"))
        try:
            while True:
                while not self.reading:  # noqa: ASYNC110 (set by another thread)
                    await trio.sleep(0.02)
                connection.take(await socket.get_message())
                if len(connection.messages) == 1 and not connection.frames:
                    self.connections.append(connection)
                    if self.close_code is not None:
                        await socket.aclose(self.close_code, "reinstall the script")
                    else:
                        await socket.send_message(json.dumps({"type": "welcome", **self.welcome}))
        except ConnectionClosed:
            pass
        finally:
            connection.closed = True

    def connected(self) -> Connection:
        """The tab that is connected now."""

        def look() -> Connection | None:
            return next(
                (connection for connection in reversed(self.connections) if not connection.closed), None
            )

        found: Connection = eventually(look, "a connected tab")
        return found

    def connection(self, number: int = 0) -> Connection:
        """The `number`th tab that has said hello."""
        eventually(lambda: len(self.connections) > number, f"connection {number}")
        return self.connections[number]


class ArenaProcess:
    """`python -m demo.arena --tls` and its control paths."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "demo.arena", "--port", "0", "--tls"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url: str = json.loads(self.process.stdout.readline())["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)

    def control(self, method: str, name: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = Request(f"https://127.0.0.1:{self.port}/_arena/{name}", data=data, method=method)
        trusting = ssl._create_unverified_context()  # its certificate is its own
        with urlopen(request, context=trusting, timeout=DEADLINE_SECONDS) as response:
            return json.loads(response.read() or b"null")

    def reset(self, **switches: Any) -> None:
        self.control("POST", "reset", {})
        self.switch(**switches)

    def switch(self, **switches: Any) -> None:
        self.control("PATCH", "switches", switches)

    def record(self) -> list[dict[str, Any]]:
        seen = self.control("GET", "record")
        return seen if isinstance(seen, list) else seen["record"]

    def uploads(self) -> list[dict[str, Any]]:
        """The steps of uploads that it has seen."""
        seen: list[dict[str, Any]] = self.control("GET", "uploads")
        return seen

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.control("GET", "stats")
        return stats


class UserscriptBrowser:
    """Chromium for which lmarena.ai is the stand-in, and the script as a script manager would inject it."""

    def __init__(
        self,
        playwright: Playwright,
        arena: ArenaProcess,
        *flags: str,
        path: str = HEADLESS_SHELL,
        port: int | None = None,
    ) -> None:
        """`port`: where the arena is reached, if not at its own."""
        self.arena = arena
        self.browser: Browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                f"--host-resolver-rules=MAP lmarena.ai:443 127.0.0.1:{port or arena.port}",
                "--ignore-certificate-errors",
                *CHROMIUM_FLAGS,
                *flags,
            ],
        )

    @contextmanager
    def profile(self, bridge: ScriptedBridge, before: str = "", **options: Any) -> Iterator[BrowserContext]:
        """An empty profile with the script installed, pointed at that bridge; `before` runs before it."""
        context = self.browser.new_context(ignore_https_errors=True, **options)
        context.add_init_script(before + script_for(bridge))
        context.set_default_timeout(DEADLINE_SECONDS * 1000)
        try:
            yield context
        finally:
            context.close()


class Everything:
    """The running program, the arena process, and the person's browser with the script as it is served."""

    def __init__(self, terminal: Terminal, arena: ArenaProcess, browser: Browser) -> None:
        self.terminal, self.arena, self.browser = terminal, arena, browser
        output = self.console("Waiting for an LMArena tab")
        self.url = next(word for word in output.split() if word.startswith("http://")).removesuffix("/v1")
        self.script = httpx.get(f"{self.url}/bridge.user.js").text
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=120)
        self.context = self.profile()
        self.page = self.context.new_page()

    def profile(self, **options: Any) -> BrowserContext:
        """A further profile of the browser, with the script installed."""
        context = self.browser.new_context(ignore_https_errors=True, **options)
        context.add_init_script(self.script)
        context.set_default_timeout(DEADLINE_SECONDS * 1000)
        return context

    def console(self, text: str, times: int = 1) -> str:
        """Wait until a text stands on the console, so many times; returns all of it."""
        try:
            eventually(lambda: self.terminal.output.count(text) >= times, f"{text!r} on the console")
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.terminal.output}") from None
        return self.terminal.output

    def state(self) -> Any:
        return httpx.get(f"{self.url}/api/state").json()

    def calls(self, kind: str) -> list[dict[str, Any]]:
        return [call for call in self.arena.record() if call["kind"] == kind]

    def ask(self, model: str, text: str) -> str:
        answer = self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}]
        )
        return answer.choices[0].message.content or ""

    def sessions(self, name: str) -> int:
        pools = self.state()["pool"]
        return next(int(pool["sessions"]) for pool in pools if pool["model"] == name)


def script_for(bridge: ScriptedBridge) -> str:
    """The script as the program would serve it. What `@match` and `@run-at` do is done by hand."""
    text = (ROOT / "bridge.user.js").read_text(encoding="utf-8")
    for name, value in {"BRIDGE_URL": bridge.url, "INSTALL_URL": "http://127.0.0.1:9/bridge.user.js"}.items():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"const {name} = "))
        text = text.replace(line, f"  const {name} = {json.dumps(value)};")
    return f'if (location.hostname === "lmarena.ai") {{\n{text}\n}}'


def status_of(page: Page) -> str | None:
    status: str | None = page.evaluate(f"document.querySelector('{BADGE}')?.dataset.status ?? null")
    return status


def wait_status(page: Page, status: str) -> None:
    """Poll from outside: `wait_for_function` evaluates in the page, which a policy of the page may forbid."""

    def look() -> bool:
        try:
            return status_of(page) == status
        except Error:
            return False  # The page is being left for another.

    eventually(look, f"status {status}")


def sign_in(page: Page, path: str = "/") -> None:
    """What the person does: open the site and accept its terms."""
    page.goto(SITE + path)
    page.click("#accept-terms")
    page.wait_for_selector("#message")


def hash_of(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()


def new_ids() -> tuple[str, str, str]:
    return str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())


def create_body(model_id: str, content: str = "Hi") -> dict[str, Any]:
    """The body that opens a conversation in direct mode."""
    session, user, answer = new_ids()
    shared: dict[str, Any] = {
        "experimental_attachments": [],
        "participantPosition": "a",
        "evaluationSessionId": session,
        "status": "pending",
        "failureReason": None,
    }
    question: dict[str, Any] = {
        "id": user,
        "role": "user",
        "content": content,
        "parentMessageIds": [],
        "modelId": None,
    }
    reply: dict[str, Any] = {
        "id": answer,
        "role": "assistant",
        "content": "",
        "parentMessageIds": [user],
        "modelId": model_id,
    }
    return {
        "id": session,
        "mode": "direct",
        "modelAId": model_id,
        "userMessageId": user,
        "modelAMessageId": answer,
        "modality": "chat",
        "messages": [question | shared, reply | shared],
    }
