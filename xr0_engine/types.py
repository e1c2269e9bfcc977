"""The nouns that pass between the stages, one frozen dataclass each.

Shape legend: B batch, N VLM tokens (left padded), P image patches, L DiT layers, T chunk length, A action columns,
S state columns, H heads, D head_dim. NumPy on the robot's side, torch on the model's; this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class FileError(ValueError):
    """A file that cannot be used: the message names it, and the field or line at fault."""


class CheckpointError(FileError):
    """A checkpoint folder that cannot be used: the message names every file or tensor at fault."""


@dataclass(frozen=True)
class Observation:
    """What the robot sees, is told and feels at one instant.

    images: view key -> (height, width, 3) uint8 RGB, keys as in the embodiment profile (`base`, `left_wrist`, ...);
    where the profile has a history, (frames, height, width, 3), the oldest first (robot.history.History).
    instruction: the task in plain words; a missing capital and full stop are added where the checkpoint has it so.
    state: (S,) or (state_length, S) float32 or float64, proprio state, in the robot's own units, the oldest first.
    robot_type: key of the checkpoint's action statistics; None if the checkpoint holds exactly one.
    timestamp_s: when the images were taken, on the caller's clock; copied to the chunk.
    prepared: the images are what the model saw in training, already turned, resized and cropped; False: they are as the
    camera or simulator gives them, and the embodiment profile says what is done to them.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray
    robot_type: str | None = None
    timestamp_s: float | None = None
    prepared: bool = False


@dataclass(frozen=True)
class TokenizedObservation:
    """An Observation whose sender has made the model's inputs of it, as the released bimanual client does.

    input_ids: (N,) int64, the whole prompt, run as it is. pixel_values: (P, 3 * temporal_patch * patch * patch) float32
    in [-1, 1], patches of all images in the prompt's order, those of one merge block together. image_grids: per image,
    or temporal patch of a video, (height, width) in patches. state, robot_type, timestamp_s: as in Observation.
    action_mask: (T, A), not 0 where the sender takes a column to be used; refused where the robot type says otherwise.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    image_grids: tuple[tuple[int, int], ...]
    state: np.ndarray
    robot_type: str | None = None
    timestamp_s: float | None = None
    action_mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Guide:
    """What the next chunk is to go on from, for checkpoints that take no prefix: the flow is drawn toward it.

    actions: (G, A), robot units, in the frame of the new observation: what is executed and planned from its time on,
    at most T; none draws nowhere. frozen: how many of them are executed while the chunk is inferred. They count fully,
    those after them less and less.
    """

    actions: np.ndarray
    frozen: int


@dataclass(frozen=True)
class Inference:
    """One call of Engine.infer or Engine.infer_tokenized, as they have it, among those that wait for each other."""

    observation: Observation | TokenizedObservation
    prefix: np.ndarray | None = None
    noise: np.ndarray | None = None
    seed: int | None = None
    guide: Guide | None = None


@dataclass(frozen=True)
class ActionChunk:
    """The next T actions.

    actions: (T, A) float32, robot units; for layout `bimanual` anchored at the observation's pose (see decode.py).
    normalized: (T, A) float32, the model's own units, as sampled.
    active_columns: (A,) bool, the columns that the robot type uses anywhere in the chunk.
    prefix_length: how many leading actions were given (committed), not sampled.
    timing_ms: stage -> milliseconds: preprocess, vision, prefill, flow (one `step` where they run as one CUDA graph, or
    beside another call's), decode, total. In a batch: of the whole batch.
    bend: how far the flow's velocities were from one straight line, 0 to 1 (model/flow.py: bend); None where it was not
    asked for or the backend does not tell.
    """

    actions: np.ndarray
    normalized: np.ndarray
    active_columns: np.ndarray
    robot_type: str
    prefix_length: int = 0
    timestamp_s: float | None = None
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    bend: float | None = None


@dataclass(frozen=True)
class GuardWarning:
    """A guard's score that has passed its threshold: what a robot sees, feels or is told is not as in training.

    name: of the check and, of a view's, the view. detail: in words. time_s: of the observation, on its clock.
    """

    name: str
    value: float
    threshold: float
    detail: str
    time_s: float


@dataclass(frozen=True)
class ViewInfo:
    """What the policy makes of a view's raw frame, in this order; nothing of it where the images come prepared.

    title: the view's name in the prompt. rotate_180: turned by half a turn. resize: brought to (height, width) by
    Pillow's resize_filter, `bicubic` or `bilinear`; None leaves it as it is. center_crop: the fraction of each side
    that is kept, and enlarged back.
    """

    title: str
    rotate_180: bool = False
    resize: tuple[int, int] | None = None
    center_crop: float = 1.0
    resize_filter: str = "bicubic"


@dataclass(frozen=True)
class RobotInfo:
    """How one robot type is driven, as an engine, a server and its clients tell it.

    chunk_length: T, actions in a chunk. control_rate_hz: actions executed per second. replan_every: actions executed
    before the next inference starts, None where inference runs beside execution. views: image keys, in the prompt's
    order. layout: `plain` or `bimanual`, columns and anchoring of the actions. action_width: A. max_prefix: the longest
    prefix that the policy takes. step_columns: action columns that say how far to move, not where to.
    two_valued_columns: those with nothing between their values. preparation: what is made of a raw frame, per view in
    the order of views. embodiment: the profile's name. history: (frames, stride), of each view the newest frame and
    those that are stride, 2 stride, ... control steps older; None: a view is one picture. state_length: states of an
    observation, as far apart; None: one. None of the others: not known.
    """

    chunk_length: int
    control_rate_hz: float
    replan_every: int | None
    views: tuple[str, ...]
    layout: str
    action_width: int | None = None
    max_prefix: int | None = None
    step_columns: tuple[int, ...] | None = None
    two_valued_columns: tuple[int, ...] | None = None
    preparation: tuple[ViewInfo, ...] | None = None
    embodiment: str | None = None
    history: tuple[int, int] | None = None
    state_length: int | None = None

    @property
    def past_stride(self) -> int:
        """Control steps from one frame or state of the past to the next; 1 where nothing of the past is seen.

        Raises ValueError for several states without a history, which alone says how far apart they are.
        """
        if self.history is not None:
            return self.history[1]
        if (self.state_length or 1) > 1:
            raise ValueError(
                f"state_length: the policy takes {self.state_length} states and has no history, so nothing says how "
                "many control steps they are apart: give all of them yourself, as "
                f"History(FrameHistory(1, STRIDE), {self.state_length}) with the training's stride does"
            )
        return 1


@dataclass(frozen=True)
class ModelInputs:
    """A batch of observations as tensors, on the host until the engine moves them.

    input_ids: (B, N) int64; where the tokens of pictures and videos go, the id of an image's.
    attention_mask: (B, N) bool, False = left padding.
    pixel_values: (P, 3 * temporal_patch * patch * patch), all images in order of batch, then view; a video is as many
    images as it has temporal patches, each of several frames; or (P, 3 * patch * patch), where each frame of a temporal
    patch is the same picture. float32, float16 or bfloat16, on the host or on the network's device: every network takes
    each, and `Network.patch_buffer` is what suits it.
    image_grids: per image (height, width) in patches. position_ids: (3, B, N) int64, M-RoPE.
    preamble_length: leading tokens (padding aside) equal in every row and free of images: their KV can be kept.
    state: (B, state_length, S) float32. action_mask: (B, T, A) float32, 1 = column used by the robot type.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_grids: tuple[tuple[int, int], ...]
    position_ids: Tensor
    preamble_length: int
    state: Tensor
    action_mask: Tensor


@dataclass(frozen=True)
class VisionTokens:
    """Vision tower output. tokens: (image tokens, hidden); deepstack: the same per tap, for the first text layers."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True)
class KVBlock:
    """The VLM's keys and values that the DiT reads, kept so that more than one chunk can be sampled from them.

    keys, values: (L, B, kv_heads, N, D), DiT layer i at index i; keys after k_norm and RoPE.
    mask: (B, N) bool, False = padding. next_position: (3, B) int64, max VLM position per M-RoPE axis, plus one.
    action_mask: (B, T, A) float32, from the observation's robot type.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    next_position: Tensor
    action_mask: Tensor
