"""Exported graphs or engines as a Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xr0_engine.backend import resolve_device
from xr0_engine.config import ModelConfig
from xr0_engine.exported.integrity import check_files
from xr0_engine.exported.manifest import (
    MANIFEST_FILE,
    PRECISIONS,
    EngineManifest,
    FileRecord,
    Manifest,
    check_sizes,
    sha256,
    stage_key,
)
from xr0_engine.exported.onnx_stage import OnnxStage
from xr0_engine.exported.tensorrt_stage import TensorRTStage
from xr0_engine.model.flow import Trace
from xr0_engine.model.network import Grids, Mark, full_buffer, step_by_stages, unmarked, whole_patches
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

BACKENDS = ("onnx", "tensorrt")

Stage = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Inputs by name, on the model's device, to outputs by name."""


class ExportedModel:
    """A Network over an export folder. Stages are opened when they are first used, and stay open.

    stages: those that the folder holds, by key, and their files' names; `step` runs the graph of the whole step where
    there is one. files: those that it runs from. Prompts are padded on the left to the export's length. Every method
    raises ValueError for inputs of another shape than the export's, before any work, and if the folder lacks the stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        manifest: Manifest,
        device: torch.device,
        backend: str,
        stages: Mapping[str, str],
        open_stage: Callable[[str], Stage],
        files: Mapping[Path, FileRecord],
    ) -> None:
        self.config = config
        self.backend = backend
        self.manifest = manifest
        self.files = files
        self.device = device
        self.dtype = PRECISIONS[manifest.precision]
        self._held = stages
        self._open = open_stage
        self._stages: dict[str, Stage] = {}

    @classmethod
    def load(cls, folder: Path, device: str, backend: str, check: bool = True) -> ExportedModel:
        """device: auto, cpu, cuda or cuda:N. backend: of BACKENDS, or auto: engines for this GPU if there are any.
        check: the files' SHA-256 sums too, unless they are remembered (integrity.py); False: their sizes alone.

        Raises ValueError for a folder that cannot be used or a device that is not there; opening a stage raises
        NotImplementedError for a precision that the device does not run, RuntimeError for a library that is missing.
        """
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: an export has auto, {', '.join(BACKENDS)}; got {backend!r}")
        manifest, config, chosen = Manifest.read(folder), ModelConfig.load(folder), resolve_device(device)
        check_them = check_files if check else check_sizes
        engines = _engines(folder)
        fitting = [] if chosen.type != "cuda" else [place for place in engines if _fits(engines[place], chosen)]
        if backend == "onnx" or (backend == "auto" and not fitting):
            check_them(manifest.located(folder))
            open_onnx = partial(_open_onnx, folder, manifest, chosen)
            return cls(config, manifest, chosen, "onnx", manifest.stages, open_onnx, manifest.located(folder))
        if not fitting:
            built = ", ".join(f"{each.target} ({each.compute_capability})" for each in engines.values()) or "none"
            raise ValueError(f"{folder}: no engines for device {chosen}; there are: {built} (xr0 export tensorrt)")
        place = fitting[0]
        if engines[place].export_sha256 != sha256(folder / MANIFEST_FILE):
            raise ValueError(f"{place} was built from other graphs than {folder} holds: build it again")
        # The graphs may be elsewhere.
        needed = {path: record for path, record in manifest.located(folder).items() if path.suffix == ".json"}
        files = needed | engines[place].located(place)
        check_them(files)
        open_engine = partial(_open_tensorrt, place, engines[place], chosen)
        return cls(config, manifest, chosen, "tensorrt", engines[place].stages, open_engine, files)

    def check_profile(self, preprocess: Preprocessor) -> None:
        """Raises ValueError where a robot type of the export has other views than the graphs are for, or videos of
        another length."""
        shapes = self.manifest.shapes
        of_view = -(-shapes.frames // self.config.vision.temporal_patch_size)
        expected = len(shapes.grids) // shapes.batch // of_view, shapes.frames
        for robot_type in self.manifest.robot_types:
            profile = preprocess.resolve(robot_type)[1]
            faults = [
                f"{name}: the export is for {ours}, the profile has {theirs}"
                for name, ours, theirs in zip(("views", "history: frames"), expected, view_counts(profile), strict=True)
                if ours != theirs
            ]
            if faults:
                raise ValueError(
                    f"robot type {robot_type!r}, embodiment {profile.name!r}: {'; '.join(faults)}: take the profile of "
                    "the export, or export again with this one (xr0 export onnx)"
                )

    def patch_buffer(self, grids: Grids) -> Tensor:
        # Graphs take float32 whatever they compute in.
        return full_buffer(self.config.vision, grids, torch.float32)

    def encode_images(self, inputs: ModelInputs) -> VisionTokens:
        self._check_images(inputs)
        self._check_batch(inputs)
        given = self._run("vision", {"pixel_values": self._pixel_values(inputs)})
        taps = range(len(self.config.vision.deepstack_layers))
        return VisionTokens(given["vision_tokens"], tuple(given[f"deepstack.{index}"] for index in taps))

    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        self._check_batch(inputs)
        tokens = self.manifest.shapes.bucket(inputs.input_ids.shape[1])
        padded = prompt(inputs, tokens)
        taps = {f"deepstack.{index}": tap for index, tap in enumerate(vision.deepstack)}
        given = self._run(stage_key("prefill", tokens), {**padded, "vision_tokens": vision.tokens, **taps})
        return KVBlock(
            given["keys"],
            given["values"],
            padded["attention_mask"].to(self.device),
            given["next_position"],
            inputs.action_mask.to(self.device, torch.float32),
        )

    def sample(
        self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor, trace: Trace = None
    ) -> Tensor:
        """As Network.sample. Raises NotImplementedError for a trace: a graph shows its end alone."""
        if trace is not None:
            raise NotImplementedError("trace: an export does not show its steps; the reference backend does")
        given = {
            "keys": kv.keys,
            "values": kv.values,
            "attention_mask": kv.mask,
            "next_position": kv.next_position,
            "state": state,
            "noise": noise,
            "prefix": prefix,
            "prefix_length": prefix_length,
            "action_mask": kv.action_mask,
        }
        return self._run(stage_key("flow", kv.keys.shape[3]), given)["actions"]

    def step(
        self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor, mark: Mark = unmarked
    ) -> Tensor:
        """As Network.step: by the graph of the whole step where the folder holds it, else stage by stage."""
        self._check_images(inputs)
        self._check_batch(inputs)
        tokens = self.manifest.shapes.bucket(inputs.input_ids.shape[1])
        key = stage_key("step", tokens)
        if key not in self._held:
            return step_by_stages(self, inputs, noise, prefix, prefix_length, mark)
        given = {
            "pixel_values": self._pixel_values(inputs),
            **prompt(inputs, tokens),
            "state": inputs.state,
            "noise": noise,
            "prefix": prefix,
            "prefix_length": prefix_length,
            "action_mask": inputs.action_mask,
        }
        actions = self._run(key, given)["actions"]
        mark("step")
        return actions

    def _check_images(self, inputs: ModelInputs) -> None:
        grids = self.manifest.shapes.grids
        if inputs.image_grids != grids:
            raise ValueError(
                f"images: the export is for patch grids {list(grids)}, got {list(inputs.image_grids)}: "
                "other image sizes, views or batch"
            )

    def _pixel_values(self, inputs: ModelInputs) -> Tensor:
        return whole_patches(inputs.pixel_values.float(), self.config.vision)

    def _check_batch(self, inputs: ModelInputs) -> None:
        shapes = self.manifest.shapes
        expected = (shapes.batch, shapes.chunk_length)
        if inputs.action_mask.shape[:2] != expected:
            raise ValueError(
                f"observations: the export is for a batch of {expected[0]} and chunks of {expected[1]} actions, got "
                f"{inputs.action_mask.shape[0]} and {inputs.action_mask.shape[1]}"
            )

    def _run(self, key: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if key not in self._stages:
            self._stages[key] = self._open(key)
        return self._stages[key]({name: value.to(self.device) for name, value in inputs.items()})


def view_counts(profile: Embodiment) -> tuple[int, int]:
    """Views, and frames of each: 1 where they are pictures."""
    return len(profile.views), 1 if profile.history is None else profile.history.frames


def refuse_other_model(export: ModelConfig, checkpoint: ModelConfig) -> None:
    """Raises ValueError that names the fields in which a checkpoint beside an export describes another model."""
    ours, theirs = _fields(export), _fields(checkpoint)
    if export.family != checkpoint.family:
        # Nearly all differ then.
        ours, theirs = {"family": export.family}, {"family": checkpoint.family}
    different = [
        f"{name} is {ours[name]} in the export, {theirs[name]} there" for name in ours if ours[name] != theirs[name]
    ]
    if different:
        raise ValueError(
            f"config.json: the checkpoint is of another model than the export: {'; '.join(different)}: name the one "
            "that it was made from, or export this one (xr0 export onnx)"
        )


def _fields(config: ModelConfig) -> dict[str, object]:
    """Name -> value of all that decides what a model computes."""
    parts = {name: vars(getattr(config, name)) for name in ("text", "vision", "head", "tokens")}
    found: dict[str, object] = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    return found | {name: getattr(config, name) for name in ("std_epsilon", "normalize_instruction")}


def prompt(inputs: ModelInputs, tokens: int) -> dict[str, Tensor]:
    """The prompt's tensors as graphs take them, padded on the left to `tokens`."""
    missing = tokens - inputs.input_ids.shape[1]

    def pad(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (missing, 0))

    return {
        "input_ids": pad(inputs.input_ids),
        "attention_mask": pad(inputs.attention_mask),
        "position_ids": pad(inputs.position_ids),
    }


def _file(place: Path, stages: Mapping[str, str], key: str) -> Path:
    if key not in stages:
        raise ValueError(f"{place} holds no {key}, only {', '.join(stages)}: export that stage too")
    return place / stages[key]


def _open_onnx(folder: Path, manifest: Manifest, device: torch.device, key: str) -> Stage:
    return OnnxStage(_file(folder, manifest.stages, key), device)


def _open_tensorrt(place: Path, engines: EngineManifest, device: torch.device, key: str) -> Stage:
    return TensorRTStage(_file(place, engines.stages, key), engines.builder, device)


def _engines(folder: Path) -> dict[Path, EngineManifest]:
    """The folders of engines in an export."""
    return {path.parent: EngineManifest.read(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST_FILE}"))}


def _fits(engines: EngineManifest, device: torch.device) -> bool:
    return engines.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(device))
