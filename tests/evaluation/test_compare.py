"""Two runs, pair by pair: what is counted, what is concluded, and what is refused to be compared."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.evaluation.fake import a_run
from tests.evaluation.telling import HOSTILE, chains, clocked, results, some, write
from xr0_engine.evaluation.compare import as_json, compare, compare_results, show
from xr0_engine.evaluation.intervals import mcnemar, paired_difference, wilson

OTHER = {"title": "Another", "kind": "engine"}


def printed(comparison):
    out = io.StringIO()
    show(comparison, Console(file=out, width=110))
    return out.getvalue()


def flipped(episodes, trials, success):
    return [replace(e, success=success, solved=int(success)) if e.trial in trials else e for e in episodes]


def test_pairs_are_counted_from_folders_in_any_order(tmp_path):
    a = some(40, 50)
    b = flipped(a, {0, 40, 41, 42, 43, 44, 45, 46, 47}, True)
    b = flipped(b, {0}, False)
    found = compare(
        write(results(a), tmp_path / "a"), write(results(reversed(b), policy=OTHER), tmp_path / "b"), "policy"
    )
    (row,) = found.rows
    assert (row.pairs, row.only_a, row.only_b) == (50, 1, 8)
    assert (row.a.interval, row.b.interval) == (wilson(40, 50), wilson(47, 50))
    assert row.difference == paired_difference(8, 1, 50)
    assert row.p == mcnemar(1, 8) == pytest.approx(0.0390625)
    assert found.verdict == "better"
    assert [e.trial for e in found.only_a] == [0]
    assert [e.trial for e in found.only_b] == [*range(40, 48)]
    # What went wrong on the side that failed is what one wants to look at.
    assert not any(e.success for e in (*found.only_a, *found.only_b))
    assert found.titles == ("Some policy", "Another")


def test_worse_and_not_told_apart():
    a, b = some(20, 20), some(10, 20)
    assert compare_results(results(a), results(b, policy=OTHER)).verdict == "worse"
    assert compare_results(results(b), results(a, policy=OTHER)).verdict == "better"
    few = compare_results(results(some(20, 20)), results(some(17, 20), policy=OTHER))
    assert few.verdict == "not told apart"
    assert "not told apart by 20 pairs (0 trials to 3, p = 0.25)" in printed(few)


def test_rows_by_condition_and_suite():
    def side(lost):
        return [
            e
            for suite in ("spatial", "object")
            for mode in ("sync", "async")
            for e in some(5 - lost * (mode == "async"), 6, suite, mode=mode, delay=2.0)
        ]

    found = compare_results(results(side(0)), results(side(3), policy=OTHER))
    assert [(row.label, row.pairs, row.only_a) for row in found.rows] == [
        ("all pairs", 24, 6),
        ("sync, delay 2", 12, 0),
        ("async, delay 2", 12, 6),
        ("spatial", 12, 3),
        ("object", 12, 3),
    ]
    assert "async, delay 2" in printed(found)


def test_half_run_grids_are_compared_where_both_ran():
    a, b = some(10, 20), some(10, 12)
    found = compare_results(results(a), results([*b, *some(1, 3, "goal")], policy=OTHER))
    assert found.rows[0].pairs == 12
    assert "8 episodes of A are not in the other: left out" in found.notes
    assert "3 episodes of B are not in the other: left out" in found.notes


def test_errors_are_noted():
    b = [replace(some(0, 1)[0], error="it broke"), *some(5, 6)[1:]]
    assert (
        "1 trials of B ended in an error and count as failures"
        in compare_results(results(some(5, 6)), results(b, policy=OTHER)).notes
    )


def test_chains_are_compared_by_their_lengths():
    a, b = chains([5, 4, 3, 2, 1] * 20), chains([5, 5, 4, 3, 2] * 20)
    found = compare_results(results(a), results(b, policy=OTHER))
    one, other, longer = found.lengths
    assert (one.value, other.value, longer.value) == (3.0, 3.8, pytest.approx(0.8))
    assert 0.7 < longer.low < 0.8 < longer.high < 0.9
    assert "B − A 0.80" in printed(found)


def test_throughput_is_no_pair():
    found = compare_results(results([clocked(30)]), results([clocked(36)], policy=OTHER))
    assert found.rows == ()
    assert found.verdict == "not told apart"
    assert found.throughput["sync, delay 0"][1].value == 1.2
    assert "pieces a minute, sync, delay 0: A 1.00" in printed(found)
    json.dumps(as_json(found))


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ({"benchmark": "other"}, "benchmark is 'point' in A, 'other' in B"),
        ({"protocol": {"horizon": 41}}, "protocol.horizon is 40 in A, 41 in B"),
        ({"protocol": {"horizon": 40, "turned": True}}, "protocol.turned is absent in A, True in B"),
        ({"execution": {**a_run().execution, "execute": 5}}, "execution.execute is 4 in A, 5 in B"),
        ({"execution": {**a_run().execution, "seed": 1}}, "execution.seed is 0 in A, 1 in B"),
        ({"code": {"version": "0", "commit": "abc"}}, "code.commit is None in A, 'abc' in B; `--across code`"),
        ({"versions": {"point": "1.1"}}, "versions.point is '1.0' in A, '1.1' in B; `--across versions`"),
    ],
    ids=["benchmark", "protocol", "protocol field", "execution", "seed", "code", "versions"],
)
def test_other_runs_are_refused_by_field(run, told):
    with pytest.raises(ValueError, match="cannot be compared") as error:
        compare_results(results(some(1, 2)), results(some(1, 2), **{"policy": OTHER} | run))
    assert told in str(error.value)


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match=r"protocol\.horizon .*; versions\.point "):
        compare_results(results(some(1, 2)), results(some(1, 2), protocol={"horizon": 1}, versions={"point": "2"}))


def test_code_is_compared_if_asked_and_then_the_policy_must_be_the_same():
    a, b = results(some(1, 2)), results(some(2, 2), code={"version": "1", "commit": "abc-dirty"})
    found = compare_results(a, b, "code")
    assert any("not committed" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"policy\.checkpoint is absent in A, 'sha' in B"):
        compare_results(a, results(some(2, 2), policy={**OTHER, "checkpoint": "sha"}, code={"version": "1"}), "code")
    # A title may be a path.
    compare_results(a, results(some(2, 2), policy=OTHER, code={"version": "1"}), "code")


def test_machine_and_sameness_are_noted():
    found = compare_results(results(some(1, 2)), results(some(1, 2), machine={"processor": "slide rule", "gpu": None}))
    assert any(note.startswith("machine.processor is 'abacus'") for note in found.notes)
    assert any("the policy of A and B is the same" in note for note in found.notes)


def test_no_pairs_other_seeds_and_unknown_sides_are_refused():
    with pytest.raises(ValueError, match="no trial is in both; A has 2 episodes, B 0"):
        compare_results(results(some(1, 2)), results([]))
    with pytest.raises(ValueError, match="no trial is in both"):
        compare_results(results(some(1, 2)), results(some(1, 2, mode="async")))
    with pytest.raises(ValueError, match="seed of suite spatial, task 0, trial 0, sync, delay 0 is 0 in A, 9 in B"):
        compare_results(results(some(1, 2)), results(some(1, 2, seed=9)))
    with pytest.raises(ValueError, match="across: expected one of policy, code, versions, got 'weather'"):
        compare_results(results(some(1, 2)), results(some(1, 2)), "weather")


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        compare(tmp_path, tmp_path)


def test_json_and_markup():
    a = results(some(1, 2, HOSTILE), policy={"title": HOSTILE, "kind": "engine"})
    b = results(some(2, 2, HOSTILE), policy={"title": HOSTILE, "kind": "openpi"})
    found = compare_results(a, b)
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert told["rows"][0]["pairs"] == 2
    assert told["rows"][0]["difference"]["value"] == 0.5
    assert told["only_b"] == [[HOSTILE, 0, 1, "sync", 0.0]]
    assert told["verdict"] == "not told apart"
    assert "[red]" in printed(found)
