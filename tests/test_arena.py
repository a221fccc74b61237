"""The stand-in arena keeps the arena contract: what it refuses, what it answers, what it notes down."""

import base64
import copy
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from demo import contract
from demo.arena import Arena, serve

ROOT = Path(__file__).parent.parent
API = "/nextjs-api/stream"
CREATE = f"{API}/create-evaluation"
PNG_URL = "data:image/png;base64," + base64.b64encode(contract.png("x")).decode()
Change = Callable[[dict[str, Any]], None]


def entry(number: int, name: str, image: Any, output: str) -> dict[str, Any]:
    takes = {"text": True} | ({"image": image} if image else {})
    capabilities = {"inputCapabilities": takes, "outputCapabilities": {output: True}}
    return {"id": f"00000000-0000-4000-8000-{number:012}", "publicName": name, "capabilities": capabilities}


TEXT, SEES, PAINTS = (
    entry(1, "text", None, "text"),
    entry(2, "sees", True, "text"),
    entry(3, "paints", None, "image"),
)
EDITS = entry(4, "edits", {"requiresUpload": True, "multipleImages": False}, "image")
FILMS, SEARCHES = entry(5, "films", None, "video"), entry(6, "searches", None, "search")
MODALITIES = {"text": "chat", "sees": "chat", "paints": "image", "edits": "image", "films": "video"}


class Browser:
    """A signed-in browser at the arena's address."""

    def __init__(self, arena: Arena, url: str) -> None:
        self.arena = arena
        self.http = httpx.AsyncClient(base_url=url, verify=False, trust_env=False, timeout=None)

    async def sign_in(self) -> None:
        await self.http.post("/nextjs-api/sign-up", content="{}")

    async def call(self, method: str, path: str, body: Any, **headers: str) -> httpx.Response:
        given = {"content-type": contract.CONTENT_TYPE} | headers
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        return await self.http.request(method, path, content=content, headers=given)

    async def create(self, body: dict[str, Any]) -> httpx.Response:
        return await self.call("POST", CREATE, body)

    async def retry(self, created: dict[str, Any], body: dict[str, Any] | None = None) -> httpx.Response:
        body = body or retry_body(created, ("user", "again"))
        return await self.call("PUT", retry_path(created), body)

    async def opened(self, model: dict[str, Any] = TEXT) -> dict[str, Any]:
        body = create_body(model)
        assert (await self.create(body)).status_code == 200
        return body


@asynccontextmanager
async def site(*, signed_in: bool = True) -> AsyncIterator[Browser]:
    arena = Arena([TEXT, SEES, PAINTS, EDITS, FILMS, SEARCHES])
    async with trio.open_nursery() as nursery:
        browser = Browser(arena, await nursery.start(partial(serve, arena)))
        if signed_in:
            await browser.sign_in()
        yield browser
        await browser.http.aclose()
        nursery.cancel_scope.cancel()


def image(url: str = PNG_URL) -> dict[str, str]:
    return {"name": "a.png", "contentType": "image/png", "url": url}


def create_body(model: dict[str, Any] = TEXT, text: str = "Hi", *images: dict[str, str]) -> dict[str, Any]:
    session, user, answer = contract.uuid7(), contract.uuid7(), contract.uuid7()
    common = {
        "evaluationSessionId": session,
        "status": "pending",
        "failureReason": None,
        "participantPosition": "a",
    }
    first: dict[str, Any] = {
        "id": user,
        "role": "user",
        "content": text,
        "parentMessageIds": [],
        "modelId": None,
    }
    second = {
        "id": answer,
        "role": "assistant",
        "content": "",
        "parentMessageIds": [user],
        "modelId": model["id"],
    }
    return {
        "id": session,
        "mode": "direct",
        "modelAId": model["id"],
        "userMessageId": user,
        "modelAMessageId": answer,
        "modality": MODALITIES.get(model["publicName"], "search"),
        "messages": [
            first | common | {"experimental_attachments": list(images)},
            second | common | {"experimental_attachments": []},
        ],
    }


def later_form(body: dict[str, Any]) -> dict[str, Any]:
    body = copy.deepcopy(body)
    first = body.pop("messages")[0]
    kept = {name: first[name] for name in ("content", "experimental_attachments")}
    return body | {"userMessage": kept | {"metadata": {}}}


def retry_path(created: dict[str, Any]) -> str:
    return f"{API}/retry-evaluation-session-message/{created['id']}/messages/{created['modelAMessageId']}"


def retry_body(created: dict[str, Any], *turns: tuple[str, str]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for role, content in turns:
        last, image_model = len(messages) == len(turns) - 1, created["modality"] == "image"
        messages.append(
            {
                "id": contract.uuid7(),
                "role": role,
                "content": content,
                "experimental_attachments": [],
                "parentMessageIds": [messages[-1]["id"]] if messages else [],
                "participantPosition": "b" if role == "system" else "a",
                "evaluationId": None,
                "evaluationSessionId": created["id"],
                "status": "pending" if last and not image_model else "success",
                "failureReason": None,
                "metadata": None,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "updatedAt": "2026-01-01T00:00:00.000Z",
            }
        )
    return {"modelId": created["modelAId"], "messages": messages}


def text_of(response: httpx.Response, prefix: str = "a0") -> str:
    lines = response.content.decode().split("\n")
    return "".join(json.loads(line[3:]) for line in lines if line.startswith(f"{prefix}:"))


def last_line(response: httpx.Response) -> str:
    return response.content.decode().rstrip("\n").rpartition("\n")[2]


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - real sockets give no event to wait for
            await trio.sleep(0.001)


# Answers.


async def test_created_conversation_can_be_retried_any_number_of_times() -> None:
    async with site() as browser:
        body = create_body(text="héllo 世界 🙂\u2028\n")
        assert text_of(await browser.create(body)) == "[text] héllo 世界 🙂\u2028\n"
        for text in ("one", "two"):
            turns = [("system", "s"), ("user", "u"), ("assistant", ""), ("user", text)]
            answer = await browser.retry(body, retry_body(body, *turns))
            assert text_of(answer) == f"[text] {text}"
            assert json.loads(last_line(answer).removeprefix("ad:"))["finishReason"] == "stop"
        assert [seen.outcome for seen in browser.arena.record] == ["complete"] * 3


async def test_older_prefix_and_later_form_work_the_same() -> None:
    async with site() as browser:
        body = create_body(text="later")
        path = CREATE.replace("/nextjs-api/", "/api/")
        assert text_of(await browser.call("POST", path, later_form(body))) == "[text] later"
        assert (
            await browser.call(
                "PUT", retry_path(body).replace("/nextjs-api/", "/api/"), retry_body(body, ("user", "x"))
            )
        ).status_code == 200


async def test_create_takes_a_whole_history() -> None:
    async with site() as browser:
        body = create_body(text="last")
        first = copy.deepcopy(body["messages"][0]) | {
            "id": contract.uuid7(),
            "role": "system",
            "content": "s",
        }
        first |= {"participantPosition": "b", "status": "success"}
        body["messages"][0]["parentMessageIds"] = [first["id"]]
        body["messages"].insert(0, first)
        assert text_of(await browser.create(body)) == "[text] last"


async def test_image_and_video_answers_name_files_that_are_served() -> None:
    async with site() as browser:
        answer = await browser.create(create_body(PAINTS))
        [media] = [json.loads(line[3:]) for line in answer.text.split("\n") if line.startswith("a2:")]
        picture = await browser.http.get(media[0]["image"])
        assert picture.headers["content-type"] == "image/png"
        assert picture.content[:4] == b"\x89PNG"
        answer = await browser.create(create_body(FILMS))
        media = [json.loads(line[3:]) for line in answer.text.split("\n") if line.startswith("a2:")]
        assert media[0] == [{"type": "heartbeat"}]
        assert media[-1][0]["type"] == "video"
        assert (await browser.http.get(media[-1][0]["url"])).status_code == 200


async def test_search_brings_sources_and_reasoning_comes_first_when_switched_on() -> None:
    async with site() as browser:
        browser.arena.switch(reasoning=True)
        answer = await browser.create(create_body(SEARCHES))
        assert text_of(answer, "ag") == "Looking at the question…"
        [call] = [json.loads(line[3:]) for line in answer.text.split("\n") if line.startswith("ac:")]
        assert json.loads(call["argsTextDelta"])["source"][0]["url"] == "https://example.com/one"


@pytest.mark.parametrize(
    ("name", "switch", "expected"),
    [
        ("deepseek-v3.1-thinking", None, True),
        ("claude-opus-4-20250514-thinking-16k", None, True),
        ("qwen3-235b-a22b-no-thinking", None, False),
        ("deepseek-v3.1", None, False),
        ("deepseek-v3.1-thinking", False, False),
        ("deepseek-v3.1", True, True),
    ],
)
async def test_models_reason_whose_names_say_so_unless_all_or_none_shall(
    name: str, switch: bool | None, expected: bool
) -> None:
    async with site() as browser:
        browser.arena.models[TEXT["id"]] = TEXT | {"publicName": name}
        browser.arena.switch(reasoning=switch)
        answer = await browser.create(create_body(TEXT))
        assert text_of(answer, "ag") == ("Looking at the question…" if expected else "")
        assert text_of(answer) == f"[{name}] Hi"


async def test_chosen_answers_and_raw_bodies_are_sent_as_they_stand() -> None:
    async with site() as browser:
        browser.arena.switch(answers={"text": ["a", "é"]}, raw={SEES["id"]: 'zz:1\na0:"x"'}, omit_usage=True)
        answer = await browser.create(create_body(TEXT))
        assert text_of(answer) == "aé"
        assert "usage" not in last_line(answer)
        assert (await browser.create(create_body(SEES))).text == 'zz:1\na0:"x"'
        assert browser.arena.record[-1].outcome == "cut"


async def test_chunks_are_cut_inside_lines_and_characters() -> None:
    sent: list[bytes] = []

    async def send(event: dict[str, Any]) -> None:
        sent.append(event.get("body", b""))

    events = iter([{"type": "http.request", "body": json.dumps(body := create_body(text="世界")).encode()}])

    async def receive() -> dict[str, Any]:
        return next(events, None) or await trio.sleep_forever()

    arena = Arena([TEXT])
    arena.switch(chunk_bytes=2, answers={"*": ["世界", "世界"]})
    token = contract.new_token("someone", 0)
    arena.accounts[token.access_token] = "someone"
    value = contract.cookie_value(token)
    cookies = [f"{contract.AUTH_COOKIE}.0={value[:9]}", f"{contract.AUTH_COOKIE}.1={value[9:]}"]
    headers = [(b"content-type", contract.CONTENT_TYPE.encode()), *((b"cookie", c.encode()) for c in cookies)]
    scope = {"type": "http", "method": "POST", "path": CREATE, "query_string": b"", "headers": headers}
    await arena(scope | {"scheme": "https"}, receive, send)
    assert {len(chunk) for chunk in sent[1:-2]} == {2}
    assert "世界" in b"".join(sent).decode()
    assert arena.sessions[body["id"]].retriable


# Refusals.

BROKEN_CREATES: dict[str, Change] = {
    "id": lambda body: body.update(id="not-a-uuid"),
    "mode": lambda body: body.pop("mode"),
    "modality": lambda body: body.update(modality="image"),
    "model": lambda body: body.pop("modelAId"),
    "both forms": lambda body: body.update(later_form(body)),
    "no messages": lambda body: body.pop("messages"),
    "role": lambda body: body["messages"][0].update(role="tool"),
    "empty": lambda body: body["messages"][0].update(content=""),
    "position": lambda body: body["messages"][0].update(participantPosition="b"),
    "parents": lambda body: body["messages"][1].update(parentMessageIds=[]),
    "session": lambda body: body["messages"][1].update(evaluationSessionId=contract.uuid7()),
    "status": lambda body: body["messages"][0].update(status="success"),
    "missing": lambda body: body["messages"][0].pop("failureReason"),
    "attachments": lambda body: body["messages"][0].pop("experimental_attachments"),
    "shape": lambda body: body["messages"][0].update(experimental_attachments=[{"url": PNG_URL}]),
    "image": lambda body: body["messages"][0].update(experimental_attachments=[image()]),
    "answer": lambda body: body["messages"].pop(),
    "answer's id": lambda body: body.update(modelAMessageId=contract.uuid7()),
    "user's id": lambda body: body.update(userMessageId=contract.uuid7()),
    "answer's model": lambda body: body["messages"][1].update(modelId=SEES["id"]),
}


@pytest.mark.parametrize("change", BROKEN_CREATES.values(), ids=BROKEN_CREATES.keys())
async def test_malformed_create_is_refused_with_a_reason(change: Change) -> None:
    async with site() as browser:
        body = create_body()
        change(body)
        answer = await browser.create(body)
        assert answer.status_code == 400
        assert answer.json()["error"]
        assert browser.arena.sessions == {}
        assert browser.arena.record[0].outcome == "refused"


BROKEN_RETRIES: dict[str, Change] = {
    "model": lambda body: body.pop("modelId"),
    "other model": lambda body: body.update(modelId=SEES["id"]),
    "no messages": lambda body: body.update(messages=[]),
    "id": lambda body: body["messages"][0].update(id="1"),
    "same id": lambda body: body["messages"][1].update(id=body["messages"][0]["id"]),
    "empty": lambda body: body["messages"][1].update(content=""),
    "system's position": lambda body: body["messages"][0].update(participantPosition="a"),
    "parents": lambda body: body["messages"][1].update(parentMessageIds=[contract.uuid7()]),
    "first's parents": lambda body: body["messages"][0].update(parentMessageIds=[contract.uuid7()]),
    "earlier pending": lambda body: body["messages"][0].update(status="pending"),
    "last success": lambda body: body["messages"][1].update(status="success"),
    "time": lambda body: body["messages"][1].update(createdAt="today"),
    "evaluationId": lambda body: body["messages"][1].pop("evaluationId"),
    "metadata": lambda body: body["messages"][1].update(metadata="x"),
}


@pytest.mark.parametrize("change", BROKEN_RETRIES.values(), ids=BROKEN_RETRIES.keys())
async def test_malformed_retry_is_refused_and_the_pair_stays_valid(change: Change) -> None:
    async with site() as browser:
        created = await browser.opened()
        body = retry_body(created, ("system", "s"), ("user", "u"))
        change(body)
        assert (await browser.retry(created, body)).status_code == 400
        assert (await browser.retry(created)).status_code == 200


async def test_body_that_is_no_json_or_has_another_content_type_is_refused() -> None:
    async with site() as browser:
        assert (await browser.call("POST", CREATE, "{")).status_code == 400
        answer = await browser.call("POST", CREATE, create_body(), **{"content-type": "application/json"})
        assert answer.status_code == 400
        assert "Content-Type" in answer.json()["error"]


async def test_image_models_want_every_status_to_be_success() -> None:
    async with site() as browser:
        created = await browser.opened(PAINTS)
        body = retry_body(created, ("user", "one"), ("user", "two"))
        assert (await browser.retry(created, body)).status_code == 200
        body["messages"][-1]["status"] = "pending"
        assert (await browser.retry(created, body)).status_code == 400


async def test_images_go_only_where_they_are_taken() -> None:
    async with site() as browser:
        assert (await browser.create(create_body(SEES, "x", image(), image()))).status_code == 200
        assert (await browser.create(create_body(EDITS, "x", image()))).status_code == 200
        assert (await browser.create(create_body(EDITS, "x"))).status_code == 400
        assert (await browser.create(create_body(EDITS, "x", image(), image()))).status_code == 400
        broken = image("data:image/png;base64,???")
        assert (await browser.create(create_body(SEES, "x", broken))).status_code == 400


async def test_attachment_over_the_limit_is_too_large() -> None:
    async with site() as browser:
        for size, status in ((contract.MAX_ATTACHMENT_BYTES, 200), (contract.MAX_ATTACHMENT_BYTES + 3, 413)):
            large = image("data:image/png;base64," + base64.b64encode(bytes(size)).decode())
            assert (await browser.create(create_body(SEES, "x", large))).status_code == status


async def test_unknown_model_and_unknown_conversation_are_not_found() -> None:
    async with site() as browser:
        assert (await browser.create(create_body(entry(9, "text", None, "text")))).status_code == 404
        answer = await browser.retry(create_body())
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"


async def test_conversation_belongs_to_its_account() -> None:
    async with site() as browser:
        created = await browser.opened()
        other = Browser(browser.arena, str(browser.http.base_url))
        await other.sign_in()
        assert (await other.retry(created)).status_code == 404
        assert (await browser.retry(created)).status_code == 200
        await other.http.aclose()


async def test_dead_session_is_gone() -> None:
    async with site() as browser:
        created = await browser.opened()
        browser.arena.switch(dead_sessions={created["id"]})
        assert (await browser.retry(created)).status_code == 404


async def test_signed_out_or_revoked_browser_is_refused() -> None:
    async with site(signed_in=False) as browser:
        assert (await browser.create(create_body())).status_code == 401
        await browser.sign_in()
        assert (await browser.create(create_body())).status_code == 200
        browser.arena.sign_out_everyone()
        assert (await browser.create(create_body())).status_code == 401


async def test_second_retry_of_a_running_pair_conflicts_and_is_counted() -> None:
    async with site() as browser:
        created = await browser.opened()
        browser.arena.switch(hang_after_lines=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(browser.retry, created)
            await until(lambda: browser.arena.running_all.now["all"] == 1)
            assert (await browser.retry(created)).status_code == 409
            nursery.cancel_scope.cancel()
        await until(lambda: browser.arena.record[1].outcome == "aborted")
        assert browser.arena.max_running_pair() == 2
        assert browser.arena.max_running(TEXT["id"]) == 2
        browser.arena.switch(hang_after_lines=None)
        assert (await browser.retry(created)).status_code == 200


async def test_further_message_replaces_the_last_one() -> None:
    async with site() as browser:
        created = await browser.opened()
        body = later_form(create_body(text="further"))
        further = {name: body[name] for name in ("userMessageId", "modelAMessageId", "userMessage")}
        answer = await browser.call("POST", f"{API}/post-to-evaluation/{created['id']}", further)
        assert text_of(answer) == "[text] further"
        assert (await browser.retry(created)).status_code == 404
        assert (
            await browser.retry(created | {"modelAMessageId": body["modelAMessageId"]})
        ).status_code == 200


@pytest.mark.parametrize(
    ("switches", "outcome"),
    [({"a3": "no"}, "failed"), ({"cut_after_lines": 1}, "cut"), ({"finish_reason": "error"}, "failed")],
)
async def test_only_an_answer_that_ended_well_makes_a_session(switches: dict[str, Any], outcome: str) -> None:
    async with site() as browser:
        browser.arena.switch(**switches)
        body = create_body()
        assert (await browser.create(body)).status_code == 200
        assert browser.arena.record[0].outcome == outcome
        assert (await browser.retry(body)).status_code == 404


@pytest.mark.parametrize("switches", [{"latency_seconds": 3600.0}, {"hang_after_lines": 1}])
async def test_client_that_leaves_is_noted_as_aborted(switches: dict[str, Any]) -> None:
    async with site() as browser:
        browser.arena.switch(**switches)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(browser.create, create_body())
            await until(lambda: browser.arena.running_all.now["all"] == 1)
            nursery.cancel_scope.cancel()
        await until(lambda: browser.arena.stats()["aborted"] == 1)
        assert repr(browser.arena) == "<Arena models=6 sessions=1 running=0>"


# Limits and failures.


async def test_rate_limit_begins_ends_and_says_when_to_come_back() -> None:
    async with site() as browser:
        browser.arena.switch(rate_limit_after=1, rate_limit_times=2, retry_after=7)
        answers = [await browser.create(create_body()) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 429, 429, 200]
        assert [answer.headers.get("retry-after") for answer in answers] == [None, "7", "7", None]


async def test_failure_hits_the_model_and_the_call_it_is_set_for() -> None:
    async with site() as browser:
        created = await browser.opened()
        failure = {
            "status": 503,
            "body": "<h1>no</h1>",
            "content_type": "text/html",
            "on": "retry",
            "times": 1,
        }
        browser.arena.switch(failures={"text": failure})
        assert (await browser.create(create_body())).status_code == 200
        answer = await browser.retry(created)
        assert (answer.status_code, answer.text) == (503, "<h1>no</h1>")
        assert (await browser.retry(created)).status_code == 200


async def test_trouble_applies_to_as_many_answers_as_asked() -> None:
    async with site() as browser:
        browser.arena.switch(cut_after_lines=0, trouble_times=1, trouble_models={"text"})
        outcomes = [
            (await browser.create(create_body(model)), model)[1]["publicName"] for model in (SEES, TEXT, TEXT)
        ]
        assert outcomes == ["sees", "text", "text"]
        assert [seen.outcome for seen in browser.arena.record] == ["complete", "cut", "complete"]


def test_switch_of_the_wrong_type_or_name_is_refused() -> None:
    arena = Arena([TEXT])
    for wrong in ({"latency_seconds": "long"}, {"unheard_of": 1}):
        with pytest.raises(ValueError):
            arena.switch(**wrong)
    assert arena.switches.latency_seconds == 0


# Pages and control.


async def test_check_stands_before_calls_and_pages_until_it_has_passed() -> None:
    async with site() as browser:
        browser.arena.switch(check=True, check_csp=True)
        answer = await browser.create(create_body())
        assert answer.status_code == 403
        assert answer.headers["cf-mitigated"] == "challenge"
        assert "<title>Just a moment...</title>" in answer.text
        page = await browser.http.get("/")
        assert "_cf_chl_opt" in page.text
        assert "connect-src 'self'" in page.headers["content-security-policy"]
        await browser.http.post("/cdn-cgi/challenge")
        assert (await browser.create(create_body())).status_code == 200
        browser.arena.require_check()
        assert (await browser.create(create_body())).status_code == 403


async def test_page_renews_a_stale_sign_in_and_takes_back_a_revoked_one() -> None:
    async with site() as browser:
        browser.arena.expire_sign_ins()
        assert (await browser.create(create_body())).status_code == 401
        assert 'id="send"' in (await browser.http.get("/")).text
        assert (await browser.create(create_body())).status_code == 200
        browser.arena.sign_out_everyone()
        assert 'id="accept-terms"' in (await browser.http.get("/")).text
        assert contract.AUTH_COOKIE not in browser.http.cookies


async def test_control_paths_do_what_the_methods_do() -> None:
    async with site() as browser:
        changed = await browser.http.patch("/_arena/switches", json={"finish_reason": "length"})
        assert changed.json()["finish_reason"] == "length"
        assert (
            await browser.http.patch("/_arena/switches", json={"latency_seconds": "x"})
        ).status_code == 400
        await browser.opened()
        stats = (await browser.http.get("/_arena/stats")).json()
        assert (stats["creates"], stats["max_running"], stats["running"]) == (1, 1, 0)
        [seen] = (await browser.http.get("/_arena/record")).json()
        assert seen["outcome"] == "complete"
        assert seen["body"]["modelAId"] == TEXT["id"]
        assert (await browser.http.get("/_arena/record?since=1")).json() == []
        await browser.http.post("/_arena/reset")
        assert (await browser.http.get("/_arena/record")).json() == []
        await browser.http.post("/_arena/sign_out")
        assert (await browser.create(create_body())).status_code == 401


async def test_tls_speaks_http_2_under_a_certificate_for_the_site() -> None:
    arena = Arena([TEXT])
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(serve, arena, tls=True))
        async with httpx.AsyncClient(http2=True, verify=False, trust_env=False) as http:
            assert (await http.get(url)).http_version == "HTTP/2"
        nursery.cancel_scope.cancel()


def test_command_line_prints_its_address_and_ends_quietly(tmp_path: Path) -> None:
    models = tmp_path / "models.json"
    models.write_text(json.dumps([TEXT]))
    command = [
        sys.executable,
        "-B",
        "-m",
        "demo.arena",
        "--models",
        str(models),
        "--switches",
        '{"check":true}',
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    assert httpx.get(f"{url}/_arena/switches", trust_env=False).json()["check"] is True
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, b"")
