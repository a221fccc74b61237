"""The request log as it is read: pages, search, export's rows, and how things went over time."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmarena_proxy import ClientError, RequestEnded, RequestFilter, RequestLog, Store

NOW = time.time()
ROW: dict[str, Any] = {
    "request_id": "r",
    "created_at": NOW - 60,
    "model": "gpt",
    "model_id": "1",
    "is_stream": True,
    "status": 200,
    "outcome": "stop",
    "session_id": "s",
    "attempts": 1,
    "queued_seconds": 0.0,
    "first_byte_seconds": 0.5,
    "total_seconds": 2.5,
    "prompt_tokens": 3,
    "completion_tokens": 40,
    "messages": '[{"role":"user","content":"Say \\"hi\\" 100%","attachments":[]}]',
    "answer": "hi there",
    "tries": "[]",
    "parameters": "{}",
}


@asynccontextmanager
async def log_of(directory: Path, *rows: dict[str, Any]) -> AsyncIterator[RequestLog]:
    store = Store(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for number, row in enumerate(rows):
            store.log_request(msgspec.convert({**ROW, "request_id": f"r{number}", **row}, RequestEnded))
        await store.settle()
        try:
            yield RequestLog(store)
        finally:
            store.close()  # Else a test that fails never ends.


async def ids(log: RequestLog, before: str = "", limit: int = 50, **wanted: str) -> list[str]:
    return [row["request_id"] for row in await log.page(RequestFilter(**wanted), before, limit)]


async def test_pages_are_newest_first_and_meet_without_gap_or_overlap(tmp_path: Path) -> None:
    times = [5.0, 3.0, 5.0, 1.0, 4.0, 5.0, 2.0]
    async with log_of(tmp_path, *({"created_at": each} for each in times)) as log:
        everything = await ids(log)
        assert everything == ["r5", "r2", "r0", "r4", "r1", "r6", "r3"]
        paged: list[str] = []
        while page := await ids(log, before=paged[-1] if paged else "", limit=2):
            paged += page
        assert paged == everything
        assert await ids(log, before="unknown") == []


async def test_filters_choose_by_model_status_and_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"model": "claude", "model_id": "2", "answer": "nothing"},
        {"status": 502, "outcome": "upstream_error", "error": "The site failed", "answer": None},
        {"status": 499, "outcome": "client_left", "answer": "Grüße 你好"},
        {"status": 429, "messages": None, "answer": None},
    ]
    async with log_of(tmp_path, *rows) as log:
        assert await ids(log, model="claude") == await ids(log, model="2") == ["r0"]
        assert await ids(log, status="ok") == ["r0"]
        assert await ids(log, status="failed") == ["r3", "r1"]
        assert await ids(log, status="left") == ["r2"]
        assert await ids(log, status="429") == ["r3"]
        assert await ids(log, q="site FAILED") == ["r1"]
        assert await ids(log, q="你好") == ["r2"]
        assert await ids(log, q='"hi"') == ["r2", "r1", "r0"]
        assert await ids(log, q="100%") == ["r2", "r1", "r0"]
        assert await ids(log, q="1%0") == await ids(log, q="h_ t") == []
        assert await ids(log, q="site", model="claude") == []
        with pytest.raises(ClientError, match="status"):
            await ids(log, status="fine")
        for character in ("a", "%", "\x01", "😀"):
            assert await ids(log, q=character * 1000) == []
        with pytest.raises(ClientError, match="1000 characters, but got 1001"):
            await ids(log, q="a" * 1001)


NO_SURROGATES: Any = ("Cs",)


@given(
    text=st.text(
        st.characters(exclude_categories=NO_SURROGATES, exclude_characters="\0"), min_size=1, max_size=20
    )
)
@settings(max_examples=60, deadline=None)
def test_any_text_that_stands_in_an_answer_or_a_message_is_found(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def look() -> None:
        message = msgspec.json.encode([{"role": "user", "content": text}]).decode()
        rows = ({"answer": f"a{text}b"}, {"answer": None, "messages": message})
        async with log_of(tmp_path_factory.mktemp("store"), *rows) as log:
            assert await ids(log, q=text) == ["r1", "r0"]

    trio.run(look)


async def test_one_request_is_whole_and_a_summary_is_short(tmp_path: Path) -> None:
    tries = '[{"session_id":"s","bridge":1,"started_seconds":0.1,"problem":"the tab was lost"}]'
    async with log_of(tmp_path, {"answer": "x" * 1000, "tries": tries, "parameters": '{"n":2}'}) as log:
        found = await log.one("r0")
        assert found
        assert found["tries"][0]["problem"] == "the tab was lost"
        assert found["parameters"] == {"n": 2}
        assert found["messages"][0]["content"] == 'Say "hi" 100%'
        assert found["is_stream"] is True
        [summary] = await log.page(RequestFilter(), "", 10)
        assert summary["preview"] == found["preview"] == "x" * 160
        assert not summary.keys() & {"messages", "answer", "tries", "traceback"}
        assert await log.one("other") is None


async def test_statistics_have_counts_and_percentiles_by_time_and_by_model(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"first_byte_seconds": float(number), "total_seconds": number + 2.0, "completion_tokens": 10 * number}
        for number in range(1, 101)
    ]
    rows.append({"status": 502, "model": "claude", "model_id": "2", "first_byte_seconds": None})
    rows.append({"status": 499, "model": "claude", "model_id": "2", "first_byte_seconds": 900.0})
    rows.append({"created_at": NOW - 7200, "first_byte_seconds": 900.0})
    rows.append({"created_at": NOW - 1800, "first_byte_seconds": 7.0, "total_seconds": 7.05})
    async with log_of(tmp_path, *rows) as log:
        hour = await log.statistics(1, 60)
        day = await log.statistics(24, 900)
    assert len(hour["times"]) == 60
    assert len(day["times"]) == 96
    assert hour["times"][0] == hour["from"]
    assert hour["to"] >= NOW
    assert (sum(hour["requests"]), sum(day["requests"]), sum(hour["errors"])) == (103, 104, 1)
    [busy] = [number for number, count in enumerate(hour["requests"]) if count > 1]
    assert hour["times"][busy] <= NOW - 60 < hour["times"][busy] + 60
    assert hour["first_byte_seconds"]["median"][busy] == 50
    assert hour["first_byte_seconds"]["p95"][busy] == 95
    assert hour["tokens_per_second"]["median"][busy] == 250
    [quiet] = [number for number, count in enumerate(hour["requests"]) if count == 1]
    assert hour["first_byte_seconds"]["median"][quiet] == 7
    assert hour["tokens_per_second"]["median"][quiet] is None  # it came in one piece
    models = {each["model"]: each for each in hour["models"]}
    assert models["claude"]["requests"] == 2
    assert models["claude"]["errors"] == 1
    assert models["claude"]["first_byte_seconds"] == {"median": None, "p95": None}
    assert models["gpt"]["requests"] == 101
    total = hour["total"]
    assert (total["requests"], total["errors"]) == (103, 1)
    assert (total["first_byte_seconds"]["median"], total["tokens_per_second"]["p95"]) == (50, 475)


async def test_the_queue_is_as_deep_as_its_waits_overlap(tmp_path: Path) -> None:
    start = NOW - 600
    waits = [(0, 200), (10, 20), (15, 100), (130, 10), (139, 20)]
    rows = ({"created_at": start + begin, "queued_seconds": float(seconds)} for begin, seconds in waits)
    async with log_of(tmp_path, *rows, {"created_at": start}) as log:
        hour = await log.statistics(1, 60)

    def waiting(at: float) -> int:
        return sum(start + begin <= at < start + begin + seconds for begin, seconds in waits)

    for bucket, depth in zip(hour["times"], hour["queue_depth"], strict=True):
        assert depth == max(waiting(bucket + step / 10) for step in range(600)), bucket


async def test_statistics_of_an_empty_log_are_empty(tmp_path: Path) -> None:
    async with log_of(tmp_path) as log:
        hour = await log.statistics(1, 60)
    assert sum(hour["requests"]) == sum(hour["queue_depth"]) == 0
    assert set(hour["first_byte_seconds"]["p95"]) == {None}
    assert hour["models"] == []
    assert (hour["total"]["requests"], hour["total"]["first_byte_seconds"]["median"]) == (0, None)
