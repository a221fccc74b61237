"""The Python twin of `bridge.user.js`: a browser tab without a browser, and the person in front of it.

One `Twin` is one tab. It keeps the tab's cookies, looks at the page as the script does (title, check, auth
cookie), and speaks wire protocol version 1 with the program: it relays fetches to the arena with httpx and
hands back their bytes. The methods named after clicks (`pass_check`, `accept_terms`, `chat_by_hand`, ...) are
the person's.

One nursery per connection holds everything that belongs to it: the task that reads, the one that writes, each
relayed fetch. A page load ends the connection, as it does in a browser: its fetches are aborted without a
word, and a new connection says hello with the new state.
"""

import base64
import contextlib
import hashlib
import json
import logging
import re
import ssl
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from urllib.parse import unquote

import httpx
import trio
import trio_websocket

from demo import contract
from demo.contract import CHECK_TITLE, Model

PROTOCOL = 1
SCRIPT_VERSION = "1.0.0"
ALLOWED_PREFIXES = ("/nextjs-api/stream/", "/api/stream/")
PASSED_HEADERS = ("content-type", "retry-after", "cf-mitigated")
MAX_MESSAGE_BYTES = 64 * 2**20  # a fetch may carry several attachments of 5 MB in base64
MAX_FRAME_BYTES = (
    256 * 2**10
)  # well below the 1 MiB at which a trio-websocket peer closes unless told otherwise
MAX_OUTBOX_BYTES = 4 * 2**20  # fetches wait beyond this, as the arena's bytes then come faster than they go
POOLS = 32  # httpcore looks at every pair of a pool's connections for each request: one pool would crawl
CLOSE_SECONDS = 0.5  # for the closing handshake, before the socket is simply closed
WRONG_PROTOCOL = 4001  # the close code of a program that speaks another version

State = Literal["loading", "verification", "sign_in", "ready"]
log = logging.getLogger("demo.twin")


class NotUploaded(Exception):
    """An upload brought no address: the fields of the frame that says so, or the response to pass on."""

    def __init__(self, reason: str, message: str, response: httpx.Response | None = None) -> None:
        super().__init__(message)
        self.fields = {"reason": reason, "message": message}
        self.response = response


class Refused(Exception):
    """The program will not have this script: another protocol version. There is no use in trying again."""


class SpreadTransport(httpx.AsyncBaseTransport):
    """Requests in turn over several connection pools without limits, so that hundreds at once stay cheap."""

    def __init__(self, context: ssl.SSLContext) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.pools = [httpx.AsyncHTTPTransport(verify=context, limits=limits) for _ in range(POOLS)]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.pools.append(pool := self.pools.pop(0))
        return await pool.handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


class Outbox:
    """What waits to be sent: JSON texts and body records in order. Neighbouring records share a frame."""

    def __init__(self) -> None:
        self.items: deque[str | bytearray] = deque()
        self.size_bytes = 0
        self.changed = trio.Condition()

    def __repr__(self) -> str:
        return f"<Outbox items={len(self.items)} bytes={self.size_bytes}>"

    async def put_text(self, message: dict[str, Any]) -> None:
        async with self.changed:
            self.items.append(json.dumps(message, ensure_ascii=False))
            self.changed.notify_all()

    async def put_record(self, fetch_id: int, content: bytes) -> None:
        """Queue one record (`uint32 id, uint32 length, bytes`), once there is room for it."""
        async with self.changed:
            while self.size_bytes > MAX_OUTBOX_BYTES:
                await self.changed.wait()
            record = fetch_id.to_bytes(4, "big") + len(content).to_bytes(4, "big") + content
            last = self.items[-1] if self.items else ""
            if isinstance(last, bytearray) and len(last) + len(record) <= MAX_FRAME_BYTES:
                last += record
            else:
                self.items.append(bytearray(record))
            self.size_bytes += len(record)
            self.changed.notify_all()

    async def take(self) -> str | bytes:
        """The next frame, as soon as there is one."""
        async with self.changed:
            while not self.items:
                await self.changed.wait()
            item = self.items.popleft()
            if isinstance(item, str):
                return item
            self.size_bytes -= len(item)
            self.changed.notify_all()
            return bytes(item)


class Chat:
    """The conversation that the person has open in the tab."""

    def __init__(self, session_id: str, mode: str, model: Model) -> None:
        self.session_id, self.mode, self.model = session_id, mode, model
        # The last answer on each side; only `a` has one in direct mode.
        self.answers: dict[contract.Side, str] = {}
        self.text = ""

    @property
    def message_id(self) -> str:
        return self.answers["a"]


class Twin:
    """One tab of one browser. Cookies live as long as the object; `run` keeps it connected to the program."""

    def __init__(
        self,
        arena_url: str,
        bridge_url: str,
        *,
        origin: str = "https://lmarena.ai",
        backoff_seconds: tuple[float, float] = (0.1, 5.0),  # the first wait and the longest
        ssl_context: ssl.SSLContext | None = None,  # for an arena with a certificate of its own
        features: tuple[str, ...] = ("upload",),  # none: as an older script
    ) -> None:
        self.arena_url, self.bridge_url, self.origin = arena_url.rstrip("/"), bridge_url, origin
        self.backoff_seconds = backoff_seconds
        self.features = features
        self.actions: dict[str, str] = {}  # the ids of the page's actions, by name
        self.path = "/"
        self.html: str | None = None  # None: the page is still loading
        self.state: State = "loading"
        self.account: str | None = None
        self.chat: Chat | None = None
        self.loading = trio.Lock()
        self.welcomes = 0
        self.welcomed = trio.Event()
        self.outbox: Outbox | None = None
        self.fetches: dict[int, trio.CancelScope] = {}
        self.navigated: trio.CancelScope | None = None
        self.http = httpx.AsyncClient(
            base_url=self.arena_url,
            # A bare context trusts nobody and costs nothing; httpx's own would read every root certificate.
            transport=SpreadTransport(ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)),
            timeout=httpx.Timeout(None, connect=10.0),
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"<Twin {self.state} welcomes={self.welcomes} fetches={len(self.fetches)}>"

    # The page, as the script sees it.

    async def open_page(self, path: str | None = None) -> State:
        """Load a page of the arena (by default the one that is open), as typing its address or F5 does.

        A connection to the program ends with the page that held it; `run` makes a new one.
        """
        self.path = path or self.path
        async with self.loading:
            self.leave_page()
            await self.load()
        return self.state

    def leave_page(self) -> None:
        self.html = None
        if self.navigated is not None:
            self.navigated.cancel()

    async def load(self) -> None:
        response = await self.http.get(self.path, headers={"accept": "text/html"})
        self.html = response.text
        await self.look()

    async def look(self) -> None:
        """Find out the state from title and cookies, and tell the program when it is another."""
        found = (self.find_state(), self.find_account())
        if found == (self.state, self.account):
            return
        self.state, self.account = found
        if self.outbox is not None:
            await self.outbox.put_text(
                {"type": "state", "state": self.state, "account": self.account, "detail": self.path}
            )

    def find_state(self) -> State:
        if self.html is None:
            return "loading"
        if f"<title>{CHECK_TITLE}</title>" in self.html or "_cf_chl_opt" in self.html:
            return "verification"
        return "ready" if self.find_account() else "sign_in"

    def find_account(self) -> str | None:
        """The lower-case hex SHA-256 of the user id in the auth cookie; None when signed out."""
        token = contract.read_token({cookie.name: cookie.value or "" for cookie in self.http.cookies.jar})
        return hashlib.sha256(str(token.user["id"]).encode()).hexdigest() if token else None

    def find_models(self) -> list[Model]:
        """The page's model list, escaped in a string of an inline script or plain; empty without one."""
        texts = [self.html or ""]
        for literal in re.findall(r'\.push\(\[1,("(?:[^"\\]|\\.)*")\]\)', texts[0]):
            texts.append(json.loads(literal))
        for text in texts:
            key = '"initialModels":'
            place = text.find(key)
            if place >= 0:
                models: list[Model] = json.JSONDecoder().raw_decode(text, place + len(key))[0]
                return models
        return []

    # The person.

    async def pass_check(self) -> State:
        """Press the check's button; the page then loads itself again."""
        (await self.http.post("/cdn-cgi/challenge")).raise_for_status()
        return await self.open_page()

    async def accept_terms(self) -> State:
        """Press the terms' button, which signs an anonymous account in."""
        (await self.http.post("/nextjs-api/sign-up", content="{}")).raise_for_status()
        return await self.open_page()

    async def sign_out(self) -> State:
        (await self.http.post("/nextjs-api/sign-out")).raise_for_status()
        self.chat = None
        return await self.open_page("/")

    async def chat_by_hand(self, model: str, text: str, mode: str = "direct") -> str:
        """Open a new chat as the page does, with a model by id or public name; returns the raw answer."""
        entry = next(m for m in self.find_models() if model in (m["id"], m["publicName"]))
        self.chat = Chat(contract.uuid7(), mode, entry)
        body = {"id": self.chat.session_id, "mode": mode, "modality": contract.modality_of(entry)}
        return await self.send_by_hand("/nextjs-api/stream/create-evaluation", body, text)

    async def follow_up(self, text: str) -> str:
        """Send a further message in the chat that is open."""
        chat = self.open_chat()
        path = f"/nextjs-api/stream/post-to-evaluation/{chat.session_id}"
        return await self.send_by_hand(path, {"id": chat.session_id}, text)

    async def retry_by_hand(self, side: contract.Side = "a") -> str:
        """Press Retry under the last answer, on one side, of the chat that is open."""
        chat = self.open_chat()
        now = datetime.now(UTC).isoformat()
        status = "success" if contract.modality_of(chat.model) == "image" else "pending"
        message = common_fields(chat, contract.uuid7(), "user", chat.text) | {
            "parentMessageIds": [],
            "participantPosition": side,
            "evaluationId": None,
            "status": status,
            "metadata": None,
            "createdAt": now,
            "updatedAt": now,
        }
        pair = f"{chat.session_id}/messages/{chat.answers[side]}"
        path = f"/nextjs-api/stream/retry-evaluation-session-message/{pair}"
        body = {"modelId": chat.model["id"], "messages": [message]}
        return await self.fetch_by_hand("PUT", path, body, side)

    def open_chat(self) -> Chat:
        if self.chat is None:
            raise RuntimeError("no chat is open in this tab")
        return self.chat

    async def send_by_hand(self, path: str, body: dict[str, Any], text: str) -> str:
        """The two calls that bring a new message differ only in their first fields."""
        chat = self.open_chat()
        user_id, chat.text = contract.uuid7(), text
        chat.answers = {side: contract.uuid7() for side in get_args(contract.Side)}
        named = None if chat.mode == "battle" else chat.model["id"]
        user = common_fields(chat, user_id, "user", text) | {"parentMessageIds": [], "modelId": None}
        answer = common_fields(chat, chat.message_id, "assistant", "") | {"parentMessageIds": [user_id]}
        messages = [user, answer | {"modelId": named}]
        body |= {"userMessageId": user_id, "modelAMessageId": chat.message_id, "messages": messages}
        if named:
            body["modelAId"] = named
        if chat.mode != "direct":
            body["modelBMessageId"] = chat.answers["b"]
        if chat.mode == "side-by-side":
            body["modelBId"] = named
        return await self.fetch_by_hand("POST", path, body)

    async def fetch_by_hand(
        self, method: str, path: str, body: dict[str, Any], side: contract.Side = "a"
    ) -> str:
        """Send what the page would; when its answer ends well, tell the program what was captured."""
        chat = self.open_chat()
        headers = {"content-type": contract.CONTENT_TYPE}
        response = await self.http.request(method, path, content=json.dumps(body), headers=headers)
        answer = response.content.decode("utf-8", errors="replace")
        if response.status_code == 200 and contract.ended_well(answer) and self.outbox is not None:
            both = method == "POST" and chat.mode != "direct"
            for reported in get_args(contract.Side) if both else (side,):
                await self.report(chat, reported)
        return answer

    async def report(self, chat: Chat, side: contract.Side) -> None:
        assert self.outbox
        captured = {"session_id": chat.session_id, "message_id": chat.answers[side], "mode": chat.mode}
        if chat.mode != "direct":
            captured["position"] = side
        model_id = None if chat.mode == "battle" else chat.model["id"]
        await self.outbox.put_text(
            {"type": "captured", **captured, "model_id": model_id, "account": self.account}
        )

    # The connection to the program.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the page and stay connected until cancelled; `started` after the program's first welcome.

        Returns only when the program speaks another version of the protocol.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.stay_connected, nursery.cancel_scope)
                await self.welcomed.wait()
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self.http.aclose()

    async def stay_connected(self, running: trio.CancelScope) -> None:
        """Connect again and again, with longer and longer waits; at once after a page load."""
        wait_seconds, longest_seconds = self.backoff_seconds
        while True:
            await self.load_if_due()
            welcomes = self.welcomes
            self.navigated = trio.CancelScope()
            try:
                await self.connect_once(self.navigated)
            except Refused as refused:
                log.warning("the program refused this script: %s", refused)
                running.cancel()
            except (trio_websocket.HandshakeError, trio_websocket.ConnectionClosed, OSError) as error:
                log.info("no connection to the program: %r", error)
            if self.navigated.cancel_called:
                continue
            if self.welcomes > welcomes:
                wait_seconds = self.backoff_seconds[0]
            await trio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, longest_seconds)

    async def load_if_due(self) -> None:
        """Load the page when it is not there. A site that cannot be reached leaves the tab as `loading`."""
        async with self.loading:
            if self.html is not None:
                return
            try:
                await self.load()
            except httpx.TransportError as error:
                log.info("the page does not load: %r", error)

    async def connect_once(self, navigated: trio.CancelScope) -> None:
        """One connection, from hello to its end. Raises `Refused` or what kept it from being made.

        `navigated` ends what runs in the page; the socket lives on for its closing handshake.
        """
        async with trio_websocket.open_websocket_url(
            self.bridge_url,
            extra_headers=[(b"Origin", self.origin.encode())],
            message_queue_size=64,
            max_message_size=MAX_MESSAGE_BYTES,
            receive_buffer_size=None,  # as much as there is, not 4 kB at a time
            connect_timeout=CLOSE_SECONDS * 10,
            disconnect_timeout=CLOSE_SECONDS,
        ) as connection:
            self.outbox, self.fetches = outbox, _ = Outbox(), {}
            try:
                with navigated:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.write, connection, outbox)
                        await self.read(connection, outbox, nursery)
                        nursery.cancel_scope.cancel()
            finally:
                self.outbox, self.fetches = None, {}
            with trio.move_on_after(CLOSE_SECONDS):
                await connection.aclose(1001, "the page is gone")
        log.info("the connection to the program ended: %r", connection.closed)
        if connection.closed is not None and connection.closed.code == WRONG_PROTOCOL:
            raise Refused(connection.closed.reason)

    async def write(self, connection: trio_websocket.WebSocketConnection, outbox: Outbox) -> None:
        with contextlib.suppress(trio_websocket.ConnectionClosed):  # the reader finds it out as well
            while True:
                await connection.send_message(await outbox.take())

    async def read(
        self, connection: trio_websocket.WebSocketConnection, outbox: Outbox, nursery: trio.Nursery
    ) -> None:
        """Say hello and do what the program asks until the connection ends. Relays run beside it."""
        hello = {"protocol": PROTOCOL, "script": SCRIPT_VERSION, "url": self.origin + self.path}
        hello |= {"state": self.state, "account": self.account, "features": [*self.features]}
        await outbox.put_text({"type": "hello", **hello})
        while True:
            try:
                frame = await connection.get_message()
            except trio_websocket.ConnectionClosed:
                return
            message = json.loads(frame)
            match message.get("type"):
                case "welcome":
                    self.welcomes += 1
                    self.welcomed.set()
                    await self.send_models(outbox)
                case "fetch" | "upload":
                    scope = self.fetches[message["id"]] = trio.CancelScope()
                    nursery.start_soon(self.relay, message, scope, outbox)
                case "abort":
                    if message["id"] in self.fetches:
                        self.fetches[message["id"]].cancel()
                case "ping":
                    await outbox.put_text({"type": "pong", "t": message["t"]})
                case "send_models":
                    await self.send_models(outbox)
                case "reload":
                    self.leave_page()
                case unknown:
                    log.info("the program sent an unknown message: %s", unknown)

    async def send_models(self, outbox: Outbox) -> None:
        models = self.find_models()
        if models:
            await outbox.put_text({"type": "models", "models": models})

    async def relay(self, message: dict[str, Any], scope: trio.CancelScope, outbox: Outbox) -> None:
        """One fetch or upload, up to its last frame; cancelling `scope` aborts it at the arena too."""
        fetch_id = message["id"]
        last: dict[str, Any] = {"reason": "aborted", "message": "the program aborted it"}
        try:
            with scope:
                carry_out = self.fetch if message["type"] == "fetch" else self.upload
                last = await carry_out(message, outbox)
        finally:
            self.fetches.pop(fetch_id, None)
        kind = "error" if "reason" in last else "uploaded" if "url" in last else "end"
        await outbox.put_text({"type": kind, "id": fetch_id, **last})

    async def fetch(self, message: dict[str, Any], outbox: Outbox) -> dict[str, str]:
        """Relay head and body; returns the fields of the closing message, none for a complete body."""
        method, path, fetch_id = message["method"], message["path"], message["id"]
        if method not in ("POST", "PUT") or not may_relay(path):
            return {"reason": "refused", "message": f"this script does not relay {method} {path}"}
        headers = {"content-type": contract.CONTENT_TYPE, "accept-encoding": "identity"}
        try:
            async with self.http.stream(method, path, content=message["body"], headers=headers) as response:
                await self.pass_on(response, fetch_id, outbox)
        except httpx.TransportError as error:
            return {"reason": "network", "message": repr(error)}
        return {}

    async def pass_on(self, response: httpx.Response, fetch_id: int, outbox: Outbox) -> None:
        passed = {name: response.headers[name] for name in PASSED_HEADERS if name in response.headers}
        head = {"id": fetch_id, "status": response.status_code, "headers": passed}
        await outbox.put_text({"type": "response", **head})
        if response.is_stream_consumed:
            await outbox.put_record(fetch_id, response.content)
        else:
            async for chunk in response.aiter_raw():
                await outbox.put_record(fetch_id, chunk)

    async def upload(self, message: dict[str, Any], outbox: Outbox) -> dict[str, str]:
        """Bring an image to the site's storage; returns the fields of the closing message."""
        content, content_type = base64.b64decode(message["data"]), message["content_type"]
        try:
            place = await self.call_action("generateUploadUrl", [message["name"], content_type], "uploadUrl")
            headers = {"content-type": content_type}
            request = self.http.build_request("PUT", place["uploadUrl"], content=content, headers=headers)
            request.headers.pop("cookie", None)
            put = await self.http.send(request)
            if not put.is_success:
                raise NotUploaded("network", f"the site's storage answered {put.status_code}")
            return {"url": (await self.call_action("getSignedUrl", [place["key"]], "url"))["url"]}
        except httpx.TransportError as error:
            return {"reason": "network", "message": repr(error)}
        except NotUploaded as end:
            if end.response is None:
                return end.fields
            await self.pass_on(end.response, message["id"], outbox)
            return {}

    async def call_action(self, name: str, values: list[str], field: str) -> dict[str, str]:
        """What an action of the page gives; its id is learned anew, once, when the site does not know it."""
        for _ in range(2):
            if name not in self.actions:
                await self.learn_actions()
            if name not in self.actions:
                break
            headers = {"accept": "text/x-component", "next-action": self.actions[name]}
            headers["content-type"] = contract.CONTENT_TYPE
            response = await self.http.post(self.path, content=json.dumps(values), headers=headers)
            if response.status_code not in (200, 404):
                raise NotUploaded("refused", "the site refused", response)
            for row in re.findall(r"(?m)^[0-9a-f]+:(\{.*)$", response.text):
                given = json.loads(row)
                if field in given.get("data", {}):
                    found: dict[str, str] = given["data"]
                    return found
                if given.get("success") is False:
                    raise NotUploaded("refused", str(given["error"]))
            self.actions.clear()
        raise NotUploaded("not_offered", "the page has no upload that this script knows")

    async def learn_actions(self) -> None:
        """Look for the actions in the page's scripts. There is no browser's cache: all is loaded anew."""
        page = await self.http.get(self.path, headers={"accept": "text/html"})
        for source in re.findall(r'<script src="(/[^"]+)"', page.text):
            script = await self.http.get(source)
            for action, name in re.findall(r'createServerReference\)\("(\w+)",[^"]*"(\w+)"', script.text):
                self.actions[name] = action


def may_relay(path: str) -> bool:
    """Only the streaming calls, and no way out of their folder."""
    plain = unquote(path)
    return path.startswith(ALLOWED_PREFIXES) and ".." not in plain and "\\" not in plain


def common_fields(chat: Chat, message_id: str, role: str, content: str) -> dict[str, Any]:
    """What a message of every call has, as the page sends it by hand."""
    return {
        "id": message_id,
        "role": role,
        "content": content,
        "experimental_attachments": [],
        "participantPosition": "a",
        "evaluationSessionId": chat.session_id,
        "status": "pending",
        "failureReason": None,
    }
