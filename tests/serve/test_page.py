"""The status page in a real browser."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serve.support import EchoEngine, backend, observation
from tests.serve.test_guard import profile
from xr0_engine import Client
from xr0_engine.guard import write_guard
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 20_000
expect.set_options(timeout=TIMEOUT_MS)
KEY = "page-key-1"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, keys=(KEY,))) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """Opened with the key as its password; whatever goes wrong in it, or leaves the server, fails the test."""
    context = browser.new_context(http_credentials={"username": "", "password": KEY}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    faults, requested = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"http://localhost:{server.port}/")
    yield page
    context.close()
    assert faults == []
    assert {url for url in requested if not url.startswith((f"http://localhost:{server.port}/", "data:"))} == set()


def test_page_shows_what_happens(page, server, tmp_path):
    page.wait_for_selector("#state.ready")
    assert "Nobody is connected." in page.inner_text("#clients")
    hostile = "<img src=x onerror=alert(1)> Pick."
    asked = replace(observation(0.25, "bimanual", size=(48, 64)), instruction=hostile)
    with Client(server.url, KEY) as client:
        client.infer(replace(asked, instruction="Go."))
        client.infer(asked, prefix=np.ones((3, 32), np.float32))
        expect(page.locator("#instruction")).to_contain_text(hostile)
        images = page.locator("#frames img")
        expect(images).to_have_count(3)
        for number in range(3):
            expect(images.nth(number)).to_have_js_property("naturalWidth", 64)
        assert "30 actions at 30 Hz, 1.00 s; the first 3 were given" in page.inner_text("#chunk")
        assert page.locator("#columns polyline").count() == 7
        assert page.locator("#columns section").first.inner_text().startswith("left x")
        assert page.locator("#histogram rect").count() >= 8
        assert page.locator("#clients tbody tr").count() == 1
        assert "ego · 64 × 48" in page.inner_text("#frames")
        assert page.screenshot(path=tmp_path / "page.png", full_page=True)[:4] == b"\x89PNG"


def test_page_goes_on_showing_the_last_observation(page, server):
    """Whoever opens it after a client has gone sees what that client saw, not that nobody has asked."""
    page.wait_for_selector("#state.ready")
    assert "No request answered yet." in page.inner_text("#frames")
    for value in (0.25, 0.5):
        with Client(server.url, KEY) as client:
            client.infer(replace(observation(value, "bimanual", size=(48, 64)), instruction=f"Go to {value}."))
    page.reload()
    expect(page.locator("#instruction")).to_contain_text("Go to 0.5.")
    expect(page.locator("#who")).to_contain_text("client 2 · bimanual · gone")
    expect(page.locator("#frames img")).to_have_count(3)
    expect(page.locator("#frames img").first).to_have_js_property("naturalWidth", 64)
    expect(page.locator("#clients")).to_contain_text("Nobody is connected.")
    assert "No request" not in page.inner_text("main")
    assert "30 actions at 30 Hz" in page.inner_text("#chunk")


def test_page_shows_what_struck_the_guard(browser, tmp_path):
    write_guard(tmp_path / "guard.json", profile())
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=tmp_path / "guard.json")) as server:
        page = browser.new_page()
        page.goto(f"http://localhost:{server.port}/")
        expect(page.locator("#warnings")).to_contain_text("All as in training.")
        with Client(server.url) as client:
            client.infer(observation(5.0, instruction="<b>Sing.</b>"))
            expect(page.locator("#warnings tbody tr")).to_have_count(2)
        assert "column 0 is 5, in training 0 to 1" in page.inner_text("#warnings")
        assert "<b>Sing.</b>" in page.inner_text("#warnings")
        assert "2 warnings since the start" in page.inner_text("#guarded")
        page.close()


def test_page_says_when_the_server_is_gone(browser):
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        page = browser.new_page()
        page.goto(f"http://localhost:{server.port}/")
        page.wait_for_selector("#state.ready")
    page.wait_for_selector("#state.bad")
    assert page.inner_text("#state") == "unreachable"
    page.close()
