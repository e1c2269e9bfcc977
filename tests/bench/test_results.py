"""Result files: what is written comes back, what is broken is refused by name; percentiles are never invented."""

from __future__ import annotations

import json

import pytest

from xr0_engine.bench import results
from xr0_engine.bench.results import Result, environment, read, summary, write


def make(**changes) -> Result:
    fields = {
        "kind": "latency",
        "command": "xr0 bench latency",
        "environment": {"device": "cpu"},
        "case": {"name": "libero", "views": [[256, 256]]},
        "boundary": "stage",
        "backend": "reference",
        "series": {"engine": {"total": [1.5, 2.5]}},
        "facts": {"peak_memory_bytes": 7},
    }
    return Result(**(fields | changes))


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "interrupted"])
def test_file_gives_back_the_result(tmp_path, complete):
    result = make(complete=complete)
    write(result, tmp_path / "a.json")
    assert read(tmp_path / "a.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"schema": 2}, "has schema 2; this version reads 1", id="schema"),
        pytest.param({"kind": "dance"}, "kind: expected one of latency", id="kind"),
        pytest.param({"series": {"engine": [1.0]}}, "series of engine", id="no stages"),
        pytest.param({"series": {"engine": {"total": [-1.0]}}}, "engine, total: expected milliseconds", id="negative"),
        pytest.param({"series": {"engine": {"total": ["1"]}}}, "engine, total: expected milliseconds", id="text"),
        pytest.param({"series": {"engine": {"total": [True]}}}, "engine, total: expected milliseconds", id="bool"),
        pytest.param({"complete": "yes"}, "complete is 'yes'", id="type"),
        pytest.param({"commit": 7}, "commit is 7", id="commit"),
        pytest.param({"extra": 1}, "unknown ['extra']", id="unknown field"),
    ],
)
def test_faulty_file_is_refused_with_its_name_and_fault(tmp_path, changes, message):
    path = tmp_path / "a.json"
    write(make(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"a\.json") as error:
        read(path)
    assert message in str(error.value)


def test_missing_field_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write(make(), path)
    content = json.loads(path.read_text())
    del content["boundary"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"missing \['boundary'\]"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('{"schema": 1, "kind": "lat', "not valid JSON", id="truncated"),
        pytest.param("[]", "no benchmark result", id="list"),
        pytest.param("{}", "no benchmark result", id="other JSON"),
    ],
)
def test_file_that_is_no_result_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_result_that_cannot_be_read_back_is_not_written_over_a_good_one(tmp_path, bad):
    path = tmp_path / "a.json"
    write(make(), path)
    for broken in (make(series={"engine": {"total": [bad]}}), make(facts={"number": bad})):
        with pytest.raises(ValueError, match=r"milliseconds|JSON"):
            write(broken, path)
    assert read(path).series["engine"]["total"] == [1.5, 2.5]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("count", "known"),
    [
        (1, {"p50"}),
        (9, {"p50"}),
        (10, {"p50", "p90"}),
        (99, {"p50", "p90"}),
        (100, {"p50", "p90", "p99"}),
        (1000, {"p50", "p90", "p99", "p99_9"}),
    ],
)
def test_percentiles_need_enough_samples(count, known):
    found = summary([float(number) for number in range(count)])
    assert {name for name in results.PERCENTILES if found[name] is not None} == known
    assert found["p50"] == (count - 1) / 2
    assert found["max"] == count - 1


def test_missed_deadlines_are_shares():
    found = summary([5.0, 20.0, 30.0, 40.0])
    assert (found["missed_30hz"], found["missed_100hz"]) == (0.25, 0.75)
    # A deadline that is just met is met.
    assert summary([10.0])["missed_100hz"] == 0


def test_no_samples_have_no_summary():
    with pytest.raises(ValueError, match="at least one"):
        summary([])


def test_environment_of_a_cpu():
    found = environment("cpu")
    assert (found["device"], found["driver"], found["clocks_mhz"]) == ("cpu", None, None)
    assert found["cores"] >= 1
    assert found["processor"]
    assert found["torch"]


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (
            "580.82, 1980, 2619, 1980",
            {"driver": "580.82", "clocks_mhz": {"sm": 1980, "memory": 2619, "max_sm": 1980}},
        ),
        ("580.82, [N/A], 2619, 1980", {"driver": "580.82", "clocks_mhz": {"sm": None, "memory": 2619, "max_sm": 1980}}),
        (None, {"driver": None, "clocks_mhz": None}),
    ],
    ids=["all", "untold clock", "no nvidia-smi"],
)
def test_gpu_state_as_nvidia_smi_tells_it(monkeypatch, line, state):
    monkeypatch.setattr(results, "output_of", lambda *command: line)
    assert results._gpu_state("GPU-1") == state


def test_commit_is_this_clone_s(monkeypatch):
    told = {"ls-files": "results.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(results, "output_of", lambda *command: told[command[3]])
    assert results.current_commit() == "abc"
    told["status"] = " M engine.py"
    assert results.current_commit() == "abc-dirty"
    # Installed into somebody else's clone: not tracked there.
    told["ls-files"] = None
    assert results.current_commit() is None


def test_command_that_is_missing_or_fails_tells_nothing():
    assert results.output_of("no-such-command-anywhere") is None
    assert results.output_of("false") is None
    assert results.output_of("echo", "yes") == "yes"
