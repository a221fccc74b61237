"""Messages for the person: English, and each with a twin in Chinese."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from harness import SIX_MODELS, Terminal, sit_down, syntax_tree, write_config, write_models

from lmarena_proxy import (
    CHINESE,
    OBSTACLES,
    PHASES,
    PROMPT,
    BridgeChanged,
    BridgeLost,
    Event,
    PhaseChanged,
    RequestEnded,
    SessionOpened,
    Translator,
    find_language,
    main,
    parse_arguments,
)

PLACE = re.compile(r"\{\w*(?::[^}]*)?\}|%(?:\.\d+)?[sdrg]")
HAN = re.compile(r"[\u4e00-\u9fff]")


def form(message: str) -> str:
    """A message with its places unnamed."""
    return PLACE.sub("{}", message)


def texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be, as forms."""
    match node:
        case ast.Constant(str(text)):
            yield form(text)
        case ast.JoinedStr(values):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in values]
            yield "".join(str(part) for part in parts)
        case ast.IfExp():
            yield from texts(node.body)
            yield from texts(node.orelse)


def said() -> Iterator[str]:
    """What the program says to the person, wherever it does."""
    functions = [
        node for node in ast.walk(syntax_tree()) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for function in functions:
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        named = {ast.unparse(node.targets[0]): node.value for node in assigned}
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
            arguments = [named.get(ast.unparse(each), each) for each in call.args]
            name = ast.unparse(call.func)
            if re.fullmatch(r"log\.(info|warning|error|exception)|(.*\.)?say", name):
                yield from texts(arguments[0])
            elif name == "ConfigError":
                yield from texts(arguments[2])
            elif name == "self._go" and len(arguments) > 1:
                yield from texts(arguments[1])
            elif name.endswith((".retire", "bootstrap.abort", "self.abort")) and arguments:
                yield from texts(arguments[-1])
            yield from (text for each in call.keywords if each.arg == "help" for text in texts(each.value))


def kinds(event: type[Event] = Event) -> Iterator[type[Event]]:
    for kind in event.__subclasses__():
        yield kind
        yield from kinds(kind)


# Made of parts that are said in turn, or nothing but a name.
NOT_A_MESSAGE = {"", "{} with {}", "lmarena_proxy {}", "  {}", "  {}{}{}", "{}", "{}, {}"}


def test_every_message_has_a_twin() -> None:
    known = {form(message) for message in CHINESE}
    shown = [kind.line for kind in kinds() if kind.is_for_people and kind.level >= logging.INFO]
    advice = [obstacle.advice for obstacle in OBSTACLES.values()]
    words = [*{phase for phase, _ in PHASES}, *OBSTACLES.keys() - {"missing"}]
    messages = [*said(), *map(form, [*shown, *advice, *words])]
    assert len(messages) > 90
    assert {each for each in messages if each not in known} - NOT_A_MESSAGE == set()


def test_no_twin_is_left_over_from_a_message_that_is_gone() -> None:
    table = next(
        node
        for node in syntax_tree().body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHINESE"
    )
    inside = {id(node) for node in ast.walk(table)}
    there = {
        text
        for node in ast.walk(syntax_tree())
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside
        for text in texts(node)
    }
    composed = {
        *("{} of {} opened, {}", "a path under {} with {}"),
        "an OpenAI-compatible API in front of a person's own LMArena tab.",  # of the docstring
    }
    assert {form(message) for message in CHINESE} - there - composed == set()


@pytest.mark.parametrize("message", CHINESE)
def test_a_twin_has_the_same_places_and_is_chinese(message: str) -> None:
    twin = CHINESE[message]
    places = re.findall(r"\{(\w+)(?::[^}]*)?\}", message)
    assert sorted(places) == sorted(re.findall(r"\{(\w+)\}", twin))
    assert len(set(places)) == len(places)
    assert HAN.search(twin) or message == "code {code:d} {reason}", message


def test_events_are_said_with_all_they_hold() -> None:
    translate = Translator("zh")
    advice = OBSTACLES["sign_in"].advice
    assert translate(BridgeChanged(1, "sign_in", None, advice).text) == (
        "标签页 1：等待登录。网站要求登录：请到 LMArena 标签页接受条款或登录（或刷新页面）。"
    )
    assert translate(BridgeChanged(1, "ready", "a", "").text) == "标签页 1：就绪"
    assert translate(PhaseChanged("aborted", "3 of 8 opened, interrupted").text) == (
        "预先打开对话：已中止，已打开 3 / 8，由您中断"
    )
    assert translate(PhaseChanged("settling", "30 s").text) == "预先打开对话：等待稳定，30 秒"
    lost = BridgeLost(1, "code 1001 the page is gone")
    assert translate(lost.text) == "标签页 1 已断开：代码 1001 the page is gone"
    opened = SessionOpened("gpt: 4", "id", "s-1", "m-1", "account", "bootstrap")
    assert translate(opened.text) == "gpt: 4：会话 s-1 消息 m-1（预先打开）"
    ended = RequestEnded(
        *("req_1", 1.0, "gpt", "id", True, 502, "upstream_error", None, 1, 0.0, None, 2.5),
        *(None, None, None, None),
        error="The site failed (status 500): it {broke}",
    )
    assert translate(ended.text) == (
        "req_1 gpt：502 upstream_error，用时 2.50 秒：The site failed (status 500): it {broke}"
    )


def test_what_is_no_message_stays_as_it_is() -> None:
    for text in ("", "x" * 10_000, "{model}", "a: b: c", "100%", "\n", "{", "}{0}"):
        assert Translator("zh")(text) == text
    for message in CHINESE:
        assert Translator("en")(message) == message


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "", "LC_ALL": ""}, "en"),
        ({}, "en"),
    ],
)
def test_the_system_s_language_is_taken_if_it_is_spoken(environment: dict[str, str], language: str) -> None:
    assert find_language(environment) == language


def test_the_command_line_chooses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert parse_arguments([], "zh").lang == "zh"
    assert parse_arguments(["--lang", "en"], "zh").lang == "en"
    with pytest.raises(SystemExit):
        parse_arguments(["--lang", "zh", "--help"])
    assert "配置文件" in capsys.readouterr().out
    assert main(["--lang", "zh", "--config", str(tmp_path / "none.toml")]) == 2
    assert "无法启动：--config = " in capsys.readouterr().out


async def test_a_whole_start_in_chinese(nursery: trio.Nursery, tmp_path: Path) -> None:
    write_models(tmp_path, SIX_MODELS)
    ports = {"server": {"port": 0}, "bridge": {"port": 0}}
    with Terminal(tmp_path, "--config", str(write_config(tmp_path, ports)), "--lang", "zh") as terminal:
        await terminal.shows("正在等待 LMArena 标签页")
        terminal.press("ctrl-c")
        await terminal.shows("正在关闭")
        assert await terminal.exit_code() == 0
    desk = await sit_down(nursery, tmp_path / "english")
    with desk.terminal as terminal:
        await desk.make_ready()
        await terminal.shows(PROMPT)
        assert not HAN.search(terminal.output.replace(PROMPT, ""))
