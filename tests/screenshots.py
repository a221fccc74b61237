"""Makes the README's pictures of the dashboard from a running demo.

apt-get install fonts-noto-core fonts-noto-cjk     (beside what tests/run installs)
python lmarena_proxy.py --demo     (in another terminal, with a new store; leave its question unanswered)
python tests/screenshots.py [http://127.0.0.1:9080]

The first pictures, one in each language, are of the run that the script then begins, so they want the
question to be open.
"""

import json
import random
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
MAX_BYTES = 150_000
WIDE, NARROW = (1180, 700), (390, 760)
LANGUAGES = {"": "en-US", "-zh": "zh-CN"}  # of the run's pictures, by the end of their names
CLIENTS = 8
WARM_UP_SECONDS = 75  # so that the charts show more than a point

# The picture's name, the panel, the theme, the window
SHOTS = (
    ("pool", "pool", "light", WIDE),
    ("requests", "requests", "light", WIDE),
    ("time-dark", "time", "dark", WIDE),
    ("now-narrow", "now", "light", NARROW),
)
QUESTIONS = (
    "请用一句话解释潮汐。",
    "Write a haiku about a lighthouse.",
    "Why is the sky blue?",
    "把这段话翻译成英文：山重水复疑无路。",
    "What does this error mean: EADDRINUSE?",
)


def fetch(address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "OpenAI/Python 2.1"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
        return answer.read()


def keep_asking(base: str, names: list[str], done: threading.Event, seed: int) -> None:
    """One client: it asks, reads the answer, thinks, and asks again."""
    choose = random.Random(seed)
    while not done.is_set():
        message = {"role": "user", "content": choose.choice(QUESTIONS)}
        with suppress(OSError):
            fetch(
                f"{base}/v1/chat/completions",
                {"model": choose.choice(names), "stream": choose.random() < 0.8, "messages": [message]},
            )
        done.wait(choose.uniform(0.2, 3))


def chat_models(base: str) -> list[str]:
    models = json.loads(fetch(f"{base}/v1/models"))["data"]
    return [each["id"] for each in models if each["modality"] == "chat" and not each["requires_image"]]


def open_page(
    browser: Browser, base: str, panel: str, theme: Any, size: tuple[int, int], locale: str = "en-US"
) -> Page:
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=theme,
        locale=locale,
        reduced_motion="reduce",
    )
    page.goto(f"{base}/#/{panel}")
    page.wait_for_selector("h1")
    return page


def take(page: Page, name: str) -> None:
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path)
    page.close()
    size_bytes = path.stat().st_size
    print(f"{path.name}: {size_bytes / 1000:.0f} kB" + (" - too large" if size_bytes > MAX_BYTES else ""))


def take_run(browser: Browser, base: str) -> None:
    """The opening of conversations, half way."""
    pages = {end: open_page(browser, base, "now", "light", WIDE, locale) for end, locale in LANGUAGES.items()}
    for page in pages.values():
        page.wait_for_selector(".button.primary", timeout=90_000)
    fetch(f"{base}/api/bootstrap", {"action": "start"})
    pages[""].wait_for_function(
        "() => {const bar = document.querySelector('[role=progressbar]');"
        " return bar && bar.getAttribute('aria-valuenow') > 0.4 * bar.getAttribute('aria-valuemax')}",
        timeout=90_000,
    )
    for end, page in pages.items():
        take(page, f"now{end}")


def main(base: str = "http://127.0.0.1:9080") -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    names = chat_models(base)[:24]
    done = threading.Event()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        take_run(browser, base)
        for seed in range(CLIENTS):
            threading.Thread(target=keep_asking, args=(base, names, done, seed), daemon=True).start()
        time.sleep(WARM_UP_SECONDS)
        for name, panel, theme, size in SHOTS:
            page = open_page(browser, base, panel, theme, size)
            page.wait_for_timeout(4_000)
            take(page, name)
        done.set()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
