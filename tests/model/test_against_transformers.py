"""Vision tower and language model against transformers' Qwen3-VL, on random sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLModel

from tests.support import load, make_config, random_inputs
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.types import ModelInputs

FLOAT32_ERROR = 2e-4
"""On values of order 1 to 10: float32 rounding, sums in another order."""
LOW_PRECISION_RATIO = 2.0
"""Our error in bfloat16 against that of transformers in bfloat16, both from float32."""

ONE_IMAGE = ([[(4, 4)]], [[3, 5]])
TWO_VIEWS = ([[(4, 6), (4, 6)]], [[1, 2, 7]])
MIXED_SIZES = ([[(4, 4), (8, 2), (2, 6)]], [[0, 1, 1, 9]])
PADDED_BATCH = ([[(4, 4), (4, 4)], [(6, 2)], [(2, 2), (4, 4), (2, 2)]], [[2, 3, 4], [1, 2], [5, 1, 1, 1]])

CASES = [
    pytest.param({}, ONE_IMAGE, id="tiny-one-image"),
    pytest.param({}, TWO_VIEWS, id="tiny-two-views"),
    pytest.param({}, MIXED_SIZES, id="tiny-mixed-image-sizes"),
    pytest.param({}, PADDED_BATCH, id="tiny-padded-batch"),
    pytest.param(
        {
            "text": {"num_layers": 3, "num_kv_heads": 8, "hidden_size": 72, "intermediate_size": 100},
            "vision": {"depth": 2, "deepstack_layers": (1,), "hidden_size": 48, "num_heads": 3},
            "head": {"num_kv_heads": 8, "hidden_size": 256},
        },
        TWO_VIEWS,
        id="no-grouping-every-layer-kept",
    ),
    pytest.param(
        {
            "text": {
                **{"num_layers": 7, "num_heads": 6, "num_kv_heads": 1, "head_dim": 16, "mrope_section": (4, 2, 2)},
                "rope_theta": 10_000.0,
            },
            "vision": {"depth": 5, "deepstack_layers": (4, 0), "num_position_embeddings": 49},
            "head": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "hidden_size": 64},
        },
        PADDED_BATCH,
        id="one-kv-head-one-dit-layer",
    ),
    pytest.param({"vision": {"deepstack_layers": ()}}, ONE_IMAGE, id="no-deepstack"),
]


@dataclass(frozen=True)
class Outputs:
    tokens: torch.Tensor
    deepstack: list[torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor


def reference(config: ModelConfig, folder: Path, inputs: ModelInputs, dtype: torch.dtype = torch.float32) -> Outputs:
    """With compat_bf16_time the buffers are those of a model that was cast as a whole, as the released server's is."""
    hf_config = Qwen3VLConfig(**config.to_hf()["vlm_config"])
    hf_config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Qwen3VLModel(hf_config)
    model.to_empty(device="cpu")
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    start = "vlm.model."
    model.load_state_dict({name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)})
    model.to(dtype).eval()
    # Buffers that the checkpoint does not hold were left unset on the meta device.
    fresh = Qwen3VLModel(hf_config)
    if config.head.compat_bf16_time:
        fresh.to(torch.bfloat16)
    for name, buffer in fresh.named_buffers():
        model.get_buffer(name).data = buffer.clone()
    grids = torch.tensor([(1, height, width) for height, width in inputs.image_grids])
    cache = DynamicCache(config=hf_config.text_config)
    with torch.no_grad():
        vision = model.get_image_features(inputs.pixel_values.to(dtype), grids, return_dict=True)
        model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
            pixel_values=inputs.pixel_values.to(dtype),
            image_grid_thw=grids,
            mm_token_type_ids=(inputs.input_ids == config.tokens.image).int(),
            past_key_values=cache,
            use_cache=True,
        )
    kept = cache.layers[-config.head.num_layers :]
    return Outputs(
        torch.cat(vision.pooler_output),
        [torch.cat(features) for features in vision.deepstack_features],
        torch.stack([layer.keys for layer in kept]),
        torch.stack([layer.values for layer in kept]),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folders: dict[str, Path] = {}

    def make(config: ModelConfig) -> Path:
        key = repr(config)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("checkpoint") / "model"
            write_checkpoint(folders[key], config)
        return folders[key]

    return make


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("preamble_tokens", [0, 4], ids=["whole-prompt", "kept-prompt-head"])
@pytest.mark.parametrize(("sizes", "prompt"), CASES)
def test_float32_equals_transformers(sizes, prompt, preamble_tokens, checkpoint):
    config = make_config(**sizes)
    folder = checkpoint(config)
    inputs = random_inputs(config, *prompt, preamble_tokens=preamble_tokens)
    expected = reference(config, folder, inputs)
    model = load(folder)
    vision = model.encode_images(inputs)
    assert largest(vision.tokens - expected.tokens) < FLOAT32_ERROR
    assert len(vision.deepstack) == len(expected.deepstack) == len(config.vision.deepstack_layers)
    for tap, features in zip(vision.deepstack, expected.deepstack, strict=True):
        assert largest(tap - features) < FLOAT32_ERROR
    is_token = inputs.attention_mask[:, None, :, None]
    for _ in ("first call fills the kept preamble", "second call reads it"):
        kv = model.prefill(inputs, vision)
        assert kv.keys.shape == expected.keys.shape
        assert largest((kv.keys - expected.keys) * is_token) < FLOAT32_ERROR
        assert largest((kv.values - expected.values) * is_token) < FLOAT32_ERROR


def test_rounded_tables_are_those_of_a_model_that_was_cast(checkpoint):
    config = make_config(head={"compat_bf16_time": True})
    folder = checkpoint(config)
    # Large enough that what is rounded adds up.
    inputs = random_inputs(config, [[(16, 20), (4, 4)]], [[3, 5, 2]])
    expected, model = reference(config, folder, inputs), load(folder)
    vision = model.encode_images(inputs)
    assert largest(vision.tokens - expected.tokens) < FLOAT32_ERROR
    kv = model.prefill(inputs, vision)
    is_token = inputs.attention_mask[:, None, :, None]
    assert largest((kv.keys - expected.keys) * is_token) < FLOAT32_ERROR
    # Each table makes a difference of its own.
    plain = load(checkpoint(make_config()))
    assert largest(plain.encode_images(inputs).tokens - expected.tokens) > 2 * FLOAT32_ERROR
    assert largest((plain.prefill(inputs, vision).keys - expected.keys) * is_token) > 2 * FLOAT32_ERROR


def test_in_bfloat16_the_vision_towers_whole_table_is_rounded(checkpoint):
    """As transformers 4.57 does, which the released server runs on: positions times frequencies, in their dtype."""
    model = load(checkpoint(make_config(head={"compat_bf16_time": True})), torch.bfloat16)
    tower, (height, width) = model.vlm.model.visual, (6, 10)
    _, cos, sin = tower.tables(((height, width),))
    quarter = tower.config.hidden_size // tower.config.num_heads // 4
    frequencies = (10_000.0 ** (-torch.arange(quarter) / quarter)).bfloat16()
    table = torch.outer(torch.arange(width, dtype=torch.bfloat16), frequencies)
    # The patch in row 0 and column 3, in order of merge blocks: second block, second of its four.
    angles = torch.cat((table[0], table[3])).repeat(2)
    assert torch.equal(cos[5, 0], angles.cos().float())
    assert torch.equal(sin[5, 0], angles.sin().float())
    assert cos.dtype == torch.float32


def test_bfloat16_is_as_close_as_transformers(checkpoint):
    config = make_config()
    folder = checkpoint(config)
    inputs = random_inputs(config, *TWO_VIEWS)
    exact = reference(config, folder, inputs)
    rival = reference(config, folder, inputs, torch.bfloat16)
    model = load(folder, torch.bfloat16)
    vision = model.encode_images(inputs)
    kv = model.prefill(inputs, vision)
    for ours, theirs, truth in (
        (vision.tokens, rival.tokens, exact.tokens),
        (kv.keys, rival.keys, exact.keys),
        (kv.values, rival.values, exact.values),
    ):
        assert (ours - truth).norm() < LOW_PRECISION_RATIO * (theirs - truth).norm()


def test_heads_that_differ_are_kept_apart(checkpoint):
    config = make_config()
    model = load(checkpoint(config))
    first, second = (random_inputs(config, *ONE_IMAGE, seed=seed) for seed in (1, 2))
    alone = load(checkpoint(config))
    expected = alone.prefill(second, alone.encode_images(second))
    model.prefill(first, model.encode_images(first))
    kv = model.prefill(second, model.encode_images(second))
    assert torch.equal(kv.keys, expected.keys)


def test_images_that_do_not_match_the_prompt_are_refused(checkpoint):
    config = make_config()
    model = load(checkpoint(config))
    one, two = random_inputs(config, *ONE_IMAGE), random_inputs(config, *TWO_VIEWS)
    with pytest.raises(ValueError, match="input_ids hold 4 image tokens, the images give 12"):
        model.prefill(one, model.encode_images(two))
