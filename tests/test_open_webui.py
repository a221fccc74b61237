"""Open WebUI's own server in front of the program: its connection check, its models, its chats, its errors.

It is the released package in a virtual environment of its own, which tests/run makes, without its web page:
the tests send what the page sends. One process serves all of them; each points it at its own rig, as a person
does in its settings.
"""

import base64
import os
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    GPT,
    IMAGE,
    SEARCH,
    Rig,
    Stream,
    eventually,
    free_port,
    start,
    turns,
    until,
    user,
    whole,
)

from demo import contract
from demo.arena import Failure, Switches

COMMAND = Path(__file__).parent / "open_webui" / ".venv" / "bin" / "open-webui"
START_SECONDS, STOP_SECONDS = 180, 20
MANY_IMAGES = "nano-banana"  # an image model that takes several images
PNG_URL = "data:image/png;base64," + base64.b64encode(contract.png("seed")).decode()
TASKS = ("title_generation", "tags_generation", "follow_up_generation")
# One answer that suits all of its requests: each takes the key that it asked for.
TASK_ANSWER = '{"title": "标题", "tags": ["one", "two"], "follow_ups": ["And then?"]}'

pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason=f"there is no {COMMAND}")


# ── The server ──────────────────────────────────────────────────────────────────────────────────────────────


def environment(directory: Path) -> dict[str, str]:
    """Nothing of ours but the path; everything that it writes goes into the directory."""
    page, static = directory / "page", directory / "static"
    (page / "static").mkdir(parents=True)  # it wants to copy from there, but runs without a page
    static.mkdir()
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "DATA_DIR": str(directory),
        "STATIC_DIR": str(static),
        "FRONTEND_BUILD_DIR": str(page),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "of the tests",
        "USE_SLIM_DOCKER": "true",  # without the packages that requirements.txt leaves out
        "OFFLINE_MODE": "true",
        "ENABLE_OLLAMA_API": "False",
        "OPENAI_API_BASE_URL": "http://127.0.0.1:9/v1",  # nobody's, until a test sets its own
        "OPENAI_API_KEY": "any",
    }


def wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", verify=False, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise AssertionError(f"Open WebUI does not run:\n{log.read_text(encoding='utf-8')[-4000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the running server."""
    directory = tmp_path_factory.mktemp("open-webui")
    # It does not tell which port it got, so it is told one.
    port, log = free_port(), directory / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [COMMAND, "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory,
            env=environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_healthy(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Chat:
    """An answer that its page began: the server writes it into the stored chat."""

    def __init__(self, http: httpx.AsyncClient, message_id: str, begun: dict[str, Any]) -> None:
        self.http, self.message_id, self.id = http, message_id, begun["chat_id"]
        [self._task] = begun["task_ids"]

    async def stored(self) -> dict[str, Any]:
        chat: dict[str, Any] = (await self.http.get(f"/api/v1/chats/{self.id}")).raise_for_status().json()
        return chat

    async def message(self) -> dict[str, Any]:
        message: dict[str, Any] = (await self.stored())["chat"]["history"]["messages"].get(
            self.message_id, {}
        )
        return message

    async def answer(self) -> dict[str, Any]:
        """The message when all of it is there."""

        async def has_ended() -> bool:
            tasks = (await self.http.get(f"/api/tasks/chat/{self.id}")).raise_for_status().json()
            return not tasks["task_ids"]

        await eventually(has_ended)
        return await self.message()

    async def stop(self) -> None:
        (await self.http.post(f"/api/tasks/stop/{self._task}")).raise_for_status()


class OpenWebUI:
    """Its HTTP API, signed in as its only user."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)

    async def __aenter__(self) -> Self:
        signed_in = await self.http.post("/api/v1/auths/signin", json={"email": "", "password": ""})
        self.http.headers["authorization"] = f"Bearer {signed_in.raise_for_status().json()['token']}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def verify(self, url: str, key: str = "any") -> httpx.Response:
        """What the button beside a connection's address does."""
        return await self.http.post("/openai/verify", json={"url": url, "key": key})

    async def connect(self, rig: Rig, key: str = "any") -> list[str]:
        """Make the rig its only connection; returns the models that its page offers then."""
        connection = {
            "ENABLE_OPENAI_API": True,
            "OPENAI_API_BASE_URLS": [f"{rig.url}/v1"],
            "OPENAI_API_KEYS": [key],
            "OPENAI_API_CONFIGS": {},
        }
        (await self.http.post("/openai/config/update", json=connection)).raise_for_status()
        listed = (await self.http.get("/api/models", params={"refresh": "true"})).raise_for_status().json()
        return [model["id"] for model in listed["data"]]

    async def ask(self, model: str, *, stream: bool) -> httpx.Response:
        """A request of an API client of its own, which is handed through."""
        body = {"model": model, "messages": [user("Hello")], "stream": stream}
        return await self.http.post("/api/chat/completions", json=body)

    async def say(
        self, model: str, text: str = "Hello", *, after: Chat | None = None, tasks: bool = False, **more: Any
    ) -> Chat:
        """What its page sends when a person has written a message."""
        question_id, answer_id = str(uuid.uuid4()), str(uuid.uuid4())
        question = user(text) | {
            "id": question_id,
            "parentId": after and after.message_id,
            "childrenIds": [answer_id],
            "timestamp": int(time.time()),
            "models": [model],
        }
        body = {
            "stream": True,
            "model": model,
            "params": {},
            "features": {},
            "session_id": "of the tests",
            "id": answer_id,
            "message_ids": [{"model_id": model, "message_id": answer_id, "modelIdx": 0}],
            "parent_id": after and after.message_id,
            "user_message": question | more,
            "background_tasks": dict.fromkeys(TASKS, tasks),
        }
        if after is not None:
            body["chat_id"] = after.id
        response = await self.http.post("/api/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return Chat(self.http, answer_id, response.json())


@pytest.fixture
async def webui(server: str) -> AsyncIterator[OpenWebUI]:
    async with OpenWebUI(server) as webui:
        yield webui


# ── Connections ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
async def test_its_connection_check_accepts_our_address(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI, path: str
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, IMAGE), connected=False)
    response = await webui.verify(rig.url + path)
    assert response.status_code == 200, response.text
    assert [model["id"] for model in response.json()["data"]] == [CLAUDE, IMAGE]
    assert await webui.connect(rig) == [CLAUDE, IMAGE]


async def test_its_connection_check_shows_why_a_key_or_an_address_is_wrong(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(
        nursery, tmp_path, models=(CLAUDE,), tables={"server": {"api_key": "right"}}, connected=False
    )
    for url, key, status, words in (
        (f"{rig.url}/v1", "wrong", 401, "The API key is missing or wrong."),
        (f"{rig.url}/v1", "", 401, "The API key is missing or wrong."),
        (rig.url, "right", 404, "Not Found: GET /models"),
    ):
        response = await webui.verify(url, key)
        assert response.status_code == status, response.text
        assert words in response.json()["error"]["message"]  # which is what its page shows
    assert (await webui.verify(f"{rig.url}/v1", "right")).status_code == 200
    assert await webui.connect(rig, "wrong") == []
    assert await webui.connect(rig, "right") == [CLAUDE]


async def test_its_own_api_hands_our_answers_and_errors_through(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    switches = Switches(failures={DEEPSEEK: Failure()})
    rig = await start(nursery, tmp_path, models=(CLAUDE, DEEPSEEK), switches=switches)
    await webui.connect(rig)
    text = f"[{CLAUDE}] Hello"
    assert whole(await webui.ask(CLAUDE, stream=False)).choices[0].message.content == text
    streamed = Stream((await webui.ask(CLAUDE, stream=True)).text)
    assert (streamed.text, streamed.finish_reasons, streamed.has_done) == (text, ["stop"], True)
    for stream in (False, True):
        response = await webui.ask(DEEPSEEK, stream=stream)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_error"


# ── Chats of its page ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_first_message_brings_an_answer_a_title_tags_and_follow_ups(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(answers={"*": [TASK_ANSWER]}))
    await webui.connect(rig)
    chat = await webui.say(CLAUDE, "你好", tasks=True)
    answer = await chat.answer()
    assert answer["content"] == TASK_ANSWER
    assert "error" not in answer
    await until(lambda: len(rig.calls) == 4)  # the message and three tasks, all of them answered by the model
    assert [("user", "你好")] in [turns(seen) for seen in rig.calls]

    async def has_all() -> bool:
        stored, answer = await chat.stored(), await chat.message()
        return (stored["title"], stored["meta"].get("tags"), answer.get("followUps")) == (
            "标题",
            ["one", "two"],
            ["And then?"],
        )

    await eventually(has_all)
    await until(lambda: [seen.outcome for seen in rig.calls] == ["complete"] * 4)


async def test_a_second_message_brings_the_whole_conversation(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    await webui.connect(rig)
    chat = await webui.say(CLAUDE, "One")
    await chat.answer()
    second = await webui.say(CLAUDE, "Two", after=chat)
    assert (await second.answer())["content"] == f"[{CLAUDE}] Two"
    assert turns(rig.calls[1]) == [("user", "One"), ("assistant", f"[{CLAUDE}] One"), ("user", "Two")]


async def test_a_picture_in_a_message_reaches_the_model(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(nursery, tmp_path, models=(GPT, CLAUDE), filled=True)
    await webui.connect(rig)
    pictures = [{"type": "image", "url": PNG_URL}]
    chat = await webui.say(GPT, "Look", files=pictures)
    assert (await chat.answer())["content"] == f"[{GPT}] Look"
    [attachment] = rig.calls[0].body["messages"][0]["experimental_attachments"]
    assert attachment["url"] == PNG_URL
    blind = await webui.say(CLAUDE, "Look", files=pictures)
    assert "takes no image" in (await blind.answer())["error"]["content"]
    assert len(rig.calls) == 1


async def test_reasoning_and_sources_are_shown_as_such(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(nursery, tmp_path, models=(SEARCH,), switches=Switches(reasoning=True))
    await webui.connect(rig)
    answer = await (await webui.say(SEARCH)).answer()
    assert answer["content"] == f"[{SEARCH}] Hello"
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][0]["content"][0]["text"] == "Looking at the question…"
    assert [source["source"]["url"] for source in answer["sources"]] == [
        "https://example.com/one",
        "https://example.com/two?q=1&r=2",
    ]


@pytest.mark.parametrize("keepalive", ["chunk", "comment"])
async def test_keep_alives_leave_no_trace_in_an_answer(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI, keepalive: str
) -> None:
    tables = {"requests": {"keepalive": keepalive, "commit_after_seconds": 0.05, "keepalive_seconds": 0.05}}
    switches = Switches(latency_seconds=0.5, line_delay_seconds=0.1)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, switches=switches)
    await webui.connect(rig)
    answer = await (await webui.say(CLAUDE)).answer()
    assert answer["content"] == f"[{CLAUDE}] Hello"
    assert "error" not in answer


async def test_an_answer_that_breaks_off_keeps_its_beginning_and_shows_the_error(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    switches = Switches(answers={"*": ["One ", "two ", "three"]}, cut_after_lines=2)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches)
    await webui.connect(rig)
    answer = await (await webui.say(CLAUDE)).answer()
    assert answer["content"].strip() == "One two"
    assert "The site's answer was cut off." in answer["error"]["content"]["message"]


async def test_a_refused_message_shows_why(nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(failures={"*": Failure()}))
    await webui.connect(rig)
    answer = await (await webui.say(CLAUDE)).answer()
    assert answer["content"] == ""
    assert "The site failed (status 500)" in answer["error"]["content"]


async def test_its_stop_button_ends_the_answer_at_the_site(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    switches = Switches(answers={"*": ["One ", "two ", "three"]}, hang_after_lines=2)
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=switches)
    await webui.connect(rig)
    chat = await webui.say(CLAUDE)

    async def has_begun() -> bool:
        return "One" in str((await chat.message()).get("content"))

    await eventually(has_begun)
    await chat.stop()
    await until(lambda: [seen.outcome for seen in rig.calls] == ["aborted"])


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────


async def set_pictures(webui: OpenWebUI, rig: Rig, made_by: str, edited_by: str) -> None:
    """The settings of its buttons for pictures. The rig may fetch from its site, which is on this machine."""
    rig.program.media.site_origins.add(rig.arena_url)
    settings = (await webui.http.get("/api/v1/images/config")).raise_for_status().json()
    ours = {
        "ENABLE_IMAGE_GENERATION": True,
        "IMAGE_GENERATION_ENGINE": "openai",
        "IMAGE_GENERATION_MODEL": made_by,
        "IMAGES_OPENAI_API_BASE_URL": f"{rig.url}/v1",
        "IMAGES_OPENAI_API_KEY": "any",
        "ENABLE_IMAGE_EDIT": True,
        "IMAGE_EDIT_ENGINE": "openai",
        "IMAGE_EDIT_MODEL": edited_by,
        "IMAGES_EDIT_OPENAI_API_BASE_URL": f"{rig.url}/v1",
        "IMAGES_EDIT_OPENAI_API_KEY": "any",
    }
    (await webui.http.post("/api/v1/images/config/update", json=settings | ours)).raise_for_status()


async def picture_of(webui: OpenWebUI, response: httpx.Response) -> bytes:
    """The picture that it stored for its page."""
    assert response.status_code == 200, response.text
    [picture] = response.json()
    stored = await webui.http.get(picture["url"])
    assert stored.headers["content-type"] == "image/png"
    return stored.content


async def test_it_makes_and_edits_pictures_with_our_models(
    nursery: trio.Nursery, tmp_path: Path, webui: OpenWebUI
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY_IMAGES))
    await set_pictures(webui, rig, IMAGE, MANY_IMAGES)
    made = await webui.http.post("/api/v1/images/generations", json={"prompt": "A cat"})
    assert (await picture_of(webui, made)).startswith(b"\x89PNG")
    for images in (PNG_URL, [PNG_URL, PNG_URL]):
        edited = await webui.http.post("/api/v1/images/edit", json={"prompt": "A dog", "image": images})
        assert (await picture_of(webui, edited)).startswith(b"\x89PNG")
    assert [turns(seen)[-1][1] for seen in rig.calls] == ["A cat", "A dog", "A dog"]
    assert [len(seen.body["messages"][0]["experimental_attachments"]) for seen in rig.calls] == [0, 1, 2]
