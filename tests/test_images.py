"""Pictures and videos: the images endpoints, with the openai package and without, and models in a chat."""

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from harness import (
    CLAUDE,
    EDIT,
    GPT,
    IMAGE,
    RAY,
    SEARCH,
    Held,
    Rig,
    check_error,
    model_id,
    pick_models,
    start,
    turns,
    until,
    whole,
)
from openai.types import ImagesResponse
from test_media import (
    KEEP,
    PICTURE,
    SMALL_PICTURES,
    attached,
    go_online,
    kept_name,
    large,
    media_answer,
    ok,
    picture,
    refuses,
    show,
)

from demo import contract
from lmarena_proxy import RequestEnded

MANY, ONE = "nano-banana", "flux-1-kontext-pro"  # Take pictures, and need none: several, or one.
GPT_IMAGE = "gpt-image-1"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
OTHER_PICTURE = contract.png("another picture")


def pictures(response: httpx.Response) -> ImagesResponse:
    """A good answer, as the openai package types it, without any of its leniency."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return ImagesResponse.model_validate_json(response.content, strict=True)


async def generate(rig: Rig, model: str = IMAGE, prompt: str = "A cat", **rest: Any) -> httpx.Response:
    return await rig.http.post(GENERATIONS, json={"model": model, "prompt": prompt, **rest})


async def edit(
    rig: Rig, *images: bytes, field: str = "image", files: Any = (), **fields: str
) -> httpx.Response:
    listed = [(field, (f"{place}.png", data, "image/png")) for place, data in enumerate(images)]
    form = {"model": MANY, "prompt": "Paint it black"} | fields
    form = {name: value for name, value in form.items() if value is not None}
    return await rig.http.post(EDITS, data=form, files=[*listed, *files] or {"nothing": (None, "")})


async def served(rig: Rig, answer: ImagesResponse) -> list[bytes]:
    """What is behind the addresses of an answer."""
    assert answer.data
    assert all(each.url and each.b64_json is None for each in answer.data)
    return [(await rig.http.get(each.url or "")).raise_for_status().content for each in answer.data]


def decoded(answer: ImagesResponse) -> list[bytes]:
    assert answer.data
    assert all(each.b64_json and each.url is None for each in answer.data)
    return [base64.b64decode(each.b64_json or "", validate=True) for each in answer.data]


def refusal(response: httpx.Response, param: str | None, status: int = 400) -> str:
    code = {400: "invalid_request", 413: "request_too_large"}[status]
    error = check_error(response, status, code)
    assert error["param"] == param, error
    return str(error["message"])


# ── Making pictures ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_picture_comes_by_its_address_or_as_data(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    for rest in ({}, {"response_format": "url"}, {"response_format": None, "n": 1}):
        answer = pictures(await generate(rig, **rest))
        [data] = await served(rig, answer)
        assert data.startswith(b"\x89PNG")
        assert answer.data
        assert (answer.data[0].url or "").startswith(f"{rig.arena_url}/media/")
    assert turns(rig.calls[0])[-1] == ("user", "A cat")
    assert rig.calls[0].model_id == model_id(IMAGE)
    rig.arena.switch(raw={"*": media_answer(("image", f"{rig.arena_url}/media/seed.png"))})
    assert decoded(pictures(await generate(rig, response_format="b64_json"))) == [contract.png("seed")]


async def test_the_openai_package_makes_and_edits_pictures(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    made = await rig.openai.images.generate(model=IMAGE, prompt="A cat", n=2, size="1024x1024")
    assert len(await served(rig, made)) == 2
    made = await rig.openai.images.generate(model=IMAGE, prompt="A cat", response_format="b64_json")
    assert decoded(made)[0].startswith(b"\x89PNG")
    changed = await rig.openai.images.edit(model=MANY, prompt="Black", image=("a.png", PICTURE))
    assert len(await served(rig, changed)) == 1
    assert attached(rig) == [("image/png", PICTURE)]
    changed = await rig.openai.images.edit(
        model=MANY,
        prompt="Both",
        image=[("a.png", PICTURE), ("b.png", OTHER_PICTURE)],
        n=2,
        response_format="b64_json",
        size="1024x1024",
        quality="high",
    )
    assert len(decoded(changed)) == 2
    assert attached(rig) == [("image/png", PICTURE), ("image/png", OTHER_PICTURE)]
    with pytest.raises(openai.BadRequestError) as failure:
        await rig.openai.images.edit(model=MANY, prompt="x", image=("a.png", b"text"))
    assert failure.value.param == "image"
    with pytest.raises(openai.BadRequestError):
        await rig.openai.images.edit(model=MANY, prompt="x", image=PICTURE, mask=PICTURE)


async def test_the_openai_package_without_async_does_so_too(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    path = tmp_path / "a.png"
    path.write_bytes(PICTURE)

    def use() -> tuple[ImagesResponse, ImagesResponse, ImagesResponse]:
        with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            made = client.images.generate(model=IMAGE, prompt="A cat", response_format="b64_json", n=2)
            by_path = client.images.edit(model=MANY, prompt="Black", image=path)
            with path.open("rb") as file:
                by_file = client.images.edit(model=MANY, prompt="Black", image=[file, io.BytesIO(PICTURE)])
            return made, by_path, by_file

    made, by_path, by_file = await trio.to_thread.run_sync(use)
    assert [data[:4] for data in decoded(made)] == [b"\x89PNG"] * 2
    assert len(await served(rig, by_path)) == len(await served(rig, by_file)) == 1
    assert attached(rig, -2) == [("image/png", PICTURE)]
    assert attached(rig, -1) == [("image/png", PICTURE)] * 2


@pytest.mark.parametrize("n", [2, 4])
async def test_several_pictures_are_made_side_by_side(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    held = Held(monkeypatch)
    answers: list[ImagesResponse] = []

    async def ask() -> None:
        answers.append(pictures(await generate(rig, n=n)))

    async with trio.open_nursery() as clients:
        clients.start_soon(ask)
        await until(lambda: len(rig.calls) == n)
        held.release()
    assert len({seen.session_id for seen in rig.calls}) == n
    # Each its own: the stand-in names every picture anew.
    assert len({*await served(rig, answers[0])}) == n
    [ended] = rig.event(RequestEnded)
    assert (ended.status, ended.attempts) == (200, n)


async def test_more_pictures_than_conversations_are_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    assert "4" in refusal(await generate(rig, n=5), "n")
    assert "4" in refusal(await edit(rig, PICTURE, n="5"), "n")
    for value in (0, -1, 1001, "two", 1.5):
        refusal(await generate(rig, n=value), "n")
    for text in ("0", "two", "1.5"):
        refusal(await edit(rig, PICTURE, n=text), "n")
    assert rig.calls == []


async def test_parameters_without_effect_are_named(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    ignored: dict[str, Any] = {
        "size": "1024x1024",
        "quality": "high",
        "style": "vivid",
        "background": "transparent",
        "moderation": "low",
        "output_format": "png",
        "output_compression": 80,
        "user": "me",
    }
    response = await generate(rig, **ignored, unheard_of=1, stream=False)
    pictures(response)
    assert response.headers["x-ignored-parameters"] == ", ".join(sorted(ignored))
    response = await generate(rig, size=None)
    pictures(response)
    assert "x-ignored-parameters" not in response.headers
    fields = {name: str(value) for name, value in ignored.items()}
    response = await edit(rig, PICTURE, **fields, input_fidelity="high", stream="false")
    pictures(response)
    assert response.headers["x-ignored-parameters"] == ", ".join(sorted([*ignored, "input_fidelity"]))


async def test_models_of_openais_own_names_give_data_unless_asked_for_addresses(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(GPT_IMAGE,), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    answers = (
        pictures(await generate(rig, GPT_IMAGE)),
        pictures(await edit(rig, PICTURE, model=GPT_IMAGE)),
        await rig.openai.images.generate(model=GPT_IMAGE, prompt="A cat"),
    )
    for answer in answers:
        assert decoded(answer)[0].startswith(b"\x89PNG")
    await served(rig, pictures(await generate(rig, GPT_IMAGE, response_format="url")))
    await served(rig, pictures(await edit(rig, PICTURE, model=GPT_IMAGE, response_format="url")))


async def test_kept_pictures_get_addresses_of_this_server(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig, internet = await go_online(nursery, tmp_path, KEEP, models=(IMAGE,))
    url = internet.put("http://pictures.test/a.png")
    rig.arena.switch(raw={"*": media_answer(("image", url))})
    rig.http.headers["host"] = f"localhost:{httpx.URL(rig.url).port}"
    answer = pictures(await generate(rig, n=4))
    assert answer.data
    address = f"http://localhost:{httpx.URL(rig.url).port}/media/{kept_name(PICTURE)}"
    assert [each.url for each in answer.data] == [address] * 4
    # Data is data, whether something is kept or not.
    assert decoded(pictures(await generate(rig, response_format="b64_json"))) == [PICTURE]


# ── Changing pictures ───────────────────────────────────────────────────────────────────────────────────────


async def test_the_pictures_to_change_arrive_at_the_arena_in_their_order(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(MANY, EDIT), filled=True)
    await served(rig, pictures(await edit(rig, PICTURE)))
    assert attached(rig) == [("image/png", PICTURE)]
    assert turns(rig.calls[0])[-1] == ("user", "Paint it black")
    for field in ("image", "image[]"):
        pictures(await edit(rig, PICTURE, OTHER_PICTURE, field=field))
        assert [data for _, data in attached(rig)] == [PICTURE, OTHER_PICTURE]
    # What counts is what is in the file.
    jpeg = b"\xff\xd8\xff\xe0" + b"jpeg" * 9
    pictures(await edit(rig, files=[("image", ("a.txt", jpeg, "text/plain"))]))
    assert attached(rig) == [("image/jpeg", jpeg)]
    pictures(await edit(rig, PICTURE, model=EDIT))
    assert rig.calls[-1].model_id == model_id(EDIT)


async def test_what_is_no_picture_is_not_sent(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(MANY, EDIT), filled=True)
    text = ("image", ("a.png", b"text", "image/png"))
    refusal(await edit(rig), "image")
    refusal(await edit(rig, b""), "image")
    refusal(await edit(rig, contract.mp4()), "image")
    refusal(await edit(rig, files=[text]), "image")
    refusal(await edit(rig, PICTURE, files=[text]), "image")
    # A field is no file.
    refusal(await edit(rig, files=[("image", (None, "http://pictures.test/a.png"))]), "image")
    refusal(await edit(rig, files=[("picture", ("a.png", PICTURE))]), "image")
    assert rig.calls == []


async def test_a_mask_or_a_stream_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    refusal(await edit(rig, PICTURE, files=[("mask", ("m.png", PICTURE, "image/png"))]), "mask")
    refusal(await edit(rig, PICTURE, mask="data:image/png;base64,AAAA"), "mask")
    refusal(await edit(rig, PICTURE, stream="true"), "stream")
    refusal(await generate(rig, stream=True), "stream")
    assert rig.calls == []


async def test_a_picture_that_is_too_large_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(MANY,), tables=SMALL_PICTURES, filled=True)
    pictures(await edit(rig, large("exactly", 1 << 20)))
    message = refusal(await edit(rig, PICTURE, large("more", (1 << 20) + 8)), "image", 413)
    assert "1 MiB" in message
    assert len(rig.calls) == 1


async def test_a_body_that_is_no_form_is_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(MANY,), filled=True)
    form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\n'
    for content_type, body in (
        ("application/json", json.dumps({"model": MANY, "prompt": "x"}).encode()),
        ("application/x-www-form-urlencoded", b"model=x&prompt=y"),
        ("multipart/form-data", form),
        ("multipart/form-data; boundary=", form),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", form),
        ("multipart/form-data; boundary=b", form + b"x\r\n--b--garbage"),
        ("multipart/form-data; boundary=other", form + b"x\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\nnonsense\r\n\r\n\xff\xfe\r\n--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 1000, form),
        ('multipart/form-data; boundary="\xe9"', form),
        ("", b""),
    ):
        header = (b"content-type", content_type.encode("latin-1"))
        response = await rig.http.post(EDITS, content=body, headers=[header])
        error = check_error(response, 400, "invalid_request")
        assert error["message"]
    for missing in ("model", "prompt"):
        form_of_one = {"model": MANY, "prompt": "x"}
        del form_of_one[missing]
        files = [("image", ("a.png", PICTURE, "image/png"))]
        refusal(await rig.http.post(EDITS, data=form_of_one, files=files), missing)
    refusal(await edit(rig, PICTURE, prompt=""), "prompt")
    refusal(await edit(rig, PICTURE, response_format="png"), "response_format")
    assert rig.calls == []


# ── What models can do ──────────────────────────────────────────────────────────────────────────────────────


async def test_models_that_make_no_pictures_are_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT, SEARCH, RAY), filled=True)
    for model in (CLAUDE, GPT, SEARCH, RAY):
        assert model in refusal(await generate(rig, model), "model")
    for model in (GPT, RAY):
        assert model in refusal(await edit(rig, PICTURE, model=model), "model")
    for response in (await generate(rig, "nothing"), await edit(rig, PICTURE, model="nothing")):
        assert check_error(response, 404, "model_not_found")["param"] == "model"
    assert rig.calls == []


async def test_a_model_that_works_on_a_picture_needs_one(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(EDIT,), filled=True)
    assert EDIT in refusal(await generate(rig, EDIT), "prompt")
    refusal(await rig.chat(EDIT, "Paint it black"), "messages[0].content")
    refusal(await edit(rig, model=EDIT), "image")
    assert rig.calls == []


async def test_a_model_that_takes_no_picture_or_one_gets_no_more(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, models=(IMAGE, ONE, EDIT))
    url = internet.put("http://pictures.test/a.png")
    refusal(await edit(rig, PICTURE, model=IMAGE), "image")
    refusal(await rig.chat(IMAGE, picture("This", url)), "messages[0].content")
    for model in (ONE, EDIT):
        refusal(await edit(rig, PICTURE, PICTURE, model=model), "image")
        refusal(await rig.chat(model, picture("Both", url, url)), "messages[0].content")
    assert (rig.calls, internet.attempts) == ([], [])
    pictures(await generate(rig, ONE))
    pictures(await edit(rig, PICTURE, model=ONE))


async def test_bodies_are_checked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), connected=False)
    for body, param in (
        ({"prompt": "x"}, "model"),
        ({"model": IMAGE}, "prompt"),
        ({"model": IMAGE, "prompt": ""}, "prompt"),
        ({"model": IMAGE, "prompt": ["x"]}, "prompt"),
        ({"model": 1, "prompt": "x"}, "model"),
        ({"model": IMAGE, "prompt": "x", "response_format": "png"}, "response_format"),
        ({"model": IMAGE, "prompt": "x", "stream": True}, "stream"),
        ({"model": IMAGE, "prompt": "x", "mask": "x"}, "mask"),
        ([], None),
    ):
        refusal(await rig.http.post(GENERATIONS, json=body), param)
    for raw in (b"", b"{", b"\xff", b"[" * 100_000):
        refusal(await rig.http.post(GENERATIONS, content=raw), None)


async def test_other_methods_are_refused(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), connected=False)
    for path in (GENERATIONS, EDITS):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            check_error(await rig.http.request(method, path), 405, "method_not_allowed")
    check_error(await rig.http.post("/v1/images/variations"), 404, "not_found")


async def test_a_key_is_asked_for(nursery: trio.Nursery, tmp_path: Path) -> None:
    tables = {"server": {"api_key": "secret-key"}}
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), tables=tables, connected=False)
    for response in (await generate(rig), await edit(rig, PICTURE)):
        check_error(response, 401, "invalid_api_key")


# ── What goes wrong ─────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer_without_a_picture_is_an_error_with_the_models_words(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    rig.arena.switch(answers={"*": ["I cannot draw ", "that."]})
    for response in (await generate(rig), await generate(rig, n=2), await edit(rig, PICTURE)):
        error = check_error(response, 502, "upstream_error")
        assert "I cannot draw that." in error["message"]
        # What the site took is not to be sent once more.
        assert response.headers["x-should-retry"] == "false"
    assert len(rig.calls) == 4


async def test_what_the_sites_moderation_stopped_is_a_content_policy_violation(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    for words in ("", 'a0:"No."\n'):
        rig.arena.switch(raw={"*": words + 'ad:{"finishReason":"content-filter"}\n'})
        error = check_error(await generate(rig), 400, "content_policy_violation")
        assert error["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as failure:
        await rig.openai.images.generate(model=IMAGE, prompt="A cat")
    assert failure.value.code == "content_policy_violation"


async def test_a_picture_that_cannot_be_fetched_for_its_data_is_an_error(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, models=(IMAGE,))
    for url in (
        internet.put("http://pictures.test/text.png", ok(b"Hello")),
        f"{rig.arena_url}/media/seed.png",
        "http://unknown.test/a.png",
        "http://[::1/a.png",
        "nonsense",
    ):
        rig.arena.switch(raw={"*": media_answer(("image", url))})
        response = await generate(rig, response_format="b64_json")
        assert url in check_error(response, 502, "upstream_error")["message"]
        assert response.headers["x-should-retry"] == "false"
        # By its address it can be had.
        answer = pictures(await generate(rig))
        assert answer.data
        assert answer.data[0].url == url
    assert {host for host, _ in internet.attempts} == {"93.184.216.34"}


async def test_a_failure_of_the_site_is_told_as_in_a_chat(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    rig.arena.switch(a3="The kiln is cold", trouble_times=1)
    await served(rig, pictures(await generate(rig)))  # One failure is made good.
    rig.arena.switch(a3="The kiln is cold", trouble_times=None)
    assert "The kiln is cold" in check_error(await generate(rig), 502, "upstream_error")["message"]


async def test_a_client_that_leaves_aborts_all_its_pictures(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, MANY), filled=True)
    rig.arena.switch(latency_seconds=600)
    asks: list[tuple[Any, int]] = [(partial(generate, rig, n=3), 3), (partial(edit, rig, PICTURE), 1)]
    for ask, count in asks:
        rig.arena.record.clear()
        async with trio.open_nursery() as clients:
            clients.start_soon(ask)
            await until(lambda: len(rig.calls) == count)  # noqa: B023
            clients.cancel_scope.cancel()
        await until(lambda: {seen.outcome for seen in rig.calls} == {"aborted"})
    await until(lambda: rig.program.answers.active == 0)
    assert [ended.outcome for ended in rig.event(RequestEnded)] == ["client_left"] * 2
    rig.arena.switch(latency_seconds=0)
    await served(rig, pictures(await generate(rig, n=4)))


# ── In a chat ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_pictures_and_videos_are_markdown_whole_and_streamed(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE, RAY, EDIT), filled=True)
    data_url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    for model, message, opening, kind in (
        (IMAGE, "A cat", "![image](", "image/png"),
        (EDIT, picture("Black", data_url), "![image](", "image/png"),
        (RAY, "A cat", "[video](", "video/mp4"),
        (RAY, picture("This cat", data_url), "[video](", "video/mp4"),
    ):
        answer = whole(await rig.chat(model, message))
        stream = await rig.stream(model, message)
        assert stream.has_done
        assert stream.finish_reasons == [answer.choices[0].finish_reason] == ["stop"]
        for text in (answer.choices[0].message.content or "", stream.text):
            assert text.startswith(opening)
            address = text.removeprefix(opening).removesuffix(")")
            assert (await rig.http.get(address)).headers["content-type"] == kind
        assert answer.usage
    inputs = [(entry["capabilities"]["inputCapabilities"], entry["id"]) for entry in pick_models([RAY])]
    by_picture = {bool(each.get("image")): id_ for each, id_ in inputs}
    assert [seen.model_id for seen in rig.calls[-4:]] == [by_picture[False]] * 2 + [by_picture[True]] * 2


async def test_several_pictures_in_a_chat_are_as_many_choices(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    answer = whole(await rig.chat(IMAGE, "A cat", n=3))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    stream = await rig.stream(IMAGE, "A cat", n=3)
    texts = ["".join(c.delta.content or "" for c in stream.choices if c.index == index) for index in range(3)]
    assert len({*texts}) == 3
    assert all(text.startswith("![image](http") for text in texts)


async def test_a_picture_model_in_a_chat_may_answer_with_words(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, models=(IMAGE,), filled=True)
    rig.arena.switch(answers={"*": ["I cannot draw that."]})
    answer = whole(await rig.chat(IMAGE, "A cat"))
    assert answer.choices[0].message.content == "I cannot draw that."


async def test_a_picture_by_its_address_is_changed_or_set_in_motion(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig, internet = await go_online(nursery, tmp_path, models=(EDIT, RAY, MANY, GPT))
    url = internet.put("http://pictures.test/a.png")
    for model in (EDIT, RAY, MANY, GPT):
        whole(await rig.chat(model, picture("Look", url)))
        assert attached(rig) == [("image/png", PICTURE)]
    assert len((await rig.stream(MANY, picture("Both", url, url))).text) > 0
    assert attached(rig) == [("image/png", PICTURE)] * 2
    await refuses(rig, "http://127.0.0.1/a.png")
    whole(await show(rig, url))


async def test_a_picture_goes_round_from_generation_to_edit_and_chat(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(nursery, tmp_path, tables=KEEP, models=(IMAGE, EDIT, GPT))
    rig.program.media.site_origins.add(rig.arena_url)
    made = pictures(await generate(rig))
    [data] = await served(rig, made)
    assert made.data
    address = made.data[0].url or ""
    assert address.startswith(f"{rig.url}/media/")
    whole(await rig.chat(EDIT, picture("Black", address)))
    assert attached(rig) == [("image/png", data)]
    await served(rig, pictures(await edit(rig, data, model=EDIT)))
    whole(await show(rig, address))
    assert attached(rig) == [("image/png", data)]
