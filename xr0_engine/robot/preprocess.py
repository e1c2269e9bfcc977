"""Observation to model inputs: image patches, prompt tokens and their positions, state, action mask (spec section 3).

Images are processed exactly as transformers' PIL Qwen2-VL processor does, positions exactly as its Qwen3-VL model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from xr0_engine.config import ModelConfig, VisionConfig
from xr0_engine.robot import patches
from xr0_engine.robot.embodiment import Embodiment, View, checkpoint_embodiment, embodiment_for
from xr0_engine.robot.images import aspect_fault
from xr0_engine.robot.limits import RELEASED_LIMITS, ImageLimits, load_limits, load_video_limits
from xr0_engine.robot.normalize import ActionStatistics, check_states, load_statistics, select_robot_type
from xr0_engine.robot.observation import checked_state, validate_observation
from xr0_engine.robot.prompt import (
    PromptTokenizer,
    check_prompt_tokens,
    instruction_rule,
    preamble_length,
)
from xr0_engine.robot.views import orient as orient
from xr0_engine.types import ModelInputs, Observation

MIN_PIXELS, MAX_PIXELS = RELEASED_LIMITS.min_pixels, RELEASED_LIMITS.max_pixels


def smart_resize(height: int, width: int, factor: int = 32, limits: ImageLimits = RELEASED_LIMITS) -> tuple[int, int]:
    """The (height, width) that an image is resized to: multiples of factor, pixels within limits, aspect roughly kept.

    factor: patch size times spatial merge size. Raises ValueError if one side is more than 200 times the other, and
    where nothing may be resized for sides that are no multiples of factor, or more pixels than the limits have.
    """
    if fault := aspect_fault(height, width):
        raise ValueError(f"image: got {fault}")
    if not limits.resize:
        if height % factor or width % factor or height * width > limits.max_pixels:
            raise ValueError(
                f"image: expected multiples of {factor} pixels, at most {limits.max_pixels} in all, as the checkpoint "
                f"resizes nothing (do_resize), got height {height}, width {width}"
            )
        return height, width
    # Python's round, to the even neighbour on a tie, is part of the reference.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


PatchBuffer: TypeAlias = Callable[[tuple[tuple[int, int], ...]], torch.Tensor]
"""As Network.patch_buffer: (height, width) in patches of each image -> where they are to be written."""


def images_to_patches(
    images: Sequence[np.ndarray],
    vision: VisionConfig,
    threads: int = 1,
    limits: ImageLimits = RELEASED_LIMITS,
    buffer: PatchBuffer | None = None,
    video_limits: ImageLimits | None = None,
) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
    """Resize images and cut them into normalised patches (spec section 3.1).

    images: (H, W, 3) uint8 RGB each, or (temporal_patch, H, W, 3) for a video's frames in one temporal patch, any
    strides. threads: how many to use at most. limits: the checkpoint's; video_limits: of a video's frames, None is
    limits. buffer: (P, patch_dim), or (P, frame_dim) for one frame of each temporal patch, which with videos is widened
    to whole ones; None is new memory for whole patches in float32. Returns it, filled with the patches of all images in
    sequence, in [-1, 1], those of one merge block together, and (grid_h, grid_w) of each image. Raises ValueError for
    an aspect ratio above 200.
    """
    patch, merge = vision.patch_size, vision.spatial_merge_size
    of_video = video_limits or limits
    sizes = [
        smart_resize(image.shape[-3], image.shape[-2], patch * merge, of_video if image.ndim == 4 else limits)
        for image in images
    ]
    grids = tuple((height // patch, width // patch) for height, width in sizes)
    if buffer is None:
        out = torch.empty(sum(height * width for height, width in grids), vision.patch_dim)
    else:
        out = buffer(grids)
        if out.shape[1] != vision.patch_dim and any(image.ndim == 4 for image in images):
            shape = (len(out), vision.patch_dim)
            out = torch.empty(shape, dtype=out.dtype, device=out.device, pin_memory=out.is_pinned())
    return patches.images_to_patches(images, sizes, patch, vision.frames_of(out.shape[1]), merge, out, threads), grids


def position_ids(
    input_ids: np.ndarray,
    attention: np.ndarray,
    image_grids: Sequence[tuple[int, int]],
    image_token: int,
    merge: int,
) -> np.ndarray:
    """M-RoPE positions of one row: text counts up on all three axes, an image spans its merged rows and columns.

    input_ids, attention: (N,) int64 and bool or 0/1, padding anywhere. image_grids: (height, width) in patches per
    image. image_token: its id. merge: spatial merge size. Returns (3, N) int64 in the order time, height, width, 0 at
    padding. Raises ValueError if the image tokens do not match the grids.
    """
    kept = np.flatnonzero(attention)
    is_image = input_ids[kept] == image_token
    sequence = np.empty((3, len(kept)), dtype=np.int64)
    # cursor counts tokens, position counts positions: an image has more tokens than positions.
    cursor = position = 0
    for grid_height, grid_width in image_grids:
        rows, columns = grid_height // merge, grid_width // merge
        start = cursor + int(np.argmax(is_image[cursor:])) if cursor < len(kept) else cursor
        stop = start + rows * columns
        if stop > len(kept) or not is_image[start:stop].all():
            raise ValueError(
                f"input_ids: expected {rows * columns} image tokens in a row for grid {grid_height, grid_width}"
            )
        sequence[:, cursor:start] = position + np.arange(start - cursor)
        position += start - cursor
        sequence[0, start:stop] = position
        sequence[1, start:stop] = position + np.repeat(np.arange(rows), columns)
        sequence[2, start:stop] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        cursor = stop
    if is_image[cursor:].any():
        raise ValueError(f"input_ids: expected image tokens for {len(image_grids)} images, got more")
    sequence[:, cursor:] = position + np.arange(len(kept) - cursor)
    positions = np.zeros((3, len(input_ids)), dtype=np.int64)
    positions[:, kept] = sequence
    return positions


class Preprocessor:
    """Turns batches of observations into ModelInputs for one checkpoint.

    embodiment: used for every robot type; None chooses the built-in profile that lists the observation's robot type.
    limits: of images, the checkpoint's; video_limits: of videos, None is those of images.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PromptTokenizer,
        statistics: Mapping[str, ActionStatistics],
        embodiment: Embodiment | None = None,
        limits: ImageLimits = RELEASED_LIMITS,
        video_limits: ImageLimits | None = None,
    ) -> None:
        self.config = config
        self.limits, self.video_limits = limits, video_limits or limits
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.embodiment = embodiment

    @classmethod
    def load(cls, folder: Path, embodiment: Embodiment | None = None) -> Preprocessor:
        """Read all but the weights of a checkpoint folder.

        embodiment: None is the one that the checkpoint was trained through, if it says so. Raises CheckpointError for a
        file that cannot be used.
        """
        config = ModelConfig.load(folder)
        statistics = load_statistics(folder, config.head.action_dim, config.std_epsilon, config.double_statistics)
        check_states(folder, statistics, config.head.state_dim)
        tokenizer = PromptTokenizer.load(folder, config.tokens, config.text.vocab_size, config.choice_tokens)
        embodiment = embodiment or checkpoint_embodiment(folder)
        made = cls(config, tokenizer, statistics, embodiment, load_limits(folder, config.vision))
        if made.sees_videos():
            made.video_limits = load_video_limits(folder, config.vision)
        return made

    def sees_videos(self) -> bool:
        """Whether a robot type of the statistics has a profile with a history; one that no profile is known for has
        none."""
        for robot_type in self.statistics:
            try:
                if self.resolve(robot_type)[1].history is not None:
                    return True
            except ValueError:
                continue
        return False

    def resolve(self, robot_type: str | None) -> tuple[str, Embodiment]:
        """The robot type and the embodiment profile that an observation's robot type means; None is the only one.

        Raises ValueError that lists the known robot types, or says that no built-in profile is for this one.
        """
        robot_type = select_robot_type(self.statistics, robot_type)
        return robot_type, self.embodiment or embodiment_for(robot_type)

    def __call__(self, observations: Sequence[Observation], buffer: PatchBuffer | None = None) -> ModelInputs:
        """Model inputs of one batch, padded on the left to the longest prompt.

        buffer: for pixel_values, as images_to_patches takes it. Raises ValueError for an empty batch, a wrong
        observation, or robot types whose chunks differ in length.
        """
        if not isinstance(observations, Sequence) or not observations:
            kind = "none" if isinstance(observations, Sequence) else type(observations).__name__
            raise ValueError(f"observations: expected a list of at least one Observation, got {kind}")
        resolved = [self.check(observation) for observation in observations]
        robot_types = [robot_type for robot_type, _ in resolved]
        lengths = {name: self.statistics[name].chunk_length for name in robot_types}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"observations: expected one chunk length in a batch, got {lengths}")

        vision = self.config.vision
        for observation, (_, embodiment) in zip(observations, resolved, strict=True):
            check_prompt_tokens(sum(self._image_tokens(observation, view, embodiment) for view in embodiment.views))
        images = [
            image
            for observation, (_, embodiment) in zip(observations, resolved, strict=True)
            for view in embodiment.views
            for image in self._images(observation, view)
        ]
        pixel_values, grids = images_to_patches(
            images, vision, torch.get_num_threads(), self.limits, buffer, self.video_limits
        )
        remaining = iter(grids)
        forms = [embodiment.prompt_form(vision.temporal_patch_size) for _, embodiment in resolved]
        grids_of_row = [
            [next(remaining) for _ in range(len(embodiment.views) * len(form.stamps))]
            for (_, embodiment), form in zip(resolved, forms, strict=True)
        ]

        tokens, merge = self.config.tokens, vision.spatial_merge_size
        prompts = [
            self.tokenizer.encode(
                [view.title for view in embodiment.views],
                [height * width // merge**2 for height, width in row_grids],
                observation.instruction,
                instruction_rule(embodiment.instruction, self.config.normalize_instruction),
                form,
            )
            for observation, (_, embodiment), row_grids, form in zip(
                observations, resolved, grids_of_row, forms, strict=True
            )
        ]
        input_ids, attention = _pad_left(prompts, self.tokenizer.pad_id)
        positions = [
            position_ids(ids, mask, row_grids, tokens.image, merge)
            for ids, mask, row_grids in zip(input_ids, attention, grids_of_row, strict=True)
        ]
        return ModelInputs(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention),
            pixel_values=pixel_values,
            image_grids=grids,
            position_ids=torch.from_numpy(np.stack(positions, axis=1)),
            preamble_length=_common_head(prompts, tokens.vision_start),
            state=torch.from_numpy(
                np.stack(
                    [
                        checked_state(observation.state, self.config, self.statistics[name].state)
                        for observation, name in zip(observations, robot_types, strict=True)
                    ]
                )
            ),
            action_mask=torch.from_numpy(np.stack([self.statistics[name].action_mask for name in robot_types])),
        )

    def example(self, robot_type: str | None, image_size: tuple[int, int]) -> Observation:
        """As Engine.example."""
        robot_type, embodiment = self.resolve(robot_type)
        rng, head = np.random.default_rng(0), self.config.head
        video = () if embodiment.history is None else (embodiment.history.frames,)
        rows = () if head.state_length == 1 else (head.state_length,)
        return Observation(
            images={
                view.key: rng.integers(0, 256, (*video, *image_size, 3), dtype=np.uint8) for view in embodiment.views
            },
            instruction="Pick up the red cube and place it on the plate.",
            state=rng.standard_normal((*rows, head.state_dim)).astype(np.float32),
            robot_type=robot_type,
        )

    def _images(self, observation: Observation, view: View) -> Iterator[np.ndarray]:
        """What fills one grid of patches each: a view's picture, or the frames of a temporal patch of its video."""
        frames = observation.images[view.key]
        if not observation.prepared:
            frames = orient(frames, view)
        if frames.ndim == 3:
            yield frames
        else:
            step = self.config.vision.temporal_patch_size
            yield from (frames[first : first + step] for first in range(0, len(frames), step))

    def _image_tokens(self, observation: Observation, view: View, embodiment: Embodiment) -> int:
        """How many a view will have, before anything is made of its frames."""
        *video, height, width, _ = observation.images[view.key].shape
        if not observation.prepared and view.resize is not None:
            height, width = view.resize
        vision = self.config.vision
        side = vision.patch_size * vision.spatial_merge_size
        limits = self.limits if embodiment.history is None else self.video_limits
        height, width = smart_resize(height, width, side, limits)
        return math.prod(video) // (vision.temporal_patch_size if video else 1) * (height * width // side**2)

    def check(self, observation: Observation) -> tuple[str, Embodiment]:
        """resolve, and everything else about the observation. Raises ValueError that names the field at fault."""
        if not isinstance(observation, Observation):
            raise ValueError(f"observations: expected Observation, got {type(observation).__name__}")
        robot_type, embodiment = self.resolve(observation.robot_type)
        validate_observation(observation, embodiment, self.config)
        if embodiment.history is not None:
            embodiment.prompt_form(self.config.vision.temporal_patch_size)
            self.tokenizer.check_videos()
        return robot_type, embodiment


def _pad_left(rows: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(row) for row in rows)
    input_ids = np.full((len(rows), longest), pad, dtype=np.int64)
    attention = np.zeros((len(rows), longest), dtype=bool)
    for index, row in enumerate(rows):
        input_ids[index, longest - len(row) :] = row
        attention[index, longest - len(row) :] = True
    return input_ids, attention


def _common_head(prompts: Sequence[np.ndarray], vision_start: int) -> int:
    """How many leading tokens are equal in all prompts and come before any image."""
    length = min(preamble_length(prompt, vision_start) for prompt in prompts)
    differs = np.any([prompt[:length] != prompts[0][:length] for prompt in prompts], axis=0)
    return int(np.argmax(differs)) if differs.any() else length
