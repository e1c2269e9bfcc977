"""The page of a machine's run: it tells all of it, loads nothing, and holds any text as text."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.bench.machine.support import comparisons, facts, leave
from tests.bench.tell.test_report import HOSTILE, Page
from xr0_engine.bench.machine import state
from xr0_engine.bench.machine.findings import golden
from xr0_engine.bench.machine.plan import PARTS, Step
from xr0_engine.bench.machine.state import CRASHED, CUT_SHORT, FAILED, LEFT_OUT, Ended

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENDED = {
    "golden-persistent": Ended(CRASHED, "ended by signal 11", 4.2, 60, -11),
    "images": Ended(FAILED, HOSTILE, 33, 60, 9),
    "tails-libero": Ended(CUT_SHORT, "its time was up", 300, 300, 130),
    "jitter-libero": Ended(LEFT_OUT, "the time was up: it needs 20 s, 3 were left"),
}


def written(folder, given=None, ended=None) -> tuple[str, Page]:
    leave(folder, given, ended)
    html = (folder / state.PAGE).read_text()
    page = Page(html)
    assert page.open == []
    return html, page


def text_of(page: Page) -> str:
    return " ".join("".join(page.text).split())


@pytest.fixture
def folder(tmp_path):
    logs = tmp_path / state.LOGS
    logs.mkdir()
    (logs / "golden-persistent.log").write_text("\n".join(["first line", *["x"] * 60, HOSTILE, "Segmentation fault"]))
    return tmp_path


def test_it_tells_how_every_step_ended(folder):
    html, page = written(folder, ended=ENDED)
    text = text_of(page)
    assert [title for title in PARTS.values() if title not in text] == []
    assert [name for name in state.read(folder).ended if name not in text] == []
    assert "Not as it should be: golden-persistent (crashed), images (failed)." in text
    assert "ended by signal 11" in text
    assert "Segmentation fault" in text
    assert "first line" not in text
    assert "All that was run has passed" not in text
    assert html.count('<span class="badge bad">') == 2


def test_when_all_passed_it_says_so_and_nothing_is_to_be_mended(folder):
    text = text_of(written(folder)[1])
    assert "All that was run has passed." in text
    assert "send the folder in" not in text


def test_it_says_what_to_try_next_faults_first(folder):
    items = re.findall(r"<li>(.*?)</li>", written(folder, ended=ENDED)[0])
    assert items[0].startswith("golden-persistent crashed: send the folder in")
    assert "--backend reference" in items[0]
    assert items[2].startswith("libero, vision (replay), at 57% of its bound: ")
    assert "Still open: 2 steps." in items[-1]
    # The flow reaches nine tenths of its bound.
    assert not [item for item in items if "flow (replay)" in item]


def test_figures_stand_against_their_bounds(folder):
    text = text_of(written(folder)[1])
    for told in ("libero, replay p5011.2 ms", "libero, of the bound79%", "bound (NVIDIA H200, 194 tokens)"):
        assert told in text
    assert re.search(r"replay\s*100\s*11\.2", text)
    assert "4 of 4" in text
    assert "Self-check on cuda:0: triton: self-check of seeded model passed" in text
    assert "1 of 1 ops that were measured have a variant that beats the default." in text
    assert "10.00 GiB" in text


def test_a_golden_case_out_of_tolerance_is_named(folder):
    leave(folder)
    path = folder / state.RESULTS / "golden-chained.json"
    path.write_text(json.dumps(comparisons(worst=0.5)))
    told = golden(folder, [Step("golden-chained", "correct", "", (), path.name, printed=True)])
    assert "3 of 4" in told
    assert "grouped.prefix1: actions" in told
    assert "5.0e-01" in told


def test_an_emulated_run_says_so_in_large_letters(folder):
    html, page = written(folder, facts(emulated=90))
    assert "<strong>EMULATED</strong>" in html
    assert "no time on this page is a measurement of a GPU" in text_of(page)
    assert html.count("Emulated: these are the emulator") == len(state.results_of(folder))
    assert "of the bound" not in html
    assert "1 variants of 1 ops gave what the default gives" in html
    assert "beats the default" not in html
    assert "EMULATED" not in written(folder)[0]


def test_it_says_how_to_send_the_folder_in(folder):
    text = text_of(written(folder)[1])
    assert f"-czf xr0-machine-nvidia-h200-{state.read(folder).created[:10]}.tar.gz {folder.name}" in text
    assert str(folder) not in text


def test_it_loads_nothing_and_no_text_becomes_markup(folder):
    given = facts(name=HOSTILE)
    html, page = written(folder, given, ENDED)
    assert not [tags for tags in page.tags if tags[0] in ("link", "img", "iframe", "object", "base", "form")]
    assert page.count("script") == page.count("style") == 1
    assert not [name for _, given in page.tags for name in given if name == "style" or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", html)
    assert HOSTILE in "".join(page.text)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_it_without_complaint(folder, browser, scheme, width):
    leave(folder, facts(emulated=90), ENDED)
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    faults, requested = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("request", lambda request: requested.append(request.url))
    page.goto((folder / state.PAGE).as_uri())
    assert page.locator(".banner").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = [page.evaluate(f"getComputedStyle(document.querySelector('{it}')).color") for it in ("body", ".banner")]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len({*colours, ground}) == 3
    page.close()
    assert faults == []
    assert len(requested) == 1
