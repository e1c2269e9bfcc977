"""A checkpoint as ONNX graphs in a folder that explains itself (`xr0_engine/exported/manifest.py` draws it)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from xr0_engine.config import ModelConfig
from xr0_engine.export.graph import OPSET, WEIGHTS_FILE, Graph, WeightFile
from xr0_engine.export.inputs import INSTRUCTION, observations
from xr0_engine.export.stages import Plan, add_flow, add_prefill, add_step, add_vision
from xr0_engine.exported.integrity import remember
from xr0_engine.exported.manifest import (
    PRECISIONS,
    ExportCase,
    Manifest,
    StaticShapes,
    checkpoint_hash,
    record_files,
    stage_key,
)
from xr0_engine.exported.model import view_counts
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.quantization import Format, Quantization, read_quantization
from xr0_engine.model.quantized import put_quantized
from xr0_engine.model.vision import VisionTower
from xr0_engine.model.weights import (
    StoredTensor,
    check_model,
    check_quantized,
    checkpoint_shapes,
    fill_parameters,
    read_index,
    read_tensor,
    resolve_checkpoint,
)
from xr0_engine.model.writing import copy_description
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.whole import refuse_used, whole_folder

STAGES = {"vision": add_vision, "prefill": add_prefill, "flow": add_flow, "step": add_step}
SPARE_TOKENS = 16
"""Room for longer instructions than the example in the default prompt length."""
TOKENS_MULTIPLE = 32


def export_onnx(
    checkpoint: str | Path,
    case: ExportCase,
    precision: str,
    out: Path,
    tokens: Sequence[int] = (),
    stages: Sequence[str] = tuple(STAGES),
) -> Manifest:
    """Write the stages of one case to the folder `out`, which appears whole or not at all.

    precision: of PRECISIONS. tokens: prompt lengths to write graphs for; none is the length of an example's prompt with
    some room. stages: of STAGES. Raises ValueError for a wrong argument, a case that the checkpoint has no robot type
    for, or a folder that holds something; CheckpointError for the checkpoint; OSError if the disk lacks the room.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {', '.join(PRECISIONS)}; got {precision!r}")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise ValueError(f"stages: expected some of {', '.join(STAGES)}; got {', '.join(unknown) or 'none'}")
    refuse_used(out)
    folder = resolve_checkpoint(checkpoint)
    preprocess = Preprocessor.load(folder, None if case.profile is None else load_embodiment(case.profile))
    config, quantization = preprocess.config, _quantization(folder, preprocess.config.head.flow_steps)
    stored = read_index(folder, quantized=quantization is not None)
    if quantization is None:
        check_model(config, stored)
    else:
        check_quantized(config, stored, quantization.layers)
    shapes = static_shapes(preprocess, case, tokens)
    statistics = preprocess.statistics[case.robot_type]
    robot_types = _robot_types(preprocess, case)
    checkpoint_sha256 = checkpoint_hash(folder)
    metadata = {
        "case": json.dumps(vars(case)),
        "robot_types": json.dumps(robot_types),
        "action_statistics": _statistics(statistics),
        "checkpoint_sha256": checkpoint_sha256,
        "precision": precision,
    }
    with whole_folder(out, _needed_bytes(config, stages, PRECISIONS[precision])) as partial:
        written = write_graphs(config, stored, shapes, precision, partial, stages, metadata, quantization)
        copy_description(folder, partial)
        manifest = Manifest(
            precision=precision,
            opset=OPSET,
            case=case,
            shapes=shapes,
            robot_types=robot_types,
            checkpoint=str(checkpoint),
            checkpoint_sha256=checkpoint_sha256,
            stages=written,
            files=record_files(partial, [path.name for path in partial.iterdir()]),
        )
        manifest.write(partial)
    remember(manifest.located(out))
    return manifest


def _quantization(folder: Path, flow_steps: int) -> Quantization | None:
    """Raises CheckpointError for one that an export cannot express."""
    quantization = read_quantization(folder)
    if quantization is None:
        return None
    quantization.check_largest(folder, flow_steps)
    return quantization


def static_shapes(preprocess: Preprocessor, case: ExportCase, tokens: Sequence[int]) -> StaticShapes:
    """Raises ValueError for a case or prompt lengths that the checkpoint cannot have."""
    inputs = preprocess(observations(preprocess, case, [INSTRUCTION] * case.batch))
    shortest = inputs.input_ids.shape[1]
    if not tokens:
        tokens = [-(-(shortest + SPARE_TOKENS) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE]
    if min(tokens) < shortest:
        raise ValueError(f"tokens: expected at least {shortest}, the case's example prompt; got {min(tokens)}")
    length, (_, frames) = inputs.action_mask.shape[1], view_counts(preprocess.resolve(case.robot_type)[1])
    return StaticShapes(inputs.image_grids, case.batch, length, tuple(sorted(set(tokens))), frames)


@torch.inference_mode()
def write_graphs(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    shapes: StaticShapes,
    precision: str,
    folder: Path,
    stages: Sequence[str],
    metadata: Mapping[str, str],
    quantization: Quantization | None = None,
) -> dict[str, str]:
    """Graphs and weights into a folder that exists; each graph passes ONNX's checker and shape inference.

    quantization: of a checkpoint in 8 bits. Returns stage_key -> file name.
    """
    dtype = PRECISIONS[precision]
    layers = {} if quantization is None else quantization.layers
    network = _network(config, stored, shapes, dtype, layers)
    written = {}
    read, rows = (lambda name: read_tensor(stored[name])), (lambda name: stored[name].shape[0])
    with WeightFile(folder / WEIGHTS_FILE, read, rows) as weights:
        for stage in [stage for stage in STAGES if stage in stages]:
            for tokens in shapes.tokens if stage != "vision" else shapes.tokens[:1]:
                key = stage_key(stage, tokens)
                graph = Graph(weights, dtype, quantization)
                arguments = (graph, network) if stage == "vision" else (graph, network, tokens)
                STAGES[stage](*arguments)  # type: ignore[operator]
                written[key] = f"{key}.onnx"
                _save(graph.model(key, {**metadata, "stage": key}), folder / written[key])
    for name in written.values():
        onnx.checker.check_model(str(folder / name))
    return written


def _save(model: onnx.ModelProto, path: Path) -> None:
    """With the shape of every value. Weights are not part of the protobuf, so its limit of 2 GB is far."""
    onnx.save(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True), path)


def _network(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    shapes: StaticShapes,
    dtype: torch.dtype,
    layers: Mapping[str, Format],
) -> Plan:
    """What is computed from weights: by the model's own modules, in the precision in which the engine would."""
    with torch.device("meta"):
        head, tower = ActionHead(config), VisionTower(config.vision, config.head.compat_bf16_time)
        put_quantized(head, {name: each for name, each in layers.items() if not name.startswith("vlm.")}, str)
    head.to(dtype).to_empty(device="cpu")
    head.requires_grad_(False)
    fill_parameters(head, stored)
    embedding = read_tensor(stored["vlm.model.visual.pos_embed.weight"]).to(dtype)
    tower.pos_embed.weight = nn.Parameter(embedding, requires_grad=False)
    return Plan(config, shapes, head.modulation_table(), *tower.tables(shapes.grids))


def _needed_bytes(config: ModelConfig, stages: Sequence[str], dtype: torch.dtype) -> int:
    parts = {"vision": "vlm.model.visual.", "prefill": "vlm.model.language_model.", "flow": "dit."}
    if "step" in stages:
        stages = tuple(parts)
    prefixes = tuple(parts[stage] for stage in stages)
    shapes = checkpoint_shapes(config).items()
    return sum(torch.Size(shape).numel() for name, shape in shapes if name.startswith(prefixes)) * dtype.itemsize


def _robot_types(preprocess: Preprocessor, case: ExportCase) -> tuple[str, ...]:
    """Those with the case's chunk length and views; the images' size is a matter of each observation."""
    length = preprocess.statistics[case.robot_type].chunk_length
    views = view_counts(preprocess.resolve(case.robot_type)[1])
    return tuple(
        name
        for name, statistics in preprocess.statistics.items()
        if statistics.chunk_length == length and _views(preprocess, name) == views
    )


def _views(preprocess: Preprocessor, robot_type: str) -> tuple[int, int] | None:
    """None for a robot type that no profile is for."""
    try:
        return view_counts(preprocess.resolve(robot_type)[1])
    except ValueError:
        return None


def _statistics(statistics: ActionStatistics) -> str:
    """For those who run the graph by itself: actions * (std + epsilon) + mean are in the robot's units; where
    active_columns are named, the others are 0."""
    return json.dumps({**statistics.to_json(), "epsilon": statistics.epsilon})
