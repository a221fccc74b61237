"""The site's rules as values: what a call must look like, what an answer looks like, what a cookie holds.

Everything here is pure: bodies in, structs or a `Refusal` out. The field names are the site's own (camel case
on the wire). Where a rule comes from is named by the heading of the arena contract it stands under.
"""

import base64
import binascii
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec

AUTH_COOKIE = "arena-auth-prod-v1"
CLEARANCE_COOKIE = "cf_clearance"
CONTENT_TYPE = "text/plain;charset=UTF-8"
CHECK_TITLE = "Just a moment..."
MAX_ATTACHMENT_BYTES = 5 * 2**20  # "up to about 5 MB" ("Retrying the last message")

Uuid = Annotated[
    str, msgspec.Meta(pattern="^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$")
]
Mode = Literal["direct", "side-by-side", "battle"]
Side = Literal["a", "b"]
Modality = Literal["chat", "image", "video", "search"]
Kind = Literal["create", "retry", "post"]
Model = dict[str, Any]  # an entry of models.json: id, publicName, organization, provider, capabilities


class Refusal(Exception):
    """The site answers with an error status and a JSON body `{"error": reason}`."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})


def uuid7() -> str:
    """A UUID of version 7 (48 bits of milliseconds, then random bits), as the site's own page makes them."""
    value = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    return str(uuid.UUID(int=value & ~(0x3 << 62) | 2 << 62))


# ── Models ──────────────────────────────────────────────────────────────────────────────────────────────────


def modality_of(model: Model) -> Modality:
    """What the model gives back, in the words of the create call's `modality`."""
    output = model["capabilities"]["outputCapabilities"]
    if output.get("video"):
        return "video"
    if output.get("image"):
        return "image"
    return "search" if output.get("search") else "chat"


def image_input(model: Model) -> dict[str, Any] | None:
    """None when the model takes no image, else its conditions: `requiresUpload`, `multipleImages`."""
    image = model["capabilities"]["inputCapabilities"].get("image")
    if not image:
        return None
    return image if isinstance(image, dict) else {}


# ── What a call must look like ("Opening a conversation", "Retrying the last message with other content") ───


class Attachment(msgspec.Struct):
    name: str
    contentType: str
    url: str


class Message(msgspec.Struct, rename="camel"):
    """The fields a message of either call must have; each call adds its own."""

    id: Uuid
    role: Literal["user", "assistant", "system"]
    content: str
    parent_message_ids: list[Uuid]
    participant_position: Side
    evaluation_session_id: Uuid
    status: Literal["pending", "success"]
    failure_reason: None
    attachments: list[Attachment] = msgspec.field(name="experimental_attachments")


class CreateMessage(Message, kw_only=True, rename="camel"):
    model_id: str | None


class RetryMessage(Message, kw_only=True, rename="camel"):
    evaluation_id: None
    metadata: None
    created_at: datetime
    updated_at: datetime


class UserMessage(msgspec.Struct):
    """The later form of a new message: it has no ids of its own."""

    content: str
    metadata: dict[str, Any]
    attachments: list[Attachment] = msgspec.field(name="experimental_attachments")


class CreateBody(msgspec.Struct, rename="camel"):
    id: Uuid
    mode: Mode
    user_message_id: Uuid
    model_a_message_id: Uuid
    modality: Modality
    model_a_id: str | None = None
    model_b_id: str | None = None
    model_b_message_id: Uuid | None = None
    messages: list[CreateMessage] | None = None
    user_message: UserMessage | None = None


class PostBody(msgspec.Struct, rename="camel"):
    user_message_id: Uuid
    model_a_message_id: Uuid
    id: Uuid | None = None
    model_a_id: str | None = None
    model_b_message_id: Uuid | None = None
    messages: list[CreateMessage] | None = None
    user_message: UserMessage | None = None


class RetryBody(msgspec.Struct, rename="camel"):
    model_id: str
    messages: list[RetryMessage]


Body = TypeVar("Body", bound=msgspec.Struct)


class Call(msgspec.Struct):
    """A call that is well formed. `turns` are the messages without the answer's empty place."""

    kind: Kind
    session_id: str
    message_id: str
    turns: list[tuple[str, str]]  # role, content
    images: list[int]  # how many images each turn brings
    mode: Mode | None = None
    modality: Modality | None = None
    model_id: str | None = None
    model_b_id: str | None = None
    message_b_id: str | None = None
    statuses: list[str] = []
    side: Side = "a"  # whose answer is retried, where there are two

    @property
    def last_user_text(self) -> str:
        return next((content for role, content in reversed(self.turns) if role == "user"), "")


def decode_body(raw: bytes, form: type[Body]) -> Body:
    """The body as that form, else 400 with msgspec's reason, which names the place."""
    try:
        return msgspec.json.decode(raw, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, str(error)) from error


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise Refusal(400, reason)


def check_attachments(attachments: Sequence[Attachment]) -> int:
    """How many images; 400 for what is no attachment of the contract, 413 for one that is too large."""
    for attachment in attachments:
        require(bool(attachment.name), "an attachment needs a name")
        require(
            attachment.contentType.startswith("image/"),
            f"attachments must be images: {attachment.contentType!r}",
        )
        if attachment.url.startswith("data:"):
            check_data_url(attachment)
        else:
            require(attachment.url.startswith(("https://", "http://")), "an attachment's url is no address")
    return len(attachments)


def check_data_url(attachment: Attachment) -> None:
    head, comma, encoded = attachment.url.partition(",")
    require(
        bool(comma) and head == f"data:{attachment.contentType};base64",
        f"not the promised data: {head[:60]!r}",
    )
    if len(encoded) * 3 // 4 > MAX_ATTACHMENT_BYTES + 2:
        raise Refusal(413, f"attachment larger than {MAX_ATTACHMENT_BYTES} bytes")
    try:
        base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"the attachment's base64 is broken: {error}") from error


def check_chain(
    messages: Sequence[Message], session_id: str, mode: Mode, parents: list[str], side: Side = "a"
) -> None:
    """Rules that hold for the messages of every call; `parents` are those of the first message.

    Where there are two models every message of a retry has the `side` of the one that is retried, as public
    tools send it: the contract says nothing of it.
    """
    require(bool(messages), "messages must not be empty")
    require(len({message.id for message in messages}) == len(messages), "two messages have the same id")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        require(
            message.evaluation_session_id == session_id, f"{where}.evaluationSessionId is another session"
        )
        require(message.parent_message_ids == parents, f"{where}.parentMessageIds must be {parents}")
        position = "b" if message.role == "system" and mode == "direct" else side
        if message.role != "assistant" or mode == "direct":
            require(
                message.participant_position == position, f'{where}.participantPosition must be "{position}"'
            )
        require(message.role != "user" or message.content != "", f"{where}.content is empty")
        parents = [message.id]


def read_create(raw: bytes) -> Call:
    """A well-formed create call in either form, or a `Refusal`."""
    body = decode_body(raw, CreateBody)
    if body.mode == "battle":
        require(body.model_a_id is None, "a battle does not name its models")
    else:
        require(body.model_a_id is not None, "modelAId is missing")
    if body.mode != "direct":
        require(body.model_b_message_id is not None, f"modelBMessageId is missing in mode {body.mode}")
    if body.mode == "side-by-side":
        require(body.model_b_id is not None, "modelBId is missing")
    ids = [body.id, body.user_message_id, body.model_a_message_id]
    require(len(set(ids)) == len(ids), "the three ids must differ")
    call = Call("create", body.id, body.model_a_message_id, [], [], body.mode, body.modality, body.model_a_id)
    call.model_b_id, call.message_b_id = body.model_b_id, body.model_b_message_id
    add_new_messages(call, body, body.mode)
    return call


def read_post(raw: bytes, session_id: str, mode: Mode) -> Call:
    """A well-formed further message to that conversation, or a `Refusal`."""
    body = decode_body(raw, PostBody)
    require(body.id in (None, session_id), "id is another session")
    call = Call("post", session_id, body.model_a_message_id, [], [], mode, model_id=body.model_a_id)
    call.message_b_id = body.model_b_message_id
    add_new_messages(call, body, mode)
    return call


def add_new_messages(call: Call, body: CreateBody | PostBody, mode: Mode) -> None:
    """Fill `turns`, `images` and `statuses` from whichever of the two forms was sent."""
    require((body.messages is None) != (body.user_message is None), "send either messages or userMessage")
    if body.user_message is not None:
        require(body.user_message.content != "", "userMessage.content is empty")
        call.turns = [("user", body.user_message.content)]
        call.images = [check_attachments(body.user_message.attachments)]
        return
    messages = body.messages or []
    answers = [m for m in messages if m.id in (call.message_id, call.message_b_id)]
    turns = [m for m in messages if m not in answers]
    # A further message may name the answer it follows; the contract does not say whether it must.
    parents = turns[0].parent_message_ids[:1] if turns and call.kind == "post" else []
    check_chain([*turns, *answers[:1]], call.session_id, mode, parents)
    require(bool(turns) and messages[: len(turns)] == turns, "the answer's message must come last")
    require(
        turns[-1].id == body.user_message_id and turns[-1].role == "user", "the message before it must be U"
    )
    require(bool(answers) and answers[0].id == call.message_id, "the last message must be M")
    for answer in answers:
        require(answer.role == "assistant" and answer.content == "", "M must be an empty assistant message")
        require(answer.status == "pending", 'M must be "pending"')
        require(answer.model_id == call.model_id, "M's modelId is another model")
    fill_turns(call, turns)


def read_retry(raw: bytes, session_id: str, message_id: str, mode: Mode, side: Side = "a") -> Call:
    """A well-formed retry of that pair, whose message stands on that side, or a `Refusal`."""
    body = decode_body(raw, RetryBody)
    check_chain(body.messages, session_id, mode, [], side)
    call = Call("retry", session_id, message_id, [], [], mode, model_id=body.model_id)
    fill_turns(call, body.messages)
    return call


def fill_turns(call: Call, turns: Sequence[Message]) -> None:
    call.turns = [(turn.role, turn.content) for turn in turns]
    call.images = [check_attachments(turn.attachments) for turn in turns]
    call.statuses = [turn.status for turn in turns]


def check_model_takes(call: Call, model: Model) -> None:
    """Rules that need the model: its modality, its images, the statuses of its messages."""
    modality = modality_of(model)
    require(
        call.modality in (None, modality), f'this model\'s modality is "{modality}", not "{call.modality}"'
    )
    conditions = image_input(model)
    if conditions is None:
        require(not any(call.images), f"{model['publicName']} takes no image")
    else:
        require(
            not conditions.get("requiresUpload") or any(call.images), f"{model['publicName']} needs an image"
        )
        single = conditions.get("multipleImages") is False
        require(not single or call.images[-1] <= 1, f"{model['publicName']} takes one image")
    check_statuses(call, modality)


def check_statuses(call: Call, modality: Modality) -> None:
    """The last message is pending and earlier ones success; for image models every one is success.

    The contract shows a create call only with `pending`, so an image model's last may be either there.
    """
    if not call.statuses:
        return
    *earlier, last = call.statuses
    require(all(status == "success" for status in earlier), 'every message before the last must be "success"')
    if modality != "image":
        require(last == "pending", 'the last message must be "pending"')
    elif call.kind == "retry":
        require(last == "success", 'an image model\'s last message must be "success" too')


# ── What an answer looks like ("The answer") ────────────────────────────────────────────────────────────────


class Lines(msgspec.Struct):
    """An answer's lines, each with its newline. Only `content` counts where a switch stops after N lines."""

    opening: list[str]
    content: list[str]
    ending: list[str]


def pieces_of(text: str) -> list[str]:
    """Cut a text into at most 16 pieces of at least 8 characters, so that a long echo stays cheap."""
    size = max(8, -(-len(text) // 16))
    return [text[start : start + size] for start in range(0, len(text), size)]


def text_lines(prefix: str, pieces: Sequence[str]) -> list[str]:
    """One line per piece; every other one escapes what is not ASCII, as a decoder must bear both."""
    return [f"{prefix}:{json.dumps(p, ensure_ascii=place % 2 == 0)}\n" for place, p in enumerate(pieces)]


def source_line(participant: str, sources: Sequence[Mapping[str, str]]) -> str:
    delta = json.dumps({"source": list(sources)})
    return f"{participant}c:{json.dumps({'toolCallId': uuid7(), 'argsTextDelta': delta})}\n"


def media_lines(participant: str, modality: Modality, media_url: str) -> list[str]:
    """One image, or a video after two heartbeats; `media_url` lacks the ending."""
    if modality == "image":
        media = json.dumps([{"type": "image", "image": f"{media_url}.png", "mimeType": "image/png"}])
        return [f"{participant}2:{media}\n"]
    media = json.dumps([{"type": "video", "url": f"{media_url}.mp4", "mimeType": "video/mp4"}])
    return [f'{participant}2:[{{"type":"heartbeat"}}]\n'] * 2 + [f"{participant}2:{media}\n"]


def ending_lines(participant: str, finish_reason: str, usage: Any) -> list[str]:
    """The step mark and the end. `usage`: a mapping, None (sent as null) or `msgspec.UNSET` (left out)."""
    end = (
        {"finishReason": finish_reason}
        if usage is msgspec.UNSET
        else {"finishReason": finish_reason, "usage": usage}
    )
    step = json.dumps({"finishReason": finish_reason, "isContinued": False})
    return [f"{participant}e:{step}\n", f"{participant}d:{json.dumps(end)}\n"]


def ended_well(answer: str) -> bool:
    """True when the answer's lines hold its end, and neither an error nor the finish reason `error`."""
    ended = False
    for line in answer.split("\n"):  # not splitlines: U+2028 may stand inside a piece
        if line.startswith(("a3:", "b3:")):
            return False
        if line.startswith(("ad:", "bd:")):
            ended = json.loads(line[3:]).get("finishReason") != "error"
    return ended


def png(seed: str) -> bytes:
    """A valid picture of 64 by 64 pixels in one colour, which depends on the seed."""
    colour = zlib.crc32(seed.encode()).to_bytes(4, "big")[:3]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = (b"\0" + colour * 64) * 64
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def mp4() -> bytes:
    """The first boxes of an MP4 file: enough for a download, not for a player."""
    brand = b"isom\0\0\2\0isomiso2mp41"
    return struct.pack(">I", 8 + len(brand)) + b"ftyp" + brand + struct.pack(">I", 8) + b"mdat"


# ── Cookies and the page's model list ("Pages and cookies") ─────────────────────────────────────────────────


class Token(msgspec.Struct):
    """What the auth cookie holds, as far as anyone reads it."""

    access_token: str
    refresh_token: str
    expires_at: int
    user: dict[str, Any]


def new_token(account: str, expires_at: int) -> Token:
    def part(content: Mapping[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    signature = base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    head = part({"alg": "HS256", "typ": "JWT"})
    claims = part({"sub": account, "exp": expires_at, "role": "authenticated", "is_anonymous": True})
    # A name outside ASCII, because the base64 of real accounts is that of UTF-8.
    user = {"id": account, "is_anonymous": True, "user_metadata": {"name": "访客"}}
    return Token(f"{head}.{claims}.{signature}", os.urandom(9).hex(), expires_at, user)


def cookie_value(token: Token) -> str:
    return "base64-" + base64.b64encode(msgspec.json.encode(token)).decode()


def read_token(cookies: Mapping[str, str]) -> Token | None:
    """The token in the auth cookie, whole or split over `.0`, `.1`, ...; None when there is none to read."""
    value = cookies.get(AUTH_COOKIE, "")
    part = 0
    while not cookies.get(AUTH_COOKIE) and f"{AUTH_COOKIE}.{part}" in cookies:
        value += cookies[f"{AUTH_COOKIE}.{part}"]
        part += 1
    try:
        encoded = value.removeprefix("base64-").replace("-", "+").replace("_", "/")
        return msgspec.json.decode(base64.b64decode(encoded + "=" * (-len(encoded) % 4)), type=Token)
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError):
        return None


def models_script(models: Sequence[Model], *, escaped: bool) -> str:
    """The inline script that carries the model list, escaped inside a JavaScript string or plain."""
    first = json.dumps(models[0]["id"] if models else None)
    listed = json.dumps(list(models), ensure_ascii=False, separators=(",", ":"))
    data = f'{{"initialModels":{listed},"initialModelAId":{first},"initialModelBId":null}}'
    if escaped:
        row = json.dumps(f'7:["$","$L1c",null,{data}]\n', ensure_ascii=False)
        script = f"self.__next_f=self.__next_f||[];self.__next_f.push([1,{row}])"
    else:
        script = f"self.__arena_data={data};"
    return script.replace("<", "\\u003c")
