"""The HTML report and the table of results: complete, self-contained, and safe with any text in a result."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support import ROOT
from xr0_engine.bench import results
from xr0_engine.bench.results import KINDS, Result
from xr0_engine.bench.tell import charts, readme, report
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.cli import app

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)|`&"
STAGES = {"preprocess": 2.0, "vision": 12.0, "prefill": 30.0, "flow": 8.0, "decode": 0.2, "total": 52.2}
CASE = {
    "name": "libero",
    "size": "tiny",
    "robot_type": "libero_all",
    "views": [[256, 256], [256, 256]],
    "tokens": 188,
    "chunk_length": 10,
    "prefix_length": 0,
    "batch": 1,
    "dtype": "float32",
}
ENVIRONMENT = {"device": "cpu", "processor": "made up", "cores": 2, "threads": 1, "torch": "0", "clocks_mhz": None}
BOUND = {"vision": 6.0, "prefill": 15.0, "flow": 4.0, "total": 25.0}


def series(names, rounds=40, stages=STAGES):
    generator = np.random.default_rng(0)
    return {
        name: {stage: (ms * np.exp(generator.normal(0, 0.05, rounds))).tolist() for stage, ms in stages.items()}
        for name in names
    }


def make(kind="latency", names=("released", "engine"), **changes) -> Result:
    """A synthetic result of the shape that the benchmark of that kind writes."""
    shapes = {
        "throughput": {
            "series": series(("batch 1", "batch 4"), stages={"total": 30.0}),
            "facts": {"batches": {"batch 1": 1, "batch 4": 4}, "peak_memory_bytes": 2**30},
        },
        "coldstart": {"series": series(("engine",), 3, {"start": 20.0, "load": 900.0, "total": 920.0})},
        "jitter": {
            "series": series(("engine",), 900, {"total": 30.0, "lateness": 0.1}),
            "facts": {"rate_hz": 30.0, "ticks": 901, "skipped_ticks": 1, "missed_deadlines": 2},
        },
        "kernels": {
            "series": series(("reference",), stages={"flow: QKV": 0.4, "flow: down": 0.2}),
            "facts": {"chip": "CPU", "bound_ms": {"flow: QKV": 0.2, "flow: down": 0.1}},
        },
        "ablate": {
            "series": series(("engine", "table kept")),
            "facts": {"stages": {"table kept": "flow"}, "instead": {"table kept": "it is made anew"}},
        },
        "roofline": {
            "series": {},
            "case": {**CASE, "tokens": 194},
            "facts": {
                "chip": "CPU, 1 threads",
                "ceilings": {"operations_s": {"float32": 1e11}, "bytes_s": 2e10, "source": "measured"},
                "bound_ms": BOUND,
                "operators": [{"stage": "flow", "name": "QKV", "count": 80, "bound_ms": 0.1, "limit": "memory"}],
            },
        },
    }
    result = Result(
        kind=kind,
        command=f"xr0 bench {kind}",
        environment=ENVIRONMENT,
        case=CASE,
        boundary="stage",
        backend="reference",
        series=series(names),
        commit="0123456789abcdef-dirty",
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(result, **{**shapes.get(kind, {}), **changes})


class Page(HTMLParser):
    """Tags with their attributes, the text of every element, and unclosed elements."""

    VOID = ("meta", "br", "path", "rect", "circle")

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def render(*given):
    html = report.page([(f"{number}.json", result) for number, result in enumerate(given)])
    page = Page(html)
    assert page.open == []
    return html, page


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_renders(kind):
    html, page = render(make(kind))
    assert report.TITLES[kind] in html
    assert f"xr0 bench {kind}" in "".join(page.text)
    assert page.count("figure") >= (kind != "roofline")
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        tree = ElementTree.fromstring(drawing)
        assert tree.get("aria-label")
        assert "nan" not in drawing
        assert "inf" not in drawing.replace("infer", "")


def test_page_loads_nothing_and_runs_only_its_own_script():
    html, page = render(make(), make("jitter"))
    assert not [tags for tags in page.tags if tags[0] in ("link", "img", "iframe", "object", "base", "form")]
    assert not re.search(r"https?:|url\(|@import", html)
    links = [given["href"] for tag, given in page.tags if tag == "a"]
    assert links == ["#r0", "#r1"]
    assert page.count("script") == page.count("style") == 1
    assert not [name for _, given in page.tags for name in given if name == "style" or name.startswith("on")]
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_a_result_becomes_markup(kind):
    clean, dirty = make(kind), make(kind)
    stages = {HOSTILE if stage == "decode" else stage: values for stage, values in series(("x",))["x"].items()}
    hostile = {
        "command": HOSTILE,
        "case": {**clean.case, "name": HOSTILE, HOSTILE: HOSTILE},
        "environment": {**ENVIRONMENT, "processor": HOSTILE, "torch": HOSTILE, HOSTILE: HOSTILE},
        "boundary": HOSTILE,
        "backend": HOSTILE,
        "commit": HOSTILE,
        "created": HOSTILE,
        "facts": {**clean.facts, HOSTILE: HOSTILE, "chip": HOSTILE},
    }
    if kind == "latency":
        hostile["series"] = {HOSTILE: stages, "engine": stages}
    html = report.page([(HOSTILE, replace(dirty, **hostile))])
    page = Page(html)
    assert page.open == []
    assert page.count("script") == 1
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]
    assert HOSTILE in "".join(page.text)


def test_engine_comes_first_with_percentiles_and_rivals():
    html, page = render(make())
    text = "".join(page.text)
    assert text.index("engine p50") < text.index("missed at 30 Hz")
    assert "released: flow" in text
    assert "released / engine" in text
    headings = re.findall(r'<th scope="rowgroup"[^>]*>(\w+)', html)
    assert headings == ["engine", "released"]


def test_percentiles_that_cannot_be_told_are_dashes():
    rows = re.findall(r'<th scope="row">total</th>(.*?)</tr>', render(make(names=("engine",)))[0])
    cells = re.findall(r"<td>(.*?)</td>", rows[0])
    assert cells[0] == "40"
    assert cells[3:5] == ["–", "–"]


def test_incomplete_run_says_so():
    assert "Interrupted" in render(make(complete=False))[0]
    assert "Interrupted" not in render(make())[0]


def test_run_without_any_round_renders():
    render(make(complete=False, series={"engine": {"total": []}}))


def test_one_round_renders():
    render(make(series=series(("released", "engine"), rounds=1)))


@pytest.mark.parametrize("kind", ["latency", "throughput", "kernels"])
def test_rounds_too_short_for_the_clock_render(kind):
    given = make(kind)
    render(replace(given, series={name: dict.fromkeys(stages, [0.0] * 3) for name, stages in given.series.items()}))


def test_long_runs_are_thinned():
    """The slowest of each group of neighbours stays: an outlier must not vanish."""
    values = [1.0] * 100_000
    values[54_321] = 9.0
    drawing = charts.rounds({"engine": values}, {}, "rounds")
    assert drawing.count("<circle") <= charts.MOST_POINTS
    assert "round 54322: 9.00 ms" in drawing


def test_far_outliers_are_told_not_drawn():
    drawing = charts.histogram({"engine": [10.0, 11.0] * 50 + [5000.0]}, {}, "histogram")
    assert "1 rounds further right, up to 5,000 ms" in drawing


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (0.09999, "0.100"), (9.999, "10.0"), (123.4, "123"), (12345.6, "12,346")],
)
def test_milliseconds(value, text):
    assert charts.milliseconds(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.001, 0.0013), (9, 14.4), (0, 56_000)])
def test_ticks_are_few_and_inside(low, high):
    ticks = charts.Axis(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high + 1e-9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, BOUND, id="measured on this machine"),
        pytest.param({"case": {**CASE, "tokens": 194, "dtype": "bfloat16"}}, {}, id="other precision"),
        pytest.param({"case": {**CASE, "tokens": 315}}, {}, id="another prompt"),
        pytest.param({"environment": {**ENVIRONMENT, "threads": 2}}, {}, id="other threads"),
        pytest.param({"facts": {**make("roofline").facts, "chip": "rtx4090"}}, {}, id="a chip by name"),
    ],
)
def test_bound_comes_from_a_roofline_of_the_same_case_and_machine(changes, expected):
    assert bounds_of(make(), [make("roofline", **changes)]).ms == expected


def test_bound_of_the_head_alone_is_that_of_its_stage():
    assert bounds_of(make(boundary="flow"), [make("roofline")]).ms == {"total": BOUND["flow"]}


def test_bound_is_drawn():
    html, _ = render(make(), make("roofline"))
    assert 'class="bound"' in html
    assert "bound (CPU, 1 threads, 194 tokens)" in html


def save(folder, **named):
    for name, result in named.items():
        results.write(result, folder / f"{name}.json")


def test_command_writes_page(tmp_path, capsys):
    save(tmp_path, latency=make())
    with pytest.raises(SystemExit) as ended:
        app(["bench", "report", str(tmp_path / "latency.json"), "--out", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param([], "expected at least one file", id="no files"),
        pytest.param(["{}/broken.json"], "broken.json is not valid JSON", id="broken"),
        pytest.param(["{}/missing.json"], "missing.json", id="missing"),
        pytest.param(["{}/broken.json", "--table", "{}"], "expected no result files beside it", id="files and table"),
        pytest.param(["--table", "{}/missing"], "expected a folder with results", id="no folder"),
        pytest.param(["--table", "{}"], "broken.json is not valid JSON", id="broken in folder"),
    ],
)
def test_command_refuses(tmp_path, capsys, arguments, reason):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        app(["bench", "report", *(argument.format(tmp_path) for argument in arguments)])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", "")


def test_committed_table_is_what_the_results_give():
    folder = ROOT / "bench" / "results"
    assert (folder / "README.md").read_text(encoding="utf-8") == readme.render(folder)


def test_table_of_nothing_says_so(tmp_path):
    assert "No result has been committed yet" in readme.render(tmp_path)


def test_table_holds_the_latest_of_each(tmp_path):
    newer = make(created="2026-03-01T00:00:00+00:00", commit="f" * 40)
    save(tmp_path, old=make(), new=newer, other=make(boundary="infer"), cut=make(complete=False))
    save(tmp_path, bound=make("roofline"), cold=make("coldstart"), parts=make("ablate"))
    text = readme.render(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    assert [re.match(r"\| \[(.*?)\]\((.*?)\)", line).groups() for line in lines] == [
        *[("Latency", "other.json")] * 2,
        *[("Latency", "new.json")] * 2,
        ("Cold start", "cold.json"),
    ]
    assert "2026-03-01, fffffff" in text
    assert "(old.json)" not in text
    assert "interrupted: [cut.json](cut.json)" in text
    assert "- [Bounds](bound.json)" in text
    assert "- [What each optimisation buys](parts.json)" in text
    median = float(np.median(newer.series["engine"]["total"]))
    assert f"| {BOUND['total'] / median:.0%} |" in text
    assert "## made up, 1 thread\n" in text


def test_a_predicted_step_is_a_row_a_stage_and_stays_beside_the_one_before(tmp_path):
    launch = {
        "launches": 2, "split_launches": 1, "wasted_rows": 0.25, "l2_bytes": 3e9, "memory_bytes": 1e9,
        "processors": 120, "ms": [1.0, 2.0, 4.0], "limit": "L2",
    }  # fmt: skip
    other = {**launch, "stage": "flow", "launches": 6, "wasted_rows": 0.05, "ms": [1.0, 6.0, 8.0], "limit": "memory"}
    facts = {
        "part": "chained", "ms": {"vision": [1, 2, 4], "flow": [1, 6, 8], "total": [2, 8, 12]}, "bound_ms": BOUND,
        "launches": [{**launch, "stage": "vision"}, other],
    }  # fmt: skip
    changes = {"facts": facts, "created": "2026-01-01T00:00:00+00:00", "commit": "a" * 40}
    before = replace(make("roofline"), kind="predict", **changes)
    save(tmp_path, zero=before, after=replace(before, created="2026-01-02T00:00:00+00:00", commit="b" * 40))
    lines = [line for line in readme.render(tmp_path).splitlines() if line.startswith("| [Predicted step]")]
    assert [re.search(r"\((\w+)\.json\)", line)[1] for line in lines] == ["zero"] * 3 + ["after"] * 3
    assert lines[0].endswith(
        "| 2 | 1 | 25% | 3.00 | 1.00 | 120 | 2.00 | 1.00 | 4.00 | 6.00 | L2 | 2026-01-01, aaaaaaa |"
    )
    assert "| total | 8 | 2 | 10% | 6.00 | 2.00 | 120 | 8.00 | 2.00 | 12.00 | 25.00 | memory |" in lines[2]


def test_table_keeps_hostile_text_in_its_cell(tmp_path):
    save(tmp_path, x=make(case={**CASE, "name": HOSTILE}, environment={**ENVIRONMENT, "processor": "a\n# b"}))
    text = readme.render(tmp_path)
    assert "<script" not in text
    assert "\n# b" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
