"""The README says of every parameter what becomes of it."""

import re
from pathlib import Path

import pytest

from lmarena_proxy import (
    IGNORED_IMAGE_PARAMETERS,
    IGNORED_PARAMETERS,
    REFUSED_IMAGE_PARAMETERS,
    REFUSED_PARAMETERS,
    ChatBody,
    ModelCard,
)

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CHAPTER = README.partition("## Parameters")[2].partition("\n## ")[0]
TABLE = {
    name: row[2]
    for row in re.finditer(r"^\| (`.+?) \| (.*) \|$", CHAPTER, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", row[1])
}


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
