"""The file reads downward: its banners, its order, its sizes, and what it and the userscript never do."""

import ast
import re
import symtable
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import syntax_tree

from lmarena_proxy import VERSION

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "lmarena_proxy.py").read_text(encoding="utf-8")
SCRIPT = (ROOT / "bridge.user.js").read_text(encoding="utf-8")

MAX_FUNCTION_LINES, MAX_CLASS_LINES = 50, 200
# Classes that are longer than they should be, and how long they were when that was accepted. Only downward.
LONG_CLASSES: dict[str, int] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[Function]:
    return (node for node in ast.walk(syntax_tree()) if isinstance(node, Function))


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def names_bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, Function | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def names_used(table: symtable.SymbolTable) -> Iterator[str]:
    """The module-level names that a statement refers to, in bodies and annotations too."""
    at_top = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (at_top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from names_used(child)


def is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def test_banners_are_the_list_in_the_docstring() -> None:
    banners = re.findall(r"^# ={60,}\n# (.+)\n# ={60,}$", SOURCE, re.MULTILINE)
    docstring = ast.get_docstring(syntax_tree(), clean=False) or ""
    listed = docstring.partition("Its sections:")[2].split("\n")
    assert banners == [line.strip() for line in listed if line.strip()]


def test_banners_have_one_form() -> None:
    rules = re.findall(r"^# ?=.*$", SOURCE, re.MULTILINE)
    assert len(set(rules)) == 1
    assert len(rules) == 2 * len(re.findall(r"^# ={60,}\n# \S.*\n# ={60,}$", SOURCE, re.MULTILINE))


def test_a_definition_is_used_only_below_itself() -> None:
    defined: dict[str, int] = {}
    for index, statement in enumerate(syntax_tree().body):
        for name in names_bound(statement):
            defined.setdefault(name, index)
    upward = [
        f"line {statement.lineno}: {name} is defined at line {syntax_tree().body[defined[name]].lineno}"
        for index, statement in enumerate(syntax_tree().body)
        if not is_main_guard(statement)
        for name in sorted({*names_used(symtable.symtable(ast.unparse(statement), "statement", "exec"))})
        if defined.get(name, -1) > index
    ]
    assert upward == []


def test_the_main_guard_comes_last_but_for_the_two_before_the_imports() -> None:
    guards = [index for index, statement in enumerate(syntax_tree().body) if is_main_guard(statement)]
    assert guards == [guards[0], guards[0] + 1, len(syntax_tree().body) - 1]
    # What comes before may be nothing that an older Python, or one without the libraries, lacks.
    above = [ast.unparse(statement) for statement in syntax_tree().body[1 : guards[0]]]
    assert above == ["import os", "import sys", "from importlib.util import find_spec"]


def test_no_function_is_longer_than_fifty_lines() -> None:
    long = {node.name: lines_of(node) for node in functions() if lines_of(node) > MAX_FUNCTION_LINES}
    assert long == {}


def test_long_classes_are_known_and_do_not_grow() -> None:
    classes = [node for node in ast.walk(syntax_tree()) if isinstance(node, ast.ClassDef)]
    over = {
        node.name: lines_of(node)
        for node in classes
        if lines_of(node) > LONG_CLASSES.get(node.name, MAX_CLASS_LINES)
    }
    assert over == {}
    assert LONG_CLASSES.keys() <= {node.name for node in classes}


def test_no_except_swallows_a_cancellation() -> None:
    swallowing = []
    for handler in (node for node in ast.walk(syntax_tree()) if isinstance(node, ast.ExceptHandler)):
        caught = (
            {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
            if handler.type
            else set()
        )
        reraises = any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
        if handler.type is None or ("BaseException" in caught and not reraises):
            swallowing.append(handler.lineno)
    assert swallowing == []


def test_every_signature_is_annotated() -> None:
    bare = []
    for node in functions():
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ]
        missing = [
            each.arg for each in arguments if each and not each.annotation and each.arg not in ("self", "cls")
        ]
        if missing or node.returns is None:
            bare.append(f"line {node.lineno}: {node.name} {missing}")
    assert bare == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"innerHTML",
        r"outerHTML",
        r"insertAdjacentHTML",
        r"dispatchEvent\(\s*new Mouse",
        r"document\.cookie\s*=(?!=)",
    ],
)
def test_the_userscript_neither_clicks_nor_writes_cookies_nor_html(pattern: str) -> None:
    assert re.findall(pattern, SCRIPT) == []


def test_the_inline_metadata_needs_what_the_requirements_file_does() -> None:
    block = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", SOURCE)
    assert block
    metadata = tomllib.loads(re.sub("^# ", "", block[1], flags=re.MULTILINE))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["dependencies"] == [line.partition("#")[0].strip() for line in lines]
    assert metadata["requires-python"] == project["requires-python"]
    assert project["version"] == VERSION
