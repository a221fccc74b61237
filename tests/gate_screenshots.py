"""Makes the README's pictures of the browser's own gate: its question, its settings, the badge beside them.

apt-get install xvfb xdotool chromium-l10n     (beside what tests/run installs)
PYTHONPATH=. python tests/gate_screenshots.py

What a browser draws around its page is in no picture of the page: this one has a window, on a screen in
memory. The clicks are the person's, at the places where Chromium 156 has its buttons: look at what was made.
"""

import base64
import hashlib
import json
import os
import ssl
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_certificate
from playwright.sync_api import BrowserContext, Playwright, sync_playwright
from userscript_bridge import (
    CHROMIUM,
    CHROMIUM_FLAGS,
    ROOT,
    ArenaProcess,
    ScriptedBridge,
    script_for,
    sign_in,
    wait_status,
)

PICTURES = ROOT / "docs" / "pictures"
MAX_BYTES = 60_000
WIDTH, HEIGHT = 780, 520
BADGE_HEIGHT = 120  # of the picture that shows no more than the badge
XWD_WORDS = 25  # of the header of a screen in X's own format, xwd
LANGUAGES = {"": "en_US", "-zh": "zh_CN"}  # of the pictures, by the end of their names

# Where the person clicks.
BLOCK, SITE_ICON, APPS_SWITCH = (310, 217), (142, 62), (408, 216)


class Screen:
    """An X screen in memory, without a pointer."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "Xvfb_screen0"
        size = f"{WIDTH}x{HEIGHT}x24"
        command = ["Xvfb", "-displayfd", "1", "-screen", "0", size, "-fbdir", str(folder), "-nocursor"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.environment = os.environ | {"DISPLAY": f":{self.process.stdout.readline().strip()}"}

    def click(self, place: tuple[int, int]) -> None:
        x, y = map(str, place)
        subprocess.run(["xdotool", "mousemove", x, y, "click", "1"], env=self.environment, check=True)

    def take(self, name: str, top: int = 0) -> None:
        """What is to be seen now, from that line down, as a PNG."""
        time.sleep(1.5)  # bubbles fade in
        data = self.file.read_bytes()
        header = struct.unpack_from(f">{XWD_WORDS}I", data)
        row_bytes, pixels_at = header[12], header[0] + 12 * header[19]
        lines = bytearray()
        for y in range(top, HEIGHT):
            row = data[pixels_at + y * row_bytes :][: 4 * WIDTH]
            line = bytearray(3 * WIDTH)
            line[0::3], line[1::3], line[2::3] = row[2::4], row[1::4], row[0::4]
            lines += b"\0" + line
        picture = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in (
                (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT - top, 8, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(bytes(lines), 9)),
                (b"IEND", b""),
            )
        )
        (PICTURES / f"{name}.png").write_bytes(picture)
        print(f"{name}.png: {len(picture) / 1000:.0f} kB" + (" - too large" * (len(picture) > MAX_BYTES)))


def key_of(port: int) -> str:
    """The arena's key, for the flag that takes its certificate as good: other flags cross the address out."""
    certificate = load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode())
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


@contextmanager
def person(
    playwright: Playwright, screen: Screen, arena: ArenaProcess, bridge: ScriptedBridge, language: str
) -> Iterator[BrowserContext]:
    """A browser with a window that fills the screen; for it the stand-in is a public site."""
    flags = [
        f"--host-resolver-rules=MAP lmarena.ai:443 127.0.0.1:{arena.port}",
        f"--ip-address-space-overrides=127.0.0.1:{arena.port}=public",
        f"--ignore-certificate-errors-spki-list={key_of(arena.port)}",
        f"--window-size={WIDTH + 2},{HEIGHT + 2}",  # its frame is outside
        *("--window-position=0,0", "--test-type"),  # no bar that warns of the flags
    ]
    with tempfile.TemporaryDirectory() as profile:
        preferences = Path(profile, "Default", "Preferences")
        preferences.parent.mkdir()
        preferences.write_text(json.dumps({"translate": {"enabled": False}}))  # it would offer to
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=False,
            no_viewport=True,
            args=[*flags, *CHROMIUM_FLAGS],
            ignore_default_args=["--enable-automation"],
            env=screen.environment | {"LANGUAGE": language, "LC_ALL": f"{language}.UTF-8"},  # type: ignore[arg-type]
        )
        context.add_init_script(script_for(bridge))
        try:
            yield context
        finally:
            context.close()


def take_all(context: BrowserContext, screen: Screen, end: str) -> None:
    """The gate as the person meets it: asked, refused by mistake, allowed after all."""
    page = context.pages[0]
    sign_in(page)
    wait_status(page, "permission_prompt")
    screen.take(f"gate-asks{end}")
    screen.click(BLOCK)
    wait_status(page, "permission_denied")
    screen.click(SITE_ICON)
    screen.take(f"gate-denied{end}")
    screen.click(APPS_SWITCH)
    page.reload()
    wait_status(page, "ready")
    screen.take(f"gate-open{end}", HEIGHT - BADGE_HEIGHT)


def main() -> None:
    arena, bridge = ArenaProcess(), ScriptedBridge()
    bridge.start()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        screen = Screen(Path(folder))
        try:
            for end, language in LANGUAGES.items():
                with person(playwright, screen, arena, bridge, language) as context:
                    take_all(context, screen, end)
        finally:
            screen.process.terminate()
            bridge.stop()
            arena.stop()


if __name__ == "__main__":
    main()
