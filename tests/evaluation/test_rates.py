"""Results as rates: grouping, means as papers take them, chains, throughput, and what is refused to be counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.evaluation.fake import an_episode
from tests.evaluation.telling import chains, clocked, results, some
from xr0_engine.evaluation.beside import beside
from xr0_engine.evaluation.intervals import mean_of_rates, wilson
from xr0_engine.evaluation.published import OURS
from xr0_engine.evaluation.rates import LONGEST_CAUSE, NOT_REACHED, against, cause, causes, conditions, uneven

LIBERO = ("spatial", "object", "goal", "10")


def only(told):
    (condition,) = conditions(told)
    return condition


def test_no_episodes_are_no_conditions():
    assert conditions(results([])) == ()


def test_one_episode():
    condition = only(results(some(1, 1)))
    assert condition.total.value == 1
    assert condition.total.low == pytest.approx(0.2065, abs=1e-4)
    assert condition.trials == 1


def test_conditions_are_in_the_order_of_modes_and_delays():
    episodes = [
        e for delay in (3, 0) for mode in ("async", "naive", "sync") for e in some(1, 2, mode=mode, delay=delay)
    ]
    found = conditions(results(episodes))
    assert [(c.mode, c.delay_steps) for c in found] == [
        (mode, delay) for mode in ("sync", "naive", "async") for delay in (0, 3)
    ]
    # 20 control steps a second.
    assert [c.delay_ms for c in found[:2]] == [0, 150]


def test_total_is_the_mean_of_suites_not_of_trials():
    condition = only(results([*some(10, 10, "object"), *some(0, 2, "spatial")]))
    assert condition.total.value == 0.5
    assert condition.total == mean_of_rates([wilson(0, 2), wilson(10, 10)])


def test_suites_are_in_the_order_of_papers_whatever_ended_first():
    condition = only(results([e for suite in ("10", "zoo", "goal", "spatial", "object") for e in some(1, 1, suite)]))
    assert list(condition.suites) == [*LIBERO, "zoo"]
    assert [task.suite for task in condition.tasks] == [*LIBERO, "zoo"]


def test_suite_of_even_tasks_is_pooled_and_of_uneven_ones_the_mean():
    even = only(results([*some(5, 10), *some(10, 10, task=1)])).suites["spatial"]
    assert even.mean == wilson(15, 20)
    uneven_ = only(results([*some(5, 10), *some(2, 2, task=1)])).suites["spatial"]
    assert uneven_.mean.value == 0.75
    assert (uneven_.pooled.successes, uneven_.pooled.trials) == (7, 12)


def test_google_robot_counts_both_drawers_as_one_task():
    """The report's 85.5 from the counts that its repository gives."""
    counts = {
        "pick_coke_can": (296, 300),
        "move_near": (213, 240),
        "open_drawer": (77, 108),
        "close_drawer": (95, 108),
        "put_in_drawer": (81, 108),
    }
    episodes = [
        episode
        for task, (name, (successes, trials)) in enumerate(counts.items())
        for episode in some(successes, trials, "google_vm", task, name=name)
    ]
    told = results(episodes, benchmark="simpler")
    condition = only(told)
    assert 100 * condition.total.value == pytest.approx(85.5, abs=0.05)
    (shown,) = beside(told.run, condition)
    ours = dict(zip(shown.columns, shown.ours, strict=True))
    theirs = dict(zip(shown.columns, shown.rows[0][1], strict=True))
    assert shown.rows[0][0].policy == OURS
    assert list(ours) == ["pick coke can", "move near", "open/close drawer", "drawer apple", "mean"]
    for column, value in theirs.items():
        assert ours[column].value == pytest.approx(value, abs=0.06)


def test_chains_have_an_average_length_and_a_rate_per_place():
    told = results(chains([5, 5, 3, 0], suite="ABC_D"), benchmark="calvin")
    condition = only(told)
    assert condition.chains.mean.value == 13 / 4
    assert [rate.successes for rate in condition.chains.positions] == [3, 3, 3, 2, 2]
    assert condition.headline.unit == "tasks in a row"
    assert condition.headline.most == 5
    (shown,) = beside(told.run, condition)
    assert shown.columns == ("1", "2", "3", "4", "5", "in a row")
    assert shown.rows[0][1] == (100.0, 98.3, 96.0, 92.6, 88.1, 4.75)


def test_both_splits_of_calvin_have_a_table_each():
    told = results([*chains([5, 4], suite="ABC_D"), *chains([5, 5], suite="ABCD_D")], benchmark="calvin")
    assert [shown.ours[-1].value for shown in beside(told.run, only(told))] == [5.0, 4.5]


def test_throughput_counts_pieces_over_all_runs():
    told = results([clocked(30, 2), clocked(40, 0, trial=1)], benchmark="aloha")
    condition = only(told)
    assert condition.headline.unit == "pieces/min"
    assert condition.headline.value.value == pytest.approx(70 / 60)
    assert (condition.throughput.pieces, condition.throughput.timeouts) == (70, 2)
    assert condition.throughput.piece_s == 20
    assert condition.suites["throughput"].pooled.trials == 72
    assert condition.trials == 2
    assert condition.chains is None
    assert causes(told.episodes) == {}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"pieces": 3},
        {"pieces": "3", "duration_s": 60.0},
        {"pieces": True, "duration_s": 60.0},
        {"pieces": 3, "duration_s": 0.0},
        {"pieces": -1, "duration_s": 60.0},
    ],
)
def test_facts_that_are_no_count_leave_the_success_alone(facts):
    condition = only(results([an_episode(suite="throughput", facts=facts)]))
    assert condition.throughput is None
    assert condition.headline.unit == "%"


def test_run_against_the_clock_of_which_nothing_came():
    episode = replace(clocked(0), error="RuntimeError: the arm flew away")
    condition = only(results([episode]))
    assert condition.throughput.per_minute.value == 0
    assert condition.suites["throughput"].pooled.trials == 1
    assert causes([episode]) == {"RuntimeError: the arm flew away": 1}


def test_times_are_medians_and_absent_where_nothing_was_measured():
    episodes = [
        an_episode(trial=0, latency_ms={"p50": 10.0, "p99": 20.0}, reaction_ms={}),
        an_episode(trial=1, latency_ms={"p50": 30.0, "p99": 90.0}, reaction_ms={}),
        an_episode(trial=2, latency_ms={}, reaction_ms={}, success=False, solved=0, error="it broke", steps=0, calls=0),
    ]
    condition = only(results(episodes))
    assert condition.latency_ms == {"p50": 20, "p99": 55}
    assert condition.reaction_ms == {"p50": None, "p99": None}
    assert condition.success_s == 7 / 20
    assert only(results(some(0, 3))).success_s is None


def test_causes_are_counted_by_their_first_line():
    failures = some(0, 5)
    failures[1:3] = [replace(episode, error="ValueError: no\nat line 3") for episode in failures[1:3]]
    failures[3] = replace(failures[3], error="x" * 1000)
    failures[4] = replace(failures[4], error=" ")
    counted = causes([*failures, *some(3, 3)])
    assert counted == {"ValueError: no": 2, NOT_REACHED: 1, cause(failures[3]): 1, "an error without a message": 1}
    assert len(cause(failures[3])) == LONGEST_CAUSE


def test_conditions_are_paired_with_the_first_over_common_trials():
    told = results([*some(9, 10), *some(4, 8, mode="async"), *some(2, 2, "goal", mode="naive")])
    first, naive, slow = conditions(told)
    paired = against(first, slow)
    assert (paired.pairs, paired.gained, paired.lost) == (8, 0, 4)
    assert paired.difference.value == -0.5
    assert paired.p == 0.125
    assert against(first, first) is None
    assert against(first, naive) is None
    clocks = conditions(results([clocked(3), clocked(4, mode="async")]))
    assert against(*clocks) is None


def test_half_run_grid_is_said_to_be_one():
    whole = [e for mode in ("sync", "async") for e in some(3, 6, mode=mode)]
    assert uneven(conditions(results(whole))) is None
    assert "3 to 6" in uneven(conditions(results(whole[:9])))
    shifted = [*some(3, 6), *(replace(e, trial=e.trial + 1) for e in some(3, 6, mode="async"))]
    assert "6, but not the same" in uneven(conditions(results(shifted)))


def test_published_mean_stands_beside_all_four_suites_alone():
    four = results([e for suite in LIBERO for e in some(9, 10, suite)], benchmark="libero")
    (shown,) = beside(four.run, only(four))
    assert shown.columns == (*LIBERO, "mean")
    assert shown.rows[0][1] == (98.8, 100.0, 98.8, 97.2, 98.7)
    three = results([e for suite in LIBERO[:3] for e in some(9, 10, suite)], benchmark="libero")
    (shown,) = beside(three.run, only(three))
    assert shown.rows[0][1] == (98.8, 100.0, 98.8, None)
    perturbed = results([e for suite in (*LIBERO, "goal_swap") for e in some(9, 10, suite)], benchmark="libero")
    assert all(values[-1] is None for _, values in beside(perturbed.run, only(perturbed))[0].rows)


def test_nothing_stands_beside_an_expert_or_an_unknown_benchmark():
    expert = results(some(9, 10), benchmark="libero", policy={"title": "expert", "kind": "expert"})
    assert beside(expert.run, only(expert))[0].rows == ()
    unknown = results(some(9, 10), benchmark="point")
    assert beside(unknown.run, only(unknown))[0].rows == ()
