"""The command's result: it can be kept, says that it is predicted, and is shown by stage and by kernel."""

from __future__ import annotations

import pytest

from xr0_engine.bench import results
from xr0_engine.bench.cases import Setup, find_case
from xr0_engine.bench.predict import run
from xr0_engine.bench.predict.figures import CHIPS
from xr0_engine.bench.predict.step import Line
from xr0_engine.bench.predict.work import op_work
from xr0_engine.bench.tell.report import page
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.tactics import TacticTable, write_tactics

pytest.importorskip("triton")

SETUP = Setup(find_case("libero"), "4b")
TACTIC = Tactic(128, 128, 64, 2, 8, 4)


def line(stage: str, seconds: float) -> Line:
    work = op_work("linear", (208, 2560, 4096), TACTIC)
    settings = len(CHIPS["h200"].settings())
    return Line(stage, "linear 208x2560x4096", TACTIC, 35, 35, work, None, "L2", 80, (seconds,) * settings)


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked for; it gives a line a stage."""
    given = []

    def predict_case(setup, chip, table, flow, done):
        given.append((chip.name, dict(table.tactics), flow))
        done(1, 1)
        return [line("vision", 1e-3), line("prefill", 2e-3), line("flow", 3e-3)]

    monkeypatch.setattr(run, "predict_case", predict_case)
    return given


def test_a_result_is_kept_and_says_that_it_is_predicted(asked, tmp_path, capsys):
    result = run.measure(SETUP, "h200", None, None, "xr0 bench predict")
    path = tmp_path / "predicted.json"
    results.write(result, path)
    read = results.read(path)
    assert asked == [("h200", {}, "chained")]
    assert read.facts["predicted"] is True
    assert read.environment["device"] == "h200, predicted"
    assert read.facts["ms"]["total"] == pytest.approx([6, 6, 6])
    assert read.facts["bound_ms"]["total"] == pytest.approx(2.96, rel=0.01)
    assert "h200, predicted" in page([("predicted.json", read)])
    run.show(read)
    assert "libero, 4b, bfloat16, h200, chained: predicted" in capsys.readouterr().out


def test_every_kernel_is_listed(asked, capsys):
    result = run.measure(SETUP, "h200", None, None, "xr0 bench predict")
    kernel = result.facts["launches"][1]
    assert (kernel["launches"], kernel["combines"], kernel["processors"]) == (35, 35 * 40, 80)
    # Padding of the prompt is waste as well: of 194 tokens 17 are kept, of 200 too.
    assert result.facts["kept_tokens"] == 17
    assert kernel["wasted_rows"] == pytest.approx(1 - 208 / 256 * 177 / 183)
    run.show(result, list_kernels=True)
    assert capsys.readouterr().out.count("linear 208x2560x4096") == 3


def test_a_tables_tactics_and_flow_are_taken(asked, tmp_path):
    path = tmp_path / "sm_90.json"
    write_tactics(TacticTable("sm_90", {"linear 1x2x3 bfloat16": TACTIC}, flow="layered", predicted=True), path)
    run.measure(SETUP, "h200", None, path, "")
    run.measure(SETUP, "h200", "persistent", path, "")
    assert asked == [("h200", {"linear 1x2x3 bfloat16": TACTIC}, flow) for flow in ("layered", "persistent")]


@pytest.mark.parametrize(
    ("chip", "flow", "complaint"),
    [
        ("v100", None, "chip: expected a100"),
        ("h200", "both", "flow: expected chained, layered, persistent, streamed; got 'both'"),
    ],
)
def test_wrong_words_are_refused_by_name(chip, flow, complaint):
    with pytest.raises(ValueError, match=complaint):
        run.measure(SETUP, chip, flow, None, "")
