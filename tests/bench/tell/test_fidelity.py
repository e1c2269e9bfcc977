"""Speed and fidelity side by side, of results that have 8 bits in them, and of no others."""

from __future__ import annotations

from tests.bench.tell.test_report import make, render, series
from xr0_engine.bench.tell.fidelity import HEAD, speed_and_fidelity

SPREAD = {"mean": 0.9991, "worst": 0.9981}
FACTS = {
    "precision": {"engine": "bfloat16", "int8": "bfloat16, 8 bits by recipe int8"},
    "weights_bytes": {"engine": 8 * 2**30, "int8": 5 * 2**29},
    "agreement": {"int8": {"cosine": 0.9997654, "largest_difference": 0.01234}},
}
COMPARED = {"moments": 16, "moments_of": ["mine"], "cosine": SPREAD, "error": SPREAD, "units": {"mm": SPREAD}}


def test_a_rival_in_8_bits_stands_beside_the_engine():
    result = make(names=("engine", "int8", "released"), facts=FACTS)
    (html, _), text = render(result), speed_and_fidelity(result, result.series)
    for heading in HEAD[1:]:
        assert heading in text
    for cell in ("8.00 GiB", "2.50 GiB", "0.999765", "0.0123", "bfloat16, 8 bits by recipe int8", "xr0 quantize"):
        assert cell in text
    assert "released" not in text, "it has the engine's precision"
    assert text in html
    assert "engine: 8 GiB, int8: 2.5 GiB" in html, "among the facts"


def test_a_quantised_folder_shows_what_it_was_compared_on():
    facts = {"precision": {"engine": "bfloat16, 8 bits by recipe auto"}, "weights_bytes": {"engine": 2**20}}
    result = make(names=("engine",), facts=facts | {"compared": COMPARED})
    text = speed_and_fidelity(result, result.series)
    assert "On 16 recorded moments" in text
    assert "0.999100, at worst 0.998100" in text
    assert "mm 0.999, 0.998" in text
    assert "xr0 quantize" not in text


def test_without_8_bits_there_is_nothing_to_tell():
    result = make(facts={"precision": {"engine": "bfloat16"}, "weights_bytes": {"engine": 1}})
    assert speed_and_fidelity(result, series(("engine",))) == ""
