"""Fixtures that more than one file of tests uses."""

import gc
import logging
from collections.abc import Iterator

import pytest
from playwright.sync_api import Playwright, sync_playwright
from userscript_bridge import ArenaProcess

gc.disable()  # What the tests import stays; `pytest_collection_finish` has it looked at once.

# The files that take longest begin first: else the last of them runs alone while the other workers are idle.
LONGEST = (
    *("test_userscript", "test_dashboard", "test_browser_faults", "test_open_webui", "test_program"),
    *("test_fuzz", "test_chat_parameters", "test_client_faults", "test_api", "test_bootstrap", "test_media"),
    *("test_soak", "test_kill", "test_openapi", "test_clients", "test_monitoring", "test_housekeeping"),
    *("test_browser", "test_bridge_fuzz", "test_config", "test_docs", "test_uploads", "test_images"),
)

# What starts a browser, or what a person would use in one, without the fixture of that name.
LIKE_A_BROWSER = {"test_open_webui"}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "playwright" in getattr(item, "fixturenames", ()) or item.path.stem in LIKE_A_BROWSER:
            item.add_marker("browser")
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What is there now stays: the collector of cycles need not look at it again, nor at the rest often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


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
