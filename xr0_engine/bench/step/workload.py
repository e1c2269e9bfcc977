"""The sizes of one call that its cost depends on, taken from a case or from inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xr0_engine.bench.cases import Setup
from xr0_engine.config import ModelConfig, VisionConfig
from xr0_engine.fused.prompts import bucket
from xr0_engine.model.weights import resolve_checkpoint
from xr0_engine.robot.limits import RELEASED_LIMITS, ImageLimits, load_limits, load_video_limits
from xr0_engine.robot.normalize import load_statistics, select_robot_type
from xr0_engine.robot.preprocess import orient, smart_resize
from xr0_engine.types import ModelInputs


@dataclass(frozen=True)
class Workload:
    """The sizes of one call that its cost depends on.

    grids: per image, and per temporal patch of a video, (height, width) in patches, of the whole batch; tokens: N,
    padding included; chunk_length: T; preamble_tokens: leading tokens whose KV is kept from an earlier call.
    """

    grids: tuple[tuple[int, int], ...]
    tokens: int
    chunk_length: int
    batch: int = 1
    preamble_tokens: int = 0

    @staticmethod
    def of(inputs: ModelInputs) -> Workload:
        """What a call with these inputs costs, its prompt head known."""
        batch, tokens = inputs.input_ids.shape
        return Workload(inputs.image_grids, tokens, inputs.action_mask.shape[1], batch, inputs.preamble_length)

    @property
    def padded_tokens(self) -> int:
        """N of the session that it runs in."""
        return bucket(self.tokens)

    @staticmethod
    def of_case(setup: Setup, kept: bool = False) -> tuple[ModelConfig, Workload]:
        """The case's nominal sizes, and the configuration. kept: with the prompt's head known from an earlier call, as
        in every call of a robot but its first. No weights are made or read.

        Raises ValueError for an unknown size, CheckpointError for a checkpoint that cannot be used.
        """
        case, history = setup.case, setup.case.embodiment.history
        if setup.checkpoint is None:
            config, (chunk_length, _) = setup.config(), setup.chunk()
            limits = RELEASED_LIMITS
        else:
            folder = resolve_checkpoint(setup.checkpoint)
            config = ModelConfig.load(folder)
            limits = (load_limits if history is None else load_video_limits)(folder, config.vision)
            statistics = load_statistics(folder, config.head.action_dim, config.std_epsilon, config.double_statistics)
            chunk_length = statistics[select_robot_type(statistics, case.robot_type)].chunk_length
        image = np.empty((*case.image_size, 3), np.uint8)
        pictures = 1 if history is None else history.frames // config.vision.temporal_patch_size
        grids = [
            image_grid(orient(image, view).shape, config.vision, limits)
            for view in case.embodiment.views
            for _ in range(pictures)
        ]
        preamble = case.preamble_tokens if kept else 0
        return config, Workload(tuple(grids) * case.batch, case.tokens, chunk_length, case.batch, preamble)


def image_grid(shape: Sequence[int], vision: VisionConfig, limits: ImageLimits) -> tuple[int, int]:
    """(height, width) in patches of an image; shape: (height, width, ...) before it is resized."""
    height, width = smart_resize(shape[0], shape[1], vision.patch_size * vision.spatial_merge_size, limits)
    return height // vision.patch_size, width // vision.patch_size
