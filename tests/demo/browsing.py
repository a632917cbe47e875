"""`vicmae demo` as a process of its own, and a real browser that opens its page."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


BROWSER = shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if BROWSER else ["chromium"]
# It looks for nothing but what it is told to open.
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(*flags, **environment: str) -> Iterator[str]:
    """Runs `vicmae demo`, gives the address of its page once that is open, and closes it as Ctrl-C does."""
    command = [sys.executable, "-m", "vicmae_command", "demo", *map(str, flags), "--port", str(free_port())]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("The page is open at http://127.0.0.1:"), line
        yield line.split()[5]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


@contextmanager
def browsed(address: str, width: int = 1280, height: int = 900, **options) -> Iterator:
    """Opens a page in Chromium: Playwright's page. Its list `strays` has requests that went to other places."""
    from playwright.sync_api import sync_playwright  # no dependency of the other tests

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.strays = []
        page.on("request", lambda request: note_stray(page.strays, request.url, address))
        page.goto(address)
        page.wait_for_selector("#show")
        yield page
        browser.close()


def note_stray(strays: list[str], url: str, address: str) -> None:
    if not url.startswith((address, "data:", "blob:")):
        strays.append(url)


def choose(page, path: Path) -> None:
    """Uploads a file, in place of the one before."""
    if page.locator("#upload [aria-label=Clear]").count():
        page.click("#upload [aria-label=Clear]")
    page.set_input_files("#upload input[type=file]", path)
    page.wait_for_selector("#upload a[download]")


def wait_for_other(page, selector: str, act: Callable[[], None]) -> None:
    """Acts, and waits until the first element that a selector finds has another content."""
    content = f"document.querySelector({selector!r})?.innerHTML"
    before = page.evaluate(content)
    act()
    page.wait_for_function(f"before => {content} && {content} !== before", arg=before, timeout=60_000)


def show(page, path: Path) -> str:
    """Uploads a file, presses the button, and returns the line that the page says about the file."""
    choose(page, path)
    wait_for_other(page, "#message p", lambda: page.click("#show"))
    return page.inner_text("#message p")
