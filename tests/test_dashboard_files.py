"""The dashboard's files, without a browser: its texts in two languages, and what its files never do."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "dashboard"
VENDOR = DASHBOARD / "vendor"
LANGUAGES = ("en", "zh")
PARTS = tuple(sorted(path.stem for path in (DASHBOARD / "i18n" / "en").glob("*.js")))
# Ours: all but the vendored modules, of which one is ours, too.
SCRIPTS = sorted(
    path for path in DASHBOARD.rglob("*.js") if path.parent != VENDOR or path.name == "preact-htm.js"
)
CODE = [path for path in SCRIPTS if "i18n" not in path.parts]
STYLES = sorted(path for path in DASHBOARD.rglob("*.css") if path.parent != VENDOR)

ENTRY = re.compile(r'^\s*"((?:[^"\\]|\\.)*)":\s*("(?:[^"\\]|\\.)*"),?\s*$', re.MULTILINE)
STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
BEGINNING = re.compile(r"`([a-z_]+\.[a-z_.]*)\$\{")  # `phase.${phase}`: any key that begins so


def name_of(path: Path) -> str:
    return path.relative_to(DASHBOARD).as_posix()


def read_texts(language: str, part: str) -> dict[str, str]:
    source = (DASHBOARD / "i18n" / language / f"{part}.js").read_text(encoding="utf-8")
    entries: list[tuple[str, str]] = ENTRY.findall(source)
    assert len(entries) == len(dict(entries)), f"a key twice in {language}/{part}.js"
    assert len(entries) == len(re.findall(r'^\s*"[^"]+":', source, re.MULTILINE)), "an entry of another form"
    return {key: json.loads(text) for key, text in entries}


def all_texts(language: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for part in PARTS:
        new = read_texts(language, part)
        assert not texts.keys() & new.keys(), f"keys in two files of {language}"
        texts |= new
    return texts


def placeholders(text: str) -> set[str]:
    """The variables that are shown; one that only chooses a form ({n:one|many}) may lack in a language."""
    return set(re.findall(r"\{(\w+)\}", text))


def without_comments(source: str) -> str:
    return re.sub(r"/\*.*?\*/|(?<![:\"'`\w])//[^\n]*", "", source, flags=re.DOTALL)


def calls_of_t(source: str) -> Iterator[str]:
    """The first argument of each t(…), as it is written."""
    for match in re.finditer(r"(?<![\w.])t\(", source):
        depth, start = 0, match.end()
        for place in range(start, len(source)):
            letter = source[place]
            if letter in "([{":
                depth += 1
            elif letter in ")]}" and depth:
                depth -= 1
            elif letter == ")" or (letter == "," and not depth):
                yield source[start:place]
                break


@pytest.mark.parametrize("part", PARTS)
def test_both_languages_say_the_same(part: str) -> None:
    english, chinese = (read_texts(language, part) for language in LANGUAGES)
    assert list(english) == list(chinese)
    assert {key for key in english if placeholders(english[key]) != placeholders(chinese[key])} == set()


def test_no_text_is_empty() -> None:
    assert [
        key for language in LANGUAGES for key, text in all_texts(language).items() if not text.strip()
    ] == []


def test_every_key_that_is_used_has_a_text_and_none_is_left_over() -> None:
    texts = all_texts("en")
    asked: set[str] = set()
    written: set[str] = set()
    asked_so: set[str] = set()
    beginnings: set[str] = set()
    for path in CODE:
        source = without_comments(path.read_text(encoding="utf-8"))
        for argument in calls_of_t(source):
            asked_so |= set(BEGINNING.findall(argument))
            if not argument.lstrip().startswith("`"):
                asked |= {key for key in STRING.findall(argument) if re.fullmatch(r"[a-z_]+(\.\w+)+", key)}
        written |= set(STRING.findall(source))
        beginnings |= set(BEGINNING.findall(source))
    assert asked, "no call of t() was found"
    assert asked - texts.keys() == set()
    assert {start for start in asked_so if not any(key.startswith(start) for key in texts)} == set()
    assert {key for key in texts.keys() - written if not key.startswith(tuple(beginnings))} == set()


FORBIDDEN = {
    "markup from text": r"innerHTML|outerHTML|insertAdjacentHTML|dangerouslySetInnerHTML|document\.write|"
    r"srcdoc|createContextualFragment|setHTML|parseFromString",
    "code from text": r"\beval\b|\bFunction\s*\(|new\s+Function\b|setTimeout\(\s*[\"'`]",
    "a style as text": r"style=\"|setAttribute\(\s*[\"']style|cssText",
    "a handler as text": r"\bon[a-z]+=\"",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_text_becomes_markup_or_code(path: Path, what: str) -> None:
    source = without_comments(path.read_text(encoding="utf-8"))
    assert re.findall(FORBIDDEN[what], source) == []


def test_the_page_has_nothing_inline() -> None:
    page = (DASHBOARD / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|\bstyle=|\son\w+=|javascript:", page) == []
    assert re.findall(r"<script\b[^>]*>(?!</script>)", page) == []


def test_nothing_is_loaded_from_the_network() -> None:
    page = (DASHBOARD / "index.html").read_text(encoding="utf-8")
    loaded = [*re.findall(r"\b(?:src|href)=\"([^\"]+)\"", page)]
    for path in [*STYLES, *VENDOR.glob("*.css")]:
        loaded += re.findall(r"(?:url\(|@import\s)\s*[\"']?([^\"')]+)", path.read_text(encoding="utf-8"))
    for path in [*CODE, *VENDOR.glob("*.js")]:
        source = path.read_text(encoding="utf-8")
        loaded += re.findall(r"\b(?:import|from)\s*\(?\s*[\"']([^\"']+)[\"']", without_comments(source))
    assert loaded
    assert [address for address in loaded if re.match(r"(?:[a-z]+:)?//", address)] == []


def test_every_module_that_is_imported_is_there() -> None:
    for path in CODE:
        source = without_comments(path.read_text(encoding="utf-8"))
        for name in re.findall(r"\b(?:import|from)\s*\(?\s*\"(\.[^\"]+)\"", source):
            assert (path.parent / name).is_file(), f"{name_of(path)} imports {name}"
    for name in re.findall(
        r"\b(?:src|href)=\"([^\"]+)\"", (DASHBOARD / "index.html").read_text(encoding="utf-8")
    ):
        assert (ROOT / name).is_file(), f"index.html names {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_checked_for_types(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("// @ts-check\n")


def test_vendored_files_are_accounted_for() -> None:
    account = (VENDOR / "README.md").read_text(encoding="utf-8")
    for path in VENDOR.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in account, (
            f"{path.name} is not in vendor/README.md"
        )
    licences = set(re.findall(r"`(LICENSE\.\w+)`", account))
    assert licences == {path.name for path in VENDOR.glob("LICENSE.*")}
    assert len(licences) == 3
    for name in licences:
        assert re.search(r"MIT License|Apache License", (VENDOR / name).read_text(encoding="utf-8")), name
