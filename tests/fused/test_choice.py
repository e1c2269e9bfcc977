"""What `auto` runs and what is kept of it: real processes, real files, a CPU that stands for a GPU."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support import CPU, make_config
from xr0_engine import engine as engine_module
from xr0_engine.checkpoint import init_checkpoint, write_checkpoint
from xr0_engine.comparison import Comparison
from xr0_engine.config import ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.fused import choice, verdict
from xr0_engine.fused.choice import Choice, choose, run_check
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.selfcheck import MARK, NOT_FINITE
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.fused.verdict import Verdict, forget, identity_of, keep, machine_of, recall, verdict_path, verdicts_on
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.types import CheckpointError

pytest.importorskip("triton")

LIMIT_S = 60
GOOD = asdict(Comparison("one row", "vision tokens", 0.01, 0.03, "relative RMS"))
BAD = GOOD | {"quantity": "action chunk", "error": 0.5}
LOST = GOOD | {"quantity": "action chunk", "error": float("nan")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    # On a machine with a GPU too, the CPU is to stand for one.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("XR0_EMULATE", raising=False)
    choice._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def gpu(cache, monkeypatch):
    """The CPU counts as a GPU, and Triton's interpreter executes what it runs."""
    monkeypatch.setattr(choice, "auto_checks", lambda device: True)


def identity(**changes):
    given = {"device": CPU, "dtype": "float32", "table": TacticTable("")} | changes
    return identity_of(**given)


def told(*lines: dict[str, object], then: str = "") -> Verdict:
    """The verdict on a process that tells these lines, and then runs some code."""
    told = "\n".join(f"print({MARK + json.dumps(line)!r}, flush=True)" for line in lines)
    return run_check(
        [sys.executable, "-c", f"import os, sys, time\nprint('ptxas info')\n{told}\n{then}"], identity(), LIMIT_S
    )


def test_a_check_that_ends_well_has_passed():
    found = told({"stage": "loading"}, {"comparison": GOOD}, {"done": True})
    assert (found.outcome, found.stage, found.reason, found.lasting) == ("passed", "", "", True)
    assert found.comparisons == (Comparison(**GOOD),)
    assert found.identity == identity()


@pytest.mark.parametrize(
    ("lines", "then", "stage", "reason", "lasting"),
    [
        ([{"comparison": BAD}, {"comparison": GOOD}, {"done": True}], "", "action chunk (one row)",
         "relative RMS 0.5, at most 0.03", True),
        ([{"comparison": LOST}, {"done": True}], "", "action chunk (one row)", "relative RMS nan, at most 0.03", True),
        ([{"comparison": GOOD}, {"stage": "graph"}], "os.abort()", "graph", "its process was ended by SIGABRT", True),
        ([{"stage": "graph"}], "os._exit(3)", "graph", "its process ended with code 3", True),
        ([{"stage": "graph"}], "os._exit(0)", "graph", "its process ended with code 0", True),
        ([{"comparison": GOOD}, {"done": True}], "os.abort()", "start", "its process was ended by SIGABRT", True),
        ([], "import absent_module", "start", "ModuleNotFoundError: No module named 'absent_module'", True),
        ([{"stage": "flow"}], "raise RuntimeError('CUDA error: an illegal memory access\\nSearch for it\\nCompile')",
         "flow", "RuntimeError: CUDA error: an illegal memory access", True),
        ([{"stage": "flow"}], "try:\n  1 / 0\nexcept ArithmeticError as e:\n  raise OSError('no\\nadvice') from e",
         "flow", "OSError: no", True),
        ([{"stage": "flow"}], "raise MemoryError('CUDA out of memory. Tried to allocate')", "flow",
         "MemoryError: CUDA out of memory. Tried to allocate", False),
        ([{"stage": "flow"}], f"raise ValueError({NOT_FINITE!r})", "flow", f"ValueError: {NOT_FINITE}", False),
    ],
    ids=["wrong", "nan", "abort", "exit", "silent end", "abort at the end", "no start", "illegal address",
         "chained error", "no memory", "not finite"],
)  # fmt: skip
def test_whatever_ends_it_is_a_failure_with_its_stage_and_one_line(lines, then, stage, reason, lasting):
    found = told(*lines, then=then)
    assert (found.outcome, found.stage, found.reason) == ("failed", stage, reason)
    assert found.lasting is lasting
    assert (keep(found) is None) is not lasting
    assert bool(found.errors) is ("Error" in reason)


def test_a_hang_is_a_failure():
    words = f"import time; print({MARK + json.dumps({'stage': 'persistent flow'})!r}, flush=True); time.sleep(600)"
    found = run_check([sys.executable, "-c", words], identity(), 3)
    assert (found.outcome, found.stage, found.reason) == ("failed", "persistent flow", "it did not end within 3 s")
    assert found.seconds < 60


def test_a_model_without_kernels_is_refused_and_no_failure():
    found = told({"stage": "loading"}, {"refused": "no kernels for it"})
    assert (found.outcome, found.reason) == ("refused", "no kernels for it")


def test_a_verdict_comes_back_as_it_was_kept(cache, folder):
    config = ModelConfig.load(folder)
    verdicts = [
        Verdict("passed", identity(), comparisons=(Comparison(**GOOD),), seconds=3.5, created="2026-01-01"),
        Verdict("failed", identity(config=config), "flow", "SIGSEGV", errors=("one", "two"), created="2026-01-02"),
    ]
    for each in verdicts:
        assert keep(each).parent == cache / "selfcheck"
        assert recall(each.identity) == each
    assert verdicts_on(machine_of(CPU)) == verdicts
    assert verdicts_on({**machine_of(CPU), "driver": "999.1"}) == []
    forget(machine_of(CPU))
    assert recall(identity()) is None
    assert list((cache / "selfcheck").iterdir()) == []


def test_a_failure_without_a_finite_error_is_kept_too(cache):
    assert keep(Verdict("failed", identity(), "flow", "NaN", (Comparison(**{**GOOD, "error": math.nan}),))) is not None
    found = recall(identity())
    assert found.outcome == "failed"
    assert math.isnan(found.comparisons[0].error)
    assert not found.comparisons[0].passed


@pytest.mark.parametrize(
    "change",
    [
        {"created": 1},
        {"seconds": "3"},
        {"lasting": "yes"},
        {"errors": "one"},
        {"reason": None},
        {"comparisons": [{**GOOD, "tolerance": "1"}]},
        {"comparisons": [{**GOOD, "error": True}]},
        {"comparisons": 5},
        {"identity": {"machine": [], "model": {"dtype": "float32", "sizes": None}}},
        {"identity": {"machine": {}, "model": {"dtype": 3, "sizes": None}}},
    ],
    ids=str,
)
def test_a_verdict_of_other_kinds_is_none(cache, change):
    path = keep(Verdict("passed", identity()))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert recall(identity()) is None
    assert verdicts_on(machine_of(CPU)) == []


def test_what_a_verdict_depends_on_gives_it_another_key(cache, folder, monkeypatch):
    keep(Verdict("passed", identity()))
    config = ModelConfig.load(folder)
    others = [
        identity(dtype="float16"),
        identity(config=config),
        identity(config=replace(config, head=replace(config.head, flow_steps=6))),
        identity(table=TacticTable("", flow="persistent")),
        identity(table=TacticTable("", {"linear 1x1x1 float32": Tactic(block_m=16)})),
    ]
    honest = verdict.machine_of(CPU)
    for change in ("gpu", "capability", "driver", "triton", "torch", "xr0-engine", "sources"):
        with monkeypatch.context() as patch:
            patch.setattr(verdict, "machine_of", lambda device, change=change: {**honest, change: "another"})
            others.append(identity())
    assert len({verdict_path(other) for other in [identity(), *others]}) == 1 + len(others)
    assert [recall(other) for other in others] == [None] * len(others)
    assert recall(identity()) is not None


def test_the_sources_are_those_of_the_kernels(monkeypatch, tmp_path):
    before = machine_of(CPU)["sources"]
    for folder in verdict.SOURCES:
        (tmp_path / folder).mkdir()
        for path in (Path(verdict.__file__).parents[1] / folder).glob("*.py"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(verdict, "__file__", str(tmp_path / "fused" / "verdict.py"))
    assert machine_of(CPU)["sources"] == before
    linear = tmp_path / "kernels" / "linear.py"
    linear.write_text(linear.read_text() + "# another\n")
    assert machine_of(CPU)["sources"] != before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"schema": 1}', b'{"schema": 0}', b"[" * 100_000,
     json.dumps({"schema": 1, "outcome": "fine", "identity": {"machine": {}, "model": {}}, "comparisons": []}).encode(),
     json.dumps({"schema": 1, "outcome": "passed", "identity": [], "comparisons": []}).encode(),
     json.dumps({"schema": 1, "outcome": "passed", "identity": {}, "comparisons": [1]}).encode()],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_no_verdict(cache, content):
    path = keep(Verdict("passed", identity()))
    path.write_bytes(content[:200_000])
    assert recall(identity()) is None
    assert verdicts_on(machine_of(CPU)) == []
    keep(Verdict("passed", identity()))
    assert recall(identity()).outcome == "passed"


def test_a_cache_that_cannot_be_written_costs_no_run(cache, caplog):
    cache.write_text("a file where the folder would be")
    assert keep(Verdict("passed", identity())) is None
    assert "cannot be kept" in caplog.text
    assert recall(identity()) is None
    assert verdicts_on(machine_of(CPU)) == []


def test_two_processes_at_once_leave_one_whole_verdict(cache):
    verdicts = [Verdict("passed", identity(), seconds=float(number)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, verdicts))
    assert recall(identity()) in verdicts
    assert len(list((cache / "selfcheck").iterdir())) == 1


def test_without_a_gpu_nothing_is_checked(cache, folder, monkeypatch):
    monkeypatch.setattr(choice, "run_check", lambda *arguments: pytest.fail("checked"))
    assert choose(CPU, "bfloat16", folder) == Choice("reference", "the device is no GPU")
    engine = Engine.from_pretrained(folder, device="cpu")
    assert (engine.backend, engine.backend_reason) == ("reference", "the device is no GPU")
    assert not (cache / "selfcheck").exists()


@pytest.fixture
def broken_kernels(tmp_path, monkeypatch):
    """In processes that are started from here on, a kernel aborts. Returns the file with a line for each of them."""
    starts = tmp_path / "starts"
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(
        "import os\nfrom xr0_engine.fused.ops import FusedOps\n"
        f"open({str(starts)!r}, 'a').write('start\\n')\n"
        "FusedOps.linear = lambda *arguments, **options: os.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "patch"))
    return starts


def test_broken_kernels_make_auto_run_the_reference_and_say_so_once(gpu, folder, broken_kernels, caplog, capfd):
    engines = [Engine.from_pretrained(folder, device="cpu", dtype="float32") for _ in range(2)]
    for engine in engines:
        assert isinstance(engine.model, XR0Model)
        assert engine.backend == "reference"
        assert "seeded model, float32: failed on" in engine.backend_reason
        assert engine.backend_reason.endswith("one row, op by op: its process was ended by SIGABRT")
    # Checked once, kept, said once, with what to report.
    assert broken_kernels.read_text() == "start\n"
    assert capfd.readouterr().err.count("checking the GPU kernels") == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == "xr0_engine.selfcheck"]
    assert "one row, op by op: its process was ended by SIGABRT" in message
    assert str(verdict_path(identity())) in message
    assert "xr0 doctor --json" in message
    expected = Engine.from_pretrained(folder, "cpu", "float32", "reference")
    observation = expected.example("libero_all", (64, 64))
    assert (engines[0].infer(observation, seed=0).actions == expected.infer(observation, seed=0).actions).all()
    # By name nobody asks, and nobody falls back.
    by_name = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="triton")
    assert isinstance(by_name.model, FusedModel)
    assert (by_name.backend, by_name.backend_reason) == ("triton", "asked for by name")
    assert broken_kernels.read_text() == "start\n"


def test_with_both_verdicts_auto_runs_the_kernels(gpu, folder, broken_kernels, caplog):
    keep(Verdict("passed", identity()))
    keep(Verdict("passed", identity(config=ModelConfig.load(folder)), created="2026-01-02T03:04:05+00:00"))
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    assert isinstance(engine.model, FusedModel)
    assert (engine.backend, engine.backend_reason) == ("triton", "its kernels passed their self-check on 2026-01-02")
    assert not broken_kernels.exists()
    assert caplog.records == []


def test_the_checkpoint_s_own_layers_are_checked_where_the_seeded_model_passed(gpu, folder, broken_kernels):
    keep(Verdict("passed", identity()))
    found = choose(CPU, "float32", folder)
    assert found.backend == "reference"
    assert "checkpoint, float32: failed on" in found.reason
    assert found.reason.endswith("first layers, op by op: its process was ended by SIGABRT")
    assert recall(identity(config=ModelConfig.load(folder))).outcome == "failed"


def predicted(monkeypatch, outcomes):
    """A table predicted for the CPU that stands for a GPU; outcomes: of checks, by whether they were with it. Returns
    it and the commands of those that ran."""
    table, ran = TacticTable("sm_90", {"linear 5x8x16 float32": Tactic()}, predicted=True), []
    for module in (choice, engine_module):
        monkeypatch.setattr(module, "tactics_for", lambda device: table)

    def check(command, identity, limit_s):
        ran.append(command)
        return replace(outcomes["--stated-defaults" not in command], identity=identity)

    monkeypatch.setattr(choice, "run_check", check)
    return table, ran


HANGS = Verdict("failed", {}, "chunk", "it did not end within 300 s")


def test_where_predicted_tactics_fail_stated_defaults_are_checked(gpu, folder, monkeypatch, caplog):
    _, ran = predicted(monkeypatch, {True: HANGS, False: Verdict("passed", {})})
    for _ in range(2):
        found = choose(CPU, "float32", folder)
        assert (found.backend, found.table) == ("triton", TacticTable(""))
        assert found.reason.endswith(", with stated defaults: with tactics predicted for sm_90 they did not")
    # The seeded model with the table; both with defaults; all kept, said once.
    assert ["--stated-defaults" in command for command in ran] == [False, True, True]
    assert len(caplog.records) == 1
    assert "auto runs the kernels with stated defaults" in caplog.text
    assert "it did not end within 300 s" in caplog.text
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    assert engine.model.table == TacticTable("")


def test_where_predicted_tactics_pass_they_run(gpu, folder, monkeypatch):
    table, ran = predicted(monkeypatch, {True: Verdict("passed", {}), False: HANGS})
    assert choose(CPU, "float32", folder).table == table
    assert len(ran) == 2
    assert not any("--stated-defaults" in command for command in ran)


@pytest.mark.parametrize(
    ("first", "is_predicted", "checks"),
    [(HANGS, True, 2), (replace(HANGS, reason="out of memory", lasting=False), True, 1), (HANGS, False, 1)],
    ids=["both", "of the moment", "measured"],
)
def test_the_reference_runs_where_no_defaults_help(gpu, folder, monkeypatch, first, is_predicted, checks):
    table, ran = predicted(monkeypatch, {True: first, False: HANGS})
    monkeypatch.setattr(choice, "tactics_for", lambda device: replace(table, predicted=is_predicted))
    found = choose(CPU, "float32", folder)
    assert (found.backend, found.table, len(ran)) == ("reference", None, checks)


def test_a_model_without_kernels_runs_the_reference_without_a_word(gpu, folder, caplog, monkeypatch):
    refusals = []

    def refused(command, identity, limit_s):
        refusals.append(command)
        return Verdict("refused", identity, reason="such heads have no kernels")

    monkeypatch.setattr(choice, "run_check", refused)
    keep(Verdict("passed", identity()))
    for _ in range(2):
        found = choose(CPU, "float32", folder)
        assert found == Choice("reference", "such heads have no kernels")
    assert caplog.records == []
    assert len(refusals) == 1, "it is kept"
    assert recall(identity(config=ModelConfig.load(folder))).outcome == "refused"


def test_an_adapter_s_model_is_checked_and_not_its_base_s(gpu, folder, tmp_path, monkeypatch):
    tuned = tmp_path / "adapter"
    tuned.mkdir()
    content = json.loads((folder / "config.json").read_text())
    content["local_window"] = 7
    (tuned / "config.json").write_text(json.dumps(content))
    asked = []

    def passed(command, identity, limit_s):
        asked.append(command)
        return Verdict("passed", identity)

    monkeypatch.setattr(choice, "run_check", passed)
    keep(Verdict("passed", identity()))
    keep(Verdict("passed", identity(config=ModelConfig.load(folder))))
    assert choose(CPU, "float32", folder, described_by=tuned).backend == "triton"
    assert [command[-2:] for command in asked] == [["--described-by", str(tuned)]]
    assert recall(identity(config=ModelConfig.load(tuned))).outcome == "passed"


def test_a_checkpoint_that_cannot_be_used_gives_no_verdict(gpu, folder, tmp_path):
    other = tmp_path / "other"
    write_checkpoint(other, make_config(text={"num_layers": 5}))
    (other / "config.json").write_text((folder / "config.json").read_text())
    keep(Verdict("passed", identity()))
    with pytest.raises(CheckpointError, match="the weights do not fit"):
        choose(CPU, "float32", other)
    assert len(verdicts_on(machine_of(CPU))) == 1
