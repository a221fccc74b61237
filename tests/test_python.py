"""A Python that is too old, and one without the libraries: one line that says what to do, and exit code 2."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from harness import ROOT

PROGRAM = ROOT / "lmarena_proxy.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OLDEST = str(PROJECT["requires-python"]).removeprefix(">=")
OLDER = ("3.8", "3.9", "3.10")
HAN = re.compile(r"[\u4e00-\u9fff]")


def refusal(python: str, *arguments: str, directory: Path = ROOT) -> str:
    """The one line that this start leaves."""
    command = [python, "-X", "utf8", *arguments]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Cannot start: ")
    assert HAN.search(line)
    return line


def find_python(version: str) -> str:
    """One that runs, on the path or among pyenv's; "" where there is none."""
    on_path = shutil.which(f"python{version}")
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for place in filter(None, [on_path, *map(str, of_pyenv)]):
        # pyenv's own shims are there for versions that are not.
        done = subprocess.run([place, "-V"], capture_output=True, text=True, timeout=60, check=False)
        if done.stdout.startswith(f"Python {version}."):
            return place
    return ""


@pytest.mark.parametrize("version", OLDER)
def test_the_file_compiles_with_a_python_that_is_too_old(version: str) -> None:
    """Else it ended in a SyntaxError, before it could say anything."""
    feature_version = (3, int(version.partition(".")[2]))
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=feature_version)


@pytest.mark.parametrize("version", OLDER)
def test_a_python_that_is_too_old_is_told_in_one_line(version: str) -> None:
    python = find_python(version)
    if not python:
        pytest.skip(f"no Python {version} here, neither on the path nor among pyenv's")
    line = refusal(python, str(PROGRAM), "--demo")
    assert f"Python {OLDEST} or newer" in line
    assert f"this is {version}." in line


def test_what_is_needed_is_told_also_where_no_older_python_is_at_hand() -> None:
    """The same on the Python that runs this, which says that it is another one."""
    steps = (
        "import runpy, sys",
        "sys.version_info, sys.version = (3, 10, 9, 'final', 0), '3.10.9 (main)'",
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')",
    )
    line = refusal(sys.executable, "-c", "; ".join(steps))
    assert f"Python {OLDEST} or newer" in line
    assert "this is 3.10.9:" in line


def test_missing_libraries_are_named(tmp_path: Path) -> None:
    line = refusal(sys.executable, "-I", "-S", str(PROGRAM), directory=tmp_path)
    named = line.removeprefix("Cannot start: ").partition(" not found")[0].split(", ")
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {*named} == {each.partition("==")[0].replace("-", "_") for each in required}


def test_libraries_are_installed_beside_the_program_not_into_the_system(tmp_path: Path) -> None:
    """Which many systems refuse. With whole paths: nobody knows in which directory they are called."""
    home = tmp_path / "a place"
    home.mkdir()
    program, python = shutil.copy(PROGRAM, home), home / ".venv" / "bin" / "python"
    # Without -S there would be the libraries of this environment; with it Python takes itself for no venv.
    line = refusal(sys.executable, "-I", "-S", str(program), directory=tmp_path)
    commands = line.partition("启动: ")[2].split(" && ")
    assert commands[0] == f'{sys.executable} -m venv "{home}/.venv"'
    assert commands[1:] == [
        f'"{python}" -m pip install -r "{home}/requirements.txt"',
        f'"{python}" "{program}"',
    ]

    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    line = refusal(sys.executable, "-I", "-S", str(program), directory=tmp_path)
    assert line.endswith(f'Start it with 请改用: "{python}" "{program}"')

    # That one has none, either.
    line = refusal(str(python), "-I", "-S", str(program), directory=tmp_path)
    assert line.endswith(f'请安装: "{python}" -m pip install -r "{home}/requirements.txt"')


def test_one_missing_library_is_named_alone(tmp_path: Path) -> None:
    steps = (
        "import importlib.util, runpy",
        "find = importlib.util.find_spec",
        "importlib.util.find_spec = lambda name: None if name == 'quart_trio' else find(name)",
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')",
    )
    line = refusal(sys.executable, "-c", "; ".join(steps), directory=tmp_path)
    assert line.startswith("Cannot start: quart_trio not found")
