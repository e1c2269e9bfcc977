"""An export against the reference engine: every stage alone, fed by the reference, then all of them in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from xr0_engine.comparison import FLOAT32_EXPORT_MAX_ERROR, ROUNDED_ERROR, Comparison, compare, compare_rounded
from xr0_engine.config import ModelConfig
from xr0_engine.export.inputs import INSTRUCTION, observations
from xr0_engine.exported.manifest import changed_files, checkpoint_hash, stage_key
from xr0_engine.exported.model import ExportedModel, prompt, refuse_other_model
from xr0_engine.model.network import Network
from xr0_engine.model.quantization import Format, read_quantization
from xr0_engine.model.quantized import round_by
from xr0_engine.model.weights import load_model, read_index, resolve_checkpoint
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

SHORT_INSTRUCTION = "Stop."
"""In every second row of a batch, so that rows are padded."""
PREFIX_LENGTHS = (0, 3)


def compare_export(
    folder: Path, checkpoint: str | None = None, device: str = "auto", backend: str = "onnx"
) -> Iterator[Comparison]:
    """Compare all that the folder holds, one quantity after the other, in the export's precision.

    checkpoint: where it is now; None where it was when it was exported. Raises ValueError for a folder that cannot be
    used or a checkpoint that it was not made from, and what ExportedModel.load raises.
    """
    # Files of another hash are among what is told below.
    model = ExportedModel.load(folder, device, backend, check=False)
    source, case = resolve_checkpoint(checkpoint or model.manifest.checkpoint), model.manifest.case
    refuse_other_model(model.config, ModelConfig.load(source))
    actual = checkpoint_hash(source)
    if actual != model.manifest.checkpoint_sha256:
        raise ValueError(
            f"{source} is another checkpoint (hash {actual[:12]}) than the export's "
            f"({model.manifest.checkpoint_sha256[:12]}): pass the one that it was made from"
        )
    preprocess = Preprocessor.load(source, None if case.profile is None else load_embodiment(case.profile))
    model.check_profile(preprocess)
    changed = changed_files(model.files)
    what = "as written" if not changed else "changed: " + ", ".join(changed)
    yield Comparison("files", what, len(changed), 0, "files of another hash")
    instructions = [SHORT_INSTRUCTION if row % 2 else INSTRUCTION for row in range(case.batch)]
    inputs = preprocess(observations(preprocess, case, instructions))
    quantization = read_quantization(source)
    stored = read_index(source, quantized=quantization is not None)
    layers: Mapping[str, Format] = {} if quantization is None else quantization.layers
    reference = load_model(preprocess.config, stored, model.device, model.dtype, layers, quantization is not None)
    if quantization is not None:
        round_by(reference, quantization.largest)
    yield from compare_stages(model, reference, inputs, rounding_of(layers))


@dataclass(frozen=True)
class Rounding:
    """By how much rounding rows by constants lets both sides differ, relative RMS, in the VLM and in the action head;
    None of what rounds none."""

    vlm: float | None = None
    head: float | None = None

    @property
    def either(self) -> float | None:
        return max((each for each in (self.vlm, self.head) if each is not None), default=None)


def rounding_of(layers: Mapping[str, Format]) -> Rounding:
    def most(is_vlm: bool) -> float | None:
        formats = {format for layer, format in layers.items() if layer.startswith("vlm.") is is_vlm}
        return max((ROUNDED_ERROR[format] for format in formats & ROUNDED_ERROR.keys()), default=None)

    return Rounding(most(True), most(False))


def compare_stages(
    model: ExportedModel, reference: Network, inputs: ModelInputs, rounding: Rounding = Rounding()
) -> Iterator[Comparison]:
    """Every stage that the export has, for every prompt length. rounding: of both."""
    shapes, stages = model.manifest.shapes, set(model.manifest.stages)
    vision = reference.encode_images(inputs)
    kv = reference.prefill(inputs, vision)
    if "vision" in stages:
        yield from _compare_vision(model, model.encode_images(inputs), vision, rounding.vlm)
    for tokens in shapes.tokens:
        keys = {stage: stage_key(stage, tokens) for stage in ("prefill", "flow", "step")}
        padded, padded_kv = pad_inputs(inputs, tokens), pad_kv(kv, tokens)
        if keys["prefill"] in stages:
            yield from _compare_kv(model, keys["prefill"], model.prefill(padded, vision), padded_kv, rounding.vlm)
        for length in PREFIX_LENGTHS:
            flow = _flow_inputs(inputs, min(length, shapes.chunk_length))
            expected = reference.sample(kv, *flow)
            quantity = f"actions, prefix {length}"
            if keys["flow"] in stages:
                yield _compare(model, keys["flow"], quantity, model.sample(padded_kv, *flow), expected, rounding.head)
            if keys["step"] in stages:
                yield _compare(model, keys["step"], quantity, model.step(padded, *flow[1:]), expected, rounding.either)
            if {"vision", keys["prefill"], keys["flow"]} <= stages:
                chained = model.sample(model.prefill(padded, model.encode_images(inputs)), *flow)
                yield _compare(model, f"end to end.{tokens}", quantity, chained, expected, rounding.either)


def pad_inputs(inputs: ModelInputs, tokens: int) -> ModelInputs:
    """The same observations, padded on the left to `tokens`."""
    padded = prompt(inputs, tokens)
    return replace(
        inputs,
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        position_ids=padded["position_ids"],
    )


def pad_kv(kv: KVBlock, tokens: int) -> KVBlock:
    """The same block with empty, masked places on the left."""
    missing = tokens - kv.mask.shape[1]
    keys, values = (torch.nn.functional.pad(part, (0, 0, missing, 0)) for part in (kv.keys, kv.values))
    return replace(kv, keys=keys, values=values, mask=torch.nn.functional.pad(kv.mask, (missing, 0)))


def _flow_inputs(inputs: ModelInputs, prefix_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """state, noise, prefix, prefix_length, as Network.sample takes them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs.action_mask.shape, generator=generator)
    prefix = torch.randn(inputs.action_mask.shape, generator=generator)
    lengths = torch.full((len(noise),), prefix_length)
    return inputs.state, noise, prefix, lengths


def _compare_vision(
    model: ExportedModel, actual: VisionTokens, expected: VisionTokens, rounding: float | None
) -> Iterator[Comparison]:
    yield _compare(model, "vision", "vision_tokens", actual.tokens, expected.tokens, rounding)
    for index, (ours, theirs) in enumerate(zip(actual.deepstack, expected.deepstack, strict=True)):
        yield _compare(model, "vision", f"deepstack.{index}", ours, theirs, rounding)


def _compare_kv(
    model: ExportedModel, key: str, actual: KVBlock, expected: KVBlock, rounding: float | None
) -> Iterator[Comparison]:
    is_token = expected.mask[:, None, :, None]
    yield _compare(model, key, "keys", actual.keys * is_token, expected.keys * is_token, rounding)
    yield _compare(model, key, "values", actual.values * is_token, expected.values * is_token, rounding)
    wrong = int((actual.next_position != expected.next_position).sum())
    yield Comparison(key, "next_position", wrong, 0, "positions that differ")


def _compare(
    model: ExportedModel, case: str, quantity: str, actual: Tensor, expected: Tensor, rounding: float | None
) -> Comparison:
    expected = expected.float().cpu()
    if rounding is not None:
        return compare_rounded(case, quantity, actual, expected, rounding)
    return compare(case, quantity, actual, expected, model.dtype, FLOAT32_EXPORT_MAX_ERROR)
