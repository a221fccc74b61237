"""What the program and the userscript add to the way between client and arena, through a real Chromium.

    python tests/bench/browser.py                         1 and 100 streams, tab visible and hidden
    python tests/bench/browser.py --streams 10 --rounds 1 other numbers
    python tests/bench/browser.py --at-once               all begin at once, not over two seconds

The stand-in arena, the program and Chromium run as processes of their own; the page's origin is
https://lmarena.ai. Each answer carries when its call arrived and when each of its pieces was sent, by the
monotonic clock that all processes share. Beside it a plain fetch in a tab without the userscript measures
what the browser and the arena cost by themselves: the difference is what program and userscript add.

Chromium is driven through its DevTools pipe: under Playwright a page never counts as hidden.
Needs chromium (or CHROMIUM) and trustme.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import trio
from run import REPOSITORY, STARTUP_SECONDS, Relay, free_port, running, this_program

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-quic --no-first-run "
FLAGS += "--disable-sync --disable-background-networking "
FLAGS += "--disable-component-update --ignore-certificate-errors "
# A hidden tab's timers fire once a second; after 5 minutes, here after 10 seconds, once a minute.
FLAGS += "--enable-features=IntensiveWakeUpThrottling:grace_period_seconds/10"
HIDDEN_SECONDS = 12
TICK_MS, TICKING_SECONDS = 50, 3
SITE = "https://lmarena.ai"
CREATE_PATH = "/nextjs-api/stream/create-evaluation"
MODEL = "gemini-2.5-pro"
MARK = re.compile(rb"<(\d+) (\d+)>")
MEASURES = ("request up", "first piece down", "later pieces down")


@dataclass
class Samples:
    """Nanoseconds, by measure; and how many answers were not whole."""

    values: dict[str, list[int]] = field(default_factory=lambda: {measure: [] for measure in MEASURES})
    wrong: int = 0

    def add(self, asked_ns: int, pieces: list[tuple[int, int, int]], expected: int) -> None:
        """An answer's pieces: when its call had arrived, when the piece was sent, when it was received."""
        self.wrong += len(pieces) != expected
        for number, (arrived_ns, sent_ns, received_ns) in enumerate(pieces):
            if number == 0:
                self.values["request up"].append(arrived_ns - asked_ns)
            measure = "later pieces down" if number else "first piece down"
            self.values[measure].append(received_ns - sent_ns)

    def cells(self, measure: str) -> tuple[float, float]:
        """Median and 99th percentile, in milliseconds."""
        values = sorted(self.values[measure])
        return statistics.median(values) / 1e6, values[min(len(values) - 1, len(values) * 99 // 100)] / 1e6


@dataclass(frozen=True)
class Load:
    streams: int
    over_seconds: float  # in which they begin
    requests: int  # one after the other, of each stream
    pieces: int  # of an answer
    gap_seconds: float  # between two pieces, on average

    @classmethod
    def of(cls, streams: int, at_once: bool) -> "Load":
        """A thousand pieces a second at most, and all streams at once for half of the time."""
        if streams == 1:
            return cls(1, 0.0, 20, 20, 0.02)
        gap_seconds = max(0.02, streams / 1000)
        return cls(streams, 0.0 if at_once else 2.0, 1, round(4 / gap_seconds), gap_seconds)

    def begins_at(self, stream: int) -> float:
        """Seconds from the beginning until this one asks first."""
        return self.over_seconds * stream / self.streams

    @property
    def order(self) -> str:
        """What `stamping_arena.py` reads in a request."""
        return f"send {self.pieces} pieces, {self.gap_seconds} s apart"


# ── Chromium ────────────────────────────────────────────────────────────────────────────────────────────────


class Chromium:
    """A browser that does what its DevTools pipe says (JSON, each message ended by a zero byte)."""

    def __init__(self, arena_port: int, profile: str) -> None:
        rules = f"--host-resolver-rules=MAP lmarena.ai:443 127.0.0.1:{arena_port}"
        # The shell makes of its own pipes the numbers 3 and 4, where Chromium looks for them.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", CHROMIUM, *FLAGS.split()]
        self.process = subprocess.Popen(
            [*command, rules, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.commands: IO[bytes] = self.process.stdin
        self.replies: IO[bytes] = self.process.stdout
        self.unread, self.numbers = b"", 0

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self.numbers += 1
        message = {"id": self.numbers, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            reply = self.next_message()
            if reply.get("id") == self.numbers:  # All else are events.
                if "error" in reply:
                    sys.exit(f"{method}: {reply['error']}")
                return reply["result"]

    def next_message(self) -> Any:
        while b"\0" not in self.unread:
            data = os.read(self.replies.fileno(), 1 << 16)
            if not data:
                sys.exit(f"{CHROMIUM} has ended.")
            self.unread += data
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(STARTUP_SECONDS)


class Tab:
    def __init__(self, browser: Chromium) -> None:
        self.browser = browser
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        return self.browser.send(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        reply = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in reply:
            sys.exit(f"In the page: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def show(self) -> None:
        self.browser.send("Target.activateTarget", targetId=self.target)

    def ticks(self, seconds_before: float) -> int:
        """How often a timer that began so long ago fires in three seconds."""
        self.evaluate(
            f"clearInterval(window.ticking); ticks = 0; ticking = setInterval(() => ticks++, {TICK_MS})"
        )
        time.sleep(seconds_before)
        before = self.evaluate("ticks")
        time.sleep(TICKING_SECONDS)
        return int(self.evaluate("clearInterval(ticking); ticks") - before)

    def clock_offset_ns(self) -> int:
        """What is added to the page's clock to get the monotonic one: right to half of the fastest call."""
        offsets = []
        for _ in range(100):
            before_ns = time.monotonic_ns()
            page_ms = self.evaluate("performance.now()")
            after_ns = time.monotonic_ns()
            offsets.append((after_ns - before_ns, (before_ns + after_ns) // 2 - int(page_ms * 1e6)))
        return int(statistics.median(offset for _, offset in sorted(offsets)[:10]))


# The same calls without program and userscript. Per answer: when it was asked, and [arrived, sent, received]
# of each piece: the first two as text, as they are more than a number of JavaScript holds.
PLAIN_FETCHES = r"""globalThis.plain = {
  running: [],
  async ask(path, body) {
    const answer = { asked: performance.now(), pieces: [] }, decoder = new TextDecoder();
    const headers = { "Content-Type": "text/plain;charset=UTF-8" };
    const response = await fetch(path, { method: "POST", body, headers, cache: "no-store" });
    const reader = response.body.getReader();
    for (let text = ""; ; ) {
      const { done, value } = await reader.read();
      const received = performance.now();
      if (done) return answer;
      text += decoder.decode(value, { stream: true });
      const end = text.lastIndexOf("\n") + 1;
      for (const mark of text.slice(0, end).matchAll(/<(\d+) (\d+)>/g))
        answer.pieces.push([mark[1], mark[2], received]);
      text = text.slice(end);
    }
  },
  async stream(path, bodies) {
    const answers = [];
    for (const body of bodies) answers.push(await plain.ask(path, body));
    return answers;
  },
  async all() {
    return (await Promise.all(plain.running.splice(0))).flat();
  },
}; null"""


# ── The two ways ────────────────────────────────────────────────────────────────────────────────────────────


async def ask(api_port: int, load: Load, place: int, samples: Samples) -> None:
    """A client: its requests, one after the other."""
    await trio.sleep(load.begins_at(place))
    message = {"role": "user", "content": load.order}
    body = json.dumps({"model": MODEL, "stream": True, "messages": [message]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{api_port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(load.requests):
        async with await trio.open_tcp_stream("127.0.0.1", api_port) as stream:
            pieces: list[tuple[int, int, int]] = []
            asked_ns, pending = time.monotonic_ns(), b""
            await stream.send_all(head.encode() + body)
            async for data in stream:
                received_ns = time.monotonic_ns()
                *lines, pending = (pending + data).split(b"\n")
                for mark in MARK.finditer(b"\n".join(lines)):
                    pieces.append((int(mark[1]), int(mark[2]), received_ns))
            samples.add(asked_ns, pieces, load.pieces)


async def ask_all(api_port: int, load: Load, samples: Samples) -> None:
    async with trio.open_nursery() as nursery:
        for place in range(load.streams):
            nursery.start_soon(ask, api_port, load, place, samples)


def measure_through(api_port: int, load: Load, samples: Samples) -> None:
    trio.run(ask_all, api_port, load, samples)


def create_body(model_id: str, content: str) -> str:
    """What opens a conversation in direct mode."""
    session, question, answer = (str(uuid.uuid4()) for _ in range(3))
    shared: dict[str, Any] = {"evaluationSessionId": session, "participantPosition": "a", "status": "pending"}
    shared |= {"experimental_attachments": [], "failureReason": None}
    asked: dict[str, Any] = {
        "id": question,
        "role": "user",
        "content": content,
        "parentMessageIds": [],
        "modelId": None,
    }
    due: dict[str, Any] = {"id": answer, "role": "assistant", "content": "", "parentMessageIds": [question]}
    due["modelId"] = model_id
    body = {"id": session, "mode": "direct", "modality": "chat", "modelAId": model_id}
    body |= {"userMessageId": question, "modelAMessageId": answer}
    return json.dumps(body | {"messages": [asked | shared, due | shared]})


def measure_alone(tab: Tab, load: Load, samples: Samples) -> None:
    """The streams begin when they are told to: a hidden page has no timers for that."""
    models = json.loads((REPOSITORY / "models.json").read_text(encoding="utf-8"))
    model_id = next(model["id"] for model in models if model["publicName"] == MODEL)
    offset_ns = tab.clock_offset_ns()
    tab.evaluate(PLAIN_FETCHES)
    begun_at = time.monotonic()
    for stream in range(load.streams):
        bodies = json.dumps([create_body(model_id, load.order) for _ in range(load.requests)])
        time.sleep(max(0.0, begun_at + load.begins_at(stream) - time.monotonic()))
        tab.evaluate(f"plain.running.push(plain.stream({CREATE_PATH!r}, {bodies})); null")
    for answer in tab.evaluate("plain.all()"):
        pieces = [(int(a), int(s), int(received * 1e6) + offset_ns) for a, s, received in answer["pieces"]]
        samples.add(int(answer["asked"] * 1e6) + offset_ns, pieces, load.pieces)


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stage:
    """All that runs. Tabs: with the userscript, of the site without it, and an empty one."""

    program: Relay
    bridge: Tab
    plain: Tab
    other: Tab

    def state(self) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.program.api}/api/state") as response:
            return json.load(response)

    def is_ready(self) -> bool:
        return any(bridge["state"] == "ready" for bridge in self.state()["bridges"])

    def place(self, measured: Tab, hidden: bool) -> int:
        """Bring the tab, or another one, to the front; returns how often a timer of 50 ms fires in 3 s."""
        (self.other if hidden else measured).show()
        wait(lambda: measured.evaluate("document.hidden") is hidden, f"document.hidden {hidden}")
        ticks = measured.ticks(HIDDEN_SECONDS if hidden else 0)
        if hidden and ticks > TICKING_SECONDS:
            print(f"The timers of the hidden tab are not slowed: {ticks} ticks in 3 s.", flush=True)
        return ticks


def wait(condition: Callable[[], bool], what: str) -> None:
    gives_up_at = time.monotonic() + STARTUP_SECONDS
    while not condition():
        if time.monotonic() > gives_up_at:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.05)


@contextmanager
def everything() -> Iterator[Stage]:
    with ExitStack() as stack:
        arena_port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("stamping_arena.py")), str(arena_port)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        stack.enter_context(running(command, arena_port, env=environment))
        program = stack.enter_context(this_program("ours", REPOSITORY / "lmarena_proxy.py"))
        profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        browser = Chromium(arena_port, profile)
        stack.callback(browser.close)
        stage = Stage(program, *(Tab(browser) for _ in range(3)))
        with urllib.request.urlopen(f"http://127.0.0.1:{program.api}/bridge.user.js") as response:
            script = response.read().decode()
        source = f'if (location.hostname === "lmarena.ai") {{\n{script}\n}}'
        stage.bridge.send("Page.addScriptToEvaluateOnNewDocument", source=source)
        stage.bridge.show()
        stage.bridge.send("Page.navigate", url=SITE)
        terms = "document.querySelector('#accept-terms')"
        wait(lambda: bool(stage.bridge.evaluate(f"{terms} !== null")), "the terms")
        stage.bridge.evaluate(f"{terms}.click()")
        wait(stage.is_ready, "a tab that is ready")
        stage.plain.send("Page.navigate", url=SITE)
        wait(lambda: bool(stage.plain.evaluate("document.querySelector('#message') !== null")), "the page")
        yield stage


def print_table(results: dict[tuple[int, bool], tuple[Samples, Samples]]) -> None:
    print("| streams | tab | milliseconds | through all | p99 | page alone | p99 | added |")
    print("| ---: | --- | --- |" + " ---: |" * 5)
    for (streams, hidden), (through, alone) in results.items():
        for measure in MEASURES:
            ours, page = through.cells(measure), alone.cells(measure)
            figures = (*ours, *page, ours[0] - page[0])
            cells = " | ".join(f"{figure:.1f}" for figure in figures)
            print(f"| {streams} | {'hidden' if hidden else 'visible'} | {measure} | {cells} |")
    for column, name in enumerate(("through all", "page alone")):
        print(f"Answers not whole, {name}: {sum(pair[column].wrong for pair in results.values())}")
    print(f"Processes that ran or wanted to, in the last 5 minutes: {os.getloadavg()[1]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What program and userscript add, through Chromium.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", action="store_true", help="all begin at once, not over two seconds")
    options = parser.parse_args()
    results: dict[tuple[int, bool], tuple[Samples, Samples]] = {}
    with everything() as stage:
        api_port = stage.program.api
        measure_through(api_port, Load(max(options.streams), 0.0, 2, 10, 0.1), Samples())  # opens sessions
        for _ in range(options.rounds):
            for hidden in (False, True):
                ways = [(stage.bridge, partial(measure_through, api_port)), (stage.plain, None)]
                for column, (tab, through) in enumerate(ways):
                    ticks = stage.place(tab, hidden)
                    for streams in options.streams:
                        load = Load.of(streams, options.at_once)
                        samples = results.setdefault((streams, hidden), (Samples(), Samples()))[column]
                        (through or partial(measure_alone, tab))(load, samples)
                        if tab.evaluate("document.hidden") is not hidden:
                            sys.exit("The tab has changed sides during a round.")
                    print(f"hidden {hidden}: {ticks} ticks in 3 s", file=sys.stderr, flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
