"""config.json from outside: rotary embeddings that are not XR-0's are refused under whatever key they are written."""

from __future__ import annotations

import copy
import json
import math

import pytest
from transformers import Qwen3VLConfig

from xr0_engine.config import ModelConfig
from xr0_engine.model.weights import checkpoint_shapes
from xr0_engine.part_configs import least_parameters
from xr0_engine.sizes import published_config, small_config, tiny_config
from xr0_engine.types import CheckpointError

SECTION = [6, 5, 5]
QWEN3 = {"rope_type": "default", "mrope_section": SECTION, "mrope_interleaved": True}


def with_rope(scaling=None, parameters=None, theta: float | None = 5e6, vision=None) -> dict:
    """A config.json whose text config has these, and nothing else, to say about rotary embeddings."""
    hf = copy.deepcopy(tiny_config().to_hf())
    text = hf["vlm_config"]["text_config"]
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters), ("rope_theta", theta)):
        text.pop(key)
        if value is not None:
            text[key] = value
    if vision is not None:
        hf["vlm_config"]["vision_config"]["rope_parameters"] = vision
    return json.loads(json.dumps(hf))


@pytest.mark.parametrize(
    "given",
    [
        {"scaling": QWEN3},
        {"parameters": {**QWEN3, "rope_theta": 5e6}, "theta": None},
        {"scaling": QWEN3, "parameters": {**QWEN3, "rope_theta": 5e6}},
        {"scaling": {"mrope_section": SECTION, "mrope_interleaved": True}},
        {"scaling": {"mrope_section": SECTION, "rope_type": "default"}},
        {"scaling": {**QWEN3, "type": "default"}},
        {"scaling": {"type": "mrope", "mrope_section": SECTION, "mrope_interleaved": True}},
        {"scaling": {**QWEN3, "factor": 1.0, "partial_rotary_factor": None}},
        {"scaling": QWEN3, "vision": {"rope_type": "axial", "rope_theta": 10000.0}},
    ],
    ids=[
        "transformers 4", "transformers 5", "both", "no type", "interleaved not said", "both keys", "older key",
        "neutral keys", "vision",
    ],
)  # fmt: skip
def test_xr0s_rotary_embedding_is_read_wherever_it_stands(given):
    assert ModelConfig.from_hf(with_rope(**given)) == tiny_config()


@pytest.mark.parametrize("place", ["scaling", "parameters"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3", "proportional"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_a_scaling_is_refused_under_both_keys(place, kind, key):
    rope = {"mrope_section": SECTION, "mrope_interleaved": True, key: kind, "factor": 4.0}
    with pytest.raises(CheckpointError, match=rf"rope_{place}: {key} is '{kind}'; XR-0 has 'default'"):
        ModelConfig.from_hf(with_rope(**{place: rope}))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"scaling": {**QWEN3, "type": "yarn"}}, "rope_type is 'default', type is 'yarn'"),
        ({"scaling": QWEN3, "parameters": {**QWEN3, "rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn'"),
        ({"scaling": {"type": "mrope", "mrope_section": SECTION}}, "'mrope' without mrope_interleaved, as Qwen2-VL"),
        ({"scaling": {"rope_type": "mrope", "mrope_section": SECTION}}, "'mrope' without mrope_interleaved"),
        # As Qwen2.5-VL is saved by later versions.
        (
            {"scaling": {"type": "default", "rope_type": "default", "mrope_section": SECTION}},
            "'default' without mrope_interleaved, as Qwen2-VL",
        ),
        ({"scaling": {**QWEN3, "mrope_interleaved": False}}, "rope_scaling: mrope_interleaved is False"),
        ({"scaling": {**QWEN3, "factor": 4.0}}, r"rope_scaling holds \{'factor': 4.0\}; .* not scaled"),
        ({"scaling": QWEN3, "parameters": {**QWEN3, "mrope_section": [5, 6, 5]}}, r"mrope_section is \[5, 6, 5\] in"),
        ({"parameters": {**QWEN3, "rope_theta": 1e4}}, "rope_theta is 5000000.0 in text_config, 10000.0 elsewhere"),
        ({"scaling": QWEN3, "theta": None}, "lacks 'vlm_config.text_config.rope_theta'"),
        ({"scaling": {"rope_type": "default"}}, "lacks 'vlm_config.text_config.mrope_section'"),
        ({"scaling": "yarn"}, "value of the wrong kind: rope_scaling is 'yarn', not an object"),
        ({"scaling": QWEN3, "vision": {"rope_type": "yarn"}}, "vision rope_type is 'yarn'"),
        ({"scaling": QWEN3, "vision": {"rope_theta": 500.0}}, "vision rope_theta is 500.0"),
    ],
    ids=[
        "keys contradict", "places contradict", "mrope", "mrope as rope_type", "Qwen2.5-VL", "in sections", "factor",
        "sections differ", "thetas differ", "no theta", "no sections", "text", "vision scaled", "vision theta",
    ],
)  # fmt: skip
def test_what_is_not_xr0s_is_named(given, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        ModelConfig.from_hf(with_rope(**given))


@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(CheckpointError, match=r"compat_bf16_time is .* not true or false"):
        ModelConfig.from_hf({**tiny_config().to_hf(), "compat_bf16_time": value})


def test_a_part_that_is_no_dictionary_is_refused():
    hf = tiny_config().to_hf()
    hf["vlm_config"]["text_config"] = []
    with pytest.raises(CheckpointError, match="value of the wrong kind"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("part", ["top", "vlm_config"])
def test_a_scaling_outside_of_the_text_config_is_refused(part, rope):
    hf = tiny_config().to_hf()
    (hf if part == "top" else hf[part])[rope] = {"rope_type": "yarn", "factor": 3.0}
    with pytest.raises(CheckpointError, match=rf"{rope}: rope_type is 'yarn'"):
        ModelConfig.from_hf(hf)


def test_rotary_frequencies_for_a_part_of_a_head_are_refused():
    hf = tiny_config().to_hf()
    hf["vlm_config"]["text_config"]["partial_rotary_factor"] = 0.5
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor is 0\.5"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("name", ["action_length", "local_window", "position_offset", "flow_steps", "max_prefix"])
@pytest.mark.parametrize("value", [4.5, True, "4", float("nan"), [4]])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(CheckpointError, match=rf"{name} is .*, not a (whole )?number"):
        ModelConfig.from_hf({**tiny_config().to_hf(), name: value})


def test_a_whole_number_may_be_written_with_a_point():
    hf = {**tiny_config().to_hf(), "position_offset": 10.0}
    assert ModelConfig.from_hf(hf).head.position_offset == 10


@pytest.mark.parametrize("value", [None, "1e-6", True, float("nan"), float("inf"), -1e-6])
def test_std_epsilon_is_a_number_that_std_can_grow_by(value):
    with pytest.raises(CheckpointError, match="std_epsilon"):
        ModelConfig.from_hf({**tiny_config().to_hf(), "std_epsilon": value})


def test_positions_do_not_go_back():
    with pytest.raises(CheckpointError, match=r"head.position_offset is -10, expected 0 to 1048576"):
        ModelConfig.from_hf({**tiny_config().to_hf(), "position_offset": -10})


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("vlm_config.text_config.num_attention_heads", 0, "num_attention_heads: expected 1 or more, got 0"),
        ("vlm_config.text_config.num_hidden_layers", 10**9, "text.num_layers is 1000000000, expected 1 to 128"),
        ("vlm_config.vision_config.depth", 10**9, "vision.depth is 1000000000, expected 1 to 128"),
        ("vlm_config.text_config.vocab_size", 2**63, "text.vocab_size is 9223372036854775808, expected"),
        ("vlm_config.text_config.vocab_size", 10**400, "vocab_size is 1000.*, not a number"),
        ("vlm_config.text_config.rms_norm_eps", 2.0, "text.rms_eps is 2.0, expected 1e-12 to 0.1"),
        ("vlm_config.text_config.rms_norm_eps", -1e-6, "text.rms_eps is -1e-06"),
        ("vlm_config.text_config", [], "text_config is .*, not an object"),
        ("vlm_config.vision_config", None, "vision_config is None, not an object"),
        ("vlm_config.vision_config.patch_size", 10**6, "vision.patch_size is 1000000"),
        ("vlm_config.vision_config.deepstack_visual_indexes", [0] * 99, "not a list of at most 64 whole numbers"),
        ("vlm_config.vision_config.deepstack_visual_indexes", "012", "not a list of at most 64 whole numbers"),
        ("vlm_config.text_config.rope_parameters.mrope_section", [6.5, 5, 5], "mrope_section"),
        ("dit_config", 3, "dit_config is 3, not an object"),
        ("flow_steps", 10**12, "head.flow_steps is 1000000000000, expected 1 to 256"),
        ("flow_steps", 0, "head.flow_steps is 0"),
        ("position_offset", 10**12, "head.position_offset is 1000000000000, expected 0 to 1048576"),
        ("action_length", 10**6, "head.action_length is 1000000"),
        ("std_epsilon", 1.0, "std_epsilon is 1.0, expected 0.0 to 0.01"),
        ("normalize_instruction", "yes", "normalize_instruction is 'yes', not true or false"),
    ],
)
def test_absurd_values_are_refused_before_any_module_is_made(place, value, told):
    hf = json.loads(json.dumps(tiny_config().to_hf()))
    inner = hf
    *path, last = place.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(CheckpointError, match=told):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("theta", [0.5, 1e13, -5e6])
def test_frequencies_fall(theta):
    with pytest.raises(CheckpointError, match=rf"text.rope_theta is {theta}, expected 1.0 to".replace("+", ".")):
        ModelConfig.from_hf(with_rope(scaling=QWEN3, theta=theta))


@pytest.mark.parametrize("config", [tiny_config, small_config, published_config])
def test_least_parameters_are_nearly_all(config):
    held = sum(math.prod(shape) for shape in checkpoint_shapes(config()).values())
    least = least_parameters(config().text, config().vision, config().head)
    # A tiny model's small tables weigh more.
    assert 0.6 * held < least <= held


@pytest.mark.parametrize("taps", [[1, 1, 2], [0, 1, 99]])
def test_taps_are_blocks_each_once(taps):
    hf = tiny_config().to_hf()
    hf["vlm_config"]["vision_config"]["deepstack_visual_indexes"] = taps
    with pytest.raises(CheckpointError, match="deepstack_visual_indexes"):
        ModelConfig.from_hf(hf)


def test_a_mask_mode_in_the_wrong_place_is_not_lost():
    hf = tiny_config().to_hf()
    hf["dit_config"] |= {name: hf.pop(name) for name in ("local_window", "position_offset")} | {"local_window": 4}
    with pytest.raises(CheckpointError, match="local_window, position_offset within dit_config: put it beside"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "default", **{key: QWEN3[key] for key in ("mrope_section", "mrope_interleaved")}}]
)
def test_what_transformers_writes_of_the_vlm_is_read(tmp_path, rope):
    hf = json.loads(json.dumps(tiny_config().to_hf()))
    vlm = {key: value for key, value in hf["vlm_config"].items() if key != "model_type"}
    Qwen3VLConfig(**vlm).save_pretrained(tmp_path)
    hf["vlm_config"] = json.loads((tmp_path / "config.json").read_text())
    if rope is not None:
        # As 4.57 has it.
        text = hf["vlm_config"]["text_config"]
        text |= {"rope_scaling": rope, "rope_theta": text.pop("rope_parameters")["rope_theta"]}
    assert ModelConfig.from_hf(hf) == tiny_config()
