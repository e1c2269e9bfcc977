"""The regression gate: what it refuses, what it catches, and how seldom it is wrong."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xr0_engine.bench import results
from xr0_engine.bench.results import Result
from xr0_engine.bench.tell import compare as gate
from xr0_engine.bench.timing import take_turns

STAGES = {"preprocess": 2.0, "vision": 12.0, "prefill": 30.0, "flow": 8.0, "decode": 0.2, "total": 52.2}
FEW_STAGES = {"prefill": 30.0, "flow": 8.0, "total": 38.0}
COMPARISONS = 200
ALARMS_ALLOWED = 6
"""Of 200 comparisons at 1 % each, 7 or more alarm by chance 4 times in 1000."""


def noisy(milliseconds, rounds, generator, spread=0.05, factor=1.0):
    """What latencies look like: a skewed body, one round in twenty much slower."""
    body = np.exp(generator.normal(0, spread, rounds))
    spikes = np.where(generator.random(rounds) < 0.05, 1 + generator.exponential(0.5, rounds), 1)
    return (milliseconds * factor * body * spikes).tolist()


def make_result(seed=0, rounds=20, factor=1.0, stages=STAGES, **changes) -> Result:
    generator = np.random.default_rng(seed)
    series = {"engine": {stage: noisy(ms, rounds, generator, factor=factor) for stage, ms in stages.items()}}
    result = Result(
        kind="latency",
        command="synthetic",
        environment={"device": "cpu", "processor": "made up", "cores": 2, "threads": 1, "torch": "0"},
        case={"name": "libero", "size": "tiny", "batch": 1, "dtype": "float32"},
        boundary="infer",
        backend="reference",
        series=series,
        commit="0" * 40,
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(result, **changes)


def verdicts(*runs, threshold=0.05):
    return {row.stage: row.verdict for row in gate.compare(runs, threshold).rows}


BASE = make_result()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        pytest.param(replace(BASE, schema=2), "schema is 1 in A, 2 in B", id="schema"),
        pytest.param(replace(BASE, kind="jitter"), "kind is 'latency' in A, 'jitter' in B", id="kind"),
        pytest.param(replace(BASE, boundary="stage"), "boundary is 'infer' in A, 'stage' in B", id="boundary"),
        pytest.param(replace(BASE, backend="triton"), "backend is 'reference' in A, 'triton' in B", id="backend"),
        pytest.param(replace(BASE, complete=False), "B is incomplete", id="incomplete"),
        pytest.param(
            replace(BASE, case={**BASE.case, "name": "bimanual"}), "case: name is 'libero' in A, 'bimanual'", id="case"
        ),
        pytest.param(replace(BASE, case={**BASE.case, "dtype": "bfloat16"}), "dtype is 'float32' in A", id="dtype"),
        pytest.param(replace(BASE, case={**BASE.case, "tokens": 194}), "tokens is None in A, 194 in B", id="new key"),
        *(
            pytest.param(
                replace(BASE, environment={**BASE.environment, name: "another"}),
                f"{name} is .*, 'another' in B",
                id=name,
            )
            for name in gate.SAME_MACHINE
        ),
        pytest.param(replace(BASE, series={"other": BASE.series["engine"]}), "no stage in common", id="series"),
        pytest.param(make_result(rounds=5), "at least 6 rounds .* B has 5", id="few rounds"),
        pytest.param(
            replace(BASE, series={"engine": {"total": [0.0] * 20}}), "B has rounds of no duration", id="no duration"
        ),
    ],
)
def test_refuses(other, reason):
    with pytest.raises(ValueError, match=reason):
        gate.compare([BASE, other])


def test_refusal_names_every_difference():
    other = replace(BASE, kind="jitter", case={**BASE.case, "batch": 2})
    with pytest.raises(ValueError, match=r"kind is .*; case: batch is 1 in A, 2 in A2"):
        gate.compare([BASE, BASE, other])


@pytest.mark.parametrize("count", [0, 4])
def test_refuses_number_of_files(count):
    with pytest.raises(ValueError, match=f"got {count} files"):
        gate.compare([BASE] * count)


def test_refuses_single_result_without_roles():
    with pytest.raises(ValueError, match="series named A, B and A2, got engine"):
        gate.compare([BASE])


def test_versions_and_stages_that_differ_are_noted():
    other = replace(make_result(1), environment={**BASE.environment, "torch": "1", "clocks_mhz": {"sm": 1}})
    other = replace(other, series={"engine": {**other.series["engine"], "graph": [1.0] * 20}})
    comparison = gate.compare([BASE, other])
    assert comparison.notes == ("torch is '0' in A, '1' in B", "engine graph is not in every run: left out")


def test_rivals_are_not_gated_unless_asked():
    rival = {"total": noisy(60, 20, np.random.default_rng(5))}
    a = replace(BASE, series={"released": rival, **BASE.series})
    b = replace(make_result(1), series={"released": {"total": [2 * ms for ms in rival["total"]]}, **BASE.series})
    assert {row.series for row in gate.compare([a, b]).rows} == {"engine"}
    assert [(row.series, row.verdict) for row in gate.compare([a, b], series="released").rows] == [
        ("released", "slower")
    ]
    with pytest.raises(ValueError, match="--series: A has released, engine; got 'none'"):
        gate.compare([a, b], series="none")


def test_slowed_stage_is_caught_alone():
    slowed = {**STAGES, "flow": 2 * STAGES["flow"]}
    expected = {stage: "slower" if stage == "flow" else "same" for stage in STAGES}
    assert verdicts(BASE, make_result(1, stages=slowed)) == expected
    assert verdicts(BASE, make_result(1, stages=slowed), make_result(2)) == expected


def test_faster_is_told_and_passes():
    comparison = gate.compare([BASE, make_result(1, factor=0.5), make_result(2)])
    assert {row.verdict for row in comparison.rows} == {"faster"}
    assert not comparison.slower


def test_past_threshold_but_within_chance_is_unclear():
    generator = np.random.default_rng(0)
    wide, wider = ({"x": noisy(10, 8, generator, 0.3)} for _ in range(2))
    wider = {"x": [1.3 * float(np.median(wide["x"])) / float(np.median(wider["x"])) * ms for ms in wider["x"]]}
    again = replace(BASE, series={"engine": wide})
    assert verdicts(again, replace(BASE, series={"engine": wider}), again) == {"x": "unclear"}


@pytest.mark.parametrize(
    ("again", "expected"),
    [pytest.param(1.0, "slower", id="A agrees with itself"), pytest.param(1.12, "same", id="A drifts as far")],
)
def test_disagreement_of_the_two_as_is_not_held_against_b(again, expected):
    runs = [make_result(seed, 200, factor) for seed, factor in enumerate((1.0, 1.15, again))]
    assert verdicts(*runs)["total"] == expected


def test_threshold_decides():
    runs = [make_result(seed, 200, factor) for seed, factor in enumerate((1.0, 1.15, 1.0))]
    assert gate.compare(runs, 0.05).slower
    assert not gate.compare(runs, 0.25).slower


def test_interval_holds_the_ratio_and_is_repeatable():
    runs = [make_result(0), make_result(1, factor=1.1)]
    for row in gate.compare(runs).rows:
        assert row.low <= row.ratio <= row.high
    assert gate.compare(runs) == gate.compare(runs)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(gate.FEWEST_ROUNDS, 60))
def test_a_run_never_differs_from_itself(seed, rounds):
    result = make_result(seed, rounds)
    assert set(verdicts(result, result, threshold=0).values()) == {"same"}


@pytest.mark.parametrize("rounds", [6, 30])
@pytest.mark.parametrize("count", [pytest.param(2, id="A B"), pytest.param(3, id="A B A")])
def test_equal_builds_pass(count, rounds):
    """At threshold 0, where nothing but the noise estimate protects; 5 % spread and spikes, fresh in every run."""
    alarms = sum(
        gate.compare([make_result(count * seed + part, rounds, stages=FEW_STAGES) for part in range(count)], 0).slower
        for seed in range(COMPARISONS)
    )
    assert alarms <= ALARMS_ALLOWED


def test_equal_builds_in_processes_of_unequal_speed_pass():
    """Runs that differ as wholes by 1 % (1 sigma), as separate processes do: A, B, A and the default threshold."""
    generator = np.random.default_rng(0)
    alarms = sum(
        gate.compare(
            [make_result(3 * seed + part, 50, np.exp(generator.normal(0, 0.01)), FEW_STAGES) for part in range(3)]
        ).slower
        for seed in range(COMPARISONS)
    )
    assert alarms <= ALARMS_ALLOWED


def test_slowed_function_in_one_run_is_caught():
    """Real work, real clock: B does four times the work of A. The three take turns; B's extra cannot hide in noise."""

    def work(times):
        def call():
            start = time.perf_counter()
            for _ in range(times):
                sum(range(20_000))
            return {"total": 1e3 * (time.perf_counter() - start)}

        return call

    samples = take_turns({"A": work(1), "B": work(4), "A2": work(1)}, rounds=40, warm_up=2)
    series = {role: {stage: values.tolist() for stage, values in stages.items()} for role, stages in samples.items()}
    assert verdicts(replace(BASE, series=series)) == {"total": "slower"}


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 %", 0.125), ("0%", 0.0)])
def test_threshold_is_read(text, share):
    assert gate.parse_threshold(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "five", "-1%", "nan", "5%%", "2000%"])
def test_bad_threshold(text):
    with pytest.raises(ValueError, match="--threshold: expected a share"):
        gate.parse_threshold(text)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.json" for name in ("before", "same", "slow")]
    for seed, (path, factor) in enumerate(zip(paths, (1.0, 1.0, 2.0), strict=True)):
        results.write(make_result(seed, factor=factor), path)
    return [str(path) for path in paths]


def test_exit_codes_table_and_json(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    before, same, slow = files
    assert gate.run([before, same]) == 0
    assert gate.run([before, slow, same], json_file=tmp_path / "out.json") == 1
    printed = capsys.readouterr().out
    assert "B is slower than A" in printed
    assert max(map(len, printed.splitlines())) <= 80
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["slower"] is True
    assert [row["verdict"] for row in written["rows"]] == ["slower"] * len(STAGES)
    assert gate.run([before, slow], threshold="150%") == 0


def fake_latency(monkeypatch, factors, code=0):
    """`xr0 bench latency` replaced: writes a result whose speed hangs on the checkout."""
    calls = []

    def run(command, **_):
        folder, file = command[3], command[-1]
        calls.append((folder, command[4:-2]))
        if code == 0:
            results.write(make_result(len(calls), factor=factors[folder]), Path(file))
        return type("Done", (), {"returncode": code})()

    monkeypatch.setattr(gate.subprocess, "run", run)
    return calls


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "xr0_engine" / "bench").mkdir(parents=True)
    (folder / "xr0_engine" / "bench" / "results.py").touch()
    if gate._has_native(gate.HERE):
        (folder / "xr0_engine" / "_C.so").touch()
    return folder


@pytest.mark.parametrize(("factor", "code"), [pytest.param(1.0, 0, id="same"), pytest.param(0.5, 1, id="was faster")])
def test_run_against_takes_turns(checkout, monkeypatch, factor, code):
    before, ours = str(checkout.resolve()), str(gate.HERE)
    calls = fake_latency(monkeypatch, {before: factor, ours: 1.0})
    assert gate.run(["--size", "tiny"], run_against=checkout) == code
    assert [folder for folder, _ in calls] == [before, ours, before] * 2
    assert all(options == ["bench", "latency", "--size", "tiny"] for _, options in calls)


def test_run_against_reports_failure(checkout, monkeypatch):
    fake_latency(monkeypatch, {}, code=2)
    with pytest.raises(RuntimeError, match=r"`xr0 bench latency` failed in .*checkout with code 2"):
        gate.run([], run_against=checkout)


def test_run_against_refuses_what_cannot_be_compared(checkout, tmp_path):
    with pytest.raises(ValueError, match="expected a checkout of xr0-engine"):
        gate.run([], run_against=tmp_path)
    native = checkout / "xr0_engine" / "_C.so"
    if native.exists():
        native.unlink()
    else:
        native.touch()
    with pytest.raises(ValueError, match=r"has not: run `python setup\.py build_ext"):
        gate.run([], run_against=checkout)
