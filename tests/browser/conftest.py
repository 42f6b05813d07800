from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium():
    """Path of a browser, or None."""
    named = os.environ.get("MMATTN_CHROMIUM")
    found = [named, *(shutil.which(name) for name in NAMES)]
    return next((path for path in found if path and Path(path).is_file()), None)


def pytest_collection_modifyitems(items):
    """Skip, with the reason, where there is nothing to look with."""
    missing = []
    if chromium() is None:
        missing.append("no chromium (set MMATTN_CHROMIUM)")
    for package in ("playwright", "gradio"):
        try:
            __import__(package)
        except ImportError:
            missing.append(f"{package} is not installed")
    if missing:
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="; ".join(missing)))


@pytest.fixture(scope="session")
def server(demo_server):
    """The whole page on loopback; its address."""
    return demo_server


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; afterwards there must have been no error in it and no request elsewhere."""
    opened, wrong = [], []

    def go(width=1280, height=900, scheme="light"):
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=False
        )
        page.on(
            "console",
            lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None,
        )
        page.on("pageerror", lambda error: wrong.append(f"page: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((server, "data:", "blob:"))
                else wrong.append(f"request: {request.url}")
            ),
        )
        page.goto(server)
        page.wait_for_selector("#image-run")
        opened.append(page)
        return page

    seen = SimpleNamespace(go=go, wrong=wrong)
    yield seen
    for page in opened:
        page.close()
    assert not wrong
