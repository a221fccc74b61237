"""Configuration: one set of defaults everywhere, and a start that cannot be says why."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmarena_proxy import Config, ConfigError, configure, main, parse_arguments, parse_config, read_config

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "lmarena_proxy.py"
SETTINGS = [
    f"{section.name}.{field.name}"
    for section in msgspec.structs.fields(Config)
    for field in msgspec.structs.fields(section.type)
]


def tables() -> dict[str, Any]:
    """The shipped config.toml."""
    return msgspec.toml.decode((ROOT / "config.toml").read_bytes(), type=dict[str, Any])


def refusal(text: str, tmp_path: Path) -> ConfigError:
    """Why a config file with this text is refused."""
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(path, {})
    return caught.value


def test_the_file_names_every_setting_with_its_default() -> None:
    assert parse_config(tables()) == Config()
    assert {name: {*keys} for name, keys in tables().items()} == {
        section.name: {field.name for field in msgspec.structs.fields(section.type)}
        for section in msgspec.structs.fields(Config)
    }


def test_the_file_and_the_code_have_the_same_order() -> None:
    assert [f"{table}.{key}" for table, keys in tables().items() for key in keys] == SETTINGS


def test_a_missing_file_is_all_defaults(tmp_path: Path) -> None:
    assert read_config(tmp_path / "none.toml", {}) == Config()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_readme_names_every_setting(setting: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{setting}`" in readme


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("[server]\nprot = 9080", "server.prot", 9080, "no such key"),
        ("[sever]\nport = 9080", "sever", {"port": 9080}, "no such key"),
        ("port = 9080", "port", 9080, "no such key"),
        ('[server]\nport = "9080"', "server.port", "9080", "int"),
        ("[server]\nport = 65536", "server.port", 65536, "65535"),
        ("[server]\nport = -1", "server.port", -1, ">= 0"),
        ("server = 9080", "server", 9080, "object"),
        ("[server]\nhost = true", "server.host", True, "str"),
        ('[server]\nallowed_hosts = "nas"', "server.allowed_hosts", "nas", "array"),
        ("[models]\ninclude = [1]", "models.include[0]", 1, "str"),
        ("[pool]\nsessions_per_model = 0", "pool.sessions_per_model", 0, ">= 1"),
        ("[pool]\nsessions_per_model = 1.5", "pool.sessions_per_model", 1.5, "int"),
        ("[requests]\nidle_timeout_seconds = -1", "requests.idle_timeout_seconds", -1, ">= 0"),
        ('[requests]\nkeepalive = "pings"', "requests.keepalive", "pings", "one of chunk, comment, off"),
        ("[requests]\nkeepalive_seconds = 0", "requests.keepalive_seconds", 0, ">= 0.01"),
        ("[bridge]\nheartbeat_seconds = 0", "bridge.heartbeat_seconds", 0, ">= 0.01"),
        ('[bootstrap]\nmessage = ""', "bootstrap.message", "", "length >= 1"),
        ('[log]\nlevel = "debug"', "log.level", "debug", "one of DEBUG, INFO"),
        ("[models.aliases]\ngpt-4o = 5", "models.aliases", {"gpt-4o": 5}, "str"),
        ('[models]\naliases = "x"', "models.aliases", "x", "object"),
        ('[requests]\nreasoning = "no"', "requests.reasoning", "no", "one of reasoning_content, reasoning"),
        ("[media]\nmax_file_mb = 0", "media.max_file_mb", 0, ">= 1"),
    ],
)
def test_a_wrong_setting_is_named_with_value_and_expectation(
    text: str, key: str, value: object, expected: str, tmp_path: Path
) -> None:
    error = refusal(text, tmp_path)
    assert (error.key, error.value) == (key, value)
    assert expected in error.expected
    assert key in str(error)
    assert repr(value) in str(error)


def test_a_key_that_is_wrong_is_not_shown(tmp_path: Path) -> None:
    error = refusal("[server]\napi_key = 12345", tmp_path)
    assert str(error) == "server.api_key (set): expected str, got int"


@pytest.mark.parametrize("name", ['"a.b"', '"a[0]"', '""', '"`"', '"naïve key"'])
def test_an_unknown_key_may_have_any_name(name: str, tmp_path: Path) -> None:
    for text in (f"{name} = 1", f"[server]\n{name} = 1"):
        assert "no such key" in refusal(text, tmp_path).expected


def test_seconds_are_numbers(tmp_path: Path) -> None:
    error = refusal("[requests]\ntotal_timeout_seconds = nan", tmp_path)
    assert error.key == "requests.total_timeout_seconds"


@pytest.mark.parametrize("content", [b"[server\n", b"a = = 1", b"port = 08", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_refused_with_the_files_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml") as caught:
        read_config(path, {})
    assert caught.value.key == str(path)


def test_a_directory_as_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="readable"):
        read_config(tmp_path, {})


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[server]\nport = 1\n[models]\ninclude = ["a"]\nexclude = ["b"]\n', encoding="utf-8")
    config = read_config(
        path, {("server", "port"): 2, ("models", "include"): ["c"], ("log", "level"): "DEBUG"}
    )
    assert (config.server.port, config.models.include, config.models.exclude) == (2, ("c",), ("b",))
    assert config.log.level == "DEBUG"


@pytest.mark.parametrize("section", ["server", "bridge"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "", "example.org"])
def test_listening_beyond_loopback_needs_a_key(section: str, host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({section: {"host": host}})
    assert caught.value.key == f"{section}.host"
    keyed = {"server": {"api_key": "secret"}}
    keyed.setdefault(section, {})["host"] = host
    assert getattr(parse_config(keyed), section).host == host


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        (
            "server.cors_origins",
            ["http://localhost:3000/", "localhost:3000", "http://Localhost", "http://*.nas", "https://", ""],
        ),
        (
            "bridge.allowed_origins",
            ["lmarena.ai", "https://lmarena.ai/", "https://lmarena.ai/c/1", "*", "https://a b", "null", ""],
        ),
    ],
)
def test_an_origin_that_no_page_has_is_refused(setting: str, values: list[str]) -> None:
    table, _, key = setting.partition(".")
    for value in values:
        with pytest.raises(ConfigError) as caught:
            parse_config({table: {key: [value]}})
        assert (caught.value.key, caught.value.value) == (setting, value)


def test_origins_that_pages_have_are_taken() -> None:
    pages = [
        "*",
        "null",
        "http://localhost:3000",
        "https://nas.local",
        "http://[::1]:8000",
        "app://obsidian.md",
    ]
    assert parse_config({"server": {"cors_origins": pages}}).server.cors_origins == (*pages,)
    tabs = [
        "https://lmarena.ai",
        "https://*.LMArena.ai",
        "http://localhost:*",
        "*://arena.ai",
        "http://[::1]",
    ]
    assert parse_config({"bridge": {"allowed_origins": tabs}}).bridge.allowed_origins == (*tabs,)


@pytest.mark.parametrize(
    "url", ["nas:9080", "nas.local", "ftp://nas", "http://", "http://nas/?a", " http://nas"]
)
def test_where_media_are_reached_is_an_address(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"media": {"base_url": url}})
    assert (caught.value.key, caught.value.value) == ("media.base_url", url)
    for fine in ("", "http://nas.local:9080", "https://nas.local/chat/"):
        assert parse_config({"media": {"base_url": fine}}).media.base_url == fine


@pytest.mark.parametrize("key", ["  ", " key", "key ", "key\n", "a\tkey"])
def test_a_key_that_no_client_can_give_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"server": {"api_key": key}})
    assert str(caught.value).startswith("server.api_key (set): expected printable characters")
    assert parse_config({"server": {"api_key": "a key, 钥匙"}}).server.api_key == "a key, 钥匙"


@pytest.mark.parametrize(
    ("api", "bridge"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "::1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "::"),
        ("", "192.168.1.2"),
    ],
)
def test_one_port_is_not_listened_at_twice(api: str, bridge: str) -> None:
    server = {"api_key": "secret", "host": api, "port": 9081}
    with pytest.raises(ConfigError) as caught:
        parse_config({"server": server, "bridge": {"host": bridge}})
    assert (caught.value.key, caught.value.value) == ("bridge.port", 9081)
    # The system chooses two different ones.
    chosen = {"server": server | {"port": 0}, "bridge": {"host": bridge, "port": 0}}
    assert parse_config(chosen).bridge.port == 0


@pytest.mark.parametrize(
    ("api", "bridge"), [("127.0.0.1", "::1"), ("0.0.0.0", "::1"), ("127.0.0.1", "192.168.1.2")]
)
def test_hosts_that_do_not_meet_may_have_the_same_port(api: str, bridge: str) -> None:
    server = {"api_key": "secret", "host": api, "port": 9081}
    assert parse_config({"server": server, "bridge": {"host": bridge}}).bridge.port == 9081


@pytest.mark.parametrize(
    "network", ["198.18.0.0/15", "10.0.0.0/8", "192.168.1.5", "fd00::/8", "64:ff9b::/96"]
)
def test_a_network_may_be_fetched_from(network: str) -> None:
    assert parse_config({"media": {"allowed_networks": [network]}}).media.allowed_networks == (network,)


@pytest.mark.parametrize(
    "network",
    [
        "",
        "x",
        "127.0.0.1",
        "127.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "::1",
        "169.254.0.0/16",
        "fe80::/64",
        "10.0.0.1/8",
    ],
)
def test_no_setting_opens_this_machine_to_fetching(network: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"media": {"allowed_networks": ["10.0.0.0/8", network]}})
    assert (caught.value.key, caught.value.value) == ("media.allowed_networks", network)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_listening_on_loopback_needs_no_key(host: str) -> None:
    assert parse_config({"server": {"host": host}, "bridge": {"host": host}}).server.host == host


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("create_path", "/api/auth/logout"),
        ("create_path", "nextjs-api/stream/create"),
        ("create_path", "https://evil.example/api/stream/create"),
        ("retry_path", "/api/user/{session_id}/{message_id}"),
        ("retry_path", "/api/stream/retry/{session_id}"),
        ("retry_path", "/api/stream/retry/{message_id}"),
        ("retry_path", "/api/stream/retry"),
    ],
)
def test_paths_outside_what_the_userscript_relays_are_refused(key: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"arena": {key: path}})
    assert (caught.value.key, caught.value.value) == (f"arena.{key}", path)


def test_the_older_deployments_paths_are_taken() -> None:
    paths = {"create_path": "/api/stream/create", "retry_path": "/api/stream/{session_id}/{message_id}"}
    assert parse_config({"arena": paths}).arena.create_path == "/api/stream/create"


@pytest.mark.parametrize("extra", ["{other}", "{", "{0}"])
def test_a_retry_path_that_cannot_be_filled_in_is_refused(extra: str) -> None:
    path = f"/api/stream/{{session_id}}/{{message_id}}/{extra}"
    with pytest.raises(ConfigError):
        parse_config({"arena": {"retry_path": path}})


def configured(tmp_path: Path, *arguments: str, text: str = "", **environment: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    options = parse_arguments(["--config", str(path), *arguments])
    config, directory = configure(options, environment)
    assert directory == tmp_path.resolve()
    return config


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    text = '[server]\nport = 1\n[bridge]\nport = 2\n[models]\ninclude = ["x"]\nexclude = ["y"]\n'
    arguments = (
        "--port",
        "3",
        "--bridge-port",
        "4",
        "--host",
        "localhost",
        "--models",
        "a*",
        "b*",
        "--no-bootstrap",
    )
    config = configured(tmp_path, *arguments, text=text)
    assert (config.server.port, config.bridge.port, config.server.host) == (3, 4, "localhost")
    assert (config.models.include, config.models.exclude) == (("a*", "b*"), ("y",))
    assert not config.bootstrap.enabled


@pytest.mark.parametrize(
    "arguments",
    [
        ("--check", "--prune"),
        ("--doctor", "--check"),
        ("--doctor", "0", "--update-models"),
        ("--export-sessions", "a", "--import-sessions", "b"),
        ("--demo", "--export-sessions", "a"),
        ("--demo", "--doctor", "0"),
        ("--demo", "--update-models"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_environment_sets_the_key_over_the_file(tmp_path: Path) -> None:
    text = '[server]\napi_key = "file"\n'
    assert configured(tmp_path, text=text).server.api_key == "file"
    assert configured(tmp_path, text=text, LMARENA_PROXY_API_KEY="env").server.api_key == "env"
    assert configured(tmp_path, text=text, LMARENA_PROXY_API_KEY="").server.api_key == "file"


def test_a_key_from_the_environment_allows_listening_everywhere(tmp_path: Path) -> None:
    config = configured(tmp_path, "--host", "0.0.0.0", LMARENA_PROXY_API_KEY="env")
    assert config.server.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "no-such.toml"], "--config = 'no-such.toml': expected a file that exists"),
        (["--port", "70000"], "server.port = 70000"),
        (["--host", "0.0.0.0"], "server.host = '0.0.0.0'"),
    ],
)
def test_a_start_that_cannot_be_returns_two(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMARENA_PROXY_API_KEY", raising=False)
    assert main(arguments) == 2
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1\n", "server.prot = 1: expected nothing, as there is no such key"),
        ('[models]\npath = "none.json"\n', "models.path"),
        ('[models]\npath = "broken.json"\n', "models.path"),
        ('[storage]\npath = "occupied"\n', "storage.path"),
        ('[log]\ndirectory = "occupied"\n', "log.directory"),
    ],
)
def test_a_start_that_cannot_be_exits_with_two_and_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    (tmp_path / "occupied").write_text("a file", encoding="utf-8")
    (tmp_path / "broken.json").write_text('[{"id": 1}]', encoding="utf-8")
    (tmp_path / "models.json").write_bytes((ROOT / "models.json").read_bytes())
    command = [sys.executable, str(PROGRAM), "--config", str(tmp_path / "config.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# ── Anything at all ─────────────────────────────────────────────────────────────────────────────────────────


def try_out(read: Callable[[], Config]) -> Config | None:
    """The configuration, or None where it is refused; the refusal says what was expected."""
    try:
        return read()
    except ConfigError as error:
        refused = error
    assert refused.expected
    mark = "(" if refused.key == "server.api_key" else "="
    assert f"{refused.key} {mark}" in str(refused)
    return None


SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.text(max_size=20), st.floats()),
    st.integers(-(10**20), 10**20),
    st.sampled_from(["0.0.0.0", "::1", "http://*", "{session_id}", "/nextjs-api/stream/../x", "10.0.0.0/8"]),
    st.dates().map(str),
)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
)
NAMES = st.sampled_from([section.name for section in msgspec.structs.fields(Config)]) | st.text(max_size=8)
KEYS = st.sampled_from([setting.partition(".")[2] for setting in SETTINGS]) | st.text(max_size=8)


@given(st.dictionaries(NAMES, VALUES | st.dictionaries(KEYS, VALUES, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tables_are_a_configuration_or_a_clear_refusal(tables: dict[str, Any]) -> None:
    try_out(lambda: parse_config(tables))


@st.composite
def settings_of_the_right_kind(draw: st.DrawFn) -> tuple[str, Any]:
    """A key that exists, with a value of its type, in range or not."""
    setting = draw(st.sampled_from(SETTINGS))
    table, _, key = setting.partition(".")
    default = getattr(getattr(Config(), table), key)
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-10, 2_000_000),
        float: st.floats(-1, 1e8) | st.just(float("inf")) | st.just(float("nan")),
        str: st.text(max_size=30),
        tuple: st.lists(st.text(max_size=20), max_size=3),
        dict: st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    }
    return setting, draw(kinds[type(default)])


@given(settings_of_the_right_kind())
@settings(max_examples=200, deadline=None)
def test_any_value_of_a_setting_is_taken_or_named(setting: tuple[str, Any]) -> None:
    (table, _, key), value = setting[0].partition("."), setting[1]
    if config := try_out(lambda: parse_config({table: {key: value}})):
        kept = getattr(getattr(config, table), key)
        assert kept == (tuple(value) if isinstance(value, list) else value)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_configuration_or_a_clear_refusal(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    try_out(lambda: read_config(path, {}))


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_slip_in_the_shipped_file_is_a_configuration_or_a_clear_refusal(
    data: st.DataObject, tmp_path: Path
) -> None:
    text = (ROOT / "config.toml").read_bytes()
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 5))
    slip = data.draw(st.binary(max_size=3) | st.sampled_from([b"[", b'"', b"=", b"\n", b"'''", b"#"]))
    path = tmp_path / "config.toml"
    path.write_bytes(text[:place] + slip + text[place + length :])
    try_out(lambda: read_config(path, {}))
