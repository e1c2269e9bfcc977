"""Cards: what fits is what the estimate says, with the reserve; a quantised checkpoint has its own precision alone."""

from __future__ import annotations

import json

import pytest

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.step import cards
from xr0_engine.bench.step.cards import CARDS_GB, RESERVE, needs
from xr0_engine.bench.step.memory import memory_need
from xr0_engine.bench.step.workload import Workload
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.model.quantization import RECIPES, quantized_layers
from xr0_engine.model.weights import inference_shapes
from xr0_engine.quantize.folder import write_quantized
from xr0_engine.sizes import published_config


def test_every_precision_of_a_case_is_the_estimates():
    found = needs([Setup(CASES["bimanual"], "4b")])
    assert [need.recipe for need in found] == [None, *RECIPES]
    config, work = Workload.of_case(Setup(CASES["bimanual"], "4b"))
    for need in found:
        layers = {} if need.recipe is None else quantized_layers(need.recipe, inference_shapes(config))
        peak = memory_need(config, work, "bfloat16", layers).peak
        assert need.weights + need.beside == peak
        assert need.cards == tuple(card for card in CARDS_GB if peak + RESERVE <= card * 2**30)
    assert config == published_config()
    assert found[0].cards == (12, 16, 24)
    assert found[1].cards == CARDS_GB, "8 bits are for cards of 8 GB"


def test_a_card_has_what_fits_with_the_reserve(monkeypatch):
    need = needs([Setup(CASES["libero"], "4b")])[0]
    monkeypatch.setattr(cards, "RESERVE", 12 * 2**30 - need.weights - need.beside)
    assert needs([Setup(CASES["libero"], "4b")])[0].cards == (12, 16, 24)
    monkeypatch.setattr(cards, "RESERVE", cards.RESERVE + 1)
    assert needs([Setup(CASES["libero"], "4b")])[0].cards == (16, 24)


def test_a_quantised_checkpoint_has_one_row(tmp_path, capsys):
    plain, eight = tmp_path / "plain", tmp_path / "eight"
    init_checkpoint(plain, "tiny")
    eight.mkdir()
    config, _ = Workload.of_case(Setup(CASES["libero"], "tiny"))
    write_quantized(plain, eight, "auto", quantized_layers("int8", inference_shapes(config)))
    cards.run([Setup(CASES["libero"], checkpoint=str(eight))], as_json=True)
    (told,) = json.loads(capsys.readouterr().out)["needs"]
    assert told["recipe"] == "auto"
    (same,) = (need for need in needs([Setup(CASES["libero"], checkpoint=str(plain))]) if need.recipe == "int8")
    assert told["weights"] == same.weights
    with pytest.raises(ValueError, match="quantised already"):
        Setup(CASES["libero"], checkpoint=str(eight), quantize="int8").layers_in_8bit(config)


def test_the_table_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cards.run([Setup(CASES[name], "4b") for name in ("libero", "bimanual")], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines if "yes" in line] == [
        [case, name] for case in ("libero", "bimanual") for name in ("bfloat16", *RECIPES)
    ]
