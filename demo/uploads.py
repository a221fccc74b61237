"""The upload flow of the stand-in arena: off unless a switch says otherwise.

It is no part of the arena contract. It is as public tools describe the site in 2026: the page calls one
action of its server, which gives an address to put an image at, puts the image there, and calls another one,
which gives the address under which the site has it. An action is a POST to the page's own address that names
it in `next-action`; its id changes with every deployment, and stands beside its name in a script of the page.
"""

import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
import trio

Step = Literal["place", "put", "address"]
NAMES: dict[Step, str] = {"place": "generateUploadUrl", "address": "getSignedUrl"}
STORAGE = "/storage/"


class UploadSwitches(msgspec.Struct, forbid_unknown_fields=True):
    """What the flow can be told to do."""

    offered: bool = False
    named: bool = True  # False: the script does not tell the actions' names
    deployment: int = 1  # actions of another one are not known: 404
    status: dict[Step, int] = {}  # an answer in place of the real one
    status_times: int | None = None  # after so many it is over; None: it stays
    headers: dict[str, str] = {}  # of that answer
    place: str = ""  # where to put it, in place of the storage
    words: str = ""  # the action is answered, and refuses with these
    hang: Step | None = None  # this step is answered no more, until the client leaves


class UploadSeen(msgspec.Struct):
    """One call of the flow as it arrived."""

    step: Step
    account: str | None
    has_cookies: bool
    arrived: float = 0.0  # by Trio's clock
    values: list[str] = []  # of an action
    content_type: str = ""
    digest: str = ""  # of what was put: SHA-256
    size_bytes: int = 0
    outcome: Literal["running", "done", "refused", "aborted"] = "running"


class Uploads:
    """The storage, and the actions in front of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.record: list[UploadSeen] = []
        self.answered = 0

    def __repr__(self) -> str:
        return f"<Uploads files={len(self.files)} calls={len(self.record)}>"

    def forget(self) -> None:
        self.files.clear()
        self.record.clear()
        self.answered = 0

    def action_id(self, step: Step, deployment: int) -> str:
        """42 hexadecimal digits, as Next.js has them."""
        return hashlib.sha256(f"{step} {deployment}".encode()).hexdigest()[:42]

    def script(self, template: str, wanted: UploadSwitches) -> str:
        """The page's script of this deployment."""
        steps: tuple[tuple[Step, str], ...] = (("place", "PUT"), ("address", "GET"))
        for step, place in steps:
            action = self.action_id(step, wanted.deployment)
            template = template.replace("{{" + place + "_ACTION}}", action)
            template = template.replace("{{" + place + "_NAME}}", NAMES[step] if wanted.named else "")
        return template

    def step_of(
        self, method: str, path: str, action: str, deployment: int
    ) -> Step | Literal["unknown"] | None:
        """Which step a request is; "unknown" for an action of another deployment, None for what is none."""
        if method == "PUT" and path.startswith(STORAGE):
            return "put"
        if method != "POST" or not action:
            return None
        known: dict[str, Step] = {self.action_id(step, deployment): step for step in NAMES}
        return known.get(action, "unknown")

    async def answer(
        self, seen: UploadSeen, path: str, origin: str, body: bytes, wanted: UploadSwitches
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the answer to a step."""
        if wanted.hang == seen.step:
            await trio.sleep_forever()
        if seen.step in wanted.status and (
            wanted.status_times is None or self.answered < wanted.status_times
        ):
            self.answered += 1
            seen.outcome = "refused"
            return wanted.status[seen.step], b'{"error":"not now"}', wanted.headers
        if seen.step == "put":
            self.files[path.removeprefix(STORAGE)] = body
            seen.digest, seen.size_bytes = hashlib.sha256(body).hexdigest(), len(body)
            seen.outcome = "done"
            return 200, b"", {}
        seen.values = json.loads(body)
        seen.outcome = "refused" if wanted.words else "done"
        return 200, self.rows(seen, origin, wanted), {"content-type": "text/x-component"}

    def rows(self, seen: UploadSeen, origin: str, wanted: UploadSwitches) -> bytes:
        """What an action gives, in the form of Next.js."""
        given: dict[str, Any] = {"success": False, "error": wanted.words}
        if not wanted.words and seen.step == "place":
            key = f"{uuid.uuid4()}-{seen.values[0]}"
            place = wanted.place or f"{origin}{STORAGE}{key}"
            given = {"success": True, "data": {"uploadUrl": place, "key": key}}
        elif not wanted.words:
            [key] = seen.values
            is_there = key in self.files
            url = f"{origin}{STORAGE}{key}?X-Amz-Expires=3600&X-Amz-Signature=stand-in"
            given = (
                {"success": is_there, "data": {"url": url}}
                if is_there
                else {"success": False, "error": "no file"}
            )
        return f'0:{{"a":"$@1","f":"","b":"stand-in"}}\n1:{json.dumps(given)}\n'.encode()


async def answer_or_notice(
    seen: UploadSeen, receive: Callable[[], Awaitable[dict[str, Any]]], answer: Callable[[], Awaitable[None]]
) -> None:
    """Answer a step, unless its client leaves before that."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if seen.outcome == "running":
                seen.outcome = "aborted"
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await answer()
        nursery.cancel_scope.cancel()
