"""Tactic tables: files, which of them counts, and that an op runs with its entry."""

from __future__ import annotations

import json

import pytest
import torch

from xr0_engine.fused import tactics
from xr0_engine.fused.graph import Graph, read_contents
from xr0_engine.fused.ops import FusedOps, Tactic, Weight, tactic_key
from xr0_engine.fused.tactics import TacticTable, read_tactics, tactics_for, write_tactics

KEY = tactic_key("linear", (3, 8, 16), torch.float32)
TABLE = TacticTable(
    "toy",
    {KEY: Tactic(16, 32, 64, split_k=2, warps=8, library=True)},
    True,
    {KEY: {"a": 1.5}},
    {"torch": "2"},
    "layered",
    programs=99,
)


def test_key_names_kind_shape_and_precision():
    assert tactic_key("linear", (315, 2560, 4096), torch.bfloat16) == "linear 315x2560x4096 bfloat16"
    rows = {"x_scale": torch.empty(1, 315)}
    assert tactic_key("linear", (315, 2560, 4096), torch.int8, rows) == "linear 315x2560x4096 int8 rows"


def test_round_trip(tmp_path):
    path = tmp_path / "made" / "toy.json"
    write_tactics(TABLE, path)
    assert read_tactics(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == ["toy.json"]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "toy.json"
    write_tactics(TABLE, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_tactics(TacticTable("toy", measured={KEY: {"a": float("nan")}}), path)
    assert read_tactics(path) == TABLE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda content: content.update(schema=2), "expected schema 1", id="schema"),
        pytest.param(lambda content: content.pop("schema"), "schema", id="no schema"),
        pytest.param(lambda content: content["tactics"][KEY].update(block_q=1), r"unknown \['block_q'\]", id="tactic"),
        pytest.param(lambda content: content.update(colour="red"), "colour", id="field"),
        pytest.param(lambda content: content.update(ahead="yes"), "ahead: expected true or false", id="ahead"),
        pytest.param(lambda content: content.update(overlap=-1), "overlap: expected true, false or a", id="overlap"),
        pytest.param(
            lambda content: content.update(flow="both"), "flow: expected chained or layered or persistent", id="flow"
        ),
        pytest.param(
            lambda content: content.update(programs=0), "programs: expected a number of at least", id="programs"
        ),
        pytest.param(lambda content: content.update(tactics=[1]), "no tactic table", id="type"),
    ],
)
def test_broken_table_is_refused_by_name(tmp_path, change, complaint):
    path = tmp_path / "toy.json"
    write_tactics(TABLE, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint) as caught:
        read_tactics(path)
    assert str(path) in str(caught.value)
    assert "xr0 bench tune" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"], ids=["empty", "cut off", "list", "number"])
def test_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "toy.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no tactic table"):
        read_tactics(path)


def test_the_users_table_comes_before_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(tactics, "gpu_name", lambda device: "toy")
    monkeypatch.setattr(tactics, "capability", lambda device: 0)
    monkeypatch.setattr(tactics.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    device = torch.device("cuda")
    assert tactics_for(device) == TacticTable("toy")
    write_tactics(TABLE, tmp_path / "package" / "tactics" / "toy.json")
    assert tactics_for(device) == TABLE
    own = TacticTable("toy", {KEY: Tactic(64)})
    write_tactics(own, tmp_path / "cache" / "tactics" / "toy.json")
    assert tactics_for(device) == own


def test_without_a_gpu_the_table_is_empty():
    assert tactics_for(torch.device("cpu")) == TacticTable("")


@pytest.mark.parametrize("known", [True, False], ids=["entry", "no entry"])
def test_an_op_runs_with_its_entry_else_with_the_default(monkeypatch, known):
    ops = FusedOps("reference", torch.device("cpu"), TABLE.tactics if known else {})
    used = []
    monkeypatch.setattr(ops, "call", lambda kind, arguments, options, tactic: used.append(tactic))
    ops.linear(torch.zeros(1, 3, 16), Weight(torch.zeros(8, 16)), torch.zeros(1, 3, 8))
    ops.linear(torch.zeros(1, 4, 16), Weight(torch.zeros(8, 16)), torch.zeros(1, 4, 8))
    default = ops.default("linear", (3, 8, 16))
    assert used == [TABLE.tactics[KEY] if known else default, default]


ROWS = {rows: Tactic(rows) for rows in (208, 320)}


def _product(rows: int, kind: str = "linear", inputs: int = 2560) -> str:
    return f"{kind} {rows}x2560x{inputs} bfloat16"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (_product(192), 208),
        (_product(272), 320),
        # The nearest one's default was not beaten.
        (_product(240), None),
        # Twice the tokens of a prompt are no neighbours, nor is another product, nor few rows.
        (_product(416 + 16), None),
        (_product(144), None),
        (_product(208, "swiglu"), None),
        (_product(192, inputs=4096), None),
        (_product(48), None),
        (f"{_product(208)} rows", None),
        # Neither is an attention of twice the queries or keys, or of other heads; a flow's has its own default.
        ("attention 1x32x104x8x208x128 bfloat16", None),
        ("attention 1x32x208x8x416x128 bfloat16", None),
        ("attention 1x32x208x4x208x128 bfloat16", None),
        ("lambda_attention 1x8x12x8x200x128 bfloat16", None),
        ("flow_loop.down 192x2560x2560 bfloat16", None),
        # Not written by tune.
        ("linear {}x2560x2560 bfloat16", None),
        # Its default was not beaten.
        (_product(224), None),
    ],
)
def test_a_product_of_nearly_as_many_rows_has_the_same_tactic(key, found):
    tactics = {_product(rows): tactic for rows, tactic in ROWS.items()} | {
        _product(64): Tactic(1),
        "linear {}x2560x2560 bfloat16": Tactic(4),
        "linear": Tactic(5),
        "attention 1x32x208x8x208x128 bfloat16": Tactic(2),
        "lambda_attention 1x8x12x8x208x128 bfloat16": Tactic(2),
        "flow_loop.down 208x2560x2560 bfloat16": Tactic(3),
    }
    ops = FusedOps("reference", torch.device("cpu"), tactics, kept=[_product(224), "step libero"])
    assert ops.entry(key) == (tactics.get(key) if found is None else ROWS[found])


@pytest.mark.parametrize("sizes", ["1x32x183x8x200x128", "1x32x192x8x192x128", "1x32x260x8x277x128"])
def test_an_attention_of_nearly_as_many_tokens_has_the_same_tactic(sizes):
    tactics = {"attention 1x32x208x8x208x128 bfloat16": Tactic(2), "attention 1x32x400x8x400x128 bfloat16": Tactic(3)}
    ops = FusedOps("reference", torch.device("cpu"), tactics)
    assert ops.entry(f"attention {sizes} bfloat16") == Tactic(2)
    assert ops.entry(f"attention {sizes} float16") is None


def test_a_table_tells_which_keys_keep_their_default():
    table = TacticTable("toy", {KEY: Tactic()}, measured={KEY: {"a": 1.0}, "linear 5x8x16 bfloat16": {"b": 1.0}})
    assert table.kept == {"linear 5x8x16 bfloat16"}


def test_a_graph_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="step: CUDA graphs need a CUDA GPU, not cpu"):
        Graph(lambda: None, torch.device("cpu"), "step")


def test_reading_no_graph_says_what_the_driver_says():
    pytest.importorskip("cuda.bindings")
    with pytest.raises(RuntimeError, match=r"CUDA driver: |NVIDIA driver"):
        read_contents(0)
