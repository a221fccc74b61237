"""Images above what goes inside a message: uploaded by the page's own flow, through a tab's script.

The stand-in's flow is off by default, as it is no part of the arena contract (`demo/uploads.py`).
"""

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from harness import GPT, Rig, Tables, check_error, merge, start, until, user, whole

import lmarena_proxy
from demo import contract
from demo.arena import Switches
from demo.twin import Twin
from demo.uploads import UploadSwitches
from lmarena_proxy import Uploader

MIB = 1 << 20
MANY = "nano-banana"  # an image model that takes several images
SMALL: Tables = {"arena": {"max_attachment_mb": 1}}


def image(seed: str, size_bytes: int = 2 * MIB) -> bytes:
    head = contract.png(seed)
    return head + bytes(size_bytes - len(head))


def picture(text: str, *images: bytes) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def with_uploads(
    nursery: trio.Nursery, directory: Path, tables: Tables | None = None, **uploads: Any
) -> Rig:
    """Everything running; the site takes images of up to 1 MiB in a message, and offers its upload."""
    switches = Switches(uploads=UploadSwitches(offered=True, **uploads))
    models = (GPT, MANY)
    return await start(
        nursery, directory, tables=merge(SMALL, tables or {}), models=models, switches=switches
    )


def steps(rig: Rig) -> list[tuple[str, str]]:
    return [(seen.step, seen.outcome) for seen in rig.arena.uploads.record]


def puts(rig: Rig) -> list[str]:
    """The hashes of what has come to the storage."""
    return [seen.digest for seen in rig.arena.uploads.record if (seen.step, seen.outcome) == ("put", "done")]


def attached(rig: Rig, call: int = -1, message: int = 0) -> list[bytes]:
    """What the site has been shown by its address, as it is in its storage."""
    found = []
    for each in rig.calls[call].body["messages"][message]["experimental_attachments"]:
        address, _, query = each["url"].partition("?")
        assert address.startswith(f"{rig.arena_url}/storage/")
        assert "Signature" in query
        assert each["contentType"] == "image/png"
        found.append(rig.arena.uploads.files[address.rpartition("/storage/")[2]])
    return found


async def refused(rig: Rig, response: httpx.Response, *says: str) -> None:
    error = check_error(response, 413, "request_too_large")
    assert error["param"] == "messages[0].content"
    assert "up to 1 MiB in a message" in error["message"]
    for each in says:
        assert each in error["message"], error
    assert rig.calls == []
    # No conversation is held by what failed.
    whole(await rig.chat(GPT, "Hello"))


# ── It goes there ───────────────────────────────────────────────────────────────────────────────────────────


async def test_an_image_of_sixteen_megabytes_is_uploaded_and_shown_by_its_address(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await with_uploads(nursery, tmp_path, {"arena": {"max_attachment_mb": 5}})
    large = image("large", 16 * MIB)
    small = image("small", 1000)
    response = await rig.chat(GPT, picture("What is this?", large, small))
    assert "What is this?" in (whole(response).choices[0].message.content or "")
    place, put, address = rig.arena.uploads.record
    assert steps(rig) == [("place", "done"), ("put", "done"), ("address", "done")]
    assert place.account == address.account is not None
    assert place.values[1] == put.content_type == "image/png"
    assert (put.size_bytes, put.digest) == (16 * MIB, digest(large))
    # The storage gets no cookies of the site.
    assert (place.has_cookies, put.has_cookies) == (True, False)
    first, second = rig.calls[0].body["messages"][0]["experimental_attachments"]
    assert first["name"] == place.values[0]
    assert first["url"].startswith(f"{rig.arena_url}/storage/")
    assert second["url"].startswith("data:image/png;base64,")
    # What is kept of the request names the image only.
    kept = (await rig.http.get(f"/api/requests/{response.headers['x-request-id']}")).text
    assert first["name"] in kept
    assert "/storage/" not in kept


async def test_an_image_of_an_edit_is_uploaded(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path)
    files = [("image", (name, image(name), "image/png")) for name in ("a.png", "b.png")]
    response = await rig.http.post("/v1/images/edits", data={"model": MANY, "prompt": "x"}, files=files)
    assert response.status_code == 200, response.text
    assert attached(rig) == [image("a.png"), image("b.png")]


async def test_what_is_asked_about_twice_is_uploaded_once(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path)
    first, second = image("first"), image("second")
    messages = [
        picture("One", first, second),
        {"role": "assistant", "content": "Two"},
        picture("Three", first),
    ]
    response = await rig.chat(GPT, *messages, n=2)
    assert len(whole(response).choices) == 2
    assert sorted(puts(rig)) == sorted([digest(first), digest(second)])
    assert len(rig.calls) == 2
    for call in range(2):
        assert attached(rig, call, 0) == [first, second]
        assert attached(rig, call, 2) == [first]


async def test_another_attempt_at_the_answer_uploads_nothing_again(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await with_uploads(nursery, tmp_path)
    rig.arena.switch(failures={"*": {"status": 500, "times": 2}})
    whole(await rig.chat(GPT, picture("x", image("a"))))
    assert len(rig.calls) == 3
    assert puts(rig) == [digest(image("a"))]
    assert [attached(rig, call) for call in range(3)] == [[image("a")]] * 3


async def test_an_upload_waits_for_a_tab_as_a_request_does(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(uploads=UploadSwitches(offered=True))
    rig = await start(nursery, tmp_path, tables=SMALL, models=(GPT,), switches=switches, connected=False)
    answered: list[httpx.Response] = []

    async def ask() -> None:
        answered.append(await rig.chat(GPT, picture("x", image("a"))))

    nursery.start_soon(ask)
    await until(lambda: rig.program.answers.active == 1)
    await rig.connect(ready=False)
    assert not answered
    await rig.make_ready()
    await until(lambda: answered)
    whole(answered[0])
    assert attached(rig) == [image("a")]


async def test_a_new_deployment_of_the_site_is_noticed(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path)
    whole(await rig.chat(GPT, picture("x", image("a"))))
    rig.arena.switch(uploads={"offered": True, "deployment": 2})
    whole(await rig.chat(GPT, picture("x", image("b"))))
    assert attached(rig) == [image("b")]


async def test_only_one_tab_s_script_has_to_know_how(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path)
    older = Twin(rig.arena_url, rig.program.api.bridge_url, features=())
    await nursery.start(older.run)
    await older.accept_terms()
    await until(lambda: len(rig.program.bridges.accounts()) == 2)
    for seed in "abc":
        whole(await rig.chat(GPT, picture("x", image(seed))))
    assert puts(rig) == [digest(image(seed)) for seed in "abc"]
    [account] = {seen.account for seen in rig.arena.uploads.record if seen.step != "put"}
    assert hashlib.sha256(str(account).encode()).hexdigest() == rig.twin.account


# ── It cannot go there ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_page_that_offers_no_upload_leaves_it_at_a_413(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(nursery, tmp_path, tables=SMALL, models=(GPT,))
    response = await rig.chat(GPT, picture("x", image("a")))
    await refused(rig, response, "the site's page offers no upload")


async def test_an_older_script_is_not_asked(nursery: trio.Nursery, tmp_path: Path) -> None:
    switches = Switches(uploads=UploadSwitches(offered=True))
    rig = await start(nursery, tmp_path, tables=SMALL, models=(GPT,), switches=switches, connected=False)
    rig.twin.features = ()
    await rig.connect()
    await refused(rig, await rig.chat(GPT, picture("x", image("a"))), "no connected tab has a userscript")
    assert steps(rig) == []


async def test_a_tab_that_is_not_ready_is_not_asked_when_another_one_is(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await with_uploads(nursery, tmp_path)
    older = Twin(rig.arena_url, rig.program.api.bridge_url, features=())
    await nursery.start(older.run)
    await older.accept_terms()
    await rig.twin.sign_out()
    await until(lambda: [bridge.state for bridge in rig.program.bridges].count("sign_in") == 1)
    response = await rig.chat(GPT, picture("x", image("a")))
    await refused(rig, response, "the userscript in the tab cannot upload")


async def test_the_site_s_words_reach_the_client(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path, words="Too many pixels")
    await refused(rig, await rig.chat(GPT, picture("x", image("a"))), "Too many pixels")
    assert steps(rig) == [("place", "refused")]


async def test_there_is_an_end_to_what_is_uploaded(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmarena_proxy, "MAX_UPLOAD_MB", 2)
    rig = await with_uploads(nursery, tmp_path)
    await refused(rig, await rig.chat(GPT, picture("x", image("a", 2 * MIB + 1))), "above 2 MiB")
    whole(await rig.chat(GPT, picture("x", image("b", 2 * MIB))))
    assert puts(rig) == [digest(image("b"))]


# ── Something happens meanwhile ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uploader, "PAUSES", (0.0,))


@pytest.mark.parametrize("step", ["place", "put", "address"])
async def test_a_client_that_leaves_ends_the_upload(nursery: trio.Nursery, tmp_path: Path, step: str) -> None:
    rig = await with_uploads(nursery, tmp_path, hang=step)
    async with trio.open_nursery() as clients:
        clients.start_soon(rig.chat, GPT, picture("x", image("a")))
        await until(lambda: steps(rig) and steps(rig)[-1] == (step, "running"))
        clients.cancel_scope.cancel()
    await until(lambda: steps(rig)[-1] == (step, "aborted"))
    await until(lambda: rig.program.answers.active == 0)
    assert rig.calls == []
    [bridge] = rig.program.bridges
    assert bridge.in_flight == 0
    whole(await rig.chat(GPT, "Hello"))


async def test_an_upload_survives_a_tab_that_is_lost(
    nursery: trio.Nursery, tmp_path: Path, at_once: None
) -> None:
    rig = await with_uploads(nursery, tmp_path, hang="put")
    async with trio.open_nursery() as clients:
        clients.start_soon(answers_well, rig, picture("x", image("a")))
        await until(lambda: ("put", "running") in steps(rig))
        rig.arena.switch(uploads={"offered": True})
        await rig.twin.open_page()
    assert [each for each in steps(rig) if each[0] == "put"] == [("put", "aborted"), ("put", "done")]
    assert attached(rig) == [image("a")]


async def answers_well(rig: Rig, *messages: Any) -> None:
    whole(await rig.chat(GPT, *messages))


async def test_a_tab_that_is_lost_each_time_is_an_error(
    nursery: trio.Nursery, tmp_path: Path, at_once: None
) -> None:
    rig = await with_uploads(nursery, tmp_path, hang="put")
    responses: list[httpx.Response] = []

    async def ask() -> None:
        responses.append(await rig.chat(GPT, picture("x", image("a"))))

    async with trio.open_nursery() as clients:
        clients.start_soon(ask)
        for attempt in range(3):
            await until(lambda: steps(rig).count(("put", "running")) == 1)
            await rig.twin.open_page()
            await until(lambda: steps(rig).count(("put", "aborted")) == attempt + 1)  # noqa: B023
    error = check_error(responses[0], 502, "upstream_error")
    assert "the tab was lost" in error["message"]
    assert rig.calls == []


async def test_a_limit_of_the_site_is_waited_for(nursery: trio.Nursery, tmp_path: Path) -> None:
    trouble: dict[str, Any] = {"status": {"place": 429}, "status_times": 2, "headers": {"retry-after": "1"}}
    rig = await with_uploads(nursery, tmp_path, **trouble)
    whole(await rig.chat(GPT, picture("x", image("a"))))
    assert steps(rig)[:3] == [("place", "refused"), ("place", "refused"), ("place", "done")]
    first, second, third = [seen.arrived for seen in rig.arena.uploads.record[:3]]
    assert min(second - first, third - second) >= 0.9
    assert rig.program.bridges.rate_limited == 2
    assert attached(rig) == [image("a")]


@pytest.mark.parametrize(
    ("status", "headers"),
    [(401, {}), (403, {"cf-mitigated": "challenge", "content-type": "text/html"})],
    ids=["sign-in", "check"],
)
@pytest.mark.parametrize("step", ["place", "address"])
async def test_what_a_reload_may_help_is_reloaded(
    nursery: trio.Nursery, tmp_path: Path, step: str, status: int, headers: dict[str, str]
) -> None:
    rig = await with_uploads(nursery, tmp_path, status={step: status}, status_times=1, headers=headers)
    whole(await rig.chat(GPT, picture("x", image("a"))))
    assert rig.program.bridges.reloads == 1
    assert steps(rig).count((step, "refused")) == 1
    assert attached(rig) == [image("a")]


@pytest.mark.parametrize(
    ("trouble", "attempts", "says"),
    [
        ({"place": 500}, 3, "did not take the upload of an image (status 500)"),
        ({"put": 403}, 3, "the site's storage answered 403"),
        ({"place": 403}, 1, "did not take the upload of an image (status 403)"),
    ],
    ids=["action", "storage", "refusal"],
)
async def test_a_failure_is_tried_again_a_few_times_and_told(
    nursery: trio.Nursery, tmp_path: Path, at_once: None, trouble: dict[str, int], attempts: int, says: str
) -> None:
    rig = await with_uploads(nursery, tmp_path, status=trouble)
    error = check_error(await rig.chat(GPT, picture("x", image("a"))), 502, "upstream_error")
    assert says in error["message"]
    assert [outcome for _, outcome in steps(rig)].count("refused") == attempts
    assert rig.calls == []


async def test_too_large_is_too_large_whoever_says_so(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path, status={"place": 413})
    check_error(await rig.chat(GPT, picture("x", image("a"))), 413, "request_too_large")
    assert steps(rig) == [("place", "refused")]


async def test_an_upload_does_not_take_for_ever(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Uploader, "ATTEMPT_SECONDS", 0.5)
    rig = await with_uploads(nursery, tmp_path, hang="address")
    check_error(await rig.chat(GPT, picture("x", image("a"))), 504, "timeout")
    await until(lambda: [outcome for _, outcome in steps(rig)].count("running") == 0)
    assert rig.calls == []


async def test_other_requests_go_on_meanwhile(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await with_uploads(nursery, tmp_path, {"pool": {"sessions_per_model": 1}}, hang="put")
    async with trio.open_nursery() as clients:
        clients.start_soon(rig.chat, GPT, picture("x", image("a")))
        await until(lambda: ("put", "running") in steps(rig))
        whole(await rig.chat(GPT, user("Hello")))
        clients.cancel_scope.cancel()


# ── By address ──────────────────────────────────────────────────────────────────────────────────────────────


async def serve_files(nursery: trio.Nursery, files: Sequence[bytes]) -> str:
    """Files under /0, /1, ...; returns the origin."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            request = await stream.receive_some(65536)
            data = files[int(request.split(b" ")[1][1:])]
            # Whoever asks may have enough before the end.
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)

    [listener] = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listener.socket.getsockname()[1]}"


async def test_an_image_that_comes_by_its_address_is_uploaded_too(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await with_uploads(nursery, tmp_path, {"media": {"max_file_mb": 4}})
    files = [image("a", 3 * MIB), image("b", 1000), image("c", 5 * MIB)]
    origin = await serve_files(nursery, files)
    rig.program.media.site_origins.add(origin)

    def ask(*places: int) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": f"{origin}/{place}"}} for place in places]
        return {"role": "user", "content": [{"type": "text", "text": "x"}, *images]}

    whole(await rig.chat(GPT, ask(0, 1)))
    assert puts(rig) == [digest(files[0])]
    error = check_error(await rig.chat(GPT, ask(2)), 413, "request_too_large")
    assert "more than 4 MiB" in error["message"]
