"""Another family of action heads is another configuration: golden cases of one that XR-0's code never saw.

Its heads have as many layers as the VLM or fewer, several state tokens, no stream norms and a wider output layer.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN, ROOT, make_config
from xr0_engine.comparison import FLOAT32_MAX_ERROR
from xr0_engine.config import ModelConfig
from xr0_engine.family import VARIANT
from xr0_engine.golden.cases import golden_config
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.weights import head_shapes
from xr0_engine.types import CheckpointError, KVBlock

CASES = sorted(
    path for path in (GOLDEN.parent / "golden_xr1").glob("xr1_*.*.safetensors") if "weights" not in path.name
)


@pytest.mark.skipif(not CASES, reason="no golden cases of a second family here")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_flow_of_another_family(path):
    folder, model = path.parent, path.name.split(".")[0]
    config = golden_config(json.loads((folder / f"{model}.json").read_text(encoding="utf-8")))
    weights, case = load_file(folder / f"{model}.weights.safetensors"), load_file(path)
    head = ActionHead(config)
    head.load_state_dict({name: weights[name] for name in head_shapes(head)})
    layers = range(config.head.num_layers)
    kv = KVBlock(
        keys=torch.stack([case[f"kv.{layer}.key"] for layer in layers]),
        values=torch.stack([case[f"kv.{layer}.value"] for layer in layers]),
        mask=case["attention_mask"].bool(),
        next_position=case["vlm_position_ids"].masked_fill(~case["attention_mask"].bool(), -1).amax(-1) + 1,
        action_mask=case["action_mask"],
    )
    prefix = torch.zeros_like(case["noise"])
    length = case["prefix"].shape[1]
    prefix[:, :length] = case["prefix"]
    lengths, trace = torch.full((len(prefix),), length), []
    with torch.no_grad():
        table = head.modulation_table()
        actions = head.sample(kv, case["state"], case["noise"], prefix, lengths, table, trace)
    torch.testing.assert_close(torch.stack(trace), case["flow_trace"], rtol=0, atol=FLOAT32_MAX_ERROR)
    torch.testing.assert_close(actions, case["actions"], rtol=0, atol=FLOAT32_MAX_ERROR)


def test_a_variant_goes_through_config_json_and_xr_0_s_says_nothing_of_it():
    plain = make_config()
    variant = replace(plain, head=replace(plain.head, stream_norms=False, mlp_width=96, output_width=64))
    assert ModelConfig.from_hf(variant.to_hf()).head == variant.head
    assert (variant.head.intermediate_size, variant.head.output_hidden_size) == (96, 64)
    assert plain.to_hf()["dit_config"].keys() == variant.to_hf()["dit_config"].keys() - {
        "stream_norms",
        "mlp_width",
        "output_width",
    }


def test_a_word_is_no_truth_value():
    hf = make_config().to_hf()
    hf["dit_config"] |= {"stream_norms": "false"}
    with pytest.raises(CheckpointError, match="value of the wrong kind: stream_norms is 'false'"):
        ModelConfig.from_hf(hf)


ASKED_IN = (
    *("family.py", "config.py", "part_configs.py", "sizes.py"),
    *("model", "fused", "export/stages.py", "golden/cases.py"),
)
"""Where what differs between families may be asked for: their configuration, the networks, and golden cases' names."""


@pytest.mark.parametrize("name", [*VARIANT, "output_hidden_size", "middle_layernorm", "final_layernorm"])
def test_nobody_else_asks_which_family_it_is(name):
    package = ROOT / "xr0_engine"
    files = [path for path in package.rglob("*.py") if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
    places = [path.relative_to(package).as_posix() for path in files]
    # The released way is one family's, restated.
    assert [place for place in places if not place.startswith(ASKED_IN) and place != "bench/measure/baseline.py"] == []
