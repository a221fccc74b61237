"""What is done beside serving: conversations out and in, and the doctor's findings."""

import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import (
    CLAUDE,
    DEEPSEEK,
    GPT,
    PROGRAM,
    RAY,
    Tables,
    Terminal,
    free_port,
    model_id,
    pick_models,
    start,
    until,
    write_config,
    write_models,
)

from demo.arena import Arena, Switches
from demo.arena import serve as serve_arena
from demo.twin import Twin
from lmarena_proxy import Session, Store, hold_store, main

MINE, THEIRS = "a" * 64, "b" * 64


def uuid(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012d}"


def a_session(number: int = 1, **fields: Any) -> Session:
    values: dict[str, Any] = {
        "model_id": model_id(CLAUDE),
        "account": MINE,
        "source": "bootstrap",
        "created_at": float(number),
    }
    return Session(uuid(number), uuid(number + 1000), **values | fields)


def run(directory: Path, *arguments: str) -> int:
    return main(["--config", str(directory / "config.toml"), *arguments])


def stored(directory: Path) -> list[Session]:
    return Store(directory / "state").sessions()


def fields(sessions: list[Session]) -> list[tuple[Any, ...]]:
    return [tuple(getattr(each, name) for name in each.__struct_fields__[:9]) for each in sessions]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the program's, with all models and a store of two sessions."""
    monkeypatch.delenv("LMARENA_PROXY_API_KEY", raising=False)
    return furnished(tmp_path / "one", [a_session(1), a_session(2, last_used_at=5.5, uses=3)])


def furnished(directory: Path, sessions: list[Session]) -> Path:
    write_models(directory, None)
    (directory / "config.toml").write_text("[server]\nport = 0\n[bridge]\nport = 0\n", encoding="utf-8")
    assert Store(directory / "state").add_now(sessions) == len(sessions)
    return directory


# ── Out and in again ────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_exported_can_be_imported_elsewhere(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "sessions.json", furnished(tmp_path / "two", [])
    assert run(place, "--export-sessions", str(file)) == 0
    assert "2 conversations are in" in capsys.readouterr().out
    assert run(other, "--import-sessions", str(file)) == 0
    assert "2 added, 0 known already, 0 left out" in capsys.readouterr().out
    assert fields(stored(other)) == fields(stored(place))
    assert run(other, "--import-sessions", str(file)) == 0
    assert "0 added, 2 known already" in capsys.readouterr().out


def test_the_export_says_what_it_is_and_is_its_owners_alone(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    assert run(place, "--export-sessions", str(file)) == 0
    export = json.loads(file.read_text(encoding="utf-8"))
    assert (export["format"], export["version"]) == ("lmarena_proxy sessions", 1)
    assert export["sessions"][1] == {
        "session_id": uuid(2),
        "message_id": uuid(1002),
        "model_id": model_id(CLAUDE),
        "account": MINE,
        "source": "bootstrap",
        "created_at": 2.0,
        "last_used_at": 5.5,
        "uses": 3,
        "model": CLAUDE,
    }
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"one", "sessions.json"}


def test_a_dash_is_standard_output_and_input_and_nothing_else_is_on_it(place: Path, tmp_path: Path) -> None:
    other = furnished(tmp_path / "two", [])
    command = [*PROGRAM, "--config"]
    out = subprocess.run(
        [*command, str(place / "config.toml"), "--export-sessions", "-"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(json.loads(out.stdout)["sessions"]) == 2
    assert "2 conversations are in standard output" in out.stderr
    back = subprocess.run(
        [*command, str(other / "config.toml"), "--import-sessions", "-"],
        input=out.stdout,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "2 added" in back.stdout
    assert len(stored(other)) == 2


def test_a_known_session_stays_as_the_store_has_it(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    assert run(place, "--export-sessions", str(file)) == 0
    other = furnished(tmp_path / "two", [a_session(1, uses=99)])
    assert run(other, "--import-sessions", str(file)) == 0
    assert [(each.session_id, each.uses) for each in stored(other)] == [(uuid(1), 99), (uuid(2), 3)]


def test_a_session_of_a_model_that_is_not_listed_is_taken_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = furnished(tmp_path / "two", [a_session(7, model_id="gone-model")])
    file = tmp_path / "sessions.json"
    assert run(other, "--export-sessions", str(file)) == 0
    assert run(place, "--import-sessions", str(file)) == 0
    assert "1 of their models are not in models.json" in capsys.readouterr().out
    assert len(stored(place)) == 3


@pytest.mark.parametrize("option", ["--export-sessions", "--import-sessions"])
def test_nothing_is_done_while_a_copy_of_the_program_uses_the_store(
    option: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sessions.json"
    if option.startswith("--import"):
        file.write_text("{}", encoding="utf-8")
    with hold_store(place / "state"):
        assert run(place, option, str(file)) == 2
    output = capsys.readouterr().out
    assert output.startswith("Not done: storage.path = ")
    assert "no other copy of the program uses now" in output


@pytest.mark.parametrize("option", ["--prune", "--update-models"])
def test_what_else_needs_the_store_for_itself_says_that_it_was_not_done(
    option: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_store(place / "state"):
        assert run(place, option) == 2
    assert capsys.readouterr().out.startswith("Not done: storage.path = ")


@pytest.mark.parametrize("option", ["--export-sessions", "--import-sessions"])
def test_an_empty_name_is_no_file(option: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, option, "") == 2
    assert capsys.readouterr().out.startswith(f"Not done: {option} = ''")


def test_a_file_that_cannot_be_written_is_named_and_one_that_was_there_stays(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--export-sessions", str(tmp_path / "none" / "x.json")) == 2
    assert "--export-sessions" in capsys.readouterr().out


def test_a_damaged_store_is_neither_exported_nor_moved_aside(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = place / "state" / "lmarena_proxy.sqlite3"
    for part in store.parent.glob("lmarena_proxy.sqlite3*"):
        part.unlink()
    store.write_bytes(b"x" * 5000)
    assert run(place, "--export-sessions", str(tmp_path / "x.json")) == 2
    assert "storage.path" in capsys.readouterr().out
    assert store.read_bytes() == b"x" * 5000


# ── What is wrong in an export ──────────────────────────────────────────────────────────────────────────────

GOOD: dict[str, Any] = {
    "session_id": uuid(7),
    "message_id": uuid(8),
    "model_id": "m",
    "account": MINE,
    "source": "captured",
    "created_at": 1,
    "last_used_at": None,
    "uses": 0,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"session_id": "../../x"}, "sessions[1].session_id = '../../x': expected a UUID"),
        ({"session_id": uuid(7) + "\n"}, "sessions[1].session_id"),
        ({"message_id": 5}, "sessions[1].message_id = 5: expected a UUID"),
        ({"model_id": ""}, "sessions[1].model_id = '': expected the id of a model"),
        ({"model_id": "\ud800"}, "sessions[1].model_id"),
        ({"account": MINE.upper()}, "sessions[1].account = 'AAA"),
        (
            {"source": "stolen"},
            "sessions[1].source = 'stolen': expected one of bootstrap, on_demand, captured",
        ),
        ({"created_at": -1}, "sessions[1].created_at = -1: expected a time in Unix seconds"),
        ({"created_at": float("nan")}, "sessions[1].created_at"),
        ({"last_used_at": "now"}, "sessions[1].last_used_at = 'now'"),
        ({"uses": -1}, "sessions[1].uses = -1"),
        ({"uses": 10**30}, "sessions[1].uses"),
        ({"uses": True}, "sessions[1].uses = True"),
        ({"cookie": "x"}, "unknown field `cookie`"),
        ({"account": ...}, "sessions[1].account = None: expected 64 hexadecimal digits"),
    ],
)
def test_an_entry_that_is_wrong_is_named_and_nothing_is_added(
    change: dict[str, Any], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: value for name, value in (GOOD | change).items() if value is not ...}
    fine = GOOD | {"session_id": uuid(6)}
    check_refused(place, tmp_path, {"version": 1, "sessions": [fine, wrong]}, said, capsys)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ({"version": 2, "sessions": []}, "version = 2: expected 1"),
        ({"sessions": []}, "version = None"),
        ({"version": 1}, "sessions = None: expected a list of sessions"),
        ({"version": 1, "sessions": ["x"]}, "sessions[0] = 'x'"),
    ],
)
def test_an_export_of_another_form_is_refused(
    rest: dict[str, Any], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(place, tmp_path, rest, said, capsys)


def check_refused(
    place: Path, tmp_path: Path, rest: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sessions.json"
    file.write_text(json.dumps({"format": "lmarena_proxy sessions", **rest}), encoding="utf-8")
    before = fields(stored(place))
    assert run(place, "--import-sessions", str(file)) == 2
    output = capsys.readouterr().out
    assert said in output
    assert "sessions.json: " in output
    assert fields(stored(place)) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a file of JSON"),
        (b'{"a": /* not closed }', "line 1"),
        (b"[1, 2]", "an export of this program"),
        (b'{"a": 1}', "an export of this program"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 100_000, "a file of JSON"),
    ],
)
def test_what_is_no_file_of_sessions_is_refused(
    content: bytes, said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert run(place, "--import-sessions", str(file)) == 2
    assert said in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--import-sessions", "nowhere.json") == 2
    assert "nowhere.json" in capsys.readouterr().out


# ── LMArenaBridge's files ───────────────────────────────────────────────────────────────────────────────────

CONFIG_JSONC = """\ufeff{
  // the session "id"
  "session_id": "%s", /* not "this": 1, */
  "message_id": "%s",
  "file_bed_upload_url": "http:\\/\\/127.0.0.1:5180/upload", // "a": 2
  "note": "no // comment, and no /* one */ either,]",
  "id_updater_last_mode": "%s", // the last one,
}
"""


def test_the_older_bridge_s_configuration_has_one_session_without_a_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.jsonc"
    file.write_text(CONFIG_JSONC % (uuid(7), uuid(8), "direct_chat"), encoding="utf-8")
    assert run(place, "--import-sessions", str(file)) == 2
    assert "--model" in capsys.readouterr().out
    assert run(place, "--import-sessions", str(file), "--model", DEEPSEEK) == 0
    assert "1 added" in capsys.readouterr().out
    [session] = [each for each in stored(place) if each.session_id == uuid(7)]
    assert (session.message_id, session.model_id) == (uuid(8), model_id(DEEPSEEK))
    assert (session.account, session.source, session.uses) == (MINE, "captured", 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("YOUR_SESSION_ID", "YOUR_MESSAGE_ID", "direct_chat"), "'YOUR_SESSION_ID' is a placeholder"),
        ((uuid(1), "your message id here", "direct_chat"), "is a placeholder"),
        ((uuid(1), "xxxxxxxx-xxxx-xxxx", "direct_chat"), "is a placeholder"),
        (("", "", "direct_chat"), "its ids are empty"),
        ((uuid(7), uuid(8), "battle"), "a session of a battle is not used (pool.use_battles)"),
        ((uuid(7), uuid(8), "search"), "of the mode 'search' cannot be retried here"),
    ],
)
def test_what_cannot_be_a_session_is_left_out_with_a_word(
    values: tuple[str, str, str], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.jsonc"
    file.write_text(CONFIG_JSONC % values, encoding="utf-8")
    assert run(place, "--import-sessions", str(file), "--model", DEEPSEEK) == 0
    output = capsys.readouterr().out
    assert said in output
    assert "0 added, 0 known already, 1 left out" in output
    assert len(stored(place)) == 2


def pair(number: int, **rest: str) -> dict[str, str]:
    return {"session_id": uuid(number), "message_id": uuid(number + 1), **rest}


def test_the_older_bridge_s_map_has_sessions_by_the_names_of_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {
        CLAUDE: pair(10),
        DEEPSEEK: [pair(20), pair(30, mode="direct_chat"), pair(40, mode="battle", battle_target="A")],
        model_id(GPT): pair(50),
        "no-such-model": [pair(60), pair(70)],
        RAY: pair(80),
        "gpt-5-mini": {"session_id": "YOUR_SESSION_ID", "message_id": "YOUR_MESSAGE_ID"},
    }
    file = tmp_path / "model_endpoint_map.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    assert run(place, "--import-sessions", str(file), "--account", THEIRS) == 0
    output = capsys.readouterr().out
    assert "4 added, 0 known already, 5 left out" in output
    assert output.count("no model 'no-such-model'") == 2
    assert f"{DEEPSEEK}[2]: a session of a battle is not used" in output
    for entry in pick_models([RAY]):
        assert entry["id"] in output  # Two models have this name.
    added = {each.session_id: each.model_id for each in stored(place) if each.account == THEIRS}
    assert added == {
        uuid(10): model_id(CLAUDE),
        uuid(20): model_id(DEEPSEEK),
        uuid(30): model_id(DEEPSEEK),
        uuid(50): model_id(GPT),
    }


def test_sessions_of_battles_come_with_their_sides_where_they_are_used(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (place / "config.toml").open("a", encoding="utf-8") as config:
        config.write("[pool]\nuse_battles = true\n")
    entries = {
        CLAUDE: pair(10, mode="battle", battle_target="B"),
        DEEPSEEK: [pair(20, mode="battle", battle_target="a"), pair(30, mode="battle"), pair(40)],
    }
    file = tmp_path / "model_endpoint_map.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    assert run(place, "--import-sessions", str(file), "--account", THEIRS) == 0
    assert "4 added, 0 known already, 0 left out" in capsys.readouterr().out
    config_jsonc = CONFIG_JSONC % (uuid(50), uuid(51), "battle")
    file.write_text(
        config_jsonc.replace('"note"', '"id_updater_battle_target": "B", "note"'), encoding="utf-8"
    )
    assert run(place, "--import-sessions", str(file), "--model", DEEPSEEK, "--account", THEIRS) == 0
    sides = {each.session_id: each.position for each in stored(place) if each.account == THEIRS}
    assert sides == {uuid(10): "b", uuid(20): "a", uuid(30): "a", uuid(40): None, uuid(50): "b"}
    export, other = tmp_path / "sessions.json", furnished(tmp_path / "two", [])
    assert run(place, "--export-sessions", str(export)) == 0
    assert run(other, "--import-sessions", str(export)) == 0
    assert fields(stored(other)) == fields(stored(place))
    file.write_text(json.dumps({CLAUDE: pair(60, mode="battle", battle_target="C")}), encoding="utf-8")
    assert run(place, "--import-sessions", str(file), "--account", THEIRS) == 2
    assert f"{CLAUDE}, the battle's target = 'C': expected A or B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({CLAUDE: [pair(10), {"session_id": uuid(1)}]}, f"{CLAUDE}[1].message_id = None: expected a UUID"),
        ({CLAUDE: pair(10) | {"session_id": "../x"}}, f"{CLAUDE}.session_id = '../x': expected a UUID"),
        ({CLAUDE: [[]]}, f"{CLAUDE}[0] = []: expected an object"),
    ],
)
def test_a_wrong_entry_of_the_map_is_named_and_nothing_is_added(
    entries: dict[str, Any], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model_endpoint_map.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    assert run(place, "--import-sessions", str(file)) == 2
    assert said in capsys.readouterr().out
    assert len(stored(place)) == 2


@pytest.mark.parametrize(
    ("accounts", "arguments", "code", "said"),
    [
        ([MINE, MINE], [], 0, "1 added"),
        ([], [], 2, "the store has no conversations yet. GET /api/state shows it"),
        ([MINE, THEIRS], [], 2, "the store has those of 2 accounts. GET /api/state"),
        ([MINE, THEIRS], ["--account", THEIRS], 0, "1 added"),
        ([MINE], ["--account", "me"], 2, "--account = 'me': expected 64 hexadecimal digits"),
    ],
)
def test_whose_an_older_bridge_s_sessions_are_is_said_or_plain(
    accounts: list[str],
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sessions = [a_session(number, account=account) for number, account in enumerate(accounts, 100)]
    place = furnished(tmp_path / "three", sessions)
    file = tmp_path / "model_endpoint_map.json"
    file.write_text(json.dumps({CLAUDE: pair(10)}), encoding="utf-8")
    assert run(place, "--import-sessions", str(file), *arguments) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--account", THEIRS), ("--model", CLAUDE)])
def test_an_option_that_the_file_has_no_use_for_is_refused(
    option: str, value: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sessions.json"
    assert run(place, "--export-sessions", str(file)) == 0
    assert run(place, "--import-sessions", str(file), option, value) == 2
    assert option in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(place, option, value)


def test_an_empty_map_is_nothing_to_add(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Input:
        buffer = io.BytesIO(b"{}")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Input())
    assert run(place, "--import-sessions", "-") == 0
    assert "0 added, 0 known already, 0 left out" in capsys.readouterr().out


# ── The doctor ──────────────────────────────────────────────────────────────────────────────────────────────


async def ask_doctor(directory: Path, tables: Tables, seconds: float, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `--doctor`, as a process of its own."""
    config = write_config(directory, tables)
    command = [*PROGRAM, "--config", str(config)]
    with trio.fail_after(90):
        done = await trio.run_process(
            [*command, "--doctor", str(seconds), *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
        )
    output = done.stdout.decode()
    assert done.stderr == b"", done.stderr
    assert done.returncode in (0, 1, 2), output
    return done.returncode, output


def findings(output: str) -> dict[str, tuple[str, str]]:
    """By what it is about: verdict and text of each finding's line."""
    found = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"([✓!✗]) (fine|look|needs you) +(\S+(?: \S+)?)  *(.*)", line):
            sign, verdict, what, text = match.groups()
            assert sign == {"fine": "✓", "look": "!", "needs you": "✗"}[verdict]
            found[what] = (verdict, text)
    return found


class Patient:
    """The stand-in arena, and a tab that looks for the doctor."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self.nursery, self.directory, self.port = nursery, directory, free_port()
        self.tables: Tables = {"server": {"port": 0}, "bridge": {"port": self.port}}

    async def open_tab(self, switches: Switches | None = None, *, names: Sequence[str] = (CLAUDE,)) -> Twin:
        self.arena = Arena(pick_models(names), switches)
        url = await self.nursery.start(serve_arena, self.arena)
        twin = Twin(url, f"ws://127.0.0.1:{self.port}/", backoff_seconds=(0.1, 0.3))
        self.nursery.start_soon(twin.run)
        return twin

    async def ask(self, seconds: float = 60) -> tuple[int, dict[str, tuple[str, str]]]:
        code, output = await ask_doctor(self.directory, self.tables, seconds)
        return code, findings(output)


@pytest.fixture
def patient(nursery: trio.Nursery, tmp_path: Path) -> Patient:
    write_models(tmp_path, (CLAUDE, DEEPSEEK))
    return Patient(nursery, tmp_path)


async def test_when_all_is_well_the_doctor_says_so_and_returns_zero(patient: Patient) -> None:
    write_models(patient.directory, (CLAUDE,))
    twin = await patient.open_tab()
    await until(lambda: twin.state == "sign_in")
    await twin.accept_terms()
    code, found = await patient.ask()
    assert {what: verdict for what, (verdict, _) in found.items() if verdict != "fine"} == {
        "conversations": "look",
        "rate limit": "look",
    }
    assert code == 0
    assert found["tab"][1].startswith("1 connected: https://lmarena.ai")
    assert found["script"][1] == "1.0.0, as the program"
    assert found["account"][1] == twin.account
    assert "and has the same" in found["model list"][1]
    assert found["conversations"][1].startswith("4 would be opened")
    assert patient.arena.record == []  # Nothing was sent to the site.


async def test_without_a_tab_the_doctor_says_what_to_do_and_returns_one(patient: Patient) -> None:
    code, output = await ask_doctor(patient.directory, patient.tables, 0.3)
    found = findings(output)
    assert code == 1
    assert "Waiting for an LMArena tab, up to 0.3 s (Ctrl-C ends the wait)" in output
    verdict, text = found["tab"]
    assert verdict == "needs you"
    assert "/bridge.user.js" in text
    assert {"configuration", "models", "store", "server.port", "bridge.port"} <= found.keys()
    assert "no page has sent one yet; models.json is" in found["model list"][1]


@pytest.mark.parametrize(
    ("switches", "said"), [(Switches(check=True), "human check"), (Switches(), "wants a sign-in")]
)
async def test_what_the_person_must_do_is_told(switches: Switches, said: str, patient: Patient) -> None:
    await patient.open_tab(switches)
    code, found = await patient.ask()
    assert code == 1
    assert found["page"][0] == "needs you"
    assert said in found["page"][1]
    assert found["account"][0] == "look"
    assert "known when the tab is ready" in found["conversations"][1]


async def test_another_script_and_another_model_list_are_told(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.twin.SCRIPT_VERSION", "0.9.0")
    twin = await patient.open_tab(names=(CLAUDE, GPT))
    await until(lambda: twin.state == "sign_in")
    await twin.accept_terms()
    code, found = await patient.ask()
    assert code == 1
    verdict, text = found["script"]
    assert verdict == "needs you"
    assert text.startswith("0.9.0, but the program is 1.0.0: while that runs, open http://127.0.0.1:")
    verdict, text = found["model list"]
    assert verdict == "look"
    assert "1 new, 0 changed, 1 not listed any more" in text


async def test_a_connection_that_is_refused_is_told(patient: Patient) -> None:
    twin = await patient.open_tab()
    twin.origin = "https://elsewhere.example"
    code, found = await patient.ask(1.5)
    assert code == 1
    assert "origin https://elsewhere.example is not in allowed_origins" in found["refused"][1]


async def test_ctrl_c_ends_the_wait_and_the_findings_follow(patient: Patient) -> None:
    config = write_config(patient.directory, patient.tables)
    with Terminal(patient.directory, "--config", str(config), "--doctor", "600") as terminal:
        await terminal.shows("Ctrl-C ends the wait")
        terminal.press("ctrl-c")
        assert await terminal.exit_code() == 1
        assert "No LMArena tab is connected" in terminal.output
        assert "Traceback" not in terminal.output


async def test_a_copy_that_runs_is_asked(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = await start(
        nursery, tmp_path, models=(CLAUDE,), tables={"server": {"api_key": "secret"}}, connected=False
    )
    rig.http.headers["authorization"] = "Bearer secret"
    port = int(rig.url.rpartition(":")[2])
    tables: dict[str, dict[str, Any]] = {"server": {"port": port, "api_key": "secret"}}
    code, output = await ask_doctor(tmp_path, tables, 0.3)
    assert (code, findings(output)["tab"][0]) == (1, "needs you")

    await rig.connect()
    await until(lambda: rig.program.pool.catalog.page)
    code, output = await ask_doctor(tmp_path, tables, 30)
    found = findings(output)
    assert code == 0
    assert "a copy of the program runs here, version 1.0.0" in found["server.port"][1]
    assert "Waiting for" not in output
    assert found["rate limit"] == ("fine", "nothing is held back")
    assert found["conversations"][1].startswith("4 would be opened")
    assert rig.calls == []

    await rig.fill()
    [account] = rig.program.bridges.accounts()
    rig.program.bridges.gate(account).refuse(40)
    code, output = await ask_doctor(tmp_path, tables, 30)
    assert code == 0
    assert findings(output)["conversations"] == ("fine", "every model has those that it should")
    verdict, text = findings(output)["rate limit"]
    assert verdict == "look"
    assert re.match(rf"the site limits {account[:8]}: paused for \d+ s more", text)

    tables["server"]["api_key"] = "wrong"
    code, output = await ask_doctor(tmp_path, tables, 0.3)
    assert code == 2
    assert "✗ Cannot start: server.api_key (set): expected the key of the copy" in output
    assert "wrong" not in output

    tables["server"]["api_key"] = ""
    code, output = await ask_doctor(tmp_path, tables, 0.3)
    assert code == 2
    assert "✗ Cannot start: server.api_key (not set): expected the key of the copy" in output


@pytest.mark.parametrize("key", ["", "a key: Schlüssel, 钥匙"])
async def test_a_copy_that_runs_is_asked_whatever_its_key(
    key: str, nursery: trio.Nursery, tmp_path: Path
) -> None:
    rig = await start(
        nursery, tmp_path, models=(CLAUDE,), tables={"server": {"api_key": key}}, connected=False
    )
    port = int(rig.url.rpartition(":")[2])
    code, output = await ask_doctor(tmp_path, {"server": {"port": port, "api_key": key}}, 0)
    assert "a copy of the program runs here, version 1.0.0" in findings(output)["server.port"][1]
    assert code == 1


async def test_another_program_at_the_port_is_a_start_that_cannot_be(patient: Patient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        port = other.getsockname()[1]
        patient.tables = {"server": {"port": 0}, "bridge": {"port": port}}
        code, output = await ask_doctor(patient.directory, patient.tables, 0.3)
    assert code == 2
    assert f"✗ Cannot start: bridge.port = {port}" in output


async def test_a_store_that_a_copy_elsewhere_holds_is_a_start_that_cannot_be(patient: Patient) -> None:
    with hold_store(patient.directory / "state"):
        code, output = await ask_doctor(patient.directory, patient.tables, 0.3)
    assert code == 2
    assert "no other copy of the program uses now" in output


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_the_doctor_waits_for_a_number_of_seconds(seconds: str, place: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(place, f"--doctor={seconds}")
    assert ended.value.code == 2
