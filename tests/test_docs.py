"""The documents are right: parameters, settings, options, frames, errors, links, examples, translation."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import trio
from harness import Rig, start

import lmarena_proxy
from demo import contract
from lmarena_proxy import (
    IGNORED_IMAGE_PARAMETERS,
    IGNORED_PARAMETERS,
    REFUSED_IMAGE_PARAMETERS,
    REFUSED_PARAMETERS,
    BrowserFrame,
    ChatBody,
    Config,
    Frame,
    ModelCard,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRANSLATED = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "wire-protocol.md").read_text(encoding="utf-8")
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROGRAM = (ROOT / "lmarena_proxy.py").read_text(encoding="utf-8")
USERSCRIPT = (ROOT / "bridge.user.js").read_text(encoding="utf-8")
NOT_OURS = {"node_modules", ".venv", ".git", "vendor"}


def find_pages() -> Iterator[Path]:
    for directory, names, files in os.walk(ROOT):
        names[:] = {*names} - NOT_OURS  # where the walk goes on
        yield from (Path(directory, file) for file in files if file.endswith(".md"))


PAGES = sorted(find_pages())
CLIENT_PAGES = sorted((ROOT / "docs" / "clients").glob("*.md"))
BASE_URL = "http://127.0.0.1:9080"
EXAMPLE_SECONDS = 120
REASONING = "Looking at the question…"  # of the stand-in, by models whose names say so

CHAPTER = README.partition("## Parameters")[2].partition("\n## ")[0]
TABLE = {
    name: row[2]
    for row in re.finditer(r"^\| (`.+?) \| (.*) \|$", CHAPTER, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", row[1])
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────────


class Fence(NamedTuple):
    """A block of code, and what it says it is in."""

    language: str
    code: str


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fences(text: str) -> list[Fence]:
    return [Fence(*found.groups()) for found in FENCE.finditer(text)]


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    return [(len(mark), title) for mark, title in re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)]


def anchors(text: str) -> set[str]:
    """The names under which the headings can be linked to, as GitHub makes them."""
    found: dict[str, int] = {}
    for _, title in headings(text):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return {*found}


def tables(text: str) -> list[list[list[str]]]:
    """The rows of each table, without its head; cells without the space around them."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(text) + "\n", re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]
        for table in found
    ]


def chapters(text: str, level: int) -> Iterator[tuple[str, str]]:
    """Headings of a level, each with what stands below it up to the next of that level or above."""
    for part in re.split(rf"^{'#' * level} ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        yield title, re.split(rf"^#{{1,{level}}} ", body, flags=re.MULTILINE)[0]


# ── Parameters ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ChatBody.__struct_fields__)
def test_a_parameter_with_an_effect_is_called_honoured(name: str) -> None:
    assert "honoured" in TABLE[name] or "the same" in TABLE[name]


@pytest.mark.parametrize("name", sorted(IGNORED_PARAMETERS))
def test_a_parameter_without_effect_is_called_ignored(name: str) -> None:
    assert "ignored" in TABLE[name]


@pytest.mark.parametrize("name", REFUSED_PARAMETERS)
def test_a_parameter_that_may_be_refused_is_called_refused(name: str) -> None:
    assert "refused" in TABLE[name]


def test_the_table_has_no_parameter_that_the_program_does_not_know() -> None:
    known = {*ChatBody.__struct_fields__, *IGNORED_PARAMETERS, *REFUSED_PARAMETERS}
    assert TABLE.keys() - known == set()


@pytest.mark.parametrize("name", sorted({*IGNORED_IMAGE_PARAMETERS, *REFUSED_IMAGE_PARAMETERS}))
def test_parameters_of_images_are_in_the_text(name: str) -> None:
    assert f"`{name}`" in CHAPTER.partition("**Images out**")[2]


@pytest.mark.parametrize("name", [name for name in ModelCard.__struct_fields__ if "_" in name])
def test_what_a_model_s_entry_says_is_in_the_text(name: str) -> None:
    assert name == "owned_by" or f"`{name}`" in CHAPTER.partition("**Models**")[2]


# ── Settings and options ────────────────────────────────────────────────────────────────────────────────────


def settings(text: str) -> dict[str, str | None]:
    """The defaults that a README tells, by key; None where it tells none."""
    found: dict[str, str | None] = {}
    for keys, defaults, *_ in (row for table in tables(text) for row in table if len(row) == 3):
        names = re.findall(r"`(\w+\.\w+)`", keys)
        values = re.findall(r"`(.*?)`", defaults)
        found |= zip(names, values if len(values) == len(names) else [None] * len(names), strict=True)
    return found


DEFAULTS = {
    f"{table}.{key}": value
    for table, section in msgspec.structs.asdict(Config()).items()
    for key, value in msgspec.structs.asdict(section).items()
}


def test_the_readme_has_the_settings_and_no_others() -> None:
    assert settings(README).keys() == DEFAULTS.keys()


@pytest.mark.parametrize("key", [key for key, value in settings(README).items() if value is not None])
def test_the_readme_tells_the_default(key: str) -> None:
    assert json.loads(settings(README)[key] or "") == json.loads(msgspec.json.encode(DEFAULTS[key]))


def test_the_readme_has_the_options_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lmarena_proxy.parse_arguments(["--help"])
    options = {*re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)}
    assert {*re.findall(r"`(--[a-z][a-z-]*)", README)} == options


# Files, and the key of an example that is mistyped on purpose.
NO_SETTINGS = {"arena.py", "models.json", "bridge.user", "server.prot"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        rf"`((?:{'|'.join(Config.__struct_fields__)})\.[a-z_]+)", page.read_text(encoding="utf-8")
    )
    assert {*named} - DEFAULTS.keys() - NO_SETTINGS == set()


# ── The translation ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_translation_has_the_same_headings() -> None:
    assert [level for level, _ in headings(TRANSLATED)] == [level for level, _ in headings(README)]


def test_the_translation_has_the_same_settings() -> None:
    assert settings(TRANSLATED) == settings(README)


def test_the_translation_has_the_same_tables() -> None:
    ours, theirs = tables(README), tables(TRANSLATED)
    assert [len(table) for table in theirs] == [len(table) for table in ours]
    for table, translated in zip(ours, theirs, strict=True):
        assert [len(row) for row in translated] == [len(row) for row in table]
        for row, other in zip(table, translated, strict=True):
            assert re.findall(r"`[^`]*`", other[0]) == re.findall(r"`[^`]*`", row[0])


def test_the_translation_has_the_same_code() -> None:
    ours, theirs = fences(README), fences(TRANSLATED)
    assert [fence.language for fence in theirs] == [fence.language for fence in ours]
    # Diagrams have no language, and their words are translated.
    assert [fence for fence in theirs if fence.language] == [fence for fence in ours if fence.language]


def test_the_translation_names_what_the_readme_names() -> None:
    """Settings, parameters, paths, codes: nothing in backticks is lost."""
    ours, theirs = ({*re.findall(r"`([^`\n]+)`", prose(text))} for text in (README, TRANSLATED))
    assert {text for text in ours ^ theirs if re.fullmatch(r"[\w./{}-]+", text)} == set()


# ── Links and paths ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / place).resolve() if place else page
        is_found = target.exists() and target.is_relative_to(ROOT.resolve())
        if is_found and anchor:
            is_found = anchor in anchors(target.read_text(encoding="utf-8"))
        if not is_found:
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_has_a_path_of_somebody_s_machine(page: Path) -> None:
    own = re.compile(r"(?<![\w.:/~])/(?:home|root|Users|tmp|work|mnt)/|\b[A-Z]:\\")
    assert own.findall(page.read_text(encoding="utf-8")) == []


def test_every_page_can_be_found_from_the_readme() -> None:
    """Through links from page to page, whichever way they go."""
    seen: set[Path] = set()
    waiting = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#:\s]+)", prose(page.read_text(encoding="utf-8")))
        waiting += [(page.parent / link).resolve() for link in links]
    assert {name_of(page) for page in PAGES} - {name_of(page) for page in seen} == set()


def test_each_readme_shows_the_same_pictures_in_its_own_language() -> None:
    ours, theirs = (re.findall(r"!\[.+?\]\((.+?)\)", prose(page)) for page in (README, TRANSLATED))
    assert theirs == [picture.replace(".png", "-zh.png") for picture in ours]


# ── The bridge's protocol ───────────────────────────────────────────────────────────────────────────────────

FRAMES: dict[str, type[Frame]] = {str(kind.__struct_config__.tag): kind for kind in Frame.__subclasses__()}
FROM_BROWSER = {str(kind.__struct_config__.tag) for kind in BrowserFrame.__args__}


def described_frames(side: str) -> dict[str, str]:
    """What stands below the heading of each frame of a side."""
    [text] = [body for title, body in chapters(PROTOCOL, 2) if title == f"From the {side}"]
    return {title.strip("`"): body for title, body in chapters(text, 3) if title.startswith("`")}


def test_every_frame_is_described_and_no_other() -> None:
    assert described_frames("browser").keys() == FROM_BROWSER
    assert described_frames("program").keys() == FRAMES.keys() - FROM_BROWSER


@pytest.mark.parametrize("frame", FRAMES)
def test_every_field_of_a_frame_is_described_with_its_default(frame: str) -> None:
    body = (described_frames("browser") | described_frames("program"))[frame]
    told = {row[0].strip("`"): row[2].strip("`") for table in tables(body) for row in table}
    fields = {}
    for field in msgspec.structs.fields(FRAMES[frame]):
        factory = field.default_factory
        default = factory() if callable(factory) else field.default
        fields[field.encode_name] = "" if field.required else json.dumps(default)
    assert told == fields


def shown_frames() -> Iterator[tuple[str, str]]:
    for fence in fences(PROTOCOL):
        if fence.language == "frames":
            yield from (tuple(line.split(" ", 1)) for line in fence.code.splitlines())  # type: ignore[misc]


def test_the_frames_of_the_examples_are_frames() -> None:
    bodies: dict[int, bytes] = {}
    for side, text in shown_frames():
        if not text.startswith("{"):
            for exchange_id, data in lmarena_proxy.split_records(bytes.fromhex(text)):
                bodies[exchange_id] = bodies.get(exchange_id, b"") + data
            continue
        frame = json.loads(text)
        assert (frame["type"] in FROM_BROWSER) == (side == "browser")
        kind = FRAMES[frame["type"]]
        assert {*frame} - {"type"} <= {*kind.__struct_fields__}
        assert isinstance(msgspec.json.decode(text, type=kind), kind)
    [body] = [fence.code for fence in fences(PROTOCOL) if fence.language == "text"]
    assert bodies[1].decode() == body


# ── Errors, badge, sections ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", sorted({*re.findall(r'code"?(?:: \w+\[str\] =|:|=) ?"(\w+)"', PROGRAM)}))
def test_every_error_code_is_in_troubleshooting(code: str) -> None:
    assert f"`{code}`" in TROUBLE


def test_every_sentence_of_the_badge_is_in_troubleshooting() -> None:
    table = USERSCRIPT.partition("const TEXTS = {")[2].partition("\n  };")[0]
    sentences = re.findall(r'"(?:grey|green|amber|red)",\s*["`](.+?)["`]', table)
    assert len(sentences) == len(re.findall(r"^    \w+: \[", table, re.MULTILINE)) > 10
    for sentence in sentences:
        begin = sentence.replace("${BRIDGE_URL}", "ws://127.0.0.1:9081/").strip()[:50]
        assert f"`{begin}" in TROUBLE


def test_every_chinese_sentence_of_the_badge_is_in_troubleshooting() -> None:
    table = USERSCRIPT.partition("const TEXTS = {")[2].partition("\n  };")[0]
    sentences = re.findall(r'["`]([^"`]*[\u4e00-\u9fff].*?)["`],?\s*\]', table)
    assert len(sentences) == len(re.findall(r"^    \w+: \[", table, re.MULTILINE))
    for sentence in sentences:
        begin = re.split(r"\$\{(?!BRIDGE_URL)", sentence)[0].replace("${BRIDGE_URL}", "ws://127.0.0.1:9081/")
        assert f"`{begin.strip()}" in TROUBLE


def test_what_troubleshooting_quotes_in_chinese_is_said_somewhere() -> None:
    pages = [page.read_text("utf-8") for page in (ROOT / "dashboard" / "i18n" / "zh").iterdir()]
    said = "\n".join([PROGRAM, USERSCRIPT, *pages])
    quotes = [
        quote for quote in re.findall(r"`([^`\n]+)`", prose(TROUBLE)) if re.search("[\u4e00-\u9fff]", quote)
    ]
    assert len(quotes) > 40
    # Sentences stand in one another, with numbers and names between: in pieces they are found again.
    pieces = {piece for quote in quotes for piece in re.split(r"应为|[^\u4e00-\u9fff]+", quote) if piece}
    assert {piece for piece in pieces if piece not in said} == set()


def test_contributing_names_every_section_of_the_program() -> None:
    banners = re.findall(r"^# ={60,}\n# (.+)\n# ={60,}$", PROGRAM, re.MULTILINE)
    [text] = [body for title, body in chapters(CONTRIBUTING, 2) if title == "The program"]
    assert [row[0] for table in tables(text) for row in table] == banners


# ── Examples ────────────────────────────────────────────────────────────────────────────────────────────────


def example(page: Path, language: str) -> str:
    """A page's blocks in a language, one after another: later ones go on with what earlier ones made."""
    return "\n".join(fence.code for fence in fences(page.read_text("utf-8")) if fence.language == language)


def with_examples(language: str) -> pytest.MarkDecorator:
    pages = [page for page in (ROOT / "README.md", *CLIENT_PAGES) if example(page, language)]
    return pytest.mark.parametrize("page", pages, ids=name_of)


def models_in(page: Path) -> list[str]:
    """The models that a page names."""
    text = page.read_text(encoding="utf-8")
    entries = json.loads((ROOT / "models.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(entry["publicName"] for entry in entries)
    return [name for name in names if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text)]


async def rig_for(nursery: trio.Nursery, directory: Path, page: Path) -> Rig:
    """A rig that serves the models that a page names."""
    rig = await start(nursery, directory / "rig", models=models_in(page))
    rig.program.media.site_origins.add(rig.arena_url)
    (directory / "cat.png").write_bytes(contract.png("cat"))
    return rig


async def run(rig: Rig, directory: Path, *command: str, place: Path | None = None) -> str:
    """What the command prints, which has to succeed; it knows nothing of whoever runs the tests."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("OPENAI_", "LANG", "LMARENA_"))
    }
    environment["PYTHONUTF8"] = "1"
    with trio.fail_after(EXAMPLE_SECONDS):
        done = await trio.run_process(
            [each.replace(BASE_URL, rig.url) for each in command],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=place or directory,
            env=environment,
        )
    assert done.returncode == 0, (done.stdout + done.stderr).decode("utf-8", "replace")
    return done.stdout.decode()


@with_examples("python")
async def test_python_s_examples_run(nursery: trio.Nursery, tmp_path: Path, page: Path) -> None:
    rig = await rig_for(nursery, tmp_path, page)
    code = example(page, "python")
    printed = await run(rig, tmp_path, sys.executable, "-c", code)
    assert "[gemini-2.5-pro] 你好" in printed
    assert (REASONING in printed) == ("reasoning" in code)


@with_examples("js")
async def test_node_s_examples_run(nursery: trio.Nursery, tmp_path: Path, page: Path) -> None:
    rig = await rig_for(nursery, tmp_path, page)
    code = f"process.chdir({json.dumps(str(tmp_path))});\n{example(page, 'js')}"
    place = ROOT / "tests" / "clients"  # where its packages are
    printed = await run(rig, tmp_path, "node", "--input-type=module", "-e", code, place=place)
    assert "[gemini-2.5-pro] 你好" in printed
    assert (REASONING in printed) == ("reasoning" in code)


def curl_examples() -> list[Any]:
    return [
        pytest.param(page, fence.code, id=f"{name_of(page)}-{number}")
        for page in (ROOT / "README.md", *CLIENT_PAGES)
        for number, fence in enumerate(fences(page.read_text(encoding="utf-8")))
        if fence.language == "sh" and fence.code.startswith("curl ")
    ]


@pytest.mark.parametrize(("page", "code"), curl_examples())
async def test_curl_s_examples_run(nursery: trio.Nursery, tmp_path: Path, page: Path, code: str) -> None:
    rig = await rig_for(nursery, tmp_path, page)
    # Fails where the server does.
    assert await run(rig, tmp_path, "sh", "-c", code.replace("curl ", "curl -fsS ", 1))
