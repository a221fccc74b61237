# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trio==0.35.0",
#     "trio-websocket==0.12.2",
#     "hypercorn==0.18.0",
#     "quart==0.22.0",
#     "quart-trio==0.12.0",
#     "rich==15.0.0",
#     "msgspec==0.22.0",
#     "prometheus-client==0.26.0",
#     "httpx==0.28.1",
# ]
# ///
"""lmarena_proxy: an OpenAI-compatible API in front of a person's own LMArena tab.

    OpenAI client --HTTP--> API --> pool of the model --> bridge (WebSocket) --> bridge.user.js --> site
                  <--SSE---     <-- answer events     <-- response bytes     <-- in the person's tab <--

Each model has a pool of conversations on the site ("sessions"), opened in advance. A request names a model,
takes one of its sessions, and is answered by retrying that session's last message with its own messages.

The file is read downward, once: a definition is used only below itself. Its sections:

    Errors
    Configuration
    Models
    Arena wire format
    OpenAI wire format
    Bridge protocol
    Events and logs
    Store
    Media
    Session pool
    Bridges
    Relay
    Console
    Bootstrap
    Monitoring
    HTTP API
    Program
    Housekeeping
    Command line
"""

import os
import sys
from importlib.util import find_spec

if __name__ == "__main__":
    # What keeps it from starting here is told in one line. For this all of the file compiles with Python 3.8.
    oldest, running, trouble = (3, 11), sys.version.split()[0], ""
    libraries = "httpx hypercorn msgspec prometheus_client quart quart_trio rich trio trio_websocket".split()
    if sys.version_info < oldest:
        trouble = f"Python 3.11 or newer is needed, and this is {running}: install one, and start with it."
        trouble += f" 无法启动：需要 Python 3.11 或更高版本，当前为 {running}，请安装后用它启动。"
    elif missing := ", ".join(name for name in libraries if not find_spec(name)):
        trouble = f"{missing} not found. 无法启动：缺少这些库。"
        place = os.path.dirname(os.path.abspath(__file__))
        venv = os.path.join(place, ".venv")
        python, within = sys.executable, "Scripts/python.exe" if os.name == "nt" else "bin/python"
        venv_python = os.path.normpath(os.path.join(venv, within))
        start = [venv_python, os.path.abspath(__file__)]
        install = ["-m", "pip", "install", "-r", os.path.join(place, "requirements.txt")]
        is_own = os.path.realpath(os.path.dirname(python)) == os.path.realpath(os.path.dirname(venv_python))
        if os.path.exists(venv_python) and not is_own:
            trouble, commands = trouble + "Start it with 请改用: ", [start]
        elif is_own or sys.prefix != sys.base_prefix:
            trouble, commands = trouble + "To install them, 请安装: ", [[python, *install]]
        else:  # Many systems let nothing be installed beside their own libraries.
            trouble += "To install them, and to start, 请安装并启动: "
            commands = [[python, "-m", "venv", venv], [venv_python, *install], start]
        quoted = ([f'"{word}"' if " " in word else word for word in command] for command in commands)
        trouble += " && ".join(map(" ".join, quoted))
    if trouble:
        print("Cannot start:", trouble, file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__" and os.name == "posix" and sys.orig_argv[1:] == sys.argv and not sys.gettrace():
    # Begin again as a module, in the same process: of a script Python keeps the whole syntax tree as long as
    # it runs (10 MB of this one), and compiles it at each start. Not with options of Python's own (-m,
    # -X dev) nor under a debugger: they are meant for this run.
    steps = (
        "import sys, importlib",
        "sys.path[0], name = sys.argv[1:3]",
        "sys.exit(importlib.import_module(name).main(sys.argv[3:]))",
    )
    place, file = os.path.split(os.path.realpath(__file__))
    command = ["-c", "; ".join(steps), place, file.removesuffix(".py"), *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, *command])

import argparse
import base64
import bisect
import csv
import ctypes
import difflib
import email.utils
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import string
import struct
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import LazyLoader, module_from_spec
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_type_hints,
)
from urllib.parse import quote, unquote, urlsplit

import msgspec
import prometheus_client
import trio
import trio_websocket
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.control import strip_control_codes
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text as RichText

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import termios


def load_later(name: str) -> Any:
    """A library that is loaded when something of it is first used."""
    if name not in sys.modules:
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(name=name)
        spec.loader = LazyLoader(spec.loader)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# A start needs none of these, and neither does an answer: they are a quarter of both its time and the memory.
if TYPE_CHECKING:
    import httpx
    import quart
    import quart_trio
    from rich.traceback import Traceback
else:
    httpx, quart, quart_trio = map(load_later, ("httpx", "quart", "quart_trio"))

_loaded: set[str] = set()
_loading = trio.Lock()


async def load(name: str) -> None:
    """Load a library before it is used, in a thread: all else goes on meanwhile.

    One at a time: until a load has ended, whoever looks finds a library that is half there.
    """
    if name not in _loaded:
        async with _loading:
            await trio.to_thread.run_sync(lambda: dir(import_module(name)))  # To look at it loads it.
            _loaded.add(name)


VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent

# ==========================================================================================================
# Errors
# ==========================================================================================================
#
# Whose fault something is, is a type. An ApiError is what a client is told, and is rendered in exactly one
# place before an answer's first byte and in one after it (HTTP API). A ConfigError is what the person who
# starts the program is told. Any other exception is a bug and is logged whole.


class ConfigError(Exception):
    """A start that cannot be: names the key, the value found (no secret), and what was expected instead."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        if key == "server.api_key":
            state = "not set" if value == "" else "set"
            super().__init__(f"{key} ({state}): expected {expected}")
        else:
            super().__init__(f"{key} = {value!r}: expected {expected}")
        self.key, self.value, self.expected = key, value, expected


class PartMissing(ConfigError):
    """A start without a file of the program's own."""

    def __init__(self, name: str) -> None:
        Exception.__init__(self, f"{name} not found beside lmarena_proxy.py: take the whole repository")
        self.key, self.value, self.expected = name, None, "the whole repository"


class ApiError(Exception):
    """A failure a client is told about, in OpenAI's terms.

    `retry_after` is in seconds, at most 60 (clients ignore longer ones). `may_retry=False` becomes
    `x-should-retry: false`, which keeps the OpenAI libraries from sending a delivered prompt once more.
    """

    status: ClassVar[int] = 500
    type: str = "api_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        may_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.http_status = self.status if status is None else status
        self.error_code = self.code if code is None else code
        self.param = param
        self.retry_after = None if retry_after is None else max(1, math.ceil(min(60, retry_after)))
        self.may_retry = may_retry


class ClientError(ApiError):
    """The request itself cannot be served."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class BridgeError(ApiError):
    """No tab can carry the request now, or the person is needed in it."""

    status, type, code = 503, "service_unavailable", "bridge_unavailable"


class ArenaError(ApiError):
    """The site failed or refused.

    `arena_status` is its HTTP status (0 when there was none), `reply` its body's text.
    """

    status, type, code = 502, "upstream_error", "upstream_error"

    def __init__(self, message: str, *, arena_status: int = 0, reply: str = "", **rest: Any) -> None:
        super().__init__(message, **rest)
        self.arena_status, self.reply = arena_status, reply
        if self.http_status in (400, 413):
            self.type = ClientError.type


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def first_of(group: BaseExceptionGroup[BaseException], *kinds: type[Exception]) -> BaseException:
    """The first of these failures in what a nursery raised.

    Raises the others if there are any: neither a cancellation nor an error in the program ends here.
    """
    others = group.split(kinds)[1]
    if others:
        raise others from None
    return next(leaves(group))


# ==========================================================================================================
# Configuration
# ==========================================================================================================
#
# One struct per table of config.toml. Defaults here, in config.toml and in the README are compared by a test.

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10_000_000)]
# A moment, up to the year 5138.
UnixTime = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
# Up to eleven years; 0 stands for never.
Hours = Annotated[float, msgspec.Meta(ge=0, le=100_000)]
Glob = str


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A table of config.toml: unknown keys are errors."""


class ServerConfig(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 9080
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_mb: Count = 32
    shutdown_grace_seconds: Seconds = 10


class BridgeConfig(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 9081
    heartbeat_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=86_400)] = 20
    reconnect_grace_seconds: Seconds = 30
    model_refresh_hours: Hours = 0
    allowed_origins: tuple[str, ...] = (
        "https://lmarena.ai",
        "https://*.lmarena.ai",
        "https://arena.ai",
        "https://*.arena.ai",
    )


class ArenaConfig(Section, frozen=True):
    create_path: str = "/nextjs-api/stream/create-evaluation"
    retry_path: str = "/nextjs-api/stream/retry-evaluation-session-message/{session_id}/messages/{message_id}"
    auth_cookie: str = "arena-auth-prod-v1"
    max_attachment_mb: Count = 5


class ModelsConfig(Section, frozen=True):
    path: str = "models.json"
    include: tuple[Glob, ...] = ("*",)
    exclude: tuple[Glob, ...] = ()
    aliases: dict[str, str] = {}


class PoolConfig(Section, frozen=True):
    sessions_per_model: Count = 4
    max_consecutive_failures: Count = 3
    max_idle_hours: Hours = 0
    use_battles: bool = False


class BootstrapConfig(Section, frozen=True):
    enabled: bool = True
    settle_seconds: Seconds = 30
    message: Annotated[str, msgspec.Meta(min_length=1)] = "Hi"
    concurrency: Count = 8
    timeout_seconds: Seconds = 120
    max_rate_limit_wait_seconds: Seconds = 300


class RequestsConfig(Section, frozen=True):
    queue_timeout_seconds: Seconds = 600
    first_byte_timeout_seconds: Seconds = 180
    idle_timeout_seconds: Seconds = 180
    total_timeout_seconds: Seconds = 1800
    person_wait_seconds: Seconds = 120
    commit_after_seconds: Seconds = 3
    keepalive: Literal["chunk", "comment", "off"] = "chunk"
    keepalive_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=86_400)] = 10
    reasoning: Literal["reasoning_content", "reasoning", "both", "think"] = "reasoning_content"
    list_sources: bool = False
    merge_system: bool = False


class MediaConfig(Section, frozen=True):
    keep: bool = False
    max_file_mb: Count = 64
    max_total_mb: Count = 1024
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=86_400)] = 30
    base_url: str = ""
    allowed_networks: tuple[str, ...] = ()


class LimitsConfig(Section, frozen=True):
    connections: Count = 2000
    answer_mb: Count = 64


class StorageConfig(Section, frozen=True):
    path: str = "state"
    keep_days: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 30


class LogConfig(Section, frozen=True):
    directory: str = "logs"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    contents: bool = True


class Config(Section, frozen=True):
    """The configuration in force: config.toml under the environment and the command line."""

    server: ServerConfig = ServerConfig()
    bridge: BridgeConfig = BridgeConfig()
    arena: ArenaConfig = ArenaConfig()
    models: ModelsConfig = ModelsConfig()
    pool: PoolConfig = PoolConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    requests: RequestsConfig = RequestsConfig()
    media: MediaConfig = MediaConfig()
    limits: LimitsConfig = LimitsConfig()
    storage: StorageConfig = StorageConfig()
    log: LogConfig = LogConfig()


LOOPBACK_HOSTS = {"127.0.0.1", "localhost", "::1"}
# The userscript relays nothing else, whatever the program asks for.
RELAYED_PREFIXES = ("/nextjs-api/stream/", "/api/stream/")


def reachable(host: str) -> str:
    """The name under which this machine's browser reaches what listens at `host`."""
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _config_error(message: str, tables: dict[str, Any]) -> ConfigError:
    """Turn msgspec's "Expected `int`, got `str` - at `$.server.port`" into key, value and expectation."""
    text, _, where = message.partition(" - at `$")
    key = where.rstrip("`").lstrip(".").removesuffix("[...]")
    value: Any = tables
    for name in re.findall(r"[^.\[\]]+", key):
        value = value[int(name) if isinstance(value, list) else name]
    if unknown := re.search(r"unknown field `(.*)`", text, re.DOTALL):
        key = ".".join(filter(None, (key, unknown[1] or '""')))
        value = value[unknown[1]]
        text = "nothing, as there is no such key (config.toml has them all)"
    elif text.startswith("Invalid enum value"):
        table, name = key.split(".")
        text = f"one of {', '.join(get_args(get_type_hints(get_type_hints(Config)[table])[name]))}"
    return ConfigError(key or "config", value, re.sub(r"^Expected ", "", text).replace("`", ""))


def _check_path(key: str, path: str, *names: str) -> None:
    try:
        filled = path.format(session_id="S", message_id="M") if names else path
    except (LookupError, ValueError):
        filled = ""
    is_relayed = filled.startswith(RELAYED_PREFIXES) and ".." not in filled.split("/")
    if not is_relayed or not all(name in path for name in names):
        wanted = f"a path under {' or '.join(RELAYED_PREFIXES)}"
        raise ConfigError(key, path, f"{wanted} with {' and '.join(names)}" if names else wanted)


def _check_network(text: str) -> None:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        is_fit = False
    else:
        # Whoever can reach these can reach what trusts this machine alone: no setting opens them.
        own = map(
            ipaddress.ip_network, ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "::1/128", "fe80::/10")
        )
        is_fit = not any(each.overlaps(network) for each in own if each.version == network.version)
    if not is_fit:
        wanted = "networks such as 198.18.0.0/15, neither loopback nor link-local"
        raise ConfigError("media.allowed_networks", text, wanted)


# As browsers write it. `null` and `file://` are the origins of files.
_CORS_ORIGIN = re.compile(
    r"\*|null|file://|[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)
_BRIDGE_ORIGIN = re.compile(
    r"(?:[a-z][a-z0-9+.-]*|\*)://(?:[a-z0-9._*-]+|\[[0-9a-f:.]+\])(?::(?:[0-9]{1,5}|\*))?", re.IGNORECASE
)
_BASE_URL = re.compile(r"(?:https?://[^\s/?#]+(?:/[^\s?#]*)?)?", re.IGNORECASE)


def _check_addresses(config: Config) -> None:
    """What never matches, or cannot be opened, is found here and not by the person."""
    for origin in config.server.cors_origins:
        if not _CORS_ORIGIN.fullmatch(origin):
            wanted = "origins such as http://localhost:3000, in lower case and without a path, or *"
            raise ConfigError("server.cors_origins", origin, wanted)
    for origin in config.bridge.allowed_origins:
        if not _BRIDGE_ORIGIN.fullmatch(origin):
            wanted = "origins such as https://*.lmarena.ai, without a path"
            raise ConfigError("bridge.allowed_origins", origin, wanted)
    if not _BASE_URL.fullmatch(config.media.base_url):
        wanted = "an address such as http://nas.local:9080"
        raise ConfigError("media.base_url", config.media.base_url, wanted)


def _overlap(one: str, other: str) -> bool:
    """Whether a port that is listened at under one host is taken under the other."""
    names = {"": ("0.0.0.0", "::"), "localhost": ("127.0.0.1", "::1")}
    for pair in itertools.product(names.get(one, (one,)), names.get(other, (other,))):
        is_same_family = (":" in pair[0]) == (":" in pair[1])
        if pair[0] == pair[1] or (is_same_family and {"0.0.0.0", "::"} & {*pair}):
            return True
    return False


def parse_config(tables: dict[str, Any]) -> Config:
    """Check the tables of a config file.

    Raises ConfigError for an unknown key, a wrong type or a value out of range.
    """
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise _config_error(str(error), tables) from None
    for section, host in (("server", config.server.host), ("bridge", config.bridge.host)):
        if host not in LOOPBACK_HOSTS and not config.server.api_key:
            raise ConfigError(f"{section}.host", host, "a loopback address, or server.api_key set beside it")
    key = config.server.api_key
    if key != key.strip() or not key.isprintable():
        raise ConfigError("server.api_key", key, "printable characters, with no space at either end")
    _check_addresses(config)
    port = config.bridge.port
    if port and port == config.server.port and _overlap(config.server.host, config.bridge.host):
        raise ConfigError("bridge.port", port, "another port than server.port (--port, --bridge-port)")
    _check_path("arena.create_path", config.arena.create_path)
    _check_path("arena.retry_path", config.arena.retry_path, "{session_id}", "{message_id}")
    for network in config.media.allowed_networks:
        _check_network(network)
    return config


def read_config(path: Path, overrides: Mapping[tuple[str, str], object]) -> Config:
    """Read a config file (a missing one is all defaults), `overrides`, {(table, key): value}, laid over."""
    tables: dict[str, Any] = {}
    if path.exists():
        try:
            tables = msgspec.toml.decode(path.read_text("utf-8-sig"), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(str(path), str(error), "a TOML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), str(error), "a readable UTF-8 file") from None
    for (table, key), value in overrides.items():
        if isinstance(tables.setdefault(table, {}), dict):
            tables[table][key] = value
    return parse_config(tables)


# ==========================================================================================================
# Models
# ==========================================================================================================

Modality = Literal["chat", "image", "video", "search"]


def _object(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


class Model(msgspec.Struct, frozen=True):
    """One model of the site. Several may share a name: text-to-video and image-to-video."""

    id: str
    name: str
    modality: Modality = "chat"
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    takes_many_images: bool = False
    requires_image: bool = False
    organization: str = "lmarena"
    # The entry as the site has it.
    entry: dict[str, Any] = {}

    @property
    def takes_image(self) -> bool:
        return "image" in self.inputs

    @classmethod
    def from_entry(cls, entry: object) -> Self:
        """Read one entry of models.json or of the page's list. Raises ValueError, saying what is missing."""
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, got {type(entry).__name__}")
        for key in ("id", "publicName"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(f"expected a non-empty string as {key}, got {entry.get(key)!r}")
        capabilities = _object(entry.get("capabilities"))
        # By kind: true, or an object with conditions; absent or false for what the model does not do.
        inputs = _object(capabilities.get("inputCapabilities"))
        outputs = _object(capabilities.get("outputCapabilities"))
        conditions = _object(inputs.get("image"))
        return cls(
            id=entry["id"],
            name=entry["publicName"],
            modality=next((kind for kind in ("search", "image", "video") if outputs.get(kind)), "chat"),
            inputs=tuple(kind for kind in inputs if inputs[kind]),
            outputs=tuple(kind for kind in outputs if outputs[kind]),
            takes_many_images=bool(inputs.get("image")) and conditions.get("multipleImages") is not False,
            requires_image=conditions.get("requiresUpload") is True,
            organization=str(entry.get("organization") or "lmarena"),
            entry=entry,
        )


class Catalog:
    """The models by id, name and alias: the built-in list with the page's list laid over it."""

    def __init__(self, models: Iterable[Model], config: ModelsConfig | None = None) -> None:
        self._config = config or ModelsConfig()
        self._by_id: dict[str, Model] = {}
        self._by_name: dict[str, list[Model]] = {}
        self._built_in = {model.id: model for model in self.merge(models)}
        # When the page listed its models, how many, and in how many that differs from the built-in list.
        self.page: dict[str, float] = {}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __repr__(self) -> str:
        return f"<Catalog of {len(self)} models>"

    def _is_wanted(self, model: Model) -> bool:
        def matches(globs: Sequence[Glob]) -> bool:
            return any(fnmatch.fnmatchcase(text, glob) for glob in globs for text in (model.name, model.id))

        return matches(self._config.include) and not matches(self._config.exclude)

    def merge(self, models: Iterable[Model]) -> list[Model]:
        """Lay a list over the catalog by id: replaces and adds, drops nothing.

        Returns the entries that changed.
        """
        wanted = {model.id: model for model in models if self._is_wanted(model)}
        changed = [model for id_, model in wanted.items() if self._by_id.get(id_) != model]
        self._by_id |= wanted
        self._by_name = {}
        for model in self._by_id.values():
            self._by_name.setdefault(model.name, []).append(model)
        return changed

    def note_page(self, models: Iterable[Model]) -> None:
        """Remember what a page lists. An empty list says nothing."""
        listed = {model.id: model for model in models if self._is_wanted(model)}
        if listed:
            known = [model for id_, model in listed.items() if id_ in self._built_in]
            self.page = {
                "listed_at": time.time(),
                "count": len(listed),
                "new": len(listed) - len(known),
                "changed": sum(self._built_in[model.id] != model for model in known),
                "gone": len(self._built_in) - len(known),
            }

    def get(self, model_id: str) -> Model | None:
        return self._by_id.get(model_id)

    def names(self) -> list[str]:
        """The names of all models, then the aliases that stand for one."""
        names = dict.fromkeys([*self._by_name, *self._config.aliases])
        return [name for name in names if self.named(name)]

    def dangling_aliases(self) -> list[str]:
        """The aliases that stand for no model; the page's list may still bring it."""
        return [alias for alias in self._config.aliases if not self.named(alias)]

    def named(self, name: str) -> list[Model]:
        """The models that an alias, an id or a name stands for: none, one, or the two of a shared name."""
        name = self._config.aliases.get(name, name)
        if name in self._by_id:
            return [self._by_id[name]]
        return self._by_name.get(name, [])

    def takes_image(self, name: str) -> bool:
        """Whether one of the models that a name stands for does."""
        return any(model.takes_image for model in self.named(name))

    def resolve(self, name: str, images: dict[str, int]) -> Model:
        """The model for a request whose messages, by where they stand in it, have so many images each.

        Raises ClientError, saying what would do.
        """
        models = self.named(name)
        if not models:
            raise self.unknown(name)
        illustrated = {path: count for path, count in images.items() if count}
        # A shared name: the image, or its absence, chooses.
        model = max(models, key=lambda each: each.takes_image == bool(illustrated))
        for path, count in illustrated.items():
            if not model.takes_image:
                raise ClientError(f"{path}: the model {name!r} takes no images.", param=path)
            if count > 1 and not model.takes_many_images:
                message = f"{path}: the model {name!r} takes one image in a message, but got {count}."
                raise ClientError(message, param=path)
        if model.requires_image and not illustrated:
            message = f"The model {name!r} works on an image: send one with the request."
            raise ClientError(message, param=next(reversed(images), "messages"))
        return model

    def unknown(self, name: str) -> ClientError:
        """What a client is told of a name that stands for no model."""
        target = self._config.aliases.get(name, name)
        close = difflib.get_close_matches(target, self.names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else "GET /v1/models lists them all."
        meaning = f" (for which {name!r} stands in models.aliases)" if target != name else ""
        message = f"The model {target!r}{meaning} does not exist. {hint}"
        return ClientError(message, status=404, code="model_not_found", param="model")


def read_catalog(path: Path, config: ModelsConfig) -> Catalog:
    """Read models.json. Raises ConfigError when it cannot be read or an entry is not a model."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=list[Any])
        models = [Model.from_entry(entry) for entry in entries]
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise ConfigError("models.path", str(path), f"a readable list of models ({error})") from None
    catalog = Catalog(models, config)
    if not len(catalog):
        wanted = f"a pattern that names at least one of {len(models)} models"
        raise ConfigError("models.include", [*config.include], wanted)
    return catalog


# ==========================================================================================================
# Arena wire format
# ==========================================================================================================
#
# What the site sends and takes, as the arena contract has it. All of it is here and in [arena] of
# config.toml, since it is the site's to change. No I/O.


class Attachment(msgspec.Struct, frozen=True, rename="camel"):
    """An image for the site: `url` is an address on its storage or a data: URL of up to about 5 MB."""

    name: str
    content_type: str
    url: str

    @property
    def is_remote(self) -> bool:
        """Whether it is still to be fetched from its address: until then its type is not known."""
        return not self.content_type

    @property
    def data(self) -> str:
        """In base64, of a data: URL."""
        return self.url.partition(",")[2]

    @property
    def size_bytes(self) -> int:
        """Of a data: URL."""
        return (len(self.url) - self.url.index(",") - 1) * 3 // 4 - self.url.count("=", -2)


# Whose side of a conversation with two models (a battle, or side by side) a message is of.
Position = Literal["a", "b"]


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation, in the roles the site knows."""

    role: Literal["system", "user", "assistant"]
    content: str
    attachments: tuple[Attachment, ...] = ()


class Text(msgspec.Struct, frozen=True):
    """A piece of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of the model's reasoning."""

    text: str


class Media(msgspec.Struct, frozen=True):
    """An image or video, by its address."""

    kind: Literal["image", "video"]
    url: str


class Source(msgspec.Struct, frozen=True):
    """A page that a search model cites."""

    title: str
    url: str


class Failure(msgspec.Struct, frozen=True):
    """The site's own error line; nothing useful follows."""

    message: str


class Finish(msgspec.Struct, frozen=True):
    """The end of an answer. Token counts are None where the site sent none."""

    reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


AnswerEvent = Text | Reasoning | Media | Source | Failure | Finish


def uuid7() -> str:
    """A time-ordered UUID, the version that the site's own page uses (RFC 9562, section 5.7)."""
    milliseconds, random = time.time_ns() // 1_000_000, secrets.randbits(12 + 62)
    value = (milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | random >> 62 << 64
    return str(uuid.UUID(int=value | 0b10 << 62 | random & (1 << 62) - 1))


def _chain(
    messages: Sequence[Message], session_id: str, ids: Sequence[str], position: Position | None = None
) -> Iterator[dict[str, Any]]:
    """The part that both calls share: each message names the one before it as its parent."""
    for message, message_id, parent in zip(messages, ids, (None, *ids), strict=False):
        yield {
            "id": message_id,
            "role": message.role,
            # A user message with empty content is refused; a space is taken.
            "content": message.content or " ",
            "experimental_attachments": message.attachments,
            "parentMessageIds": [parent] if parent else [],
            "participantPosition": position or ("b" if message.role == "system" else "a"),
            "evaluationSessionId": session_id,
            "failureReason": None,
        }


def encode_create(model: Model, messages: Sequence[Message], session_id: str, message_id: str) -> str:
    """The body that opens a conversation.

    The caller chooses both ids (UUIDs); the last message must be the user's.
    """
    ids = [uuid7() for _ in messages]
    sent = [
        {**entry, "modelId": None, "status": "pending" if entry["id"] == ids[-1] else "success"}
        for entry in _chain(messages, session_id, ids)
    ]
    [answer] = _chain([Message("assistant", "")], session_id, [message_id])
    answer |= {"content": "", "parentMessageIds": [ids[-1]], "modelId": model.id, "status": "pending"}
    body = {
        "id": session_id,
        "mode": "direct",
        "modelAId": model.id,
        "userMessageId": ids[-1],
        "modelAMessageId": message_id,
        "modality": model.modality,
        "messages": [*sent, answer],
    }
    return msgspec.json.encode(body).decode()


def encode_retry(
    model: Model, messages: Sequence[Message], session_id: str, position: Position | None = None
) -> str:
    """The body that retries a conversation's last message; `messages` replace its history for this answer.

    `position`: the side that it is retried for, where there are two. All messages have it then, as in public
    tools that do so: the contract says nothing of this.
    """
    ids = [uuid7() for _ in messages]
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    constant = {"evaluationId": None, "metadata": None, "createdAt": now, "updatedAt": now}
    sent = [
        {
            **entry,
            **constant,
            "status": "pending" if entry["id"] == ids[-1] and model.modality != "image" else "success",
        }
        for entry in _chain(messages, session_id, ids, position)
    ]
    return msgspec.json.encode({"modelId": model.id, "messages": sent}).decode()


RefusalKind = Literal[
    "challenge", "signed_out", "gone", "running", "too_large", "rate_limited", "rejected", "failed"
]


class Refusal(msgspec.Struct, frozen=True):
    """A call that the site did not answer with 200, and what kind of refusal that is."""

    kind: RefusalKind
    status: int
    reply: str
    retry_after_seconds: float | None = None


_REFUSAL_KINDS: dict[int, RefusalKind] = {
    400: "rejected",
    401: "signed_out",
    403: "gone",
    404: "gone",
    409: "running",
    413: "too_large",
    422: "rejected",
    429: "rate_limited",
}


_LONGEST_RETRY_AFTER_SECONDS = 86_400.0


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """Classify an answer whose status is not 200, by the contract's table. Header names are lower case."""
    reply = body.decode("utf-8", "replace")
    content_type, start = headers.get("content-type", ""), reply.lstrip()[:1]
    is_html = "html" in content_type or start == "<"
    is_json = "json" in content_type or start == "{"
    is_challenge = headers.get("cf-mitigated") == "challenge" or (is_html and "Just a moment..." in reply)
    kind = _REFUSAL_KINDS.get(status, "failed")
    if is_challenge and status in (403, 429, 503):
        kind = "challenge"
    elif kind == "gone" and (is_html or not is_json):
        kind = "failed"  # Only JSON says that a conversation is gone; this is some gateway's word.
    try:
        seconds = float(headers["retry-after"])
    except (KeyError, ValueError):
        seconds = math.nan
    retry_after = min(_LONGEST_RETRY_AFTER_SECONDS, max(0.0, seconds)) if math.isfinite(seconds) else None
    return Refusal(kind, status, reply, retry_after)


def _forgiving_json(value: bytes) -> Any:
    """Decode JSON as the standard library does, broken UTF-8 replaced; None when it is not JSON."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(value)  # Nearly all of it, in a twentieth of the time.
    try:
        return json.loads(value.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError):
        return None


def _whole_characters(text: str) -> str:
    """Join the halves of surrogate pairs; a half that stays alone becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_decode_text = msgspec.json.Decoder(str).decode


class StreamError(Exception):
    """The body is not the contract's: a line grew beyond the limit."""


class ArenaStreamDecoder:
    """Bytes of an answer's body in, answer events out. Chunks may end anywhere, also inside a character.

    The body is lines `PREFIX:JSON`; the prefix's first letter is the participant, the rest the kind. Adjacent
    pieces of text in one chunk become one event. Unknown prefixes and step marks are skipped, by contract; so
    is what another participant says.
    """

    LINE_LIMIT_BYTES = 16 << 20

    def __init__(self, participant: Position = "a") -> None:
        self._participant, self._text_mark = participant.encode(), f"{participant}0:".encode()
        self._rest = bytearray()
        # By kind of line: an emoji's first half, when its line ended there.
        self._halves: dict[str, str] = {}
        self._tool_arguments: dict[str, list[str]] = {}
        self.is_finished = False

    def feed(self, data: bytes) -> list[AnswerEvent]:
        """Take the next bytes. Raises StreamError when a line exceeds the limit."""
        end = data.rfind(b"\n")
        if end < 0:
            self._rest += data
            if len(self._rest) > self.LINE_LIMIT_BYTES:
                raise StreamError(f"a line of more than {self.LINE_LIMIT_BYTES >> 20} MiB")
            return []
        whole = bytes(self._rest) + data[:end] if self._rest else data[:end]
        self._rest = bytearray(data[end + 1 :])
        events: list[AnswerEvent] = []
        for line in whole.split(b"\n"):
            self._decode_line(line, events)
        return self._join_texts(events) if len(events) > 1 else events

    def feed_text(self, data: bytes) -> str | None:
        """Take whole lines of nothing but text, as most are; None, and nothing taken, for others."""
        if self._rest or self.is_finished or self._halves or data[-1:] != b"\n":
            return None
        texts = []
        for line in data[:-1].split(b"\n"):
            if line[:3] != self._text_mark:
                return None
            try:
                texts.append(_decode_text(line[3:]))
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
        return "".join(texts)

    def finish(self) -> list[AnswerEvent]:
        """Take the end of the body: a last line may lack its newline."""
        events: list[AnswerEvent] = []
        self._decode_line(bytes(self._rest), events)
        self._rest.clear()
        return events

    def _decode_line(self, line: bytes, events: list[AnswerEvent]) -> None:
        decode = self._KINDS.get(line[1:3])
        if decode is None or line[:1] != self._participant or self.is_finished:
            return
        events.extend(decode(self, line[3:].rstrip(b"\r")))

    def _join_texts(self, events: list[AnswerEvent]) -> list[AnswerEvent]:
        joined: list[AnswerEvent] = []
        texts: list[str] = []
        for event in [*events, None]:
            if isinstance(event, Text):
                texts.append(event.text)
                continue
            if texts:
                joined.append(Text("".join(texts)))
                texts.clear()
            if event:
                joined.append(event)
        return joined

    def _text(self, value: bytes) -> Iterable[AnswerEvent]:
        text = self._string(value, "text")
        return (Text(text),) if text else ()

    def _reasoning(self, value: bytes) -> Iterable[AnswerEvent]:
        text = self._string(value, "reasoning")
        return (Reasoning(text),) if text else ()

    def _string(self, value: bytes, kind: str) -> str:
        try:
            text: object = msgspec.json.decode(value)
            if kind not in self._halves:
                return text if isinstance(text, str) else ""
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # Lone surrogates, raw control characters, broken UTF-8: the standard library forgives them.
            text = _forgiving_json(value)
        if not isinstance(text, str):
            return ""
        # JavaScript cuts strings between UTF-16 units, so an emoji's halves may arrive in two lines.
        text = self._halves.pop(kind, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._halves[kind] = text[:-1], text[-1]
        return _whole_characters(text)

    def _failure(self, value: bytes) -> Iterable[AnswerEvent]:
        self.is_finished = True
        message = _forgiving_json(value)
        text = message if isinstance(message, str) else value.decode("utf-8", "replace")
        return (Failure(_whole_characters(text)),)

    def _media(self, value: bytes) -> Iterator[AnswerEvent]:
        entries = _forgiving_json(value)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                kind = entry.get("type")
                url = entry.get("image") or entry.get("url")
                if kind in ("image", "video") and isinstance(url, str):
                    yield Media(kind, _whole_characters(url))

    def _sources(self, value: bytes) -> Iterator[AnswerEvent]:
        """Arguments of a tool call arrive as pieces of JSON text; they are read as soon as they are whole."""
        entry = _forgiving_json(value)
        if not isinstance(entry, dict) or not isinstance(entry.get("argsTextDelta"), str):
            return
        pieces = self._tool_arguments.setdefault(str(entry.get("toolCallId")), [])
        pieces.append(entry["argsTextDelta"])
        if not pieces[-1].rstrip().endswith("}"):
            return  # Not the end yet: reading all of it for every piece would take quadratic time.
        text = _whole_characters("".join(pieces))
        arguments = _forgiving_json(text.encode())
        if arguments is None:
            return
        pieces.clear()
        sources = _object(arguments).get("source")
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                title = str(source.get("title") or source["url"])
                yield Source(_whole_characters(title), _whole_characters(source["url"]))

    def _finish(self, value: bytes) -> Iterable[AnswerEvent]:
        entry = _forgiving_json(value)
        if entry is None:
            return ()  # Cut off inside the line.
        self.is_finished = True
        entry = _object(entry)
        usage = _object(entry.get("usage"))
        counts = [usage.get(name) for name in ("promptTokens", "completionTokens")]
        prompt, completion = (
            count if type(count) is int and 0 <= count < 1 << 53 else None for count in counts
        )
        return (Finish(str(entry.get("finishReason") or "unknown"), prompt, completion),)

    # Down here, since it names what stands above.
    _KINDS: ClassVar[Mapping[bytes, Callable[[Any, bytes], Iterable[AnswerEvent]]]] = {
        b"0:": _text,
        b"g:": _reasoning,
        b"2:": _media,
        b"c:": _sources,
        b"3:": _failure,
        b"d:": _finish,
    }


# ==========================================================================================================
# OpenAI wire format
# ==========================================================================================================
#
# What clients send and read, typed: a message about invalid input names its path. Every body comes down to
# one AnswerRequest; the site's answer events go through one Answer, which cuts and forms them as the request
# and the settings want. No I/O.


class ImageUrl(msgspec.Struct):
    url: str


class InputFile(msgspec.Struct):
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    file: InputFile | None = None


class FunctionCall(msgspec.Struct):
    name: str = ""
    arguments: str = ""


class CustomCall(msgspec.Struct):
    name: str = ""
    input: str = ""


class ToolCall(msgspec.Struct):
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    @property
    def text(self) -> str:
        """The call as the site's models can read it."""
        if self.custom:
            return f"[called {self.custom.name}({self.custom.input})]"
        return f"[called {self.function.name}({self.function.arguments})]" if self.function else ""


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart | str] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
AnswerCount = Annotated[int, msgspec.Meta(ge=1, le=1000)]
TokenLimit = Annotated[int, msgspec.Meta(ge=1)]
StopString = Annotated[str, msgspec.Meta(max_length=1000)]


class ChatBody(msgspec.Struct):
    """The body of POST /v1/chat/completions, as far as it has an effect. Unknown parameters are ignored."""

    model: ModelName
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=10_000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: AnswerCount | None = None
    stop: StopString | Annotated[list[StopString], msgspec.Meta(max_length=64)] | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None


class ImageBody(msgspec.Struct):
    """The body of POST /v1/images/generations and, but for its files, of POST /v1/images/edits."""

    model: ModelName
    prompt: Annotated[str, msgspec.Meta(min_length=1)]
    n: AnswerCount | None = None
    response_format: Literal["url", "b64_json"] | None = None


def _leaves_a_choice(value: object) -> bool:
    """Whether a `tool_choice` leaves it to the model to call nothing."""
    allowed = _object(_object(value).get("allowed_tools"))
    return value in ("auto", "none") or allowed.get("mode") == "auto"


# Parameters that would change the result and cannot be honoured: the values that ask for nothing special, and
# what is said of others.
REFUSED_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tool_choice": (_leaves_a_choice, "the site calls no tools: only 'auto' and 'none' can be taken"),
    "function_call": (_leaves_a_choice, "the site calls no functions: only 'auto' and 'none' can be taken"),
    "response_format": (
        lambda value: _object(value).get("type") == "text",
        "the site has no structured output: only {'type': 'text'} can be taken",
    ),
    "logprobs": (lambda value: value is False, "the site tells no probabilities: only false can be taken"),
    "top_logprobs": (lambda value: value == 0, "the site tells no probabilities: only 0 can be taken"),
    "audio": (lambda value: False, "the site makes no sound"),
    "modalities": (
        lambda value: isinstance(value, list) and "audio" not in value,
        "the site makes no sound: only text and images can be taken",
    ),
}
REFUSED_IMAGE_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stream": (lambda value: value is False, "pictures come whole: only false can be taken"),
    "mask": (lambda value: False, "the site takes no mask: say in the prompt what is to be changed"),
}
# Parameters of OpenAI's API that are accepted without effect: the site offers no such control.
IGNORED_PARAMETERS = frozenset(
    "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty logit_bias "
    "tools tool_choice functions function_call parallel_tool_calls reasoning_effort verbosity service_tier "
    "prediction web_search_options metadata store user safety_identifier prompt_cache_key "
    "prompt_cache_retention".split()
)
IGNORED_IMAGE_PARAMETERS = frozenset(
    "size quality style background moderation output_format output_compression partial_images input_fidelity "
    "user".split()
)


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a request comes down to: messages for a model, and the form its answers are wanted in.

    `paths` says for each message where it stands in the request. `image_format` is None for chat.
    """

    model: str
    messages: list[Message]
    paths: list[str]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    image_format: Literal["url", "b64_json"] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, object]:
        """What was asked for beside model and messages, as the client may say it again."""
        names = ("stream", "stop", "max_tokens", "max_completion_tokens")
        given = {"n": self.n if self.n > 1 else None, **{name: getattr(self, name) for name in names}}
        given["stream_options"] = {"include_usage": True} if self.include_usage else None
        given["response_format"] = self.image_format
        return {name: value for name, value in given.items() if value not in (None, False, ())}

    @property
    def images(self) -> dict[str, int]:
        """How many images each message has, by its path."""
        counts = [len(message.attachments) for message in self.messages]
        return dict(zip(self.paths, counts, strict=False))


_Body = TypeVar("_Body", ChatBody, ImageBody)


def _invalid(error: msgspec.ValidationError) -> ClientError:
    # The path comes last; before it there may be anything that the client sent.
    text, at, where = str(error).rpartition(" - at `$")
    text, where = (text, where) if at else (where, "")
    path = where.rstrip("`").lstrip(".")
    if missing := re.search(r"missing required field `(.+)`", text):
        path = f"{path}.{missing[1]}".lstrip(".")
    return ClientError(f"Invalid body at {path or 'its top'}: {text}.", param=path or None)


def _refuse(refused: Mapping[str, tuple[Callable[[Any], bool], str]], values: Mapping[str, object]) -> None:
    """Raises ClientError for a parameter that would change the result and cannot be honoured."""
    for name, (is_harmless, sentence) in refused.items():
        if name in values and not is_harmless(values[name]):
            raise ClientError(f"{name}: {sentence}.", param=name)


# Half a surrogate pair, as JSON escapes it.
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _without_halves(body: bytes) -> bytes:
    """JSON whose halves of pairs, left where a client cut a string by UTF-16 units, have become U+FFFD."""
    if b"\0" in body:
        return body  # No JSON.
    # An escaped backslash escapes nothing.
    return _HALF.sub(rb"\\ufffd", body.replace(rb"\\", b"\0\0")).replace(b"\0\0", rb"\\")


def _decode_body(
    body: bytes, form: type[_Body], refused: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> tuple[_Body, set[str]]:
    """Read a JSON body; also the names of its parameters, but for those that are null. Raises ClientError."""
    try:
        decoded = msgspec.json.decode(body, type=form)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if (whole := _without_halves(body)) != body:
            return _decode_body(whole, form, refused)
        raise ClientError(f"The body is not JSON: {error}") from None
    given = {name for name, raw in fields.items() if memoryview(raw) != b"null"}  # No copy: it may be large.
    _refuse(refused, {name: _forgiving_json(bytes(fields[name])) for name in refused.keys() & given})
    return decoded, given


_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.=+-]+)*;base64,(.+)", re.DOTALL)
# Code in a fence or in a line, which is to be passed over; or an image as a data: URL, in markdown's ![](...)
# or alone on its line. Nothing is looked at more than a few times, however long a text is.
_CODE_OR_IMAGE = re.compile(
    r"(?P<fence>(?m:^)[ \t>]{0,12}(?P<mark>`{3,}(?=[^`\n]*(?:\n|\Z))|~{3,}).*?"
    r"(?:\n[ \t>]{0,12}(?P=mark)[`~]*[ \t]*(?=\n|\Z)|\Z))"
    r"|(?<!`)(?P<ticks>`{1,16}+)(?!`)(?:[^`\n]++|(?!(?P=ticks)(?!`))`++)*+(?P=ticks)"
    r"|(?:(?P<open>!\[(?:[^]\n!]|!(?!\[)){0,500}\]\([ \n]{0,9}<?)|(?m:^) {0,3})"
    r"(?P<url>data:image/[\w.+-]+(?:;[\w.=+-]{1,80}){0,5};base64,[A-Za-z0-9+/]++={0,2}+)"
    r"""(?(open)>?(?:[ \n](?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))?[ \n]{0,9}\)|(?=[ \t\r]*(?:\n|\Z)))""",
    re.DOTALL,
)
# More than any model takes; what a request may make the program fetch, at most.
MAX_IMAGES = 64
_ROLES: dict[str, Any] = {"developer": "system", "system": "system", "assistant": "assistant"}
# By the first bytes of a file: what the site or a client may be sent.
_MEDIA_TYPES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "image/avif"),
    (re.compile(rb".{4}ftyp", re.DOTALL), "video/mp4"),
    (re.compile(rb"\x1aE\xdf\xa3"), "video/webm"),
)


def media_type(data: bytes) -> str | None:
    """The type of an image or video, by its first bytes; None for anything else."""
    return next((name for pattern, name in _MEDIA_TYPES if pattern.match(data)), None)


def attach(content_type: str, data: bytes | str) -> Attachment:
    """An image as the site takes it; `data` is its bytes, or these in base64."""
    encoded = data if isinstance(data, str) else base64.b64encode(data).decode()
    ending = content_type.removeprefix("image/").split("+")[0]
    url = f"data:{content_type};base64,{encoded}"
    return Attachment(f"image-{uuid.uuid4().hex[:8]}.{ending}", content_type, url)


def _read_image(url: str, path: str) -> Attachment:
    url = url.strip()
    if url[:8].lower().startswith(("http://", "https://")):
        return Attachment("", "", url)
    expected = f"{path}: expected an image, as an http(s) address or a base64 data: URL."
    match = _DATA_URL.fullmatch(url)
    if not match:
        raise ClientError(expected, param=path)
    try:
        data = base64.b64decode(match[2], validate=True)
    except ValueError:
        raise ClientError(f"{path}: the data: URL holds no valid base64.", param=path) from None
    kind = media_type(data) or match[1] or ""  # Clients name a type that it is not, or none.
    if not kind.startswith("image/"):
        raise ClientError(expected, param=path)
    return attach(kind, match[2])


def _read_file(file: InputFile, path: str) -> Attachment:
    if not file.file_data:
        raise ClientError(f"{path}: expected file_data; there are no uploaded files here.", param=path)
    if file.file_data.startswith("data:image/"):
        return _read_image(file.file_data, f"{path}.file_data")
    try:
        data = base64.b64decode(file.file_data.rpartition(",")[2], validate=True)
    except ValueError:
        raise ClientError(f"{path}.file_data: no valid base64.", param=f"{path}.file_data") from None
    kind = media_type(data) or ""
    if not kind.startswith("image/"):
        name = f" {file.filename!r}" if file.filename else ""
        raise ClientError(f"{path}: the site takes images only, and the file{name} is none.", param=path)
    return attach(kind, data)


def _read_part(part: ContentPart | str, path: str) -> str | Attachment:
    if isinstance(part, str):
        return part
    kind = part.type
    if kind not in ("text", "refusal", "image_url", "file"):
        raise ClientError(f"{path}: a part of type {kind!r} is not supported.", param=path)
    content: str | ImageUrl | InputFile | None = getattr(part, kind)
    if content is None:
        raise ClientError(f"{path}: a part of type {kind!r} needs its {kind}.", param=path)
    if isinstance(content, InputFile):
        return _read_file(content, f"{path}.file")
    text = content.url if isinstance(content, ImageUrl) else content
    return _read_image(text, f"{path}.image_url") if kind == "image_url" else text


def _take_images_out(text: str, attachments: list[Attachment]) -> str:
    """Move the images that stand in a text as data: URLs, outside code, to the attachments.

    Clients that keep a conversation as text have its images there. What names one in passing stays as it is.
    """
    if "data:image/" not in text:
        return text
    before = len(attachments)

    def take_out(match: re.Match[str]) -> str:
        if match["url"] is not None and len(attachments) <= MAX_IMAGES:
            with suppress(ValueError):  # Somebody's example of one.
                encoded = match["url"].partition(",")[2]
                kind = media_type(base64.b64decode(encoded, validate=True)) or ""
                if kind.startswith("image/"):
                    attachments.append(attach(kind, encoded))
                    return ""
        return match[0]

    rest = _CODE_OR_IMAGE.sub(take_out, text)
    return rest.strip() if len(attachments) > before else text


def _read_message(message: ChatMessage, path: str, takes_image: bool) -> Message:
    """One message in the site's terms. Raises ClientError for content that cannot be carried over."""
    has_images_in_text = takes_image and message.role in ("user", "assistant")
    role = _ROLES.get(message.role, "user")
    texts: list[str] = []
    attachments: list[Attachment] = []
    parts = [message.content] if isinstance(message.content, str) else message.content or ()
    for place, part in enumerate(parts):
        if len(attachments) > MAX_IMAGES:
            break
        read = _read_part(part, f"{path}[{place}]")
        if isinstance(read, Attachment):
            attachments.append(read)
        else:
            texts.append(_take_images_out(read, attachments) if has_images_in_text else read)
    calls = [ToolCall(message.function_call), *(message.tool_calls or ())]
    texts += [call.text for call in calls]
    return Message(role, "\n\n".join(filter(None, texts)), tuple(attachments))


def _read_messages(messages: Sequence[ChatMessage], takes_image: bool) -> tuple[list[Message], list[str]]:
    """A conversation in the site's terms, and each message's path."""
    paths = [f"messages[{index}].content" for index in range(len(messages))]
    read, images = [], 0
    for message, path in zip(messages, paths, strict=True):
        read.append(_read_message(message, path, takes_image))
        images += len(read[-1].attachments)
        if images > MAX_IMAGES:
            raise ClientError(f"{path}: a request takes up to {MAX_IMAGES} images.", param=path)
    if read[-1].role != "user":
        # The site answers a user's message; after any other an empty one follows.
        read.append(Message("user", ""))
        paths.append("messages")
    return read, paths


def read_chat(body: bytes, takes_image: Callable[[str], bool] = lambda name: True) -> AnswerRequest:
    """Read the body of POST /v1/chat/completions. Raises ClientError naming the path.

    `takes_image` says it of a model's name: for one that does not, images in a text stay the text they are.
    """
    chat, given = _decode_body(body, ChatBody, REFUSED_PARAMETERS)
    messages, paths = _read_messages(chat.messages, takes_image(chat.model))
    stops = [chat.stop] if isinstance(chat.stop, str) else chat.stop or ()
    return AnswerRequest(
        model=chat.model,
        messages=messages,
        paths=paths,
        n=chat.n or 1,
        stream=chat.stream is True,
        include_usage=chat.stream_options is not None and chat.stream_options.include_usage is True,
        stop=tuple(filter(None, stops)),
        max_tokens=chat.max_tokens,
        max_completion_tokens=chat.max_completion_tokens,
        ignored=tuple(sorted(IGNORED_PARAMETERS & given)),
    )


def merge_system(asked: AnswerRequest) -> AnswerRequest:
    """The same request with one system message, at the front, in place of those that it has.

    Front ends that play characters scatter theirs over the conversation; the texts keep their order.
    """
    pairs = [*zip(asked.messages, asked.paths, strict=True)]
    system = [(message, path) for message, path in pairs if message.role == "system"]
    if not system:
        return asked
    text = "\n\n".join(message.content for message, _ in system if message.content)
    attachments = tuple(each for message, _ in system for each in message.attachments)
    # What is wrong with an image is told of the first message that has one.
    path = next((path for message, path in system if message.attachments), system[0][1])
    rest = [(message, path) for message, path in pairs if message.role != "system"]
    if rest[-1][1] == "messages" and len(rest) > 1 and rest[-2][0].role == "user":
        del rest[-1]  # It followed the system's last message: now the user's own is the last.
    merged = [(Message("system", text, attachments), path), *rest]
    messages, paths = [message for message, _ in merged], [path for _, path in merged]
    return msgspec.structs.replace(asked, messages=messages, paths=paths)


def _ask_for_images(wanted: ImageBody, given: Set[str], message: Message, path: str) -> AnswerRequest:
    # OpenAI's own models of these names know no `response_format`: their clients count on base64.
    default: Any = "b64_json" if wanted.model.startswith(("gpt-image", "chatgpt-image")) else "url"
    return AnswerRequest(
        model=wanted.model,
        messages=[message],
        paths=[path],
        n=wanted.n or 1,
        image_format=wanted.response_format or default,
        ignored=tuple(sorted(IGNORED_IMAGE_PARAMETERS & given)),
    )


def read_image_generation(body: bytes) -> AnswerRequest:
    """Read the body of POST /v1/images/generations. Raises ClientError naming the path."""
    wanted, given = _decode_body(body, ImageBody, REFUSED_IMAGE_PARAMETERS)
    return _ask_for_images(wanted, given, Message("user", wanted.prompt), "prompt")


def read_image_edit(body: bytes, content_type: str) -> AnswerRequest:
    """Read the multipart body of POST /v1/images/edits. Raises ClientError naming the field."""
    from werkzeug.exceptions import HTTPException
    from werkzeug.formparser import FormDataParser
    from werkzeug.http import parse_options_header

    mimetype, options = parse_options_header(content_type)
    if mimetype.lower() != "multipart/form-data":
        raise ClientError(f"Expected a body of multipart/form-data, but got {mimetype or 'no type'}.")
    bounds: dict[str, Any] = {"max_form_memory_size": None, "max_form_parts": 1000}
    parser = FormDataParser(lambda *_, **__: io.BytesIO(), silent=False, **bounds)
    try:
        _, form, files = parser.parse(io.BytesIO(body), "multipart/form-data", len(body), options)
    except (ValueError, HTTPException) as error:
        raise ClientError(f"The body is not multipart/form-data: {error}") from None
    if not all([*form, *files]):
        raise ClientError("The body is not multipart/form-data: one of its parts has no name.")
    texts = {name: text for name, text in form.to_dict().items() if text}  # Forms send what was left empty.
    spoken: dict[str, object] = {"true": True, "false": False}
    said = {name: spoken.get(text.lower(), text) for name, text in texts.items()}
    _refuse(REFUSED_IMAGE_PARAMETERS, {**said, **files})
    try:
        wanted = msgspec.convert(texts, ImageBody, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    pictures = [file.read() for name in ("image", "image[]") for file in files.getlist(name)]
    kinds = [media_type(picture) or "" for picture in pictures]
    if not pictures or not all(kind.startswith("image/") for kind in kinds):
        found = "one that is none" if pictures else "none"
        raise ClientError(f"image: expected one or more image files, but got {found}.", param="image")
    attachments = [attach(kind, picture) for kind, picture in zip(kinds, pictures, strict=True)]
    return _ask_for_images(wanted, texts.keys(), Message("user", wanted.prompt, tuple(attachments)), "image")


def is_too_large(attachment: Attachment, limit_mb: int) -> bool:
    """Whether an image, as a data: URL, is larger than the site takes inside a message."""
    return attachment.size_bytes > limit_mb << 20


def refuse_size(attachment: Attachment, limit_mb: int, path: str, why: str) -> ClientError:
    """What a client is told of an image that is too large; `why` says what else was not possible."""
    size = f"the image has {attachment.size_bytes:,} bytes; the site takes up to {limit_mb} MiB in a message"
    return ClientError(f"{path}: {size}, and {why}.", status=413, code="request_too_large", param=path)


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


_WIDE_CHARACTER = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


class TokenEstimate:
    """Tokens of a text that comes in pieces: one for each CJK character, one for each four others."""

    def __init__(self) -> None:
        self._wide = self._narrow = 0

    def _sizes(self, text: str) -> tuple[int, int]:
        wide = 0 if text.isascii() else len(_WIDE_CHARACTER.findall(text))
        return self._wide + wide, self._narrow + len(text) - wide

    def add(self, text: str) -> int:
        """Returns the tokens of all text so far."""
        self._wide, self._narrow = self._sizes(text)
        return self._wide + (self._narrow + 3) // 4

    def fitting(self, text: str, limit: int) -> str:
        """The beginning of a piece with which the text keeps within so many tokens."""

        def tokens(end: int) -> int:
            wide, narrow = self._sizes(text[:end])
            return wide + (narrow + 3) // 4

        if tokens(len(text)) <= limit:
            return text
        return text[: bisect.bisect_right(range(len(text)), limit, key=tokens) - 1]


def estimate_tokens(text: str) -> int:
    """An estimate for when the site sends no usage."""
    return TokenEstimate().add(text)


class StopScanner:
    """Finds stop strings in a text that comes in pieces, and holds back what may be the beginning of one.

    The stop string that is whole first counts, wherever the pieces end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """The next piece of text in; out, what comes before a stop string for certain."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)[1]]
        end = min(self._beginning(text, stop) for stop in self._stops)
        self._held = text[end:]
        return text[:end]

    def _beginning(self, text: str, stop: str) -> int:
        """Where a stop string may have begun that is not whole yet; the text's end if none has."""
        at = max(0, len(text) - len(stop) + 1)
        while (at := text.find(stop[0], at)) >= 0:
            if stop.startswith(text[at:]):
                return at
            at += 1
        return len(text)

    def finish(self) -> str:
        """What was held back when no more text comes."""
        held, self._held = self._held, ""
        return held


def media_markdown(media: Media) -> str:
    """An image or video as text that chat clients show."""
    return f"![image]({media.url})" if media.kind == "image" else f"[video]({media.url})"


def _sources_markdown(sources: Sequence[Source]) -> str:
    """Sources as a list, each address once; neither title nor address can break out of its link."""
    titles = {source.url: " ".join(source.title.split()) or source.url for source in sources}
    links = {quote(url, safe=string.punctuation.translate({60: None, 62: None})): url for url in titles}
    escaped = {link: re.sub(r"([][\\])", r"\\\1", titles[url]) for link, url in links.items()}
    return "\n".join(f"- [{title}](<{link}>)" for link, title in escaped.items())


def count_usage(finish: Finish, messages: Sequence[Message], answer: str) -> Usage:
    """The site's own counts where it sent them, else the estimate."""
    prompt = finish.prompt_tokens
    if prompt is None:
        prompt = sum(estimate_tokens(message.content) for message in messages)
    completion = finish.completion_tokens
    if completion is None:
        completion = estimate_tokens(answer)
    return Usage(prompt, completion, prompt + completion)


def finish_reason(finish: Finish) -> str:
    """OpenAI's word for the site's: `stop`, `length` or `content_filter`."""
    return {"length": "length", "content-filter": "content_filter"}.get(finish.reason, "stop")


class GrowingText:
    """A text that comes in pieces. They are joined by and by: each alone takes more than its characters."""

    LOOSE_PIECES = 16

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._pieces: list[str] = []

    def __str__(self) -> str:
        return "".join(self._blocks + self._pieces)

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + sum(map(len, self._pieces))

    def __bool__(self) -> bool:
        return bool(self._pieces or self._blocks)

    def append(self, piece: str) -> None:
        """Add a piece, which is not empty."""
        self._pieces.append(piece)
        if len(self._pieces) >= self.LOOSE_PIECES:
            self._blocks.append("".join(self._pieces))
            self._pieces.clear()

    def last(self, characters: int) -> str:
        """The last characters, so many at most."""
        parts: list[str] = []
        for part in reversed(self._blocks + self._pieces):
            if characters <= 0:
                break
            parts.append(part[-characters:])
            characters -= len(part)
        return "".join(reversed(parts))


class Answer:
    """One answer to a request: the site's events in; out, what of them the client is to see, and how.

    Text is cut at stop strings and token limits. Reasoning goes into the text where that is set, images and
    videos always do. What the client has seen is kept, for the whole reply, the usage and the log.
    """

    def __init__(self, asked: AnswerRequest, settings: RequestsConfig) -> None:
        self._asked, self._settings = asked, settings
        self.clear()

    def clear(self) -> None:
        """Begin anew, for another attempt."""
        asked = self._asked
        self.texts, self.reasonings = GrowingText(), GrowingText()
        self.sources: list[Source] = []
        self.media: list[Media] = []
        # Why the answer needs no more events, once it does not; and how it ended, once it has.
        self.cut: Literal["stop", "length"] | None = None
        self.finish_reason = "stop"
        self.usage: Usage | None = None
        self._stops = StopScanner(asked.stop) if asked.stop else None
        # Reasoning counts against the limit of the whole completion only.
        self._limits_of_all = self._limits(asked.max_completion_tokens)
        self._limits_of_text = [*self._limits_of_all, *self._limits(asked.max_tokens)]
        self._thinks_in_text = self._settings.reasoning == "think"
        self._is_thinking = self._is_below_media = False
        self._shown: list[AnswerEvent] = []
        self._is_plain = not (asked.stop or self._limits_of_text or self._thinks_in_text)

    @property
    def text(self) -> str:
        return str(self.texts)

    @property
    def reasoning(self) -> str:
        return str(self.reasonings)

    @property
    def is_plain(self) -> bool:
        """Whether text is shown as it is: nothing is looked for in it, and nothing stands above it."""
        return self._is_plain and not self.media

    def take(self, events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        """The next events in; out, text, reasoning and sources to show. Nothing more once there was a cut."""
        for event in events:
            if self.cut:
                break
            if isinstance(event, Text) and self.is_plain:
                self.texts.append(event.text)
                self._shown.append(event)
            elif isinstance(event, Text):
                self._show_text(self._stops.feed(event.text) if self._stops else event.text)
                if self._stops and self._stops.is_found:
                    self.cut = self.cut or "stop"
            elif isinstance(event, Reasoning):
                self._show_reasoning(event.text)
            elif isinstance(event, Media):
                self._let_go()
                self._show_media(event)
            elif isinstance(event, Source):
                self.sources.append(event)
                self._shown.append(event)
        return self._take_shown()

    def end(self, finish: Finish | None) -> list[AnswerEvent]:
        """The answer's end in, None where it was cut; out, what was held back and what comes last.

        Sets `finish_reason` and `usage`.
        """
        self._let_go()
        self._close_thoughts()
        if self._settings.list_sources and self.sources:
            self._put(self._gap() + _sources_markdown(self.sources))
        if self.cut or finish is None:
            finish = Finish(self.cut or "stop")  # The site's counts, if any, are of what was not shown, too.
        self.finish_reason = finish_reason(finish)
        self.usage = count_usage(finish, self._asked.messages, self.reasoning + self.text)
        return self._take_shown()

    def _take_shown(self) -> list[AnswerEvent]:
        shown, self._shown = self._shown, []
        return shown

    def _put(self, text: str) -> None:
        self.texts.append(text)
        self._shown.append(Text(text))

    def _gap(self) -> str:
        """What sets off a new paragraph."""
        return "\n\n" if self.texts and self.texts.last(2) != "\n\n" else ""

    def _limits(self, tokens: int | None) -> list[tuple[TokenEstimate, int]]:
        return [(TokenEstimate(), tokens)] if tokens else []

    def _fit(self, text: str, limits: Sequence[tuple[TokenEstimate, int]]) -> str:
        """A piece as far as the limits allow; what they do not allow is the cut, and nothing follows that."""
        if self.cut:
            return ""
        for estimate, limit in limits:
            fitting = estimate.fitting(text, limit)
            if len(fitting) < len(text):
                self.cut, text = "length", fitting
        for estimate, _ in limits:
            estimate.add(text)
        return text

    def _show_text(self, text: str) -> None:
        if text := self._fit(text, self._limits_of_text):
            self._close_thoughts()
            self._put(self._gap() + text if self._is_below_media else text)
            self._is_below_media = False

    def _show_reasoning(self, text: str) -> None:
        if self._thinks_in_text:
            self._let_go()
        text = self._fit(text, self._limits_of_all)
        if text and self._thinks_in_text:
            self._put(text if self._is_thinking else f"{self._gap()}<think>\n{text}")
            self._is_thinking = True
        elif text:
            self.reasonings.append(text)
            self._shown.append(Reasoning(text))

    def _show_media(self, media: Media) -> None:
        if not self.cut:
            self._close_thoughts()
            self.media.append(media)
            self._put(self._gap() + media_markdown(media))
            self._is_below_media = True

    def _close_thoughts(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self._put("\n</think>\n\n")

    def _let_go(self) -> None:
        """Show what was held back: no stop string comes of it any more."""
        if self._stops:
            self._show_text(self._stops.finish())


def sum_usage(answers: Sequence[Answer]) -> Usage:
    """The usage of all answers to one request, whose prompt counts once."""
    usages = [answer.usage for answer in answers if answer.usage]
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    completion = sum(usage.completion_tokens for usage in usages)
    return Usage(prompt, completion, prompt + completion)


REASONING_FIELDS: dict[str, tuple[str, ...]] = {
    "reasoning_content": ("reasoning_content",),
    "reasoning": ("reasoning",),
    "both": ("reasoning_content", "reasoning"),
    "think": (),
}


# One SSE line stays under 128 KiB (older aiohttp breaks on longer ones); a character takes up to 6 bytes in
# JSON.
LINE_TEXT_LIMIT = 16_384


class UrlCitation(msgspec.Struct, frozen=True):
    """The site does not say which words of the answer a source belongs to."""

    title: str
    url: str
    start_index: int = 0
    end_index: int = 0


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "url_citation"
    url_citation: UrlCitation


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: list[Annotation] | None = None


class AnswerMessage(msgspec.Struct):
    role: str
    content: str
    refusal: str | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    annotations: list[Annotation] | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Picture(msgspec.Struct, omit_defaults=True):
    url: str | None = None
    b64_json: str | None = None


class Pictures(msgspec.Struct):
    created: int
    data: list[Picture]


class ModelCard(msgspec.Struct, kw_only=True):
    """An entry of /v1/models: OpenAI's fields, then what the model takes and gives, and how ready it is."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    modality: Modality
    input_capabilities: tuple[str, ...]
    output_capabilities: tuple[str, ...]
    takes_many_images: bool
    requires_image: bool
    sessions_ready: int


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


encode_json = msgspec.json.Encoder().encode


def cite(source: Source) -> Annotation:
    # Nobody's title or address is so long; a broken one must not break the stream.
    half = LINE_TEXT_LIMIT // 2
    return Annotation(url_citation=UrlCitation(source.title[:half], source.url[:half]))


class ChunkEncoder:
    """What an answer shows in, the bytes of `chat.completion.chunk` SSE events out.

    What never changes is built once.
    """

    def __init__(
        self, answer_id: str, model: str, created: int, index: int = 0, reasoning: str = "reasoning_content"
    ) -> None:
        head = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._reasoning_fields = REASONING_FIELDS[reasoning]
        self._head = b"data: " + encode_json(head)[:-1]
        self._before = self._head + b',"choices":[{"index":%d,"delta":' % index
        self._content = self._before + b'{"content":'
        self._after = b',"finish_reason":null}]}\n\n'

    def event(self, event: AnswerEvent) -> bytes:
        if isinstance(event, Text):
            return self.text(event.text)
        if isinstance(event, Reasoning):
            return self._in_pieces(self._reasoning_fields, event.text)
        if isinstance(event, Source):
            return self.delta(Delta(annotations=[cite(event)]))
        raise TypeError(f"{event!r} is not shown as it is")

    def delta(self, delta: Delta) -> bytes:
        return self._before + encode_json(delta) + self._after

    def text(self, text: str) -> bytes:
        if len(text) <= LINE_TEXT_LIMIT:
            return self._content + encode_json(text) + b"}" + self._after
        return self._in_pieces(("content",), text)

    def _in_pieces(self, fields: Sequence[str], text: str) -> bytes:
        limit = LINE_TEXT_LIMIT // max(1, len(fields))
        pieces = [text[start : start + limit] for start in range(0, len(text), limit)]
        deltas = [msgspec.convert(dict.fromkeys(fields, piece), Delta) for piece in pieces]
        return b"".join([self.delta(delta) for delta in deltas])

    def finish(self, reason: str) -> bytes:
        return self._before + b'{},"finish_reason":' + encode_json(reason) + b"}]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return self._head + b',"choices":[],"usage":' + encode_json(usage) + b"}\n\n"


SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT = b": keep-alive\n\n"


def encode_completion(
    answer_id: str, model: str, created: int, answers: Sequence[Answer], reasoning: str
) -> bytes:
    """The body of a whole reply: one `chat.completion` object."""
    choices = []
    for index, answer in enumerate(answers):
        message = AnswerMessage("assistant", answer.text)
        for field in REASONING_FIELDS[reasoning] if answer.reasonings else ():
            setattr(message, field, answer.reasoning)
        if answer.sources:
            message.annotations = [cite(source) for source in answer.sources]
        choices.append(CompletionChoice(index=index, message=message, finish_reason=answer.finish_reason))
    fields: dict[str, Any] = {"id": answer_id, "created": created, "model": model, "choices": choices}
    return encode_json(Completion(**fields, usage=sum_usage(answers)))


def encode_error(error: ApiError, request_id: str) -> bytes:
    """OpenAI's error object.

    The request id stands in the message too: errors inside a stream have no headers.
    """
    message = f"{error.message} (request id {request_id})"
    return encode_json(ErrorBody(ErrorDetail(message, error.type, error.param, error.error_code)))


# ==========================================================================================================
# Bridge protocol
# ==========================================================================================================
#
# Wire protocol, version 1. Text frames are JSON objects with a `type`; binary frames carry response bytes.
#
#     from the browser     hello, state, models, captured, response, (binary), end, uploaded, error, pong
#     from the program     welcome, fetch, upload, abort, ping, send_models, reload

PROTOCOL = 1
PageState = Literal["loading", "verification", "sign_in", "ready"]
PAGE_STATES: tuple[PageState, ...] = get_args(PageState)


class Frame(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """A text frame; its class name in lower case is its `type`."""


class Hello(Frame, frozen=True):
    protocol: int
    # Another protocol may have other states: it is checked after the number.
    state: str
    script: str = ""
    url: str = ""
    account: str | None = None
    # What its script can do beside what every script can: commands that an older one would not answer.
    features: list[str] = []


class State(Frame, frozen=True):
    state: PageState
    account: str | None = None
    detail: str = ""


class Models(Frame, frozen=True):
    models: list[Any]


class Captured(Frame, frozen=True):
    session_id: str
    message_id: str
    model_id: str | None = None
    mode: str | None = None
    account: str | None = None
    # The side that the message stands on, where there are two.
    position: Position = "a"


class Head(Frame, frozen=True, tag="response"):
    id: int
    status: int
    headers: dict[str, str] = {}


class End(Frame, frozen=True):
    id: int


class Uploaded(Frame, frozen=True):
    id: int
    url: str


class Broken(Frame, frozen=True, tag="error"):
    id: int
    reason: Literal["network", "aborted", "refused", "not_offered"]
    message: str = ""


class Pong(Frame, frozen=True):
    t: float | int | str | None = None


BrowserFrame = Hello | State | Models | Captured | Head | End | Uploaded | Broken | Pong


class Welcome(Frame, frozen=True):
    protocol: int
    version: str
    auth_cookie: str
    # How often a ping comes: the tab gives up a connection that has long been without one.
    heartbeat_seconds: float = 0


class Fetch(Frame, frozen=True):
    id: int
    method: Literal["POST", "PUT"]
    path: str
    body: str


class Upload(Frame, frozen=True):
    id: int
    name: str
    content_type: str
    # The bytes, in base64.
    data: str


class Abort(Frame, frozen=True):
    id: int


class Ping(Frame, frozen=True):
    t: float


class SendModels(Frame, frozen=True, tag="send_models"):
    pass


class Reload(Frame, frozen=True):
    reason: str


class ProtocolError(Exception):
    """A frame that breaks the protocol: its connection is closed with this WebSocket close code."""

    def __init__(self, message: str, close_code: int = 1003) -> None:
        super().__init__(message)
        self.close_code = close_code


_browser_frames: msgspec.json.Decoder[BrowserFrame] = msgspec.json.Decoder(BrowserFrame)
_frame_types = {str(kind.__struct_config__.tag) for kind in BrowserFrame.__args__}


def decode_frame(text: str) -> BrowserFrame | None:
    """Read a text frame; None for an unknown `type`, which is to be ignored. Raises ProtocolError."""
    try:
        return _browser_frames.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        entry = _forgiving_json(text.encode("utf-8", "replace"))
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("type"), str)
            and entry["type"] not in _frame_types
        ):
            return None
        raise ProtocolError(f"malformed frame: {error}", 1007 if entry is None else 1003) from None


_RECORD_HEAD = struct.Struct(">II")


def split_records(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Read a binary frame: records of uint32 id, uint32 length (both big-endian), bytes.

    Raises ProtocolError.
    """
    at, size = 0, len(frame)
    while at < size:
        if size - at < _RECORD_HEAD.size:
            raise ProtocolError(f"malformed record: {size - at} bytes where a head has {_RECORD_HEAD.size}")
        exchange_id, length = _RECORD_HEAD.unpack_from(frame, at)
        start = at + _RECORD_HEAD.size
        at = start + length
        if at > size:
            raise ProtocolError(f"malformed record: {length} bytes announced, {size - start} there")
        yield exchange_id, frame[start:at]


# ==========================================================================================================
# Events and logs
# ==========================================================================================================
#
# What lower sections tell upper ones goes through one bus: the pool never knows the console. Every event is
# also one line of the log, so that one session or request can be followed through the whole file by its id.

log = logging.getLogger("lmarena_proxy")
SessionSource = Literal["bootstrap", "on_demand", "captured"]


class Event(msgspec.Struct, frozen=True):
    """Something that happened. `line` is what people read, made of the fields; the fields are the log's."""

    level: ClassVar[int] = logging.INFO
    line: ClassVar[str] = ""
    # Whether the console shows it, too: what a busy day brings by the hundred is for the log alone.
    is_for_people: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return self.line.format_map(msgspec.structs.asdict(self)).rstrip(": ")


class BridgeConnected(Event, frozen=True):
    line = "Tab {bridge} connected: {url} (script {script})"
    bridge: int
    script: str
    url: str


class BridgeChanged(Event, frozen=True):
    line = "Tab {bridge} is {state}: {advice}"
    bridge: int
    state: str
    account: str | None
    advice: str


class ScriptOutdated(Event, frozen=True):
    level = logging.WARNING
    line = (
        "Tab {bridge} has the userscript {script}, but this is {version}: open /bridge.user.js to update it"
    )
    bridge: int
    script: str
    version: str


class BridgeLost(Event, frozen=True):
    level = logging.WARNING
    line = "Tab {bridge} disconnected: {reason}"
    bridge: int
    reason: str


class BridgeRefused(Event, frozen=True):
    level = logging.WARNING
    line = "Refused a connection at the bridge's port: {reason}"
    reason: str


class ModelsListed(Event, frozen=True):
    line = "The page lists {count} models, {changed} of them new or changed"
    count: int
    changed: int


class RateLimited(Event, frozen=True):
    level = logging.WARNING
    line = "The site limits this account (429): everyone waits {seconds:.0f} s"
    account: str
    seconds: float


class SessionOpened(Event, frozen=True):
    line = "{model}: session {session_id} message {message_id} ({source})"
    model: str
    model_id: str
    session_id: str
    message_id: str
    account: str
    source: SessionSource


class SessionRetired(Event, frozen=True):
    level = logging.WARNING
    line = "{model}: session {session_id} retired: {reason}"
    model: str
    session_id: str
    reason: str


class ModelSkipped(Event, frozen=True):
    """Bootstrap gives a model up.

    `error` has the traceback; status and reply are the site's, where it had one.
    """

    level = logging.ERROR
    line = "{model} is skipped: {reason}"
    model: str
    model_id: str
    reason: str
    arena_status: int
    reply: str
    error: Exception

    def describe(self) -> dict[str, object]:
        """The same for a dashboard: the error as text."""
        story = "".join(traceback.format_exception(self.error))
        return {**msgspec.structs.asdict(self), "error": None, "traceback": story}


class PhaseChanged(Event, frozen=True):
    line = "Bootstrap {phase}: {detail}"
    phase: str
    detail: str


class AttemptStarted(Event, frozen=True):
    level = logging.DEBUG
    line = "{request_id} {model}: attempt {attempt} at session {session_id} in tab {bridge}"
    request_id: str
    model: str
    session_id: str
    bridge: int
    attempt: int


class AttemptFailed(Event, frozen=True):
    """An attempt brought no answer; `course` says how the request goes on."""

    level = logging.WARNING
    is_for_people = False
    line = "{request_id} {model}: attempt {attempt} at session {session_id} failed ({course}): {reason}"
    request_id: str
    model: str
    session_id: str
    attempt: int
    course: str
    reason: str


class RequestEnded(Event, frozen=True):
    """A request's whole story, and its row in the store, in this order.

    Times are Unix seconds, durations seconds. `messages`, `answer` and `reasoning` are None where
    `log.contents` is off; attachments are only named. `messages`, `parameters` and `tries` are JSON.
    """

    line = "{request_id} {model}: {status} {outcome} in {total_seconds:.2f} s: {error}"
    request_id: str
    created_at: float
    model: str
    model_id: str
    is_stream: bool
    status: int
    outcome: str
    session_id: str | None
    attempts: int
    queued_seconds: float
    first_byte_seconds: float | None
    total_seconds: float
    prompt_tokens: int | None
    completion_tokens: int | None
    messages: str | None
    answer: str | None
    path: str | None = None
    client: str | None = None
    parameters: str | None = None
    reasoning: str | None = None
    error: str | None = None
    traceback: str | None = None
    tries: str | None = None

    @property
    def text(self) -> str:
        return super().text.removesuffix(": None")


class EventBus:
    """Hands each event to every listener at once. A listener is plain, quick, and does not raise."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


_DATA_PAYLOAD = re.compile(r"(data:[\w.+-]+/[\w.+-]+(?:;[\w.=+-]{1,80}){0,5},)[^\s\"'<>)]{64,}+")


def without_payloads(text: str) -> str:
    """A text as it may be logged: what data: URLs hold is left out."""
    return _DATA_PAYLOAD.sub(r"\1...", text) if "data:" in text else text


def log_event(event: Event) -> None:
    """The listener that makes each event a line of the log."""
    if log.isEnabledFor(event.level):
        error = event.error if isinstance(event, ModelSkipped) else None
        log.log(event.level, "%s", event.text, exc_info=error, extra={"event": event})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, message, the event's fields, an error's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": type(event).__name__ if event else record.name,
            "message": record.getMessage(),
        }
        if event:
            fields = {name: getattr(event, name) for name in event.__struct_fields__}
            line |= {name: value for name, value in fields.items() if not isinstance(value, Exception)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class LogFile(logging.handlers.RotatingFileHandler):
    """The log's file: nobody else's to read, and its trouble (a full disk) is told once and ends nothing.

    Written without a buffer, a record a line. One that a full disk or a kill has cut stays alone on its line.
    """

    trouble: BaseException | None = None
    is_cut = False

    def _open(self) -> Any:
        opener = functools.partial(os.open, mode=0o600)
        file = open(self.baseFilename, "a+b", buffering=0, opener=opener)  # noqa: SIM115
        if os.fstat(file.fileno()).st_size:
            file.seek(-1, os.SEEK_END)
            self.is_cut = file.read(1) != b"\n"
        return file

    def emit(self, record: logging.LogRecord) -> None:
        stream: Any
        try:
            line = self.format(record).encode("utf-8", "replace") + b"\n"
            self.stream = stream = self.stream or self._open()
            # Not by `shouldRollover`: it formats the record once more, and asks the disk three times.
            if 0 < self.maxBytes < stream.tell() + len(line):
                self.doRollover()
                self.stream = stream = self.stream or self._open()
            rest = b"\n" * self.is_cut + line
            self.is_cut = True
            while rest:
                rest = rest[stream.write(rest) :]
            self.is_cut, self.trouble = False, None
        except Exception as error:  # As in every logging handler: what is told must not end who tells it.
            if not self.trouble:
                sys.stderr.write(f"The log {self.baseFilename} cannot be written: {error}\n")
            self.trouble = error


def open_log(config: LogConfig, directory: Path) -> str:
    """Write the log to a rotating file; returns why the disk does not take it, if so. Raises ConfigError."""
    log.setLevel(config.level)
    log.propagate = False
    # Nobody reads from which line, thread and process something was logged; finding out is half of a record.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = LogFile(directory / "lmarena_proxy.jsonl", maxBytes=10 << 20, backupCount=5)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            wanted = f"a directory that can be written to ({error})"
            raise ConfigError("log.directory", str(directory), wanted) from None
        return f"There is no log: log.directory = {str(directory)!r} cannot be written to ({error})."
    file.setFormatter(JsonLines())
    log.addHandler(file)
    return ""


# ==========================================================================================================
# Store
# ==========================================================================================================
#
# SQLite in one file. One task writes: what is queued while a commit runs shares the next one, so a burst of
# openings costs a few commits. Commits are synchronous: what save() returned from survives a kill and a power
# cut. What nobody waits for (a use, a request's row) is committed a moment later, with what comes meanwhile:
# a kill may take that moment's rows along.

GATHER_WRITES_SECONDS = 0.05


class Session(msgspec.Struct, eq=False):
    """A conversation on the site that can be retried. Times are Unix seconds."""

    session_id: str
    message_id: str
    model_id: str
    account: str
    source: SessionSource
    created_at: float
    last_used_at: float | None = None
    uses: int = 0
    # The model's side, in a conversation of two.
    position: Position | None = None
    # In a row, and not stored: a restart forgives.
    failures: int = 0


_SCHEMA = """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, message_id TEXT NOT NULL, model_id TEXT NOT NULL, account TEXT NOT NULL,
    source TEXT NOT NULL, created_at REAL NOT NULL, last_used_at REAL, uses INTEGER NOT NULL
) STRICT;
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY, created_at REAL NOT NULL, model TEXT NOT NULL, model_id TEXT NOT NULL,
    is_stream INTEGER NOT NULL,
    status INTEGER NOT NULL, outcome TEXT NOT NULL, session_id TEXT, attempts INTEGER NOT NULL,
    queued_seconds REAL NOT NULL, first_byte_seconds REAL, total_seconds REAL NOT NULL, prompt_tokens INTEGER,
    completion_tokens INTEGER, messages TEXT, answer TEXT
) STRICT;
CREATE INDEX requests_by_time ON requests (created_at);
PRAGMA user_version = 1;
"""
# What is written is small and rarely read here: a quarter of the usual cache will do.
_SETTINGS = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -500;"
_PRUNE = "DELETE FROM requests WHERE created_at < ?"
# What each version adds to the one before it.
_UPGRADES = (
    """
ALTER TABLE requests ADD COLUMN path TEXT; ALTER TABLE requests ADD COLUMN client TEXT;
ALTER TABLE requests ADD COLUMN parameters TEXT; ALTER TABLE requests ADD COLUMN reasoning TEXT;
ALTER TABLE requests ADD COLUMN error TEXT; ALTER TABLE requests ADD COLUMN traceback TEXT;
ALTER TABLE requests ADD COLUMN tries TEXT;
PRAGMA user_version = 2;
""",
    """
ALTER TABLE sessions ADD COLUMN position TEXT;
PRAGMA user_version = 3;
""",
)
STORE_VERSION = 1 + len(_UPGRADES)
# In the order of the table's columns.
_SESSION_FIELDS = Session.__struct_fields__[:9]
_SESSION_VALUES = f"({', '.join('?' * len(_SESSION_FIELDS))})"


class _Write:
    """A statement on its way to the disk."""

    def __init__(self, statement: str, parameters: tuple[Any, ...]) -> None:
        self.statement, self.parameters = statement, parameters
        self.done = trio.Event()
        self.error: Exception | None = None
        # How many rows it has changed.
        self.rows = 0


class Store:
    """The sessions and the request log on disk. `run` must be running for `save` to return."""

    def __init__(self, directory: Path, *, may_replace: bool = True) -> None:
        """Open or create the store. Raises ConfigError when it cannot be used.

        `may_replace`: one that is damaged is moved aside, and a new one begun.
        """
        self.path = directory / "lmarena_proxy.sqlite3"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if not (may_replace and self._is_damage(error)):
                    raise
                self._move_aside(error)
                self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError("storage.path", str(self.path), f"a store that can be used ({error})") from None
        [version] = self._connection.execute("PRAGMA user_version").fetchone()
        if version > STORE_VERSION:
            wanted = f"a store of version {STORE_VERSION} or older, but it has version {version}"
            raise ConfigError("storage.path", str(self.path), wanted)
        self._queue, self._writes = trio.open_memory_channel[_Write](math.inf)
        # Set when somebody waits for what is queued.
        self._hurry = trio.Event()

    def _open(self) -> sqlite3.Connection:
        """Open the file, or make it; also reads all sessions, where damage would cost the most."""
        # Conversations are nobody else's business. SQLite gives its other files the same mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self.path.chmod(0o600)
        connection = sqlite3.connect(self.path, timeout=10, check_same_thread=False)
        try:
            connection.executescript(_SETTINGS)
            [version] = connection.execute("PRAGMA user_version").fetchone()
            steps = [_SCHEMA, *_UPGRADES]
            for step in steps[version:]:
                connection.executescript(f"BEGIN; {step} COMMIT;")
            connection.execute("SELECT * FROM sessions").fetchall()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _is_damage(self, error: sqlite3.DatabaseError) -> bool:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}")
        for ending in ("-wal", "-shm", ""):
            part = self.path.with_name(self.path.name + ending)
            if part.exists():
                os.replace(part, aside.with_name(aside.name + ending))
        log.error("The store is damaged (%s): it is now %s, and a new one has begun.", error, aside)

    def sessions(self) -> list[Session]:
        """All stored sessions, oldest first. For use before `run`."""
        query = f"SELECT {', '.join(_SESSION_FIELDS)} FROM sessions ORDER BY created_at, session_id"
        try:
            return [Session(*row) for row in self._connection.execute(query)]
        except sqlite3.Error as error:
            raise ConfigError("storage.path", str(self.path), f"a store that can be read ({error})") from None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is queued until `close`, then everything left, and close the file."""
        task_status.started()
        with trio.CancelScope(shield=True):  # Ends by close(); each commit is bounded by SQLite's timeout.
            async for write in self._writes:
                with trio.move_on_after(GATHER_WRITES_SECONDS):
                    await self._hurry.wait()
                self._hurry = trio.Event()
                batch = [write]
                while self._writes.statistics().current_buffer_used:
                    batch.append(self._writes.receive_nowait())
                await trio.to_thread.run_sync(self._commit_all, batch)
                for write in batch:
                    if write.error:
                        log.error("The store could not write a record: %r", write.error)
                    write.done.set()
            await trio.to_thread.run_sync(self._connection.close)

    def _commit_all(self, batch: Sequence[_Write]) -> None:
        """Commit a batch at once or, if that fails, each record alone: one must not take others with it."""
        if self._commit(batch):
            for write in batch:
                write.error = self._commit([write])

    def _commit(self, batch: Sequence[_Write]) -> Exception | None:
        try:
            with self._connection:
                for write in batch:
                    write.rows = self._connection.execute(write.statement, write.parameters).rowcount
        except Exception as error:  # Also what cannot be bound: the writer must outlive any record.
            return error
        return None

    def close(self) -> None:
        self._queue.close()
        self._hurry.set()

    def _write(self, statement: str, *parameters: Any) -> _Write:
        write = _Write(statement, parameters)
        self._queue.send_nowait(write)
        return write

    async def _write_now(self, statement: str, *parameters: Any) -> _Write:
        """Write, and wait until that is on disk or has failed."""
        write = self._write(statement, *parameters)
        self._hurry.set()
        await write.done.wait()
        return write

    async def save(self, session: Session) -> bool:
        """Insert or replace a session; returns once it is on disk, False when it could not be written."""
        values = [getattr(session, name) for name in _SESSION_FIELDS]
        statement = f"INSERT OR REPLACE INTO sessions VALUES {_SESSION_VALUES}"
        return (await self._write_now(statement, *values)).error is None

    def touch(self, session: Session) -> None:
        """Note a session's use."""
        self._write(
            "UPDATE sessions SET last_used_at = ?, uses = ? WHERE session_id = ?",
            *(session.last_used_at, session.uses, session.session_id),
        )

    def remove(self, session: Session) -> None:
        self._write("DELETE FROM sessions WHERE session_id = ?", session.session_id)

    def log_request(self, event: Event) -> None:
        """The listener that keeps the request log: each request is one row, written whole."""
        if isinstance(event, RequestEnded):
            values = msgspec.structs.astuple(event)
            self._write(f"INSERT OR REPLACE INTO requests VALUES ({', '.join('?' * len(values))})", *values)

    async def prune(self, days: float) -> int:
        """Forget requests that are older than so many days; returns how many there were."""
        return (await self._write_now(_PRUNE, time.time() - days * 86_400)).rows

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Outside `run`: a disk that does not take it is for the person to mend."""
        try:
            yield
        except sqlite3.Error as error:
            wanted = f"a store that can be written ({error})"
            raise ConfigError("storage.path", str(self.path), wanted) from None

    def prune_now(self, days: float) -> int:
        """The same before `run`, and give the disk its space back. Raises ConfigError."""
        with self._telling():
            with self._connection:
                count = self._connection.execute(_PRUNE, (time.time() - days * 86_400,)).rowcount
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return count

    def add_now(self, sessions: Iterable[Session]) -> int:
        """Insert the sessions that are not known, all or none; returns how many there were. For before `run`.

        Raises ConfigError.
        """
        statement = f"INSERT OR IGNORE INTO sessions VALUES {_SESSION_VALUES}"
        rows = [[getattr(session, name) for name in _SESSION_FIELDS] for session in sessions]
        before = self._connection.total_changes
        with self._telling(), self._connection:
            self._connection.executemany(statement, rows)
        return self._connection.total_changes - before

    async def settle(self) -> None:
        """Wait until everything queued so far is on disk."""
        await self._write_now("SELECT 1")

    async def ask(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        """The rows of a query, read beside the writer, in a thread. Raises sqlite3.Error."""

        def read() -> list[dict[str, Any]]:
            connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
            try:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, parameters)]
            finally:
                connection.close()

        return await trio.to_thread.run_sync(read)


# Of a search: far more than anybody types, and below what SQLite takes (50,000 bytes, escapes and all).
MAX_SEARCH_CHARACTERS = 1000


class RequestFilter(msgspec.Struct, frozen=True):
    """Which requests of the log are wanted. `status`: `ok`, `failed`, `left` or an HTTP status."""

    model: str = ""
    status: str = ""
    q: str = ""

    def condition(self) -> tuple[str, list[Any]]:
        """A WHERE condition and its parameters. Raises ClientError for what cannot be looked for."""
        terms: list[str] = ["1"]
        parameters: list[Any] = []
        if self.model:
            terms.append("? IN (model, model_id)")
            parameters.append(self.model)
        if self.status:
            known = {"ok": "status = 200", "failed": "status NOT IN (200, 499)", "left": "status = 499"}
            if self.status not in known and not re.fullmatch("[1-5][0-9]{2}", self.status):
                raise ClientError("status: expected ok, failed, left or an HTTP status.", param="status")
            terms.append(known.get(self.status, f"status = {self.status}"))
        if len(self.q) > MAX_SEARCH_CHARACTERS:
            message = f"q: expected up to {MAX_SEARCH_CHARACTERS} characters, but got {len(self.q)}."
            raise ClientError(message, param="q")
        if self.q:
            fields = ("answer", "reasoning", "error", "request_id", "model", "client", "messages")
            terms.append("(" + " OR ".join(f"{field} LIKE ? ESCAPE '!'" for field in fields) + ")")
            # Messages are JSON: what they hold stands there with its escapes.
            wanted = [self.q] * 6 + [encode_json(self.q).decode()[1:-1]]
            parameters += ["%" + re.sub("([!%_])", r"!\1", each) + "%" for each in wanted]
        return " AND ".join(terms), parameters


PREVIEW_CHARACTERS = 160


class RequestLog:
    """Reads the request log: pages of it, one request whole, and how things went over time."""

    _SUMMARY = (
        "request_id, created_at, model, model_id, path, client, is_stream, status, outcome, session_id, "
        "attempts, queued_seconds, first_byte_seconds, total_seconds, prompt_tokens, completion_tokens, "
        f"error, substr(answer, 1, {PREVIEW_CHARACTERS}) AS preview"
    )
    _NEWEST_FIRST = "ORDER BY created_at DESC, rowid DESC"
    # An answer that came in one piece has no speed.
    _SPEED = (
        "CASE WHEN total_seconds - first_byte_seconds > 0.1 "
        "THEN completion_tokens / (total_seconds - first_byte_seconds) END"
    )

    def __init__(self, store: Store) -> None:
        self._store = store

    async def page(self, wanted: RequestFilter, before: str, limit: int) -> list[dict[str, Any]]:
        """Summaries, newest first: those that came before the request `before`, if that is not empty."""
        condition, parameters = wanted.condition()
        if before:
            place = "SELECT created_at, rowid FROM requests WHERE request_id = ?"
            condition += f" AND (created_at, rowid) < ({place})"
            parameters.append(before)
        query = f"SELECT {self._SUMMARY} FROM requests WHERE {condition} {self._NEWEST_FIRST} LIMIT {limit}"
        return [self._read(row) for row in await self._store.ask(query, *parameters)]

    async def whole(self, wanted: RequestFilter, before: str, limit: int) -> list[dict[str, Any]]:
        """As `page`, with all that is stored of each request."""
        ids = [row["request_id"] for row in await self.page(wanted, before, limit)]
        condition = "request_id IN (SELECT value FROM json_each(?))"
        query = f"SELECT * FROM requests WHERE {condition} {self._NEWEST_FIRST}"
        return [self._read(row) for row in await self._store.ask(query, encode_json(ids).decode())]

    async def one(self, request_id: str) -> dict[str, Any] | None:
        await self._store.settle()
        rows = await self._store.ask("SELECT * FROM requests WHERE request_id = ?", request_id)
        return self._read(rows[0]) if rows else None

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        row["is_stream"] = bool(row["is_stream"])
        for name in row.keys() & {"messages", "parameters", "tries"}:
            row[name] = msgspec.json.decode(row[name]) if row[name] else None
        if "preview" not in row:
            row["preview"] = row["answer"] and row["answer"][:PREVIEW_CHARACTERS]
        return row

    async def statistics(self, hours: float, bucket_seconds: float) -> dict[str, Any]:
        """How things went in the last hours: by time, in buckets, and by model."""
        until = math.ceil(time.time() / bucket_seconds) * bucket_seconds
        count = round(hours * 3600 / bucket_seconds)
        since = until - count * bucket_seconds
        bucket = f"CAST((created_at - {since}) / {bucket_seconds} AS INTEGER)"
        nothing = {"median": None, "p95": None}
        series: dict[str, Any] = {
            "from": since,
            "to": until,
            "bucket_seconds": bucket_seconds,
            "times": [since + number * bucket_seconds for number in range(count)],
        }
        totals = await self._count(bucket, since)
        for name in ("requests", "errors"):
            series[name] = [totals.get(number, {}).get(name, 0) for number in range(count)]
        series["queue_depth"] = await self._queue_depths(since, bucket_seconds, count)
        models = await self._count("model_id", since)
        total: dict[str, Any] = {
            name: sum(model[name] for model in models.values()) for name in ("requests", "errors")
        }
        for name, value in (("first_byte_seconds", "first_byte_seconds"), ("tokens_per_second", self._SPEED)):
            by_time = await self._percentiles(bucket, value, since)
            series[name] = {
                part: [by_time.get(number, {}).get(part) for number in range(count)]
                for part in ("median", "p95")
            }
            by_model = await self._percentiles("model_id", value, since)
            for model_id, model in models.items():
                model[name] = by_model.get(model_id, nothing)
            total[name] = (await self._percentiles("'all'", value, since)).get("all", nothing)
        listed = [{"model_id": each, **model} for each, model in models.items()]
        return series | {"total": total, "models": listed}

    async def _count(self, group: str, since: float) -> dict[Any, dict[str, Any]]:
        query = f"""
            SELECT {group} AS part, max(model) AS model, count(*) AS requests,
                sum(status NOT IN (200, 499)) AS errors
            FROM requests WHERE created_at >= ? GROUP BY part"""
        return {row.pop("part"): row for row in await self._store.ask(query, since)}

    async def _percentiles(self, group: str, value: str, since: float) -> dict[Any, dict[str, float]]:
        query = f"""
            SELECT part, max(CASE WHEN place = (number + 1) / 2 THEN value END) AS median,
                max(CASE WHEN place = (number * 95 + 99) / 100 THEN value END) AS p95
            FROM (
                SELECT part, value, row_number() OVER (PARTITION BY part ORDER BY value) AS place,
                    count(*) OVER (PARTITION BY part) AS number
                FROM (SELECT {group} AS part, {value} AS value FROM requests
                      WHERE created_at >= ? AND status = 200)
                WHERE value IS NOT NULL
            ) GROUP BY part"""
        return {row.pop("part"): row for row in await self._store.ask(query, since)}

    async def _queue_depths(self, since: float, bucket_seconds: float, count: int) -> list[int]:
        """The most that waited at once, bucket by bucket: each wait is one more, and one less at its end."""
        query = f"""
            WITH waits AS (SELECT created_at AS starts, created_at + queued_seconds AS ends FROM requests
                           WHERE created_at >= ? - 3600 AND queued_seconds > 0.001),
            steps AS (SELECT starts AS time, 1 AS step FROM waits UNION ALL SELECT ends, -1 FROM waits),
            depths AS (SELECT CAST((time - {since}) / {bucket_seconds} + 1e6 AS INTEGER) - 1000000 AS bucket,
                       step, sum(step) OVER (ORDER BY time, step ROWS UNBOUNDED PRECEDING) AS depth
                       FROM steps)
            SELECT bucket, max(depth) AS most, sum(step) AS change FROM depths GROUP BY bucket"""
        depths, waiting = [0] * count, 0
        rows = {row["bucket"]: row for row in await self._store.ask(query, since)}
        for number in range(min(rows, default=count), count):
            row = rows.get(number, {"most": 0, "change": 0})
            if number >= 0:
                depths[number] = max(waiting, row["most"])
            waiting += row["change"]
        return depths


# ==========================================================================================================
# Media
# ==========================================================================================================
#
# Images and videos by their address. A client's address may say anything, so nothing is fetched but from
# public ones: every name is resolved here, its addresses are checked, and the connection goes to the checked
# address and not to the name again, for each redirect anew. That leaves no moment in which a name may come to
# mean this machine or its network. `site_origins` are exempt: the demo's stand-in site is on this machine.
#
# What is kept lies in one directory, each file under the hash of its content; the oldest go when there is too
# much.


class FetchFailed(Exception):
    """Something could not be had from its address; the message says why, for people."""

    def __init__(self, message: str, *, is_too_large: bool = False) -> None:
        super().__init__(message)
        self.is_too_large = is_too_large


class NotUploaded(Exception):
    """An image cannot be brought to the site's storage; the message says why, for people."""


# Brings an image, as a data: URL, to the site's storage, and returns it with its address there. Raises
# NotUploaded, or an ApiError for what has nothing to do with the image.
UploadImage = Callable[[Attachment], Awaitable[Attachment]]
# As much as a body may bring by default. It stands several times in memory, here and in the tab.
MAX_UPLOAD_MB = 32


def is_public(address: str, allowed: Iterable[str] = ()) -> bool:
    """Whether an IP address is one of the public internet, or in one of the networks allowed beside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if any(ip in ipaddress.ip_network(network) for network in allowed):
        return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_link_local)


class PublicTransport:
    """Connects to public addresses only, whatever names resolve to and wherever redirects lead.

    To httpx it is an AsyncBaseTransport; to be one in name, too, would load httpx at the start.
    """

    def __init__(self, allowed_networks: Sequence[str], site_origins: Set[str], tls: ssl.SSLContext) -> None:
        # No connection serves a second request: the pool would know it by its address, and so hand it on to
        # another name at that address, whose certificate nobody has seen.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(verify=tls, limits=limits)
        self._allowed_networks, self._site_origins = allowed_networks, site_origins

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._transport.__aexit__(*exception)

    async def handle_async_request(self, request: "httpx.Request") -> "httpx.Response":
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{url.scheme}: is not fetched from")
        if f"{url.scheme}://{url.netloc.decode()}" in self._site_origins:
            return await self._transport.handle_async_request(request)
        host = url.raw_host.decode()
        refusal: httpx.TransportError = httpx.ConnectError(f"{host} has no address")
        for address in await self._resolve(host, url.port or {"https": 443}.get(url.scheme, 80)):
            checked = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                # The certificate must still be the name's.
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._transport.handle_async_request(checked)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                refusal = error
        raise refusal

    async def _resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a name. Raises FetchFailed when one of them is not public."""
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchFailed(f"the name {host} is not known") from None
        addresses = [*dict.fromkeys(str(entry[4][0]) for entry in found)]
        for address in addresses:
            if not is_public(address, self._allowed_networks):
                raise FetchFailed(
                    f"{host} is at {address}, which is not on the public internet (media.allowed_networks)"
                )
        return addresses


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # Reads all certificates: once, and not before the first fetch.


def _tell_failure(error: Exception) -> FetchFailed:
    reason = str(error) or str(error.__cause__ or type(error).__name__)
    return FetchFailed(reason.rstrip("."))


class MediaFiles:
    """Fetches images and videos, and keeps those of answers where that is set."""

    PATH = "/media/"
    FETCHES, MAX_REDIRECTS = 8, 5
    _ENDINGS: ClassVar = {
        "image/png": "png",
        "image/jpeg": "jpg",
        "image/gif": "gif",
        "image/webp": "webp",
        "image/avif": "avif",
        "video/mp4": "mp4",
        "video/webm": "webm",
    }
    _TYPES: ClassVar = {ending: kind for kind, ending in _ENDINGS.items()}
    NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(_ENDINGS.values())})")

    def __init__(self, config: MediaConfig, directory: Path) -> None:
        self.directory = directory
        self.site_origins: set[str] = set()
        self._config = config
        self._fetching = trio.CapacityLimiter(self.FETCHES)
        self._writing = threading.Lock()

    async def fetch(self, url: str, limit_mb: int) -> tuple[str, bytes]:
        """The content type and the bytes of an image or video at an address. Raises FetchFailed."""
        seconds = self._config.timeout_seconds
        async with self._fetching:
            with trio.move_on_after(seconds) as patience:
                try:
                    if own := _DATA_URL.fullmatch(url):
                        data = base64.b64decode(own[2], validate=True)
                    # Under the hash of its content, whatever host the address names.
                    elif kept := self.path_of(urlsplit(url).path.removeprefix(self.PATH)):
                        data = await trio.Path(kept).read_bytes()
                    else:
                        data = await self._get(url, limit_mb)
                except (OSError, ValueError, OverflowError) as error:
                    raise _tell_failure(error) from None
        if patience.cancelled_caught:
            raise FetchFailed(f"it did not arrive within {seconds:g} s (media.timeout_seconds)")
        kind = media_type(data)
        if kind is None:
            raise FetchFailed("it is neither an image nor a video")
        return kind, data

    async def _get(self, url: str, limit_mb: int) -> bytes:
        await load("httpx")
        try:
            return await self._get_by_httpx(url, limit_mb)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _tell_failure(error) from None

    async def _get_by_httpx(self, url: str, limit_mb: int) -> bytes:
        tls = await trio.to_thread.run_sync(_tls)
        transport: Any = PublicTransport(self._config.allowed_networks, self.site_origins, tls)
        headers = {"user-agent": f"lmarena_proxy/{VERSION}", "accept-encoding": "identity"}
        timeout = self._config.timeout_seconds
        async with httpx.AsyncClient(transport=transport, timeout=timeout, headers=headers) as client:
            request: httpx.Request | None = client.build_request("GET", url)
            for _ in range(1 + self.MAX_REDIRECTS):
                assert request
                response = await client.send(request, stream=True)
                try:
                    # By hand, since httpx would read a redirect's body, without end if it has none.
                    request = response.next_request
                    if request is None:
                        return await self._read(response, limit_mb)
                finally:
                    await response.aclose()
        raise FetchFailed(f"its server redirects more than {self.MAX_REDIRECTS} times")

    async def _read(self, response: "httpx.Response", limit_mb: int) -> bytes:
        """The body as it comes over the wire: unpacked, a little could become very much."""
        if response.status_code != 200:
            raise FetchFailed(f"its server answered {response.status_code}")
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > limit_mb << 20:
                raise FetchFailed(f"it has more than {limit_mb} MiB", is_too_large=True)
        return bytes(data)

    async def attach_all(
        self, asked: AnswerRequest, limit_mb: int, upload: UploadImage | None
    ) -> list[Message]:
        """A request's messages with every image in them as the site takes it.

        Up to `limit_mb` that is as data; a larger one `upload` brings to the site's storage, where it can.
        Raises ClientError naming the path, and what else kept an image from going there.
        """
        if not any(asked.images.values()):
            return asked.messages
        rows = [list(message.attachments) for message in asked.messages]
        fetched_mb = max(limit_mb, min(self._config.max_file_mb, MAX_UPLOAD_MB)) if upload else limit_mb
        # Between being fetched and being uploaded a large image is here: not all of a request at once.
        slots, uploading = trio.CapacityLimiter(self.FETCHES), trio.Lock()
        uploaded: dict[str, Attachment] = {}

        async def attach_one(path: str, row: list[Attachment], place: int) -> None:
            async with slots:
                if row[place].is_remote:
                    row[place] = await self._attach(row[place].url, fetched_mb, path)
                image = row[place]
                if is_too_large(image, limit_mb):
                    async with uploading:  # What stands in several messages goes there once.
                        if image.url not in uploaded:
                            uploaded[image.url] = await self._upload(image, limit_mb, path, upload)
                        row[place] = uploaded[image.url]

        try:
            async with trio.open_nursery() as nursery:
                for path, row in zip(asked.paths, rows, strict=True):
                    for place in range(len(row)):
                        nursery.start_soon(attach_one, path, row, place)
        except BaseExceptionGroup as group:
            failure = first_of(group, ApiError)
        else:
            complete = zip(asked.messages, rows, strict=True)
            return [msgspec.structs.replace(message, attachments=tuple(row)) for message, row in complete]
        raise failure

    async def _upload(
        self, image: Attachment, limit_mb: int, path: str, upload: UploadImage | None
    ) -> Attachment:
        try:
            if upload is None:
                raise NotUploaded("no connected tab has a userscript that uploads larger ones")
            if is_too_large(image, MAX_UPLOAD_MB):
                raise NotUploaded(f"above {MAX_UPLOAD_MB} MiB nothing is uploaded")
            return await upload(image)
        except NotUploaded as reason:
            raise refuse_size(image, limit_mb, path, str(reason)) from None

    async def _attach(self, url: str, limit_mb: int, path: str) -> Attachment:
        try:
            kind, data = await self.fetch(url, limit_mb)
            if not kind.startswith("image/"):
                raise FetchFailed("it is a video")
        except FetchFailed as error:
            message = f"{path}: the image at {url[:200]} cannot be used: {error}."
            fields: dict[str, Any] = (
                {"status": 413, "code": "request_too_large"} if error.is_too_large else {}
            )
            raise ClientError(message, param=path, **fields) from None
        return attach(kind, data)

    def path_of(self, name: str) -> Path | None:
        """The file that is kept under a name, if there is one."""
        path = self.directory / name
        return path if self.NAME.fullmatch(name) and path.is_file() else None

    async def keep(self, media: Media, own_url: str) -> Media:
        """Keep what an answer shows; returns it with its address here, or as it was where that fails.

        `own_url` is where the client has asked, for when `media.base_url` does not say.
        """
        try:
            kind, data = await self.fetch(media.url, self._config.max_file_mb)
            name = await trio.to_thread.run_sync(self._write, kind, data)
        except (FetchFailed, OSError) as error:
            place = "a data: URL" if media.url[:5].lower() == "data:" else media.url[:200]
            log.warning("The %s at %s is not kept: %s", media.kind, place, error)
            return media
        base_url = self._config.base_url.rstrip("/") or own_url
        return Media(media.kind, f"{base_url}{self.PATH}{name}")

    def _write(self, kind: str, data: bytes) -> str:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{self._ENDINGS[kind]}"
        with self._writing:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory) as place:
                file = Path(place) / name
                file.touch(mode=0o600)
                file.write_bytes(data)
                os.replace(file, self.directory / name)
            self._make_room(name)
        return name

    def _make_room(self, newest: str) -> None:
        """Delete the oldest files beyond `media.max_total_mb`; never the one that was just written."""
        paths = [path for path in self.directory.iterdir() if self.NAME.fullmatch(path.name)]
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in paths)
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._config.max_total_mb << 20:
                break
            if path.name != newest:
                path.unlink(missing_ok=True)
                total -= size

    async def read(self, name: str) -> tuple[str, bytes] | None:
        """The content type and the bytes of what is kept under a name, if something is."""
        path = self.path_of(name)
        try:
            return (self._TYPES[path.suffix[1:]], await trio.Path(path).read_bytes()) if path else None
        except FileNotFoundError:
            return None  # It has just made room.


# ==========================================================================================================
# Session pool
# ==========================================================================================================
#
# Theory. Each model has a limiter, whose tokens are the exchanges it may have running, and a deque of idle
# sessions.
#
#   - A request first gets a token, first come first served: trio's limiter hands a returned token to the
#     longest waiter, so a newcomer never passes one. The token is borrowed on behalf of the lease, not of the
#     task, so that a request may move between tasks.
#   - The holder of a token then takes the session that has been idle longest (round robin), or none, and then
#     opens one. There are as many tokens as usable sessions, and at least `sessions_per_model`.
#   - Bootstrap opens under the same tokens, so it and requests together never exceed them.
#   - A session is bound to the account that opened it. Sessions of accounts without a ready tab rest in the
#     deque: `take` passes over them, and they add no tokens.
#   - A lease's session goes back to the end of the deque, unless it was retired meanwhile.
#   - A session that was idle for longer than `pool.max_idle_hours` counts as missing. It is retired when
#     somebody comes for a session of its model, a request or a run of bootstrap, who then opens another: no
#     clock runs, and nothing is opened that nobody has asked for.
#
# The pool sends nothing and knows no bridge. There is no await between reading and changing its state; only
# `acquire` and `add` wait, the first before it changes anything but the queue, the second on the disk before
# it changes anything.


class Try(msgspec.Struct):
    """One attempt at an answer. Times are seconds since the request came; None is not yet, or never."""

    session_id: str
    bridge: int
    started_seconds: float
    first_byte_seconds: float | None = None
    ended_seconds: float | None = None
    problem: str | None = None


class Lease:
    """One request's or opening's claim: its token, the session it holds, and what has become of it."""

    def __init__(self, request_id: str, model: Model, source: SessionSource = "on_demand") -> None:
        self.request_id, self.model, self.source = request_id, model, source
        self.session: Session | None = None
        self.has_token = False
        self.started_at = trio.current_time()
        self.admitted_at: float | None = None
        self.first_byte_at: float | None = None
        self.tries: list[Try] = []

    def __repr__(self) -> str:
        session = self.session.session_id if self.session else "no session"
        return f"<Lease {self.request_id} of {self.model.name}: {session}>"

    @property
    def last_session_id(self) -> str | None:
        return self.tries[-1].session_id if self.tries else None

    def seconds(self, time: float | None = None) -> float:
        """How long after the request came that was, in Trio's time, or is now."""
        return (trio.current_time() if time is None else time) - self.started_at


class ModelPool:
    """One model's sessions and tokens."""

    def __init__(self, model: Model, target: int) -> None:
        self.model, self.target = model, target
        self.sessions: dict[str, Session] = {}
        self.limiter = trio.CapacityLimiter(target)
        # Those that have a token, and those that wait for one.
        self.leases: set[Lease] = set()
        self.waiters: dict[Lease, None] = {}
        # Those that went last, and why: for the dashboard.
        self.retired: deque[tuple[Session, str]] = deque(maxlen=4)
        self._idle: deque[Session] = deque()

    def __repr__(self) -> str:
        return (
            f"<ModelPool {self.model.name}: {len(self.sessions)} sessions, {self.idle} idle, "
            f"{self.limiter.borrowed_tokens}/{self.limiter.total_tokens:g} tokens, {self.waiting} waiting>"
        )

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self.sessions) - len(self._idle)

    @property
    def waiting(self) -> int:
        return self.limiter.statistics().tasks_waiting

    def usable(self, accounts: Iterable[str]) -> int:
        """How many sessions belong to these accounts."""
        wanted = set(accounts)
        return sum(session.account in wanted for session in self.sessions.values())

    def resting(self, accounts: Set[str]) -> int:
        """How many idle sessions belong to other accounts than these."""
        return sum(session.account not in accounts for session in self._idle)

    def idle_since(self, moment: float, accounts: Set[str]) -> list[Session]:
        """The idle sessions of these accounts that were last used, or opened, before a moment."""
        idle = (session for session in self._idle if session.account in accounts)
        return [session for session in idle if (session.last_used_at or session.created_at) < moment]

    def resize(self, accounts: Iterable[str]) -> None:
        """Set the number of tokens to what these accounts can use."""
        self.limiter.total_tokens = max(self.target, self.usable(accounts))

    def put(self, session: Session) -> None:
        """Add a session, idle; one that is known keeps its place and takes the message id."""
        known = self.sessions.setdefault(session.session_id, session)
        known.message_id = session.message_id
        if known is not session:
            return
        for lease in self.leases:
            if lease.session and lease.session.session_id == session.session_id:
                lease.session = session  # Retired and captured anew while it is being used.
                return
        self._idle.append(session)

    def violations(self) -> list[str]:
        """What must hold and does not: for tests, and for a debug run after every event."""
        held = [lease.session.session_id for lease in self.leases if lease.session]
        idle = [session.session_id for session in self._idle]
        # A token that is handed to a waiter is borrowed before that one's task has run.
        tokens, claimed = self.limiter.borrowed_tokens, len(self.leases) + len(self.waiters)
        must_hold = {
            "each borrowed token is a request's": len(self.leases) <= tokens <= claimed,
            "each waiter is a request's": self.waiting <= len(self.waiters),
            "no session is idle or held twice": len({*held, *idle}) == len(held) + len(idle),
            "each session is idle or held": self.sessions.keys() <= {*held, *idle},
            "each idle session is the pool's": self.sessions.keys() >= {*idle},
        }
        return [
            f"{self.model.name}: not true that {claim}" for claim, holds in must_hold.items() if not holds
        ]

    def take(self, lease: Lease, accounts: Iterable[str]) -> Session | None:
        """Lend the longest idle session that one of these accounts may use, if there is one."""
        wanted = set(accounts)
        for session in self._idle:
            if session.account in wanted:
                self._idle.remove(session)
                lease.session = session
                return session
        return None

    def give_back(self, lease: Lease) -> None:
        """Take a lease's session back, if it holds one that was not retired."""
        session, lease.session = lease.session, None
        if session and self.sessions.get(session.session_id) is session:
            self._idle.append(session)

    def drop(self, session: Session) -> None:
        self.sessions.pop(session.session_id, None)
        if session in self._idle:
            self._idle.remove(session)

    def describe(self, accounts: Set[str]) -> dict[str, object]:
        """What the dashboard shows of it, and /api/state. Sessions of other accounts rest."""
        return {
            "model": self.model.name,
            "model_id": self.model.id,
            "modality": self.model.modality,
            "requires_image": self.model.requires_image,
            "sessions": len(self.sessions),
            "idle": self.idle,
            "busy": self.busy,
            "resting": self.resting(accounts),
            "opening": sum(lease.session is None for lease in self.leases),
            "waiting": self.waiting,
            "tokens": int(self.limiter.total_tokens),
        }

    def describe_sessions(self, accounts: Set[str]) -> Iterator[dict[str, object]]:
        """What the dashboard shows of each session, with those retired last."""
        holders = {id(lease.session): lease.request_id for lease in self.leases if lease.session}
        for session in self.sessions.values():
            request_id = holders.get(id(session))
            state = "busy" if request_id else "idle" if session.account in accounts else "resting"
            yield {**msgspec.structs.asdict(session), "state": state, "request_id": request_id}
        for session, reason in self.retired:
            if session.session_id not in self.sessions:
                yield {**msgspec.structs.asdict(session), "state": "retired", "reason": reason}


class SessionPool:
    """All models' pools, their store, and what is told of them."""

    def __init__(self, catalog: Catalog, config: PoolConfig, store: Store, bus: EventBus) -> None:
        self.catalog = catalog
        self._config, self._store, self._bus = config, store, bus
        self._pools: dict[str, ModelPool] = {}
        self._accounts: frozenset[str] = frozenset()
        # Sessions that are not used now: of models that wait for the page's list, and of battles where those
        # are not used. They stay in the store.
        self._unlisted = store.sessions()
        # One at a time for each session: a tab may tell of it twice, or under another model or account.
        self._adding: dict[str, trio.Lock] = {}
        self.merge_models(())

    def __iter__(self) -> Iterator[ModelPool]:
        return (self.of(model.id) for model in self.catalog)

    def __repr__(self) -> str:
        sessions = sum(len(pool.sessions) for pool in self)
        return f"<SessionPool of {sessions} sessions for {len(self.catalog)} models>"

    def merge_models(self, models: Iterable[Model]) -> list[Model]:
        """Lay a list over the catalog, and take up the stored sessions of new models.

        Returns the entries that changed.
        """
        changed = self.catalog.merge(models)
        listed = [session for session in self._unlisted if self._is_used(session)]
        self._unlisted = [session for session in self._unlisted if not self._is_used(session)]
        for session in listed:
            self.of(session.model_id).put(session)
        self.set_accounts(self._accounts)
        return changed

    def _is_used(self, session: Session) -> bool:
        is_allowed = session.position is None or self._config.use_battles
        return is_allowed and self.catalog.get(session.model_id) is not None

    def of(self, model_id: str) -> ModelPool:
        """A model's pool, made when first asked for."""
        model = self.catalog.get(model_id)
        assert model is not None, model_id
        pool = self._pools.get(model_id)
        if pool is None:
            pool = self._pools[model_id] = ModelPool(model, self._config.sessions_per_model)
        pool.model = model
        return pool

    def set_accounts(self, accounts: Iterable[str]) -> None:
        """The accounts that have a ready tab now."""
        self._accounts = frozenset(accounts)
        for pool in self._pools.values():
            pool.resize(self._accounts)

    def _stale(self, pool: ModelPool, accounts: Iterable[str]) -> list[Session]:
        hours = self._config.max_idle_hours
        return pool.idle_since(time.time() - hours * 3600, {*accounts}) if hours else []

    def retire_stale(self, model: Model, accounts: Iterable[str]) -> None:
        """Retire the sessions of these accounts that nobody has used for `pool.max_idle_hours`."""
        for session in self._stale(self.of(model.id), accounts):
            hours = (time.time() - (session.last_used_at or session.created_at)) / 3600
            self.retire(session, f"not used for {hours:.0f} hours (pool.max_idle_hours)")

    def missing(self, model: Model) -> int:
        """How many sessions bootstrap has to open for a model."""
        pool = self.of(model.id)
        fresh = pool.usable(self._accounts) - len(self._stale(pool, self._accounts))
        return max(0, self._config.sessions_per_model - fresh)

    def missing_in_all(self) -> int:
        """How many sessions bootstrap has to open; models that work on an image open theirs on demand."""
        return sum(self.missing(pool.model) for pool in self if not pool.model.requires_image)

    async def acquire(self, lease: Lease) -> None:
        """Wait for a token, first come first served."""
        pool = self.of(lease.model.id)
        pool.waiters[lease] = None
        try:
            await pool.limiter.acquire_on_behalf_of(lease)
        finally:
            del pool.waiters[lease]
        lease.has_token = True
        pool.leases.add(lease)

    def acquire_nowait(self, lease: Lease) -> bool:
        """Take a token if there is one that nobody waits for."""
        pool = self.of(lease.model.id)
        try:
            pool.limiter.acquire_on_behalf_of_nowait(lease)
        except trio.WouldBlock:
            return False
        lease.has_token = True
        pool.leases.add(lease)
        return True

    def take(self, lease: Lease, accounts: Iterable[str]) -> Session | None:
        """Lend the longest idle session that one of these accounts may use and that is not stale."""
        self.retire_stale(lease.model, accounts)
        return self.of(lease.model.id).take(lease, accounts)

    def give_back(self, lease: Lease) -> None:
        self.of(lease.model.id).give_back(lease)

    def release(self, lease: Lease) -> None:
        """Give back what a lease holds: its session, then its token."""
        pool = self.of(lease.model.id)
        pool.give_back(lease)
        if lease.has_token:
            lease.has_token = False
            pool.leases.discard(lease)
            pool.limiter.release_on_behalf_of(lease)

    async def add(self, session: Session) -> None:
        """Store a new session, then let it be used and tell of it.

        Of one that is told of again only the message id is taken; another model or account is not believed.
        """
        lock = self._adding.setdefault(session.session_id, trio.Lock())
        try:
            async with lock:
                known = self.find(session.session_id)
                if known is None:
                    await self._add_new(session)
                elif (known.model_id, known.account) == (session.model_id, session.account):
                    await self.continue_by_hand(known, session.message_id, session.position)
        finally:
            if not lock.locked():
                self._adding.pop(session.session_id, None)

    async def _add_new(self, session: Session) -> None:
        if not await self._store.save(session):
            log.error(
                "Session %s works, but is not in the store: it is lost at the next start", session.session_id
            )
        self._unlisted = [each for each in self._unlisted if each.session_id != session.session_id]
        pool = self.of(session.model_id)
        pool.put(session)
        pool.resize(self._accounts)
        ids = (pool.model.id, session.session_id, session.message_id, session.account)
        self._bus.publish(SessionOpened(pool.model.name, *ids, source=session.source))

    async def continue_by_hand(
        self, session: Session, message_id: str, position: Position | None = None
    ) -> None:
        """The person went on in a conversation of the pool: retries now name its new last message.

        Of a conversation with two models one side is in the pool; the other's message ids are not for it.
        """
        if session.message_id == message_id or session.position != position:
            return
        session.message_id = message_id
        await self._store.save(session)
        name = self.of(session.model_id).model.name
        ids = (session.model_id, session.session_id, message_id, session.account)
        self._bus.publish(SessionOpened(name, *ids, source="captured"))

    def find(self, session_id: str) -> Session | None:
        pools = self._pools.values()
        return next((pool.sessions[session_id] for pool in pools if session_id in pool.sessions), None)

    def note_use(self, session: Session) -> None:
        session.uses += 1
        session.failures = 0
        session.last_used_at = time.time()
        self._store.touch(session)

    def note_failure(self, session: Session, reason: str) -> None:
        """Count a failure; too many in a row retire the session."""
        session.failures += 1
        if session.failures >= self._config.max_consecutive_failures:
            self.retire(session, f"{session.failures} failures in a row, last: {reason}")

    def retire(self, session: Session, reason: str) -> None:
        """Take a session out of the pool and the store for good, unless that has happened."""
        pool = self.of(session.model_id)
        if pool.sessions.get(session.session_id) is not session:
            return
        pool.drop(session)
        pool.retired.append((session, reason))
        pool.resize(self._accounts)
        self._store.remove(session)
        self._bus.publish(SessionRetired(pool.model.name, session.session_id, reason))

    def violations(self) -> list[str]:
        """What must hold of each pool and does not."""
        return [each for pool in self._pools.values() for each in pool.violations()]

    def snapshot(self) -> list[dict[str, object]]:
        """The `pool` part of /api/state."""
        return [{**pool.describe(self._accounts), "missing": self.missing(pool.model)} for pool in self]

    def describe_sessions(self) -> list[dict[str, object]]:
        """The `sessions` part of /api/state."""
        return [each for pool in self for each in pool.describe_sessions(self._accounts)]


# ==========================================================================================================
# Bridges
# ==========================================================================================================
#
# A bridge is a connected tab; an exchange is one fetch relayed through it. Sending is putting a frame in the
# bridge's outbox, which one task empties: a request that is cancelled half-way never tears a frame. The read
# loop never waits for a reader: what arrives goes into the exchange's buffer, and an exchange that overflows
# is given up alone.
#
# Pages report `loading`, `verification`, `sign_in` or `ready`. What the site's answers say of a page
# overrules that until the page reports again: after a challenge it counts as `verification`, after a 401 as
# stale.

HELLO_TIMEOUT_SECONDS = 10
CLOSE_TIMEOUT_SECONDS = 2
FAREWELL_SECONDS = 0.1
RELOAD_INTERVAL_SECONDS = 60
RELOAD_PATIENCE_SECONDS = 30
# The userscript's frames stay below 1 MiB; the page's model list is the largest text.
MAX_FRAME_BYTES = 16 << 20
# What may wait for a client that reads slowly. An answer in text is rarely a tenth of it.
EXCHANGE_BUFFER_BYTES = 16 << 20


_Piece = TypeVar("_Piece", bytes, Head)


class ExchangeBroken(Exception):
    """An exchange ended without a whole answer. `reason` is the wire's, or `lost` (the tab) or `overflow`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message or reason)
        self.reason = reason


class Refused(Exception):
    """The head of a response is not that of an answer."""

    def __init__(self, head: Head) -> None:
        super().__init__(f"status {head.status}")
        self.head = head


class Exchange:
    """One relayed fetch: its head, then its body's bytes, as they arrive. Or an upload: its address."""

    def __init__(self, exchange_id: int, accept: Callable[[Head], bool] | None = None) -> None:
        """`accept` is asked, in the bridge's own step, whether a head is that of the answer waited for."""
        self.id = exchange_id
        # Until the head has come.
        self._accept = accept
        self._head: Head | None = None
        # A head that was not accepted, until somebody has been told.
        self._refused: Head | None = None
        self._address = ""
        self._chunks: list[bytes] = []
        self._size = 0
        self._ended = False
        self._broken: ExchangeBroken | None = None
        self._lot = trio.lowlevel.ParkingLot()
        # What `receive` was called with while it waits, and what went wrong in it or in `accept`.
        self._take: Callable[[bytes], bool] | None = None
        self._trouble: Exception | None = None

    def __repr__(self) -> str:
        state = "broken" if self._broken else "ended" if self._ended else "open"
        return f"<Exchange {self.id}: {state}, {self._size} bytes waiting>"

    @property
    def is_over(self) -> bool:
        return self._ended or self._broken is not None

    @property
    def is_silent(self) -> bool:
        """Whether nothing of it can be received now: neither bytes whose head has come, nor an end."""
        has_bytes = bool(self._chunks) and self._accept is None
        return not has_bytes and not self.is_over and not self._refused

    @property
    def is_streaming(self) -> bool:
        """Whether its answer has begun to arrive, and has not ended."""
        return self._head is not None and not self.is_over

    @property
    def is_running_there(self) -> bool:
        """Whether the browser may still be fetching."""
        return not self._ended and (self._broken is None or self._broken.reason == "overflow")

    @property
    def has_begun(self) -> bool:
        """Whether its head has come."""
        return self._head is not None

    def begin(self, head: Head) -> None:
        if self._head is None:
            self._head = head
            accept, self._accept = self._accept, None
            is_accepted = accept is not None and self._is_taken(accept, head)
            if accept and not is_accepted:
                self._refused = head
            if not is_accepted or self._chunks:
                self._lot.unpark_all()  # Else what is waited for comes after it.

    def feed(self, data: bytes) -> None:
        if self.is_over:
            return
        take = None if self._chunks or self._accept or self._refused else self._take
        if take and self._is_taken(take, data):
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > EXCHANGE_BUFFER_BYTES:
            self.fail(
                ExchangeBroken(
                    "overflow", f"more than {EXCHANGE_BUFFER_BYTES >> 20} MiB waited for the client"
                )
            )
        elif self._lot:
            self._lot.unpark_all()

    def _is_taken(self, take: Callable[[_Piece], bool], piece: _Piece) -> bool:
        """Whether the task has it without being woken. What goes wrong there is that task's affair."""
        try:
            return take(piece)
        except Exception as error:
            self._trouble = error
            return False

    def end(self, address: str = "") -> None:
        """It is complete; `address`: where that which was uploaded is."""
        self._address = address
        self._ended = True
        self._lot.unpark_all()

    def fail(self, broken: ExchangeBroken) -> None:
        if not self.is_over:
            self._broken = broken
            self._lot.unpark_all()

    async def head(self) -> Head:
        """Wait for the response's head. Raises ExchangeBroken."""
        await self._wait_begun()
        if self._head is None:
            raise ExchangeBroken("network", "the response ended before it began")
        return self._head

    async def address(self) -> str:
        """Wait for where an upload has gone; "" when there is a response instead. Raises ExchangeBroken."""
        await self._wait_begun()
        if not self._address:
            await self.head()
        return self._address

    async def _wait_begun(self) -> None:
        while self._head is None and not self._ended:
            if self._broken:
                raise self._broken
            await self._lot.park()

    async def receive(self, take: Callable[[bytes], bool] | None = None) -> bytes:
        """All bytes that have arrived since, at least one; b"" at the end. Raises ExchangeBroken.

        Raises Refused, once, where the head was not accepted: what comes after that is the refusal's body.
        While this waits, bytes may go to `take` as they arrive, in the bridge's own step, which spares a task
        switch. Those for which it returns False, and all that come after them, are for this to return.
        """
        self._take = take
        try:
            while (self._accept or not self._chunks) and not self._trouble and not self._refused:
                if self._broken:
                    raise self._broken
                if self._ended and self._accept:
                    raise ExchangeBroken("network", "the response ended before it began")
                if self._ended:
                    return b""
                await self._lot.park()
        finally:
            self._take = None
        if self._trouble:
            raise self._trouble
        if self._refused:
            head, self._refused = self._refused, None
            raise Refused(head)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        return data


def _unmask(payload: bytes, key: bytes) -> bytes:
    """RFC 6455, section 5.3; as one number, since a loop would cost more than all else together."""
    size = len(payload)
    mask = key * (size // 4) + key[: size % 4]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")


class FrameLane(trio.abc.Stream):
    """The stream below a bridge's WebSocket: takes out the frames that are many, and lets all others pass.

    Those are whole messages in one frame, from the tab and to it. The library has what is rare: the
    handshake, messages in fragments, pings and closes, and whatever breaks the protocol. For each message it
    would take two task switches and ten times the work. As long as it has one that it has not handed out, all
    that come after it pass, too.

    Where messages come thick and fast, each read waits for some to gather: what a read and a turn of the
    event loop cost is then shared by many. A tab that sends less than that is read at once.
    """

    READ_BYTES = 1 << 18
    # The userscript's frames stay below this; a longer one is the library's to take or to refuse.
    LONGEST_BYTES = 1 << 20
    # A frame's first byte, by RFC 6455, 5.2: its opcode, and whether it is its message's last.
    TEXT, BINARY, CLOSE, PING, PONG, FINAL = 0x01, 0x02, 0x08, 0x09, 0x0A, 0x80
    OPCODES: ClassVar = {0x00, TEXT, BINARY, CLOSE, PING, PONG}
    WIDE_LENGTHS: ClassVar = {126: struct.Struct(">H"), 127: struct.Struct(">Q")}
    # So many messages within this time are many (one quick client after the other comes to ten); and so long
    # they may gather, which nobody sees.
    MANY, GATHER_SECONDS = 16, 0.005

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        # What cannot be told or taken yet, and how long it has to be for that.
        self._rest = bytearray()
        self._needed = 0
        # How much of a frame that passes is still to come, and whether its message goes on after it.
        self._passing = 0
        self._is_fragmented = False
        # Whether a frame has passed that ends the connection: nothing is heard after it.
        self._is_over = False
        # The handshake as far as it has come, and whether it was answered: from then on there are frames.
        self._handshake = bytearray()
        self._opened = trio.Event()
        # How many messages have passed that the library has not handed out yet.
        self._passed = 0
        # Takes a message, and whether it is text; says whether it did. Until there is one, everything passes.
        self.take: Callable[[bytes, bool], bool] | None = None
        # Since when messages are counted, and how many have been taken.
        self._counted_since, self._taken = -math.inf, 0
        # One at a time: the library's frames and ours. Nothing is sent after a close.
        self._sending = trio.Lock()
        self._has_closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes that are the library's; b"" at the end."""
        if not self._opened.is_set():
            if not self._handshake.endswith(b"\r\n\r\n"):
                return await self._receive_handshake()
            await self._opened.wait()
            if passed := self._sift(bytes(self._rest)):
                return passed
        while data := await self._stream.receive_some(self.READ_BYTES):
            self._rest += data
            if len(self._rest) >= self._needed and (passed := self._sift(bytes(self._rest))):
                return passed
            await self._let_gather()
        return b""

    async def _receive_handshake(self) -> bytes:
        """The next of the handshake. Frames that came with it wait: the library would let them lie."""
        data = bytes(await self._stream.receive_some(self.READ_BYTES))
        before = len(self._handshake)
        head, end, frames = bytes(self._handshake + data).partition(b"\r\n\r\n")
        self._handshake[:] = head + end
        self._rest[:] = frames
        return data[: len(self._handshake) - before]

    def open(self) -> None:
        """The handshake was answered."""
        self._opened.set()

    async def _let_gather(self) -> None:
        now = trio.current_time()
        if self._taken >= self.MANY:
            self._counted_since, self._taken = now, 0
            await trio.sleep(self.GATHER_SECONDS)
        elif now - self._counted_since > self.GATHER_SECONDS:
            self._counted_since, self._taken = now, 0

    def note_handed_out(self) -> None:
        """The library has handed out a message."""
        self._passed = max(0, self._passed - 1)

    def _sift(self, data: bytes) -> bytes:
        """Take out what is whole, keep what cannot be told yet, and return what passes."""
        at = min(self._passing, len(data))
        self._passing -= at
        self._needed = 0
        passed = data[:at]
        while at < len(data):
            self._is_over |= self._is_broken(data[at : at + 2])
            if self._is_over:
                passed, at = passed + data[at:], len(data)
                break
            head = self._head(data, at)
            if head is None:
                break
            payload_at, end = head
            is_fast = self._is_fast(data[at], end - payload_at)
            if is_fast and end > len(data):
                self._needed = end - at
                break  # As a whole it can be taken.
            if is_fast and self.take:
                message = _unmask(data[payload_at:end], data[payload_at - 4 : payload_at])
                if self.take(message, not data[at] & self.BINARY):
                    self._taken += 1
                    at = end
                    continue
            self._note_passing(data[at])
            passed += data[at:end]
            self._passing = max(0, end - len(data))
            at = min(end, len(data))
        self._rest = bytearray(data[at:])
        return passed

    def _is_broken(self, start: bytes) -> bool:
        """Whether a frame that starts so makes the library end the connection, maybe before it is whole."""
        opcode, is_final = start[0] & ~self.FINAL, start[0] >= self.FINAL
        is_control = opcode >= self.CLOSE
        if opcode not in self.OPCODES or (is_control and not is_final):
            return True
        if len(start) < 2:
            return False
        is_masked, length = start[1] >= 0x80, start[1] & 0x7F
        return not is_masked or (is_control and length > 125)

    def _head(self, data: bytes, at: int) -> tuple[int, int] | None:
        """Where a frame's payload begins and ends; None when too little of the frame is there to tell."""
        if len(data) < at + 2:
            return None
        length, payload_at = data[at + 1] & 0x7F, at + 6
        if wide := self.WIDE_LENGTHS.get(length):
            if len(data) < at + 2 + wide.size:
                return None
            [length] = wide.unpack_from(data, at + 2)
            payload_at += wide.size
        return (payload_at, payload_at + length) if len(data) >= payload_at else None

    def _is_fast(self, first: int, length: int) -> bool:
        is_whole = first in (self.FINAL | self.TEXT, self.FINAL | self.BINARY) and not self._is_fragmented
        return is_whole and not self._passed and length <= self.LONGEST_BYTES

    def _note_passing(self, first: int) -> None:
        """Pings and pongs may come between a message's frames; what else is no part of one ends it all."""
        opcode = first & ~self.FINAL
        if opcode in (self.TEXT, self.BINARY):
            self._is_fragmented = first < self.FINAL
            self._passed += 1
        elif first not in (self.FINAL | self.PING, self.FINAL | self.PONG):
            self._is_over |= opcode != 0 or not self._is_fragmented
            self._is_fragmented = first < self.FINAL

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the library sends: the handshake's answer, pongs, a close."""
        async with self._sending:
            self._has_closed |= self._opened.is_set() and data[0] == self.FINAL | self.CLOSE
            await self._stream.send_all(data)

    async def send_texts(self, texts: Iterable[bytes]) -> None:
        """Send messages, each in one frame, all in one piece."""
        frames = b"".join([self._frame(text) for text in texts])
        async with self._sending:
            if not self._has_closed:
                await self._stream.send_all(frames)

    def _frame(self, text: bytes) -> bytes:
        first, size = self.FINAL | self.TEXT, len(text)
        if size < 126:
            return bytes((first, size)) + text
        wide = 126 if size < 1 << 16 else 127
        return bytes((first, wide)) + self.WIDE_LENGTHS[wide].pack(size) + text

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


# What a page may report after what. A page says hello once; nothing comes before it.
BRIDGE_FRAMES: dict[str, frozenset[str]] = {
    "new": frozenset({"hello"}),
    "open": frozenset({"state", "models", "captured", "response", "error", "end", "uploaded", "pong"}),
    "closed": frozenset(),
}


class Bridge:
    """One connected tab."""

    def __init__(
        self, bridge_id: int, connection: trio_websocket.WebSocketConnection, lane: FrameLane
    ) -> None:
        self.id = bridge_id
        self.connected_at = datetime.now(UTC)
        self.script = self.url = ""
        self.features: frozenset[str] = frozenset()
        self.account: str | None = None
        # Of answers received, and of frames sent.
        self.received_bytes = self.sent_bytes = 0
        self.reported: PageState = "loading"
        # What the site's answers say of the page, until it reports again.
        self.overruled: PageState | None = None
        self._phase = "new"
        self._connection, self._lane = connection, lane
        self._outbox, self._outgoing = trio.open_memory_channel[Frame](math.inf)
        self._exchanges: dict[int, Exchange] = {}
        # Where those wait who wait for exchanges to end.
        self._left = trio.lowlevel.ParkingLot()
        self._ids = itertools.count(1)
        self._heard_at = trio.current_time()
        self._failure: Exception | None = None

    def __repr__(self) -> str:
        return f"<Bridge {self.id}: {self.state}, {self.in_flight} in flight>"

    @property
    def state(self) -> PageState:
        return self.overruled or self.reported

    @property
    def is_ready(self) -> bool:
        return self._phase == "open" and self.state == "ready" and self.account is not None

    @property
    def can_upload(self) -> bool:
        """Whether its script knows the command. An older one would not answer it."""
        return "upload" in self.features

    @property
    def in_flight(self) -> int:
        return len(self._exchanges)

    async def wait_streamed(self) -> None:
        """Wait until no answer is arriving: one that was broken off would not be sent again."""
        while any(exchange.is_streaming for exchange in self._exchanges.values()):
            await self._left.park()

    def send(self, frame: Frame) -> None:
        """Put a frame in the outbox. A bridge that is gone swallows it: its exchanges have failed already."""
        try:
            self._outbox.send_nowait(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("Tab %d is gone; a %s frame was dropped", self.id, type(frame).__name__)

    def fetch(
        self,
        method: Literal["POST", "PUT"],
        path: str,
        body: str,
        accept: Callable[[Head], bool] | None = None,
    ) -> AbstractContextManager[Exchange]:
        """Relay a fetch. Leaving the block before the response has ended aborts it in the browser.

        `accept`: see `Exchange`.
        """
        return self._carry_out(Fetch(next(self._ids), method, path, body), accept)

    def upload(self, image: Attachment) -> AbstractContextManager[Exchange]:
        """Bring an image to the site's storage. Leaving the block before it is there aborts it likewise."""
        return self._carry_out(Upload(next(self._ids), image.name, image.content_type, image.data))

    @contextmanager
    def _carry_out(
        self, frame: Fetch | Upload, accept: Callable[[Head], bool] | None = None
    ) -> Iterator[Exchange]:
        exchange = Exchange(frame.id, accept)
        self._exchanges[exchange.id] = exchange
        if self._phase == "closed":
            exchange.fail(ExchangeBroken("lost", "the tab was lost"))
        self.send(frame)
        del frame  # It may carry megabytes, which need not stay here until the answer ends.
        try:
            yield exchange
        finally:
            if self._exchanges.pop(exchange.id, None) and exchange.is_running_there:
                self.send(Abort(exchange.id))
            self._left.unpark_all()

    async def carry(self, heartbeat_seconds: float, on_frame: Callable[[BrowserFrame], None]) -> str:
        """Read, write and beat until the connection ends; returns why it did.

        Hands `on_frame` what it cannot use.
        """
        reason = f"no sign of life for {2 * heartbeat_seconds:g} s"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._beat, heartbeat_seconds, nursery.cancel_scope)
                reason = await self._read(on_frame)
                nursery.cancel_scope.cancel()
            return reason
        finally:
            self._phase = "closed"
            self._outgoing.close()
            for exchange in self._exchanges.values():
                exchange.fail(ExchangeBroken("lost", "the tab was lost"))
            self._exchanges.clear()

    def _hear(self, message: str | bytes, on_frame: Callable[[BrowserFrame], None]) -> None:
        """Take a message to where it belongs. Raises ProtocolError."""
        self._heard_at = trio.current_time()
        if isinstance(message, bytes):
            self.received_bytes += len(message)
            for exchange_id, data in split_records(message):
                if exchange := self._exchanges.get(exchange_id):
                    exchange.feed(data)
        elif frame := decode_frame(message):
            self._dispatch(frame, on_frame)
        else:
            log.warning("Tab %d sent a frame of an unknown type: %.80s", self.id, message)

    def _take(self, on_frame: Callable[[BrowserFrame], None], message: bytes, is_text: bool) -> bool:
        """Take a message from the lane. One that breaks something passes: `_read` raises what it raised."""
        try:
            self._hear(message.decode() if is_text else message, on_frame)
        except Exception as error:
            self._failure = error
        return self._failure is None

    async def _read(self, on_frame: Callable[[BrowserFrame], None]) -> str:
        self._lane.take = functools.partial(self._take, on_frame)
        try:
            while True:
                message = await self._connection.get_message()
                self._lane.note_handed_out()
                if self._failure:
                    raise self._failure
                self._hear(message, on_frame)
        except trio_websocket.ConnectionClosed as closed:
            return (
                f"code {closed.reason.code} {closed.reason.reason or ''}".rstrip() if closed.reason else "cut"
            )
        except ProtocolError as error:
            with trio.move_on_after(CLOSE_TIMEOUT_SECONDS):
                await self._connection.aclose(error.close_code, str(error)[:100])
            return str(error)

    def _dispatch(self, frame: BrowserFrame, on_frame: Callable[[BrowserFrame], None]) -> None:
        kind = str(type(frame).__struct_config__.tag)
        if kind not in BRIDGE_FRAMES[self._phase]:
            raise ProtocolError(f"unexpected frame: {kind!r} from a bridge that is {self._phase}")
        self._phase = "open"
        if isinstance(frame, Head | End | Uploaded | Broken):
            exchange = self._exchanges.get(frame.id)
            if exchange is None:
                return  # It was aborted, and this crossed the abort on the way.
            if isinstance(frame, Head):
                exchange.begin(frame)
            elif isinstance(frame, End):
                exchange.end()
            elif isinstance(frame, Uploaded):
                exchange.end(frame.url)
            else:
                exchange.fail(ExchangeBroken(frame.reason, frame.message))
        elif not isinstance(frame, Pong):
            on_frame(frame)

    async def _write(self) -> None:
        try:
            async for frame in self._outgoing:
                frames = [frame]
                while self._outgoing.statistics().current_buffer_used:
                    frames.append(self._outgoing.receive_nowait())
                texts = [msgspec.json.encode(frame) for frame in frames]
                self.sent_bytes += sum(map(len, texts))
                await self._lane.send_texts(texts)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("Tab %d closed while the program was writing", self.id)

    async def _beat(self, seconds: float, connection_scope: trio.CancelScope) -> None:
        """Ping, and give up a connection that was silent for two beats: its other end may be gone."""
        while trio.current_time() - self._heard_at < 2 * seconds:
            await trio.sleep(seconds)
            self.send(Ping(round(time.time(), 3)))
        connection_scope.cancel()


class RateLimitGate:
    """One per account: a 429 closes it for everyone.

    When its time is over it lets one request through as a probe; the others follow when the site took it.
    Without a Retry-After it stays closed for 5 s, doubling to 5 min. Each closing halves the pace at which
    requests went out before it; each request that the site takes raises it by a tenth, until it is free.
    """

    FIRST_SECONDS, LAST_SECONDS = 5.0, 300.0
    # In requests a second: what is never gone below, and above what there is no more to hold back.
    SLOWEST, FREE = 1.0, 20.0
    # How far back the pace is looked for.
    MEASURED_SECONDS = 10.0

    def __init__(self, changed: trio.lowlevel.ParkingLot) -> None:
        """`changed`: where those wait who want to go through it, or through another."""
        self._opens_at = self._next_at = -math.inf
        self._refusals = 0
        self._probe: Lease | None = None
        self._changed = changed
        self._starts: deque[float] = deque(maxlen=500)
        self.pace = math.inf

    def __repr__(self) -> str:
        return f"<RateLimitGate: {'open' if self.is_open else f'closed for {self.seconds:.1f} s'}>"

    @property
    def is_open(self) -> bool:
        return self.seconds <= 0 and (not self._refusals or self._probe is None)

    @property
    def seconds(self) -> float:
        """How long it stays closed, at least."""
        opens_at = max(self._opens_at, self._next_at) if self._refusals else self._next_at
        return max(0.0, opens_at - trio.current_time())

    def enter(self, lease: Lease) -> None:
        """Go through an open gate; the first after a refusal is the probe."""
        now = trio.current_time()
        self._starts.append(now)
        self._next_at = now + 1 / self.pace
        if self._refusals:
            self._probe = lease

    def leave(self, lease: Lease) -> None:
        """The exchange is over, however it ended: a probe without a result makes place for the next."""
        if self._probe is lease:
            self._probe = None
            self._changed.unpark_all()

    def accept(self, lease: Lease) -> None:
        """The site took a request. Only the probe's opens the gate: others were sent before it closed."""
        self.pace = self.pace * 1.1 if self.pace * 1.1 < self.FREE else math.inf
        if self._probe is lease:
            self._refusals = 0
            self._changed.unpark_all()

    def refuse(self, retry_after_seconds: float | None) -> float:
        """The site answered 429. Returns for how many seconds the gate is closed now."""
        if not self._refusals or trio.current_time() >= self._opens_at:
            self._refusals += 1
            self._slow_down()
        doubled = min(self.LAST_SECONDS, self.FIRST_SECONDS * 2 ** min(self._refusals - 1, 10))
        # "At once" is taken for a second: a site that refuses has not meant a tight loop.
        seconds = doubled if retry_after_seconds is None else max(1.0, retry_after_seconds)
        self._opens_at = max(self._opens_at, trio.current_time() + seconds)
        self._changed.unpark_all()
        return self.seconds

    def _slow_down(self) -> None:
        since = trio.current_time() - self.MEASURED_SECONDS
        measured = sum(start > since for start in self._starts) / self.MEASURED_SECONDS
        self.pace = max(self.SLOWEST, min(self.pace, measured) / 2)

    def describe(self, account: str) -> dict[str, object]:
        """What the dashboard shows of it."""
        return {
            "account": account,
            "seconds": 0 if self.is_open else math.ceil(self.seconds),
            "pace": None if self.pace == math.inf else round(self.pace, 1),
        }


class Obstacle(msgspec.Struct, frozen=True):
    """Why nothing can be sent now, and what the person should do."""

    state: str
    advice: str
    status: int
    code: str

    def error(self) -> BridgeError:
        retry_after = 5 if self.status == 503 else None
        return BridgeError(self.advice, status=self.status, code=self.code, retry_after=retry_after)


OBSTACLES = {
    "missing": Obstacle(
        "missing",
        "No LMArena tab is connected: open the site in the browser that has the userscript.",
        503,
        "bridge_unavailable",
    ),
    "loading": Obstacle("loading", "The LMArena tab is still loading.", 503, "bridge_unavailable"),
    "verification": Obstacle(
        "verification",
        "The site wants its human check passed: go to the LMArena tab and pass it.",
        403,
        "human_verification_required",
    ),
    "sign_in": Obstacle(
        "sign_in",
        "The site wants a sign-in: go to the LMArena tab, accept its terms or sign in (or reload it).",
        403,
        "sign_in_required",
    ),
}


MISSING = OBSTACLES["missing"]


def _origin_pattern(origin: str) -> re.Pattern[str]:
    """An allowed origin as a pattern: `*` stands for one or more labels of a host name, nothing else."""
    return re.compile(re.escape(origin).replace(r"\*", r"[a-z0-9-]+(?:\.[a-z0-9-]+)*"), re.IGNORECASE)


class Bridges:
    """All connected tabs: who may carry what, and what is waited for while none can."""

    def __init__(self, config: Config, bus: EventBus, pool: SessionPool) -> None:
        self._config, self._bus, self._pool = config, bus, pool
        self._bridges: dict[int, Bridge] = {}
        # Where those wait whom a change of any tab or gate concerns.
        self._changed = trio.lowlevel.ParkingLot()
        self._gates = defaultdict[str, RateLimitGate](lambda: RateLimitGate(self._changed))
        # Where reloads wait for their minute; the listener's.
        self.nursery: trio.Nursery | None = None
        self._missing_since = trio.current_time()
        # A reload that a challenge asked for: until then a missing tab counts as being at the check.
        self._at_check_until = -math.inf
        self._reloaded_at = -math.inf
        self._reload_turn = trio.Lock()
        self._stale_accounts: set[str] = set()
        # Since the start; bytes of tabs that have gone.
        self.rate_limited = self.reloads = 0
        self._received_bytes = self._sent_bytes = 0

    def __iter__(self) -> Iterator[Bridge]:
        return iter(self._bridges.values())

    def __repr__(self) -> str:
        return f"<Bridges: {[*self]}>"

    def add(self, bridge: Bridge, url: str, state: PageState, account: str | None) -> None:
        """A tab has said hello."""
        self._bridges[bridge.id] = bridge
        self._at_check_until = -math.inf
        self._bus.publish(BridgeConnected(bridge.id, bridge.script, url))
        self.note_state(bridge, state, account)

    def remove(self, bridge: Bridge, reason: str) -> None:
        """A connection is over, whether it ever said hello or not."""
        self._received_bytes += bridge.received_bytes
        self._sent_bytes += bridge.sent_bytes
        if self._bridges.pop(bridge.id, None):
            self._bus.publish(BridgeLost(bridge.id, reason))
            if not self._bridges:
                self._missing_since = trio.current_time()
            self._notify()
        else:
            self._bus.publish(BridgeRefused(reason))

    def note_state(self, bridge: Bridge, state: PageState, account: str | None) -> None:
        bridge.reported, bridge.account, bridge.overruled = state, account, None
        if state == "ready" and account is None:
            bridge.overruled = "sign_in"
        self._announce(bridge)

    def _announce(self, bridge: Bridge) -> None:
        obstacle = OBSTACLES.get(bridge.state)
        advice = obstacle.advice if obstacle else ""
        self._bus.publish(BridgeChanged(bridge.id, bridge.state, bridge.account, advice))
        self._notify()

    def _notify(self) -> None:
        self._pool.set_accounts(self.accounts())
        self._changed.unpark_all()

    def accounts(self) -> set[str]:
        """The accounts that have a ready tab."""
        return {bridge.account for bridge in self if bridge.is_ready and bridge.account is not None}

    def gate(self, account: str) -> RateLimitGate:
        return self._gates[account]

    def ready(self, accounts: Iterable[str]) -> list[Bridge]:
        """The ready bridges of these accounts, the least busy first."""
        wanted = set(accounts)
        ready = [bridge for bridge in self if bridge.is_ready and bridge.account in wanted]
        return sorted(ready, key=lambda bridge: bridge.in_flight)

    def obstacle(self) -> Obstacle | None:
        """Why nothing can be sent now; None while some tab is ready."""
        states = {bridge.state for bridge in self}
        if any(bridge.is_ready for bridge in self):
            return None
        if not states and trio.current_time() < self._at_check_until:
            return OBSTACLES["verification"]
        return next(
            (OBSTACLES[state] for state in ("verification", "sign_in", "loading") if state in states), MISSING
        )

    async def wait_ready(self, person_wait_seconds: float) -> None:
        """Wait until some tab is ready. Raises BridgeError when that takes too long.

        A missing tab may be away for `bridge.reconnect_grace_seconds`, from when it went on. The person has
        `person_wait_seconds` from now; infinity waits for the tab, too, as long as it takes.
        """
        began_at = trio.current_time()
        while obstacle := self.obstacle():
            deadline = began_at + person_wait_seconds
            if obstacle is MISSING and person_wait_seconds < math.inf:
                grace_ends_at = self._missing_since + self._config.bridge.reconnect_grace_seconds
                deadline = max(grace_ends_at, trio.current_time())
            elif obstacle is not MISSING and not self._bridges:
                deadline = min(deadline, self._at_check_until)
            with trio.move_on_at(deadline) as patience:
                await self._changed.park()
            if patience.cancelled_caught and self.obstacle() is obstacle:
                raise obstacle.error()

    async def wait_changed(self) -> None:
        """Wait until anything is different at a tab or a gate."""
        await self._changed.park()

    def note_challenge(self, bridge: Bridge) -> None:
        """The site wants its check: loading the page lets it run; passing it is the person's business."""
        if bridge.overruled != "verification":
            bridge.overruled = "verification"
            self._announce(bridge)
            self._ask_reload(bridge, "the site wants its human check")

    def note_signed_out(self, bridge: Bridge, account: str) -> None:
        """The site answered 401: the page's sign-in is stale, if the page does not know it already.

        A reload may renew it, once; then the person must.
        """
        if bridge.is_ready and bridge.account == account:
            bridge.overruled = "sign_in" if account in self._stale_accounts else "loading"
            self._announce(bridge)
            if account not in self._stale_accounts:
                self._stale_accounts.add(account)
                self._ask_reload(bridge, "the page's sign-in is stale")

    def note_accepted(self, account: str, lease: Lease) -> None:
        """The site took a request: the account's sign-in is good, and its rate limit may be over."""
        self._stale_accounts.discard(account)
        self.gate(account).accept(lease)

    def note_rate_limit(self, account: str, retry_after_seconds: float | None) -> None:
        self.rate_limited += 1
        was_open = self.gate(account).is_open
        seconds = self.gate(account).refuse(retry_after_seconds)
        if was_open:
            self._bus.publish(RateLimited(account, seconds))

    def _ask_reload(self, bridge: Bridge, reason: str) -> None:
        """Ask for a reload now or, since at most one a minute is asked for, as soon as that is over."""
        assert self.nursery is not None
        self.nursery.start_soon(self._reload, bridge, reason)

    async def _reload(self, bridge: Bridge, reason: str) -> None:
        # One at a time: two tabs that wait must not both find the minute over.
        async with self._reload_turn:
            await trio.sleep_until(self._reloaded_at + RELOAD_INTERVAL_SECONDS)
            # Loading the page breaks off what still streams through it: that may end first, if it does soon.
            with trio.move_on_after(RELOAD_PATIENCE_SECONDS):
                await bridge.wait_streamed()
            if bridge.id not in self._bridges or not bridge.overruled:
                return
            self._reloaded_at = trio.current_time()
            if bridge.overruled == "verification":
                self._at_check_until = self._reloaded_at + self._config.requests.person_wait_seconds
            self.reloads += 1
            bridge.send(Reload(reason))

    def refresh_models(self) -> int:
        """Ask every tab for its model list. Returns how many were asked."""
        for bridge in self:
            bridge.send(SendModels())
        return len(self._bridges)

    def snapshot(self) -> list[dict[str, object]]:
        """The `bridges` part of /api/state."""
        return [
            {
                "id": bridge.id,
                "state": bridge.state,
                "account": bridge.account,
                "script": bridge.script,
                "connected_at": bridge.connected_at.isoformat(timespec="seconds"),
                "in_flight": bridge.in_flight,
                "url": bridge.url,
            }
            for bridge in self
        ]

    def describe_gates(self) -> list[dict[str, object]]:
        """The accounts that a 429 holds back: for how long, and at how many requests a second after that."""
        gates = self._gates.items()
        return [gate.describe(account) for account, gate in gates if not gate.is_open or gate.pace < math.inf]

    @property
    def received_bytes(self) -> int:
        """Of answers, from all tabs since the start."""
        return self._received_bytes + sum(bridge.received_bytes for bridge in self)

    @property
    def sent_bytes(self) -> int:
        """Of frames, to all tabs since the start."""
        return self._sent_bytes + sum(bridge.sent_bytes for bridge in self)


class BridgeListener:
    """Takes connections, and takes their frames to where they belong."""

    def __init__(self, config: Config, bus: EventBus, pool: SessionPool, bridges: Bridges) -> None:
        self._config, self._bus, self._pool, self._bridges = config, bus, pool, bridges
        self._ids = itertools.count(1)
        self._nursery: trio.Nursery | None = None
        self._origins = [_origin_pattern(pattern) for pattern in config.bridge.allowed_origins]

    async def serve(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen for tabs; `started` with the port. Raises OSError when the port cannot be had."""
        async with trio.open_nursery() as nursery:
            self._nursery = self._bridges.nursery = nursery
            host, port = self._config.bridge.host, self._config.bridge.port
            listeners = await trio.open_tcp_listeners(port, host=host)
            await nursery.start(trio.serve_listeners, self._accept, listeners)
            task_status.started(listeners[0].socket.getsockname()[1])
            await trio.sleep_forever()

    async def _accept(self, stream: trio.SocketStream) -> None:
        """One connection: whatever breaks in it, in the library's reader too, nothing else does."""
        try:
            async with trio.open_nursery() as nursery:
                lane = FrameLane(stream)
                with trio.fail_after(HELLO_TIMEOUT_SECONDS):
                    handshake = await trio_websocket.wrap_server_stream(
                        nursery, lane, message_queue_size=64, max_message_size=MAX_FRAME_BYTES
                    )
                await self._carry(handshake, lane)
                nursery.cancel_scope.cancel()
        except Exception as error:
            leaf = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            self._bus.publish(BridgeRefused(f"the connection broke before it was one ({leaf!r})"))

    async def _carry(self, handshake: trio_websocket.WebSocketRequest, lane: FrameLane) -> None:
        """One connection's life."""
        origins = [value.decode("latin-1") for name, value in handshake.headers if name.lower() == b"origin"]
        if len(origins) != 1 or not any(pattern.fullmatch(origins[0]) for pattern in self._origins):
            self._bus.publish(
                BridgeRefused(f"origin {', '.join(origins) or 'missing'} is not in allowed_origins")
            )
            await handshake.reject(403)
            return
        connection = await handshake.accept()
        lane.open()
        bridge = Bridge(next(self._ids), connection, lane)
        reason = "the program stopped"
        try:
            with trio.CancelScope() as hello:
                hello.deadline = trio.current_time() + HELLO_TIMEOUT_SECONDS
                heartbeat_seconds = self._config.bridge.heartbeat_seconds
                reason = await bridge.carry(
                    heartbeat_seconds, functools.partial(self._take_frame, bridge, hello)
                )
            if hello.cancelled_caught:
                reason = "no hello"
        except Exception:
            reason = "an error in the program"
            log.exception("A bridge broke; the others go on")
        finally:
            self._bridges.remove(bridge, reason)
            # When the program stops, the connection's reader has stopped, too: no answer to our close frame
            # would be heard.
            is_stopping = trio.current_effective_deadline() == -math.inf
            seconds = FAREWELL_SECONDS if is_stopping else CLOSE_TIMEOUT_SECONDS
            with trio.move_on_after(seconds, shield=True):
                await connection.aclose()

    def _take_frame(self, bridge: Bridge, hello: trio.CancelScope, frame: BrowserFrame) -> None:
        if isinstance(frame, Hello):
            hello.deadline = math.inf
            self._welcome(bridge, frame)
        elif isinstance(frame, State):
            self._bridges.note_state(bridge, frame.state, frame.account)
        elif isinstance(frame, Models):
            self._merge_models(frame.models)
        elif isinstance(frame, Captured):
            assert self._nursery is not None
            self._nursery.start_soon(self._capture, frame)

    def _welcome(self, bridge: Bridge, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            message = f"protocol {hello.protocol} is not {PROTOCOL}: reinstall the userscript"
            raise ProtocolError(message, 4001)
        state = next((state for state in PAGE_STATES if state == hello.state), None)
        if state is None:
            raise ProtocolError(f"unknown state: {hello.state!r}")
        bridge.script, bridge.url, bridge.features = hello.script, hello.url, frozenset(hello.features)
        heartbeat_seconds = self._config.bridge.heartbeat_seconds
        bridge.send(Welcome(PROTOCOL, VERSION, self._config.arena.auth_cookie, heartbeat_seconds))
        self._bridges.add(bridge, hello.url, state, hello.account)
        if hello.script != VERSION:
            self._bus.publish(ScriptOutdated(bridge.id, hello.script, VERSION))

    def _merge_models(self, entries: list[Any]) -> None:
        models = []
        for entry in entries:
            try:
                models.append(Model.from_entry(entry))
            except ValueError as error:
                log.warning("The page's model list has an entry that is no model: %s", error)
        changed = self._pool.merge_models(models)
        self._pool.catalog.note_page(models)
        self._bus.publish(ModelsListed(len(models), len(changed)))

    async def _capture(self, frame: Captured) -> None:
        """Take a conversation that the person opened or continued by hand into the pool."""
        session = self._pool.find(frame.session_id)
        # Of a battle nobody is to know the models.
        position = frame.position if frame.mode in ("battle", "side-by-side") else None
        is_fit = frame.mode == "direct" or (frame.mode == "side-by-side" and self._config.pool.use_battles)
        if session and session.account == frame.account:
            await self._pool.continue_by_hand(session, frame.message_id, position)
        elif not is_fit or frame.model_id is None or frame.account is None:
            log.info("A conversation by hand is not for the pool: %s, mode %s", frame.session_id, frame.mode)
        elif self._pool.catalog.get(frame.model_id) is None:
            log.info("A conversation by hand has a model that is left out: %s", frame.model_id)
        elif session is None:
            ids = (frame.session_id, frame.message_id, frame.model_id, frame.account)
            await self._pool.add(Session(*ids, source="captured", created_at=time.time(), position=position))


# ==========================================================================================================
# Relay
# ==========================================================================================================
#
# Theory. The relay answers one request: it waits for the model's token, then until a tab is ready, and then
# attempts the exchange until there is an answer or a reason to stop. Who wins when two things happen at once:
#
#   - Before an attempt, tab, session and gate are chosen in one breath, without an await; if one of them has
#     gone while another was waited for, the choice is made again.
#   - What has delivered nothing to its client is attempted again; what has delivered something never is. An
#     attempt's failure is a Setback, which says whether trying again is free (the tab was lost, the person is
#     needed, 429, another session may do), counts (the site failed), or is pointless.
#   - A session that the site no longer knows is retired at once, and the request goes on with another.
#   - A new conversation joins the pool when its answer has ended well, is on disk before it is told of, and
#     is not lost to a cancellation between the two.
#   - Leaving the exchange, for whatever reason, aborts the fetch in the browser; leaving `answer` frees
#     session and token. A sink that has enough (a stop string, a token limit) is such a reason; a
#     conversation whose first answer was aborted so has no message to retry, and does not join the pool.
#   - An answer's text, where nothing is to be done with it but to show it, goes to its sink in the bridge's
#     own step, as it arrives, and only while the attempt's task waits for it: so there is one order, and a
#     task switch only for the end and for what may wait. A head that says 200 is taken note of there, too.


class Limits(msgspec.Struct, frozen=True):
    """How long one answer may take, part by part, and how often the site may fail. Infinity is no limit."""

    # For a conversation, and again for the site's limit; the other is for one pause that the site asks for.
    queue_seconds: float
    rate_limit_seconds: float
    first_byte_seconds: float
    idle_seconds: float
    exchange_seconds: float
    total_seconds: float
    person_wait_seconds: float
    attempts: int
    answer_bytes: float = math.inf


class Sink(Protocol):
    """Where an answer goes."""

    async def deliver(self, events: Sequence[AnswerEvent]) -> bool:
        """Take the next events. False when nothing of the answer is wanted any more."""
        ...

    @property
    def takes_now(self) -> bool:
        """Whether text can be delivered without waiting for anything."""
        ...

    def deliver_now(self, text: str) -> None:
        """Take the next text, when that can be done."""
        ...

    def restart(self) -> bool:
        """Forget what was delivered, for another attempt. False when somebody has it already."""
        ...


class Discard:
    """The sink of an answer that nobody reads: bootstrap's."""

    async def deliver(self, events: Sequence[AnswerEvent]) -> bool:
        return True

    @property
    def takes_now(self) -> bool:
        return True

    def deliver_now(self, text: str) -> None:
        pass

    def restart(self) -> bool:
        return True


class Setback(Exception):
    """An attempt brought no answer. `error` is what the client is told if that is the end of it."""

    def __init__(self, course: Literal["free", "pause", "counts", "final"], error: ApiError) -> None:
        super().__init__(error.message)
        self.course, self.error = course, error


# By kind of refusal: the course, and the client's status, code and sentence if it comes to that.
_REFUSALS: dict[str, tuple[Any, int, str, str]] = {
    "challenge": ("free", 403, "human_verification_required", OBSTACLES["verification"].advice),
    "signed_out": ("free", 403, "sign_in_required", OBSTACLES["sign_in"].advice),
    "rate_limited": ("free", 429, "rate_limit_exceeded", "The site limits this account's requests"),
    "running": ("pause", 502, "upstream_error", "The site is still answering this conversation"),
    "gone": ("final", 502, "upstream_error", "The site does not offer this model or conversation"),
    "too_large": (
        "final",
        413,
        "request_too_large",
        "The site refused an attachment or message as too large",
    ),
    "rejected": ("final", 400, "invalid_request", "The site rejected the request"),
    "failed": ("counts", 502, "upstream_error", "The site failed"),
}


def _tell_refusal(refusal: Refusal) -> Setback:
    course, status, code, sentence = _REFUSALS[refusal.kind]
    detail = f": {refusal.reply[:300].strip()}" if refusal.reply.strip() and refusal.reply[:1] != "<" else ""
    fields: dict[str, Any] = {
        "status": status,
        "code": code,
        "arena_status": refusal.status,
        "reply": refusal.reply,
    }
    error = ArenaError(
        f"{sentence} (status {refusal.status}){detail}", retry_after=refusal.retry_after_seconds, **fields
    )
    return Setback(course, error)


def _tell_upload_refusal(refusal: Refusal) -> Setback:
    """The same of an upload: there is no conversation that it could be about."""
    setback = _tell_refusal(refusal)
    if refusal.kind in ("gone", "running", "rejected", "failed"):
        message = f"The site did not take the upload of an image (status {refusal.status})"
        setback.course = "counts" if refusal.kind == "failed" else "final"
        setback.error = ArenaError(message, arena_status=refusal.status, reply=refusal.reply)
    return setback


def _note_refusal(bridges: Bridges, bridge: Bridge, account: str, refusal: Refusal) -> None:
    """What a refusal says of the tab, and of the account that it had when it was sent."""
    if refusal.kind == "challenge":
        bridges.note_challenge(bridge)
    elif refusal.kind == "signed_out":
        bridges.note_signed_out(bridge, account)
    elif refusal.kind == "rate_limited":
        bridges.note_rate_limit(account, refusal.retry_after_seconds)


async def _wait_gate(bridges: Bridges, accounts: Iterable[str], gives_up_at: float) -> None:
    """Wait until the gate of one of these accounts may be open, or any tab or gate is different.

    Raises ArenaError where that is later than `gives_up_at`. It never returns at once: who asks in a loop
    would spin.
    """
    gates = [bridges.gate(account) for account in accounts]
    now, seconds = trio.current_time(), min(gate.seconds for gate in gates)
    if now < gives_up_at and now + seconds <= gives_up_at:
        # A gate whose time is over waits for its probe, which tells.
        opens_at = now + min((gate.seconds for gate in gates if gate.seconds), default=math.inf)
        with trio.move_on_at(min(opens_at, gives_up_at)):
            await bridges.wait_changed()
        if trio.current_time() < gives_up_at or any(gate.is_open for gate in gates):
            return
    seconds = max(1.0, min(gate.seconds for gate in gates))
    message = f"The site limits this account's requests; it takes more in {seconds:.0f} s."
    fields: dict[str, Any] = {"status": 429, "code": "rate_limit_exceeded", "arena_status": 429}
    raise ArenaError(message, retry_after=seconds, **fields)


def _failed_late(course: Literal["counts", "final"], message: str, reply: str = "") -> Setback:
    """The site took the prompt and failed: a client that sends it once more would pay twice."""
    return Setback(course, ArenaError(message, reply=reply, may_retry=False))


def _timed_out(message: str) -> Setback:
    return Setback("final", ArenaError(message, status=504, code="timeout", may_retry=False))


def _tell_broken(broken: ExchangeBroken) -> Setback:
    """A lost tab is waited for; a navigation or a network failure for a while; the rest is final."""
    course: Any = {"lost": "free", "aborted": "pause", "network": "pause"}.get(broken.reason, "final")
    return Setback(course, ArenaError(f"The answer broke off in the tab: {broken}."))


async def _read_reply(exchange: Exchange, limit_bytes: int = 1 << 16) -> bytes:
    """The body of a refusal, as far as it is worth keeping."""
    reply = b""
    while len(reply) < limit_bytes and (data := await exchange.receive()):
        reply += data
    return reply[:limit_bytes]


async def _read_refusal(exchange: Exchange, head: Head) -> Refusal:
    headers = {name.lower(): value for name, value in head.headers.items()}
    return read_refusal(head.status, headers, await _read_reply(exchange))


async def _read_rest(exchange: Exchange) -> None:
    """Let the response end by itself after its last line: a finished answer need not be aborted."""
    if not exchange.is_over:
        with trio.move_on_after(1):
            while await exchange.receive():
                pass


class Pump:
    """Takes an answer from its exchange to its sink, until its end or until the sink has enough.

    Text, which is nearly all of it, is handed on in the step of the bridge that brings it, while the
    attempt's task waits. That task sees to what may wait or ends the answer. `accept` is for the exchange.
    """

    def __init__(self, sink: Sink, lease: Lease, limits: Limits) -> None:
        self._exchange: Exchange
        self._sink, self._lease, self._limits = sink, lease, limits
        position = lease.session.position if lease.session else None
        self._decoder, self._size = ArenaStreamDecoder(position or "a"), 0
        # Since when the site is waited for, and how long it may be.
        self._heard_at = -math.inf
        self._patience = trio.CancelScope()

    def accept(self, head: Head) -> bool:
        """Whether this is the head of an answer; it counts as heard."""
        self._heard_at = trio.current_time()
        return head.status == 200

    async def run(self, exchange: Exchange) -> Finish | None:
        """The good end of the answer, None where the sink had enough.

        Raises Setback, Refused, ExchangeBroken.
        """
        self._exchange = exchange
        while True:
            self._heard_at = trio.current_time()
            data = await self._receive()
            self._count(data)
            try:
                events = self._decoder.feed(data) if data else self._decoder.finish()
            except StreamError as error:
                raise _failed_late("final", f"The site's answer cannot be read: {error}.") from None
            last = events.pop() if self._decoder.is_finished and events else None
            if events:
                if self._lease.first_byte_at is None:
                    self._begin()
                if not await self._sink.deliver(events):
                    return last if isinstance(last, Finish) and last.reason != "error" else None
            if last is not None:
                finish = self._judge_end(last)
                await _read_rest(self._exchange)
                return finish
            if not data:
                raise _failed_late("counts", "The site's answer was cut off.")

    async def _receive(self) -> bytes:
        """What is not text, or cannot be delivered at once; b"" at the end."""
        if not self._exchange.is_silent:
            return await self._exchange.receive()  # A scope costs more than what is done in it without one.
        while True:
            with trio.move_on_at(self._silent_until()) as self._patience:
                return await self._exchange.receive(self._take_now)
            # The deadline stayed where it was while text came in that was handed on at once.
            if trio.current_time() >= self._silent_until():
                seconds = self._silent_until() - self._heard_at
                if not self._exchange.has_begun:
                    raise _timed_out(f"The site sent nothing within {seconds:g} s.")
                raise _timed_out(f"The site fell silent for {seconds:g} s.")

    def _silent_until(self) -> float:
        """When the site has been silent for too long."""
        has_begun = self._lease.first_byte_at is not None
        return self._heard_at + (self._limits.idle_seconds if has_begun else self._limits.first_byte_seconds)

    def _begin(self) -> None:
        """The answer has something to show for the first time."""
        self._lease.first_byte_at = self._heard_at
        self._patience.deadline = self._silent_until()  # It was set for the first byte.

    def _take_now(self, data: bytes) -> bool:
        """Hand on what is text and can be delivered at once; False, and nothing taken, for all else."""
        text = self._decoder.feed_text(data) if self._sink.takes_now else None
        if text is None:
            return False
        self._count(data)
        if text:
            if self._lease.first_byte_at is None:
                self._begin()
            self._sink.deliver_now(text)
        return True

    def _count(self, data: bytes) -> None:
        self._heard_at = trio.current_time()
        self._size += len(data)
        if self._size > self._limits.answer_bytes:
            raise _failed_late(
                "final", f"The site's answer does not end: it has {self._size:,} bytes so far."
            )

    def _judge_end(self, last: AnswerEvent) -> Finish:
        """The good end of an answer; raises Setback for any other."""
        if not isinstance(last, Finish) or last.reason == "error":
            reason = last.message if isinstance(last, Failure) else "its answer ended with an error"
            raise _failed_late("counts", f"The site reported an error: {reason[:300]}", reply=reason)
        # What opens a conversation may be answered with nothing, and so may what the site's moderation stops.
        may_be_empty = self._lease.source == "bootstrap" or last.reason == "content-filter"
        if self._lease.first_byte_at is None and not may_be_empty:
            raise _failed_late("counts", "The site's answer was empty.")
        return last


class Attempt:
    """One exchange for one lease: sent, pumped into the sink, and entered in the pool's books."""

    def __init__(
        self,
        arena: ArenaConfig,
        pool: SessionPool,
        bridges: Bridges,
        bridge: Bridge,
        lease: Lease,
        limits: Limits,
    ) -> None:
        self._arena, self._pool, self._bridges = arena, pool, bridges
        self._bridge, self._lease, self._limits = bridge, lease, limits
        self._account = bridge.account or ""
        # Without a session the exchange opens one, under ids that are ours to choose.
        self._session = lease.session or Session(
            uuid7(), uuid7(), lease.model.id, self._account, lease.source, created_at=time.time()
        )
        self._try = Try(self._session.session_id, bridge.id, lease.seconds())
        lease.tries.append(self._try)

    async def run(self, messages: Sequence[Message], sink: Sink) -> Finish | None:
        """From the request to the pool's bookkeeping; None when the sink had enough. Raises Setback."""
        try:
            # A scope costs more than what is done in it without one; a request has a deadline around it.
            seconds = self._limits.exchange_seconds
            with trio.fail_after(seconds) if seconds < math.inf else nullcontext():
                finish = await self._exchange(messages, sink)
        except trio.TooSlowError:
            message = f"The site did not finish within {self._limits.exchange_seconds:g} s."
            self._try.problem = message
            self._note_failure(message)
            raise _timed_out(message) from None
        except Setback as setback:
            self._try.problem = str(setback)
            if setback.course == "counts" or setback.error.error_code == "timeout":
                self._note_failure(str(setback))
            raise
        finally:
            self._bridges.gate(self._account).leave(self._lease)
            self._try.ended_seconds = self._lease.seconds()
            if self._lease.first_byte_at is not None:
                self._try.first_byte_seconds = self._lease.seconds(self._lease.first_byte_at)
        if self._lease.session:
            self._pool.note_use(self._session)
        elif finish:
            # It exists at the site now: a cancellation must not lose it. The store's own timeout bounds this.
            with trio.CancelScope(shield=True):
                await self._pool.add(self._session)
        return finish

    def _note_failure(self, reason: str) -> None:
        if self._lease.session:
            self._pool.note_failure(self._session, reason)

    def _send(self, messages: Sequence[Message], pump: Pump) -> AbstractContextManager[Exchange]:
        accept = functools.partial(self._accept, pump)
        session_id, message_id = self._session.session_id, self._session.message_id
        if self._lease.session:
            path = self._arena.retry_path.format(session_id=session_id, message_id=message_id)
            position = self._session.position
            body = encode_retry(self._lease.model, messages, session_id, position)
            return self._bridge.fetch("PUT", path, body, accept)
        body = encode_create(self._lease.model, messages, session_id, message_id)
        return self._bridge.fetch("POST", self._arena.create_path, body, accept)

    def _accept(self, pump: Pump, head: Head) -> bool:
        is_accepted = pump.accept(head)
        if is_accepted:
            self._bridges.note_accepted(self._account, self._lease)
        return is_accepted

    async def _exchange(self, messages: Sequence[Message], sink: Sink) -> Finish | None:
        """Send, and pump the answer into the sink."""
        pump = Pump(sink, self._lease, self._limits)
        with self._send(messages, pump) as exchange:
            try:
                return await pump.run(exchange)
            except Refused as refused:
                raise await self._read_refusal(exchange, refused.head) from None
            except ExchangeBroken as broken:
                raise _tell_broken(broken) from None

    async def _read_refusal(self, exchange: Exchange, head: Head) -> Setback:
        with trio.move_on_after(self._limits.first_byte_seconds):
            try:
                return self._take_refusal(await _read_refusal(exchange, head))
            except ExchangeBroken as broken:
                return _tell_broken(broken)
        return _timed_out(f"The site's refusal (status {head.status}) has no end.")

    def _take_refusal(self, refusal: Refusal) -> Setback:
        """Draw the consequences of a refusal; the Setback says how the request goes on."""
        setback = _tell_refusal(refusal)
        _note_refusal(self._bridges, self._bridge, self._account, refusal)
        # What a retry of one of two sides has to be like is not certain: another session tells.
        is_doubtful = refusal.kind == "rejected" and self._session.position is not None
        if (refusal.kind == "gone" or is_doubtful) and self._lease.session:
            self._pool.retire(self._session, f"the site answered {refusal.status}")
            setback.course = "free"
        return setback


class Uploader:
    """Brings images to the site's storage by the page's own upload, before the message with them is sent.

    It holds no session: which one answers is decided after it. So the tab is the least busy one, which will
    probably answer, too; with several accounts it may be another's. The address in the storage is signed, and
    is good whoever names it.
    """

    # An attempt, all in all: 32 MiB at 1 Mbit/s take four and a half minutes.
    ATTEMPT_SECONDS = 300.0
    # Between attempts; there are two.
    PAUSES = (1.0, 5.0)

    def __init__(self, bridges: Bridges) -> None:
        self._bridges = bridges

    def way(self, lease: Lease, limits: Limits) -> UploadImage | None:
        """How a request's images can be uploaded; None while no connected tab has a script that could."""
        tabs = [*self._bridges]
        is_possible = not tabs or any(bridge.can_upload for bridge in tabs)
        return functools.partial(self._upload, lease, limits) if is_possible else None

    async def _upload(self, lease: Lease, limits: Limits, image: Attachment) -> Attachment:
        try:
            with trio.fail_after(limits.total_seconds):
                address = await self._attempt_all(lease, limits, image)
        except trio.TooSlowError:
            message = f"No upload within requests.total_timeout_seconds ({limits.total_seconds:g} s)."
            raise ArenaError(message, status=504, code="timeout") from None
        return msgspec.structs.replace(image, url=address)

    async def _attempt_all(self, lease: Lease, limits: Limits, image: Attachment) -> str:
        failures = 0
        while True:
            bridge = await self._choose(lease, limits)
            try:
                address = await self._attempt(bridge, lease, image)
                told = (lease.request_id, f"{image.size_bytes:,}", bridge.id)
                log.info("Request %s: an image of %s bytes was uploaded in tab %d", *told)
                return address
            except Setback as setback:
                error, course = setback.error, setback.course
            if course == "free":
                continue  # The choice waits for the person, or for the account's gate.
            failures += 1
            if course == "final" or failures >= limits.attempts:
                raise error
            await trio.sleep(self.PAUSES[min(failures, len(self.PAUSES)) - 1])

    async def _choose(self, lease: Lease, limits: Limits) -> Bridge:
        """Pick the bridge, once one may send. Raises NotUploaded when no ready one has a script that can."""
        gives_up_at = math.inf
        while True:
            if self._bridges.obstacle():
                await self._bridges.wait_ready(limits.person_wait_seconds)
                gives_up_at = math.inf
            ready = [each for each in self._bridges.ready(self._bridges.accounts()) if each.can_upload]
            if not ready:
                raise NotUploaded("the userscript in the tab cannot upload larger ones: it has to be updated")
            accounts = [bridge.account or "" for bridge in ready]
            for bridge, account in zip(ready, accounts, strict=True):
                gate = self._bridges.gate(account)
                if gate.is_open:
                    gate.enter(lease)
                    return bridge
            now = trio.current_time()
            gives_up_at = min(gives_up_at, now + limits.queue_seconds)
            await _wait_gate(self._bridges, accounts, min(gives_up_at, now + limits.rate_limit_seconds))

    async def _attempt(self, bridge: Bridge, lease: Lease, image: Attachment) -> str:
        """One upload; returns the address. Raises Setback, or NotUploaded when it is not to be had."""
        account = bridge.account or ""  # Its page may have another one afterwards.
        try:
            with trio.fail_after(self.ATTEMPT_SECONDS), bridge.upload(image) as exchange:
                if address := await exchange.address():
                    return address
                refusal = await _read_refusal(exchange, await exchange.head())
        except ExchangeBroken as broken:
            if broken.reason == "not_offered":
                raise NotUploaded("the site's page offers no upload that could be found in it") from None
            if broken.reason == "refused":
                raise NotUploaded(f"its upload was refused: {broken}") from None
            # A tab that is lost counts, too: it may be the image that it is lost by.
            error = ArenaError(f"The upload of an image broke off in the tab: {broken}.")
            raise Setback("counts", error) from None
        except trio.TooSlowError:
            raise _timed_out(f"The upload of an image took more than {self.ATTEMPT_SECONDS:g} s.") from None
        finally:
            # That the site took it says nothing of the limit of its answers: the gate is left as it was.
            self._bridges.gate(account).leave(lease)
        _note_refusal(self._bridges, bridge, account, refusal)
        raise _tell_upload_refusal(refusal)


class Relay:
    """Answers requests and opens conversations through the bridges."""

    # Pauses between attempts, in seconds; the last one repeats.
    PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)

    def __init__(self, config: Config, pool: SessionPool, bridges: Bridges, bus: EventBus) -> None:
        self._config, self._pool, self._bridges, self._bus = config, pool, bridges, bus
        self.uploader = Uploader(bridges)

    async def answer(
        self, lease: Lease, messages: Sequence[Message], sink: Sink, limits: Limits
    ) -> Finish | None:
        """Answer `messages` into `sink`; returns how the answer ended, None when the sink had enough.

        Raises ApiError.
        """
        try:
            with trio.move_on_after(limits.total_seconds):
                # Before the tab: those who wait for that go in any order, but are four a model at most.
                await self._queue(lease, limits)
                return await self._attempt_all(lease, messages, sink, limits)
            message = f"No answer within requests.total_timeout_seconds ({limits.total_seconds:g} s)."
            raise ArenaError(message, status=504, code="timeout", may_retry=False)
        finally:
            self._pool.release(lease)

    async def _queue(self, lease: Lease, limits: Limits) -> None:
        """Wait for the model's token.

        While that takes, a lost tab ends the wait as it would have before it.
        """
        if self._pool.acquire_nowait(lease):
            return
        try:
            with trio.fail_after(limits.queue_seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_obstacles, limits.person_wait_seconds)
                    await self._pool.acquire(lease)
                    nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            waited = f"All conversations of {lease.model.name} were busy for {limits.queue_seconds:g} s."
            raise ArenaError(waited, status=429, code="queue_timeout", retry_after=5) from None
        except BaseExceptionGroup as group:
            refusal = first_of(group, BridgeError)
        else:
            return
        raise refusal

    async def _watch_obstacles(self, person_wait_seconds: float) -> None:
        while True:
            await self._bridges.wait_ready(person_wait_seconds)
            await self._bridges.wait_changed()

    async def _attempt_all(
        self, lease: Lease, messages: Sequence[Message], sink: Sink, limits: Limits
    ) -> Finish | None:
        failures = pauses = 0
        reason, patience_ends_at = ("", ""), math.inf
        while True:
            bridge = await self._choose(lease, limits)
            if lease.admitted_at is None:
                lease.admitted_at = trio.current_time()
            attempt = Attempt(self._config.arena, self._pool, self._bridges, bridge, lease, limits)
            ids = (lease.request_id, lease.model.name, lease.tries[-1].session_id)
            self._bus.publish(AttemptStarted(*ids, bridge.id, len(lease.tries)))
            try:
                return await attempt.run(messages, sink)
            except Setback as setback:
                error, course = setback.error, setback.course
            self._bus.publish(AttemptFailed(*ids, len(lease.tries), course, error.message))
            if not sink.restart():
                error.may_retry = False
                raise error
            lease.first_byte_at = None
            if (course, error.error_code) != reason:
                reason, patience_ends_at = (course, error.error_code), math.inf
            patience_ends_at = min(patience_ends_at, trio.current_time() + self._patience(*reason, limits))
            failures += course in ("counts", "final")
            if course == "final" or failures >= limits.attempts or trio.current_time() > patience_ends_at:
                if course == "pause" and lease.session:
                    self._pool.note_failure(lease.session, error.message)
                raise error
            if course != "free":
                self._pool.give_back(lease)
                await trio.sleep(self.PAUSES[min(pauses, len(self.PAUSES) - 1)])
                pauses += 1

    def _patience(self, course: str, code: str, limits: Limits) -> float:
        """For how many seconds the same setback may come again and again."""
        if course == "pause":
            return min(limits.queue_seconds, self._config.bridge.reconnect_grace_seconds)
        # The page may load without the check that the site's answers ask for.
        is_persons = code in ("human_verification_required", "sign_in_required")
        return limits.person_wait_seconds if is_persons else math.inf

    async def _choose(self, lease: Lease, limits: Limits) -> Bridge:
        """Pick the bridge, and into the lease the session if there is one, whose account may send now."""
        gives_up_at = math.inf
        while True:
            self._pool.give_back(lease)
            if self._bridges.obstacle():
                await self._bridges.wait_ready(limits.person_wait_seconds)
                gives_up_at = math.inf  # The time of the tab and its person is not the site's.
            accounts = self._bridges.accounts()
            open_accounts = {account for account in accounts if self._bridges.gate(account).is_open}
            if open_accounts:
                bridges = self._bridges.ready(open_accounts)
                bridge = bridges[0]
                if lease.source != "bootstrap":
                    takers = (each for each in bridges if self._pool.take(lease, (each.account or "",)))
                    bridge = next(takers, bridge)
                self._bridges.gate(bridge.account or "").enter(lease)
                return bridge
            now = trio.current_time()
            gives_up_at = min(gives_up_at, now + limits.queue_seconds)
            await _wait_gate(self._bridges, accounts, min(gives_up_at, now + limits.rate_limit_seconds))


# ==========================================================================================================
# Console
# ==========================================================================================================
#
# What the person sees. On a terminal the bottom lines are live; otherwise everything is plain lines.

PROMPT = "按回车键继续"

# What the console says, in Chinese. A placeholder's name only has to be the same on both sides; one with a
# format is a number. A test finds messages of the program that have no twin here.
CHINESE = {
    # Events
    "Tab {bridge:d} connected: {url} (script {script})": "标签页 {bridge} 已连接：{url}（脚本 {script}）",
    "Tab {bridge:d} is {state}: {advice}": "标签页 {bridge}：{state}。{advice}",
    "Tab {bridge:d} has the userscript {script}, but this is {version}: open /bridge.user.js to update it": (
        "标签页 {bridge} 的用户脚本版本为 {script}，本程序为 {version}：请打开 /bridge.user.js 更新"
    ),
    "Tab {bridge:d} disconnected: {reason}": "标签页 {bridge} 已断开：{reason}",
    "Refused a connection at the bridge's port: {reason}": "已拒绝桥端口上的一个连接：{reason}",
    "The page lists {count:d} models, {changed:d} of them new or changed": (
        "页面列出 {count} 个模型，其中 {changed} 个是新的或有变化"
    ),
    "The site limits this account (429): everyone waits {seconds:.0f} s": (
        "网站对此账户限流（429）：全部等待 {seconds} 秒"
    ),
    "{model}: session {session_id} message {message_id} ({source})": (
        "{model}：会话 {session_id} 消息 {message_id}（{source}）"
    ),
    "{model}: session {session_id} retired: {reason}": "{model}：会话 {session_id} 已弃用：{reason}",
    "{model} is skipped: {reason}": "跳过 {model}：{reason}",
    "Bootstrap {phase}: {detail}": "预先打开对话：{phase}，{detail}",
    "{request_id} {model}: {status:d} {outcome} in {seconds:.2f} s: {error}": (
        "{request_id} {model}：{status} {outcome}，用时 {seconds} 秒：{error}"
    ),
    # States and phases
    "loading": "正在加载",
    "verification": "等待人机验证",
    "sign_in": "等待登录",
    "ready": "就绪",
    "waiting_for_browser": "等待浏览器",
    "settling": "等待稳定",
    "confirm": "等待确认",
    "running": "进行中",
    "done": "完成",
    "aborted": "已中止",
    "skipped": "已跳过",
    "bootstrap": "预先打开",
    "on_demand": "按需打开",
    "captured": "手动对话",
    "partial": "部分",
    "on demand": "按需",
    "not opened": "未打开",
    # What the person should do
    "No LMArena tab is connected: open the site in the browser that has the userscript.": (
        "没有连接的 LMArena 标签页：请在装有用户脚本的浏览器中打开该网站。"
    ),
    "The LMArena tab is still loading.": "LMArena 标签页仍在加载。",
    "The site wants its human check passed: go to the LMArena tab and pass it.": (
        "网站要求人机验证：请到 LMArena 标签页完成验证。"
    ),
    "The site wants a sign-in: go to the LMArena tab, accept its terms or sign in (or reload it).": (
        "网站要求登录：请到 LMArena 标签页接受条款或登录（或刷新页面）。"
    ),
    # Reasons and details
    "{seconds:g} s": "{seconds} 秒",
    "code {code:d} {reason}": "代码 {code} {reason}",
    "cut": "连接中断",
    "no hello": "未收到问候",
    "no sign of life for {seconds:g} s": "{seconds} 秒没有任何动静",
    "the program stopped": "程序已停止",
    "an error in the program": "程序出错",
    "origin {origin} is not in allowed_origins": "来源 {origin} 不在 allowed_origins 中",
    "not used for {hours:.0f} hours (pool.max_idle_hours)": "已 {hours} 小时未使用（pool.max_idle_hours）",
    "{failures:d} failures in a row, last: {reason}": "连续失败 {failures} 次，最后一次：{reason}",
    "the site answered {status:d}": "网站返回 {status}",
    "by the person": "由您操作",
    "interrupted": "由您中断",
    "switched off by bootstrap.enabled or the command line": "已由 bootstrap.enabled 或命令行关闭",
    "every model has its conversations": "每个模型的对话都已齐全",
    "there is no terminal to ask at; {hint}": "没有可供询问的终端；{hint}",
    'POST /api/bootstrap {"action":"start"} begins it, --yes answers the question': (
        '用 POST /api/bootstrap {"action":"start"} 开始，--yes 可免去询问'
    ),
    "the keyboard's input ended": "键盘输入已结束",
    "the tab is not ready any more": "标签页不再就绪",
    "the program is shutting down": "程序正在关闭",
    "{opened:d} of {planned:d} opened": "已打开 {opened} / {planned}",
    "{opened:d} of {planned:d} opened, {reason}": "已打开 {opened} / {planned}，{reason}",
    "opens with the first request that carries an image": "由第一个带图片的请求打开",
    # Start, progress and summary
    "dashboard": "仪表板",
    "userscript": "用户脚本",
    "bridge": "桥",
    "models": "模型",
    "{url}/bridge.user.js  (open it in the browser once to install)": (
        "{url}/bridge.user.js  （在浏览器中打开一次即可安装）"
    ),
    "{models:d}, with {sessions:d} conversations in the store": "{models} 个，已存 {sessions} 个对话",
    "DEMO: a stand-in arena inside this process answers, not the real site": (
        "演示：由本进程内的模拟站点作答，不是真实网站"
    ),
    "Waiting for an LMArena tab: open https://lmarena.ai in the browser that has the userscript.": (
        "正在等待 LMArena 标签页：请在装有用户脚本的浏览器中打开 https://lmarena.ai 。"
    ),
    "The tab is ready; settling for {seconds:.0f} s": "标签页已就绪；再等 {seconds} 秒确认稳定",
    (
        "Plan: {planned:d} conversations for {missing:d} of {all:d} models; {stored:d} are in the store; "
        "models that work on an image, and open on demand: {on_demand:d}."
    ): (
        "计划：为 {all} 个模型中的 {missing} 个打开 {planned} 个对话；已存 {stored} 个；"
        "以图片为输入、按需打开的模型：{on_demand} 个。"
    ),
    "Opening conversations": "正在打开对话",
    "{count:d} models skipped": "已跳过 {count} 个模型",
    "paused: {advice}": "已暂停：{advice}",
    "Models: {counts}": "模型：{counts}",
    "model": "模型",
    "sessions": "会话",
    "state": "状态",
    "why": "原因",
    "Bootstrap": "预先打开对话",
    "The site answered {status:d} for {model}:": "网站对 {model} 返回 {status}：",
    "Shutting down; running answers get {seconds:g} s. Ctrl-C again ends at once.": (
        "正在关闭；进行中的回答还有 {seconds} 秒。再按一次 Ctrl-C 立即结束。"
    ),
    # Log lines
    "The store is damaged ({error}): it is now {path}, and a new one has begun.": (
        "存储已损坏（{error}）：已移至 {path}，并新建了一个。"
    ),
    "The store could not write a record: {error}": "存储无法写入一条记录：{error}",
    "The {kind} at {url} is not kept: {error}": "未保存 {url} 的 {kind}：{error}",
    "Session {session_id} works, but is not in the store: it is lost at the next start": (
        "会话 {session_id} 可用，但不在存储中：下次启动时会丢失"
    ),
    "Tab {bridge:d} sent a frame of an unknown type: {frame}": "标签页 {bridge} 发来未知类型的帧：{frame}",
    "A bridge broke; the others go on": "一个桥出错；其余继续",
    "The page's model list has an entry that is no model: {error}": "页面的模型列表中有一项不是模型：{error}",
    "A conversation by hand is not for the pool: {session_id}, mode {mode}": (
        "手动对话不进入会话池：{session_id}，模式 {mode}"
    ),
    "A conversation by hand has a model that is left out: {model}": "手动对话使用了未启用的模型：{model}",
    "{model} failed again: {error}": "{model} 再次失败：{error}",
    "Parameters that have no effect here (said once): {names}": "在此不起作用的参数（只提示一次）：{names}",
    "Request {request_id}: an image of {size} bytes was uploaded in tab {tab}": (
        "请求 {request_id}：{size} 字节的图像已通过标签页 {tab} 上传"
    ),
    "Request {request_id}: the client does not read any more": "请求 {request_id}：客户端不再读取",
    "Request {request_id} met an error in the program": "请求 {request_id} 遇到程序错误",
    "A request met an error in the program": "一个请求遇到程序错误",
    "Request {request_id}: the client did not read its error": "请求 {request_id}：客户端没有读取错误信息",
    "A connection cannot be accepted: {error}": "无法接受新连接：{error}",
    "A client's connection broke: {error}": "一个客户端连接出错：{error}",
    "A page met an error in the program": "一个页面遇到程序错误",
    "The alias {alias} stands for {model}, which is no model": "别名 {alias} 指向 {model}，但没有这个模型",
    "Forgot {count:d} requests that were older than {days:g} days": "已清除 {count} 个超过 {days} 天的请求",
    "The store {path} cannot be locked: {error}": "无法锁定存储 {path}：{error}",
    "There is no log: log.directory = {path} cannot be written to ({error}).": (
        "没有日志：log.directory = {path} 无法写入（{error}）。"
    ),
    # A start that cannot be
    "Cannot start: {cause}": "无法启动：{cause}",
    "Not done: {cause}": "未能完成：{cause}",
    "{names} not found beside lmarena_proxy.py: take the whole repository": (
        "lmarena_proxy.py 旁边没有 {names}：请使用整个仓库"
    ),
    "{key} = {value}: expected {expected}": "{key} = {value}：应为{expected}",
    "{key} ({state}): expected {expected}": "{key}（{state}）：应为{expected}",
    "set": "已设置",
    "not set": "未设置",
    "nothing, as there is no such key (config.toml has them all)": "空，因为没有这个键（全部见 config.toml）",
    "a path under {prefixes}": "位于 {prefixes} 之下的路径",
    "a path under {prefixes} with {names}": "位于 {prefixes} 之下、含有 {names} 的路径",
    "networks such as 198.18.0.0/15, neither loopback nor link-local": (
        "网络，例如 198.18.0.0/15，不能是环回或链路本地地址"
    ),
    "a loopback address, or server.api_key set beside it": "环回地址，否则须同时设置 server.api_key",
    "another port than server.port (--port, --bridge-port)": (
        "与 server.port 不同的端口（--port，--bridge-port）"
    ),
    "origins such as http://localhost:3000, in lower case and without a path, or *": (
        "来源，例如 http://localhost:3000（小写，不带路径），或 *"
    ),
    "origins such as https://*.lmarena.ai, without a path": "来源，例如 https://*.lmarena.ai，不带路径",
    "an address such as http://nas.local:9080": "地址，例如 http://nas.local:9080",
    "printable characters, with no space at either end": "可打印的字符，首尾没有空格",
    "a TOML file": "一个 TOML 文件",
    "a readable UTF-8 file": "一个可读的 UTF-8 文件",
    "a readable list of models ({error})": "一个可读的模型列表（{error}）",
    "a pattern that names at least one of {count:d} models": "至少匹配 {count} 个模型之一的模式",
    "a directory that can be written to ({error})": "一个可写的目录（{error}）",
    "a store that can be used ({error})": "一个可用的存储（{error}）",
    "a store that can be read ({error})": "一个可读的存储（{error}）",
    "a store that can be written ({error})": "一个可写的存储（{error}）",
    "a store of version {known:d} or older, but it has version {version:d}": (
        "版本 {known} 或更旧的存储，但它的版本是 {version}"
    ),
    "a store that no other copy of the program uses now: end that copy, or give this one its own": (
        "没有被本程序另一个副本占用的存储：请结束那个副本，或为这一个另设存储"
    ),
    "a port that can be listened at ({error})": "可以监听的端口（{error}）",
    (
        "a free port, but it is in use, perhaps by another copy of the program: end that, or choose "
        "another with --port"
    ): "空闲的端口，但它已被占用，可能是本程序的另一个副本：请结束它，或用 --port 另选端口",
    (
        "a free port, but it is in use, perhaps by another copy of the program: end that, or choose "
        "another with --bridge-port and install the userscript anew (it has the port in it)"
    ): (
        "空闲的端口，但它已被占用，可能是本程序的另一个副本：请结束它，"
        "或用 --bridge-port 另选端口并重新安装用户脚本（端口写在脚本中）"
    ),
    "a file that exists": "一个存在的文件",
    "a number of days above 0": "大于 0 的天数",
    "a file that can be written ({error})": "一个可写的文件（{error}）",
    "one of {values}": "{values} 之一",
    # --check, --prune and --update-models
    "configuration": "配置",
    "{path}: every key is known and in range": "{path}：每个键都已知且在范围内",
    "{count:d} of {path} are served": "启用 {path} 中的 {count} 个",
    "alias": "别名",
    "{alias} stands for {model}, which is none of them": "{alias} 指向 {model}，但没有这个模型",
    "store": "存储",
    "{path} holds {count:d} conversations": "{path} 中有 {count} 个对话",
    "{host}:{port:d} is free": "{host}:{port} 可用",
    "{path}: {count:d} requests that were older than {days:g} days are gone": (
        "{path}：已清除 {count} 个超过 {days} 天的请求"
    ),
    "Waiting for the page's model list; Ctrl-C leaves models.json as it is.": (
        "正在等待页面的模型列表；按 Ctrl-C 则 models.json 保持不变。"
    ),
    "new      {model} ({id})": "新增  {model}（{id}）",
    "changed  {model} ({id}): {keys}": "变更  {model}（{id}）：{keys}",
    "{path}: {changes:d} of {count:d} models are new or changed": (
        "{path}：{count} 个模型中有 {changes} 个是新的或有变化"
    ),
    # --doctor
    "fine": "正常",
    "look": "请看",
    "needs you": "需要您",
    "Waiting for an LMArena tab, up to {seconds:g} s (Ctrl-C ends the wait): open https://lmarena.ai": (
        "正在等待 LMArena 标签页，最多 {seconds} 秒（按 Ctrl-C 结束等待）：请打开 https://lmarena.ai"
    ),
    "The wait was ended.": "等待已结束。",
    "a copy of the program runs here, version {version}": "本程序的一个副本正在此运行，版本 {version}",
    "the key of the copy of the program that runs at port {port:d}": "在端口 {port} 运行的副本的密钥",
    "refused": "已拒绝",
    "a connection at the bridge's port: {reason}": "桥端口上的一个连接：{reason}",
    "tab": "标签页",
    "{advice} While the program runs, {url} installs the script.": (
        "{advice}程序运行时，打开 {url} 即可安装脚本。"
    ),
    "{count:d} connected: {urls}": "已连接 {count} 个：{urls}",
    "script": "脚本",
    "{version}, as the program": "{version}，与程序相同",
    (
        "{script}, but the program is {version}: while that runs, open {url}, let the manager install it, "
        "and reload the tab"
    ): "{script}，而程序为 {version}：请在程序运行时打开 {url}，由管理器安装，然后刷新标签页",
    "page": "页面",
    "ready: neither check nor sign-in is due": "就绪：无需验证或登录",
    "account": "账户",
    "not known until the page is signed in": "页面登录后才知道",
    "model list": "模型列表",
    "no page has sent one yet; {file}": "还没有页面发来列表；{file}",
    "{name} is {age} old": "{name} 是 {age}前的",
    "{name} cannot be read ({error})": "{name} 无法读取（{error}）",
    "{days:.0f} days": "{days} 天",
    "{hours:.0f} hours": "{hours} 小时",
    "{minutes:.0f} minutes": "{minutes} 分钟",
    "{seconds:.0f} seconds": "{seconds} 秒",
    "the page listed {count:d} models {age} ago; {file} and has the same": (
        "页面在 {age}前列出 {count} 个模型；{file}，内容相同"
    ),
    (
        "the page listed {count:d} models {age} ago; {file} and differs: {new:d} new, {changed:d} changed, "
        "{gone:d} not listed any more (--update-models)"
    ): (
        "页面在 {age}前列出 {count} 个模型；{file}，有差别：新增 {new}，变更 {changed}，不再列出 {gone}"
        "（--update-models）"
    ),
    "conversations": "对话",
    "{count:d} are in the store; how many are missing is known when the tab is ready": (
        "已存 {count} 个；标签页就绪后才知道还缺多少"
    ),
    "{count:d} would be opened at the start's question, or on demand": (
        "启动询问时会打开 {count} 个，或按需打开"
    ),
    "every model has those that it should": "每个模型的对话都已齐全",
    "rate limit": "限流",
    "nothing is held back": "没有限制",
    "not known, as nothing was sent": "未知，因为没有发送任何内容",
    "the site limits {account}: {pause}": "网站对 {account} 限流：{pause}",
    "paused for {seconds:d} s more": "还要暂停 {seconds} 秒",
    "going on, at {pace:g} requests a second": "继续，每秒 {pace} 个请求",
    "paused for {seconds:d} s more, then {pace:g} requests a second": (
        "还要暂停 {seconds} 秒，之后每秒 {pace} 个请求"
    ),
    "question": "询问",
    "{prompt}: press Enter at the console, or the dashboard's button": (
        "{prompt}：请在控制台按回车，或使用仪表板的按钮"
    ),
    # --export-sessions and --import-sessions
    "{place}: {count:d} conversations are in {path}": "{place}：已将 {count} 个对话写入 {path}",
    "left out   {what}": "略过  {what}",
    "{place}: of the conversations in {name}: {counts}": "{place}：{name} 中的对话：{counts}",
    "{added:d} added, {known:d} known already, {left_out:d} left out": (
        "新增 {added} 个，已有 {known} 个，略过 {left_out} 个"
    ),
    "{count:d} of their models are not in {path}; the page may list them": (
        "其中 {count} 个模型不在 {path} 中；页面可能会列出"
    ),
    "{place}: {value} is a placeholder": "{place}：{value} 是占位符",
    "{place}: its ids are empty": "{place}：ID 为空",
    "{place}: a session of the mode {mode} cannot be retried here": "{place}：模式 {mode} 的会话在此不能重试",
    "{place}: no model {name}": "{place}：没有模型 {name}",
    "{place}: {name} stands for two models: name one by its id, {ids}": (
        "{place}：{name} 代表两个模型，请用 ID 指明：{ids}"
    ),
    "an export of this program, or LMArenaBridge's config.jsonc or model_endpoint_map.json": (
        "本程序的导出文件，或 LMArenaBridge 的 config.jsonc 或 model_endpoint_map.json"
    ),
    "a file of JSON ({error})": "一个 JSON 文件（{error}）",
    "a readable file of UTF-8 ({error})": "一个可读的 UTF-8 文件（{error}）",
    "a UUID": "一个 UUID",
    "64 hexadecimal digits": "64 位十六进制数字",
    "64 hexadecimal digits. {hint}": "64 位十六进制数字。{hint}",
    "the id of a model": "一个模型的 ID",
    "a time in Unix seconds": "以 Unix 秒计的时间",
    "a time in Unix seconds, or null": "以 Unix 秒计的时间，或 null",
    "a number of uses": "使用次数",
    "a list of sessions": "会话列表",
    "an object with session_id and message_id": "含有 session_id 和 message_id 的对象",
    "none: the sessions of an export have theirs": "不填：导出文件中的会话已有",
    "none: the file names the models": "不填：文件中已写明模型",
    "the name of the session's model: the file does not say it": "该会话的模型名称：文件中没有",
    "the account that opened the file's conversations: the store has {found}. {hint}": (
        "打开文件中对话的账户：存储中{found}。{hint}"
    ),
    "no conversations yet": "还没有对话",
    "those of {count:d} accounts": "有 {count} 个账户的对话",
    "GET /api/state shows it (bridges, account) while a tab of the account is connected": (
        "该账户的标签页已连接时，GET /api/state 会显示它（bridges，account）"
    ),
    # --help
    "the same, and wait up to so long (60) for a tab to look at it, too; sends nothing to the site": (
        "同上，并最多等待这么多秒（60），连标签页也检查；不向网站发送任何内容"
    ),
    "write all conversations to a file (-: here), and exit": "把全部对话写入文件（-：写到此处），然后退出",
    "add the conversations of an export, or of LMArenaBridge's files, and exit": (
        "加入导出文件或 LMArenaBridge 文件中的对话，然后退出"
    ),
    "whose conversations LMArenaBridge's files have": "LMArenaBridge 文件中的对话属于哪个账户",
    "which model the conversation in config.jsonc has": "config.jsonc 中的对话用的是哪个模型",
    "an OpenAI-compatible API in front of a person's own LMArena tab.": (
        "在您自己的 LMArena 标签页前面的 OpenAI 兼容 API。"
    ),
    "the configuration file (default: config.toml here)": "配置文件（默认为此处的 config.toml）",
    "answer the question before bootstrap with Enter": "以回车回答打开对话前的询问",
    "open conversations only when requests need them": "只在请求需要时打开对话",
    "serve only these models (models.include)": "只启用这些模型（models.include）",
    "where the API listens (server.host)": "API 的监听地址（server.host）",
    "the API's port (server.port)": "API 的端口（server.port）",
    "the bridge's port (bridge.port)": "桥的端口（bridge.port）",
    "run against a stand-in arena, without a browser": "对模拟站点运行，无需浏览器",
    "check configuration, models, store and ports, and exit": "检查配置、模型、存储和端口，然后退出",
    "write the page's model list to models.json, and exit": "把页面的模型列表写入 models.json，然后退出",
    "forget requests older than storage.keep_days, and exit": "清除早于 storage.keep_days 的请求，然后退出",
    "the language of the console: en or zh (default: the system's)": "控制台的语言：en 或 zh（默认随系统）",
}
LANGUAGES: dict[str, dict[str, str]] = {"en": {}, "zh": CHINESE}


class Translator:
    """Says the program's messages, which are English, in the person's language; others as they are.

    A message is found again by its form, so that nobody else needs to know of languages. What it holds is
    translated, too: an advice in an event, a reason in a detail.
    """

    _NUMBER, _ANYTHING = r"(-?[\d.,]+)", "(.*?)"

    def __init__(self, language: str) -> None:
        self._twins = LANGUAGES[language]
        self._forms = [(self._form(each), names, self._twins[each]) for each, names in self._with_names()]

    def _with_names(self) -> Iterator[tuple[str, list[str]]]:
        for message in self._twins:
            if names := re.findall(r"\{(\w+)(?::[^}]*)?\}", message):
                yield message, names

    def _form(self, message: str) -> re.Pattern[str]:
        parts = re.split(r"\{\w+(:[^}]*)?\}", message)
        text = [re.escape(part or "") for part in parts[::2]]
        fields = [self._NUMBER if part else self._ANYTHING for part in parts[1::2]]
        return re.compile("".join(itertools.chain(*zip(text, [*fields, ""], strict=True))), re.DOTALL)

    def __call__(self, text: str) -> str:
        if not self._twins or text in self._twins:
            return self._twins.get(text, text)
        # An event without its last detail ends where that would begin.
        for whole in (text, f"{text}: "):
            for form, names, twin in self._forms:
                if found := form.fullmatch(whole):
                    values = [self(value) if len(value) < len(text) else value for value in found.groups()]
                    said = twin.format_map(dict(zip(names, values, strict=True)))
                    return said if values[-1] else said.rstrip("：，。")
        return text


_LEVEL_STYLES = {
    logging.DEBUG: "dim",
    logging.WARNING: "yellow",
    logging.ERROR: "red",
    logging.CRITICAL: "bold red",
}
_EVENT_STYLES: dict[type[Event], str] = {
    SessionOpened: "green",
    RequestEnded: "dim",
    PhaseChanged: "bold cyan",
}


class Screen(RichConsole):
    """A console that falls silent when nobody reads it any more, instead of ending the program."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def _tracebacks() -> "type[Traceback]":
    """rich's view of an error, made to highlight no more of a file than the lines that it shows.

    By itself it reads the file of each frame from the first line on: of this one nearly a second a frame, and
    nothing else runs meanwhile. Loaded when one is due: it brings 1.3 MB that most runs never need.
    """
    from rich import syntax, traceback

    class Excerpt(syntax.Syntax):
        """The lines from the first to the last of `line_range`, numbered as in the file."""

        def __init__(self, code: str, *args: Any, line_range: tuple[int, int], **kwargs: Any) -> None:
            self._skipped = max(line_range[0] - 1, 0)
            lines = code.split("\n")[self._skipped : line_range[1]]
            super().__init__("\n".join(lines), *args, start_line=self._skipped + 1, **kwargs)

        def stylize_range(
            self, style: Any, start: tuple[int, int], end: tuple[int, int], style_before: bool = False
        ) -> None:
            if start[0] > self._skipped:
                start, end = (start[0] - self._skipped, start[1]), (end[0] - self._skipped, end[1])
                super().stylize_range(style, start, end, style_before)

    traceback.Syntax = Excerpt  # type: ignore[assignment, attr-defined]
    return traceback.Traceback


class ConsoleHandler(logging.Handler):
    """Shows log records: one line each, and the whole story of a model that is skipped."""

    def __init__(self, screen: RichConsole, translate: Translator) -> None:
        super().__init__()
        self._screen, self._translate = screen, translate

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event and not event.is_for_people:
            return
        if isinstance(event, ModelSkipped):
            self._show_skipped(event)
        clock, message = time.strftime("%H:%M:%S "), self._translate(record.getMessage())
        if self._screen.is_terminal:
            style = _LEVEL_STYLES.get(record.levelno) or _EVENT_STYLES.get(type(event), "")  # type: ignore[arg-type]
            self._screen.print(RichText(clock, style="dim").append(message, style=style), soft_wrap=True)
        elif not self._screen.quiet:
            self._write_plain(clock + message)
        if record.exc_info and record.exc_info[1] and not isinstance(event, ModelSkipped):
            self._show_traceback(record.exc_info[1])

    def _write_plain(self, line: str) -> None:
        """Without styles there is nothing for rich to do; it would take a fifth of a short request's time."""
        line = strip_control_codes(line)
        try:
            self._screen.file.write(f"{line}\n")
            self._screen.file.flush()
        except BrokenPipeError:
            self._screen.on_broken_pipe()
        except OSError:
            self._screen.quiet = True

    def _show_traceback(self, error: BaseException) -> None:
        # No local variables: they hold conversations.
        trace = _tracebacks().from_exception(
            type(error), error, error.__traceback__, width=110, show_locals=False
        )
        self._screen.print(trace)

    def _show_skipped(self, event: ModelSkipped) -> None:
        self._show_traceback(event.error)
        if event.arena_status:
            said = self._translate(f"The site answered {event.arena_status} for {event.model}:")
            self._screen.print(RichText(said, style="red"))
        if event.reply:
            self._screen.print(RichText(event.reply.rstrip()), soft_wrap=True)


class Console:
    """The person's terminal: banner, countdown, question, progress and summary."""

    def __init__(self, screen: RichConsole, *, can_ask: bool, language: str = "en") -> None:
        """`can_ask`: whether there is a person at the keyboard."""
        self.screen = screen
        self.can_ask = can_ask
        self.translate = Translator(language)

    def say(self, text: str, style: str = "") -> None:
        self.screen.print(RichText(self.translate(text), style=style), soft_wrap=True)

    def say_in_columns(self, *cells: tuple[str, int], style: str = "") -> None:
        """Say several things in a line, each with the width that it is to have at least."""
        said = [(self.translate(text), width) for text, width in cells]
        line = " ".join(text + " " * (width - cell_len(text)) for text, width in said)
        self.screen.print(RichText(line, style=style), soft_wrap=True)

    def banner(self, api_url: str, bridge_url: str, models: int, sessions: int, notice: str) -> None:
        self.say(f"lmarena_proxy {VERSION}", "bold")
        if notice:
            self.say(f"  {self.translate(notice)}", "bold yellow reverse")
        for label, value in (
            ("API", f"{api_url}/v1"),
            ("dashboard", f"{api_url}/"),
            ("userscript", f"{api_url}/bridge.user.js  (open it in the browser once to install)"),
            ("bridge", bridge_url),
            ("models", f"{models}, with {sessions} conversations in the store"),
        ):
            self.say_in_columns(("", 1), (label, 10), (value, 0))
        self.say(
            "Waiting for an LMArena tab: open https://lmarena.ai in the browser that has the userscript."
        )

    @asynccontextmanager
    async def live(self, render: Callable[[], Any]) -> AsyncIterator[None]:
        """Keep what `render` returns at the bottom of a terminal; elsewhere show nothing."""
        if not self.screen.is_terminal:
            yield
            return
        with Live(render(), console=self.screen, auto_refresh=False, transient=True) as display:
            async with trio.open_nursery() as nursery:

                async def refresh() -> None:
                    while True:
                        display.update(render(), refresh=True)
                        await trio.sleep(0.25)

                nursery.start_soon(refresh)
                yield
                nursery.cancel_scope.cancel()

    def countdown(self, ends_at: float) -> AbstractAsyncContextManager[None]:
        """Show how long the tab still has to stay ready; `ends_at` in Trio's time."""

        def render() -> RichText:
            seconds = max(0, ends_at - trio.current_time())
            return RichText(self.translate(f"The tab is ready; settling for {seconds:.0f} s"))

        return self.live(render)

    def progress(self, count: Callable[[], tuple[int, int, str]]) -> AbstractAsyncContextManager[None]:
        """Show a bar of what `count` returns: done, of how many, and a remark."""
        columns = (
            TextColumn(self.translate("Opening conversations")),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, TextColumn("{task.fields[remark]}", style="red"), auto_refresh=False)
        task = bar.add_task("", remark="")

        def render() -> Progress:
            done, total, text = count()
            bar.update(task, completed=done, total=total, remark=escape(self.translate(text)))
            return bar

        return self.live(render)

    def restore(self) -> None:
        """Leave the terminal as it was found, also in the middle of a live display."""
        self.screen.show_cursor(True)

    async def wait_for_enter(self) -> bool:
        """Ask for Enter and wait for it. False when the keyboard's input ended instead."""
        self._forget_input()
        self.say(PROMPT, "bold reverse" if self.screen.is_terminal else "")
        if sys.platform == "win32":
            # A console handle cannot be waited for; an abandoned thread ends with the process.
            return bool(await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))
        await trio.lowlevel.wait_readable(sys.stdin.fileno())
        return bool(os.read(sys.stdin.fileno(), 4096))

    def _forget_input(self) -> None:
        """An Enter that was pressed before the question does not answer it."""
        if sys.platform == "win32":
            while msvcrt.kbhit():
                msvcrt.getwch()
        elif sys.stdin.isatty():
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)

    def summary(self, rows: Sequence[tuple[str, int, str, str]]) -> None:
        """Rows of model, sessions, state (`ready`, `partial`, `skipped`, `on demand`) and why."""
        counts = Counter(state for _, _, state, _ in rows)
        counted = [f"{count} {self.translate(state)}" for state, count in sorted(counts.items())]
        self.say(f"Models: {', '.join(counted)}", "bold")
        heads = map(self.translate, ("model", "sessions", "state", "why"))
        table = Table(*heads, title=self.translate("Bootstrap"))
        # What needs a look stands last, where the eye is.
        for name, sessions, state, why in sorted(rows, key=lambda row: row[2] != "ready"):
            table.add_row(escape(name), str(sessions), self.translate(state), escape(self.translate(why)))
        self.screen.print(table)


# ==========================================================================================================
# Bootstrap
# ==========================================================================================================
#
# Theory. One supervisor asks the question, once for each account, and runs what is started. A run opens,
# breadth first, what each model lacks: the first conversation of every model, then the second, so that an
# interrupted run leaves something for all and a model that fails costs one call. Each opening holds a place
# of the global limiter, then a token of its model: in that order, so that openings that wait for a place
# never keep a request from its token. The relay does the rest: it waits for readiness and at the account's
# gate, for as long as that takes here. A failure skips the model: nothing more is begun for it, what is under
# way may finish. Start and abort come from the console or the API alike.

Phase = Literal["waiting_for_browser", "settling", "confirm", "running", "done", "aborted", "skipped"]

PHASES: dict[tuple[Phase, str], Phase] = {
    ("waiting_for_browser", "ready"): "settling",
    ("waiting_for_browser", "skip"): "skipped",
    ("waiting_for_browser", "start"): "running",
    ("settling", "lost"): "waiting_for_browser",
    ("settling", "ask"): "confirm",
    ("settling", "start"): "running",
    ("settling", "skip"): "skipped",
    ("settling", "finish"): "done",
    ("confirm", "start"): "running",
    ("confirm", "skip"): "skipped",
    ("running", "finish"): "done",
    ("running", "abort"): "aborted",
    ("done", "start"): "running",
    ("aborted", "start"): "running",
    ("skipped", "start"): "running",
    # Another account has signed in, for which conversations are missing.
    ("done", "ready"): "settling",
    ("aborted", "ready"): "settling",
    ("skipped", "ready"): "settling",
}


def opening_limits(settings: BootstrapConfig) -> Limits:
    """An opening waits for the tab and for its place as long as it takes, and is tried once."""
    return Limits(
        queue_seconds=math.inf,
        rate_limit_seconds=settings.max_rate_limit_wait_seconds,
        first_byte_seconds=settings.timeout_seconds,
        idle_seconds=settings.timeout_seconds,
        exchange_seconds=settings.timeout_seconds,
        total_seconds=math.inf,
        person_wait_seconds=math.inf,
        attempts=1,
    )


class BootstrapRun:
    """One run: what it opens, and what has become of that."""

    def __init__(
        self, config: Config, pool: SessionPool, bridges: Bridges, relay: Relay, bus: EventBus, only: Set[str]
    ) -> None:
        """`only`: the ids of the models it is for; none stand for all."""
        self._config, self._pool, self._bridges, self._relay, self._bus = config, pool, bridges, relay, bus
        self._only = only
        self._greeting = Message("user", config.bootstrap.message)
        self._limits = opening_limits(config.bootstrap)
        self._opening: Counter[str] = Counter()
        # By model id: how many are to be opened, how many are, and who was given up.
        self.planned: dict[str, int] = {}
        self.opened: Counter[str] = Counter()
        self.skipped: dict[str, ModelSkipped] = {}
        self.accounts: set[str] = set()
        self.abort_reason = ""

    def plan(self) -> list[tuple[Model, int]]:
        """What is to be opened: models and how many conversations each lacks."""
        models = [model for model in self._pool.catalog if not model.requires_image]
        wanted = [model for model in models if not self._only or model.id in self._only]
        return [(model, missing) for model in wanted if (missing := self._pool.missing(model))]

    async def open_all(self) -> None:
        """Open what is missing, breadth first."""
        await self._bridges.wait_ready(math.inf)
        self.accounts = self._bridges.accounts()
        plan = self.plan()
        for model, _ in plan:
            self._pool.retire_stale(model, self.accounts)
        self.planned = {model.id: missing for model, missing in plan}
        limiter = trio.CapacityLimiter(self._config.bootstrap.concurrency)
        rounds = max(self.planned.values(), default=0)
        async with trio.open_nursery() as nursery:
            for number in range(rounds):
                for model in [model for model, missing in plan if missing > number]:
                    if self.abort_reason:
                        return
                    lease = Lease(f"bootstrap-{uuid7()}", model, "bootstrap")
                    await limiter.acquire_on_behalf_of(lease)
                    nursery.start_soon(self._open, lease, limiter)

    async def _open(self, lease: Lease, limiter: trio.CapacityLimiter) -> None:
        """Open one conversation, unless that has become needless."""
        model = lease.model
        try:
            if model.id in self.skipped or self._pool.missing(model) <= self._opening[model.id]:
                return
            self._opening[model.id] += 1
            try:
                await self.open_one(lease)
            finally:
                self._opening[model.id] -= 1
            self.opened[model.id] += 1
        except ApiError as error:
            if error.error_code == "rate_limit_exceeded":
                self.abort_reason = error.message  # Nothing more is begun; what is under way may finish.
            else:
                self._skip(model, error)
        except Exception as error:
            self._skip(model, error)
        finally:
            limiter.release_on_behalf_of(lease)

    async def open_one(self, lease: Lease) -> None:
        """Open one conversation with the greeting. Raises ApiError."""
        await self._relay.answer(lease, [self._greeting], Discard(), self._limits)

    def _skip(self, model: Model, error: Exception) -> None:
        if model.id in self.skipped:
            log.warning("%s failed again: %s", model.name, error)
            return
        arena_status = error.arena_status if isinstance(error, ArenaError) else 0
        reply = error.reply if isinstance(error, ArenaError) else ""
        event = ModelSkipped(model.name, model.id, str(error) or repr(error), arena_status, reply, error)
        self.skipped[model.id] = event
        self._bus.publish(event)

    def sum_up(self) -> Iterator[tuple[str, int, str, str]]:
        """The summary's rows: model, sessions, state and why."""
        for pool in self._pool:
            skipped = self.skipped.get(pool.model.id)
            sessions = pool.usable(self._bridges.accounts()) or len(pool.sessions)
            why = skipped.reason if skipped else ""
            if sessions >= self._config.pool.sessions_per_model:
                state = "ready"
            elif pool.model.requires_image:
                state, why = "on demand", "opens with the first request that carries an image"
            else:
                state = "skipped" if skipped and not sessions else "partial" if sessions else "not opened"
            yield pool.model.name, sessions, state, why


class Bootstrap:
    """Opens the conversations that the store lacks, once the person says so."""

    def __init__(
        self,
        config: Config,
        pool: SessionPool,
        bridges: Bridges,
        relay: Relay,
        console: Console,
        bus: EventBus,
    ) -> None:
        self._config, self._pool, self._bridges = config, pool, bridges
        self._console, self._bus = console, bus
        self._new_run = functools.partial(BootstrapRun, config, pool, bridges, relay, bus)
        self.phase: Phase = "waiting_for_browser"
        # What the last change of phase said, and when settling ends, in Unix seconds.
        self.detail = ""
        self.settles_at: float | None = None
        self.is_confirmed = False
        # The run that is on or was last.
        self._run: BootstrapRun = self._new_run(frozenset())
        # What start, skip and abort cancel: the question or the run, whichever is on.
        self._scope: trio.CancelScope | None = None
        self._wanted: BootstrapRun | None = None
        # The accounts for which the question was asked, or needed no asking.
        self._asked: set[str] = set()

    def __repr__(self) -> str:
        counts = f"{self.opened} of {self.planned} opened, {len(self._run.skipped)} skipped"
        return f"<Bootstrap {self.phase}: {counts}>"

    @property
    def opened(self) -> int:
        return self._run.opened.total()

    @property
    def planned(self) -> int:
        return sum(self._run.planned.values())

    def _go(self, event: str, detail: str = "") -> None:
        phase = PHASES.get((self.phase, event))
        if phase is None:
            raise RuntimeError(f"bootstrap is {self.phase}: {event!r} cannot happen")
        self.phase, self.detail, self.settles_at = phase, detail, None
        self._bus.publish(PhaseChanged(phase, detail))

    def start(self, only: Set[str] = frozenset()) -> bool:
        """The person wants it: answers the question, or begins a run when none is asked.

        `only`: the ids of the models it is for, if not for all. False while one runs.
        """
        if self.phase == "running":
            return False
        self._wanted = self._new_run(only)
        others = {each: event for each, event in self._run.skipped.items() if only and each not in only}
        self._wanted.skipped |= others
        if self._scope:
            self._scope.cancel()
        return True

    def abort(self, reason: str = "interrupted") -> bool:
        """Stop the run, or skip the question. False when there is neither."""
        if self.phase not in ("running", "confirm") or self._scope is None:
            return False
        self._run.abort_reason = reason
        self._scope.cancel()
        return True

    async def open_one(self, model: Model) -> Session:
        """Open one more conversation of a model, whatever is planned. Raises ApiError."""
        lease = Lease(f"dashboard-{uuid7()}", model, "bootstrap")
        await self._new_run(frozenset()).open_one(lease)
        session = self._pool.find(lease.last_session_id or "")
        if session is None:
            raise ArenaError("The new conversation is gone already.", may_retry=False)
        return session

    async def supervise(self) -> None:
        """Ask once for each account, and run whatever is started, for as long as the program lives."""
        if not self._config.bootstrap.enabled:
            self._go("skip", "switched off by bootstrap.enabled or the command line")
        while True:
            with trio.CancelScope() as self._scope:
                await self._ask()
            if self._wanted:
                await self._carry_out(self._wanted)
            elif self.phase == "confirm":
                self._go("skip", self._run.abort_reason)

    async def _ask(self) -> None:
        """Steps 2 to 4 of the start: until it is started or skipped, or there is nothing to open."""
        await self._wait_for_account()
        await self._settle()
        self._asked |= self._bridges.accounts()
        if not self._announce_plan():
            self._go("finish", "every model has its conversations")
        elif self.is_confirmed:
            self.start()
        elif not self._console.can_ask:
            hint = 'POST /api/bootstrap {"action":"start"} begins it, --yes answers the question'
            self._go("skip", f"there is no terminal to ask at; {hint}")
        else:
            self._go("ask")
            if await self._console.wait_for_enter():
                self.start()
            else:
                self.abort("the keyboard's input ended")

    async def _wait_for_account(self) -> None:
        """Wait for the first tab that is ready; later, for one of an account that lacks conversations."""
        if not self._config.bootstrap.enabled:
            await trio.sleep_forever()
        everything = self._new_run(frozenset())
        while not self._bridges.accounts() - self._asked or (self._asked and not everything.plan()):
            await self._bridges.wait_changed()

    async def _settle(self) -> None:
        """Wait until a tab has been ready for `settle_seconds` on end."""
        while True:
            await self._bridges.wait_ready(math.inf)
            seconds = self._config.bootstrap.settle_seconds
            settled_at = trio.current_time() + seconds
            self._go("ready", f"{seconds:g} s")
            self.settles_at = time.time() + seconds
            async with self._console.countdown(settled_at):
                with trio.move_on_at(settled_at):
                    while self._bridges.obstacle() is None:
                        await self._bridges.wait_changed()
            if self._bridges.obstacle() is None:
                return
            self._go("lost", "the tab is not ready any more")

    def _announce_plan(self) -> int:
        plan = self._new_run(frozenset()).plan()
        planned = sum(missing for _, missing in plan)
        stored = sum(len(pool.sessions) for pool in self._pool)
        on_demand = sum(model.requires_image for model in self._pool.catalog)
        self._console.say(
            f"Plan: {planned} conversations for {len(plan)} of {len(self._pool.catalog)} models; "
            f"{stored} are in the store; models that work on an image, and open on demand: {on_demand}."
        )
        return planned

    async def _carry_out(self, run: BootstrapRun) -> None:
        """Step 5 to 7: open, skip what fails, sum up."""
        self._run, self._wanted = run, None
        self._go("start")
        with trio.CancelScope() as self._scope:
            async with self._console.progress(self._count):
                await run.open_all()
        self._asked |= run.accounts
        was_aborted = self._scope.cancelled_caught or bool(run.abort_reason)
        self.is_confirmed &= not was_aborted  # What is still to be opened is asked for.
        detail = f"{self.opened} of {self.planned} opened"
        self._go("abort" if was_aborted else "finish", f"{detail}, {run.abort_reason}".rstrip(", "))
        self._console.summary([*run.sum_up()])

    def _count(self) -> tuple[int, int, str]:
        obstacle, skipped = self._bridges.obstacle(), len(self._run.skipped)
        remark = f"{skipped} models skipped" if skipped else ""
        return self.opened, self.planned, f"paused: {obstacle.advice}" if obstacle else remark

    def snapshot(self) -> dict[str, object]:
        """The `bootstrap` part of /api/state."""
        run = self._run
        return {
            "phase": self.phase,
            "detail": self.detail,
            "settles_at": self.settles_at,
            "opened": self.opened,
            "planned": self.planned,
            "progress": [
                {"model_id": model_id, "opened": run.opened[model_id], "planned": planned}
                for model_id, planned in run.planned.items()
            ],
            "skipped": [event.describe() for event in run.skipped.values()],
        }


# ==========================================================================================================
# Monitoring
# ==========================================================================================================
#
# What a dashboard and Prometheus are shown. Nothing here runs by itself: a feed goes on when somebody reads
# it, and what one reader brought about is what all of them get.


class LogTail(logging.Handler):
    """The last lines of the log, for the dashboard. Each has a number, counted from the start."""

    def __init__(self, size: int = 500) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self._lines: deque[dict[str, Any]] = deque(maxlen=size)

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        story = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._lines.append(
            {
                "seq": next(self._numbers),
                "time": record.created,
                "level": record.levelname,
                "event": type(event).__name__ if event else record.name,
                "message": without_payloads(record.getMessage()),
                "request_id": getattr(event, "request_id", None),
                "traceback": story,
            }
        )

    def since(self, number: int, at_most: int) -> list[dict[str, Any]]:
        """The lines after a number, the newest of them."""
        lines = itertools.takewhile(lambda line: line["seq"] > number, reversed(self._lines))
        return [*itertools.islice(lines, at_most)][::-1]


# The parts of a feed's document that are lists, and what names their entries.
FEED_KEYS = {
    "bridges": "id",
    "gates": "account",
    "pool": "model_id",
    "sessions": "session_id",
    "running": "request_id",
}
FeedDocument = dict[str, Any]


def find_changes(old: FeedDocument, new: FeedDocument) -> dict[str, Any]:
    """What is different in a feed's document: entries of its lists, and other parts whole."""
    changes: dict[str, Any] = {}
    gone: dict[str, list[Any]] = {}
    for name, value in new.items():
        if name not in FEED_KEYS:
            if value != old.get(name) and name != "uptime_seconds":
                changes[name] = value
            continue
        before = {each[FEED_KEYS[name]]: each for each in old.get(name, ())}
        if changed := [each for each in value if before.pop(each[FEED_KEYS[name]], None) != each]:
            changes[name] = changed
        if before:
            gone[name] = [*before]
    return changes | ({"gone": gone} if gone else {})


class Feed:
    """What dashboards are shown: a document, and its changes, as server-sent events that all of them share.

    `describe` returns the document. An event's id is the feed's own and a number; a reader that comes back
    with one goes on after it, or begins anew when that is too long ago.
    """

    TICK_SECONDS, QUIET_SECONDS, KEPT_EVENTS = 0.25, 10, 100

    def __init__(self, describe: Callable[[], FeedDocument], tail: LogTail) -> None:
        self._describe, self._tail = describe, tail
        self._name = secrets.token_hex(4)
        self._number = 0
        self._events: deque[tuple[int, bytes]] = deque(maxlen=self.KEPT_EVENTS)
        self._document: FeedDocument = {}
        self._line = 0
        self._ended: list[dict[str, Any]] = []
        self._next_at = -math.inf

    def note_event(self, event: Event) -> None:
        """The listener that keeps which requests ended, for the next change."""
        if isinstance(event, RequestEnded) and trio.current_time() < self._next_at + self.QUIET_SECONDS:
            whole = {"messages", "answer", "reasoning", "traceback", "tries", "parameters"}
            summary = {name: getattr(event, name) for name in event.__struct_fields__ if name not in whole}
            self._ended.append({**summary, "preview": event.answer and event.answer[:PREVIEW_CHARACTERS]})

    def _advance(self) -> None:
        """Take the next look, unless another reader just did."""
        if trio.current_time() < self._next_at:
            return
        self._next_at = trio.current_time() + self.TICK_SECONDS
        document = self._describe()
        changes = find_changes(self._document, document)
        if lines := self._tail.since(self._line, 200):
            self._line = lines[-1]["seq"]
            changes["log"] = lines
        if self._ended:
            changes["ended"], self._ended = self._ended, []
        self._document = document
        if changes:
            self._number += 1
            self._events.append((self._number, self._encode("change", changes)))

    def _encode(self, kind: str, value: object) -> bytes:
        return b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (
            *(self._name.encode(), self._number),
            *(kind.encode(), msgspec.json.encode(value)),
        )

    def _find_place(self, last_event_id: str) -> int | None:
        """The number after which a reader goes on; None when it has to begin anew."""
        name, _, number = last_event_id.partition("-")
        oldest = self._events[0][0] if self._events else self._number + 1
        if name == self._name and number.isdecimal() and oldest - 1 <= int(number) <= self._number:
            return int(number)
        return None

    async def follow(self, last_event_id: str) -> AsyncIterator[bytes]:
        """Events for one reader, as long as it reads."""
        self._advance()
        place = self._find_place(last_event_id)
        heard_at = -math.inf
        while True:
            if place is None or (self._events and place < self._events[0][0] - 1):
                data = self._encode("snapshot", {**self._document, "log": self._tail.since(0, 200)})
            else:
                data = b"".join(event for number, event in self._events if number > place)
            place = self._number
            if not data and trio.current_time() > heard_at + self.QUIET_SECONDS:
                data = SSE_COMMENT
            if data:
                heard_at = trio.current_time()
                yield data
            await trio.sleep_until(self._next_at)
            self._advance()


class Metrics:
    """Prometheus metrics: what has ended is counted as it ends, what is now is looked up when asked for.

    Where OpenTelemetry's conventions for generative AI have a name, it is that one.
    """

    # As OpenTelemetry advises, and further: a site is slower than an API.
    _DURATIONS = (*(0.01 * 2**power for power in range(14)), 300, 1800)
    _FIRST_TOKENS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 180)
    _TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)

    def __init__(self, pool: SessionPool, bridges: Bridges) -> None:
        self._pool, self._bridges = pool, bridges
        # Else each count has another series, of when it began.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = prometheus_client.CollectorRegistry()
        labels = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
        histogram = functools.partial(prometheus_client.Histogram, registry=registry)
        self._requests = prometheus_client.Counter(
            "lmarena_proxy_requests", "Requests that ended.", ("model", "outcome"), registry=registry
        )
        self._queue = histogram(
            "lmarena_proxy_request_queue_seconds",
            *("From a request to its model's token.", ("model",)),
            buckets=self._DURATIONS,
        )
        self._duration = histogram(
            "gen_ai_server_request_duration_seconds",
            *("From a request to the end of its answer.", (*labels, "error_type")),
            buckets=self._DURATIONS,
        )
        self._first_token = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            *("From a request to the first of its answer.", labels),
            buckets=self._FIRST_TOKENS,
        )
        self._tokens = histogram(
            "gen_ai_client_token_usage",
            *("Tokens of answered requests, partly estimated.", (*labels, "gen_ai_token_type")),
            buckets=self._TOKENS,
        )
        registry.register(self)
        # A series by its metric and labels: the library looks it up under a lock, and checks the labels anew.
        self._series = functools.cache(lambda metric, *labels: metric.labels(*labels))

    def note_event(self, event: Event) -> None:
        """The listener that counts requests."""
        if not isinstance(event, RequestEnded):
            return
        model = self._pool.of(event.model_id).model.name
        operation = "chat" if event.path == "/v1/chat/completions" else "image_generation"
        labels = (operation, "lmarena", model)
        self._series(self._requests, model, event.outcome).inc()
        self._series(self._queue, model).observe(event.queued_seconds)
        error = "" if event.status == 200 else event.outcome
        self._series(self._duration, *labels, error).observe(event.total_seconds)
        if event.first_byte_seconds is not None:
            self._series(self._first_token, *labels).observe(event.first_byte_seconds)
        if event.prompt_tokens is not None and event.completion_tokens is not None:
            self._series(self._tokens, *labels, "input").observe(event.prompt_tokens)
            self._series(self._tokens, *labels, "output").observe(event.completion_tokens)

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """What is now, in Prometheus' terms: called by the registry."""
        sessions: Counter[str] = Counter(idle=0, busy=0, resting=0)
        waiting = running = 0
        for pool in self._pool:
            resting = pool.resting(self._bridges.accounts())
            sessions.update(idle=pool.idle - resting, busy=pool.busy, resting=resting)
            waiting += pool.waiting
            running += len(pool.leases)
        states = [bridge.state for bridge in self._bridges]
        tabs = {state: states.count(state) for state in PAGE_STATES}
        for name, text, values in (
            ("sessions", "Conversations of the pool.", sessions),
            ("bridges", "Connected tabs.", tabs),
        ):
            family = GaugeMetricFamily(f"lmarena_proxy_{name}", text, labels=("state",))
            for state, value in values.items():
                family.add_metric((state,), value)
            yield family
        yield GaugeMetricFamily(
            "lmarena_proxy_waiting_requests", "Requests in their models' queues.", waiting
        )
        yield GaugeMetricFamily(
            "lmarena_proxy_running_requests", "Requests and openings with a token.", running
        )
        bridges = self._bridges
        for name, text, count in (
            ("rate_limited", "Refusals of the site with status 429.", bridges.rate_limited),
            ("page_reloads", "Reloads that tabs were asked for.", bridges.reloads),
            ("bridge_received_bytes", "Of answers, from the tabs.", bridges.received_bytes),
            ("bridge_sent_bytes", "Of frames, to the tabs.", bridges.sent_bytes),
        ):
            yield CounterMetricFamily(f"lmarena_proxy_{name}", text, count)


# ==========================================================================================================
# HTTP API
# ==========================================================================================================
#
# Requests in the one form that nearly all clients send are read by `HttpConnection`; what is written
# otherwise is Hypercorn's. Quart serves the dashboard and all that is behind it. Answers go straight to the
# connection: an answer may wait minutes for its first byte, must notice a client that leaves at any moment,
# and is where the cost of a chunk is. `Api` is where all meet: it admits a request (host, key, origin), gives
# it its id, and renders its error, if nothing has been sent yet.
#
# Hypercorn and Quart are loaded, in a thread, when the first request comes that is theirs.
#
# One nursery a chat request: the task that answers, one that attends to the client (its leaving, keep-
# alives), and one that writes for as long as a stream's client does not take all at once.

ASGIReceive = Callable[[], Awaitable[Any]]
ASGISend = Callable[[Any], Awaitable[None]]
ASGIApp = Callable[[Any, ASGIReceive, ASGISend], Awaitable[None]]
KEEP_ALIVE_SECONDS = 75
# What is read of a connection at once.
READ_BYTES = 1 << 16
# What a client has to take within the connection's patience, unless it has less to take.
WRITE_BYTES = 1 << 16
BODY_TIMEOUT_SECONDS = 60
DRAIN_SECONDS, DRAIN_BYTES = 5, 256 << 20


INTERNAL_ERROR = "The program has an error; its log has the whole story."


class ClientLeft(Exception):
    """The client closed its connection; nobody is left to be told."""


# ── Connections ─────────────────────────────────────────────────────────────────────────────────────────────

_REQUEST_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE|OPTIONS) (/[!-~]*) HTTP/1\.1")
_HEADER = re.compile(rb"([-!#$%&'*+.^_`|~0-9a-zA-Z]+):[ \t]*((?:[^\x00\s]+(?:[ \t]+[^\x00\s]+)*)?)[ \t]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")


def read_plain_head(data: bytes) -> tuple[dict[str, Any], int, bytes] | None:
    """A request's head as clients write it: its ASGI scope, its body's length, and what follows the head.

    None for a head that is not whole, and for whatever is rare or wrong: that is a whole library's work.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    request_line = _REQUEST_LINE.fullmatch(first)
    if not end or not request_line:
        return None
    headers: list[tuple[bytes, bytes]] = []
    for line in lines:
        if not (header := _HEADER.fullmatch(line)):
            return None
        headers.append((header[1].lower(), header[2]))
    named = dict(headers)
    length = named.get(b"content-length", b"0")
    is_plain = (
        len(named) == len(headers)
        and b"host" in named
        and _LENGTH.fullmatch(length)
        and named.get(b"connection", b"keep-alive").lower() == b"keep-alive"
        and not named.keys() & {b"transfer-encoding", b"expect", b"upgrade"}
    )
    if not is_plain:
        return None
    path, _, query = request_line[2].partition(b"?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "asgi": {"spec_version": "2.1", "version": "3.0"},
        "method": request_line[1].decode(),
        "scheme": "http",
        "path": unquote(path.decode()),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "extensions": {},
    }
    return scope, int(length), rest


@functools.lru_cache(maxsize=1)
def _date_header(now: int) -> bytes:
    return b"date: " + email.utils.formatdate(now, usegmt=True).encode()


def hang_up(connection: trio.socket.SocketType) -> None:
    """End a connection in both directions: whoever reads or writes there is told."""
    with suppress(OSError):
        connection.shutdown(trio.socket.SHUT_RDWR)


class ClientStream:
    """A client's connection, closed on a client that does not take what it asked for.

    Who writes to it is shielded: half a piece would spoil what follows. So each write has an end of its own.
    """

    # Its place in the state of each request's scope.
    STATE_KEY = "lmarena_proxy.stream"

    def __init__(self, stream: trio.SocketStream, write_patience_seconds: float = math.inf) -> None:
        """`write_patience_seconds`: how long a client may take for `WRITE_BYTES`."""
        self.socket, self._write_patience_seconds = stream.socket, write_patience_seconds
        self.receive_some, self.send_eof, self.aclose = stream.receive_some, stream.send_eof, stream.aclose
        self._send_all = stream.send_all
        # Whether the client takes nothing any more.
        self.is_broken = False

    async def send_all(self, data: bytes) -> None:
        """Raises `trio.BrokenResourceError` where not all of it can be sent, or not in time."""
        for at in range(0, len(data), WRITE_BYTES):
            try:
                with trio.fail_after(self._write_patience_seconds):
                    await self._send_all(data[at : at + WRITE_BYTES])
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.is_broken = True
                hang_up(self.socket)
                raise trio.BrokenResourceError("The client takes nothing any more.") from error


@functools.cache
def _hypercorn_connection() -> Callable[[ASGIApp, ClientStream, bytes], Awaitable[None]]:
    """What makes Hypercorn's connections: of an application, a stream, and what was read of it before."""
    from hypercorn.app_wrappers import ASGIWrapper
    from hypercorn.config import Config as HypercornConfig
    from hypercorn.events import RawData
    from hypercorn.trio.tcp_server import TCPServer
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState

    settings = HypercornConfig()
    settings.keep_alive_timeout = KEEP_ALIVE_SECONDS
    settings.keep_alive_max_requests = sys.maxsize  # Else the 1000th answer says "Connection: close".
    settings.h11_max_incomplete_size = 1 << 16
    settings.include_server_header = False
    settings.errorlog = logging.getLogger("lmarena_proxy.http")
    settings.errorlog.setLevel(logging.WARNING)

    class Connection(TCPServer):
        def __init__(self, app: Any, stream: Any, data: bytes) -> None:
            state = ConnectionState({ClientStream.STATE_KEY: stream})
            super().__init__(ASGIWrapper(app), settings, WorkerContext(None), state, stream)
            self._data = data

        async def _read_data(self) -> None:
            if self._data:
                await self.protocol.handle(RawData(self._data))
            await super()._read_data()
            await self.idle_task.stop()  # Else the connection would last as long as it may be idle.

    return Connection


async def serve_by_hypercorn(app: ASGIApp, stream: ClientStream, data: bytes) -> None:
    """Serve a connection from a request on that is not plain; `data` was read of it."""
    await load("hypercorn.trio.tcp_server")
    await _hypercorn_connection()(app, stream, data)


class HttpConnection:
    """One client's connection: an ASGI server for requests in the one form that nearly all clients send.

    A head is read in one pass, an answer's head is a few joined lines, its body goes straight to the socket,
    and all of that happens in the connection's one task. Hypercorn would take several tasks and five times
    the work for it; it gets the connection with the first request that is written otherwise.
    """

    # Its place in the state of each request's scope.
    STATE_KEY = "lmarena_proxy.connection"

    def __init__(self, app: ASGIApp, stream: ClientStream) -> None:
        self._app, self._stream = app, stream
        # Trio's socket tells nobody of the one within, which can send without a task switch.
        own = stream.socket
        self._socket = socket.socket(own.family, own.type, own.proto, fileno=own.fileno())
        self._socket.setblocking(False)
        self._writing = trio.Lock()
        # What was read and belongs to no request yet, and how much of a body is still to be handed out.
        self._buffer, self._unread = b"", 0
        self._has_body = False
        # What goes out together with what follows it, in one packet.
        self._held = b""
        self._has_started = self._has_ended = self._is_chunked = self._is_last = False

    async def serve(self) -> None:
        """Answer requests until one side has enough."""
        try:
            await self._answer_all()
        except OSError:
            pass  # The client is gone before it was one.
        finally:
            self._socket.detach()

    async def _answer_all(self) -> None:
        client = self._socket.getpeername()[:2]
        while not self._is_last:
            if not self._buffer:
                with trio.move_on_after(KEEP_ALIVE_SECONDS):
                    self._buffer = await self._receive_some()
            if not self._buffer:
                return
            head = read_plain_head(self._buffer)
            if head is None:
                await serve_by_hypercorn(self._app, self._stream, self._buffer)
                return
            scope, self._unread, self._buffer = head
            self._has_body = self._has_started = self._has_ended = False
            scope |= {"client": client, "state": {self.STATE_KEY: self, ClientStream.STATE_KEY: self._stream}}
            await self._answer(scope)

    async def _answer(self, scope: Any) -> None:
        try:
            await self._app(scope, self.receive, self.send)
        except Exception:
            log.exception("A request met an error in the program")
        if not self._has_started and not self._is_last:
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await self.send({"type": "http.response.start", "status": 500, "headers": headers})
            await self.send({"type": "http.response.body"})
        # What was not read or not written would be taken for the next request, or its answer.
        self._is_last |= self._unread > 0 or not self._has_ended

    async def _receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    @property
    def has_body_here(self) -> bool:
        """Whether what is still to be handed out of the body has arrived."""
        return len(self._buffer) >= self._unread

    async def receive(self) -> Any:
        """ASGI's: the body, then the client's leaving. What it sends meanwhile is for the next request."""
        if not self._has_body:
            if self._unread and not self._buffer:
                self._buffer = await self._receive_some()
                if not self._buffer:
                    return self._note_left()
            body, self._buffer = self._buffer[: self._unread], self._buffer[self._unread :]
            self._unread -= len(body)
            self._has_body = not self._unread
            return {"type": "http.request", "body": body, "more_body": not self._has_body}
        while len(self._buffer) < READ_BYTES:
            await trio.lowlevel.wait_readable(self._socket)  # To read at once would nearly always be in vain.
            if not (data := await self._receive_some()):
                return self._note_left()
            self._buffer += data
        return await trio.sleep_forever()

    def _note_left(self) -> Any:
        """The client has nothing more to say, which is how it leaves: it is told nothing more, either."""
        self._is_last = True
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """ASGI's; the head travels with the first of the body."""
        if message["type"] == "http.response.start":
            self.start(message["status"], message["headers"])
            return
        data = message.get("body", b"")
        if self._is_chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if not message.get("more_body"):
            self._has_ended = True
            data += b"0\r\n\r\n" * self._is_chunked
        await self.write(data)

    def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Begin an answer."""
        self._held = self._render_head(status, headers)
        self._has_started = True

    def _render_head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        names = {name for name, _ in headers}
        lines = [b"HTTP/1.1 %d " % status, *[b"%b: %b" % header for header in headers]]
        lines.append(_date_header(int(time.time())))
        self._is_chunked = b"content-length" not in names and status not in (204, 304)
        if self._is_chunked:
            lines.append(b"transfer-encoding: chunked")
        head = b"\r\n".join([*lines, b"", b""])
        if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1 or b"\0" in head:
            raise ValueError(f"headers that are none: {headers!r}")
        self._is_last |= b"connection" in names
        return head

    def write_now(self, data: bytes | bytearray) -> int:
        """Send what the system takes at once, after what is held; how much of `data` that was.

        A broken connection takes nothing here; whoever then waits is told of it.
        """
        if self._writing.locked():
            return 0
        held = len(self._held)
        try:
            sent = self._socket.send(self._held + data if held else data)
        except OSError:
            return 0
        self._held = self._held[sent:]
        return max(0, sent - held)

    def hold(self, data: bytes) -> None:
        """Send this together with what follows it."""
        self._held += data

    async def write(self, data: bytes) -> None:
        """Send all of it; it cannot be cancelled, as half a piece would spoil what follows.

        A client that takes too long is one that has left: `receive` tells of it.
        """
        data = data[self.write_now(data) :]
        if self._held or data:
            data, self._held = self._held + data, b""
            # Shielded from before the lock on: what was taken out of `_held` must not be lost.
            with trio.CancelScope(shield=True):
                async with self._writing:
                    try:
                        await self._stream.send_all(data)
                    except trio.BrokenResourceError:
                        self._is_last = True


class HttpRequest:
    """What the program needs of one HTTP request, and the way to answer it."""

    def __init__(self, scope: Any, receive: ASGIReceive, send: ASGISend) -> None:
        self.id = f"req_{uuid.uuid4().hex}"
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.client: tuple[str, int] | None = scope.get("client")
        self.has_started = False
        self.has_ended = False
        self._receive, self._send = receive, send
        self._has_whole_body = False
        state = scope.get("state", {})
        self._stream: ClientStream | None = state.get(ClientStream.STATE_KEY)
        # Where a streamed body is written to; None where that is Hypercorn's business.
        self._connection: HttpConnection | None = state.get(HttpConnection.STATE_KEY)
        # Sent with every response to this request, whoever renders it.
        self.extra_headers: dict[str, str] = {"x-request-id": self.id}

    @property
    def client_name(self) -> str:
        """Who asks: its address, and the program's own name for itself."""
        address = self.client[0] if self.client else ""
        return " · ".join(filter(None, (address, self.headers.get("user-agent", "")[:80])))

    async def receive(self) -> Any:
        """An ASGI receive that knows where the body ends, and tells nothing after the answer's end.

        Hypercorn may close the connection within the last send, and would end the request within that.
        """
        message = await self._receive()
        if message["type"] == "http.disconnect" and self.has_ended:
            await trio.sleep_forever()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._has_whole_body = True
        return message

    async def send(self, message: Any) -> None:
        """An ASGI send that adds the headers every response has."""
        if message["type"] == "http.response.start":
            self.has_started = True
            await self._drain()
            message = {**message, "headers": self._all_headers(message["headers"])}
        elif not message.get("more_body"):
            self.has_ended = True
        await self._send(message)

    def _all_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        extra = self.extra_headers.items()
        return [*headers, *((name.encode(), value.encode("latin-1")) for name, value in extra)]

    async def _drain(self) -> None:
        """Read away what is left of the body: a client that is still sending would not see an early answer.

        Where that takes too long the connection ends with the answer.
        """
        if self._has_whole_body:
            return
        size = 0
        with trio.move_on_after(DRAIN_SECONDS):
            while not self._has_whole_body and size < DRAIN_BYTES:
                size += len((await self.receive()).get("body", b""))
        if not self._has_whole_body:
            self.extra_headers["connection"] = "close"

    @property
    def is_plain(self) -> bool:
        """Whether it was read by `HttpConnection`, and not by Hypercorn."""
        return self._connection is not None

    @property
    def is_broken(self) -> bool:
        """Whether it is known that not all that was written arrives."""
        return self._stream is not None and self._stream.is_broken

    @property
    def is_direct(self) -> bool:
        """Whether a body in pieces can be begun, and a piece be written, without waiting for anything."""
        return self._connection is not None and self._has_whole_body

    def start_stream_now(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Begin a body that comes in pieces, where `is_direct`; the head travels with the first of them."""
        if self._connection and self._has_whole_body:
            self.has_started = True
            self._connection.start(200, self._all_headers(headers))

    async def start_stream(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Begin a body that comes in pieces."""
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    def frame(self, data: bytes) -> bytes:
        """A piece of such a body as it is to be written."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._connection and data else data

    def write_now(self, data: bytes | bytearray) -> int:
        """Write what can be written at once, without waiting for anything; how much that was."""
        return self._connection.write_now(data) if self._connection and self.has_started else 0

    async def write(self, data: bytes) -> None:
        """Write framed pieces; it cannot be cancelled."""
        if self._connection:
            await self._connection.write(data)
        else:
            await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes) -> None:
        """Write the last framed pieces, and with them the body's end."""
        if self._connection:
            self._connection.hold(data)
            data = b""
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    async def respond_error(self, error: ApiError) -> None:
        """The one place where an error is rendered before the first byte."""
        headers = {"content-type": "application/json"}
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        if not error.may_retry:
            headers["x-should-retry"] = "false"
        await self.respond(error.http_status, encode_error(error, self.id), headers)

    async def read_body(self, limit_bytes: int) -> bytes:
        """The whole body. Raises ClientError when it is too large or too slow."""
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit_bytes:
            raise self._too_large(limit_bytes)
        if self._connection and self._connection.has_body_here:
            return await self._read_parts(limit_bytes)  # A scope costs more than what is done without one.
        with trio.move_on_after(BODY_TIMEOUT_SECONDS):
            return await self._read_parts(limit_bytes)
        message = f"The body did not arrive within {BODY_TIMEOUT_SECONDS} s."
        raise ClientError(message, status=408, code="timeout")

    async def _read_parts(self, limit_bytes: int) -> bytes:
        parts, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise self._too_large(limit_bytes)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self, limit_bytes: int) -> ClientError:
        message = f"The body is larger than server.max_body_mb ({limit_bytes >> 20} MiB)."
        return ClientError(message, status=413, code="request_too_large")


class Reply:
    """The response to a request, in one of its forms: what its answers show goes in."""

    def __init__(self, http: HttpRequest, asked: AnswerRequest) -> None:
        self.http, self.asked = http, asked
        self.answer_id = f"chatcmpl-{http.id.removeprefix('req_')}"
        self.created = int(time.time())

    def begin(self, nursery: trio.Nursery) -> None:
        """Start what runs beside the answering task."""
        nursery.start_soon(self.attend, nursery.cancel_scope)

    async def attend(self, request_scope: trio.CancelScope) -> None:
        """Wait for the client to leave, and then end the request."""
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        if not self.http.has_ended:
            request_scope.cancel()

    def has_shown(self, index: int) -> bool:
        """Whether the client has something of an answer already."""
        return False

    async def show(self, index: int, events: Sequence[AnswerEvent]) -> None:
        """Take what an answer shows. A whole reply waits for all of it."""

    @property
    def can_show_now(self) -> bool:
        """Whether text can be taken without waiting for anything."""
        return True

    def show_now(self, index: int, text: str) -> None:
        """Take text that an answer shows, when that can be done."""

    def close(self, index: int, answer: Answer) -> None:
        """Take the end of one of several answers."""

    async def finish(self, answers: Sequence[Answer]) -> None:
        raise NotImplementedError

    async def _respond(self, body: bytes) -> None:
        """Give a whole reply. Raises ClientLeft when not all of it was taken."""
        await self.http.respond(200, body, {"content-type": "application/json"})
        if self.http.is_broken:
            raise ClientLeft

    async def fail(self, error: ApiError) -> None:
        await self.http.respond_error(error)


class WholeReply(Reply):
    """One JSON object at the end."""

    def __init__(self, http: HttpRequest, asked: AnswerRequest, settings: RequestsConfig) -> None:
        super().__init__(http, asked)
        self._settings = settings

    async def finish(self, answers: Sequence[Answer]) -> None:
        head = (self.answer_id, self.asked.model, self.created)
        await self._respond(encode_completion(*head, answers, self._settings.reasoning))


class PicturesReply(Reply):
    """The pictures of image models: by their addresses, or fetched and given in base64."""

    def __init__(self, http: HttpRequest, asked: AnswerRequest, files: MediaFiles, limit_mb: int) -> None:
        super().__init__(http, asked)
        self._files, self._limit_mb = files, limit_mb

    async def finish(self, answers: Sequence[Answer]) -> None:
        pictures = Pictures(self.created, [await self._picture(answer) for answer in answers])
        await self._respond(encode_json(pictures))

    async def _picture(self, answer: Answer) -> Picture:
        if not answer.media:
            if answer.finish_reason == "content_filter":
                message = "The site's moderation stopped this picture."
                raise ClientError(message, code="content_policy_violation")
            words = f" It said: {answer.text[:300]}" if answer.text else ""
            raise ArenaError(f"{self.asked.model} sent no picture.{words}", may_retry=False)
        url = answer.media[0].url
        if self.asked.image_format == "url":
            return Picture(url=url)
        try:
            _, data = await self._files.fetch(url, self._limit_mb)
        except FetchFailed as error:
            raise ArenaError(f"The picture at {url} cannot be fetched: {error}.", may_retry=False) from None
        return Picture(b64_json=base64.b64encode(data).decode())


class StreamedReply(Reply):
    """Server-sent events.

    The status line is held until the answer begins or `commit_after_seconds` are over. The answering task
    writes what the system takes at once. What it does not take waits in an outbox for a task of its own,
    since a write to a client that reads nothing cannot be cancelled and must not hold the lease.
    """

    HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    )
    OUTBOX_LIMIT_BYTES = 1 << 20
    # What the system takes for certain when it has taken all before.
    QUICK_BYTES = 1 << 12

    def __init__(self, http: HttpRequest, asked: AnswerRequest, settings: RequestsConfig) -> None:
        super().__init__(http, asked)
        self._settings = settings
        head = (self.answer_id, asked.model, self.created)
        self._encoders = [ChunkEncoder(*head, index, settings.reasoning) for index in range(asked.n)]
        role = Delta(role="assistant", content="")
        self._opening = b"".join([encoder.delta(role) for encoder in self._encoders])
        # Framed pieces that wait to be written, and whether a task is at it.
        self._outbox = bytearray()
        self._is_writing = False
        self._emptied = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery
        self._written = trio.Event()
        self._put_at = trio.current_time()
        # Which answers the client has something of, and which are still to come to their end.
        self._begun: set[int] = set()
        self._open = dict.fromkeys(range(asked.n))
        # Whether there is a status, and whether there is all of the reply.
        self._is_committed = self._is_complete = False

    def begin(self, nursery: trio.Nursery) -> None:
        super().begin(nursery)
        self._nursery = nursery

    def has_shown(self, index: int) -> bool:
        return index in self._begun

    async def attend(self, request_scope: trio.CancelScope) -> None:
        """Also commits to a status, and keeps a quiet stream alive."""
        due_at = self._put_at + self._settings.commit_after_seconds
        while True:
            with trio.move_on_at(due_at):
                await super().attend(request_scope)
                return
            due_at = self._put_at + self._settings.keepalive_seconds
            if self._is_complete:
                due_at = math.inf
            elif not self._is_committed or trio.current_time() >= due_at:
                self._put(self._keepalive() if self._is_committed else b"")
                due_at = self._put_at + self._settings.keepalive_seconds

    def _keepalive(self) -> bytes:
        # Some watchdogs count chunks and not comments; some naive clients choke on comments.
        index = next(iter(self._open), 0)
        chunk = self._encoders[index].delta(Delta(content=""))
        return {"chunk": chunk, "comment": SSE_COMMENT, "off": b""}[self._settings.keepalive]

    def _put(self, data: bytes) -> None:
        """Take the next piece into the outbox, and write what can be written at once."""
        self._append(data)
        if not self._is_writing:
            del self._outbox[: self.http.write_now(self._outbox)]
            if self._outbox:
                self._start_writing()

    def _append(self, data: bytes) -> None:
        if not self._is_committed:
            self._is_committed = True
            self.http.start_stream_now(self.HEADERS)
            data, self._opening = self._opening + data, b""
        self._outbox += self.http.frame(data)
        self._put_at = trio.current_time()

    def _start_writing(self) -> None:
        if not self._is_writing:
            self._is_writing = True
            self._nursery.start_soon(self._write)

    async def _write(self) -> None:
        """Write what the outbox holds, as long as that takes."""
        if not self.http.has_started:
            await self.http.start_stream(self.HEADERS)
        while self._outbox and not self._is_complete:
            data = bytes(self._outbox)
            self._outbox.clear()
            await self.http.write(data)
            self._emptied.unpark_all()
        if self.http.is_broken:
            self._written.set()  # Whoever waits is told; where nobody does, `attend` is.
            return
        if self._is_complete:
            await self.http.end_stream(bytes(self._outbox))
            self._written.set()
        self._is_writing = False

    async def _wait_for_client(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait for what the client's reading brings about. Raises ClientLeft when that takes too long."""
        with trio.move_on_after(self._settings.idle_timeout_seconds):
            await wait()
            if not self.http.is_broken:
                return
        raise ClientLeft

    async def show(self, index: int, events: Sequence[AnswerEvent]) -> None:
        self._begun.add(index)
        encoder = self._encoders[index]
        self._put(b"".join([encoder.event(event) for event in events]))
        while len(self._outbox) > self.OUTBOX_LIMIT_BYTES:
            await self._wait_for_client(self._emptied.park)

    @property
    def can_show_now(self) -> bool:
        can_begin = self.http.has_started or self.http.is_direct
        return can_begin and not self._is_writing and not self._is_complete

    def show_now(self, index: int, text: str) -> None:
        self._begun.add(index)
        self._put(self._encoders[index].text(text))

    def close(self, index: int, answer: Answer) -> None:
        self._begun.add(index)
        del self._open[index]
        # With the last of them comes the end of all, in one packet.
        put = self._put if self._open else self._append
        put(self._encoders[index].finish(answer.finish_reason))

    async def finish(self, answers: Sequence[Answer]) -> None:
        usage = self._encoders[0].usage(sum_usage(answers)) if self.asked.include_usage else b""
        await self._end(usage + SSE_DONE)

    async def fail(self, error: ApiError) -> None:
        if not self._is_committed:
            self._is_committed = self._is_complete = True
            await self.http.respond_error(error)
        else:
            # The one place where an error is rendered after the first byte.
            await self._end(b"data: " + encode_error(error, self.http.id) + b"\n\n" + SSE_DONE)

    async def _end(self, data: bytes) -> None:
        if not self._is_complete:
            self._append(data)
            self._is_complete = True
            if self.http.is_direct and not self._is_writing and len(self._outbox) < self.QUICK_BYTES:
                await self._write()
                return
            self._start_writing()
        await self._wait_for_client(self._written.wait)


class Choice:
    """One of a request's answers: the sink of its exchange, on its way into the reply."""

    def __init__(
        self, reply: Reply, index: int, answer: Answer, lease: Lease, files: MediaFiles | None
    ) -> None:
        """`files`: where the answer's images and videos are kept, if they are."""
        self.answer, self.lease = answer, lease
        self._reply, self._index, self._files = reply, index, files

    async def deliver(self, events: Sequence[AnswerEvent]) -> bool:
        if self._files and any(isinstance(event, Media) for event in events):
            events = [await self._keep(event, self._files) for event in events]
        if shown := self.answer.take(events):
            await self._reply.show(self._index, shown)
        return self.answer.cut is None

    @property
    def takes_now(self) -> bool:
        return self._reply.can_show_now and self.answer.is_plain

    def deliver_now(self, text: str) -> None:
        self.answer.texts.append(text)
        self._reply.show_now(self._index, text)

    async def _keep(self, event: AnswerEvent, files: MediaFiles) -> AnswerEvent:
        own_url = f"http://{self._reply.http.headers['host']}"
        return await files.keep(event, own_url) if isinstance(event, Media) else event

    def restart(self) -> bool:
        if self._reply.has_shown(self._index):
            return False
        self.answer.clear()
        return True

    async def finish(self, finish: Finish | None) -> None:
        """Take the answer's end, None where it was cut."""
        if shown := self.answer.end(finish):
            await self._reply.show(self._index, shown)
        self._reply.close(self._index, self.answer)


def _for_log(message: Message) -> dict[str, object]:
    # Attachments are data: URLs; only their names are kept.
    names = [attachment.name for attachment in message.attachments]
    return {"role": message.role, "content": without_payloads(message.content), "attachments": names}


class Running:
    """A request that is being answered."""

    def __init__(self, reply: Reply, choices: Sequence[Choice], received_at: float) -> None:
        self.reply, self.choices, self.received_at = reply, choices, received_at
        self.scope = trio.CancelScope()
        # What its client is told, if it is ended before its time.
        self.ending: ApiError | None = None

    @property
    def leases(self) -> list[Lease]:
        return [choice.lease for choice in self.choices]

    def end(self, message: str, code: str) -> None:
        self.ending = BridgeError(message, code=code, may_retry=False)
        self.scope.cancel()

    def describe(self, place: int | None) -> dict[str, object]:
        """What a dashboard shows of it; `place` is its own in the model's queue, counted from 1."""
        lease, texts = self.leases[0], self.choices[0].answer.texts
        if lease.first_byte_at is not None:
            state = "streaming"
        elif lease.admitted_at is not None:
            state = "waiting_for_first_byte"
        else:
            state = "queued" if place else "waiting_for_tab"
        return {
            "request_id": self.reply.http.id,
            "created_at": self.received_at,
            "model": self.reply.asked.model,
            "model_id": lease.model.id,
            "client": self.reply.http.client_name,
            "path": self.reply.http.path,
            "is_stream": self.reply.asked.stream,
            "state": state,
            "place": place,
            "attempts": len(lease.tries),
            "session_id": lease.last_session_id,
            "preview": texts.last(PREVIEW_CHARACTERS),
            "characters": len(texts),
        }

    def describe_whole(self) -> dict[str, object]:
        """The same with all there is so far, in the form of the request log."""
        lease = self.leases[0]
        return {
            **self.describe(None),
            **self._contents(),
            "parameters": self.reply.asked.parameters,
            "queued_seconds": lease.seconds(lease.admitted_at),
            "total_seconds": lease.seconds(),
            "tries": [each for lease in self.leases for each in lease.tries],
        }

    def _contents(self) -> dict[str, Any]:
        answers = [choice.answer for choice in self.choices]
        return {
            "messages": [*map(_for_log, self.reply.asked.messages)],
            "answer": "\n\n".join(without_payloads(answer.text) for answer in answers),
            "reasoning": "\n\n".join(answer.reasoning for answer in answers),
        }

    def tell(
        self, status: int, outcome: str, failure: Exception | None, *, has_contents: bool
    ) -> RequestEnded:
        """Its whole story; of several choices, the first byte and the longest wait count."""
        now = trio.current_time()
        http, asked, leases = self.reply.http, self.reply.asked, self.leases
        first_bytes = [lease.first_byte_at for lease in leases if lease.first_byte_at is not None]
        usage = sum_usage([choice.answer for choice in self.choices]) if status == 200 else None
        contents = self._contents() if has_contents else {}
        return RequestEnded(
            request_id=http.id,
            created_at=self.received_at,
            model=asked.model,
            model_id=leases[0].model.id,
            is_stream=asked.stream,
            status=status,
            outcome=outcome,
            session_id=leases[0].last_session_id,
            attempts=sum(len(lease.tries) for lease in leases),
            queued_seconds=max((lease.admitted_at or now) - lease.started_at for lease in leases),
            first_byte_seconds=leases[0].seconds(min(first_bytes)) if first_bytes else None,
            total_seconds=leases[0].seconds(),
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            messages=encode_json(contents["messages"]).decode() if contents else None,
            answer=contents.get("answer"),
            path=http.path,
            client=http.client_name,
            parameters=encode_json(asked.parameters).decode(),
            reasoning=contents.get("reasoning") or None,
            error=str(failure) or repr(failure) if failure else None,
            traceback="".join(traceback.format_exception(failure)) if failure else None,
            tries=encode_json([each for lease in leases for each in lease.tries]).decode(),
        )


class Answers:
    """The endpoints that the site answers: chat completions, image generations and image edits."""

    PATHS = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits")

    def __init__(
        self, config: Config, pool: SessionPool, relay: Relay, media: MediaFiles, bus: EventBus
    ) -> None:
        self._config, self._pool, self._relay, self._media, self._bus = config, pool, relay, media, bus
        self._running: dict[str, Running] = {}
        self._idle = trio.Event()
        self._is_draining = False
        self._told_ignored: set[str] = set()
        self.completed = self.failed = self.left = 0

    @property
    def active(self) -> int:
        return len(self._running)

    async def drain(self, grace_seconds: float) -> None:
        """Take no new requests, give running ones this long, then end them with an error."""
        self._is_draining = True
        for seconds in (grace_seconds, 1.0):
            with trio.move_on_after(seconds):
                while self._running:
                    await self._idle.wait()
            for running in self._running.values():
                running.end("The program is shutting down.", "shutting_down")

    def abort(self, request_id: str) -> bool:
        """The person wants a request to end. False when it does not run."""
        if running := self._running.get(request_id):
            running.end("The request was aborted at the dashboard.", "aborted")
        return running is not None

    def describe_running(self, at_most: int = 300) -> list[dict[str, object]]:
        """The `running` part of /api/state, oldest first."""
        places = {lease: place for pool in self._pool for place, lease in enumerate(pool.waiters, start=1)}
        some = itertools.islice(self._running.values(), at_most)
        return [running.describe(places.get(running.leases[0])) for running in some]

    def running(self, request_id: str) -> Running | None:
        return self._running.get(request_id)

    async def answer(self, http: HttpRequest) -> None:
        """Answer one request. Raises ApiError for what can be told before an answer is tried."""
        received_at = time.time()
        asked = await self._read(http)
        model = self._pool.catalog.resolve(asked.model, asked.images)
        self._check(asked, model)
        if self._is_draining:
            raise BridgeError("The program is shutting down.", code="shutting_down", retry_after=5)
        if asked.ignored:
            http.extra_headers["x-ignored-parameters"] = ", ".join(asked.ignored)
            self._tell_ignored(asked.ignored)
        reply = self._reply(http, asked)
        files = self._media if self._config.media.keep and asked.image_format != "b64_json" else None
        settings = self._config.requests
        choices = [
            Choice(reply, index, Answer(asked, settings), Lease(http.id, model), files)
            for index in range(asked.n)
        ]
        async with trio.open_nursery() as nursery:
            reply.begin(nursery)
            await self._carry_out(Running(reply, choices, received_at))
            nursery.cancel_scope.cancel()

    async def _read(self, http: HttpRequest) -> AnswerRequest:
        body = await http.read_body(self._config.server.max_body_mb << 20)
        if http.path == "/v1/images/edits":
            await load("werkzeug.formparser")
            return read_image_edit(body, http.headers.get("content-type", ""))
        if http.path == "/v1/images/generations":
            return read_image_generation(body)
        asked = read_chat(body, self._pool.catalog.takes_image)
        return merge_system(asked) if self._config.requests.merge_system else asked

    def _check(self, asked: AnswerRequest, model: Model) -> None:
        """Raises ClientError for what the model cannot do."""
        if asked.image_format and model.modality != "image":
            raise ClientError(f"The model {asked.model!r} makes no pictures.", param="model")
        size = int(self._pool.of(model.id).limiter.total_tokens)
        if asked.n > size:
            message = f"n = {asked.n}: the model {asked.model!r} gives up to {size} answers at once."
            raise ClientError(message, param="n")

    def _tell_ignored(self, ignored: Sequence[str]) -> None:
        if news := [name for name in ignored if name not in self._told_ignored]:
            self._told_ignored.update(news)
            log.info("Parameters that have no effect here (said once): %s", ", ".join(news))

    def _reply(self, http: HttpRequest, asked: AnswerRequest) -> Reply:
        if asked.image_format:
            return PicturesReply(http, asked, self._media, self._config.media.max_file_mb)
        form = StreamedReply if asked.stream else WholeReply
        return form(http, asked, self._config.requests)

    async def _carry_out(self, running: Running) -> None:
        reply, choices = running.reply, running.choices
        status, outcome = 499, "client_left"
        failure: Exception | None = None
        self._running[reply.http.id] = running
        try:
            with running.scope:
                await self._answer_all(reply, choices)
                answers = [choice.answer for choice in choices]
                await reply.finish(answers)
                status, outcome = 200, answers[0].finish_reason
            if running.scope.cancelled_caught and running.ending:
                raise running.ending
        except ClientLeft:
            log.info("Request %s: the client does not read any more", reply.http.id)
        except ApiError as error:
            status, outcome, failure = error.http_status, error.error_code, error
            await self._fail(reply, error)
        except Exception as error:
            status, outcome, failure = 500, "internal_error", error
            log.exception("Request %s met an error in the program", reply.http.id)
            await self._fail(reply, ApiError(INTERNAL_ERROR))
        finally:
            self._note_ended(running, status, outcome, failure)
            del self._running[reply.http.id]
            if not self._running:
                self._idle.set()
                self._idle = trio.Event()

    async def _fail(self, reply: Reply, error: ApiError) -> None:
        try:
            await reply.fail(error)
        except ClientLeft:
            log.info("Request %s: the client did not read its error", reply.http.id)

    async def _answer_all(self, reply: Reply, choices: Sequence[Choice]) -> None:
        """Let the relay fill all choices, side by side; the first that fails ends all."""
        limits = self._limits()
        upload = self._relay.uploader.way(choices[0].lease, limits)
        messages = await self._media.attach_all(reply.asked, self._config.arena.max_attachment_mb, upload)
        if len(choices) == 1:
            await self._answer_one(choices[0], messages, limits)
            return
        try:
            async with trio.open_nursery() as nursery:
                for choice in choices:
                    nursery.start_soon(self._answer_one, choice, messages, limits)
        except BaseExceptionGroup as group:
            failure = first_of(group, ApiError, ClientLeft)
        else:
            return
        raise failure

    async def _answer_one(self, choice: Choice, messages: Sequence[Message], limits: Limits) -> None:
        await choice.finish(await self._relay.answer(choice.lease, messages, choice, limits))

    def _limits(self) -> Limits:
        settings = self._config.requests
        return Limits(
            queue_seconds=settings.queue_timeout_seconds,
            rate_limit_seconds=settings.queue_timeout_seconds,
            first_byte_seconds=settings.first_byte_timeout_seconds,
            idle_seconds=settings.idle_timeout_seconds,
            exchange_seconds=math.inf,
            total_seconds=settings.total_timeout_seconds,
            person_wait_seconds=settings.person_wait_seconds,
            attempts=3,
            answer_bytes=self._config.limits.answer_mb << 20,
        )

    def _note_ended(self, running: Running, status: int, outcome: str, failure: Exception | None) -> None:
        """Count it and tell of it."""
        self.completed += status == 200
        self.left += status == 499
        self.failed += status not in (200, 499)
        has_contents = self._config.log.contents
        self._bus.publish(running.tell(status, outcome, failure, has_contents=has_contents))


class Admission:
    """Who may call: the host that was asked for, the key, the origin."""

    # What asks for no key: nothing of it tells of conversations, and kept media are found by their hash only.
    OPEN = re.compile(r"/|/(dashboard|media)/.*|/(health|ready|openapi\.json|bridge\.user\.js)", re.DOTALL)

    def __init__(self, config: ServerConfig) -> None:
        self._config = config

    def check(self, http: HttpRequest) -> None:
        """Raises ClientError for a request that may not be served; adds the CORS headers of one that may."""
        host = http.headers.get("host", "")
        if not self._is_own_host(host):
            message = f"This server does not answer to the name {host!r} (server.allowed_hosts)."
            raise ClientError(message, status=421, code="misdirected_request")
        origin = http.headers.get("origin")
        if origin is not None and self._is_allowed_origin(origin):
            http.extra_headers |= {
                "access-control-allow-origin": origin,
                "access-control-expose-headers": "x-request-id, retry-after, x-ignored-parameters",
                "vary": "origin",
            }
        elif origin is not None and origin.partition("://")[2] != host and self._needs_no_preflight(http):
            raise ClientError(f"Calls from {origin} are not allowed.", status=403, code="origin_not_allowed")
        if http.method != "OPTIONS" and not self.OPEN.fullmatch(http.path):
            self._check_key(http.headers.get("authorization", ""))

    def _needs_no_preflight(self, http: HttpRequest) -> bool:
        """Whether a foreign page could have sent this without asking: JSON to /v1 it must ask for first."""
        is_json = http.headers.get("content-type", "").startswith("application/json")
        is_asked_for = http.path.startswith("/v1/") and is_json
        return http.method not in ("GET", "HEAD", "OPTIONS") and not is_asked_for

    def _is_own_host(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        allowed = {self._config.host.lower(), *(each.lower() for each in self._config.allowed_hosts)}
        return name in LOOPBACK_HOSTS or name in allowed or host.lower() in allowed

    def _is_allowed_origin(self, origin: str) -> bool:
        return origin in self._config.cors_origins or "*" in self._config.cors_origins

    def _check_key(self, authorization: str) -> None:
        expected = self._config.api_key
        given = authorization.removeprefix("Bearer ").strip(" \t")
        if expected and not hmac.compare_digest(given.encode("latin-1"), expected.encode()):
            raise ClientError("The API key is missing or wrong.", status=401, code="invalid_api_key")

    def preflight(self, http: HttpRequest) -> dict[str, str]:
        """The headers that answer an OPTIONS request: permission where the origin is allowed, else none."""
        if "access-control-allow-origin" not in http.extra_headers:
            return {}
        return {
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": http.headers.get("access-control-request-headers", "*"),
            "access-control-max-age": "600",
        }


class HttpListener:
    """Takes connections: so many at most, and whatever breaks in one breaks nothing else."""

    # What a system says that can open no more of them.
    FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app, self._limit = app, config.limits.connections
        self._host, self._port = config.server.host, config.server.port
        self._write_patience_seconds = config.requests.idle_timeout_seconds
        self._open: set[trio.SocketStream] = set()

    async def serve(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen; `started` with the URL. Raises OSError when the port cannot be had."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(self._port, host=self._host, backlog=1024)
            for listener in listeners:
                nursery.start_soon(self._listen, listener, nursery)
            host, port = listeners[0].socket.getsockname()[:2]
            task_status.started(f"http://{reachable(host)}:{port}")
            try:
                await trio.sleep_forever()
            finally:  # What is being written is shielded.
                for stream in self._open:
                    hang_up(stream.socket)

    async def _listen(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        """Accept connections; as `trio.serve_listeners`, but that ends each of them by a cancellation."""
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in self.FULL:
                        raise
                    log.warning("A connection cannot be accepted: %s", error)
                    await trio.sleep(0.1)  # Those that are open go on, and some of them end.
                else:
                    nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        self._open.add(stream)
        try:
            if len(self._open) > self._limit:
                await self._refuse(stream)
            else:
                await HttpConnection(self._app, ClientStream(stream, self._write_patience_seconds)).serve()
        except Exception as error:
            # What the protocol's libraries do not expect of a client's bytes ends that client's connection.
            log.warning("A client's connection broke: %r", next(leaves(error)))
        finally:
            self._open.remove(stream)
            stream.socket.close()

    async def _refuse(self, stream: trio.SocketStream) -> None:
        error = BridgeError(f"More than {self._limit} connections (limits.connections).", code="overloaded")
        body = encode_error(error, f"req_{uuid.uuid4().hex}")
        head = "HTTP/1.1 503 Service Unavailable", "content-type: application/json", "connection: close"
        lines = [*head, "retry-after: 5", f"content-length: {len(body)}", "", ""]
        with trio.move_on_after(1):
            await stream.send_all("\r\n".join(lines).encode() + body)
            await stream.send_eof()


def _json(value: object, status: int = 200) -> "quart.Response":
    return quart.Response(encode_json(value), status, content_type="application/json")


class BootstrapAction(msgspec.Struct):
    """The body of POST /api/bootstrap. `models`: ids of those that a start is for, if not for all."""

    action: Literal["start", "abort"]
    models: frozenset[str] = frozenset()


class OneMore(msgspec.Struct):
    """The body of POST /api/sessions."""

    model_id: str


_ActionBody = TypeVar("_ActionBody", BootstrapAction, OneMore)


async def _read_action(form: type[_ActionBody]) -> _ActionBody:
    try:
        return msgspec.json.decode(await quart.request.get_data(), type=form)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ClientError(f"The body is not JSON: {error}.") from None


def _read_number(name: str, default: int, at_most: int) -> int:
    """A whole number from 1 of the query. Raises ClientError."""
    text = quart.request.args.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", text) or not 1 <= int(text) <= at_most:
        raise ClientError(f"{name}: expected a whole number from 1 to {at_most}.", param=name)
    return int(text)


class Operation(msgspec.Struct, frozen=True):
    """What can be asked of a path: its answer and its body by their types, each a struct or a schema."""

    method: str
    path: str
    summary: str
    answer: dict[str, Any]
    body: dict[str, Any] = {}
    status: int = 200
    query: dict[str, Any] = {}


_JSON, _OBJECT, _FILE = "application/json", {"type": "object"}, {"type": "string", "format": "binary"}
_STRING = {"type": "string"}
_FILTER = {
    "model": _STRING,
    "status": {"pattern": "^(|ok|failed|left|[1-5][0-9]{2})$", **_STRING},
    "q": {"maxLength": MAX_SEARCH_CHARACTERS, **_STRING},
}
_EDIT = {
    "type": "object",
    "required": ["model", "prompt", "image"],
    "properties": {
        **{name: {"type": "string"} for name in ("model", "prompt", "response_format")},
        "n": {"type": "integer"},
        "image": _FILE,
    },
}
OPERATIONS = (
    Operation(
        *("post", "/v1/chat/completions", "Answer a chat"),
        *({_JSON: Completion, "text/event-stream": {}}, {_JSON: ChatBody}),
    ),
    Operation("post", "/v1/images/generations", "Make pictures", {_JSON: Pictures}, {_JSON: ImageBody}),
    Operation(
        "post", "/v1/images/edits", "Change pictures", {_JSON: Pictures}, {"multipart/form-data": _EDIT}
    ),
    Operation("get", "/v1/models", "All models", {_JSON: ModelList}),
    Operation("get", "/v1/models/{model}", "One model", {_JSON: ModelCard}),
    Operation(
        "get", "/media/{name}", "A picture or video that is kept", {"image/*": _FILE, "video/*": _FILE}
    ),
    Operation("get", "/api/state", "Tabs, bootstrap, pool and requests", {_JSON: _OBJECT}),
    Operation(
        "get", "/api/events", "The state, and then its changes as they come", {"text/event-stream": {}}
    ),
    Operation(
        *("get", "/api/requests", "The request log, newest first", {_JSON: _OBJECT}),
        query={**_FILTER, "before": _STRING, "limit": {"type": "integer", "minimum": 1, "maximum": 500}},
    ),
    Operation("get", "/api/requests/{request_id}", "One request whole", {_JSON: _OBJECT}),
    Operation("delete", "/api/requests/{request_id}", "Abort a running request", {_JSON: _OBJECT}),
    Operation(
        *("get", "/api/requests/export", "All that is stored of requests"),
        {"application/jsonl": _STRING, "text/csv": _STRING},
        query={**_FILTER, "format": {"enum": ["jsonl", "csv"]}},
    ),
    Operation(
        *("get", "/api/statistics", "How things went, by time and by model", {_JSON: _OBJECT}),
        query={"hours": {"enum": [1, 24]}},
    ),
    Operation("get", "/api/settings", "The configuration in force", {_JSON: _OBJECT}),
    Operation(
        "post", "/api/bootstrap", "As Enter and Ctrl-C do", {_JSON: _OBJECT}, {_JSON: BootstrapAction}, 202
    ),
    Operation("post", "/api/models/refresh", "Ask the tabs for their models", {_JSON: _OBJECT}, status=202),
    Operation("post", "/api/sessions", "Open one more conversation", {_JSON: _OBJECT}, {_JSON: OneMore}, 201),
    Operation("delete", "/api/sessions/{session_id}", "Retire a conversation", {_JSON: _OBJECT}),
    Operation("get", "/metrics", "For Prometheus", {"text/plain": _STRING}),
    Operation("get", "/health", "Whether the program lives", {_JSON: _OBJECT}),
    Operation("get", "/ready", "Whether a tab is ready; 503 while none is", {_JSON: _OBJECT}),
)


def describe_api() -> dict[str, Any]:
    """The OpenAPI document. Its schemas are the structs' that read and write the bodies."""
    structs = (
        *(ChatBody, ImageBody, Completion, Pictures, ModelCard, ModelList),
        *(BootstrapAction, OneMore, ErrorBody),
    )
    references, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    known: dict[type, dict[str, Any]] = dict(zip(structs, references, strict=True))

    def content(types: Mapping[str, Any]) -> dict[str, object]:
        return {
            kind: {"schema": known[each] if isinstance(each, type) else each} for kind, each in types.items()
        }

    paths: dict[str, dict[str, Any]] = {}
    error = {"description": "An error", "content": content({_JSON: ErrorBody})}
    place = {"in": "path", "required": True, "schema": {"type": "string"}}
    for each in OPERATIONS:
        answer = {"description": each.summary, "content": content(each.answer)}
        described: dict[str, Any] = {
            "summary": each.summary,
            "parameters": [
                *({"name": name, **place} for name in re.findall("{(.+?)}", each.path)),
                *({"name": name, "in": "query", "schema": schema} for name, schema in each.query.items()),
            ],
            "responses": {str(each.status): answer, "default": error},
        }
        if each.body:
            described["requestBody"] = {"required": True, "content": content(each.body)}
        paths.setdefault(each.path, {})[each.method] = described
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmarena_proxy", "version": VERSION},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": schemes},
        "security": [{}, {"key": []}],
    }


# Rule, method and view.
Route = tuple[str, str, Callable[..., Awaitable["quart.Response"]]]
# What is answered from memory: a value for JSON, and the status.
Told = tuple[object, int]


class Setting(msgspec.Struct, frozen=True):
    """One value of the configuration in force, and where it came from."""

    key: str
    value: object
    default: object
    source: str
    is_secret: bool = False


def list_settings(config: Config, sources: Mapping[str, str]) -> list[Setting]:
    """All settings. `sources` has those that are not the defaults, by their keys."""
    settings = []
    for table, section in msgspec.structs.asdict(config).items():
        defaults = msgspec.structs.asdict(type(section)())
        for name, value in msgspec.structs.asdict(section).items():
            key, default, is_secret = f"{table}.{name}", defaults[name], name == "api_key"
            source = sources.get(key, "default") if value != default else "default"
            shown = ("set" if value else "") if is_secret else value
            settings.append(Setting(key, shown, default, source, is_secret))
    return settings


def _csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    text = encode_json(value).decode() if isinstance(value, list | dict) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# The page loads nothing from elsewhere, and runs nothing that is not a file of its own.
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: https:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


async def _serve_page(name: str = "index.html") -> "quart.Response":
    """A file of the dashboard's directory, and of no other."""
    kind = _PAGE_TYPES.get(Path(name).suffix)
    try:
        path = (HERE / "dashboard" / name).resolve()
        if kind is None or not path.is_relative_to(HERE / "dashboard"):
            raise FileNotFoundError
        data = await trio.Path(path).read_bytes()
    except (OSError, ValueError):
        raise ClientError(f"There is no {quart.request.path}.", status=404, code="not_found") from None
    etag = hashlib.sha256(data).hexdigest()[:32]
    headers = {**_PAGE_HEADERS, "etag": f'"{etag}"'}
    if quart.request.if_none_match.contains(etag):
        return quart.Response(b"", 304, headers)
    return quart.Response(data, headers=headers, content_type=kind)


async def _write_export(requests: RequestLog, wanted: RequestFilter, form: str) -> AsyncIterator[bytes]:
    """All that is stored of the wanted requests, newest first, a few at a time."""
    before = ""
    if form == "csv":
        yield b"\xef\xbb\xbf"  # Without it spreadsheets take UTF-8 for something else.
    while rows := await requests.whole(wanted, before, 200):
        lines = io.StringIO()
        table = csv.DictWriter(lines, rows[0].keys())
        if form == "csv" and not before:
            table.writeheader()
        for row in rows:
            if form == "csv":
                table.writerow({name: _csv_cell(value) for name, value in row.items()})
            else:
                lines.write(encode_json(row).decode() + "\n")
        before = rows[-1]["request_id"]
        yield lines.getvalue().encode()


class ControlPanel:
    """The dashboard and what it is made of: the state and its changes, the request log, actions, metrics."""

    # By the hours asked for: how long a bucket of the series is.
    BUCKETS: ClassVar[dict[int, int]] = {1: 60, 24: 900}

    def __init__(
        self,
        config: Config,
        pool: SessionPool,
        bridges: Bridges,
        bootstrap: Bootstrap,
        answers: Answers,
        requests: RequestLog,
        tail: LogTail,
        bus: EventBus,
    ) -> None:
        self._config, self._pool, self._bridges, self._bootstrap = config, pool, bridges, bootstrap
        self._answers, self._requests = answers, requests
        self._feed, self._metrics = Feed(self.describe, tail), Metrics(pool, bridges)
        bus.subscribe(self._feed.note_event)
        bus.subscribe(self._metrics.note_event)
        self._started_at = time.time()
        self.urls: dict[str, str] = {}
        self.is_demo = False
        # The file of the configuration, and by key, where what is not a default came from.
        self.config_file = ""
        self.sources: Mapping[str, str] = {}

    def routes(self) -> list[Route]:
        """Everything here."""
        return [
            ("/", "GET", _serve_page),
            ("/dashboard/<path:name>", "GET", _serve_page),
            ("/metrics", "GET", self._get_metrics),
            ("/api/state", "GET", self._state),
            ("/api/events", "GET", self._events),
            ("/api/requests", "GET", self._page),
            ("/api/requests/export", "GET", self._export),
            ("/api/requests/<request_id>", "GET", self._request),
            ("/api/requests/<request_id>", "DELETE", self._abort_request),
            ("/api/statistics", "GET", self._statistics),
            ("/api/settings", "GET", self._settings),
            ("/api/bootstrap", "POST", self._control_bootstrap),
            ("/api/models/refresh", "POST", self._refresh_models),
            ("/api/sessions", "POST", self._open_session),
            ("/api/sessions/<session_id>", "DELETE", self._delete_session),
        ]

    # What there is

    def describe(self) -> FeedDocument:
        """What /api/state says, and the feed."""
        obstacle, answers = self._bridges.obstacle(), self._answers
        return {
            "version": VERSION,
            "uptime_seconds": round(time.time() - self._started_at, 3),
            "is_demo": self.is_demo,
            "urls": self.urls,
            "needs_key": bool(self._config.server.api_key),
            "person": {"state": obstacle.state, "advice": obstacle.advice} if obstacle else None,
            "bridges": self._bridges.snapshot(),
            "gates": self._bridges.describe_gates(),
            "bootstrap": self._bootstrap.snapshot(),
            "missing": self._pool.missing_in_all(),
            "page_models": self._pool.catalog.page,
            "pool": self._pool.snapshot(),
            "sessions": self._pool.describe_sessions(),
            "requests": {
                "active": answers.active,
                "completed": answers.completed,
                "failed": answers.failed,
                "left": answers.left,
            },
            "running": answers.describe_running(),
            "violations": self._pool.violations(),
        }

    async def _state(self) -> "quart.Response":
        return _json(self.describe())

    async def _events(self) -> "quart.Response":
        response = quart.Response(
            self._feed.follow(quart.request.headers.get("last-event-id", "")),
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            content_type="text/event-stream; charset=utf-8",
        )
        response.timeout = None
        return response

    async def _get_metrics(self) -> "quart.Response":
        text = prometheus_client.generate_latest(self._metrics.registry)
        return quart.Response(text, content_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _settings(self) -> "quart.Response":
        return _json({"file": self.config_file, "settings": list_settings(self._config, self.sources)})

    # The request log

    def _filter(self) -> RequestFilter:
        return RequestFilter(*(quart.request.args.get(name, "") for name in ("model", "status", "q")))

    async def _page(self) -> "quart.Response":
        limit = _read_number("limit", 50, 500)
        rows = await self._requests.page(self._filter(), quart.request.args.get("before", ""), limit)
        return _json({"data": rows, "next": rows[-1]["request_id"] if len(rows) == limit else None})

    async def _request(self, request_id: str) -> "quart.Response":
        running = self._answers.running(request_id)
        found = running.describe_whole() if running else await self._requests.one(request_id)
        if found is None:
            message = f"There is no request {request_id}."
            raise ClientError(message, status=404, code="not_found", param="request_id")
        return _json({**found, "is_running": running is not None})

    async def _abort_request(self, request_id: str) -> "quart.Response":
        if not self._answers.abort(request_id):
            message = f"The request {request_id} is not running."
            raise ClientError(message, status=404, code="not_found", param="request_id")
        return _json({"aborted": request_id})

    async def _export(self) -> "quart.Response":
        wanted, form = self._filter(), quart.request.args.get("format", "jsonl")
        wanted.condition()  # Raises before the status is sent.
        if form not in ("jsonl", "csv"):
            raise ClientError("format: expected jsonl or csv.", param="format")
        response = quart.Response(
            _write_export(self._requests, wanted, form),
            headers={"content-disposition": f'attachment; filename="requests.{form}"'},
            content_type="text/csv; charset=utf-8" if form == "csv" else "application/jsonl",
        )
        response.timeout = None
        return response

    async def _statistics(self) -> "quart.Response":
        hours = _read_number("hours", 1, 24)
        if hours not in self.BUCKETS:
            raise ClientError("hours: expected 1 or 24.", param="hours")
        return _json(await self._requests.statistics(hours, self.BUCKETS[hours]))

    # What can be done

    async def _control_bootstrap(self) -> "quart.Response":
        asked = await _read_action(BootstrapAction)
        if unknown := [each for each in asked.models if self._pool.catalog.get(each) is None]:
            raise ClientError(f"models: there is no model with the id {unknown[0]}.", param="models")
        start = functools.partial(self._bootstrap.start, asked.models)
        if not (start if asked.action == "start" else self._bootstrap.abort)():
            message = f"Bootstrap is {self._bootstrap.phase}; {asked.action} has no meaning now."
            raise ClientError(message, status=409, code="conflict")
        return _json(self._bootstrap.snapshot(), 202)

    async def _refresh_models(self) -> "quart.Response":
        return _json({"asked": self._bridges.refresh_models()}, 202)

    async def _open_session(self) -> "quart.Response":
        asked = await _read_action(OneMore)
        model = self._pool.catalog.get(asked.model_id)
        if model is None:
            raise ClientError(f"There is no model with the id {asked.model_id}.", param="model_id")
        if model.requires_image:
            message = f"{model.name} works on an image: a request that carries one opens its conversations."
            raise ClientError(message, param="model_id")
        return _json(await self._bootstrap.open_one(model), 201)

    async def _delete_session(self, session_id: str) -> "quart.Response":
        session = self._pool.find(session_id)
        if session is None:
            raise ClientError(
                f"There is no session {session_id}.", status=404, code="not_found", param="session_id"
            )
        self._pool.retire(session, "by the person")
        return _json({"deleted": session_id})


async def _serve_told(tell: Callable[..., Told], **values: str) -> "quart.Response":
    return _json(*tell(**values))


class Pages:
    """What Quart serves. It is loaded with the first request for it, in a thread: answers go on meanwhile."""

    def __init__(
        self, config: Config, media: MediaFiles, panel: ControlPanel, told: Mapping[str, Callable[..., Told]]
    ) -> None:
        """`told`: by rule, what is answered without Quart, when it is asked for by GET."""
        self._config, self._media, self._panel, self._told = config, media, panel, told
        self._app: quart_trio.QuartTrio | None = None

    async def answer(self, http: HttpRequest, scope: Any) -> None:
        """Answer one request."""
        await load("quart_trio")
        self._app = self._app or self._build()
        scope["lmarena_proxy.request"] = http
        await self._app(scope, await self._read_ahead(http), http.send)

    async def _read_ahead(self, http: HttpRequest) -> ASGIReceive:
        """The receive of a request whose body is there: Quart may answer without reading it."""
        limit_bytes = self._config.server.max_body_mb << 20
        body: Any = {"type": "http.request", "body": await http.read_body(limit_bytes)}

        async def receive() -> Any:
            nonlocal body
            message, body = body, None
            return message or await http.receive()

        return receive

    def _build(self) -> "quart_trio.QuartTrio":
        app = quart_trio.QuartTrio("lmarena_proxy", static_folder=None)
        # Quart's own limits end a stream silently after 60 s, and cap bodies at 16 MB.
        app.config.update(RESPONSE_TIMEOUT=None, MAX_CONTENT_LENGTH=self._config.server.max_body_mb << 20)
        app.errorhandler(Exception)(self._tell_error)
        own: list[Route] = [
            ("/bridge.user.js", "GET", self._userscript),
            ("/media/<name>", "GET", self._media_file),
            ("/openapi.json", "GET", self._openapi),
        ]
        # Asked for by HEAD they are answered, and refused by others, as all else is.
        for rule, tell in self._told.items():
            app.add_url_rule(rule, tell.__name__, functools.partial(_serve_told, tell), methods=["GET"])
        for rule, method, view in own + self._panel.routes():
            app.add_url_rule(rule, view.__name__, view, methods=[method])
        return app

    async def _tell_error(self, error: Exception) -> "quart.Response":
        """Errors inside Quart go the way of all others: through `HttpRequest.respond_error`'s renderer."""
        from werkzeug.exceptions import HTTPException

        if isinstance(error, HTTPException):
            codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
            code = codes.get(error.code or 500, "invalid_request")
            description = f"{error.name}: {quart.request.method} {quart.request.path}."
            if quart.request.path.startswith("/v1/"):
                description += f" This API has {', '.join(Answers.PATHS)} and /v1/models."
            elif f"/v1{quart.request.path}" in (*Answers.PATHS, "/v1/models"):
                description += " The API is under /v1: add that to the base URL."
            error = ClientError(description, status=error.code or 500, code=code)
        elif not isinstance(error, ApiError):
            log.error("A page met an error in the program", exc_info=error)
            error = ApiError(INTERNAL_ERROR)
        http: HttpRequest = quart.request.scope["lmarena_proxy.request"]  # type: ignore[typeddict-item]
        response = quart.Response(
            encode_error(error, http.id), error.http_status, content_type="application/json"
        )
        if error.retry_after is not None:
            response.headers["retry-after"] = str(error.retry_after)
        return response

    async def _openapi(self) -> "quart.Response":
        return _json(describe_api())

    async def _userscript(self) -> "quart.Response":
        script = (HERE / "bridge.user.js").read_text(encoding="utf-8")
        for name, value in (
            ("BRIDGE_URL", self._panel.urls["bridge"]),
            ("INSTALL_URL", self._panel.urls["userscript"]),
            ("AUTH_COOKIE", self._config.arena.auth_cookie),
            ("VERSION", VERSION),
        ):
            line = f"const {name} = {encode_json(value).decode()};"
            script, count = re.subn(rf'const {name} = ".*";', line.replace("\\", r"\\"), script)
            assert count == 1, name
        for name, text in (("version", VERSION), ("(?:update|download)URL", self._panel.urls["userscript"])):
            script = re.sub(rf"^(// @{name} +)\S+$", rf"\g<1>{text}", script, flags=re.MULTILINE)
        return quart.Response(
            script, content_type="text/javascript; charset=utf-8", headers={"cache-control": "no-store"}
        )

    async def _media_file(self, name: str) -> "quart.Response":
        found = await self._media.read(name)
        if found is None:
            raise ClientError(f"There is no {quart.request.path}.", status=404, code="not_found")
        kind, data = found
        # A name is the hash of its content, which so never changes.
        headers = {
            "accept-ranges": "bytes",
            "cache-control": "public, max-age=31536000, immutable",
            "etag": f'"{name}"',
            "x-content-type-options": "nosniff",
        }
        if quart.request.if_none_match.contains(name):
            return quart.Response(b"", 304, headers)
        wanted = quart.request.range
        if wanted is None or wanted.units != "bytes" or len(wanted.ranges) != 1:
            return quart.Response(data, content_type=kind, headers=headers)
        span = wanted.range_for_length(len(data))
        if span is None:
            message = f"{quart.request.path} has {len(data)} bytes."
            raise ClientError(message, status=416, code="range_not_satisfiable")
        headers["content-range"] = f"bytes {span[0]}-{span[1] - 1}/{len(data)}"
        return quart.Response(data[slice(*span)], 206, headers, content_type=kind)


class Api:
    """The HTTP surface: a request is admitted, and then answered by `Answers`, from memory, or by Quart."""

    def __init__(
        self,
        config: Config,
        pool: SessionPool,
        bridges: Bridges,
        answers: Answers,
        media: MediaFiles,
        panel: ControlPanel,
    ) -> None:
        self._config, self._pool, self._bridges = config, pool, bridges
        self._answers, self._panel = answers, panel
        # What is answered from memory: it is asked for all the time, and needs nothing of Quart.
        told: dict[str, Callable[..., Told]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/v1/models": self._models,
            "/v1/models/<path:name>": self._model,
        }
        self._told, self._pages = told, Pages(config, media, panel, told)
        self.bridge_url = ""
        self.url = ""
        self._started_at = time.time()
        self._admission = Admission(config.server)

    async def serve(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen for clients; `started` with the URL. Raises OSError when the port cannot be had."""
        listener = HttpListener(self, self._config)
        async with trio.open_nursery() as nursery:
            self.url = await nursery.start(listener.serve)
            self._panel.urls = {
                "api": f"{self.url}/v1",
                "userscript": f"{self.url}/bridge.user.js",
                "bridge": self.bridge_url,
            }
            task_status.started(self.url)

    async def __call__(self, scope: Any, receive: ASGIReceive, send: ASGISend) -> None:
        """ASGI's."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # This port has none: a 403.
            return
        http = HttpRequest(scope, receive, send)
        try:
            await self._route(http, scope)
        except ApiError as error:
            await http.respond_error(error)
        except ClientLeft:
            log.debug("%s: the client left", http.id)
        except Exception:
            log.exception("A request met an error in the program")
            if not http.has_started:
                await http.respond_error(ApiError(INTERNAL_ERROR))

    async def _route(self, http: HttpRequest, scope: Any) -> None:
        if not http.path.startswith("/"):
            raise ClientError(f"Expected a path, but got {http.path[:200]!r}.")
        # Quart's router does so too; a base URL that ends in a slash brings two.
        http.path = scope["path"] = "/" + http.path.lstrip("/")
        self._admission.check(http)
        if http.method == "OPTIONS":
            await http.respond(204, b"", self._admission.preflight(http))
        elif http.path in Answers.PATHS:
            if http.method != "POST":
                message = f"Method Not Allowed: {http.method} {http.path}."
                raise ClientError(message, status=405, code="method_not_allowed")
            if http.is_plain:
                scope.clear()  # It is nobody's any more, and would stay as long as the answer takes.
            await self._answers.answer(http)
        elif http.method == "GET" and (told := self._tell(http.path)):
            value, status = told
            await http.respond(status, encode_json(value), {"content-type": "application/json"})
        else:
            await self._pages.answer(http, scope)

    def _tell(self, path: str) -> Told | None:
        """What is answered from memory, if this is."""
        name = path.removeprefix("/v1/models/")
        if name != path:
            return self._model(name) if name else None
        tell = self._told.get(path)
        return tell() if tell else None

    def _health(self) -> Told:
        return {"status": "ok", "version": VERSION}, 200

    def _ready(self) -> Told:
        if obstacle := self._bridges.obstacle():
            return {"status": obstacle.state, "advice": obstacle.advice}, 503
        return {"status": "ready"}, 200

    def _describe(self, name: str) -> ModelCard:
        """One entry of /v1/models; a name that stands for two models is one entry."""
        models = self._pool.catalog.named(name)
        return ModelCard(
            id=name,
            created=int(self._started_at),
            owned_by=models[0].organization,
            modality=models[0].modality,
            input_capabilities=tuple(dict.fromkeys(kind for model in models for kind in model.inputs)),
            output_capabilities=tuple(dict.fromkeys(kind for model in models for kind in model.outputs)),
            takes_many_images=any(model.takes_many_images for model in models),
            requires_image=all(model.requires_image for model in models),
            sessions_ready=sum(self._pool.of(model.id).idle for model in models),
        )

    def _models(self) -> Told:
        return ModelList(data=[self._describe(name) for name in self._pool.catalog.names()]), 200

    def _model(self, name: str) -> Told:
        if not self._pool.catalog.named(name):
            raise self._pool.catalog.unknown(name)
        return self._describe(name), 200


# ==========================================================================================================
# Program
# ==========================================================================================================
#
# The nursery of everything: the bridge's listener, the API, bootstrap's supervisor, the signals. Around it a
# second one, so that the store's writer outlives all that writes.

EXIT_OK, EXIT_NEEDS_PERSON, EXIT_CANNOT_START, EXIT_FORCED = 0, 1, 2, 130
PRUNE_INTERVAL_SECONDS = 6 * 3600
# What a terminal sends that is closed. Under nohup it is not meant for the program; Windows has none.
HANGUP: list[int] = []
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    HANGUP.append(signal.SIGHUP)


def _refusal(key: str, port: int, error: OSError) -> ConfigError:
    """Why a port cannot be listened at, and what to do."""
    if error.errno != errno.EADDRINUSE:
        # Some Pythons repeat the address behind the system's word.
        word = (error.strerror or str(error)).partition(" (while ")[0]
        return ConfigError(key, port, f"a port that can be listened at ({word})")
    if key == "bridge.port":
        wanted = (
            "a free port, but it is in use, perhaps by another copy of the program: end that, or choose "
            "another with --bridge-port and install the userscript anew (it has the port in it)"
        )
    else:
        wanted = (
            "a free port, but it is in use, perhaps by another copy of the program: end that, or choose "
            "another with --port"
        )
    return ConfigError(key, port, wanted)


async def _listen(nursery: trio.Nursery, key: str, port: int, serve: Callable[..., Awaitable[Any]]) -> Any:
    try:
        return await nursery.start(serve)
    except (OSError, ExceptionGroup) as error:
        refusals = [leaf for leaf in leaves(error) if isinstance(leaf, OSError)]
        if not refusals:
            raise
        raise _refusal(key, port, refusals[0]) from None


class Program:
    """All parts, put together."""

    def __init__(self, config: Config, directory: Path, console: Console) -> None:
        """`directory`: what the configuration's paths are relative to. Raises ConfigError."""
        self.config, self.console = config, console
        catalog = read_catalog(directory / config.models.path, config.models)
        for alias in catalog.dangling_aliases():
            log.warning("The alias %s stands for %s, which is no model", alias, config.models.aliases[alias])
        self.bus = EventBus()
        self.bus.subscribe(log_event)
        self.store = Store(directory / config.storage.path)
        self.bus.subscribe(self.store.log_request)
        self.pool = SessionPool(catalog, config.pool, self.store, self.bus)
        self.bridges = Bridges(config, self.bus, self.pool)
        self.listener = BridgeListener(config, self.bus, self.pool, self.bridges)
        self.relay = Relay(config, self.pool, self.bridges, self.bus)
        self.bootstrap = Bootstrap(config, self.pool, self.bridges, self.relay, console, self.bus)
        self.media = MediaFiles(config.media, directory / config.storage.path / "media")
        self.answers = Answers(config, self.pool, self.relay, self.media, self.bus)
        self.tail = LogTail()
        requests = RequestLog(self.store)
        steered = (self.pool, self.bridges, self.bootstrap, self.answers)
        self.panel = ControlPanel(config, *steered, requests, self.tail, self.bus)
        self.api = Api(config, self.pool, self.bridges, self.answers, self.media, self.panel)
        if sys.flags.dev_mode:
            self.bus.subscribe(self.assert_consistent)
        self._scope = trio.CancelScope()

    def assert_consistent(self, event: Event) -> None:
        """The listener of `python -X dev` and of the tests: what must hold does, after every event."""
        violations = self.pool.violations()
        assert not violations, (event, violations)

    async def run(self, *, task_status: trio.TaskStatus[Self] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`; `started` once both ports are listened at.

        Raises ConfigError, maybe in a group.
        """
        async with trio.open_nursery() as outer:
            await outer.start(self.store.run)
            log.addHandler(self.tail)
            try:
                with self._scope:
                    async with trio.open_nursery() as nursery:
                        await self._start(nursery)
                        task_status.started(self)
            finally:
                log.removeHandler(self.tail)
                self.store.close()
            if not self.api.url:
                task_status.started(self)  # Stopped before it was up: whoever waits has to go on.

    async def _start(self, nursery: trio.Nursery) -> None:
        bridge, server = self.config.bridge, self.config.server
        port = await _listen(nursery, "bridge.port", bridge.port, self.listener.serve)
        self.api.bridge_url = f"ws://{reachable(bridge.host)}:{port}/"
        await _listen(nursery, "server.port", server.port, self.api.serve)
        nursery.start_soon(self.bootstrap.supervise)
        if self.config.storage.keep_days:
            nursery.start_soon(self._keep_tidy)
        if self.config.bridge.model_refresh_hours:
            nursery.start_soon(self._refresh_models)

    async def _keep_tidy(self) -> None:
        """Forget old requests, now and then."""
        while True:
            days = self.config.storage.keep_days
            if count := await self.store.prune(days):
                log.info("Forgot %d requests that were older than %g days", count, days)
            await trio.sleep(PRUNE_INTERVAL_SECONDS)

    async def _refresh_models(self) -> None:
        """Ask the tabs for their model list, now and then; the site is not asked."""
        while True:
            await trio.sleep(self.config.bridge.model_refresh_hours * 3600)
            self.bridges.refresh_models()

    async def stop(self) -> None:
        """Shut down: no new requests, the running ones get their grace, then everything ends."""
        self.bootstrap.abort("the program is shutting down")
        await self.answers.drain(self.config.server.shutdown_grace_seconds)
        self._scope.cancel()

    async def obey_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ctrl-C during bootstrap ends that only; else it shuts down. A second one ends it at once."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *HANGUP) as signals:
            task_status.started()
            async for number in signals:
                if number != signal.SIGINT or not self.bootstrap.abort():
                    break
            grace_seconds = self.config.server.shutdown_grace_seconds
            self.console.say(
                f"Shutting down; running answers get {grace_seconds:g} s. Ctrl-C again ends at once."
            )
            # A thread may hang in a disk or a name server, and nothing ends a thread.
            last_resort = threading.Timer(grace_seconds + 5, os._exit, [EXIT_OK])
            last_resort.daemon = True
            last_resort.start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.stop)
                async for number in signals:
                    if number in HANGUP:
                        continue  # A terminal that closes and its shell both send one.
                    self.console.restore()
                    if self.panel.is_demo:  # Its store is for this run only.
                        shutil.rmtree(self.config.storage.path, ignore_errors=True)
                    os._exit(EXIT_FORCED)


# ==========================================================================================================
# Housekeeping
# ==========================================================================================================
#
# What is done beside serving, each by an option of its own: checks, the store's conversations out and in, old
# requests away, models.json anew.


# What it serves to browsers.
PARTS = ("bridge.user.js", "dashboard/index.html")


@contextmanager
def hold_store(directory: Path) -> Iterator[None]:
    """Keep other copies of the program off a store while this one runs. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError("storage.path", str(directory), f"a store that can be used ({error})") from None
    with open(file, "rb"):  # The system lets go of it when the process ends, however it does.
        try:
            if sys.platform == "win32":
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            wanted = (
                "a store that no other copy of the program uses now: end that copy, or give this one its own"
            )
            raise ConfigError("storage.path", str(directory), wanted) from None
        except OSError as error:  # Some network disks know no locks.
            log.warning("The store %s cannot be locked: %s", directory, error)
        yield


def prune(config: Config, directory: Path, console: Console) -> None:
    """Forget old requests and shrink the store. Raises ConfigError."""
    place, days = directory / config.storage.path, config.storage.keep_days
    if not days:
        raise ConfigError("storage.keep_days", days, "a number of days above 0")
    with hold_store(place):
        count = Store(place).prune_now(days)
    console.say(f"{place}: {count} requests that were older than {days:g} days are gone")


def look_for_parts(*names: str) -> None:
    """Raises PartMissing unless these stand beside the program."""
    if missing := [name for name in names if not (HERE / name).exists()]:
        raise PartMissing(", ".join(missing))


def look_at_store(directory: Path) -> tuple[Path, int]:
    """The store's file and how many conversations it holds. Raises ConfigError when it cannot be used."""
    path = directory / "lmarena_proxy.sqlite3"
    # At a copy: opening it would already change a store that a kill has left, a damaged one most of all.
    with tempfile.TemporaryDirectory(prefix="lmarena-proxy-check-") as place:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in (path, path.with_name(path.name + "-wal")):
                if part.exists():
                    shutil.copy(part, place)
            return path, len(Store(Path(place), may_replace=False).sessions())
        except ConfigError as error:
            raise ConfigError("storage.path", str(path), error.expected) from None
        except OSError as error:
            raise ConfigError("storage.path", str(path), f"a store that can be used ({error})") from None


def look_at_files(config: Config, directory: Path) -> Iterator[tuple[str, str]]:
    """What configuration, models and store are like. Raises ConfigError for the first thing wrong."""
    look_for_parts(*PARTS)
    yield "configuration", f"{directory}: every key is known and in range"
    catalog = read_catalog(directory / config.models.path, config.models)
    yield "models", f"{len(catalog)} of {config.models.path} are served"
    for alias in catalog.dangling_aliases():
        yield "alias", f"{alias} stands for {config.models.aliases[alias]}, which is none of them"
    path, sessions = look_at_store(directory / config.storage.path)
    with hold_store(directory / config.storage.path):
        pass  # No other copy has it.
    yield "store", f"{path} holds {sessions} conversations"


def try_port(key: str, host: str, port: int) -> tuple[str, str]:
    """Listen there for a moment. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise _refusal(key, port, error) from None
    return key, f"{host}:{port} is free"


def check(config: Config, directory: Path, console: Console) -> None:
    """Try what a start needs, and say what was found. Raises ConfigError for the first thing wrong."""
    for what, text in look_at_files(config, directory):
        console.say_in_columns((what, 14), (text, 0))
    for key, at in (("server.port", config.server), ("bridge.port", config.bridge)):
        what, text = try_port(key, at.host, at.port)
        console.say_in_columns((what, 14), (text, 0))


# The doctor looks at what a start needs and at the browser's side: at what a running copy of the program says
# of it or, when none runs, by listening for a tab itself. It sends nothing to the site, and opens nothing.

Verdict = Literal["fine", "look", "needs you"]
# As a sign, and by a style.
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "fine": ("\N{CHECK MARK}", "green"),
    "look": ("!", "yellow"),
    "needs you": ("\N{BALLOT X}", "red"),
}
# How long the list of models may take after a tab has said how it is.
PAGE_LIST_SECONDS = 3


class Finding(msgspec.Struct, frozen=True):
    """One thing that the doctor found."""

    verdict: Verdict
    what: str
    text: str

    def show(self, console: Console) -> None:
        sign, style = _VERDICTS[self.verdict]
        console.say_in_columns((sign, 1), (self.verdict, 9), (self.what, 14), (self.text, 0), style=style)


def _tell_age(seconds: float) -> str:
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.0f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.0f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{max(0, seconds):.0f} seconds"


def examine_tabs(state: FeedDocument) -> Iterator[Finding]:
    """Whether a tab is connected, runs our script, is ready, and whose it is."""
    bridges, version = state["bridges"], state["version"]
    for reason in state.get("refused", []):
        yield Finding("needs you", "refused", f"a connection at the bridge's port: {reason}")
    if not bridges:
        install = state["urls"]["userscript"]
        text = f"{MISSING.advice} While the program runs, {install} installs the script."
        yield Finding("needs you", "tab", text)
        return
    urls = ", ".join(bridge.get("url") or "a page" for bridge in bridges)
    yield Finding("fine", "tab", f"{len(bridges)} connected: {urls}")
    for bridge in bridges:
        if bridge["script"] == version:
            yield Finding("fine", "script", f"{version}, as the program")
        else:
            text = (
                f"{bridge['script']}, but the program is {version}: while that runs, open "
                f"{state['urls']['userscript']}, let the manager install it, and reload the tab"
            )
            yield Finding("needs you", "script", text)
    person = state.get("person")
    if person:
        yield Finding("needs you", "page", person["advice"])
    else:
        yield Finding("fine", "page", "ready: neither check nor sign-in is due")
    accounts = sorted({bridge["account"] for bridge in bridges if bridge["account"]})
    if accounts:
        yield Finding("fine", "account", ", ".join(accounts))
    else:
        yield Finding("look", "account", "not known until the page is signed in")


def examine_models(state: FeedDocument, path: Path) -> Finding:
    """How old models.json is, and whether the page lists something else."""
    try:
        file = f"{path.name} is {_tell_age(time.time() - path.stat().st_mtime)} old"
    except OSError as error:
        file = f"{path.name} cannot be read ({error.strerror})"
    page = state.get("page_models")
    if not page:
        return Finding("look", "model list", f"no page has sent one yet; {file}")
    age, count = _tell_age(time.time() - page["listed_at"]), page["count"]
    new, changed, gone = page["new"], page["changed"], page["gone"]
    if not new + changed + gone:
        text = f"the page listed {count} models {age} ago; {file} and has the same"
        return Finding("fine", "model list", text)
    text = (
        f"the page listed {count} models {age} ago; {file} and differs: {new} new, {changed} changed, "
        f"{gone} not listed any more (--update-models)"
    )
    return Finding("look", "model list", text)


def examine_sessions(state: FeedDocument, stored: int) -> Finding:
    """How many conversations a start would open."""
    if state.get("person") or not state["bridges"]:
        text = f"{stored} are in the store; how many are missing is known when the tab is ready"
        return Finding("look", "conversations", text)
    if missing := state.get("missing", 0):
        return Finding(
            "look", "conversations", f"{missing} would be opened at the start's question, or on demand"
        )
    return Finding("fine", "conversations", "every model has those that it should")


def examine_limits(state: FeedDocument) -> Iterator[Finding]:
    """Whether the site limits an account, as far as the copy that runs has met it."""
    for gate in state.get("gates", []):
        seconds, pace = gate["seconds"], gate["pace"]
        pause = f"paused for {seconds} s more" if seconds else f"going on, at {pace} requests a second"
        if seconds and pace:
            pause = f"paused for {seconds} s more, then {pace} requests a second"
        yield Finding("look", "rate limit", f"the site limits {gate['account'][:8]}: {pause}")
    if not state.get("gates"):
        if state.get("is_running"):
            yield Finding("fine", "rate limit", "nothing is held back")
        else:
            yield Finding("look", "rate limit", "not known, as nothing was sent")


def ask_running(config: Config) -> FeedDocument | None:
    """The state of the copy of the program at the API's port; None when something else is there.

    Raises ConfigError for a copy with another key.
    """
    server = config.server
    url = f"http://{reachable(server.host)}:{server.port}/api/state"
    # As bytes, for it may have any characters; and the library takes no header that ends in a space.
    headers = {b"authorization": f"Bearer {server.api_key}".encode()} if server.api_key else {}
    try:
        document = _object(httpx.get(url, headers=headers, timeout=5, trust_env=False).json())
    except (httpx.HTTPError, ValueError):
        return None
    if _object(document.get("error")).get("code") == "invalid_api_key":
        wanted = f"the key of the copy of the program that runs at port {server.port}"
        raise ConfigError("server.api_key", server.api_key, wanted)
    is_ours = {"version", "bridges", "bootstrap", "pool"} <= document.keys()
    return document | {"is_running": True} if is_ours else None


def _say_wait(console: Console, seconds: float) -> None:
    console.say(
        f"Waiting for an LMArena tab, up to {seconds:g} s (Ctrl-C ends the wait): open https://lmarena.ai"
    )


def watch_running(config: Config, state: FeedDocument, seconds: float, console: Console) -> FeedDocument:
    """The running copy's state, once it has a tab that is loaded, or the time is over."""

    def lacks_tab() -> bool:
        return _object(state.get("person")).get("state") in ("missing", "loading")

    ends_at = time.monotonic() + seconds
    if lacks_tab():
        _say_wait(console, seconds)
    try:
        while lacks_tab() and time.monotonic() < ends_at:
            time.sleep(min(0.5, seconds))
            state = ask_running(config) or state
    except KeyboardInterrupt:
        console.say("The wait was ended.")
    return state


async def _end_at_signal(
    wait: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            wait.cancel()


async def listen_for_tab(config: Config, directory: Path, seconds: float, console: Console) -> FeedDocument:
    """The state of a program that listens for tabs, and does nothing else, once it has one that is loaded."""
    program, refused, listed = Program(config, directory, console), deque[str](maxlen=3), trio.Event()

    def note(event: Event) -> None:
        if isinstance(event, BridgeRefused):
            refused.append(event.reason)
        elif isinstance(event, ModelsListed) and event.count:
            listed.set()

    program.bus.subscribe(note)
    async with trio.open_nursery() as outer:
        await outer.start(program.store.run)
        try:
            async with trio.open_nursery() as nursery:
                await _listen(nursery, "bridge.port", config.bridge.port, program.listener.serve)
                with trio.move_on_after(seconds) as wait:
                    await nursery.start(_end_at_signal, wait)
                    _say_wait(console, seconds)
                    while program.bridges.obstacle() in (MISSING, OBSTACLES["loading"]):
                        await program.bridges.wait_changed()
                    with trio.move_on_after(PAGE_LIST_SECONDS):
                        await listed.wait()
                state = program.panel.describe()
                nursery.cancel_scope.cancel()
        finally:
            program.store.close()
    userscript = f"http://{reachable(config.server.host)}:{config.server.port}/bridge.user.js"
    return state | {"refused": [*refused], "urls": {"userscript": userscript}}


def find_out(config: Config, directory: Path, seconds: float, console: Console) -> Iterator[Finding]:
    """All findings, as they come. Raises ConfigError for a start that cannot be."""
    server, bridge = config.server, config.bridge
    try:
        ports = [try_port("server.port", server.host, server.port)]
        state = None
    except ConfigError:
        state = ask_running(config)
        if state is None:
            raise
        ports = [("server.port", f"a copy of the program runs here, version {state['version']}")]
    if state is None:
        ports.append(try_port("bridge.port", bridge.host, bridge.port))
        for what, text in look_at_files(config, directory):
            yield Finding("look" if what == "alias" else "fine", what, text)
    yield from (Finding("fine", what, text) for what, text in ports)
    if state is None:
        with hold_store(directory / config.storage.path):
            state = trio.run(listen_for_tab, config, directory, seconds, console)
    else:
        state = watch_running(config, state, seconds, console)
    yield from examine_tabs(state)
    yield examine_models(state, directory / config.models.path)
    yield examine_sessions(state, sum(pool["sessions"] for pool in state["pool"]))
    yield from examine_limits(state)
    if _object(state["bootstrap"]).get("phase") == "confirm":
        yield Finding(
            "needs you", "question", f"{PROMPT}: press Enter at the console, or the dashboard's button"
        )


def examine(config: Config, directory: Path, seconds: float, console: Console) -> int:
    """The doctor: a line for each finding. Returns the exit code."""
    verdicts = set()
    for finding in find_out(config, directory, seconds, console):
        finding.show(console)
        verdicts.add(finding.verdict)
    return EXIT_NEEDS_PERSON if "needs you" in verdicts else EXIT_OK


# Sessions leave and enter as JSON: an object of `format`, `version` and `sessions`. LMArenaBridge's files are
# read, too: config.jsonc has one session without a model, model_endpoint_map.json has sessions by the names
# of models; neither says whose they are.

EXPORT_FORMAT, EXPORT_VERSION = "lmarena_proxy sessions", 1
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_ACCOUNT = re.compile("[0-9a-f]{64}")
# What stands in an older bridge's file until somebody fills it in: YOUR_SESSION_ID, xxxx-xxxx, <session id>.
_PLACEHOLDER = re.compile(
    r"your\b.*|your_.*|<.*>|[x-]+|.*placeholder.*|.*[_ ]id(_\d+)?", re.IGNORECASE | re.DOTALL
)
_WHERE_ACCOUNTS = "GET /api/state shows it (bridges, account) while a tab of the account is connected"
_DIRECT_MODES = (None, "direct", "direct_chat")
_JSON_PIECE = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|,(?=\s*[}\]])', re.DOTALL)


def _strip_comments(text: str) -> str:
    """JSON with comments and trailing commas as plain JSON, every line in its place."""

    def keep(match: re.Match[str]) -> str:
        piece = match[0]
        return piece if piece.startswith('"') else "\n" * piece.count("\n")

    # Twice: a comment may stand between a trailing comma and its bracket.
    return _JSON_PIECE.sub(keep, _JSON_PIECE.sub(keep, text))


class StoredSession(msgspec.Struct, forbid_unknown_fields=True):
    """A session in an export. `model` is for people: the id counts."""

    session_id: Annotated[str, msgspec.Meta(pattern=rf"\A(?i:{_UUID.pattern})\Z")]
    message_id: Annotated[str, msgspec.Meta(pattern=rf"\A(?i:{_UUID.pattern})\Z")]
    model_id: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,200}\Z")]
    account: Annotated[str, msgspec.Meta(pattern=rf"\A{_ACCOUNT.pattern}\Z")]
    source: SessionSource
    created_at: UnixTime
    last_used_at: UnixTime | None
    uses: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    position: Position | None = None
    model: str = ""


_FIELD_EXPECTATIONS = {
    "session_id": "a UUID",
    "message_id": "a UUID",
    "model_id": "the id of a model",
    "account": "64 hexadecimal digits",
    "source": f"one of {', '.join(get_args(SessionSource))}",
    "created_at": "a time in Unix seconds",
    "last_used_at": "a time in Unix seconds, or null",
    "uses": "a number of uses",
    "position": "a or b, or null",
    "model": "the name of a model",
}


# Session id, message id, and the model's side where there are two.
OlderSession = tuple[str, str, Position | None]


class SessionReader:
    """Reads a file of sessions: what is in it, and, in words, what is left out. Raises ConfigError."""

    def __init__(
        self,
        place: str,
        catalog: Catalog,
        known: Sequence[Session],
        account: str,
        model: str,
        *,
        use_battles: bool,
    ) -> None:
        """`account` and `model`: what the person says of sessions whose file does not; empty is nothing."""
        self._place, self._catalog, self._known = place, catalog, known
        self._account, self._model, self._use_battles = account, model, use_battles
        self.left_out: list[str] = []

    def read(self, text: str) -> list[Session]:
        try:
            value = json.loads(_strip_comments(text.removeprefix("\ufeff")))
        except (ValueError, RecursionError) as error:
            raise ConfigError("--import-sessions", self._place, f"a file of JSON ({error})") from None
        if isinstance(value, dict) and value.get("format") == EXPORT_FORMAT:
            return self._read_export(value)
        if isinstance(value, dict) and isinstance(value.get("session_id"), str):
            return self._read_config(value)
        if isinstance(value, dict) and all(isinstance(each, dict | list) for each in value.values()):
            return self._read_map(value)
        wanted = "an export of this program, or LMArenaBridge's config.jsonc or model_endpoint_map.json"
        raise ConfigError("--import-sessions", self._place, wanted)

    def _wrong(self, where: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(f"{self._place}: {where}", value, wanted)

    def _read_export(self, value: Mapping[str, Any]) -> list[Session]:
        if value.get("version") != EXPORT_VERSION:
            raise self._wrong("version", value.get("version"), f"{EXPORT_VERSION}, which this program writes")
        if not isinstance(value.get("sessions"), list):
            raise self._wrong("sessions", value.get("sessions"), "a list of sessions")
        for option, given in (("--account", self._account), ("--model", self._model)):
            if given:
                raise ConfigError(option, given, "none: the sessions of an export have theirs")
        return [
            self._read_entry(f"sessions[{index}]", entry) for index, entry in enumerate(value["sessions"])
        ]

    def _read_entry(self, where: str, entry: object) -> Session:
        try:
            stored = msgspec.convert(entry, StoredSession)
        except msgspec.ValidationError as error:
            message = str(error)
            fields = _object(entry)
            if named := re.search(r"at `\$\.(\w+)`$", message):
                name = named[1]
                raise self._wrong(f"{where}.{name}", fields[name], _FIELD_EXPECTATIONS[name]) from None
            if lacking := re.search(r"missing required field `(\w+)`", message):
                raise self._wrong(f"{where}.{lacking[1]}", None, _FIELD_EXPECTATIONS[lacking[1]]) from None
            raise self._wrong(where, entry, f"a session with its fields, and no others ({message})") from None
        return Session(*(getattr(stored, name) for name in _SESSION_FIELDS))

    def _read_config(self, value: Mapping[str, Any]) -> list[Session]:
        """One session: the one of LMArenaBridge's configuration."""
        mode, target = value.get("id_updater_last_mode"), value.get("id_updater_battle_target")
        found = [*self._read_older("config.jsonc", value, mode, target)]
        if not found:
            return []
        if not self._model:
            raise ConfigError("--model", "", "the name of the session's model: the file does not say it")
        return [*self._adopt("config.jsonc", self._model, found)]

    def _read_map(self, value: Mapping[str, Any]) -> list[Session]:
        """The sessions of models by their names."""
        if self._model:
            raise ConfigError("--model", self._model, "none: the file names the models")
        sessions: list[Session] = []
        for name, entries in value.items():
            for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
                where = f"{name}[{index}]" if isinstance(entries, list) else name
                if not isinstance(entry, dict):
                    raise self._wrong(where, entry, "an object with session_id and message_id")
                found = self._read_older(where, entry, entry.get("mode"), entry.get("battle_target"))
                sessions += self._adopt(where, name, found)
        return sessions

    def _read_older(
        self, where: str, entry: Mapping[str, Any], mode: object, target: object
    ) -> Iterator[OlderSession]:
        """The session of an older bridge's entry, unless it is to be left out."""
        names = ("session_id", "message_id")
        ids = [entry.get(name) for name in names]
        if blank := next((each for each in ids if self._is_blank(each)), None):
            self.left_out.append(f"{where}: {blank!r} is a placeholder")
            return
        if "" in ids:
            self.left_out.append(f"{where}: its ids are empty")
            return
        for name, value in zip(names, ids, strict=True):
            if not isinstance(value, str) or not _UUID.fullmatch(value):
                raise self._wrong(f"{where}.{name}", value, "a UUID")
        if mode in _DIRECT_MODES:
            yield str(ids[0]), str(ids[1]), None
        elif mode != "battle":
            self.left_out.append(f"{where}: a session of the mode {mode!r} cannot be retried here")
        elif not self._use_battles:
            self.left_out.append(f"{where}: a session of a battle is not used (pool.use_battles)")
        else:
            yield str(ids[0]), str(ids[1]), self._read_position(where, target)

    def _read_position(self, where: str, target: object) -> Position:
        """The side that an older bridge retries: that is A where it does not say."""
        if target not in (None, "", "A", "B", "a", "b"):
            raise self._wrong(f"{where}, the battle's target", target, "A or B")
        return "b" if target in ("B", "b") else "a"

    def _is_blank(self, value: object) -> bool:
        return isinstance(value, str) and _PLACEHOLDER.fullmatch(value.strip()) is not None

    def _adopt(self, where: str, name: str, found: Iterable[OlderSession]) -> Iterator[Session]:
        """The sessions of a model with these ids, if there is one model of that name."""
        models = self._catalog.named(name)
        ids = " or ".join(model.id for model in models)
        for session_id, message_id, position in found:
            if len(models) == 1:
                fields = (session_id, message_id, models[0].id, self._owner())
                yield Session(*fields, "captured", created_at=time.time(), position=position)
            elif models:
                text = f"{where}: {name!r} stands for two models: name one by its id, {ids}"
                self.left_out.append(text)
            else:
                self.left_out.append(f"{where}: no model {name!r}")

    def _owner(self) -> str:
        """The account of sessions whose file does not say it."""
        if self._account:
            return self._account
        accounts = {session.account for session in self._known}
        if len(accounts) == 1:
            return accounts.pop()
        found = f"those of {len(accounts)} accounts" if accounts else "no conversations yet"
        wanted = f"the account that opened the file's conversations: the store has {found}. {_WHERE_ACCOUNTS}"
        raise ConfigError("--account", "", wanted)


def _write_private(path: Path, text: str) -> None:
    """Write a file that is its owner's alone to read: all of it, or what was there stays."""
    # Such as /dev/fd/3: nothing may take its place.
    is_special = path.exists() and not path.is_file()
    written = path if is_special else path.with_name(path.name + ".new")
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    if not is_special:
        os.replace(written, path)


def export_sessions(config: Config, directory: Path, path: str, console: Console) -> None:
    """Write all sessions to a file, `-` being the standard output. Raises ConfigError."""
    place = directory / config.storage.path
    catalog = read_catalog(directory / config.models.path, ModelsConfig())
    with hold_store(place):
        sessions = Store(place, may_replace=False).sessions()
    entries = []
    for session in sessions:
        entry = msgspec.structs.asdict(session)
        model = catalog.get(session.model_id)
        del entry["failures"]
        if session.position is None:
            del entry["position"]
        entries.append(entry | {"model": model.name if model else ""})
    head = {"format": EXPORT_FORMAT, "version": EXPORT_VERSION, "program": VERSION}
    exported_at = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({**head, "exported_at": exported_at, "sessions": entries}, indent=1) + "\n"
    try:
        if path == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            _write_private(Path(path), text)
    except OSError as error:
        raise ConfigError("--export-sessions", path, f"a file that can be written ({error})") from None
    console.say(f"{place}: {len(entries)} conversations are in {path if path != '-' else 'standard output'}")


def import_sessions(config: Config, directory: Path, options: argparse.Namespace, console: Console) -> None:
    """Add the sessions of a file that the store does not know, all or none. Raises ConfigError."""
    path, account = options.import_sessions, options.account
    if account and not _ACCOUNT.fullmatch(account):
        raise ConfigError("--account", account, f"64 hexadecimal digits. {_WHERE_ACCOUNTS}")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--import-sessions", path, f"a readable file of UTF-8 ({error})") from None
    place = directory / config.storage.path
    everything = msgspec.structs.replace(config.models, include=("*",), exclude=())
    catalog = read_catalog(directory / config.models.path, everything)
    name = "standard input" if path == "-" else path
    with hold_store(place):
        store = Store(place, may_replace=False)
        known, battles = store.sessions(), config.pool.use_battles
        reader = SessionReader(name, catalog, known, account, options.model, use_battles=battles)
        sessions = reader.read(text)
        added = store.add_now(sessions)
    for line in reader.left_out:
        console.say(f"left out   {line}")
    counts = f"{added} added, {len(sessions) - added} known already, {len(reader.left_out)} left out"
    console.say(f"{place}: of the conversations in {name}: {counts}")
    if unlisted := {session.model_id for session in sessions if not catalog.get(session.model_id)}:
        console.say(
            f"{len(unlisted)} of their models are not in {config.models.path}; the page may list them"
        )


def write_models(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write models.json, one entry a line, all of it or nothing. Raises ConfigError when that cannot be."""
    lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
    written = path.with_name(path.name + ".new")
    try:
        written.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(written, path)
    except OSError as error:
        raise ConfigError("models.path", str(path), f"a file that can be written ({error})") from None


async def update_models(program: Program, path: Path) -> None:
    """Wait for the page's model list, write it back to models.json, say what changed, and stop."""
    before = {model.id: model.entry for model in program.pool.catalog}
    is_listed = trio.Event()
    program.bus.subscribe(
        lambda event: is_listed.set() if isinstance(event, ModelsListed) and event.count else None
    )
    program.console.say("Waiting for the page's model list; Ctrl-C leaves models.json as it is.")
    program.bridges.refresh_models()
    await is_listed.wait()
    models = [*program.pool.catalog]
    for model in models:
        old = before.get(model.id)
        if old is None:
            program.console.say(f"new      {model.name} ({model.id})")
        elif old != model.entry:
            keys = sorted(
                key for key in old.keys() | model.entry.keys() if old.get(key) != model.entry.get(key)
            )
            program.console.say(f"changed  {model.name} ({model.id}): {', '.join(keys)}")
    changes = sum(before.get(model.id) != model.entry for model in models)
    if changes:
        write_models(path, (model.entry for model in models))
    program.console.say(f"{path}: {changes} of {len(models)} models are new or changed")
    await program.stop()


# ==========================================================================================================
# Command line
# ==========================================================================================================

DEMO_NOTICE = "DEMO: a stand-in arena inside this process answers, not the real site"


def find_language(environment: Mapping[str, str]) -> str:
    """The system's language, if the program speaks it; else English."""
    names = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next(filter(None, names), "")
    if sys.platform == "win32" and not name:
        import ctypes

        primary_language = ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF
        name = "zh" if primary_language == 0x04 else ""
    return name[:2] if name[:2] in LANGUAGES else "en"


def _add_chores(parser: argparse.ArgumentParser) -> None:
    """What is done instead of serving, one at a time."""
    chores = parser.add_mutually_exclusive_group()
    chores.add_argument(
        "--check", action="store_true", help="check configuration, models, store and ports, and exit"
    )
    chores.add_argument(
        "--doctor",
        nargs="?",
        type=float,
        const=60.0,
        metavar="SECONDS",
        help="the same, and wait up to so long (60) for a tab to look at it, too; sends nothing to the site",
    )
    chores.add_argument(
        "--update-models", action="store_true", help="write the page's model list to models.json, and exit"
    )
    chores.add_argument(
        "--prune", action="store_true", help="forget requests older than storage.keep_days, and exit"
    )
    chores.add_argument(
        "--export-sessions", metavar="PATH", help="write all conversations to a file (-: here), and exit"
    )
    chores.add_argument(
        "--import-sessions",
        metavar="PATH",
        help="add the conversations of an export, or of LMArenaBridge's files, and exit",
    )
    parser.add_argument(
        "--account", default="", metavar="HASH", help="whose conversations LMArenaBridge's files have"
    )
    parser.add_argument(
        "--model", default="", metavar="NAME", help="which model the conversation in config.jsonc has"
    )


def find_chore(options: argparse.Namespace) -> str:
    """Which of them is asked for, if one is. A doctor of 0 seconds is one, too, and so is an empty name."""
    names = ("check", "doctor", "update_models", "prune", "export_sessions", "import_sessions")
    given = ((name, getattr(options, name)) for name in names)
    return next((name for name, value in given if value is not None and value is not False), "")


def parse_arguments(arguments: Sequence[str], language: str = "en") -> argparse.Namespace:
    """Read the command line. `language`: the one of --help, unless that is chosen here, too."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--lang", choices=LANGUAGES, default=language)
    translate = Translator(chosen.parse_known_args(arguments)[0].lang)
    description = __doc__.partition("\n")[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog="lmarena_proxy.py", description=translate(description))
    parser.add_argument(
        "--lang",
        choices=LANGUAGES,
        default=language,
        help="the language of the console: en or zh (default: the system's)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="the configuration file (default: config.toml here)"
    )
    parser.add_argument("--yes", action="store_true", help="answer the question before bootstrap with Enter")
    parser.add_argument(
        "--no-bootstrap", action="store_true", help="open conversations only when requests need them"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="GLOB", help="serve only these models (models.include)"
    )
    parser.add_argument("--host", help="where the API listens (server.host)")
    parser.add_argument("--port", type=int, help="the API's port (server.port)")
    parser.add_argument("--bridge-port", type=int, help="the bridge's port (bridge.port)")
    parser.add_argument("--demo", action="store_true", help="run against a stand-in arena, without a browser")
    _add_chores(parser)
    parser.add_argument("--version", action="version", version=f"lmarena_proxy {VERSION}")
    for action in parser._actions:
        action.help = translate(action.help or "")
    options = parser.parse_args(arguments)
    if options.doctor is not None and not 0 <= options.doctor <= 86_400:
        parser.error("--doctor waits for 0 to 86400 seconds")
    if options.demo and find_chore(options):
        parser.error("--demo is a run of its own: it goes with no option that does something else")
    if (options.account or options.model) and not options.import_sessions:
        parser.error("--account and --model go with --import-sessions (--models says which models to serve)")
    return options


Overrides = dict[tuple[str, str], tuple[object, str]]


def find_overrides(options: argparse.Namespace, environment: Mapping[str, str]) -> Overrides:
    """What is laid over the file: by table and key, the value and where it comes from."""
    overrides: Overrides = {}
    if api_key := environment.get("LMARENA_PROXY_API_KEY"):
        overrides["server", "api_key"] = (api_key, "environment")
    given: dict[tuple[str, str], object] = {}
    for name, table, key in (
        ("host", "server", "host"),
        ("port", "server", "port"),
        ("bridge_port", "bridge", "port"),
        ("models", "models", "include"),
    ):
        if (value := getattr(options, name)) is not None:
            given[table, key] = value
    if options.no_bootstrap or options.update_models:
        given["bootstrap", "enabled"] = False
    if options.update_models:
        given |= {("models", "include"): ["*"], ("models", "exclude"): []}
    if options.demo:
        # A demo does not keep one waiting.
        given["bootstrap", "settle_seconds"] = 3
    return overrides | {place: (value, "command line") for place, value in given.items()}


def find_sources(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """By key, where each value that is no default comes from: file, environment or command line."""
    sources = {
        f"{table}.{key}": source for (table, key), (_, source) in find_overrides(options, environment).items()
    }
    every = [
        f"{table}.{key}"
        for table, section in get_type_hints(Config).items()
        for key in section.__struct_fields__
    ]
    return dict.fromkeys(every, "file") | sources


def configure(options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[Config, Path]:
    """The configuration in force (command line over environment over file), and its paths' directory."""
    path: Path = options.config or HERE / "config.toml"
    if options.config and not path.exists():
        raise ConfigError("--config", str(path), "a file that exists")
    overrides = {place: value for place, (value, _) in find_overrides(options, environment).items()}
    return read_config(path, overrides), path.resolve().parent


async def run_demo(program: Program) -> None:
    """The stand-in arena, and the userscript's twin, which also plays the person at its check and terms."""
    from demo.arena import Arena, Switches
    from demo.arena import serve as serve_arena
    from demo.twin import Twin

    async with trio.open_nursery() as nursery:
        switches = Switches(check=True, latency_seconds=0.3, line_delay_seconds=0.03)
        url = await nursery.start(serve_arena, Arena(switches=switches))
        program.media.site_origins.add(url)
        twin = Twin(url, program.api.bridge_url)
        await nursery.start(twin.run)
        for act in (twin.open_page, twin.pass_check, twin.accept_terms):
            await act()
            await trio.sleep(0.5)


def settle_memory() -> None:
    """After the start: what is there now stays, and what it took to get there is given back."""
    # The collector of cycles need not look at it again, nor look as often as in a small program, where a
    # burst of requests would set it off at every turn.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    if sys.platform == "linux":
        # Of what imports needed for a while glibc keeps 6 MB; other C libraries lack this, or need it not.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


async def live(config: Config, directory: Path, console: Console, options: argparse.Namespace) -> None:
    """The life of the process: signals first, then the ports, the banner, and whatever comes."""
    program = Program(config, directory, console)
    program.bootstrap.is_confirmed = options.yes
    program.panel.is_demo = options.demo
    program.panel.config_file = str(options.config or HERE / "config.toml")
    program.panel.sources = find_sources(options, os.environ)
    async with trio.open_nursery() as nursery:
        await nursery.start(program.obey_signals)
        async with trio.open_nursery() as serving:
            await serving.start(program.run)
            if not program.api.url:
                return
            sessions = sum(len(pool.sessions) for pool in program.pool)
            notice = DEMO_NOTICE if options.demo else ""
            console.banner(
                program.api.url, program.api.bridge_url, len(program.pool.catalog), sessions, notice
            )
            settle_memory()
            if options.update_models:
                nursery.start_soon(update_models, program, directory / config.models.path)
            if options.demo:
                # Not waited for: it cannot begin when the program is stopped before it has.
                nursery.start_soon(run_demo, program)
        nursery.cancel_scope.cancel()


def raise_file_limit() -> None:
    """Every connection is a file, and many systems allow 1,024 of them until they are asked for more."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tell_failure(cause: BaseException, chore: str, console: Console) -> None:
    """Say why a start, or what was asked for in its place, cannot be."""
    said = f"Cannot start: {cause}" if chore in ("", "check", "doctor") else f"Not done: {cause}"
    sign = _VERDICTS["needs you"][0] + " " if chore == "doctor" else ""
    console.say(sign + console.translate(said), "red")


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments, find_language(os.environ))
    raise_file_limit()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A code page without Chinese must not end the program.
    is_seen = sys.stdout is not None and sys.stdout.isatty()
    # What is exported to the standard output has it for itself.
    screen = Screen(highlight=False, width=None if is_seen else 120, stderr=options.export_sessions == "-")
    can_ask = sys.stdin is not None and sys.stdin.isatty()
    console = Console(screen, can_ask=can_ask, language=options.lang)
    try:
        config, directory = configure(options, os.environ)
        if trouble := open_log(config.log, directory / config.log.directory):
            console.say(trouble)
        if options.check:
            check(config, directory, console)
            return EXIT_OK
        if options.doctor is not None:
            return examine(config, directory, options.doctor, console)
        if options.prune:
            prune(config, directory, console)
            return EXIT_OK
        if options.export_sessions is not None:
            export_sessions(config, directory, options.export_sessions, console)
            return EXIT_OK
        if options.import_sessions is not None:
            import_sessions(config, directory, options, console)
            return EXIT_OK
        look_for_parts(*PARTS, *(["demo/arena.py"] if options.demo else []))
        log.addHandler(ConsoleHandler(screen, console.translate))
        # The stand-in's conversations have no place in the real store.
        place = tempfile.TemporaryDirectory(prefix="lmarena-proxy-demo-") if options.demo else nullcontext()
        with place as store:
            if store:
                storage = msgspec.structs.replace(config.storage, path=store)
                config = msgspec.structs.replace(config, storage=storage)
            with hold_store(directory / config.storage.path):
                trio.run(live, config, directory, console, options)
    except (ConfigError, BaseExceptionGroup) as error:
        causes = [*leaves(error)]
        if not all(isinstance(cause, ConfigError) for cause in causes):
            raise
        for cause in causes:
            tell_failure(cause, find_chore(options), console)
        return EXIT_CANNOT_START
    except KeyboardInterrupt:
        return EXIT_FORCED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
