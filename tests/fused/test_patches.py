"""Patches of one frame: the folded embedding, who takes them, and the engine from observation to chunk on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import make_config, random_inputs
from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.checkpoint import init_checkpoint, write_checkpoint
from xr0_engine.comparison import LOW_PRECISION_ROUNDOFFS
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.fused.vlm import fold_frames
from xr0_engine.model.network import whole_patches
from xr0_engine.robot.patches import images_to_patches
from xr0_engine.robot.preprocess import Preprocessor

MAX_ERROR = 2e-4
"""float32 through some ten layers, as in test_model.py."""
ONE_MORE_ROUNDING = 2
"""A fold rounds weights of the embedding, whose result is rounded anyway: the error may double."""
PATCH, CHANNELS, COLUMNS = 16, 3, 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


def engines(folder, dtype) -> tuple[Engine, Engine]:
    """The reference, and the fused path on its oracles."""
    plain, folded = (Engine.from_pretrained(folder, "cpu", dtype, "reference") for _ in range(2))
    fused = FusedModel(folded.model, "reference", TacticTable(""), graphs=False)
    return plain, Engine(fused, plain._preprocess)


@pytest.fixture(scope="module")
def both(folder):
    return engines(folder, "float32")


def first_frame(pixel_values, vision):
    shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size**2)
    return pixel_values.unflatten(1, shape)[:, :, 0].flatten(1)


def kernels(kind: str) -> torch.Tensor:
    """(C, channels, 2, 16, 16) of a Conv3d."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(COLUMNS, CHANNELS, 2, PATCH, PATCH, generator=generator) / 1536**0.5
    if kind == "alike":
        weight[:, :, 1] = weight[:, :, 0] + 0.1 * weight[:, :, 1]
    elif kind == "opposed":
        weight[:, :, 1] = 0.1 * weight[:, :, 1] - weight[:, :, 0]
    elif kind == "blind to brightness":
        weight -= weight.mean((3, 4), keepdim=True)
    return weight


def picture(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    if kind == "flat":
        return np.full((128, 128, 3), (200, 90, 30), np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((128, 128), Image.Resampling.BICUBIC))


def embedded(kernel, image, dtype) -> tuple[float, float]:
    """Relative RMS error of an embedding with every frame, and of the folded one, each rounded to dtype at its end."""
    patches = images_to_patches([image], [image.shape[:2]], PATCH, 1, 2, torch.empty(64, 768, dtype=dtype))
    stored = kernel.to(dtype)
    exact = patches.double() @ stored.double().sum(2).flatten(1).T
    whole = patches.repeat_interleave(2, 0).view(64, 2, 3, 256).transpose(1, 2).flatten(1)
    results = ((whole, stored.flatten(1)), (patches, fold_frames(stored)))
    errors = [(x.double() @ weight.double().T).to(dtype).double() - exact for x, weight in results]
    return tuple(float(error.square().mean().sqrt() / exact.square().mean().sqrt()) for error in errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("image", ["noise", "scene", "flat"])
@pytest.mark.parametrize("kind", ["independent", "alike", "opposed", "blind to brightness"])
def test_the_fold_costs_no_more_than_a_rounding(kind, image, dtype):
    whole, folded = embedded(kernels(kind), picture(image), dtype)
    if (kind, image) == ("blind to brightness", "flat"):
        # Next to nothing is left of the embedding, and still the whole model's tolerance holds for it.
        if dtype == torch.bfloat16:
            assert folded < LOW_PRECISION_ROUNDOFFS * torch.finfo(dtype).eps / 2
        return
    assert folded < ONE_MORE_ROUNDING * whole


def test_a_fold_that_is_rounded_pixel_by_pixel_would_not_do():
    """Why fold_frames hands on what rounding takes."""
    stored, flat = kernels("blind to brightness").bfloat16(), picture("flat")
    patches = images_to_patches([flat], [flat.shape[:2]], PATCH, 1, 2, torch.empty(64, 768, dtype=torch.bfloat16))
    exact = patches.double() @ stored.double().sum(2).flatten(1).T
    naive = patches.double() @ stored.float().sum(2).flatten(1).bfloat16().double().T
    error = float((naive - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error > LOW_PRECISION_ROUNDOFFS * torch.finfo(torch.bfloat16).eps / 2


def test_a_fold_of_one_frame_changes_nothing():
    kernel = kernels("independent")[:, :, :1].bfloat16()
    assert torch.equal(fold_frames(kernel), kernel.flatten(1))


def test_every_network_takes_one_frame_as_all_of_them(both):
    for engine in both:
        model, config = engine.model, engine.config
        inputs = random_inputs(config, [[(4, 4), (4, 6)]], [[3, 2, 5]])
        one = replace(inputs, pixel_values=first_frame(inputs.pixel_values, config.vision))
        still = replace(inputs, pixel_values=whole_patches(one.pixel_values, config.vision))
        assert still.pixel_values.shape == inputs.pixel_values.shape
        found, expected = (model.encode_images(each) for each in (one, still))
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=MAX_ERROR)
        if engine is both[0]:
            assert torch.equal(found.tokens, expected.tokens)


def test_frames_that_differ_are_not_folded(both):
    reference, fused = (engine.model for engine in both)
    config = reference.config
    inputs = random_inputs(config, [[(4, 4)]], [[3, 5]])
    one = replace(inputs, pixel_values=first_frame(inputs.pixel_values, config.vision))
    assert not torch.equal(whole_patches(one.pixel_values, config.vision), inputs.pixel_values)
    noise, nothing = torch.zeros(inputs.action_mask.shape), torch.zeros(1, dtype=torch.long)
    chunks = {}
    # In one session's place after the other's: neither may take over the other's graph.
    for name, given in (("video", inputs), ("still", one), ("video", inputs)):
        expected = reference.step(given, noise, noise, nothing)
        chunks[name] = fused.step(given, noise, noise, nothing).clone()
        torch.testing.assert_close(chunks[name], expected, rtol=0, atol=MAX_ERROR)
        tokens = (model.encode_images(given).tokens for model in (fused, reference))
        torch.testing.assert_close(*tokens, rtol=0, atol=MAX_ERROR)
    assert not torch.allclose(chunks["video"], chunks["still"], rtol=0, atol=MAX_ERROR)


@pytest.mark.parametrize("columns", [767, 769, 1535, 3072, 0])
def test_other_columns_are_refused_with_both_that_fit(both, columns):
    expected = rf"pixel_values: expected 1536 columns .* or 768 .*, got {columns}"
    for engine in both:
        inputs = random_inputs(engine.config, [[(4, 4)]], [[3, 5]])
        wrong = replace(inputs, pixel_values=torch.zeros(16, columns))
        noise = torch.zeros(inputs.action_mask.shape)
        with pytest.raises(ValueError, match=expected):
            engine.model.encode_images(wrong)
        with pytest.raises(ValueError, match=expected):
            engine.model.step(wrong, noise, noise, torch.zeros(1, dtype=torch.long))


def test_a_session_takes_its_own_shape_alone(both):
    model = both[1].model
    inputs = random_inputs(model.config, [[(4, 4)]], [[3, 5]])
    session = Session(model, session_key(inputs), inputs)
    noise, nothing = torch.zeros(inputs.action_mask.shape), torch.zeros(1, dtype=torch.long)
    # One row would be copied to all of them.
    for shape in ((1, 1536), (16, 768)):
        with pytest.raises(ValueError, match=r"pixel_values: expected shape \(16, 1536\), got"):
            session.update(replace(inputs, pixel_values=torch.zeros(shape)), noise, noise, nothing)


def test_patches_are_asked_for_as_each_network_wants_them(folder):
    for dtype in ("float32", "bfloat16", "float16"):
        reference, fused = (engine.model for engine in engines(folder, dtype))
        for model, columns in ((reference, 1536), (fused, 768)):
            buffer = model.patch_buffer(((4, 4), (2, 4)))
            assert (tuple(buffer.shape), str(buffer.dtype)) == ((24, columns), f"torch.{dtype}")
            assert buffer.device == model.device


def test_patches_are_written_where_they_are_asked_for(folder, monkeypatch):
    """No other tensor of them is made: what the session copies to the device is what the operator wrote."""
    _, fused = engines(folder, "bfloat16")
    asked, updated = [], []
    buffer, update = fused.model.patch_buffer, Session.update
    monkeypatch.setattr(fused.model, "patch_buffer", lambda grids: asked.append(buffer(grids)) or asked[-1])

    def seen(self, inputs, *chunk):
        updated.append(inputs.pixel_values)
        update(self, inputs, *chunk)

    monkeypatch.setattr(Session, "update", seen)
    fused.infer(fused.example("bimanual"), seed=0)
    assert len(asked) == len(updated) == 1
    assert asked[0].data_ptr() == updated[0].data_ptr()
    assert asked[0].shape == updated[0].shape


@pytest.mark.parametrize("robot_type", ["libero_all", "bimanual"])
def test_engine_gives_the_references_chunk_from_one_frame(both, robot_type):
    observation = both[0].example(robot_type)
    expected, found = (engine.infer(observation, seed=1).normalized for engine in both)
    np.testing.assert_allclose(found, expected, rtol=0, atol=MAX_ERROR)
    blocks = [engine.prefill(observation) for engine in both]
    torch.testing.assert_close(blocks[1].keys, blocks[0].keys, rtol=0, atol=MAX_ERROR)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_is_what_float32_patches_made_it(folder, dtype):
    """Rounded by the operator or by torch, the model sees the same bits."""
    engine, _ = engines(folder, dtype)
    observation = engine.example("bimanual")
    inputs = engine._preprocess([observation], engine.model.patch_buffer)
    before = engine._preprocess([observation])
    assert (before.pixel_values.dtype, before.pixel_values.shape[1]) == (torch.float32, 1536)
    tokens = [engine.model.encode_images(each).tokens for each in (inputs, before)]
    assert torch.equal(*tokens)


def test_benchmarks_measure_what_the_engine_runs(both, folder):
    for engine, columns in zip(both, (1536, 768), strict=True):
        case = CASES["libero"]
        observations, prefixes, noise = case.observations(engine), case.prefixes(engine), case.noise(engine)
        setup = Setup(case, device="cpu", dtype="float32")
        inputs = Subject(setup, folder, engine, observations, prefixes, noise).step_inputs().inputs
        assert inputs.pixel_values.shape[1] == columns


def test_a_tower_with_one_frame_to_a_patch(tmp_path):
    config = make_config(vision={"temporal_patch_size": 1})
    assert config.vision.patch_dim == config.vision.frame_dim == 768
    write_checkpoint(tmp_path / "single", config)
    plain, fused = engines(tmp_path / "single", "float32")
    inputs = random_inputs(config, [[(4, 4)]], [[3, 5]])
    found, expected = (engine.model.encode_images(inputs).tokens for engine in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=MAX_ERROR)
    with pytest.raises(ValueError, match="got 1536"):
        plain.model.encode_images(replace(inputs, pixel_values=torch.zeros(16, 1536)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_patches_made_on_the_gpu_are_the_hosts(folder, dtype):
    engine = Engine.from_pretrained(folder, device="cuda", dtype=dtype, backend="triton")
    observations = [engine.example("bimanual")] * 6
    buffer = engine.model.patch_buffer(((16, 20),))
    preprocess = Preprocessor.load(folder)
    there = preprocess(observations, engine.model.patch_buffer).pixel_values

    def on_host(grids):
        shape = (sum(height * width for height, width in grids), buffer.shape[1])
        return torch.empty(shape, dtype=buffer.dtype, pin_memory=True)

    here = preprocess(observations, on_host).pixel_values
    assert torch.equal(there.cpu(), here)
    chunks = [engine.infer(observations, seed=0) for _ in range(2)]
    assert all(np.array_equal(a.normalized, b.normalized) for a, b in zip(*chunks, strict=True))
