"""Image processing and M-RoPE positions against transformers and the golden cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from xr0_engine.config import VisionConfig
from xr0_engine.robot.preprocess import MAX_PIXELS, MIN_PIXELS, images_to_patches, position_ids, smart_resize

GOLDEN = [
    path
    for path in sorted((Path(__file__).parents[3] / "shared" / "golden").glob("*.*.safetensors"))
    if not path.name.endswith(".weights.safetensors")
]
PAD, IMAGE = 256, 261
VISION = VisionConfig(1, 64, 4, 64, 64, 16, 2, 2, 3, 64, ())


def random_image(*size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reference_processor():
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def assert_as_reference(image, processor):
    patches, (grid,) = images_to_patches([image], VISION)
    reference = processor(images=[image], input_data_format="channels_last", return_tensors="np")
    assert patches.dtype == torch.float32
    assert [[1, *grid]] == reference["image_grid_thw"].tolist()
    np.testing.assert_array_equal(patches, reference["pixel_values"])


def test_images_are_bit_identical_over_200_sizes(reference_processor):
    rng = np.random.default_rng(0)
    noise = random_image(1080, 1920)
    for height, width in zip(rng.integers(32, 1081, 200), rng.integers(32, 1921, 200), strict=True):
        # A corner of one noise image: a new size, rows that are not contiguous, and no time spent on drawing it.
        assert_as_reference(noise[:height, -width:], reference_processor)


@pytest.mark.parametrize(
    "size",
    [
        (256, 256),
        (480, 640),
        (1, 1),
        (1, 200),
        (7, 3),
        (15, 15),
        (16, 48),
        (17, 3400),
        (31, 33),
        (300, 300),
        (1080, 1920),
    ],
    ids=str,
)
def test_odd_and_tiny_images_are_bit_identical(size, reference_processor):
    assert_as_reference(random_image(*size), reference_processor)


@pytest.mark.parametrize(
    "cut",
    [np.s_[::-1, ::-1], np.s_[::2, 1::3], np.s_[5:261, 7:263], np.s_[:, :, ::-1]],
    ids=["turned", "every nth", "inner window of the target size", "channels reversed"],
)
def test_images_of_any_strides(cut, reference_processor):
    image = random_image(300, 400)[cut]
    assert not image.flags.c_contiguous
    assert_as_reference(image, reference_processor)


def test_fortran_order_and_read_only_images(reference_processor):
    image = np.asfortranarray(random_image(96, 64))
    image.flags.writeable = False
    assert_as_reference(image, reference_processor)


def test_every_pixel_value(reference_processor):
    image = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
    assert set(image.ravel()) == set(range(256))
    assert_as_reference(image, reference_processor)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_smart_resize_is_the_reference(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio is above 200"):
            smart_resize(height, width)
        return
    expected = reference_smart_resize(height, width, factor=32, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    assert smart_resize(height, width) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (256, 320)), ((256, 256), (256, 256)), ((48, 80), (64, 64)), ((1, 1), (32, 32))],
    ids=["published", "unchanged", "ties go to the even multiple", "smallest"],
)
def test_smart_resize_examples(size, expected):
    assert smart_resize(*size) == expected


def random_rows(rng, grids_per_row, longest):
    """Left padded rows of text with images at random places."""
    input_ids = np.full((len(grids_per_row), longest), PAD)
    attention = np.zeros((len(grids_per_row), longest), dtype=bool)
    for row, grids in enumerate(grids_per_row):
        parts = [rng.integers(0, 256, rng.integers(1, 9))]
        for height, width in grids:
            parts += [np.full(height * width // 4, IMAGE), rng.integers(0, 256, rng.integers(1, 9))]
        tokens = np.concatenate(parts)
        input_ids[row, longest - len(tokens) :] = tokens
        attention[row, longest - len(tokens) :] = True
    return input_ids, attention


@pytest.fixture(scope="module")
def reference_model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3VLConfig(
        text_config={**sizes, "head_dim": 16, "intermediate_size": 32, "vocab_size": 262},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
        image_token_id=IMAGE,
    )
    with torch.device("meta"):
        return Qwen3VLModel(config)


@pytest.mark.parametrize("seed", range(10))
def test_positions_are_those_of_transformers(seed, reference_model):
    rng = np.random.default_rng(seed)
    grids = [[(2 * h, 2 * w) for h, w in rng.integers(1, 9, (rng.integers(0, 4), 2))] for _ in range(3)]
    input_ids, attention = random_rows(rng, grids, longest=250)
    flat = [(1, height, width) for row in grids for height, width in row]
    expected, _ = reference_model.get_rope_index(
        torch.from_numpy(input_ids),
        torch.from_numpy((input_ids == IMAGE).astype(np.int32)),
        torch.tensor(flat, dtype=torch.long).reshape(-1, 3),
        attention_mask=torch.from_numpy(attention),
    )
    for row, row_grids in enumerate(grids):
        found = position_ids(input_ids[row], attention[row], row_grids, IMAGE, merge=2)
        np.testing.assert_array_equal(found, expected[:, row])


@pytest.mark.skipif(not GOLDEN, reason="the golden cases lie beside the repository, not in it")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name.removesuffix(".safetensors"))
def test_positions_are_those_of_the_golden_cases(path):
    case = load_file(path)
    model = json.loads((path.parent / f"{path.name.split('.')[0]}.json").read_text(encoding="utf-8"))
    image, merge = model["tokens"]["image_token_id"], model["vision_config"]["spatial_merge_size"]
    grids = [(int(height), int(width)) for _, height, width in case["image_grid_thw"]]
    for row, (ids, mask) in enumerate(zip(case["input_ids"], case["attention_mask"], strict=True)):
        # The grids of all rows stand in one list: a row takes as many as it has image tokens for.
        tokens = int((ids == image).sum())
        own: list[tuple[int, int]] = []
        while sum(height * width for height, width in own) < tokens * merge**2:
            own.append(grids.pop(0))
        np.testing.assert_array_equal(position_ids(ids, mask, own, image, merge), case["vlm_position_ids"][:, row])
    assert not grids


@pytest.mark.parametrize(
    ("tokens", "grids", "match"),
    [
        ([1, IMAGE, IMAGE, 2], [(2, 2)], "image tokens for 1 images, got more"),
        ([1, IMAGE, 2], [(4, 2)], "2 image tokens in a row"),
        ([1, IMAGE], [(2, 2), (2, 2)], "1 image tokens in a row"),
        ([1, 2], [(2, 2)], "1 image tokens in a row"),
        ([1, IMAGE, 2, IMAGE], [(2, 4)], "2 image tokens in a row"),
    ],
    ids=["too many", "too few", "no second image", "no image", "text between"],
)
def test_positions_need_matching_grids(tokens, grids, match):
    with pytest.raises(ValueError, match=match):
        position_ids(np.array(tokens), np.ones(len(tokens)), grids, IMAGE, merge=2)
