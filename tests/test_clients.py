"""The proxy as other people's clients see it: the openai package for node, the Vercel AI SDK, LangChain.

Those for node run in scripts under `clients/` (see perform.mjs), several calls in one start. LangChain runs
in threads, as its calls block and its asynchronous half wants asyncio.
"""

import asyncio
import base64
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import openai
import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    EDIT,
    GPT,
    IMAGE,
    Rig,
    model_id,
    pick_models,
    request_body,
    start,
    turns,
    until,
    user,
    whole,
)
from pydantic import BaseModel, SecretStr

from demo import contract
from demo.arena import Arena, Seen, Switches

# LangChain takes a second to import: for the worker that runs its tests, not for each that finds them.
if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk
    from langchain_openai import ChatOpenAI

CLIENTS = Path(__file__).parent / "clients"
DEADLINE_SECONDS = 120
MANY_IMAGES = "nano-banana"  # an image model that takes several images
PNG_BASE64 = base64.b64encode(contract.png("seed")).decode()
OTHER_PNG_BASE64 = base64.b64encode(contract.png("other seed")).decode()
PNG = f"data:image/png;base64,{PNG_BASE64}"
PDF_BASE64 = base64.b64encode(b"%PDF-1.7").decode()
PDF = f"data:application/pdf;base64,{PDF_BASE64}"
TEXT = 'Hello 世界 😀\n\n`code` and "quotes"\u2028'
REASONING = "Looking at the question…"
BROKEN = 'a0:"Once upon "\na0:"a time"\n'  # an answer without its end
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# The site falls silent after the first two pieces: who waits for more than a cut needs waits for ever.
SILENT: dict[str, Any] = {"answers": {DEEPSEEK: ["one STO", "P two three", " four"]}, "hang_after_lines": 2}

Told = TypeVar("Told")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies, keys or telemetry from whoever runs the tests."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_")):
            monkeypatch.delenv(name)


async def node(script: str, rig: Rig, **calls: dict[str, Any]) -> Any:
    """What the clients in a script saw of these calls, which it makes in this order."""
    given = json.dumps({"url": rig.url, "calls": calls}).encode()
    with trio.fail_after(DEADLINE_SECONDS):
        done = await trio.run_process(["node", str(CLIENTS / script)], stdin=given, capture_stdout=True)
    return json.loads(done.stdout)


openai_node = partial(node, "openai.mjs")
ai_sdk = partial(node, "ai_sdk.mjs")


async def in_thread(call: Callable[[], Told]) -> Told:
    with trio.fail_after(DEADLINE_SECONDS):
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


def langchain(rig: Rig, model: str, **rest: Any) -> "ChatOpenAI":
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=model, base_url=f"{rig.url}/v1", api_key=SecretStr("any"), timeout=60, **rest)


def asked(what: str, model: str, *messages: Any, **rest: Any) -> dict[str, Any]:
    """A chat call of openai.mjs."""
    return {"do": what, "body": request_body(model, *messages, **rest)}


def attachments(seen: Seen) -> list[str]:
    return [each["url"] for message in seen.body["messages"] for each in message["experimental_attachments"]]


async def outcomes(rig: Rig) -> list[str]:
    """How the calls ended at the site, which may learn of it a moment after the client."""
    await until(lambda: all(seen.outcome != "running" for seen in rig.calls))
    return [seen.outcome for seen in rig.calls]


def check_refusals(seen: Any, params: dict[str, str], name: str) -> None:
    """That each of these calls ended in a 400 that names its parameter, or a path that begins so."""
    for call, param in params.items():
        error = seen[call]["error"]
        assert (error["name"], error["status"], error["type"]) == (name, 400, "invalid_request_error"), error
        assert error["param"].startswith(param), error
        assert "req_" in error["message"]


# ── The openai package for node ─────────────────────────────────────────────────────────────────────────────


async def test_openai_node_reads_an_answer_whole_streamed_and_assembled(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(reasoning=True), filled=True)
    messages = ({"role": "developer", "content": "Be brief. 简短。"}, user(TEXT))
    counted = {"stream_options": {"include_usage": True}}
    seen = await openai_node(
        rig,
        whole=asked("whole", CLAUDE, *messages, temperature=0.2, seed=None),
        stream=asked("stream", CLAUDE, *messages, **counted),
        uncounted=asked("stream", CLAUDE, *messages),
        assembled=asked("assembled", CLAUDE, *messages, **counted),
    )
    text, answer = f"[{CLAUDE}] {TEXT}", seen["whole"]
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == (text, REASONING)
    assert (choice["finish_reason"], answer["model"], answer["ignored"]) == ("stop", CLAUDE, "temperature")
    assert answer["usage"]["total_tokens"] > answer["usage"]["completion_tokens"] > 0
    streamed = {"text": text, "reasoning": REASONING, "finish_reasons": ["stop"]}
    assert seen["stream"] == {"choices": [streamed], "usages": [answer["usage"]], "error": None}
    assert seen["uncounted"] == {"choices": [streamed], "usages": [], "error": None}
    assert seen["assembled"]["choices"][0]["message"]["content"] == text
    assert seen["assembled"]["usage"] == answer["usage"]
    assert await outcomes(rig) == ["complete"] * 4
    assert [turns(call) for call in rig.calls] == [[("system", "Be brief. 简短。"), ("user", TEXT)]] * 4


async def test_openai_node_reads_several_choices(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    counted = {"stream_options": {"include_usage": True}}
    seen = await openai_node(
        rig,
        one=asked("whole", CLAUDE, TEXT),
        whole=asked("whole", CLAUDE, TEXT, n=2),
        stream=asked("stream", CLAUDE, TEXT, n=2, **counted),
        assembled=asked("assembled", CLAUDE, TEXT, n=2),
        too_many=asked("whole", CLAUDE, TEXT, n=5),
    )
    text, one = f"[{CLAUDE}] {TEXT}", seen["one"]["usage"]
    for answer in (seen["whole"], seen["assembled"]):
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert [choice["message"]["content"] for choice in answer["choices"]] == [text] * 2
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 2
    assert [choice["text"] for choice in seen["stream"]["choices"]] == [text] * 2
    assert [choice["finish_reasons"] for choice in seen["stream"]["choices"]] == [["stop"]] * 2
    usage = seen["whole"]["usage"]
    assert usage["prompt_tokens"] == one["prompt_tokens"]
    assert usage["completion_tokens"] == 2 * one["completion_tokens"]
    assert seen["stream"]["usages"] == [usage]
    check_refusals(seen, {"too_many": "n"}, "BadRequestError")
    assert "4" in seen["too_many"]["error"]["message"]
    assert await outcomes(rig) == ["complete"] * 7
    pairs = [{seen.session_id for seen in rig.calls[place : place + 2]} for place in (1, 3, 5)]
    assert [len(pair) for pair in pairs] == [2, 2, 2]


async def test_openai_node_gets_answers_cut_where_it_asked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(DEEPSEEK,), filled=True)
    rig.arena.switch(**SILENT)
    limits: dict[str, tuple[dict[str, Any], str, str, int]] = {
        "stop": ({"stop": "STOP"}, "one ", "stop", 1),
        "first_stop": ({"stop": ["three", "", "STOP", "one STOP t"]}, "one ", "stop", 1),
        "max_tokens": ({"max_tokens": 2}, "one STOP", "length", 2),
        "max_completion_tokens": ({"max_completion_tokens": 1}, "one ", "length", 1),
    }
    calls = {name: asked("whole", DEEPSEEK, **limit) for name, (limit, *_) in limits.items()}
    counted = {"stream_options": {"include_usage": True}}
    streamed = {
        f"{name}_streamed": asked("stream", DEEPSEEK, **limit, **counted)
        for name, (limit, *_) in limits.items()
    }
    seen = await openai_node(rig, **calls, **streamed)
    for name, (_, text, reason, tokens) in limits.items():
        [choice] = seen[name]["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason), name
        assert seen[name]["usage"]["completion_tokens"] == tokens, name
        stream = seen[f"{name}_streamed"]
        assert stream["choices"] == [{"text": text, "reasoning": "", "finish_reasons": [reason]}], name
        assert [usage["completion_tokens"] for usage in stream["usages"]] == [tokens], name
    assert await outcomes(rig) == ["aborted"] * 8


async def test_openai_node_throws_what_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), filled=True)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}}}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}
    file = {
        "type": "file",
        "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"},
    }
    named = {"type": "function", "function": {"name": "weather"}}
    seen = await openai_node(
        rig,
        forced=asked("whole", CLAUDE, tools=[WEATHER], tool_choice="required"),
        forced_stream=asked("stream", CLAUDE, tools=[WEATHER], tool_choice=named),
        form=asked("whole", CLAUDE, response_format=form),
        form_stream=asked("stream", CLAUDE, response_format={"type": "json_object"}),
        no_tokens=asked("whole", CLAUDE, max_tokens=0),
        logprobs=asked("whole", CLAUDE, logprobs=True),
        audio=asked("whole", CLAUDE, modalities=["text", "audio"], audio={"voice": "ash", "format": "wav"}),
        image=asked("whole", CLAUDE, image),
        file=asked("whole", GPT, {"role": "user", "content": [{"type": "text", "text": "Read"}, file]}),
        unknown=asked("whole", "claude-sonet-4"),
        unknown_stream=asked("assembled", "claude-sonet-4"),
    )
    audio = seen["audio"]["error"]["param"]
    assert audio in ("audio", "modalities")
    params = {
        "forced": "tool_choice",
        "forced_stream": "tool_choice",
        "form": "response_format",
        "form_stream": "response_format",
        "no_tokens": "max_tokens",
        "logprobs": "logprobs",
        "audio": audio,
        "image": "messages[0].content",
        "file": "messages[0].content[1]",
    }
    check_refusals(seen, params, "BadRequestError")
    for call in ("unknown", "unknown_stream"):
        error = seen[call]["error"]
        assert (error["name"], error["code"]) == ("NotFoundError", "model_not_found")
        assert CLAUDE in error["message"]
        assert error["request_id"] in error["message"]
    assert rig.calls == []


async def test_openai_node_throws_when_an_answer_breaks_off(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), filled=True)
    rig.arena.switch(raw={GPT: BROKEN})
    seen = await openai_node(
        rig,
        stream=asked("stream", GPT),
        assembled=asked("assembled", GPT),
        whole=asked("whole", GPT),
        after=asked("whole", CLAUDE),
    )
    [choice] = seen["stream"]["choices"]
    assert choice == {"text": "Once upon a time", "reasoning": "", "finish_reasons": []}
    for error in (seen["stream"]["error"], seen["assembled"]["error"]):
        assert error["code"] == "upstream_error"
        assert "cut off" in error["message"]
        assert "req_" in error["message"]
    error = seen["whole"]["error"]
    assert (error["name"], error["status"], error["should_retry"]) == ("InternalServerError", 502, "false")
    assert seen["after"]["choices"][0]["finish_reason"] == "stop"
    # The proxy asks again where nothing has reached the client, and the client does not on top of that.
    assert await outcomes(rig) == ["cut"] * 5 + ["complete"]


async def test_openai_node_leaves_a_stream_and_the_site_is_told(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    # With one conversation, each call can only be answered once the one before it has been given up.
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE,), tables=tables, filled=True)
    rig.arena.switch(hang_after_lines=1, trouble_times=3)
    seen = await openai_node(
        rig,
        controller=asked("stream", CLAUDE) | {"leave_at": "controller"},
        signal=asked("stream", CLAUDE) | {"leave_at": "signal"},
        loop=asked("stream", CLAUDE) | {"leave_at": "break"},
        after=asked("whole", CLAUDE),
    )
    for way in ("controller", "signal", "loop"):
        assert seen[way]["error"] is None
        [choice] = seen[way]["choices"]
        assert choice == {"text": f"[{CLAUDE}] Hello"[:8], "reasoning": "", "finish_reasons": []}
    assert seen["after"]["choices"][0]["message"]["content"] == f"[{CLAUDE}] Hello"
    assert await outcomes(rig) == ["aborted"] * 3 + ["complete"]


async def test_openai_node_sends_images_and_files(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    url = {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}
    file = {"type": "file", "file": {"file_data": PNG, "filename": "a.png"}}
    seen = await openai_node(
        rig,
        url=asked("whole", GPT, {"role": "user", "content": [{"type": "text", "text": "Look"}, url, url]}),
        file=asked("whole", GPT, {"role": "user", "content": [{"type": "text", "text": "Look"}, file]}),
    )
    answers = [seen[call]["choices"][0]["message"]["content"] for call in ("url", "file")]
    assert answers == [f"[{GPT}] Look"] * 2
    assert [attachments(call) for call in rig.calls] == [[PNG, PNG], [PNG]]


async def test_openai_node_lists_models_and_finds_one_by_any_name(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    odd = "a/b c+d:v1.0 模型?#%41"
    arena = Arena([*pick_models((DEEPSEEK, GPT, IMAGE)), pick_models([CLAUDE])[0] | {"publicName": odd}])
    rig = await start(nursery, tmp_path, models=(DEEPSEEK, GPT, IMAGE), arena=arena)
    await until(lambda: rig.program.pool.catalog.named(odd))
    seen = await openai_node(
        rig,
        models={"do": "models"},
        plain={"do": "model", "id": GPT},
        odd={"do": "model", "id": odd},
        by_id={"do": "model", "id": model_id(GPT)},
        unknown={"do": "model", "id": "gpt-5-minni"},
        chat=asked("whole", odd),
    )
    assert [model["id"] for model in seen["models"]] == [DEEPSEEK, GPT, IMAGE, odd]
    by_name = {model["id"]: model for model in seen["models"]}
    assert {model["object"] for model in seen["models"]} == {"model"}
    assert by_name[DEEPSEEK]["input_capabilities"] == ["text"]
    assert set(by_name[GPT]["input_capabilities"]) == {"text", "image"}
    assert [by_name[name]["output_capabilities"] for name in (GPT, IMAGE)] == [["text"], ["image"]]
    assert seen["plain"] == by_name[GPT]
    assert seen["odd"] == by_name[odd]
    assert seen["by_id"]["modality"] == "chat"
    error = seen["unknown"]["error"]
    assert (error["name"], error["code"]) == ("NotFoundError", "model_not_found")
    assert seen["chat"]["model"] == odd


async def test_openai_node_makes_and_edits_pictures(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, EDIT, MANY_IMAGES), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    ask = {"model": IMAGE, "prompt": "A cat"}
    change = {"model": EDIT, "prompt": "Black"}
    seen = await openai_node(
        rig,
        address={"do": "generate", "body": ask | {"size": "1024x1024", "response_format": "url"}},
        plain={"do": "generate", "body": ask},
        pictures={"do": "generate", "body": ask | {"n": 2, "response_format": "b64_json"}},
        edit={"do": "edit", "body": change | {"response_format": "b64_json"}, "images": PNG_BASE64},
        several={
            "do": "edit",
            "body": {"model": MANY_IMAGES, "prompt": "Mix"},
            "images": [PNG_BASE64, OTHER_PNG_BASE64],
        },
    )
    assert seen["address"]["ignored"] == "size"
    for call in ("address", "plain", "several"):
        [url] = seen[call]["urls"]
        assert (await rig.http.get(url)).headers["content-type"] == "image/png"
        assert seen[call]["created"] > 0
    for call, number in (("pictures", 2), ("edit", 1)):
        pictures = seen[call]["pictures"]
        assert [picture["is_png"] for picture in pictures] == [True] * number
        assert len({picture["base64"] for picture in pictures}) == number
        assert seen[call]["urls"] == [None] * number
    assert await outcomes(rig) == ["complete"] * 6
    assert [turns(call) for call in rig.calls[:4]] == [[("user", "A cat")]] * 4
    assert [turns(call) for call in rig.calls[4:]] == [[("user", "Black")], [("user", "Mix")]]
    other = f"data:image/png;base64,{OTHER_PNG_BASE64}"
    assert [attachments(call) for call in rig.calls[4:]] == [[PNG], [PNG, other]]


async def test_openai_node_throws_when_there_is_no_picture(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, IMAGE, EDIT), filled=True)
    rig.arena.switch(answers={IMAGE: ["Cats are ", "beyond me."]})
    ask = {"model": IMAGE, "prompt": "A cat"}
    seen = await openai_node(
        rig,
        chat_model={"do": "generate", "body": {"model": CLAUDE, "prompt": "A cat"}},
        unknown={"do": "generate", "body": {"model": "imagine", "prompt": "A cat"}},
        stream={"do": "generate", "body": ask | {"stream": True}},
        mask={
            "do": "edit",
            "body": {"model": EDIT, "prompt": "Black"},
            "images": PNG_BASE64,
            "mask": PNG_BASE64,
        },
    )
    check_refusals(seen, {"chat_model": "model", "stream": "stream", "mask": "mask"}, "BadRequestError")
    assert seen["unknown"]["error"]["name"] == "NotFoundError"
    assert rig.calls == []
    words = (await openai_node(rig, words={"do": "generate", "body": ask}))["words"]["error"]
    assert (words["name"], words["code"]) == ("InternalServerError", "upstream_error")
    assert words["should_retry"] == "false"
    assert "Cats are beyond me." in words["message"]


# ── The Vercel AI SDK ───────────────────────────────────────────────────────────────────────────────────────


async def test_the_ai_sdk_reads_an_answer_whole_and_streamed(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), switches=Switches(reasoning=True), filled=True)
    ask = {"model": CLAUDE, "system": "Be brief.", "prompt": TEXT, "temperature": 0.2}
    seen = await ai_sdk(
        rig,
        text={"do": "text", **ask},
        stream={"do": "stream", **ask},
        tools={"do": "stream", **ask, "tools": True},
    )
    text = f"[{CLAUDE}] {TEXT}"
    for answer in seen.values():
        assert (answer["text"], answer["reasoning"], answer["finish_reason"]) == (text, REASONING, "stop")
        assert answer["usage"]["totalTokens"] > answer["usage"]["outputTokens"] > 0
    assert seen["text"]["usage"]["totalTokens"] == seen["stream"]["usage"]["totalTokens"]
    assert (seen["text"]["model"], seen["text"]["ignored"]) == (CLAUDE, "temperature")
    for call in ("stream", "tools"):
        assert seen[call]["errors"] == []
        assert [part for part in seen[call]["parts"] if part.endswith("-delta")] == [
            "reasoning-delta",
            "text-delta",
        ]
    assert await outcomes(rig) == ["complete"] * 3
    assert [turns(call) for call in rig.calls] == [[("system", "Be brief."), ("user", TEXT)]] * 3


async def test_the_ai_sdk_sends_images_and_earlier_tool_calls(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    called = {"toolCallId": "call_1", "toolName": "weather"}
    history = [
        user("How is it in Paris?"),
        {"role": "assistant", "content": [{"type": "tool-call", **called, "input": {"city": "Paris"}}]},
        {
            "role": "tool",
            "content": [{"type": "tool-result", **called, "output": {"type": "text", "value": "clear sky"}}],
        },
        user("So?"),
    ]
    parts = [
        {"type": "text", "text": "Look"},
        {"type": "image", "image": PNG_BASE64, "mediaType": "image/png"},
        {"type": "file", "data": PNG_BASE64, "mediaType": "image/png"},
    ]
    seen = await ai_sdk(
        rig,
        image={"do": "stream", "model": GPT, "messages": [{"role": "user", "content": parts}]},
        history={"do": "text", "model": GPT, "messages": history, "tools": True},
    )
    assert seen["image"]["text"] == f"[{GPT}] Look"
    assert seen["history"]["text"] == f"[{GPT}] So?"
    assert (seen["history"]["finish_reason"], seen["history"]["tool_calls"]) == ("stop", 0)
    first, second = rig.calls
    assert attachments(first) == [PNG, PNG]
    roles, texts = zip(*turns(second), strict=True)
    assert roles == ("user", "assistant", "user", "user")
    assert '[called weather({"city":"Paris"})]' in texts[1]
    assert "clear sky" in texts[2]


async def test_the_ai_sdk_gets_answers_cut_where_it_asked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(DEEPSEEK,), filled=True)
    rig.arena.switch(**SILENT)
    ask = {"model": DEEPSEEK, "prompt": "Hello"}
    seen = await ai_sdk(
        rig,
        stop={"do": "text", **ask, "stopSequences": ["STOP"]},
        stop_streamed={"do": "stream", **ask, "stopSequences": ["STOP"]},
        length={"do": "text", **ask, "maxOutputTokens": 2},
        length_streamed={"do": "stream", **ask, "maxOutputTokens": 2},
    )
    for call, answer in seen.items():
        reason = call.removesuffix("_streamed")
        assert answer["text"] == {"stop": "one ", "length": "one STOP"}[reason], call
        assert answer["finish_reason"] == reason
        assert answer["usage"]["outputTokens"] == {"stop": 1, "length": 2}[reason]
    assert await outcomes(rig) == ["aborted"] * 4


async def test_the_ai_sdk_is_told_that_objects_cannot_be_had(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), filled=True)
    ask = {"model": CLAUDE, "prompt": "Where?"}
    pdf = {"type": "file", "data": PDF_BASE64, "mediaType": "application/pdf", "filename": "a.pdf"}
    file = [{"role": "user", "content": [{"type": "text", "text": "Read"}, pdf]}]
    seen = await ai_sdk(
        rig,
        object={"do": "object", **ask},
        schema={"do": "object", **ask, "structured": True},
        output={"do": "text", **ask, "output": True, "structured": True},
        streamed={"do": "stream", **ask, "output": True},
        forced={"do": "text", **ask, "tools": True, "toolChoice": "required"},
        file={"do": "text", "model": GPT, "messages": file},
    )
    assert (seen["streamed"]["text"], seen["streamed"]["finish_reason"]) == ("", None)
    [error] = seen["streamed"]["errors"]
    seen["streamed"] = {"error": error}
    formed = ("object", "schema", "output", "streamed")
    params = dict.fromkeys(formed, "response_format")
    params |= {"forced": "tool_choice", "file": "messages[0].content[1]"}
    check_refusals(seen, params, "AI_APICallError")
    assert not any(seen[call]["error"]["is_retryable"] for call in params)
    for call in formed:
        assert "response_format" in seen[call]["error"]["message"]
    assert rig.calls == []


async def test_the_ai_sdk_sees_an_answer_break_off_and_can_leave_one(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), tables=tables, filled=True)
    rig.arena.switch(raw={GPT: BROKEN}, hang_after_lines=1, trouble_times=1, trouble_models=[CLAUDE])
    seen = await ai_sdk(
        rig,
        broken={"do": "stream", "model": GPT, "prompt": "Hello"},
        left={"do": "stream", "model": CLAUDE, "prompt": "Hello", "leave": True},
        after={"do": "text", "model": CLAUDE, "prompt": "Hello"},
        unknown={"do": "text", "model": "claude-sonet-4", "prompt": "Hello"},
    )
    broken = seen["broken"]
    assert (broken["text"], broken["finish_reason"]) == ("Once upon a time", "error")
    [error] = broken["errors"]
    assert error["code"] == "upstream_error"
    assert "cut off" in error["message"]
    assert seen["left"]["errors"] == []
    assert seen["left"]["parts"][-1] == "abort"
    assert seen["after"]["text"] == f"[{CLAUDE}] Hello"
    assert seen["unknown"]["error"]["status"] == 404
    assert await outcomes(rig) == ["cut", "aborted", "complete"]


async def test_the_ai_sdk_makes_and_edits_pictures(nursery: trio.Nursery, tmp_path: Path) -> None:
    """It asks for base64 where it makes pictures, and takes what comes where it edits them.

    It follows an address only to public places, and to the server that it asked: hence `media.keep`.
    """
    tables = {"media": {"keep": True}}
    rig = await start(nursery, tmp_path, models=(CLAUDE, IMAGE, EDIT), tables=tables, filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    ask = {"do": "image", "model": IMAGE, "prompt": "A cat"}
    change = {"do": "image", "model": EDIT, "prompt": "Black", "images": [PNG_BASE64]}
    seen = await ai_sdk(
        rig,
        one=ask | {"size": "1024x1024"},
        two=ask | {"n": 2},
        edit=change,
        edit_base64=change | {"providerOptions": {"arena": {"response_format": "b64_json"}}},
        chat_model=ask | {"model": CLAUDE},
    )
    for call, number in {"one": 1, "two": 2, "edit": 1, "edit_base64": 1}.items():
        pictures = seen[call]["pictures"]
        assert [picture["is_png"] for picture in pictures] == [True] * number
        assert len({picture["base64"] for picture in pictures}) == number
        assert seen[call]["media_types"] == ["image/png"] * number
    check_refusals(seen, {"chat_model": "model"}, "AI_APICallError")
    assert await outcomes(rig) == ["complete"] * 5
    assert [turns(call)[-1][1] for call in rig.calls] == ["A cat"] * 3 + ["Black"] * 2
    assert [attachments(call) for call in rig.calls[3:]] == [[PNG], [PNG]]


# ── LangChain ───────────────────────────────────────────────────────────────────────────────────────────────


def read(chunks: "list[AIMessageChunk]") -> "AIMessageChunk":
    """The chunks put together, as LangChain does it."""
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    return merged


async def test_langchain_reads_an_answer_whole_and_streamed(nursery: trio.Nursery, tmp_path: Path) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    model = langchain(rig, CLAUDE, temperature=0.2)
    messages = [SystemMessage("Be brief."), HumanMessage(TEXT)]

    async def streamed() -> "AIMessageChunk":
        return read([chunk async for chunk in model.astream(messages, stream_usage=True)])

    answer = await in_thread(lambda: model.invoke(messages))
    plain = await in_thread(lambda: read([*model.stream(messages)]))
    counted = await in_thread(lambda: asyncio.run(streamed()))
    for seen in (answer, plain, counted):
        assert seen.content == f"[{CLAUDE}] {TEXT}"
        assert seen.response_metadata["finish_reason"] == "stop"
        assert seen.response_metadata["model_name"] == CLAUDE
    assert plain.usage_metadata is None
    assert answer.usage_metadata == counted.usage_metadata
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert await outcomes(rig) == ["complete"] * 3
    assert [turns(call) for call in rig.calls] == [[("system", "Be brief."), ("user", TEXT)]] * 3


async def test_langchain_asks_for_several_choices(nursery: trio.Nursery, tmp_path: Path) -> None:
    from langchain_core.messages import HumanMessage

    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    result = await in_thread(lambda: langchain(rig, CLAUDE, n=2).generate([[HumanMessage(TEXT)]]))
    [generations] = result.generations
    assert [generation.text for generation in generations] == [f"[{CLAUDE}] {TEXT}"] * 2
    one = whole(await rig.chat(CLAUDE, TEXT)).usage
    assert one
    assert result.llm_output
    assert result.llm_output["token_usage"]["prompt_tokens"] == one.prompt_tokens
    assert result.llm_output["token_usage"]["completion_tokens"] == 2 * one.completion_tokens
    assert len({seen.session_id for seen in rig.calls[:2]}) == 2


async def test_langchain_gets_answers_cut_where_it_asked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(DEEPSEEK,), filled=True)
    rig.arena.switch(**SILENT)
    model = langchain(rig, DEEPSEEK)
    stopped = await in_thread(lambda: model.invoke("Hello", stop=["STOP"]))
    streamed = await in_thread(lambda: read([*model.stream("Hello", stop=["STOP"])]))
    short = await in_thread(lambda: langchain(rig, DEEPSEEK, max_tokens=2).invoke("Hello"))
    assert (stopped.content, stopped.response_metadata["finish_reason"]) == ("one ", "stop")
    assert (streamed.content, streamed.response_metadata["finish_reason"]) == ("one ", "stop")
    assert (short.content, short.response_metadata["finish_reason"]) == ("one STOP", "length")
    assert await outcomes(rig) == ["aborted"] * 3


async def test_langchain_sends_images_in_both_of_its_forms(nursery: trio.Nursery, tmp_path: Path) -> None:
    from langchain_core.messages import HumanMessage

    rig = await start(nursery, tmp_path, models=(GPT,), filled=True)
    text: dict[str, Any] = {"type": "text", "text": "Look"}
    forms: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image", "base64": PNG_BASE64, "mime_type": "image/png"},
    ]
    for form in forms:
        message = HumanMessage([text, form])
        answer = await in_thread(lambda: langchain(rig, GPT).invoke([message]))  # noqa: B023
        assert answer.content == f"[{GPT}] Look"
    assert [attachments(call) for call in rig.calls] == [[PNG], [PNG]]


class City(BaseModel):
    """Where somebody lives."""

    name: str


async def test_langchain_may_offer_tools_and_tell_of_earlier_calls(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    called = {"name": "weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
    history = [
        HumanMessage("How is it in Paris?"),
        AIMessage("", tool_calls=[called]),
        ToolMessage("clear sky", tool_call_id="call_1"),
        HumanMessage("So?"),
    ]
    model = langchain(rig, CLAUDE).bind_tools([City, WEATHER])
    answer = await in_thread(lambda: model.invoke(history))
    assert (answer.content, answer.tool_calls) == (f"[{CLAUDE}] So?", [])
    assert answer.response_metadata["finish_reason"] == "stop"
    roles, texts = zip(*turns(rig.calls[0]), strict=True)
    assert roles == ("user", "assistant", "user", "user")
    assert '[called weather({"city": "Paris"})]' in texts[1]
    assert "clear sky" in texts[2]


async def test_langchain_is_told_what_cannot_be_had(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE,), filled=True)
    model = langchain(rig, CLAUDE)
    refused = {
        "json_schema": (model.with_structured_output(City, method="json_schema"), "response_format"),
        "json_mode": (model.with_structured_output(City, method="json_mode"), "response_format"),
        "function_calling": (model.with_structured_output(City, method="function_calling"), "tool_choice"),
        "any tool": (model.bind_tools([City], tool_choice="any"), "tool_choice"),
    }
    for runnable, param in refused.values():
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            await in_thread(lambda: runnable.invoke("Where?"))  # noqa: B023
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError, match=CLAUDE):
        await in_thread(lambda: langchain(rig, "claude-sonet-4").invoke("Hello"))
    assert rig.calls == []


async def test_langchain_raises_when_a_stream_breaks_off_and_can_leave_one(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    tables = {"pool": {"sessions_per_model": 1}}
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT), tables=tables, filled=True)
    rig.arena.switch(raw={GPT: BROKEN}, hang_after_lines=1, trouble_times=1, trouble_models=[CLAUDE])
    with pytest.raises(openai.APIError, match=r"cut off.*req_"):
        await in_thread(lambda: [*langchain(rig, GPT).stream("Hello")])

    async def broken() -> "list[AIMessageChunk]":
        return [chunk async for chunk in langchain(rig, GPT).astream("Hello")]

    with pytest.raises(openai.APIError, match=r"cut off.*req_"):
        await in_thread(lambda: asyncio.run(broken()))

    def leave() -> None:
        for chunk in langchain(rig, CLAUDE).stream("Hello"):
            if chunk.content:
                return

    await in_thread(leave)
    answer = await in_thread(lambda: langchain(rig, CLAUDE).invoke("Hello"))
    assert answer.content == f"[{CLAUDE}] Hello"
    assert await outcomes(rig) == ["cut", "cut", "aborted", "complete"]
