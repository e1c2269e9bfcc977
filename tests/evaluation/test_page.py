"""The page of a run: well-formed, self-contained, every text escaped, and shown by a browser at any width."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.evaluation.telling import HOSTILE, chains, clocked, hostile, results, some, write
from xr0_engine.evaluation.page import page, write_page
from xr0_engine.evaluation.page_failures import MOST_FAILURES, MOST_VIDEOS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SUITES = ("spatial", "object", "goal", "10")
VIDEO = "videos/one #1 & 50%.mp4"


class Page(HTMLParser):
    """Tags with their attributes, the text, and unclosed elements."""

    VOID = ("meta", "br", "path", "rect", "circle", "col")

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag, kind=None):
        return [given for name, given in self.tags if name == tag and kind in (None, given.get("class"))]


def read(told):
    html = page(told)
    found = Page(html)
    assert found.open == []
    return found


def libero(**run):
    return results(
        [e for suite in SUITES for task in range(3) for e in some(9, 10, suite, task)], **{"benchmark": "libero"} | run
    )


def grid():
    return results(
        [
            e
            for mode in ("sync", "naive", "async")
            for delay in (0, 2, 6)
            for e in some(max(0, 9 - delay), 10, mode=mode, delay=delay)
        ]
    )


EVERY = [
    pytest.param(results([], planned=5), id="empty"),
    pytest.param(results(some(1, 1)), id="one episode"),
    pytest.param(results(some(0, 4)), id="all failed"),
    pytest.param(libero(), id="libero"),
    pytest.param(libero(policy={"title": "expert", "kind": "expert"}), id="expert"),
    pytest.param(grid(), id="grid"),
    pytest.param(results(grid().episodes[:17], planned=90), id="half-run grid"),
    pytest.param(results(chains([5, 3, 0], suite="ABC_D"), benchmark="calvin"), id="chains"),
    pytest.param(results([clocked(0)], benchmark="aloha"), id="no pieces"),
    pytest.param(results([clocked(30), clocked(20, mode="async")], benchmark="aloha"), id="throughput"),
    pytest.param(
        results([e for task in range(90) for e in some(task % 2, 1, "90", task)], benchmark="libero"), id="90"
    ),
    pytest.param(hostile(), id="hostile"),
]


@pytest.mark.parametrize("told", EVERY)
def test_page_is_well_formed_and_loads_nothing(told):
    found = read(told)
    for _, given in found.tags:
        for name, value in given.items():
            assert not name.startswith("on"), name
            if name == "src" or (name == "href" and not value.startswith("https://")):
                assert value.startswith("./")
            assert "nan" not in (value or "").lower() or HOSTILE in (value or "")
    for svg in found.all("svg", "bar"):
        assert svg["aria-hidden"] == "true"
    for svg in found.all("svg", "lines"):
        assert svg["aria-label"]


def test_policy_names_the_styles_and_scripts_that_are_there():
    html = page(libero())
    (policy,) = [given["content"] for given in Page(html).all("meta") if given.get("http-equiv")]
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_first_section_says_which_how_good_how_sure_beside_whom():
    text = read(libero()).text
    assert text.startswith("Some policy on LIBERO Some policy on LIBERO engine · 120 episodes")
    assert "90.0 % 95 % interval 82.2 to 93.3 mean of 4 suites, 120 trials of 12 tasks; mode sync, delay 0" in text
    assert "Xiaomi-Robotics-0 as published: 98.7 %, above the interval" in text
    assert "Success by suite, %" in text
    assert "arxiv.org/abs/2602.12684" in text


@pytest.mark.parametrize(
    ("bench", "suite", "successes", "told"),
    [
        ("libero", "spatial", 10, "98.8 %, above the interval"),
        ("libero", "spatial", 40, "98.8 %, within the interval"),
        ("simpler", "widowx", 40, "79.2 %, below the interval"),
    ],
)
def test_published_figure_is_placed(bench, suite, successes, told):
    text = read(results(some(successes, 40, suite), benchmark=bench)).text
    assert f"Xiaomi-Robotics-0 as published: {told}" in text


def test_expert_is_said_to_be_one_and_stands_beside_nobody():
    text = read(libero(policy={"title": "expert", "kind": "expert"})).text
    assert "A scripted expert" in text
    assert "published policies" not in text
    assert "as published" not in text


def test_nothing_published():
    text = read(results(some(3, 4))).text
    assert "nothing published to set beside it" in text
    assert "others, published" not in text


def test_delay_curves_have_a_line_for_each_mode():
    found = read(grid())
    assert "Under inference delay" in found.text
    charts = found.all("svg", "lines")
    assert [chart["aria-label"] for chart in charts] == [
        "Success over delay",
        "Reaction over delay",
        "Duration over delay",
    ]
    assert len(found.all("path", "line s2")) == 3
    assert len(found.all("circle", "dot s1")) == 9
    tips = [given.get("data-tip", "") for given in found.all("circle", "dot s1")]
    assert tips[1].startswith("naive, delay 2: 70.0 % (95 % interval 39.7 to 89.2), 10 trials")
    assert "against sync, delay 0, trial by trial" in found.text
    assert "-20.0 % (+0, −2; p 0.5)" in found.text
    assert "Under inference delay" not in read(libero()).text


def test_unfinished_and_uneven_are_warned_of():
    text = read(results(grid().episodes[:17], planned=90)).text
    assert "Unfinished: 17 of 90 episodes." in text
    assert "Modes and delays differ in the trials that were run (7 to 10)" in text
    assert "No episode has ended yet" in read(results([], planned=5)).text


def test_hostile_text_is_text():
    found = read(hostile())
    assert len(found.all("script")) == 1
    assert " ".join(HOSTILE.split()) in found.text


def test_failures_with_their_videos(tmp_path):
    failures = some(0, 3)
    failures[0] = replace(failures[0], video=VIDEO)
    failures[1] = replace(failures[1], video="videos/lost.mp4", error="ValueError: no")
    folder = write(results([*failures, *some(2, 2, task=1)]), tmp_path / "run")
    (folder / "videos").mkdir()
    (folder / VIDEO).write_bytes(b"a film")
    assert write_page(folder) == folder / "page.html"
    found = Page((folder / "page.html").read_text(encoding="utf-8"))
    (video,) = found.all("video")
    assert video["src"] == "./videos/one%20%231%20%26%2050%25.mp4#t=0.01"
    assert "3 failures" in found.text
    assert "goal not reached 2" in found.text
    assert "ValueError: no 1" in found.text
    assert "1 of 5 episodes ended in an error; they count as failures." in found.text


def test_video_outside_the_folder_is_not_referred_to(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"")
    (tmp_path / "run").mkdir()
    for video in ("../secret.mp4", str(tmp_path / "secret.mp4")):
        told = results([replace(some(0, 1)[0], video=video)], folder=tmp_path / "run")
        assert "secret" not in page(told)


def test_thousands_of_failures_stay_readable(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"")
    told = results([replace(e, video="film.mp4") for e in some(0, 2000)], folder=tmp_path)
    found = read(told)
    assert len(found.all("video")) == MOST_VIDEOS
    assert f"and {2000 - MOST_FAILURES} more in episodes.jsonl" in found.text
    assert len(page(told)) < 300_000


def test_no_failure_has_no_section():
    assert "failure" not in read(results(some(4, 4))).text
    assert "1 repeat of a trial" in read(results([replace(some(1, 1)[0], repeats=1)])).text


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_page(tmp_path)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_it_whole(browser, tmp_path, width):
    """Nothing wider than the window, no complaint in the console, tips on hovering, and a video that is allowed."""
    episodes = [*grid().episodes, *some(0, 1, HOSTILE)]
    episodes[-1] = replace(episodes[-1], video="film.mp4", name=HOSTILE + "_" * 200)
    folder = write(results(episodes, benchmark="libero"), tmp_path / "run")
    (folder / "film.mp4").write_bytes(b"no film")
    context = browser.new_context(viewport={"width": width, "height": 800})
    tab = context.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(write_page(folder).as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("h1").inner_text() == "Some policy on LIBERO"
    tab.locator("circle.dot").first.hover()
    assert tab.locator("#tip").inner_text().startswith("sync, delay 0: ")
    assert not [text for text in said if "Content Security Policy" in text]
    context.close()
