"""What the whole-program tests share: the stand-in arena, a tab, the program here or in a terminal.

`start` puts all three into one nursery, on ports that the system chooses. `Terminal` runs the program as a
process of its own whose terminal the test holds. Nothing here depends on speed: `until` polls patiently.
"""

import ast
import contextlib
import fcntl
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec
import openai
import pytest
import trio
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from rich.console import Console as RichConsole

import lmarena_proxy
from demo.arena import Arena, Exchange, Seen, Switches
from demo.arena import serve as serve_arena
from demo.twin import Twin

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 60.0
CLAUDE, DEEPSEEK, GPT, SEARCH = (
    "claude-sonnet-4-20250514",
    "deepseek-v3.1",
    "gpt-5-mini-high",
    "grok-4-search",
)
IMAGE, EDIT, RAY = "imagen-3.0-generate-002", "seededit-3.0", "ray2"
SIX_MODELS = (CLAUDE, DEEPSEEK, GPT, SEARCH, IMAGE, "glm-4.5")
Tables = Mapping[str, Mapping[str, Any]]
Found = TypeVar("Found")


async def until(condition: Callable[[], Found], seconds: float = PATIENCE_SECONDS) -> Found:
    """Poll until the condition holds; returns what it found."""
    with trio.move_on_after(seconds):
        while True:
            if found := condition():
                return found
            await trio.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {condition}")


async def eventually(
    condition: Callable[[], Awaitable[Found]], seconds: float = PATIENCE_SECONDS, every_seconds: float = 0.02
) -> Found:
    """The same for a condition that has to ask."""
    with trio.move_on_after(seconds):
        while True:
            if found := await condition():
                return found
            await trio.sleep(every_seconds)
    raise AssertionError(f"not within {seconds} s: {condition}")


def pick_models(names: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of the built-in models with these names (a shared name brings both), in this order."""
    entries: list[dict[str, Any]] = json.loads((ROOT / "models.json").read_text(encoding="utf-8"))
    return [entry for name in names for entry in entries if entry["publicName"] == name]


def model_id(name: str) -> str:
    return str(pick_models([name])[0]["id"])


def write_models(directory: Path, names: Sequence[str] | None) -> None:
    """models.json for the program's directory, which is made: all of it, or those with these names."""
    directory.mkdir(exist_ok=True)
    if names is None:
        shutil.copy(ROOT / "models.json", directory / "models.json")
    else:
        (directory / "models.json").write_text(json.dumps(pick_models(names)), encoding="utf-8")


@functools.cache
def syntax_tree() -> ast.Module:
    """Of the program. It takes a moment: for those tests that look at it."""
    return ast.parse((ROOT / "lmarena_proxy.py").read_text(encoding="utf-8"))


def plain_client(url: str) -> httpx.AsyncClient:
    """For a program on this machine: what is not spoken, TLS, needs none of the world's certificates read."""
    return httpx.AsyncClient(base_url=url, timeout=120, verify=False, trust_env=False)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def turns(seen: Seen) -> list[tuple[str, str]]:
    """Role and content of the messages that a call brought, without the empty place for the answer."""
    messages = seen.body["messages"][:-1] if seen.kind == "create" else seen.body["messages"]
    return [(message["role"], message["content"]) for message in messages]


class Held:
    """Makes the arena hold its answers back until `release`, but for the first `free` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int = 0) -> None:
        self.free = free
        self._released = trio.Event()
        answer = Exchange.answer

        async def held_answer(exchange: Exchange, *arguments: Any) -> None:
            self.free -= 1
            if self.free < 0:
                await self._released.wait()
            await answer(exchange, *arguments)

        monkeypatch.setattr(Exchange, "answer", held_answer)

    def release(self) -> None:
        self._released.set()


# ── Raw answers ─────────────────────────────────────────────────────────────────────────────────────────────


class Stream:
    """A streamed answer as it came, each event checked against the openai package's models."""

    def __init__(self, body: str) -> None:
        self.body = body
        events = [event for event in body.split("\n\n") if event and not event.startswith(":")]
        assert all(event.startswith("data: ") and "\n" not in event for event in events), body[:2000]
        self.has_done = bool(events) and events[-1] == "data: [DONE]" and body.endswith("\n\n")
        values = [json.loads(event[6:]) for event in events if event != "data: [DONE]"]
        self.errors = [value["error"] for value in values if "error" in value]
        self.chunks = [strict(ChatCompletionChunk, value) for value in values if "error" not in value]
        self.choices = [choice for chunk in self.chunks for choice in chunk.choices]
        self.text = "".join(choice.delta.content or "" for choice in self.choices)
        self.finish_reasons = [choice.finish_reason for choice in self.choices if choice.finish_reason]
        self.usages = [chunk.usage for chunk in self.chunks if chunk.usage]


Answer = TypeVar("Answer", ChatCompletion, ChatCompletionChunk)


def strict(form: type[Answer], value: object) -> Answer:
    """The value as the openai package types it, without any of its leniency."""
    return form.model_validate_json(json.dumps(value), strict=True)


def whole(response: httpx.Response) -> ChatCompletion:
    assert response.status_code == 200, response.text
    return strict(ChatCompletion, response.json())


def check_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """An error in OpenAI's form, with the request id in header and message; returns its object."""
    assert response.status_code == status, (response.status_code, response.text)
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert isinstance(error["type"], str)
    assert error["type"]
    request_id = response.headers["x-request-id"]
    assert request_id.startswith("req_")
    assert request_id in error["message"]
    return error


# ── In the test ─────────────────────────────────────────────────────────────────────────────────────────────


class Rig:
    """The program, the arena and one tab, running."""

    def __init__(self, nursery: trio.Nursery, program: lmarena_proxy.Program, arena: Arena, url: str) -> None:
        self.nursery, self.program, self.arena, self.arena_url = nursery, program, arena, url
        self.twin = Twin(url, program.api.bridge_url)
        self.events: list[lmarena_proxy.Event] = []
        program.bus.subscribe(self.events.append)
        self.url = program.api.url
        self.http = plain_client(self.url)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="any",
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultAsyncHttpxClient(verify=False, trust_env=False),  # as `plain_client`
        )

    @property
    def calls(self) -> list[Seen]:
        return self.arena.record

    @property
    def creates(self) -> list[Seen]:
        return [seen for seen in self.calls if seen.kind == "create"]

    @property
    def retries(self) -> list[Seen]:
        return [seen for seen in self.calls if seen.kind == "retry"]

    @property
    def output(self) -> str:
        """What the console has shown."""
        file = self.program.console.screen.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def event(self, kind: type[Found]) -> list[Found]:
        return [event for event in self.events if isinstance(event, kind)]

    def pool(self, name: str) -> lmarena_proxy.ModelPool:
        return self.program.pool.of(model_id(name))

    async def connect(self, *, ready: bool = True) -> None:
        """Open the tab; `ready`: of a person who accepted the terms before and passes the check, if due."""
        if ready:
            await self.twin.http.post("/nextjs-api/sign-up", content="{}")
        await self.nursery.start(self.twin.run)
        if ready:
            await self.make_ready()

    async def make_ready(self) -> None:
        if self.twin.state == "verification":
            await self.twin.pass_check()
        if self.twin.state == "sign_in":
            await self.twin.accept_terms()
        await until(lambda: self.program.bridges.obstacle() is None)

    async def state(self) -> Any:
        return (await self.http.get("/api/state")).raise_for_status().json()

    async def bootstrap(self, action: str = "start") -> httpx.Response:
        return await self.http.post("/api/bootstrap", json={"action": action})

    async def fill(self) -> None:
        """Open the conversations of every model."""
        before = len(self.event(lmarena_proxy.PhaseChanged))
        assert self.program.bootstrap.start()
        await until(lambda: len(self.event(lmarena_proxy.PhaseChanged)) > before)
        await until(lambda: self.program.bootstrap.phase == "done")

    async def chat(self, model: str, *messages: Any, **rest: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=request_body(model, *messages, **rest))

    async def stream(self, model: str, *messages: Any, **rest: Any) -> Stream:
        response = await self.chat(model, *messages, stream=True, **rest)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers.get("connection", "") != "close"
        return Stream(response.text)


def request_body(model: str, *messages: Any, **rest: Any) -> dict[str, Any]:
    listed = [user(message) if isinstance(message, str) else message for message in messages or ("Hello",)]
    return {"model": model, "messages": listed, **rest}


def merge(*layers: Tables) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for table, values in layer.items():
            merged.setdefault(table, {}).update(values)
    return merged


SMALL: Tables = {
    "server": {"port": 0, "shutdown_grace_seconds": 1},
    "bridge": {"port": 0},
    "bootstrap": {"enabled": False, "settle_seconds": 0},
}


async def start(
    nursery: trio.Nursery,
    directory: Path,
    *,
    models: Sequence[str] = (CLAUDE, DEEPSEEK),
    tables: Tables | None = None,
    switches: Switches | None = None,
    connected: bool = True,
    filled: bool = False,
    confirmed: bool = False,
    arena: Arena | None = None,
) -> Rig:
    """Run everything until the test ends.

    `filled`: every model has its conversations, and the arena's record is empty again.
    """
    write_models(directory, models)
    arena = arena or Arena(pick_models(models), switches)
    url = await nursery.start(serve_arena, arena)
    screen = RichConsole(file=io.StringIO(), width=160)
    config = lmarena_proxy.parse_config(merge(SMALL, tables or {}))
    program = lmarena_proxy.Program(config, directory, lmarena_proxy.Console(screen, can_ask=False))
    program.bootstrap.is_confirmed = confirmed
    program.bus.subscribe(program.assert_consistent)
    await nursery.start(program.run)
    rig = Rig(nursery, program, arena, url)
    if connected or filled:
        await rig.connect()
    if filled:
        await rig.fill()
        arena.record.clear()
    return rig


# ── In a terminal ───────────────────────────────────────────────────────────────────────────────────────────

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\r")


# The program as a person starts it, and as that begins again: a module, which is not compiled at each start.
TYPED = (sys.executable, str(ROOT / "lmarena_proxy.py"))
_STEPS = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; from lmarena_proxy import main; sys.exit(main(sys.argv[1:]))"
)
PROGRAM = (sys.executable, "-c", _STEPS)


def free_port() -> int:
    """For what has to be told its port: none of those that systems give away, so nobody gets it meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def write_config(directory: Path, tables: Tables) -> Path:
    """A config file; JSON's notation of these values is TOML's too."""
    lines = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        lines += [f'"{key}" = {json.dumps(value, ensure_ascii=False)}' for key, value in values.items()]
    path = directory / "config.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that its Ctrl-C is a SIGINT, and its end a SIGHUP."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests themselves may run under nohup.


class Terminal:
    """The program as a process in a terminal; `with` kills what is left of it."""

    def __init__(self, directory: Path, *arguments: str, keyboard: bool = True, typed: bool = False) -> None:
        """`keyboard`: whether its standard input is the terminal; `typed`: whether it begins as `TYPED`."""
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 180, 0, 0))
        command = [*(TYPED if typed else PROGRAM), *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LMARENA_")}
        self.process = subprocess.Popen(
            command,
            stdin=slave if keyboard else subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env={"LC_ALL": "C.UTF-8"} | environment | {"TERM": "xterm-256color", "TMPDIR": str(directory)},
            start_new_session=True,
            preexec_fn=_take_terminal if keyboard else None,
        )
        os.close(slave)
        self._raw = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.directory = directory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return
            if not data:
                return
            self._raw += data

    @property
    def output(self) -> str:
        """What it has shown, without colours and cursor movements."""
        return ANSI.sub("", bytes(self._raw).decode("utf-8", "replace"))

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.output.split("\n")]

    def press(self, key: str) -> None:
        os.write(self._master, {"enter": b"\r", "ctrl-c": b"\x03"}[key])

    async def shows(self, text: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until a text stands on the console; returns all of its output."""
        with trio.move_on_after(seconds):
            while text not in self.output:
                if self.process.poll() is not None:
                    self._reader.join(5)
                    break
                await trio.sleep(0.01)
        output = self.output
        assert text in output, f"{text!r} is not in:\n{output}"
        return output

    async def exit_code(self, seconds: float = PATIENCE_SECONDS) -> int:
        await until(lambda: self.process.poll() is not None, seconds)
        self._reader.join(10)
        return self.process.returncode

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    async def addresses(self) -> tuple[str, str]:
        """Of API and bridge, as the banner names them."""
        output = await self.shows("Waiting for an LMArena tab")
        api = re.search(r"API +(http://\S+)/v1", output)
        bridge = re.search(r"bridge +(ws://\S+)", output)
        assert api, output
        assert bridge, output
        return api[1], bridge[1]

    def log_lines(self) -> list[dict[str, Any]]:
        """The log file's lines, each of which must be JSON."""
        text = (self.directory / "logs" / "lmarena_proxy.jsonl").read_text(encoding="utf-8")
        return [msgspec.json.decode(line) for line in text.splitlines()]


class Desk:
    """A program in a terminal, with the arena and a tab that the test runs itself."""

    def __init__(self, nursery: trio.Nursery, terminal: Terminal, arena: Arena, twin: Twin, url: str) -> None:
        self.nursery, self.terminal, self.arena, self.twin, self.url = nursery, terminal, arena, twin, url
        self.http = plain_client(url)

    @property
    def creates(self) -> list[Seen]:
        return [seen for seen in self.arena.record if seen.kind == "create"]

    async def make_ready(self) -> None:
        """Open the tab, if it is not, and let the person do what is due in it."""
        if not self.twin.welcomed.is_set():
            await self.nursery.start(self.twin.run)
        if self.twin.state == "verification":
            await self.twin.pass_check()
        if self.twin.state == "sign_in":
            await self.twin.accept_terms()

    async def state(self) -> Any:
        return (await self.http.get("/api/state")).raise_for_status().json()

    async def phase(self, wanted: str) -> Any:
        """Wait for a phase of bootstrap; returns the whole snapshot."""

        async def reached() -> Any:
            state = await self.state()
            return state if state["bootstrap"]["phase"] == wanted else None

        return await eventually(reached)


# The grace is longer than `Terminal.exit_code` waits: a shutdown that hangs is not saved by its last resort.
QUICK: Tables = {"bootstrap": {"settle_seconds": 0.5}, "server": {"shutdown_grace_seconds": 90}}


async def sit_down(
    nursery: trio.Nursery,
    directory: Path,
    *arguments: str,
    models: Sequence[str] | None = SIX_MODELS,
    tables: Tables | None = None,
    switches: Switches | None = None,
    keyboard: bool = True,
    arena: Arena | None = None,
    twin: Twin | None = None,
) -> Desk:
    """Start the program in a terminal. Enter its `terminal` as a context manager to be rid of it for sure.

    A given `arena` and `twin` are those of an earlier start: the twin finds the new program's port.
    """
    write_models(directory, models)
    config = write_config(directory, merge(QUICK, tables or {}))
    ports = ("--port", "0", "--bridge-port", "0")
    terminal = Terminal(directory, "--config", str(config), *ports, *arguments, keyboard=keyboard)
    try:
        url, bridge_url = await terminal.addresses()
        if twin is None or arena is None:
            arena = arena or Arena(None if models is None else pick_models(models), switches)
            arena_url = await nursery.start(serve_arena, arena)
            twin = Twin(arena_url, bridge_url)
        twin.bridge_url = bridge_url
    except BaseException:
        terminal.__exit__()
        raise
    return Desk(nursery, terminal, arena, twin, url)
