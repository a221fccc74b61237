"""An answer's way from its exchange to its sink: what is handed on at once, and what the task does."""

import functools
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from lmarena_proxy import (
    AnswerEvent,
    ArenaStreamDecoder,
    Exchange,
    ExchangeBroken,
    Finish,
    Head,
    Lease,
    Limits,
    Model,
    Pump,
    Refused,
    Setback,
    Text,
)

MODEL = Model(id="m-1", name="m")
END = b'ad:{"finishReason":"stop"}\n'


def limits(**fields: float) -> Limits:
    seconds = dict.fromkeys(
        ("queue_seconds", "rate_limit_seconds", "exchange_seconds", "total_seconds", "person_wait_seconds"),
        100.0,
    )
    return Limits(**{**seconds, "first_byte_seconds": 50.0, "idle_seconds": 10.0, **fields}, attempts=1)


class Recorder:
    """A sink that takes text at once, or only in its own time, as `is_quick` says."""

    def __init__(self, *, is_quick: bool = True, pause_seconds: float = 0) -> None:
        self.is_quick, self.pause_seconds = is_quick, pause_seconds
        self.events: list[AnswerEvent] = []
        self.taken_now = 0
        self.trouble: Exception | None = None
        # How the answer has ended.
        self.results: list[Any] = []

    async def deliver(self, events: Sequence[AnswerEvent]) -> bool:
        self.events += events
        await trio.sleep(self.pause_seconds)
        return True

    @property
    def takes_now(self) -> bool:
        return self.is_quick

    def deliver_now(self, text: str) -> None:
        if self.trouble:
            raise self.trouble
        self.events.append(Text(text))
        self.taken_now += 1

    def restart(self) -> bool:
        return False


def text_of(events: Sequence[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def line(text: str) -> bytes:
    return b"a0:" + json.dumps(text, ensure_ascii=False).encode() + b"\n"


def begun() -> Exchange:
    """An exchange whose head has come."""
    exchange = Exchange(1)
    exchange.begin(Head(1, 200))
    return exchange


def pump(sink: Recorder, **fields: float) -> Pump:
    return Pump(sink, Lease("req_1", MODEL), limits(**fields))


async def run(exchange: Exchange, sink: Recorder, own: Pump | None = None, **fields: float) -> None:
    try:
        sink.results.append(await (own or pump(sink, **fields)).run(exchange))
    except (Setback, Refused, ExchangeBroken, ValueError) as error:
        sink.results.append(error)


async def test_text_is_delivered_in_the_step_that_brings_it(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        await trio.testing.wait_all_tasks_blocked()
        exchange.feed(line("first"))
        exchange.feed(line("second ") + line("third"))
        assert sink.events == [Text("first"), Text("second third")]  # And no task has run since.
        exchange.feed(b'a0:"cut')
        exchange.feed(b' in two"\n')
        assert len(sink.events) == 2
        await trio.testing.wait_all_tasks_blocked()
        exchange.feed(line("last") + END)
        exchange.end()
    assert text_of(sink.events) == "firstsecond thirdcut in twolast"
    assert sink.results == [Finish("stop")]
    assert sink.taken_now == 2


async def test_the_head_of_an_answer_wakes_nobody(autojump_clock: MockClock) -> None:
    accepted: list[int] = []
    sink = Recorder()
    own = pump(sink)

    def accept(head: Head) -> bool:
        accepted.append(head.status)
        return own.accept(head)

    exchange = Exchange(1, accept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink, own)
        await trio.sleep(40)
        exchange.begin(Head(1, 200))
        exchange.feed(line("first"))
        assert (accepted, sink.events, sink.taken_now) == ([200], [Text("first")], 1)
        exchange.feed(END)
        exchange.end()


async def test_after_the_head_the_first_text_has_all_its_time_again(autojump_clock: MockClock) -> None:
    sink = Recorder()
    own = pump(sink)
    exchange = Exchange(1, own.accept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink, own)
        await trio.sleep(40)
        exchange.begin(Head(1, 200))
    assert str(sink.results[0]) == "The site fell silent for 50 s."
    assert trio.current_time() == pytest.approx(90)


async def test_without_a_head_the_site_has_sent_nothing(autojump_clock: MockClock) -> None:
    with pytest.raises(Setback, match="sent nothing within 50 s"):
        await pump(Recorder()).run(Exchange(1))
    assert trio.current_time() == pytest.approx(50)


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_head_that_is_not_accepted_is_told_once_and_then_its_body_read(is_late: bool) -> None:
    exchange, sink = Exchange(1, lambda head: False), Recorder()

    def refuse() -> None:
        exchange.begin(Head(1, 403))
        exchange.feed(line("no answer of anybody's"))
        exchange.end()

    if not is_late:
        refuse()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        await trio.testing.wait_all_tasks_blocked()
        if is_late:
            refuse()
    [refused] = sink.results
    assert isinstance(refused, Refused)
    assert (refused.head.status, sink.events) == (403, [])
    assert await exchange.receive() == line("no answer of anybody's")
    assert await exchange.receive() == b""


async def test_bytes_before_their_head_wait_for_it() -> None:
    sink = Recorder()
    own = pump(sink)
    exchange = Exchange(1, own.accept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink, own)
        await trio.testing.wait_all_tasks_blocked()
        exchange.feed(line("early"))
        await trio.testing.wait_all_tasks_blocked()
        assert sink.events == []
        exchange.begin(Head(1, 200))
        exchange.feed(line(" and late") + END)
        exchange.end()
    assert text_of(sink.events) == "early and late"


async def test_bytes_whose_head_does_not_come_are_not_waited_for_longer(autojump_clock: MockClock) -> None:
    exchange, sink = Exchange(1, lambda head: True), Recorder()
    exchange.feed(line("early"))
    with trio.fail_after(500):
        await run(exchange, sink)
    assert str(sink.results[0]) == "The site sent nothing within 50 s."
    assert trio.current_time() == pytest.approx(50)


async def test_an_end_before_a_head_is_no_answer() -> None:
    exchange = Exchange(1, lambda head: True)
    exchange.feed(line("lost"))
    exchange.end()
    with pytest.raises(ExchangeBroken, match="ended before it began"):
        await exchange.receive()


async def test_trouble_with_the_head_is_its_own_requests() -> None:
    def accept(head: Head) -> bool:
        raise ValueError("no such gate")

    exchange = Exchange(1, accept)
    exchange.begin(Head(1, 200))  # The bridge, which calls this, sees nothing of it.
    with pytest.raises(ValueError, match="no such gate"):
        await exchange.receive()


KINDS = st.sampled_from(
    [
        line("text"),
        line("你好 😀"),
        line(""),
        b'a0:"\\ud83d"\na0:"\\ude00"\n',
        b'a0:"broken \xff utf-8"\n',
        b"a0:not json\n",
        b"a0:7\n",
        b'ag:"thinking"\n',
        b'a2:[{"type":"image","image":"https://x/y.png"}]\n',
        b"zz:{}\n",
        b"\n",
        b'b0:"of the other side"\n',
        b'a0:"with a carriage return"\r\n',
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(KINDS, max_size=12), st.lists(st.integers(0, 500), max_size=8), st.randoms(use_true_random=False)
)
def test_whatever_is_handed_on_by_whom_all_arrives_in_order(
    lines: list[bytes], cuts: list[int], chance: random.Random
) -> None:
    body = line("begin") + b"".join(lines) + END
    places = sorted({0, *(cut % len(body) for cut in cuts), len(body)})
    pieces = [body[start:end] for start, end in itertools.pairwise(places)]
    sink = Recorder()

    async def play() -> None:
        exchange = begun()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, exchange, sink)
            for piece in pieces:
                sink.is_quick = chance.random() < 0.7
                sink.pause_seconds = chance.choice((0, 0, 0.01))
                exchange.feed(piece)
                if chance.random() < 0.6:
                    await trio.sleep(chance.choice((0, 0.005, 0.02)))
            exchange.end()

    trio.run(play, clock=MockClock(autojump_threshold=0))
    expected = ArenaStreamDecoder().feed(body)
    assert sink.results == [expected.pop()]
    assert text_of(sink.events) == text_of(expected)
    others = [event for event in sink.events if not isinstance(event, Text)]
    assert others == [event for event in expected if not isinstance(event, Text)]


async def test_text_that_is_handed_on_at_once_keeps_the_answer_alive(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        for _ in range(8):
            exchange.feed(line("more"))
            await trio.sleep(7)
        fed_at = trio.current_time() - 7
    assert sink.taken_now == 7
    assert str(sink.results[0]) == "The site fell silent for 10 s."
    assert trio.current_time() == pytest.approx(fed_at + 10)


async def test_until_the_first_text_patience_is_longer(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        await trio.sleep(1)
        exchange.feed(line(""))
        await trio.sleep(40)
        exchange.feed(line("first"))
        began_at = trio.current_time()
    assert str(sink.results[0]) == "The site fell silent for 10 s."
    assert trio.current_time() == pytest.approx(began_at + 10)


async def test_from_the_first_text_on_patience_is_shorter(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        await trio.sleep(1)
        exchange.feed(line("first"))
        assert sink.taken_now == 1
    assert str(sink.results[0]) == "The site fell silent for 10 s."
    assert trio.current_time() == pytest.approx(11)


async def test_a_slow_sink_is_not_the_sites_silence(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder(is_quick=False, pause_seconds=60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        for text in "abc":
            exchange.feed(line(text))
            await trio.sleep(65)
        exchange.feed(END)
    assert sink.results == [Finish("stop")]
    assert text_of(sink.events) == "abc"


async def test_trouble_in_the_sink_is_its_own_requests() -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        exchange.feed(line("first"))
        await trio.testing.wait_all_tasks_blocked()
        sink.trouble = ValueError("no such encoder")
        exchange.feed(line("second"))  # The bridge, which calls this, sees nothing of it.
    assert sink.results == [sink.trouble]


async def test_an_answer_without_end_is_cut_off_wherever_its_text_goes() -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(run, answer_bytes=1 << 20), exchange, sink)
        nursery.start_soon(feed_endlessly, exchange, sink)
    assert "does not end" in str(sink.results[0])
    assert sink.taken_now


async def feed_endlessly(exchange: Exchange, sink: Recorder) -> None:
    while not sink.results:
        exchange.feed(line("x" * 1000))
        await trio.testing.wait_all_tasks_blocked()


async def test_after_a_cancellation_nothing_is_handed_on(autojump_clock: MockClock) -> None:
    exchange, sink = begun(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, exchange, sink)
        exchange.feed(line("first"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    exchange.feed(line("second"))
    assert sink.events == [Text("first")]
    assert sink.results == []
