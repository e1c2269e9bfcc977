"""What a run prints, and its JSON: the figures, their intervals, what is published, and what one must know besides."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.evaluation.telling import HOSTILE, chains, clocked, hostile, results, some
from xr0_engine.evaluation.published import OURS
from xr0_engine.evaluation.tables import show_results, summary

SUITES = ("spatial", "object", "goal", "10")


def printed(told, width=100):
    out = io.StringIO()
    show_results(told, Console(file=out, width=width))
    return out.getvalue()


def whole_libero(**run):
    return results([e for suite in SUITES for e in some(49, 50, suite)], benchmark="libero", **run)


def test_released_suites_beside_published_ones():
    text = printed(whole_libero())
    assert "LIBERO: Some policy, 200 episodes" in text
    assert "sync, delay 0: 98.0 %, mean of 4 suites (95 % interval 93.8 to 98.8)" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith(OURS)]
    assert line.split()[1:] == ["98.8", "100.0", "98.8", "97.2", "98.7"]
    assert "89.5–99.6" in text
    assert "4 failed: goal not reached" in text
    assert "unfinished" not in text


def test_empty_run():
    text = printed(results([], planned=20))
    assert "0 of 20 episodes" in text
    assert "no episode has ended" in text


def test_one_episode_and_all_failed():
    text = printed(results(some(0, 1)))
    assert "1 episode\n" in text
    assert "0.0 % (95 % interval 0.0 to 79.3)" in text
    assert "1 failed: goal not reached" in text


def test_no_published_figures():
    text = printed(results(some(3, 4)))
    assert "as published" not in text
    assert "this run" in text


def test_delay_table_has_a_line_for_each_mode_and_delay():
    grid = [
        e
        for mode in ("sync", "naive", "async")
        for delay in range(3)
        for e in some(8 - 3 * delay, 8, mode=mode, delay=delay)
    ]
    text = printed(results(grid[:-2], planned=80), width=80)
    lines = [line.split() for line in text.splitlines() if line.strip().startswith(("sync ", "naive ", "async "))]
    assert [line[0] for line in lines] == ["sync"] * 3 + ["naive"] * 3 + ["async"] * 3
    assert lines[1][1:] == ["1", "(50", "ms)", "62.5", "30.6–86.3", "8", "0.3", "50", "/", "150"]
    assert "unfinished: 70 of 80 episodes" in text
    assert "differ in the trials that were run (6 to 8)" in text


def test_chains_and_throughput():
    text = printed(results(chains([5, 5, 3, 0], suite="ABC_D"), benchmark="calvin"))
    assert "3.25 of 5 tasks in a row" in text
    assert "4.75" in text
    text = printed(results([clocked(36, 2)], benchmark="aloha"))
    assert "1.20 pieces a minute" in text
    assert "36 pieces and 2 timeouts in 30.0 simulated minutes" in text
    assert "failed" not in text


def test_repeats_and_errors_are_told():
    episodes = some(1, 3)
    episodes[0] = replace(episodes[0], repeats=2)
    episodes[1] = replace(episodes[1], error="ConnectionError: gone\ntrace")
    text = printed(results(episodes))
    assert "2 repeats" in text
    assert "1 failed: ConnectionError: gone\n" in text


def test_many_tasks_are_told_by_those_with_failures():
    episodes = [e for task in range(90) for e in some(1 if task == 7 else 2, 2, "90", task)]
    text = printed(results(episodes, benchmark="libero"))
    assert "and 89 tasks without a failure" in text
    assert "90 7" in text
    assert "90 8" not in text


def test_markup_in_names_is_text():
    text = printed(hostile(), width=200)
    assert "[red]" in text
    assert HOSTILE[:20] in text


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals_lose_no_figure(width):
    text = printed(whole_libero(), width)
    assert all(figure in text for figure in ("98.0", "98.7"))


def test_summary_is_json_with_everything():
    told = whole_libero()
    found = json.loads(json.dumps(summary(told), allow_nan=False))
    (condition,) = found["conditions"]
    assert condition["total"]["value"] == 0.98
    assert condition["suites"]["10"] == {
        "successes": 49,
        "trials": 50,
        "value": 0.98,
        "low": pytest.approx(0.895, abs=1e-3),
        "high": pytest.approx(0.9965, abs=1e-3),
    }
    assert [task["task"] for task in condition["tasks"]] == [0, 0, 0, 0]
    assert found["failures"] == {"goal not reached": 4}
    assert found["published"][0]["rows"][0]["figures"]["mean"] == 98.7
    assert found["published"][0]["rows"][0]["source"]["url"].endswith("2602.12684")


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(results([], planned=5), id="empty"),
        pytest.param(results(some(0, 1)), id="one failure"),
        pytest.param(results(chains([5, 0], suite="ABC_D"), benchmark="calvin"), id="chains"),
        pytest.param(results([clocked(0)], benchmark="aloha"), id="throughput"),
        pytest.param(hostile(), id="hostile"),
    ],
)
def test_summary_of_anything_is_json(told):
    found = json.loads(json.dumps(summary(told), allow_nan=False))
    assert found["episodes"] == len(told.episodes)
    assert found["planned"] == told.planned
