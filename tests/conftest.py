"""Fixtures that more than one file of tests uses."""

import logging
from collections.abc import Iterator

import pytest
from playwright.sync_api import Playwright, sync_playwright
from userscript_bridge import ArenaProcess


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An error of the program is logged with its traceback, and fails the test."""
    caplog.set_level(logging.WARNING, "lmarena_proxy")
    yield
    records = [record for record in caplog.get_records("call") if record.name.startswith("lmarena_proxy")]
    assert [record.getMessage() for record in records if record.exc_info] == []


@pytest.fixture(scope="module")
def arena_process() -> Iterator[ArenaProcess]:
    """The stand-in arena as a process of its own, under TLS."""
    process = ArenaProcess()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """For one file only: while it is there, an asyncio loop counts as running, and Trio's tests break."""
    with sync_playwright() as started:
        yield started
